"""Runs of a search as DVC experiments: start one, find a finished one by its name, and read its result."""

import json
import math
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from dvc.repo import Repo

from stages.core.compose import PARAMS
from stages.core.errors import StageError, escape_controls, printable
from tools.compare import list_chosen_files
from tools.experiments import (
    WorkingTree,
    find_differences,
    hash_evaluated_documents,
    make_run_command,
    run_to_end,
)
from tools.outs import Outs
from tools.report_data import find_headline_metric, get_metrics_path
from tools.search.space import Space
from tools.yaml_edit import load_yaml

_STAGE_ERROR = re.compile(r"^\w+: error: (.*)$", flags=re.MULTILINE)


class RunError(StageError):
    """A run failed, with the message of its stage; the search goes on with another trial."""


class RunResult(NamedTuple):
    """Result of a finished experiment."""

    rev: str
    """Commit of the experiment."""
    value: float
    """Value of the metric on the validation split."""
    documents: str
    """Hash of the evaluated documents: results of different ones cannot be compared."""


class Runner(Protocol):
    """Runs experiments; tests replace it."""

    def run(self, name: str, settings: Mapping[str, Any]) -> None:
        """Run an experiment.

        Raises:
            RunError: if it fails.
        """

    def find(self, name: str, settings: Mapping[str, Any]) -> RunResult | None:
        """Return the result of a finished experiment; None if there is none.

        Raises:
            StageError: if the experiment has other settings, values, code or source data, or its result cannot be read.
        """


class Experiments:
    """Runs `dvc exp run --temp` up to the evaluation of one task."""

    def __init__(self, space: Space, repo: Repo, log: Path, lock: int) -> None:
        """
        Args:
            log: file to which the output of all runs is appended.
            lock: open file, which stays locked until the last run has ended, even if the search is killed.
        """
        self._space, self._outs, self._log, self._lock = space, Outs(repo), log, lock
        self._tree, self._target = WorkingTree(repo), f"evaluate@{space.task}"

    def run(self, name: str, settings: Mapping[str, Any]) -> None:
        command = make_run_command(name, settings, self._target)
        with self._log.open("ab") as stream:
            stream.write(f"\n=== {name}\n".encode())
            stream.flush()
            start = stream.tell()
            code = run_to_end(
                command, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, pass_fds=[self._lock]
            )
        if code:
            output = self._log.read_bytes()[start:].decode(errors="replace")
            raise RunError(f"{find_error(output)} ({self._log})")

    def find(self, name: str, settings: Mapping[str, Any]) -> RunResult | None:
        rev = find_experiment(name)
        if rev is None:
            return None
        if difference := next(find_differences(self._outs.read_lock(rev), self._target, settings, self._tree), ""):
            raise StageError(
                f"experiment {name} exists, but is not a run of the working tree with the values of its trial"
                f" ({difference}): remove it (`dvc exp remove {name}`), or choose another name for the search (--name)"
            )
        task = self._space.task
        content, documents = (
            self._outs.read_out(rev, get_metrics_path(task)),
            hash_evaluated_documents(self._outs, rev, task),
        )
        if content is None or documents is None:
            raise StageError(
                f"experiment {name} has no reports/evaluate/{task} in DVC's cache: `dvc pull` it, or remove the"
                f" experiment (`dvc exp remove {name}`) so that it is run again"
            )
        figures = json.loads(content)[task]["validation"]
        value = float(figures[self._space.metric or find_headline_metric(figures)])
        return RunResult(rev, value if math.isfinite(value) else math.nan, documents)


def find_error(output: str) -> str:
    """Return the error of a stage in the output of `dvc exp run`; without one, DVC's own error."""
    if messages := _STAGE_ERROR.findall(output):
        return escape_controls(messages[-1])
    lines = [line for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR: ")]
    return printable((errors or lines or ["dvc exp run failed"])[-1].removeprefix("ERROR: "), 1000)


# -- revisions ---------------------------------------------------------------------------------------------------------


def find_experiment(name: str) -> str | None:
    """Return the commit of the newest experiment with this name, based on any commit; None if there is none."""
    command = ["git", "for-each-ref", "--sort=-creatordate", "--format=%(objectname)", f"refs/exps/*/*/{name}"]
    commits = subprocess.run(command, check=False, capture_output=True, text=True).stdout.split()
    return commits[0] if commits else None


def read_yaml_at(rev: str, file: str) -> Any:
    """Return the values of a YAML file at a revision; empty if there is no such file."""
    shown = subprocess.run(["git", "show", f"{rev}:{file}"], check=False, capture_output=True, text=True)
    return load_yaml(shown.stdout) if shown.returncode == 0 else {}


def read_revision(name: str, rev: str, task: str) -> dict[str, Any]:
    """Return a revision with the metrics of one task, as in the output of `dvc exp show --json`.

    DVC's command needs seconds, more with each experiment, and leaves out those of earlier commits.
    """
    params = read_yaml_at(rev, PARAMS.name)
    files = [PARAMS.name, *dict.fromkeys(file for _, file in list_chosen_files(params))]
    metrics = read_yaml_at(rev, f"metrics/{task}.json")
    return {
        "rev": rev,
        "name": name,
        "data": {
            "metrics": {f"metrics/{task}.json": {"data": metrics}} if metrics else {},
            "params": {file: {"data": read_yaml_at(rev, file)} for file in files},
        },
    }
