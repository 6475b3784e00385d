"""Tests of a search: its budget, halving, interruptions at any point, failures, results, and runs by DVC."""

import argparse
import builtins
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dvc.repo import Repo
from dvc_project import ROOT, build_environment, run_command
from small_repository import run_shell, write_files

from stages.core.errors import StageError
from tools.search import study as search_study
from tools.search import trials as search_trials
from tools.search.command import check_name, lock_search, parse_budget, run_search
from tools.search.runs import Experiments, RunError, RunResult, find_error, find_experiment
from tools.search.space import Choices, Halving, Range, Space
from tools.search.study import decode_values, import_optuna, is_in_space, list_runs, open_study, prepare_study
from tools.search.table import MIN_TRIALS_FOR_IMPORTANCE, print_importance, print_results
from tools.search.trials import Budget, Search

needs_optuna = pytest.mark.skipif(find_spec("optuna") is None, reason="Optuna is not installed: `make optuna`")

RATE, DECAY = "tasks.causal.learning_rate", "conf/task/causal.yaml:trainer.weight_decay"
SPACE = Space(
    task="causal",
    metric=None,
    halving=Halving(epochs=[1, 2, 4], factor=2),
    keys={RATE: Range(low=0.001, high=0.1, log=True), DECAY: Choices(choices=[0.01, 0.1, None])},
    fixed={"block_size": 64},
)


class Killed(BaseException):
    """The end of the process at this point."""


