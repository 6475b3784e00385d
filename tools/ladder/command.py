"""Run a scaling ladder: a model of several sizes, trained for several lengths, and the law of their bits per byte.

Command python -m tools.ladder FILE [--dry-run | --queue | --fit-only] [--compute OPERATIONS]

Runs each rung of FILE (ladders/tiny.yaml) that has no results yet as a DVC experiment, then fits bits per byte against
parameters and training tokens, predicts the rung with most compute from the others, and compares the prediction with
its result. The result is written to reports/ladder/NAME.json, which `make report` draws. Run the command again after an
interruption, a failure, or a change of FILE: only missing rungs are run. docs/scaling.md has the definitions.
"""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dvc.exceptions import DvcException
from dvc.repo import Repo
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from stages.core.errors import StageError, printable_lines
from tools.compare import measure_width, show_experiments
from tools.experiments import WorkingTree, check_plots_are_cached, make_run_command, run_to_end
from tools.ladder.file import Ladder, Rung, read_ladder
from tools.ladder.result import (
    Point,
    analyze,
    describe_missing,
    describe_result,
    find_missing,
    make_points,
    write_result,
)
from tools.ladder.rungs import MeasuredRung, RungState, State, find_states, read_measured
from tools.lock_history import resolve_revision
from tools.outs import Outs


class _Progress(NamedTuple):
    """Rungs after the runs of this command."""

    measured: list[MeasuredRung]
    commit: str
    """Commit of the working tree, from which the experiments were run."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], prog="python -m tools.ladder")
    parser.add_argument("file", type=Path, metavar="FILE", help="the ladder: ladders/tiny.yaml is an example")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--dry-run", action="store_true", help="list the rungs and the commands of those to run")
    modes.add_argument("--queue", action="store_true", help="queue the rungs for `dvc queue start`")
    modes.add_argument("--fit-only", action="store_true", help="run nothing; use the rungs that have results")
    parser.add_argument(
        "--compute",
        type=float,
        metavar="OPERATIONS",
        help="extrapolate to this compute, 6 N D (default: 10 times that of the largest rung)",
    )
    arguments = parser.parse_args()
    if arguments.compute is not None and not 0 < arguments.compute < float("inf"):
        parser.error(f"--compute {arguments.compute:g}: give a positive number")
    try:
        ladder = read_ladder(arguments.file)
        states = read_states(ladder)
        if arguments.dry_run:
            print_states(ladder, states)
            return
        if not arguments.fit_only:
            run_rungs(ladder, [state for state in states if state.is_to_run], arguments.queue)
        if not arguments.queue:
            print_results(ladder, read_progress(ladder), arguments.compute)
    except KeyboardInterrupt:
        sys.exit("\nladder: interrupted: run the command again to go on")
    except (OSError, ValueError, DvcException, subprocess.CalledProcessError) as error:
        sys.exit(printable_lines(f"ladder: {error}"))


# -- running -----------------------------------------------------------------------------------------------------------


def read_states(ladder: Ladder) -> list[RungState]:
    """Read the state of each rung."""
    with Repo() as repo:
        return find_states(ladder, show_experiments(), Outs(repo), WorkingTree(repo))


def read_progress(ladder: Ladder) -> _Progress:
    """Read the results of the rungs that have any."""
    with Repo() as repo:
        outs = Outs(repo)
        states = find_states(ladder, show_experiments(), outs, WorkingTree(repo))
        return _Progress(read_measured(ladder, states, outs), resolve_revision(repo, "HEAD"))


def make_command(rung: Rung, target: str, queue: bool = False) -> list[str]:
    """Return the command that runs a rung outside the workspace, or queues it."""
    return make_run_command(rung.experiment, rung.settings, target, "--queue" if queue else "--temp")


def run_rungs(ladder: Ladder, states: Sequence[RungState], queue: bool) -> None:
    """Run or queue rungs one after the other. A rung that fails is reported by DVC, and the others still run.

    Raises:
        StageError: if DVC could not save any rung.
    """
    with Repo() as repo:
        check_plots_are_cached(repo, ladder.task)
    for number, (rung, state, reason, _) in enumerate(states, 1):
        print(f"ladder: [{number}/{len(states)}] {rung.experiment}{f': {reason}' if reason else ''}", flush=True)
        if state is State.STALE:
            subprocess.run(["dvc", "exp", "remove", "--quiet", rung.experiment], check=True)
        run_to_end(make_command(rung, ladder.target, queue))
    if queue and states:
        print("\nRun `dvc queue start`, and when it is done `python -m tools.ladder FILE`.")


def print_states(ladder: Ladder, states: Sequence[RungState]) -> None:
    """Print the state of each rung, and the commands that would run."""
    width = max(len(state.rung.experiment) for state in states)
    for rung, state, reason, _ in states:
        print(printable_lines(f"{rung.experiment:{width}}  {state.value}{f': {reason}' if reason else ''}"))
    for rung in (found.rung for found in states if found.is_to_run):
        print(f"\n{shlex.join(make_command(rung, ladder.target))}")


# -- results -----------------------------------------------------------------------------------------------------------


def print_results(ladder: Ladder, progress: _Progress, budget: float | None) -> None:
    """Print the rungs, the back-test, the law and the extrapolation, and write them to a file.

    Raises:
        StageError: if rungs have no results; after printing those of the others.
    """
    if not progress.measured:
        raise StageError(f"none of the {len(ladder.rungs)} rungs has results")
    points = make_points(progress.measured)
    metric = progress.measured[0].metric
    try:
        result = analyze(ladder, progress.commit, metric, points, budget)
    except StageError as error:
        print_points(points, metric)
        missing = describe_missing([rung.experiment for rung in find_missing(ladder, points)])
        raise StageError("; ".join([str(error), *missing])) from None
    print_points(result.points, metric)
    print(*describe_result(result), sep="\n")
    print(f"\n{write_result(result)}: drawn by `make report`")
    if result.missing:
        raise StageError(f"{len(result.missing)} of {len(ladder.rungs)} rungs have no results")


def print_points(points: Sequence[Point], metric: str) -> None:
    """Print one row per point of the fit."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("size", "length"):
        table.add_column(heading, no_wrap=True)
    headings = ["parameters", "outside\nembeddings", "tokens", "epochs", "compute", metric.replace("_b", "\nb", 1)]
    has_seeds = any(point.deviation_of_seeds is not None for point in points)
    for heading in [*headings, *(["seeds\n+-"] if has_seeds else []), "law"]:
        table.add_column(heading, no_wrap=True, justify="right")
    for point in points:
        seeds = "" if point.deviation_of_seeds is None else f"{point.deviation_of_seeds:.4f}"
        table.add_row(
            Text(point.size),
            Text(point.length),
            f"{point.num_parameters:,}",
            f"{point.num_non_embedding:,}",
            f"{point.num_tokens:,}",
            f"{point.num_epochs:.3g}",
            f"{point.compute:.2e}",
            f"{point.bits:.4f}",
            *([seeds] if has_seeds else []),
            "-" if point.fitted is None else f"{point.fitted:.4f}",
        )
    console = Console(highlight=False)
    Console(highlight=False, width=max(console.width, measure_width(table, console))).print(table)
