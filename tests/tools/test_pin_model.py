"""Tests of tools.pin_model, which turns a directory of a model or tokenizer into a configuration of the stages."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from data_helpers import CAUSAL_TOKENS, MLM_TOKENS, hash_files, write_bpe

from stages.core.config import CONF, validate_values
from stages.hub.files import find_pinned_files, find_weights_files
from stages.model.schema import Model
from stages.tokens.schema import ModelTokenizer, TokenizerSource
from tools import pin_model

GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_positions": 64}
ROBERTA = {"model_type": "roberta", "architectures": ["RobertaForMaskedLM"], "max_position_embeddings": 66}


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Current directory, a project with an empty conf/model."""
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


def write_model(directory: Path, settings: dict[str, Any], weights: str | None = "model.safetensors") -> Path:
    """Write a toy tokenizer, the configuration and fake weights to `directory` and return it."""
    write_bpe(directory, MLM_TOKENS if settings["model_type"] == "roberta" else CAUSAL_TOKENS)
    (directory / "config.json").write_text(json.dumps(settings))
    (directory / "generation_config.json").write_text("{}")
    (directory / "README.md").write_text("not pinned")
    if weights is not None:
        (directory / weights).write_text("weights")
    return directory


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["pin_model", *map(str, arguments)])
    pin_model.main()