class FakeRunner:
    """Experiments in memory, with a metric computed from the settings and a clock that runs only in them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds_per_epoch: float = 10.0) -> None:
        self.finished: dict[str, RunResult] = {}
        self.started: list[str] = []
        self.settings: list[Mapping[str, Any]] = []
        self.failing: set[int] = set()
        """Numbers of the runs that fail, in the order of their start."""
        self.documents = "documents"
        self._now, self._seconds = 0.0, seconds_per_epoch
        monkeypatch.setattr(search_trials.time, "monotonic", lambda: self._now)

    def run(self, name: str, settings: Mapping[str, Any]) -> None:
        self.started.append(name)
        self.settings.append(settings)
        epochs = settings["tasks.causal.num_train_epochs"]
        self._now += self._seconds * epochs
        if len(self.started) - 1 in self.failing:
            raise RunError("train: out of memory")
        value = abs(math.log10(settings[RATE] / 0.01)) + (settings[DECAY] is None) + 1 / epochs
        self.finished[name] = RunResult(f"rev-{name}", value, self.documents)

    def find(self, name: str, settings: Mapping[str, Any]) -> RunResult | None:
        return self.finished.get(name)


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with an empty directory of searches."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / search_study.DIRECTORY).mkdir(parents=True)
    monkeypatch.setattr(search_study, "read_current_value", {RATE: 0.02, DECAY: 0.1}.get)
    return tmp_path


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> FakeRunner:
    return FakeRunner(monkeypatch)


def run(runner: Any, seconds: float | None = None, trials: int | None = None, space: Space = SPACE) -> Any:
    """Run the search `s`, and return its study."""
    study = open_study("s", create=True)
    prepare_study(study, "s", space, {"train@causal": "1"})
    Search("s", space, study, runner, {}, shares_steps=False).run(Budget(seconds, trials))
    return study


def describe_trials(study: Any) -> list[Any]:
    return [(trial.state.name, trial.params, trial.intermediate_values) for trial in study.get_trials()]


# -- trials and budget -------------------------------------------------------------------------------------------------


@needs_optuna
def test_search_first_trial_has_the_current_values(directory: Path, runner: FakeRunner) -> None:
    run(runner, trials=1)
    assert runner.started == ["s-000-e1", "s-000-e2", "s-000-e4"]
    assert runner.settings[0] == {RATE: 0.02, DECAY: 0.1, "block_size": 64, "tasks.causal.num_train_epochs": 1}


@needs_optuna
def test_search_promotes_the_best_of_each_rung_only(directory: Path, runner: FakeRunner) -> None:
    study = run(runner, trials=20)
    counts = [sum(rung in trial.intermediate_values for trial in study.get_trials()) for rung in range(3)]
    assert counts[0] == 20 and counts[0] > counts[1] > counts[2] >= 1
    first = sorted(trial.intermediate_values[0] for trial in study.get_trials())
    best = next(trial for trial in study.get_trials() if trial.intermediate_values[0] == first[0])
    worst = next(trial for trial in study.get_trials() if trial.intermediate_values[0] == first[-1])
    assert best.state.name == "COMPLETE" and worst.state.name == "PRUNED"


@needs_optuna
def test_search_finds_better_values_than_the_current_ones(directory: Path, runner: FakeRunner) -> None:
    study = run(runner, trials=30)
    assert study.best_value < study.get_trials()[0].value - 0.1


@needs_optuna
@pytest.mark.parametrize("seconds", [10, 35, 69, 71, 150, 400])
def test_search_starts_no_run_that_exceeds_the_budget(directory: Path, runner: FakeRunner, seconds: int) -> None:
    used = sum(item["seconds"] for item in list_runs(run(runner, seconds=seconds).get_trials()))
    assert seconds - 40 < used <= seconds


@needs_optuna
@pytest.mark.parametrize(("shares_steps", "runs"), [(True, 2), (False, 1)])
def test_search_predicts_a_longer_run_from_the_epochs_that_it_trains(
    directory: Path, runner: FakeRunner, shares_steps: bool, runs: int
) -> None:
    """After 2 epochs of 10 s, 5 epochs take 30 s from the checkpoint of the first 2, and 50 s without."""
    space = SPACE._replace(halving=Halving(epochs=[2, 5]))
    study = open_study("s", create=True)
    prepare_study(study, "s", space, {})
    Search("s", space, study, runner, {}, shares_steps).run(Budget(55, None))
    assert len(runner.started) == runs


@needs_optuna
def test_search_with_a_larger_budget_goes_on(directory: Path, runner: FakeRunner) -> None:
    run(runner, seconds=100)
    few = list(runner.started)
    study = run(runner, seconds=300)
    assert runner.started[: len(few)] == few and len(runner.started) > len(few)
    assert len(set(runner.started)) == len(runner.started)
    assert 260 < sum(item["seconds"] for item in list_runs(study.get_trials())) <= 300


@needs_optuna
def test_search_with_the_same_budget_again_runs_nothing(directory: Path, runner: FakeRunner) -> None:
    first = describe_trials(run(runner, trials=5))
    number = len(runner.started)
    assert describe_trials(run(runner, trials=5)) == first
    assert len(runner.started) == number


@needs_optuna
def test_search_without_halving_trains_every_trial_once(directory: Path, runner: FakeRunner) -> None:
    study = run(runner, trials=6, space=SPACE._replace(halving=Halving(epochs=[3])))
    assert [trial.state.name for trial in study.get_trials()] == ["COMPLETE"] * 6
    assert len(runner.started) == 6


@pytest.mark.parametrize(
    ("text", "seconds", "trials"),
    [("20m", 1200, None), ("2h", 7200, None), ("1h30m", 5400, None), ("90s", 90, None), ("0.5h", 1800, None),
     ("1d", 86400, None), ("40trials", None, 40), ("1 trial", None, 1)],
)  # fmt: skip
def test_search_budget_is_a_time_or_a_number_of_trials(text: str, seconds: float | None, trials: int | None) -> None:
    assert parse_budget(text) == (seconds, trials)


@pytest.mark.parametrize("text", ["", "20", "m", "2 h", "-2h", "0m", "0trials", "2x", "1e3s", "2h trials", "\u0662h;"])
def test_search_budget_that_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="it should be"):
        parse_budget(text)


# -- interruptions -----------------------------------------------------------------------------------------------------


def search_with_kill(monkeypatch: pytest.MonkeyPatch, runner: FakeRunner, number: int, after: bool) -> bool:
    """Search, and kill the process before or after its write `number` to the journal; return True if it was killed."""
    from optuna.storages.journal import JournalFileBackend

    append, count = JournalFileBackend.append_logs, 0

    def append_or_die(self: Any, logs: Any) -> None:
        nonlocal count
        count += 1
        if count == number and not after:
            raise Killed
        append(self, logs)
        if count == number:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(JournalFileBackend, "append_logs", append_or_die)
        try:
            run(runner, trials=2)
        except Killed:
            return True
    return False


@needs_optuna
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("number", range(1, 25))
def test_search_killed_at_any_write_goes_on_as_if_it_was_not(
    directory: Path, monkeypatch: pytest.MonkeyPatch, number: int, after: bool
) -> None:
    undisturbed = FakeRunner(monkeypatch)
    expected = describe_trials(run(undisturbed, trials=2))
    (search_study.DIRECTORY / "s.journal").unlink()
    runner = FakeRunner(monkeypatch)
    killed = search_with_kill(monkeypatch, runner, number, after)
    study = run(runner, trials=2)
    assert killed or number > 20
    assert describe_trials(study) == expected
    assert runner.started == undisturbed.started  # no run twice: a finished experiment is found by its name


@needs_optuna
@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("saved", [False, True], ids=["unfinished", "finished"])
def test_search_killed_during_a_run_runs_the_same_trial_or_finds_it(
    directory: Path, monkeypatch: pytest.MonkeyPatch, number: int, saved: bool
) -> None:
    expected = describe_trials(run(FakeRunner(monkeypatch), trials=3))
    (search_study.DIRECTORY / "s.journal").unlink()
    runner = FakeRunner(monkeypatch)
    run_once = runner.run

    def run_and_die(name: str, settings: Mapping[str, Any]) -> None:
        if len(runner.started) == number:
            runner.run = run_once  # type: ignore[method-assign]
            if saved:
                run_once(name, settings)
            raise Killed
        run_once(name, settings)

    runner.run = run_and_die  # type: ignore[method-assign]
    with pytest.raises(Killed):
        run(runner, trials=3)
    assert describe_trials(run(runner, trials=3)) == expected
    assert len(set(runner.started)) == len(runner.started)


@needs_optuna
@pytest.mark.parametrize("cut", [1, 5, 40])
def test_search_with_an_incomplete_last_line_in_its_file_goes_on(directory: Path, runner: FakeRunner, cut: int) -> None:
    expected = describe_trials(run(runner, trials=2))
    file = search_study.DIRECTORY / "s.journal"
    os.truncate(file, file.stat().st_size - cut)
    file.with_name("s.journal.lock").symlink_to(file)  # Optuna's lock, left by a kill
    assert describe_trials(run(runner, trials=2)) == expected
    assert describe_trials(run(runner, trials=2)) == expected


@needs_optuna
@pytest.mark.parametrize("content", [b"", b"\n", b"x\n", b"{}\n", b"\x00" * 30 + b"\n", b"[1]\n{}\n"])
def test_search_with_a_damaged_file_is_an_error_or_a_new_search(
    directory: Path, runner: FakeRunner, content: bytes
) -> None:
    (search_study.DIRECTORY / "s.journal").write_bytes(content)
    if content:
        with pytest.raises(StageError, match="cannot be read"):
            run(runner, trials=1)
    else:
        assert len(run(runner, trials=1).get_trials()) == 1


@needs_optuna
def test_search_whose_file_was_deleted_finds_its_experiments_again(directory: Path, runner: FakeRunner) -> None:
    expected = describe_trials(run(runner, trials=12))
    number = len(runner.started)
    (search_study.DIRECTORY / "s.journal").unlink()
    assert describe_trials(run(runner, trials=12)) == expected
    assert len(runner.started) == number


# -- failures ----------------------------------------------------------------------------------------------------------


@needs_optuna
def test_search_goes_on_after_a_failed_trial(directory: Path, runner: FakeRunner) -> None:
    runner.failing = {1, 4}
    study = run(runner, trials=8)
    failed = [trial for trial in study.get_trials() if trial.state.name == "FAIL"]
    assert len(failed) == 2 and len(study.get_trials()) == 8
    assert [trial.user_attrs["runs"][-1]["error"] for trial in failed] == ["train: out of memory"] * 2


@needs_optuna
def test_search_stops_after_several_failures_in_a_row_and_can_go_on(directory: Path, runner: FakeRunner) -> None:
    runner.failing = {0, 1, 2}
    with pytest.raises(StageError, match="3 trials in a row failed; the last error: train: out of memory"):
        run(runner, trials=8)
    assert len(run(runner, trials=8).get_trials()) == 8


@needs_optuna
@pytest.mark.parametrize(("failing_epochs", "stops"), [(1, True), (2, True), (4, True), (0, False)])
def test_search_stops_if_all_runs_of_a_rung_fail(
    directory: Path, runner: FakeRunner, monkeypatch: pytest.MonkeyPatch, failing_epochs: int, stops: bool
) -> None:
    succeed = runner.run

    def fail(name: str, settings: Mapping[str, Any]) -> None:
        succeed(name, settings)
        if name.endswith(f"-e{failing_epochs}"):
            raise RunError("out of memory")

    monkeypatch.setattr(runner, "run", fail)
    if stops:
        with pytest.raises(StageError, match="3 trials in a row failed"):
            run(runner, trials=40)
        assert sum(name.endswith(f"-e{failing_epochs}") for name in runner.started) == 3
    else:
        run(runner, trials=10)


@needs_optuna
def test_search_takes_a_found_metric_that_is_no_number_as_a_failure(directory: Path, runner: FakeRunner) -> None:
    runner.finished["s-000-e1"] = RunResult("rev", math.nan, "documents")
    (trial,) = run(runner, trials=1).get_trials()
    assert trial.state.name == "FAIL" and runner.started == []
    assert trial.user_attrs["runs"][0]["error"].startswith("the metric is not a finite number")


@needs_optuna
def test_search_takes_a_metric_that_is_no_number_as_a_failure(
    directory: Path, runner: FakeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = runner.run

    def diverge(name: str, settings: Mapping[str, Any]) -> None:
        finish(name, settings)
        if name.startswith("s-001"):
            runner.finished[name] = RunResult("rev", math.nan, "documents")

    monkeypatch.setattr(runner, "run", diverge)
    study = run(runner, trials=4)
    assert [trial.number for trial in study.get_trials() if trial.state.name == "FAIL"] == [1]
    assert math.isfinite(study.best_value)


@needs_optuna
def test_search_of_other_documents_is_refused(directory: Path, runner: FakeRunner) -> None:
    run(runner, trials=1)
    runner.documents = "other"
    with pytest.raises(StageError, match="other validation documents"):
        run(runner, trials=2)


@needs_optuna
@pytest.mark.parametrize(
    ("space", "message"),
    [
        (SPACE._replace(keys={**SPACE.keys, RATE: Range(low=0.001, high=0.2, log=True)}), f"keys {RATE} high was 0.1,"),
        (SPACE._replace(fixed={}), "fixed block_size was 64, and is now nothing"),
        (SPACE._replace(task="mlm"), 'task was "causal", and is now "mlm"'),
        (SPACE._replace(halving=Halving(epochs=[1, 2])), "halving epochs was"),
    ],
)
def test_search_with_another_space_under_the_same_name_is_refused(
    directory: Path, runner: FakeRunner, space: Space, message: str
) -> None:
    run(runner, trials=1)
    with pytest.raises(StageError, match="search s was started with another space") as refused:
        run(runner, trials=2, space=space)
    assert message in str(refused.value)


@needs_optuna
def test_search_show_with_another_space_is_refused(directory: Path, runner: FakeRunner) -> None:
    (directory / "params.yaml").write_text("tasks: {causal: {}}")
    (directory / "s.yaml").write_text(json.dumps({**TINY, "keys": {RATE: {"low": 0.001, "high": 0.1}}}))
    run(runner, trials=1)
    with pytest.raises(StageError, match="search s was started with another space: "):
        run_search(Path("s.yaml"), None, None)


@needs_optuna
def test_search_after_a_change_of_the_project_is_refused(directory: Path, runner: FakeRunner) -> None:
    study = run(runner, trials=1)
    with pytest.raises(StageError, match=r"changed since search s was started \(train@causal\)"):
        prepare_study(study, "s", SPACE, {"train@causal": "2"})


@pytest.mark.parametrize("name", ["", "a b", "a/b", "../x", "-x", "a.lock", "é", "a\n", "a~1", "x" * 3 + ";"])
def test_search_name_that_git_could_not_use_is_refused(name: str) -> None:
    with pytest.raises(StageError, match="--name"):
        check_name(name)


def test_search_without_optuna_names_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def refuse(name: str, *arguments: Any, **options: Any) -> Any:
        if name.partition(".")[0] == "optuna":
            raise ImportError(name)
        return imported(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(StageError, match="Optuna is not installed: `make optuna`"):
        run_search(Path("conf/search.yaml"), None, None)


# -- values ------------------------------------------------------------------------------------------------------------


@needs_optuna
def test_search_proposals_are_within_the_space(directory: Path, runner: FakeRunner) -> None:
    keys = {
        RATE: Range(low=0.001, high=0.1, log=True),
        DECAY: Choices(choices=[0.01, None]),
        "a": Range(low=1, high=9, step=4),
        "b": Range(low=0.0, high=0.3, step=0.1),
        "c": Range(low=1, high=1000, log=True),
        "d": Choices(choices=[[1], {"x": 1}, "1", 1, True]),
    }
    for trial in run(runner, trials=30, space=SPACE._replace(keys=keys)).get_trials():
        values = decode_values(SPACE._replace(keys=keys), trial.params)
        assert 0.001 <= values[RATE] <= 0.1
        assert values["a"] in (1, 5, 9) and values["b"] in (0.0, 0.1, 0.2, 0.3)
        assert isinstance(values["c"], int) and 1 <= values["c"] <= 1000
        assert all(is_in_space(keys[key], value) or key == RATE for key, value in values.items())


@pytest.mark.parametrize(
    ("spec", "value", "expected"),
    [
        (Range(low=0.0, high=1.0), 0.5, True),
        (Range(low=0.0, high=1.0), 1.5, False),
        (Range(low=0.0, high=1.0), None, False),
        (Range(low=0.0, high=1.0), True, False),
        (Range(low=0.0, high=1.0), "0.5", False),
        (Range(low=0, high=10), 0.5, False),
        (Range(low=0, high=10, step=5), 4, False),
        (Range(low=0.0, high=0.3, step=0.1), 0.3, True),
        (Choices(choices=[1, None]), None, True),
        (Choices(choices=[1, None]), 1.0, False),
    ],
)
def test_search_current_value_is_a_trial_only_if_it_is_in_the_space(spec: Any, value: Any, expected: bool) -> None:
    assert is_in_space(spec, value) == expected


@needs_optuna
def test_search_importance_of_few_trials_is_marked(
    directory: Path, runner: FakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    for trials, marked in ((5, True), (MIN_TRIALS_FOR_IMPORTANCE + 1, False)):
        study = run(runner, trials=trials)
        capsys.readouterr()
        print_importance(SPACE, study.get_trials(), Console())
        output = capsys.readouterr().out
        assert RATE in output and DECAY in output
        assert ("mostly chance" in output) == marked


# -- runs by DVC -------------------------------------------------------------------------------------------------------

STAGE = """\
import json, os, time
from pathlib import Path
import yaml

