"""Models that a task trained at another commit are read from DVC's cache by their md5 sums."""

import hashlib
import json
from pathlib import Path

import pytest
from data_helpers import write_bpe
from dvc.repo import Repo
from pydantic import TypeAdapter
from toys import make_toy_model

from stages.core.artifacts import write_json
from stages.core.errors import StageError
from stages.core.pins import TrainedModel, get_pin
from stages.hub.files import find_source_files, find_weights_files
from stages.model.schema import Model
from stages.model.start import build_start_model
from stages.tokens.schema import TokenizerSource

SIZE = 300


def write_to_cache(cache: Path, content: bytes, suffix: str = "") -> str:
    """Write `content` to DVC's cache and return its md5."""
    md5 = hashlib.md5(content).hexdigest() + suffix
    file = cache / md5[:2] / md5[2:]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return md5


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Cache of a new DVC repository in the current directory."""
    monkeypatch.chdir(tmp_path)
    Repo.init(no_scm=True).close()
    return tmp_path / ".dvc/cache/files/md5"


@pytest.fixture
def origin(cache: Path, tmp_path: Path) -> TrainedModel:
    """Pin of a model in the cache, with its tokenizer."""
    directory = write_bpe(tmp_path / "model", {"eos_token": "<|endoftext|>"}, SIZE)
    make_toy_model("gpt2", vocab_size=SIZE).save_pretrained(directory)
    entries = [
        {"md5": write_to_cache(cache, file.read_bytes()), "relpath": file.name} for file in sorted(directory.iterdir())
    ]
    return TrainedModel(
        rev="lively-lamb", task="causal", md5=write_to_cache(cache, json.dumps(entries).encode(), ".dir")
    )


def make_model(origin: TrainedModel) -> Model:
    common = {"task": "causal", "path": None, "revision": None, "files": None, "from_scratch": False}
    return Model(**common, from_=origin, max_positions=64, config={"model_type": "gpt2"})


def write_tokens(directory: Path, tokenizer: Path) -> Path:
    """Write the part of tokenize's output that a model needs: the tokenizer and the vocabulary."""
    (directory / "tokenizer").mkdir(parents=True)
    for file in tokenizer.iterdir():
        (directory / "tokenizer" / file.name).write_bytes(file.read_bytes())
    vocabulary = {"size": SIZE, "special": {"eos_token": 0}, "prefix": [], "suffix": [0], "lead": [0]}
    write_json(directory / "stats.json", {"vocabulary": vocabulary})
    return directory


def test_trained_model_in_the_cache_is_read_unchanged(origin: TrainedModel, tmp_path: Path) -> None:
    tokens = write_tokens(tmp_path / "tokens", tmp_path / "model")
    built = build_start_model(make_model(origin), None, tokens, seed=5).state_dict()
    expected = make_toy_model("gpt2", vocab_size=SIZE).state_dict()
    assert all(weight.equal(expected[name]) for name, weight in built.items())
    files = find_source_files(
        "model.tokenizer", TokenizerSource(from_=origin), ["tokenizer.json", "nothing.json"], ["tokenizer.json"]
    )
    assert {name: file.read_bytes() for name, file in files.items()} == {
        "tokenizer.json": (tmp_path / "model/tokenizer.json").read_bytes()
    }
    assert get_pin(make_model(origin)) == {"path": "models/causal", "md5": origin.md5}
    stored = TypeAdapter(Model).dump_python(make_model(origin), by_alias=True)
    assert stored["from"]["md5"] == origin.md5
    assert TypeAdapter(Model).validate_json(json.dumps(stored)) == make_model(origin)


def test_trained_model_on_text_of_another_tokenizer_names_both_tokenizers(origin: TrainedModel, tmp_path: Path) -> None:
    tokens = write_tokens(tmp_path / "tokens", write_bpe(tmp_path / "other", {"eos_token": "<|endoftext|>"}, SIZE - 10))
    with pytest.raises(
        StageError, match=r"models/causal of lively-lamb was trained with .* of 300 tokens.*tokens/tokenizer, of 290"
    ):
        build_start_model(make_model(origin), None, tokens, seed=5)


def test_trained_model_missing_in_the_cache_is_an_error_with_the_remedy(cache: Path, origin: TrainedModel) -> None:
    (listing,) = cache.glob("*/*.dir")
    weights = {entry["relpath"]: entry["md5"] for entry in json.loads(listing.read_bytes())}["model.safetensors"]
    file = cache / weights[:2] / weights[2:]
    content = file.read_bytes()
    file.unlink()
    with pytest.raises(
        StageError,
        match=r"not in DVC's cache, or lacks model.safetensors there: .*pin_model models/causal --rev lively-lamb",
    ):
        find_weights_files("model", make_model(origin))
    file.write_bytes(content[:-1] + b"x")
    with pytest.raises(StageError, match=r"model\.safetensors is damaged in DVC's cache"):
        find_weights_files("model", make_model(origin))
    listing.unlink()
    with pytest.raises(StageError, match=r"\(" + str(origin.md5) + r"\) is not in DVC's cache: fetch it"):
        find_weights_files("model", make_model(origin))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"from_": TrainedModel(rev="lamb", task="causal")},
            "is not pinned: run python -m tools.pin_model models/causal --rev lamb",
        ),
        ({"path": "here"}, "model.from and model.path are both set"),
        ({"files": {"a": "0f"}}, "model.from and model.files are both set"),
    ],
)
def test_trained_model_without_exactly_one_pin_is_refused(changes: dict, message: str) -> None:
    origin = TrainedModel(rev="lamb", task="causal", md5="0" * 32 + ".dir")
    values = {"task": "causal", "path": None, "revision": None, "files": None, "from_scratch": False, "from_": origin}
    with pytest.raises(ValueError, match=message):
        Model(**(values | changes), max_positions=64, config={})
