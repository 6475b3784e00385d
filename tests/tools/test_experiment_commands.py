"""Tests of experiments: keys and values that arrive unchanged, an end that Ctrl-C waits for, and other inputs."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dvc.repo import Repo
from dvc.utils.hydra import apply_overrides
from dvc.utils.serialize import dumps_yaml
from dvc_project import ROOT
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given
from hypothesis import strategies as st
from small_repository import run_shell, write_files

from stages.core.errors import ConfigError, StageError
from tools import experiments
from tools.experiments import (
    WorkingTree,
    check_plots_are_cached,
    find_differences,
    find_unpassable_values,
    format_override,
    hash_evaluated_documents,
    make_run_command,
    parse_key,
    run_to_end,
)
from tools.lock_history import parse_mapping
from tools.outs import Outs
from tools.yaml_edit import load_yaml

TEXTS = [
    "no thanks", "1e-3",
    "null", "true", "", " a ", "it's", 'say "no"', "a,b", "a=b", "\\", "\\'", "\u00e9t\u00e9", "[1]", "a: b", "$x",
]  # fmt: skip
VALUES = [
    *TEXTS, 0, 7, -3, 2**62, 0.5, 1e-5, 3e-8, 1.0, True, False, None, [], [1, 2.5, "1e-3"], {}, {"a": [1], "b": None},
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_value_arrives_in_the_file_that_dvc_writes(tmp_path: Path, value: Any) -> None:
    file = tmp_path / "params.yaml"
    file.write_text("key: 1\n")
    apply_overrides(file, [format_override("key", value)])
    assert json.dumps(load_yaml(file.read_text())["key"]) == json.dumps(value)
    assert list(find_unpassable_values("key", value)) == []


@pytest.mark.parametrize("value", ["no", "off", "yes", ["no"], {"a": "on"}], ids=repr)
def test_value_that_dvc_writes_so_that_hydra_reads_another_is_refused(tmp_path: Path, value: Any) -> None:
    assert [problem for problem in find_unpassable_values("key", value) if "cannot be passed" in problem]


@given(st.floats(min_value=1e-11, max_value=1e11))
def test_value_that_is_a_number_has_no_exponent(value: float) -> None:
    text = format_override("key", value).removeprefix("key=")
    assert "e" not in text and float(text) == value


def test_key_that_may_be_new_is_set_whether_or_not_it_exists() -> None:
    assert parse_key("conf/task/causal.yaml:+trainer.warmup_steps").argument == (
        "conf/task/causal.yaml:++trainer.warmup_steps"
    )
    assert parse_key("tasks.causal.learning_rate").argument == "tasks.causal.learning_rate"


@pytest.mark.parametrize(
    "key", ["", "+seed", "a=1", "a b", "../x.yaml:a", "conf/x.yaml:a", "a..b", "a.", "--rev", "a\n"]
)
def test_key_that_is_malformed_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match="is not a key as in `dvc exp run -S`"):
        parse_key(key)


@given(st.one_of(st.none(), st.booleans(), st.integers(-(2**62), 2**62), st.floats(-1e9, 1e9), st.text(max_size=12)))
@example("it's, null=\\")
@example("\\'")
@example("tiny-gpt2")
@example("NaN")
@example(1e-5)
def test_value_as_an_override_is_read_back_unchanged(value: Any) -> None:
    if isinstance(value, str) and not value.isprintable():
        return
    found = OverridesParser.create().parse_override(format_override("key", value)).value()
    assert (type(found), found) == (type(value), value)


def test_run_without_the_plots_of_another_task_in_the_cache_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a clone in which only one task was run: DVC would fail at the end of each run."""
    plots = "plots:\n  - reports/train/causal/loss.tsv: {x: step}\n  - reports/train/mlm/loss.tsv\n"
    run_shell(tmp_path, "git init -q && dvc init -q")
    monkeypatch.chdir(tmp_path)
    Path("dvc.yaml").write_text("stages: {}\n" + plots)
    outs = {task: {"outs": [{"path": f"reports/train/{task}", "md5": "0" * 32 + ".dir"}]} for task in ("causal", "mlm")}
    Path("dvc.lock").write_text(json.dumps({"stages": {f"train@{task}": out for task, out in outs.items()}}))
    with Repo() as repo:
        with pytest.raises(StageError, match=r"^reports/train/mlm: not in DVC's cache"):
            check_plots_are_cached(repo, "causal")
        Path("dvc.lock").unlink()
        check_plots_are_cached(repo, "causal")