params = yaml.safe_load(Path("params.yaml").read_text())["tasks"]["causal"]
decay = yaml.safe_load(Path("conf/task/causal.yaml").read_text())["trainer"]["weight_decay"]
if params["learning_rate"] > 0.05:
    raise SystemExit("train: error: learning_rate is \\x1b[31mtoo large")
time.sleep(float(os.environ.get("STAGE_SECONDS", "0")))
report = Path("reports/evaluate/causal")
report.mkdir(parents=True)
figures = {"bits_per_byte": 2 + params["learning_rate"], "base_bits_per_byte": 3, "loss": 4.0}
(report / "metrics.json").write_text(json.dumps({"causal": {"validation": figures}}))
(report / "validation.parquet").write_bytes(Path("validation.parquet").read_bytes())
"""
PIPELINE = """\
stages:
  evaluate:
    foreach: ${tasks}
    do:
      cmd: python stage.py
      deps: [stage.py, validation.parquet]
      params: ['tasks.${key}.learning_rate', 'tasks.${key}.num_train_epochs', {conf/task/causal.yaml: [trainer]}]
      outs: ['reports/evaluate/${key}']
"""


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("template")
    files = {
        "stage.py": STAGE,
        "dvc.yaml": PIPELINE,
        "params.yaml": "tasks:\n  causal: {learning_rate: 0.01, num_train_epochs: 1}\n",
        "conf/task/causal.yaml": "trainer: {weight_decay: 0.1}\n",
        ".gitignore": "/reports/\n",
    }
    write_files(directory, files)
    pq.write_table(pa.table({"record": [0], "source": ["s"], "bytes": [9]}), directory / "validation.parquet")
    run_shell(directory, "git init -q -b main && dvc init -q && git add -A && git commit -q -m all")
    return directory


@pytest.fixture
def repository(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A DVC repository of one stage `evaluate@causal`, as the current directory."""
    shutil.copytree(template, tmp_path / "r")
    monkeypatch.chdir(tmp_path / "r")
    for name, value in build_environment(tmp_path / "r").items():
        monkeypatch.setenv(name, value)
    search_study.DIRECTORY.mkdir(parents=True)
    return tmp_path / "r"


