"""Best model that a search finds, against a grid over the same space in the same time.

Command python -m benchmarks.search [--budget 20m] [--space conf/search.yaml]
Needs   `make optuna`; twice the budget, on a machine that does nothing else

A clone of HEAD in a temporary directory runs the pipeline once, then `python -m tools.search`, then the
grid. Every run of the grid trains for all epochs. The first has the middle of each range; its time says how many points
fit into the budget. Each key then gets as many values as possible, in the middle of equal parts of its range (on a
logarithmic scale if the space says so), or the first of its choices. The last line printed is one JSON object.
"""

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from dvc.repo import Repo

from tools.search.command import lock_search, parse_budget
from tools.search.runs import Experiments, RunError, find_experiment, read_yaml_at
from tools.search.space import Choices, Range, Space, make_settings, read_space
from tools.search.study import DIRECTORY, list_runs, open_study, sum_seconds

ROOT = Path(__file__).resolve().parent.parent


class Best(NamedTuple):
    """The best experiment of a method."""

    name: str
    validation: float
    """Metric that the space minimizes."""
    rev: str
    trials: int
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--budget", default="20m", help="of each of the two, as for tools.search")
    parser.add_argument("--space", type=Path, default=Path("conf/search.yaml"), help="relative to the repository")
    arguments = parser.parse_args()
    seconds = parse_budget(arguments.budget).seconds
    if seconds is None:
        parser.error("--budget: it should be a time")
    with tempfile.TemporaryDirectory() as scratch:
        clone = Path(scratch) / "clone"
        run_command("git", "clone", "--quiet", str(ROOT), str(clone))
        os.chdir(clone)
        space = read_space(arguments.space)
        os.environ["LM_REPRO_CACHE"] = f"{scratch}/cache"
        run_command("dvc", "repro", "--quiet")
        run_command("git", "commit", "--quiet", "--all", "--allow-empty", "--message", "baseline")
        search = ("--space", str(arguments.space), "--name", "search", "--budget", arguments.budget)
        run_command(sys.executable, "-m", "tools.search", *search)
        # Checkpoints of the search must not shorten the runs of the grid.
        os.environ["LM_REPRO_CACHE"] = f"{scratch}/cache-of-grid"
        found = {"search": find_best_of_search(), "grid": run_grid(space, seconds)}
        figures = {"HEAD": {"test": read_test_metric(space, "HEAD")}} | {
            method: {**best._asdict(), "test": read_test_metric(space, best.rev)} for method, best in found.items()
        }
    print(f"\n{'':8} {'validation':>10} {'test':>8} {'trials':>7} {'seconds':>8}  best")
    print(f"{'HEAD':8} {'':10} {figures['HEAD']['test']:8.4f}")
    for method, best in found.items():
        test = figures[method]["test"]
        print(f"{method:8} {best.validation:10.4f} {test:8.4f} {best.trials:7} {best.seconds:8.0f}  {best.name}")
    print(json.dumps(figures))


def run_command(*command: str) -> None:
    """Run `command` in the current directory and show its output."""
    if code := subprocess.run(command, check=False).returncode:
        sys.exit(f"{' '.join(command)} ended with {code}")


def find_best_of_search() -> Best:
    """Return the best trial of the search."""
    study = open_study("search", create=False)
    trials = study.get_trials()
    if all(trial.value is None for trial in trials):
        sys.exit("no trial of the search was trained to the end: give a larger --budget")
    run = list_runs([study.best_trial])[-1]
    return Best(run["name"], study.best_value, run["rev"], len(trials), sum_seconds(trials))


def read_test_metric(space: Space, rev: str) -> float:
    """Return the headline metric of the test split of a revision."""
    (value,) = read_yaml_at(rev, f"metrics/{space.task}.json")[space.task]["test"].values()
    return float(value)


# -- the grid ----------------------------------------------------------------------------------------------------------


def run_grid(space: Space, budget: float) -> Best:
    """Run the points of the grid until the next one does not fit into the budget, and return the best."""
    epochs, names = space.halving.epochs[-1], list(space.keys)
    results: list[tuple[float, str, str]] = []
    durations: list[float] = []

    def run_point(values: tuple[Any, ...]) -> None:
        name = f"grid-{len(durations):03}"
        settings = make_settings(space, dict(zip(names, values, strict=True)), epochs)
        started = time.monotonic()
        try:
            runner.run(name, settings)
            result = runner.find(name, settings)
            assert result is not None
            results.append((result.value, name, result.rev))
            print(f"{name}  {result.value:.4f}", flush=True)
        except RunError as error:
            print(f"{name} failed: {error}", flush=True)
        durations.append(time.monotonic() - started)

    with Repo() as repo, lock_search("grid") as lock:
        runner = Experiments(space, repo, DIRECTORY / "grid.log", lock)
        middle = tuple(list_points(spec, 1)[0] for spec in space.keys.values())
        run_point(middle)
        for values in make_grid(space, int(budget / durations[0])):
            if sum(durations) + max(durations) > budget:
                break
            if values != middle:
                run_point(values)
    value, name, rev = min(results)
    assert find_experiment(name) == rev
    return Best(name, value, rev, len(durations), sum(durations))


def make_grid(space: Space, num_points: int) -> list[tuple[Any, ...]]:
    """Return a grid of at most `num_points` points, with numbers of values per key that differ by at most one."""
    specs = list(space.keys.values())
    most = [len(list_points(spec, num_points)) for spec in specs]
    levels = [1] * len(specs)
    while True:
        open_keys = [index for index in range(len(specs)) if levels[index] < most[index]]
        if not open_keys:
            break
        index = min(open_keys, key=lambda index: levels[index])
        if math.prod(levels) // levels[index] * (levels[index] + 1) > num_points:
            break
        levels[index] += 1
    return list(itertools.product(*(list_points(spec, count) for spec, count in zip(specs, levels, strict=True))))


def list_points(spec: Range | Choices, count: int) -> list[Any]:
    """Return at most `count` different values of a key."""
    if isinstance(spec, Choices):
        return spec.choices[:count]
    low, high = (math.log(spec.low), math.log(spec.high)) if spec.log else (spec.low, spec.high)
    places = [low + (high - low) * (index + 0.5) / max(count, 1) for index in range(count)]
    step = spec.step or (1 if spec.is_whole else None)
    numbers = [math.exp(place) if spec.log else place for place in places]
    if step is not None:
        numbers = [spec.low + round((number - spec.low) / step) * step for number in numbers]
    return list(dict.fromkeys(spec.round_value(number) for number in numbers))


if __name__ == "__main__":
    main()