def test_run_command_has_settings_in_their_order() -> None:
    settings = {"block_size": 64, "conf/task/causal.yaml:+trainer.warmup_steps": 1e-5}
    assert make_run_command("one", settings, "evaluate@causal", "--queue") == [
        *("dvc", "--wait-for-lock", "exp", "run", "--queue", "--name", "one", "-S", "block_size=64", "-S"),
        *("conf/task/causal.yaml:++trainer.warmup_steps=0.00001", "evaluate@causal"),
    ]


def test_command_ends_before_ctrl_c_is_reported(tmp_path: Path) -> None:
    child = (
        "import signal, sys, time, pathlib\n"
        "signal.signal(signal.SIGINT, lambda *_: (time.sleep(0.5), pathlib.Path('checkpoint').touch(), sys.exit(3)))\n"
        "pathlib.Path('started').touch()\n"
        "time.sleep(60)\n"
    )
    parent = (
        "import sys\nfrom tools.experiments import run_to_end\n"
        "try:\n    run_to_end([sys.executable, '-c', sys.argv[1]], cwd=sys.argv[2])\n"
        "except KeyboardInterrupt:\n    sys.exit(7)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", parent, child, str(tmp_path)], cwd=ROOT, start_new_session=True)
    while not (tmp_path / "started").exists():
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=30) == 7 and (tmp_path / "checkpoint").exists()
    assert run_to_end([sys.executable, "-c", "raise SystemExit(4)"]) == 4


# -- results -----------------------------------------------------------------------------------------------------------