def run_settings(name: str, **settings: Any) -> RunResult | None:
    """Run an experiment in the current directory, and return what is found under its name."""
    settings = {RATE: 0.02, DECAY: 0.2, SPACE.epochs_key: 2, **settings}
    with Repo() as repo, lock_search("s") as lock:
        experiments = Experiments(SPACE, repo, search_study.DIRECTORY / "s.log", lock)
        experiments.run(name, settings)
        return experiments.find(name, settings)


def test_search_run_becomes_an_experiment_with_its_result(repository: Path) -> None:
    result = run_settings("s-000-e2", **{"conf/task/causal.yaml:+trainer.warmup_steps": 3})
    assert result is not None and result.value == 2.02
    assert result.rev == find_experiment("s-000-e2")
    assert run_shell(repository, "git status --porcelain") == ""
    assert "warmup_steps: 3" in run_shell(repository, f"git show {result.rev}:conf/task/causal.yaml")


def test_search_run_that_fails_has_the_error_of_its_stage(repository: Path) -> None:
    with pytest.raises(RunError, match=r"^learning_rate is \\x1b\[31mtoo large \(reports/search/s\.log\)$"):
        run_settings("s-000-e2", **{RATE: 0.06})
    assert find_experiment("s-000-e2") is None


def find_settings(name: str, space: Space = SPACE, **settings: Any) -> RunResult | None:
    """Return what is found under the name of an experiment of `run_settings`."""
    with Repo() as repo:
        experiments = Experiments(space, repo, search_study.DIRECTORY / "s.log", -1)
        return experiments.find(name, {RATE: 0.02, DECAY: 0.2, SPACE.epochs_key: 2, **settings})


