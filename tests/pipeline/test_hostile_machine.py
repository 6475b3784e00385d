"""Models that do not fit, training that diverges, and machines without enough memory, disk space or permissions."""

import json
import os
import re
import secrets
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from data_helpers import hash_files, make_questions, read_stats, write_jsonl, write_raw, write_tokens
from hostile import AS_UNPRIVILEGED, list_files, mount, needs_modes, run_process_for_error, run_stage_for_error
from toys import make_toy_model

from stages.core.artifacts import SPLITS, Blocks
from stages.figures import metrics
from stages.model.schema import Model
from stages.shell import app

# -- models ------------------------------------------------------------------------------------------------------------


GPT2 = {"model_type": "gpt2"}


class Case(NamedTuple):
    name: str
    """Description of the fault."""
    change: Callable[[Path], Any]
    """Function that changes the directory of a GPT-2 with 300 tokens, 64 positions and two layers of width 16."""
    message: str
    """Part of the error; DIR is replaced by the model's directory."""
    config: Mapping[str, Any] = MappingProxyType(GPT2)
    """Value of model.config."""


def set_config(**values: Any) -> Callable[[Path], Any]:
    """Return a function that sets values in config.json."""

    def change(d: Path) -> None:
        (d / "config.json").write_text(json.dumps(json.loads((d / "config.json").read_text()) | values))

    return change


def add_code(**values: Any) -> Callable[[Path], Any]:
    """Return a function that adds custom code, which would create the file TOUCHED, to a model."""

    def change(d: Path) -> None:
        set_config(auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}, **values)(d)
        (d / "own.py").write_text(f"open({str(d / 'TOUCHED')!r}, 'w')")

    return change


def truncate(name: str, keep: float) -> Callable[[Path], Any]:
    return lambda d: (d / name).write_bytes((d / name).read_bytes()[: int((d / name).stat().st_size * keep)])


def write_pickle(name: str) -> Callable[[Path], Any]:
    return lambda d: (torch.save({}, d / name), name == "model.safetensors" or (d / "model.safetensors").unlink())


def repeat_for_splits(rows: list[Any]) -> dict[str, list[Any]]:
    """Return `rows` for every split."""
    return dict.fromkeys(SPLITS, rows)


def change_nothing(_: Path) -> None:
    pass