PROJECT = {
    "dvc.yaml": """\
stages:
  source:
    cmd: cp -r in out
    deps: [in, added.txt]
    outs: [out]
  train:
    cmd: mkdir model
    deps: [code/train.json, out/one.txt]
    params: [seed, conf/task/a.yaml: [trainer], conf/base/hardware.yaml: ]
    outs: [model]
""",
    "params.yaml": "seed: 1\nunread: 1\n",
    "conf/task/a.yaml": "trainer: {steps: 1, rate: 1e-5, unquoted: no, quoted: 'no'}\nother: 1\n",
    "conf/base/hardware.yaml": "checkpoints: {keep: 2}\nhardware: {device: cpu}\n",
    "in/one.txt": "1",
    "added.txt": "1",
    "code/train.json": "written by another version",
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository after a run of its stages, with dvc.lock as if the code were that of this project."""
    directory = tmp_path_factory.mktemp("ran")
    write_files(directory, PROJECT)
    run_shell(directory, "git init -q -b main && dvc init -q && dvc add -q added.txt && dvc repro -q")
    return directory


@pytest.fixture
def project(ran: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The repository as it was run, as the current directory."""
    monkeypatch.chdir(ran)
    code = {"code/train.json": hashlib.md5(PROJECT["code/train.json"].encode()).hexdigest()}
    monkeypatch.setattr(experiments, "hash_code_outs", lambda directory: code)
    yield ran
    for name, text in PROJECT.items():
        (ran / name).write_text(text)


def list_differences(settings: dict[str, Any], lock: dict[str, Any] | None = None) -> list[str]:
    with Repo() as repo:
        lock = Outs(repo).read_lock("workspace") if lock is None else lock
        return list(find_differences(lock, "train", settings, WorkingTree(repo)))


def test_run_with_the_values_code_and_data_of_the_working_tree_has_no_difference(project: Path) -> None:
    (project / "params.yaml").write_text("seed: 1\nunread: 2\n")
    task = PROJECT["conf/task/a.yaml"]
    (project / "conf/task/a.yaml").write_text(task.replace("steps: 1", "steps: 2").replace("other: 1", "other: 2"))
    (project / "conf/base/hardware.yaml").write_text("checkpoints: {keep: 3}\nhardware: {device: cpu}\n")
    (project / "added.txt").unlink()  # `dvc pull` fetches it
    assert list_differences({"conf/task/a.yaml:trainer.steps": 1}) == []


@pytest.mark.parametrize(
    ("file", "text", "difference"),
    [
        ("params.yaml", "seed: 2\n", "params.yaml:seed was 1, now 2"),
        ("conf/task/a.yaml", "trainer: 1\n", "conf/task/a.yaml:trainer was {"),
        (
            "conf/base/hardware.yaml",
            "checkpoints: {}\nhardware: {device: cpu}\ntrainer: 1\n",
            "conf/base/hardware.yaml:trainer was not set, now 1",
        ),
        ("conf/base/hardware.yaml", "", 'conf/base/hardware.yaml:hardware was {"device": "cpu"}, now not set'),
        ("in/one.txt", "2", "in changed"),
    ],
)
def test_run_with_another_value_or_source_is_told_apart(project: Path, file: str, text: str, difference: str) -> None:
    (project / file).write_text(text)
    (found,) = list_differences({})
    assert found.startswith(difference)


def test_run_with_other_settings_or_code_is_told_apart(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list_differences({"seed": 3, "unread": 4}) == ["params.yaml:seed was 1, now 3"]
    assert list_differences({}, {}) == ["its dvc.lock has no train"]
    monkeypatch.setattr(experiments, "hash_code_outs", lambda directory: {"code/train.json": "0"})
    assert list_differences({}) == ["the code of train changed"]


def test_run_is_not_compared_with_a_stage_that_the_pipeline_no_longer_has(project: Path) -> None:
    with Repo() as repo:
        lock = Outs(repo).read_lock("workspace")
    removed = {"deps": [{"path": "gone.txt", "md5": "0"}], "outs": [{"path": "out/old"}]}
    assert list_differences({}, {**lock, "removed": removed}) == []


@pytest.mark.parametrize("value", [*VALUES, "no", "12:30", "2020-01-01", "010", "1_0", 1e16, -2.5, [3e-05]], ids=repr)
def test_value_in_dvc_lock_is_read_as_dvc_wrote_it(value: Any) -> None:
    assert json.dumps(parse_mapping(dumps_yaml({"key": value, "md5": "1" * 32}))["key"]) == json.dumps(value)


def test_sources_are_what_no_stage_writes(project: Path) -> None:
    with Repo() as repo:
        before = WorkingTree(repo).hash_sources("train")
        (project / "in/one.txt").write_text("2")
        after = WorkingTree(repo).hash_sources("train")
    assert list(before) == ["added.txt", "code/train.json", "in"]
    assert [path for path in before if before[path] != after[path]] == ["in"]


@pytest.mark.parametrize(
    ("columns", "is_same"),
    [
        ({"tokens": [9, 9], "bits_after": [1.0, 2.0]}, True),
        ({"bytes": [10, 21]}, False),
        ({"q_id": ["a", "c"]}, False),
        ({"record": [0, 2]}, False),
    ],
)
def test_hash_of_the_evaluated_documents_depends_on_their_identity_only(columns: dict[str, Any], is_same: bool) -> None:
    table = {"record": [0, 1], "q_id": ["a", "b"], "source": ["s", "s"], "bytes": [10, 20], "tokens": [3, 4]}

    def compute_hash(values: dict[str, Any]) -> str | None:
        content = io.BytesIO()
        pq.write_table(pa.table(values), content)
        outs: Any = SimpleNamespace(read_out=lambda rev, path: content.getvalue())
        return hash_evaluated_documents(outs, "rev", "causal")

    assert (compute_hash(table) == compute_hash({**table, **columns})) == is_same