def test_search_experiment_that_is_no_run_of_the_working_tree_is_refused(repository: Path) -> None:
    run_settings("s-000-e2", **{"conf/task/causal.yaml:+trainer.extra": 1})
    changed = "experiment s-000-e2 exists, but is not a run of the working tree with the values of its trial "
    with pytest.raises(StageError, match=re.escape(f"{changed}(conf/task/causal.yaml:trainer was {{")):
        find_settings("s-000-e2")
    extra = {"conf/task/causal.yaml:+trainer.extra": 1}
    with pytest.raises(StageError, match=re.escape(f"{changed}(params.yaml:{RATE} was 0.02, now 0.03)")):
        find_settings("s-000-e2", **extra, **{RATE: 0.03})
    assert find_settings("s-000-e2", **extra, **{"conf/task/none.yaml:unread": 1}) is not None
    (repository / "stage.py").write_text(f"{STAGE}# changed\n")
    with pytest.raises(StageError, match=re.escape(f"{changed}(stage.py changed): remove it (`dvc exp remove")):
        find_settings("s-000-e2", **extra)
    (repository / "stage.py").write_text(STAGE)
    shutil.rmtree(repository / ".dvc/cache")
    with pytest.raises(StageError, match="in DVC's cache"):
        find_settings("s-000-e2", **extra)