BROKEN_MODELS = [
    Case("weights of another width", set_config(n_embd=32), "the weights in DIR cannot be loaded: "),
    Case("weights of fewer layers", set_config(n_layer=3), "the weights in DIR do not fit the model: 12 are missing"),
    Case("weights of fewer tokens", set_config(vocab_size=299), "the weights in DIR cannot be loaded: "),
    Case("weights truncated", truncate("model.safetensors", 0.9), "the weights in DIR cannot be loaded: "),
    Case("weights missing", lambda d: (d / "model.safetensors").unlink(), "DIR has none of model.safetensors"),
    Case(
        "a pickle for weights", write_pickle("pytorch_model.bin"), "only DIR/pytorch_model.bin: pickled weights can run"
    ),
    Case("a pickle called safetensors", write_pickle("model.safetensors"), "the weights in DIR cannot be loaded: "),
    Case("config truncated", truncate("config.json", 0.5), "DIR/config.json is not JSON: "),
    Case(
        "config of text", set_config(n_embd="wide"), "DIR: its config.json cannot be used: Validation error for field"
    ),
    Case("config of no architecture", set_config(model_type="nope"), "DIR: its config.json cannot be used: "),
    Case("config of own code", add_code(model_type="own"), "and code that comes with a model is never run", {}),
    Case("config of another type", change_nothing, "the checkpoint DIR is a gpt2", {"model_type": "llama"}),
    Case("value of text", change_nothing, "model.config.n_embd='wide': Validation error", GPT2 | {"n_embd": "wide"}),
    Case(
        "misspelt value",
        change_nothing,
        "model.config.n_embed: gpt2 has no such setting; did you",
        GPT2 | {"n_embed": 16},
    ),
    Case("width that heads do not divide", set_config(n_head=3), "must be divisible by num_heads"),
    Case(
        "vocabulary below the tokenizer's", change_nothing, "the tokenizer has 301 tokens, but the model only has 300"
    ),
    Case(
        "fewer positions than said",
        change_nothing,
        "model.max_positions=65: the model only has 64 positions",
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gpt2")
    make_toy_model("gpt2", vocab_size=300).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("case", BROKEN_MODELS, ids=[case.name for case in BROKEN_MODELS])
def test_hostile_model_is_named_and_its_code_is_never_run(tmp_path: Path, gpt2: Path, case: Case) -> None:
    directory = tmp_path / "mine"
    shutil.copytree(gpt2, directory)
    case.change(directory)
    vocab_size = 301 if case.name.startswith("vocabulary") else 300
    tokens = write_tokens(tmp_path / "tokens", repeat_for_splits([[5, 6]]), vocab_size)
    error = run_stage_for_error(
        *("baseline", "task=causal", "model=tiny-gpt2", "hardware=cpu", "seed=1", "evaluate.context=16"),
        f"tokens={tokens}",
        f"out={tmp_path}/out/baseline.json",
        f"report={tmp_path}/out/baseline",
        model=Model(
            task="causal",
            path=str(directory),
            revision=None,
            files=hash_files(directory),
            from_scratch=False,
            max_positions=65 if case.name.startswith("fewer positions") else 64,
            config=dict(case.config),
        ),
    )
    assert case.message.replace("DIR", str(directory)) in error
    assert not (tmp_path / "out").exists()
    assert not (directory / "TOUCHED").exists()


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_hostile_causal_model_that_sees_both_sides_is_refused(
    overrides: Callable[..., list[str]], tmp_path: Path, model_type: str
) -> None:
    config = {"model_type": model_type, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = Model(
        task="causal", path=None, revision=None, files=None, from_scratch=True, max_positions=64, config=config
    )
    error = run_stage_for_error("baseline", *overrides("baseline", "causal", tmp_path), model=model)
    assert f"task=causal: {model_type} attends to tokens on both sides" in error


# -- training and evaluation -------------------------------------------------------------------------------------------


def test_hostile_block_size_above_the_models_positions_names_both(
    overrides: Callable[..., list[str]], tmp_path: Path
) -> None:
    error = run_stage_for_error("train", *overrides("train", "causal", tmp_path, "block_size=65"))
    assert error == "block_size=65 is above the model's positions, 64"


def test_hostile_blocks_of_another_size_than_block_size_are_named(
    overrides: Callable[..., list[str]], corpus: Path, cache: Path, tmp_path: Path
) -> None:
    error = run_stage_for_error("train", *overrides("train", "causal", tmp_path, "block_size=8"))
    assert error == f"block_size=8: the blocks in {corpus}/blocks-16/causal have 16 tokens each"


@pytest.mark.parametrize("logging_steps", [1, 1000])
def test_hostile_learning_rate_stops_with_the_step_at_any_logging_interval(
    overrides: Callable[..., list[str]], cache: Path, tmp_path: Path, logging_steps: int
) -> None:
    steep = ["learning_rate=1e30", "++trainer.max_grad_norm=0", "trainer.eval_strategy='no'"]
    out = tmp_path / "out"
    error = run_stage_for_error(
        "train", *overrides("train", "causal", out, *steep, f"trainer.logging_steps={logging_steps}")
    )
    assert "loss is nan at step" in error and "training has diverged; lower learning_rate" in error
    assert not [file for file in list_files(out) if not file.startswith(".live-report/")]


@pytest.mark.parametrize("content", [b"", b"PAR1", b"{}"], ids=["empty", "cut", "json"])
def test_hostile_baseline_scores_are_named(
    trained: dict[str, Path], overrides: Callable[..., list[str]], tmp_path: Path, content: bytes
) -> None:
    for name in ("model", "baseline"):
        shutil.copytree(trained["causal"] / name, tmp_path / name)
    (tmp_path / "baseline/test.parquet").write_bytes(content)
    error = run_stage_for_error("evaluate", *overrides("evaluate", "causal", tmp_path))
    assert f"{tmp_path}/baseline/test.parquet is damaged" in error
    assert not (tmp_path / "metrics.json").exists()


# -- memory ------------------------------------------------------------------------------------------------------------


def exhaust_python(*_: Any, **__: Any) -> Any:
    raise MemoryError


def exhaust_torch(*_: Any, **__: Any) -> Any:
    return torch.empty(2**60)  # torch raises the error


def exhaust_cuda(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of ...")


@pytest.mark.parametrize("exhaust_memory", [exhaust_python, exhaust_torch, exhaust_cuda])
@pytest.mark.parametrize(
    ("stage", "target", "setting"),
    [
        ("train", (Blocks, "__getitem__"), "halve hardware.per_device_batch_size (conf/hardware; null means"),
        (
            "baseline",
            (metrics, "compute_window_nats"),
            "halve hardware.evaluate_batch_tokens (conf/hardware; results stay",
        ),
    ],
)
def test_hostile_memory_that_runs_out_names_the_setting_that_halves_it(
    overrides: Callable[..., list[str]],
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    exhaust_memory: Callable[..., Any],
    stage: str,
    target: tuple[Any, str],
    setting: str,
) -> None:
    monkeypatch.setattr(*target, exhaust_memory)
    error = run_stage_for_error(stage, *overrides(stage, "causal", tmp_path / "out"))
    assert error.startswith("out of memory")
    assert setting in error
    assert not (tmp_path / "out").exists()


def test_hostile_model_too_large_for_the_machine_says_so(overrides: Callable[..., list[str]], tmp_path: Path) -> None:
    error = run_stage_for_error(
        "baseline", *overrides("baseline", "causal", tmp_path, f"+model.config.n_inner={7 * 10**9}")
    )
    assert error.startswith("out of memory (")  # just below the size that is refused on every machine


@pytest.mark.parametrize("stage", ["download", "tokenize", "group_texts"])
def test_hostile_memory_of_a_data_stage_that_runs_out_names_the_remedy(stage: str) -> None:
    assert "conf/data" in app.format_error(MemoryError(), stage)


# -- disks -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """Mounted file system of 64 KiB."""
    with mount(tmp_path / "disk", "-t", "tmpfs", "-o", "size=64k", "tmpfs") as directory:
        yield directory


def write_long_records(tmp_path: Path) -> str:
    texts = [{**record, "answers.text": [secrets.token_hex(900)]} for record in make_questions(900)]
    return f"data.path={write_jsonl(tmp_path / 'a.jsonl', texts)}"


FULL_DISK_ERROR = "no space left on the disk"


def test_hostile_disk_that_is_full_ends_download_with_the_command_that_frees_space(
    tmp_path: Path, full_disk: Path
) -> None:
    error = run_process_for_error("download", "data=files", write_long_records(tmp_path), f"out={full_disk}/raw")
    assert error.startswith(FULL_DISK_ERROR) and "dvc gc --workspace" in error
    assert list_files(full_disk) == []


def test_hostile_disk_that_is_full_ends_tokenize(tmp_path: Path, full_disk: Path) -> None:
    raw = write_raw(tmp_path / "raw", repeat_for_splits([f"{i * 7919} " * 400 for i in range(99)]))
    choices = ["task=causal", "data=files", "model=tiny-gpt2", f"raw={raw}", f"out={full_disk}/t"]
    assert run_process_for_error("tokenize", *choices).startswith(FULL_DISK_ERROR)
    assert list_files(full_disk) == []


def test_hostile_disk_that_is_full_ends_group_texts(tmp_path: Path, full_disk: Path) -> None:
    tokens = write_tokens(tmp_path / "tokens", repeat_for_splits([[5, 6, 7, 8] * 9999]))
    raw = write_raw(tmp_path / "raw", repeat_for_splits(["a text"]))
    grouping = ["block_size=8", f"tokens={tokens}", f"raw={raw}", f"out={full_disk}/b"]
    assert run_process_for_error("group_texts", *grouping).startswith(FULL_DISK_ERROR)
    assert list_files(full_disk) == []


def test_hostile_disk_that_is_full_ends_train_without_a_model(
    overrides: Callable[..., list[str]], cache: Path, tmp_path: Path, full_disk: Path
) -> None:
    wide = ["num_train_epochs=0.1", "model.config.n_embd=64"]
    error = run_stage_for_error("train", *overrides("train", "causal", full_disk / "out", *wide))
    assert error.startswith(FULL_DISK_ERROR)
    assert not [file for file in list_files(full_disk) if not file.startswith("out/.live-report/")]


def test_hostile_disk_that_is_full_keeps_the_previous_metrics(
    overrides: Callable[..., list[str]], trained: dict[str, Path], full_disk: Path
) -> None:
    (full_disk / "metrics.json").write_text("{}")
    with pytest.raises(OSError, match="No space"), (full_disk / "filler").open("wb", buffering=0) as filler:
        while filler.write(bytes(4096)):
            pass
    out = [f"out={full_disk}/metrics.json", f"samples_out={full_disk}/samples.md", f"report={full_disk}/evaluation"]
    assert run_stage_for_error("evaluate", *overrides("evaluate", "causal", trained["causal"], *out)).startswith(
        FULL_DISK_ERROR
    )
    assert list_files(full_disk) == ["filler", "metrics.json"]
    assert (full_disk / "metrics.json").read_text() == "{}"


def test_hostile_workspace_that_is_read_only_is_named(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", make_questions(60))
    with mount(tmp_path / "disk", "-t", "tmpfs", "-o", "ro", "tmpfs") as disk:
        error = run_process_for_error("download", "data=files", f"data.path={source}", f"out={disk}/data/raw")
    assert error.startswith(f"Read-only file system: {disk}/data")
    assert error.endswith(": the file system is read-only: run in a workspace on a writable disk")


@needs_modes
def test_hostile_workspace_without_permission_is_named(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", make_questions(60))
    (tmp_path / "data").mkdir(mode=0o500)
    command = ["data=files", f"data.path={source}", f"out={tmp_path}/data/raw"]
    error = run_process_for_error("download", *command, prefix=AS_UNPRIVILEGED)
    assert re.match(rf"Permission denied: {tmp_path}/data/.tmp-raw-\w+: this user may not read or write it", error)
    assert list_files(tmp_path / "data") == []


# -- size --------------------------------------------------------------------------------------------------------------


def run_data_stages(tmp_path: Path, source: Path) -> Path:
    """Run the three data stages on the source and return the directory of its tokens."""
    small = ["model=tiny-gpt2", "model.tokenizer.train.vocab_size=300", "task=causal", "data=files"]
    counted = "data.count_near_duplicates=false"
    raw, tokens, blocks = tmp_path / "raw", tmp_path / "tokens", tmp_path / "blocks"
    assert run_stage_for_error("download", "data=files", f"data.path={source}", counted, f"out={raw}") == ""
    assert run_stage_for_error("tokenize", *small, f"raw={raw}", f"out={tokens}") == ""
    assert run_stage_for_error("group_texts", "block_size=8", f"tokens={tokens}", f"raw={raw}", f"out={blocks}") == ""
    return tokens


@pytest.mark.slow
@pytest.mark.parametrize("text", ["the sky is blue, ", "a", " "], ids=["words", "one word", "white space"])
def test_hostile_document_of_50_mb_loses_nothing(tmp_path: Path, text: str) -> None:
    long = f"x{text * (50 * 2**20 // len(text))}"
    source = write_jsonl(tmp_path / "a.jsonl", [*make_questions(60), {"title": "Long?", "answers.text": [long]}])
    tokens = run_data_stages(tmp_path, source)
    ledgers = [read_stats(tokens / name) for name in SPLITS]
    answers = sum(len(answer.encode()) for record in make_questions(60) for answer in record["answers.text"])
    assert sum(ledger["bytes"] for ledger in ledgers) == len(long) + answers
    assert sum(ledger.get("documents_lossy", 0) for ledger in ledgers) == 0


@pytest.mark.slow
def test_hostile_million_of_empty_documents_is_counted_and_left_out(tmp_path: Path) -> None:
    empty = [{"title": f"Empty {number}?", "answers.text": [""]} for number in range(1_000_000)]
    tokens = run_data_stages(tmp_path, write_jsonl(tmp_path / "a.jsonl", [*make_questions(60), *empty]))
    ledger = read_stats(tmp_path / "raw")
    assert (ledger["records_in"], ledger["records_skipped"]["without_answers"]) == (1_000_060, 1_000_000)
    assert sum(read_stats(tokens / name)["documents"] for name in SPLITS) == 60


class WorkerKillingDataset(torch.utils.data.Dataset[int]):
    """Data set that ends the process that reads it, as the kernel does if a process takes too much memory."""

    def __init__(self, how: Callable[[], Any]) -> None:
        self._how = how

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        self._how()
        return index


@pytest.mark.parametrize(
    "how",
    [
        lambda: os.kill(os.getpid(), signal.SIGKILL),
        lambda: os.kill(os.getpid(), signal.SIGBUS),
        lambda: os._exit(1),
    ],
    ids=["SIGKILL", "SIGBUS", "exit"],
)
def test_loader_of_batches_that_is_killed_is_reported_as_out_of_memory(how: Callable[[], Any]) -> None:
    with pytest.raises(RuntimeError) as caught:
        list(torch.utils.data.DataLoader(WorkerKillingDataset(how), num_workers=1))
    error = app.format_error(caught.value, "train")
    assert error.startswith("a process that loads batches was killed: is memory or /dev/shm full?")
    assert "hardware.per_device_batch_size" in error and "trainer.dataloader_num_workers: 0" in error
    assert "LM_REPRO_DEBUG" not in error
