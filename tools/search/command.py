"""Search for better values of params.yaml and conf/, with successive halving over the epochs of training.

Command python -m tools.search --budget 2h [--space conf/search.yaml] [--name NAME]
        python -m tools.search --show

Optuna (`make optuna`) proposes the values of each trial from the results so far. Every run of a trial is an experiment
of DVC, NAME-TRIAL-eEPOCHS, and the search itself is a file, reports/search/NAME.journal. So the same command goes on
after an interruption of any kind, and with a larger budget after the end.
"""

import argparse
import contextlib
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dvc.exceptions import DvcException
from dvc.repo import Repo

from stages.core.artifacts import lock_handle
from stages.core.compose import Params
from stages.core.config import suggest_name
from stages.core.errors import StageError, printable, printable_lines
from stages.shell.app import format_error
from tools.check import explain_dvc_error, is_project_stage
from tools.experiments import WorkingTree, check_plots_are_cached
from tools.forecast import CODE
from tools.search.check import check_space
from tools.search.runs import Experiments
from tools.search.space import read_space
from tools.search.study import DIRECTORY, check_space_is_recorded, import_optuna, open_study, prepare_study
from tools.search.table import print_results
from tools.search.trials import Budget, Search

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], prog="python -m tools.search")
    parser.add_argument("--budget", type=parse_budget, help="of the whole search: 20m, 2h, 1h30m, or 40trials")
    parser.add_argument("--space", type=Path, default=Path("conf/search.yaml"), metavar="FILE", help="the search space")
    parser.add_argument("--name", help="name of the search (default: that of the file)")
    parser.add_argument("--show", action="store_true", help="only print the results so far")
    arguments = parser.parse_args()
    if (arguments.budget is None) != arguments.show:
        parser.error("one of --budget and --show is required")
    try:
        run_search(arguments.space, arguments.name, arguments.budget)
    except KeyboardInterrupt:
        print("\nsearch: interrupted: the same command goes on", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if os.environ.get("LM_REPRO_DEBUG") == "1":
            raise
        sys.exit(printable_lines(f"search: error: {explain_error(error)}"))


def explain_error(error: Exception) -> str:
    return explain_dvc_error(error) if isinstance(error, DvcException) else format_error(error)


def parse_budget(text: str) -> Budget:
    """Parse the argument of --budget."""
    if found := re.fullmatch(r"(\d+) ?trials?", text):
        number = int(found[1])
        return Budget(None, check_positive(number, text))
    if not re.fullmatch(r"(?:\d+(?:\.\d+)?[dhms])+", text):
        raise argparse.ArgumentTypeError(
            f"{printable(repr(text))}: it should be a time such as 20m, 2h or 1h30m, or 40trials"
        )
    seconds = sum(float(number) * _UNITS[unit] for number, unit in re.findall(r"([\d.]+)([dhms])", text))
    return Budget(check_positive(seconds, text), None)


def check_positive(number: Any, text: str) -> Any:
    if number <= 0:
        raise argparse.ArgumentTypeError(f"{printable(repr(text))}: it should be above 0")
    return number


def run_search(file: Path, name: str | None, budget: Budget | None) -> None:
    """Run the search until `budget` is used up, and print its results; only print them if `budget` is None.

    Raises:
        StageError: if the space is invalid, if it differs from that of the earlier calls, or if several trials fail.
    """
    import_optuna()
    space, name = read_space(file), check_name(file.stem if name is None else name)
    tasks = Params().list_items("task")
    if space.task not in tasks:
        raise StageError(
            f"{printable(file)}: task={printable(space.task)} is not in params.yaml: {suggest_name(space.task, tasks)}"
        )
    if budget is None:
        study = open_study(name, create=False)
        check_space_is_recorded(study, name, space)
        print_results(space, study)
        return
    with Repo() as repo, lock_search(name) as lock:
        target = f"evaluate@{space.task}"
        stages = [stage.addressing for stage in repo.stage.collect(target, with_deps=True)]
        # Not the stage `code`, which has no values, nor .dvc files and stages that users add.
        read = [stage for stage in stages if stage != CODE and is_project_stage(stage.partition("@")[0])]
        checked = check_space(space, read)
        check_plots_are_cached(repo, space.task)
        study = open_study(name, create=True)
        prepare_study(study, name, space, {**checked.fingerprints, **WorkingTree(repo).hash_sources(target)})
        if checked.notice:
            print(f"search: {checked.notice}", file=sys.stderr)
        runner = Experiments(space, repo, DIRECTORY / f"{name}.log", lock)
        try:
            Search(name, space, study, runner, checked.settings, not checked.notice).run(budget)
        except StageError:
            print_results(space, study)
            raise
        print_results(space, study)


def check_name(name: str) -> str:
    """Return the name of a search, which begins the names of its experiments.

    Raises:
        StageError: if git could not use it in the name of a ref.
    """
    if not _NAME.fullmatch(name):
        raise StageError(f"--name {printable(repr(name))}: it should have letters, digits, _ and - only")
    return name


@contextlib.contextmanager
def lock_search(name: str) -> Iterator[int]:
    """Lock a search against other processes, and yield the locked file.

    A search that was killed may leave a run, which keeps the file locked: wait for it, because its result will be used.
    """
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    handle = os.open(DIRECTORY / f"{name}.lock", os.O_RDWR | os.O_CREAT)
    try:
        waits = False
        while True:
            try:
                lock_handle(handle)
                break
            except OSError:
                if not waits:
                    print(
                        f"search: waiting for the end of another search {name}, or of a run that a killed one left",
                        file=sys.stderr,
                    )
                waits = True
                time.sleep(1)
        yield handle
    finally:
        os.close(handle)