def test_search_minimizes_the_metric_of_the_space(repository: Path) -> None:
    run_settings("s-000-e2")
    found = [find_settings("s-000-e2", SPACE._replace(metric=metric)) for metric in (None, "loss")]
    assert [result and result.value for result in found] == [2.02, 4.0]


@pytest.mark.slow
def test_search_run_that_a_killed_search_left_is_waited_for(repository: Path) -> None:
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "from test_search import RATE, run_settings\n"
        "run_settings('s-000-e2')\n"
    )
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
    process = subprocess.Popen([sys.executable, "-c", code, *paths], env={**os.environ, "STAGE_SECONDS": "8"})
    log = search_study.DIRECTORY / "s.log"
    while not (log.is_file() and b"python stage.py" in log.read_bytes()):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert find_experiment("s-000-e2") is None
    with lock_search("s"):
        assert find_experiment("s-000-e2") is not None


def test_search_error_of_dvc_is_shown_if_no_stage_has_one() -> None:
    assert find_error("a\nERROR: unable to lock\n\n") == "unable to lock"
    assert find_error("Traceback\nKilled\n") == "Killed"
    assert find_error("") == "dvc exp run failed"
    assert find_error("train: error: first\nERROR: failed\nevaluate: error: second\n") == "second"


# -- the command -------------------------------------------------------------------------------------------------------

