"""Tests of commands that run experiments: keys and values that arrive unchanged, and an end that Ctrl-C waits for."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from dvc.repo import Repo
from dvc.utils.hydra import apply_overrides
from dvc_project import ROOT
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given
from hypothesis import strategies as st
from small_repository import run_shell

from stages.core.errors import ConfigError, StageError
from tools.experiments import (
    check_plots_are_cached,
    find_unpassable_values,
    format_override,
    make_run_command,
    parse_key,
    run_to_end,
)
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
