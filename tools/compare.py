"""Compare experiments: print a table of their headline metrics and of the parameters that differ.

Command python -m tools.compare [--split test] [--against NAME | --by GROUP] [-n 3 | -A]

Use the validation split (the default) to choose between experiments, and the test split to report results. Parameters
of conf/ are compared by group and key: if two experiments use different files of a group, the table shows the keys with
different values. With --by, the table instead has one column per value of a group of documents. GROUP is `source` or a
column that `groups` in conf/data lists.

A second table says whether each experiment is better than the last commit (or NAME), by a paired comparison of their
documents (docs/metrics.md). Experiments that cannot be paired, for example because they were evaluated on other
documents, are marked and never shown as the best of a column.
"""

import argparse
import json
import signal
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from stages.core.config import MISSING, find_value, flatten_values
from stages.core.errors import StageError, printable
from stages.figures.names import SHORT_NAMES, SHORT_SPLITS

PER_TASK_GROUPS = ("model", "adapter", "task")
"""Groups of conf/ for which each task chooses a file."""
WORKSPACE = "workspace"
"""DVC's name for the revision of the workspace."""
HEADING_WIDTH = 12
INCOMPARABLE = "\u2020"  # a dagger


class Param(NamedTuple):
    """A parameter of an experiment."""

    value: str
    """The value as JSON."""
    argument: str
    """Name of the parameter as an argument of `dvc exp run -S`."""


class ExperimentRow(NamedTuple):
    """A commit, experiment or workspace that has results: one row of the table."""

    rev: str
    name: str
    is_commit: bool
    params: dict[str, Param]
    """Column heading to parameter. The heading is the same for all files of a group."""
    metrics: dict[str, float]
    """Column heading, `TASK METRIC`, to value."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], prog="python -m tools.compare")
    parser.add_argument("--split", choices=tuple(SHORT_SPLITS.values()), default="val")
    parser.add_argument(
        "--by", metavar="GROUP", help="compare by values of `source` or of a column in `groups` of conf/data"
    )
    parser.add_argument("--against", metavar="NAME", help="compare with this experiment or commit (default: HEAD)")
    parser.add_argument(
        "-n", "--num", type=int, default=1, metavar="N", help="show the experiments of the last N commits"
    )
    parser.add_argument("-A", "--all-commits", action="store_true", help="show the experiments of all commits")
    arguments = parser.parse_args()
    split = arguments.split
    commits = ["-A"] if arguments.all_commits else ["-n", str(arguments.num)]
    try:
        found = list(list_revisions(show_experiments(*commits)))
    except StageError as error:
        sys.exit(f"compare: {error}")
    rows = read_rows(found, split)
    if not rows:
        sys.exit("compare: no commit and no experiment has metrics yet: run `make`, and commit dvc.lock and metrics/")
    if arguments.by is not None:
        from tools.compare_groups import compare_groups  # here because it imports this module

        compare_groups(found, arguments.by, split, Console(highlight=False))
    else:
        from tools.compare_pairs import compare_pairs

        rows = compare_pairs(rows, found, split, arguments.against, Console(highlight=False))
        if lines := list(summarize_seeds(rows)):
            print("\nExperiments that differ in seed only:", *lines, sep="\n")
    if unfinished := sum(map(is_unfinished, found)):
        print(f"\nNot shown because they have no results (queued, running or failed): {unfinished}")
    if len(rows) == 1:
        print("\nNothing to compare with yet. To run an experiment: dvc exp run -S block_size=256")


def get_full_split(split: str) -> str:
    """Return the full name of a split, as in reports/, from its short name, as in metrics/TASK.json."""
    return next(full for full, short in SHORT_SPLITS.items() if short == split)


# -- reading -----------------------------------------------------------------------------------------------------------


def show_experiments(*options: str) -> list[dict[str, Any]]:
    """Return the output of `dvc exp show --json`.

    Args:
        options: options of `dvc exp show` that choose revisions.

    Raises:
        StageError: if DVC fails, with the first line of its message.
    """
    shown = subprocess.run(["dvc", "exp", "show", "--json", *options], check=False, capture_output=True, text=True)
    if shown.returncode:
        messages = shown.stderr.strip().splitlines()
        raise StageError(f"dvc exp show failed: {printable(messages[0], 2000) if messages else ''}")
    found: list[dict[str, Any]] = json.loads(shown.stdout)
    return found


def list_revisions(shown: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the revisions in the output of `dvc exp show --json`: workspace and commits, each before its experiments.

    Only experiments have the key `executor`: None, or the state of their queued, running or failed execution.
    """
    for revision in shown:
        yield revision
        for experiment in revision.get("experiments") or []:
            for row in experiment["revs"]:
                yield {**row, "executor": experiment.get("executor")}