TINY = {
    "task": "causal",
    "halving": {"epochs": [0.05, 0.1], "factor": 2},
    "keys": {RATE: {"low": 0.0001, "high": 0.01, "log": True}, DECAY: {"low": 0.0, "high": 0.5}},
}


@needs_optuna
@pytest.mark.slow
def test_search_command_prints_comparisons_and_goes_on(clean: Path) -> None:
    (clean / "tiny.yaml").write_text(json.dumps(TINY))
    command = ("python", "-m", "tools.search", "--space", "tiny.yaml")
    output = run_command(clean, *command, "--budget", "2trials")
    assert "tiny-000-e0.05" in output and "tiny-000-e0.1" in output and "tiny-001-e0.05" in output
    assert "difference from tiny-00" in output and "dvc exp apply tiny-00" in output
    assert "each rung trains from the beginning" in output
    again = run_command(clean, *command, "--budget", "3trials")
    assert "tiny-002-e0.05" in again and "tiny-001-e0.05  " not in again.partition("trials (")[0]
    shown = run_command(clean, *command, "--show")
    assert shown.strip() == again[again.index("3 trials (") :].strip()
    assert run_command(clean, "git", "status", "--porcelain").strip() == "?? tiny.yaml"
    (clean / "tiny.yaml").write_text(json.dumps({**TINY, "fixed": {"block_size": 64}}))
    assert "was started with another space" in run_command(clean, *command, "--budget", "4trials", check=False)


@needs_optuna
def test_search_show_without_a_search_is_an_error(directory: Path) -> None:
    with pytest.raises(StageError, match=r"there is no search named none \(reports/search/none\.journal\)"):
        run_search(ROOT / "conf/search.yaml", "none", None)


@needs_optuna
def test_search_results_without_a_finished_trial_say_so(
    directory: Path, runner: FakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    runner.failing = {0, 1}
    print_results(SPACE, run(runner, trials=2))
    output = capsys.readouterr().out
    assert "2 trials (2 failed)" in output and "failed: s-001-e1: train: out of memory" in output
    assert "No trial has been trained for 4 epochs yet." in output


def test_search_import_of_optuna_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("optuna")
    import_optuna()
    assert capsys.readouterr() == ("", "")