def run_refused(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> str:
    """Run the command, which must fail without writing m.yaml, and return its error."""
    with pytest.raises(SystemExit) as exit_:
        run(monkeypatch, *arguments)
    assert not Path("conf/model/m.yaml").exists()
    return str(exit_.value)


def read_config(name: str) -> Any:
    return yaml.safe_load(Path(f"conf/model/{name}.yaml").read_text(encoding="utf-8"))


def load_model_config(name: str) -> Model:
    """Load the configuration with both schemas that read it."""
    values = read_config(name)
    assert validate_values(ModelTokenizer, values, "tokenize").tokenizer.path is not None
    return validate_values(Model, values, "train")


@pytest.mark.parametrize(
    ("settings", "options", "task", "positions", "from_scratch"),
    [
        (GPT2, [], "causal", 64, False),
        (GPT2, ["--from-scratch"], "causal", 64, True),
        (ROBERTA, [], "mlm", 64, False),
        (ROBERTA | {"pad_token_id": 0}, [], "mlm", 65, False),
        (ROBERTA | {"architectures": None}, [], "mlm", 64, False),
        (GPT2 | {"architectures": None}, [], "causal", 64, False),
        (GPT2, ["--task", "mlm"], "mlm", 64, False),
    ],
)
def test_pin_model_of_a_checkpoint_writes_a_valid_config(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    options: list[str],
    task: str,
    positions: int,
    from_scratch: bool,
) -> None:
    directory = write_model(tmp_path / "m", settings)
    run(monkeypatch, directory, *options)
    model = load_model_config("m")
    assert (model.task, model.max_positions, model.from_scratch) == (task, positions, from_scratch)
    assert (model.path, model.revision, model.config) == (str(directory), None, {"model_type": settings["model_type"]})
    assert set(read_config("m")) == set(yaml.safe_load((CONF / "model/tiny-gpt2.yaml").read_text(encoding="utf-8")))


@pytest.mark.parametrize("options", [[], ["--from-scratch"]])
def test_pin_model_of_a_checkpoint_pins_the_files_that_stages_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    directory = write_model(tmp_path / "m", GPT2)
    run(monkeypatch, directory, *options)
    names = {"config.json", "generation_config.json"} | ({"model.safetensors"} if not options else set())
    files = read_config("m")["files"]
    assert files == {name: value for name, value in hash_files(directory).items() if name in names}
    assert set(read_config("m")["tokenizer"]["files"]) == {"tokenizer.json", "tokenizer_config.json", "config.json"}
    find_pinned_files("model", str(directory), None, files, list(names), ["config.json"])


def test_pin_model_of_sharded_weights_pins_index_and_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write_model(tmp_path / "m", GPT2, "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    run(monkeypatch, directory)
    assert len(find_weights_files("model", TokenizerSource(path=str(directory), files=read_config("m")["files"]))) == 2


@pytest.mark.parametrize(
    ("model_type", "tokens", "task", "settings"),
    [
        ("gpt2", CAUSAL_TOKENS, "causal", {"model_type": "gpt2"}),
        ("bert", MLM_TOKENS, "mlm", {"model_type": "bert"}),
        ("roberta", MLM_TOKENS, "mlm", {"model_type": "roberta", "max_position_embeddings": 514}),
    ],
)
def test_pin_model_of_only_a_tokenizer_writes_a_model_from_scratch(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model_type: str,
    tokens: dict[str, str],
    task: str,
    settings: dict[str, Any],
) -> None:
    run(monkeypatch, write_bpe(tmp_path / "m", tokens), "--model-type", model_type)
    model = load_model_config("m")
    assert (model.task, model.config, model.from_scratch, model.path) == (task, settings, True, None)
    assert model.max_positions == 512
    assert set(read_config("m")) == set(yaml.safe_load((CONF / "model/tiny-gpt2.yaml").read_text(encoding="utf-8")))


def test_pin_model_says_how_to_use_the_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, write_model(tmp_path / "m", ROBERTA), "--name", "mine")
    assert "-S tasks.mlm.model=mine" in capsys.readouterr().out
    assert load_model_config("mine").task == "mlm"


def test_pin_model_of_a_directory_with_special_characters_gets_a_plain_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = write_model(tmp_path / "my model, naïve: v1.0", GPT2)
    run(monkeypatch, directory)
    (file,) = Path("conf/model").iterdir()
    assert not set(" ,:'\"") & set(file.name)
    assert load_model_config(file.stem).path == str(directory)


def test_pin_model_of_a_relative_directory_writes_the_absolute_path(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(workplace / "m", GPT2)
    run(monkeypatch, "m")
    assert load_model_config("m").path == str(workplace / "m")


def test_pin_model_of_a_name_that_exists_is_refused_without_force(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = write_model(tmp_path / "m", GPT2)
    run(monkeypatch, directory)
    before = Path("conf/model/m.yaml").read_text()
    (directory / "model.safetensors").write_text("other weights")
    with pytest.raises(SystemExit, match=r"conf/model/m\.yaml exists.*--name.*--force"):
        run(monkeypatch, directory)
    assert Path("conf/model/m.yaml").read_text() == before
    run(monkeypatch, directory, "--force")
    assert read_config("m")["files"]["model.safetensors"] == hash_files(directory)["model.safetensors"]


def test_pin_model_of_an_absent_directory_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"{tmp_path / 'm'} is not a directory" in run_refused(monkeypatch, tmp_path / "m")


def test_pin_model_of_a_directory_without_tokenizer_names_it_and_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = write_model(tmp_path / "m", GPT2)
    (directory / "tokenizer.json").unlink()
    message = run_refused(monkeypatch, directory)
    assert f"{directory} has no tokenizer" in message
    assert "tokenizer.json" in message


@pytest.mark.parametrize("weights", ["pytorch_model.bin", None])
def test_pin_model_without_safetensors_is_refused_unless_from_scratch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str | None
) -> None:
    directory = write_model(tmp_path / "m", GPT2, weights)
    message = run_refused(monkeypatch, directory)
    assert str(directory) in message
    assert "safetensors" in message
    run(monkeypatch, directory, "--from-scratch")
    assert set(read_config("m")["files"]) == {"config.json", "generation_config.json"}


def test_pin_model_of_only_a_tokenizer_asks_for_the_architecture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = write_bpe(tmp_path / "m", CAUSAL_TOKENS)
    message = run_refused(monkeypatch, directory)
    assert str(directory) in message
    assert "--model-type" in message


def test_pin_model_with_unbounded_positions_asks_for_max_positions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = run_refused(monkeypatch, write_model(tmp_path / "m", {"model_type": "bloom"}))
    assert "max_positions" in message


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("raw", [b"{", b"[]", b"\xff"])
def test_pin_model_of_a_damaged_file_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, raw: bytes
) -> None:
    directory = write_model(tmp_path / "m", GPT2 | {"architectures": None})
    (directory / name).write_bytes(raw)
    assert str(directory / name) in run_refused(monkeypatch, directory)