def get_revision_name(row: dict[str, Any]) -> str:
    """Return the name of a revision; if it has none, the first 7 characters of its commit."""
    return str(row.get("name") or (row["rev"] if row["rev"] == "workspace" else row["rev"][:7]))


def is_unfinished(row: dict[str, Any]) -> bool:
    """Return True for an experiment without results of its own; DVC shows the results of its parent commit for it."""
    return bool(row.get("error")) or (row.get("executor") or {}).get("state", "success") != "success"


def read_rows(found: Iterable[dict[str, Any]], split: str) -> list[ExperimentRow]:
    """Return the rows of the table. The workspace is included only if it differs from every other row."""
    rows, workspace = [], None
    for revision in found:
        data = revision.get("data") or {}
        if is_unfinished(revision) or not data.get("metrics"):
            continue
        rev, params, metrics = (
            revision["rev"],
            collect_params(data.get("params") or {}),
            collect_metrics(data["metrics"], split),
        )
        row = ExperimentRow(
            rev, get_revision_name(revision), "executor" not in revision and rev != WORKSPACE, params, metrics
        )
        if rev == WORKSPACE:
            workspace = row
        else:
            rows.append(row)
    if workspace is not None and all(workspace[3:] != row[3:] for row in rows):
        rows.insert(0, workspace)
    return rows


def collect_metrics(files: dict[str, Any], split: str) -> dict[str, float]:
    """Return the headline metrics of a split by column heading.

    Metrics in the format of an earlier version of the project are left out.
    """
    found = {}
    for file in files.values():
        for task, splits in (file.get("data") or {}).items():
            for name in SHORT_NAMES.values():
                value = find_value(splits, f"{split}.{name}")
                if value is not MISSING:
                    found[f"{task} {name}"] = float(value)
    return found


def collect_params(files: dict[str, Any]) -> dict[str, Param]:
    """Return the parameters by column heading.

    The heading of a parameter in a chosen file of conf/ contains the group, and the task if each task chooses its own
    file, but not the file's name.
    """
    contents = {file: content.get("data") or {} for file, content in files.items()}
    params = contents.pop("params.yaml", {})
    found = {
        key.removeprefix("tasks."): Param(json.dumps(value, ensure_ascii=False), key)
        for key, value in flatten_values(params)
    }
    for heading, file in list_chosen_files(params):
        for key, value in flatten_values(contents.pop(file, {})):
            found[f"{heading}: {key}"] = Param(json.dumps(value, ensure_ascii=False), f"{file}:{key}")
    for file, content in contents.items():  # not among the chosen files: written by an earlier version
        for key, value in flatten_values(content):
            found[f"{file}: {key}"] = Param(json.dumps(value, ensure_ascii=False), f"{file}:{key}")
    return found


def list_chosen_files(params: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield heading and file of each configuration that params.yaml names; later files override earlier ones."""
    yield "hardware", "conf/base/hardware.yaml"
    for group in ("data", "hardware", "framework"):
        chosen = params.get(group)
        yield group, f"conf/{group}/{chosen.get('name') if isinstance(chosen, dict) else chosen}.yaml"
    tasks = params.get("tasks")
    for task, section in (tasks if isinstance(tasks, dict) else {}).items():
        for group in PER_TASK_GROUPS:
            name = task if group == "task" else find_value(section, group)
            yield task if group == "task" else f"{task}.{group}", f"conf/{group}/{name}.yaml"


def flatten_params(files: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the parameters in the output of `dvc exp show --json`: name as an argument of `-S`, and value as JSON.

    Files that could not be read at the revision are skipped.
    """
    for file, content in files.items():
        prefix = "" if file == "params.yaml" else f"{file}:"
        for key, value in flatten_values(content.get("data") or {}):
            yield f"{prefix}{key}", json.dumps(value, ensure_ascii=False)


# -- the table ---------------------------------------------------------------------------------------------------------


def print_metrics_table(
    rows: list[ExperimentRow], console: Console, incomparable: Collection[tuple[str, str]] = ()
) -> None:
    """Print the table of metrics and differing parameters.

    If the parameters do not fit into the width of the console, print them below the table, one line per row.

    Args:
        incomparable: pairs of a row's name and a task for which the metrics are not comparable with the other rows.
    """
    headings = find_differing_headings(rows)
    table = make_metrics_table(rows, headings, incomparable)
    fits = measure_width(table, console) <= console.width
    if not fits:
        table = make_metrics_table(rows, [], incomparable)
    # A table wider than the console is better than cells that rich cuts with an ellipsis.
    Console(highlight=False, width=max(console.width, measure_width(table, console))).print(table)
    if len(rows) > 1 and any(row.metrics for row in rows):
        print("* best of its column; lower is better")
    if incomparable:
        print(f"{INCOMPARABLE} not comparable with the others; the reason is below")
    if not fits:
        print(
            "\nDifferent parameters, as arguments of `dvc exp run -S`:",
            *format_params(rows, headings),
            sep="\n",
        )
    elif headings:
        print(f"To set a parameter: dvc exp run -S {find_argument(rows, headings[0])}=VALUE")


def measure_width(table: Table, console: Console) -> int:
    return Measurement.get(console, console.options.update(max_width=100_000), table).maximum


def make_metrics_table(
    rows: list[ExperimentRow], headings: list[str], incomparable: Collection[tuple[str, str]] = ()
) -> Table:
    """Return a table with one row per revision: its metrics and its values of the parameters `headings`."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("experiment", no_wrap=True)
    metrics = list(dict.fromkeys(name for row in rows for name in row.metrics))
    for name in metrics:
        table.add_column(name.replace(" ", "\n"), no_wrap=True, justify="right")
    for heading in headings:
        table.add_column(Text(break_heading(printable(heading))), no_wrap=True, justify="right")

    def is_comparable(row: ExperimentRow, metric: str) -> bool:
        return (row.name, metric.partition(" ")[0]) not in incomparable

    comparable = {name: [row for row in rows if name in row.metrics and is_comparable(row, name)] for name in metrics}
    best = {name: min((row.metrics[name] for row in own), default=None) for name, own in comparable.items()}
    for row in rows:
        cells = [
            format_metric(row.metrics.get(name), best[name], len(rows) > 1)
            if is_comparable(row, name)
            else Text(f"{row.metrics[name]:.4f}{INCOMPARABLE}" if name in row.metrics else "- ")
            for name in metrics
        ]
        values = (row.params[heading].value if heading in row.params else "-" for heading in headings)
        table.add_row(Text(row.name), *cells, *(Text(printable(value.strip('"'))) for value in values))
    return table


def format_metric(value: float | None, best: float | None, marked: bool) -> Text:
    if value is None:
        return Text("- ")
    if marked and value == best:
        return Text(f"{value:.4f}*", style="bold")
    return Text(f"{value:.4f} ")


def break_heading(heading: str) -> str:
    """Break a heading after dots, colons and underscores into lines of at most HEADING_WIDTH characters if possible."""
    lines = [""]
    for word in heading.replace(": ", ":\0").replace(".", ".\0").replace("_", "_\1").split("\0"):
        lines.append("")
        for part in word.split("\1"):
            if len(lines[-1]) + len(part) > HEADING_WIDTH and lines[-1]:
                lines.append("")
            lines[-1] += part
    return "\n".join(line for line in lines if line)


def find_differing_headings(rows: list[ExperimentRow]) -> list[str]:
    """Return the headings of the parameters that do not have the same value in all rows."""
    headings = dict.fromkeys(heading for row in rows for heading in row.params)
    return [
        name for name in headings if len({row.params[name].value if name in row.params else None for row in rows}) > 1
    ]


def find_argument(rows: list[ExperimentRow], heading: str) -> str:
    return next(row.params[heading].argument for row in rows if heading in row.params)


def format_params(rows: list[ExperimentRow], headings: list[str]) -> list[str]:
    """Return one line of text per row with its values of the parameters `headings`."""
    width = max(len(row.name) for row in rows)
    return [
        f"  {row.name:{width}}  "
        + " ".join(
            printable(f"{row.params[heading].argument}={row.params[heading].value}", 2000)
            for heading in headings
            if heading in row.params
        )
        for row in rows
    ]


def summarize_seeds(rows: list[ExperimentRow]) -> Iterator[str]:
    """Yield lines with the mean and standard deviation of each metric over experiments that differ only in `seed`."""
    groups: dict[str, list[ExperimentRow]] = defaultdict(list)
    for row in rows:
        others = {heading: param.value for heading, param in row.params.items() if heading != "seed"}
        groups[json.dumps(others, sort_keys=True)].append(row)
    for members in groups.values():
        # One row per seed: the same experiment may have several names.
        seeds = {row.params["seed"].value: row for row in members if "seed" in row.params}
        if len(seeds) > 1:
            yield f"  {', '.join(row.name for row in seeds.values())} (seeds {', '.join(seeds)})"
            for name in next(iter(seeds.values())).metrics:
                values = [row.metrics[name] for row in seeds.values() if name in row.metrics]
                if len(values) == len(seeds):
                    yield f"    {name}: {statistics.mean(values):.4f} +- {statistics.stdev(values):.4f}"


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end silently in `| head -1`
    main()
