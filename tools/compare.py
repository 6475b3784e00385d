"""Compare experiments: a table of their headline metrics and of the parameters in which they differ.

Command python -m tools.compare [--split test] [--against NAME | --by GROUP] [-n 3 | -A]

Choose among experiments by validation (the default); report test. Parameters of conf/ are compared by group and key, so
that an experiment on another file of a group differs in the keys that have other values. With --by, the table has a
column for each value of a group of documents instead: of `source`, or of a column that `groups` of conf/data keeps.

Below the table: whether each experiment is better than the last commit (or NAME), judged in pairs of documents
(docs/metrics.md). What cannot be paired with it, since it was evaluated on other documents, say, is marked and is never
the best of its column.
"""

import argparse
import json
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

from stages.core.config import MISSING, find
from stages.core.config import flat as flatten
from stages.core.errors import printable
from stages.figures.names import SHORT_NAMES, SHORT_SPLITS

PER_TASK = ("model", "adapter", "task")
"""Groups of which each task has a configuration of its own."""
WORKSPACE = "workspace"
"""How DVC calls the revision that is the workspace."""
HEADING_WIDTH = 12
INCOMPARABLE = "\u2020"  # a dagger


class Param(NamedTuple):
    """A parameter of an experiment."""

    value: str
    """As JSON."""
    argument: str
    """What `-S` knows it by."""


class Row(NamedTuple):
    """A revision with results."""

    rev: str
    name: str
    is_commit: bool
    params: dict[str, Param]
    """By the heading of its column, which is the same for all files of a group."""
    metrics: dict[str, float]
    """By the heading of its column: the task and the metric."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], prog="python -m tools.compare")
    parser.add_argument("--split", choices=tuple(SHORT_SPLITS.values()), default="val")
    parser.add_argument("--by", metavar="GROUP", help="source, or a column that is kept as a group")
    parser.add_argument("--against", metavar="NAME", help="compare with this experiment or commit instead of HEAD")
    parser.add_argument("-n", "--num", type=int, default=1, metavar="N", help="the experiments of the last N commits")
    parser.add_argument("-A", "--all-commits", action="store_true", help="the experiments of all commits")
    arguments = parser.parse_args()
    split = arguments.split
    commits = ["-A"] if arguments.all_commits else ["-n", str(arguments.num)]
    shown = subprocess.run(["dvc", "exp", "show", "--json", *commits], check=False, capture_output=True, text=True)
    if shown.returncode:
        said = shown.stderr.strip().splitlines()
        sys.exit(f"compare: dvc exp show failed: {printable(said[0], 2000) if said else ''}")
    found = list(revisions(json.loads(shown.stdout)))
    rows = read_rows(found, split)
    if not rows:
        sys.exit("compare: no commit and no experiment has metrics yet: run `make`, and commit dvc.lock and metrics/")
    if arguments.by is not None:
        from tools.compare_groups import compare_groups  # which imports from here

        compare_groups(found, arguments.by, split, Console(highlight=False))
    else:
        from tools.compare_pairs import compare_pairs

        rows = compare_pairs(rows, found, split, arguments.against, Console(highlight=False))
        if lines := list(summarize_seeds(rows)):
            print("\nExperiments that differ in seed only:", *lines, sep="\n")
    if unfinished := sum(map(is_unfinished, found)):
        print(f"\nNot shown, since they have no results (queued, running or failed): {unfinished}")
    if len(rows) == 1:
        print("\nThere is nothing to compare it with yet: dvc exp run -S block_size=256")


def full_split(split: str) -> str:
    """The name in reports of the split that metrics/TASK.json calls `split`."""
    return next(full for full, short in SHORT_SPLITS.items() if short == split)


# -- what DVC shows ----------------------------------------------------------------------------------------------------


def revisions(shown: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """All that `dvc exp show --json` shows: workspace and commits, each before its experiments.

    An experiment has one more key, `executor`: None, or what runs it or failed to.
    """
    for revision in shown:
        yield revision
        for experiment in revision.get("experiments") or []:
            for row in experiment["revs"]:
                yield {**row, "executor": experiment.get("executor")}


def name_of(row: dict[str, Any]) -> str:
    """What one calls a revision: its name, or the beginning of its commit."""
    return str(row.get("name") or (row["rev"] if row["rev"] == "workspace" else row["rev"][:7]))


def is_unfinished(row: dict[str, Any]) -> bool:
    """Whether an experiment has no results of its own: it shows those of the commit that it starts from."""
    return bool(row.get("error")) or (row.get("executor") or {}).get("state", "success") != "success"


def read_rows(found: Iterable[dict[str, Any]], split: str) -> list[Row]:
    """The rows of the table. The workspace is one only if it differs from every other."""
    rows, workspace = [], None
    for revision in found:
        data = revision.get("data") or {}
        if is_unfinished(revision) or not data.get("metrics"):
            continue
        rev, params, metrics = revision["rev"], params_of(data.get("params") or {}), metrics_of(data["metrics"], split)
        row = Row(rev, name_of(revision), "executor" not in revision and rev != WORKSPACE, params, metrics)
        if rev == WORKSPACE:
            workspace = row
        else:
            rows.append(row)
    if workspace is not None and all(workspace[3:] != row[3:] for row in rows):
        rows.insert(0, workspace)
    return rows


def metrics_of(files: dict[str, Any], split: str) -> dict[str, float]:
    """The headline metrics of a split, by column; those that another version of the project wrote are left out."""
    found = {}
    for file in files.values():
        for task, splits in (file.get("data") or {}).items():
            for name in SHORT_NAMES.values():
                value = find(splits, f"{split}.{name}")
                if value is not MISSING:
                    found[f"{task} {name}"] = float(value)
    return found


def params_of(files: dict[str, Any]) -> dict[str, Param]:
    """Each parameter by the heading of its column.

    A file of conf/ that the experiment chose is known by its group (and the task that it is for), not by its name.
    """
    contents = {file: content.get("data") or {} for file, content in files.items()}
    params = contents.pop("params.yaml", {})
    found = {
        key.removeprefix("tasks."): Param(json.dumps(value, ensure_ascii=False), key) for key, value in flatten(params)
    }
    for heading, file in chosen_files(params):
        for key, value in flatten(contents.pop(file, {})):
            found[f"{heading}: {key}"] = Param(json.dumps(value, ensure_ascii=False), f"{file}:{key}")
    for file, content in contents.items():  # of a version of the project that chose files in another way
        for key, value in flatten(content):
            found[f"{file}: {key}"] = Param(json.dumps(value, ensure_ascii=False), f"{file}:{key}")
    return found


def chosen_files(params: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Heading and file of each configuration that params.yaml names; one that wins over another comes behind it."""
    yield "hardware", "conf/base/hardware.yaml"
    for group in ("data", "hardware", "framework"):
        chosen = params.get(group)
        yield group, f"conf/{group}/{chosen.get('name') if isinstance(chosen, dict) else chosen}.yaml"
    tasks = params.get("tasks")
    for task, section in (tasks if isinstance(tasks, dict) else {}).items():
        for group in PER_TASK:
            name = task if group == "task" else find(section, group)
            yield task if group == "task" else f"{task}.{group}", f"conf/{group}/{name}.yaml"


def flat(files: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Each parameter of `dvc exp show --json` under the name that `-S` knows it by, and its value as JSON.

    A file that could not be read at a revision has none.
    """
    for file, content in files.items():
        prefix = "" if file == "params.yaml" else f"{file}:"
        for key, value in flatten(content.get("data") or {}):
            yield f"{prefix}{key}", json.dumps(value, ensure_ascii=False)


# -- the table ---------------------------------------------------------------------------------------------------------


def draw(rows: list[Row], console: Console, incomparable: Collection[tuple[str, str]] = ()) -> None:
    """Print the table; the parameters below it, a line for each row, where they do not fit into the console's width.

    Args:
        incomparable: names of rows, and tasks, whose metrics do not compare with those of the others.
    """
    headings = differing_params(rows)
    table = make_table(rows, headings, incomparable)
    fits = width_of(table, console) <= console.width
    if not fits:
        table = make_table(rows, [], incomparable)
    # Wider than the console rather than cut: no cell ends in an ellipsis.
    Console(highlight=False, width=max(console.width, width_of(table, console))).print(table)
    if len(rows) > 1 and any(row.metrics for row in rows):
        print("* the best of its column; less is better")
    if incomparable:
        print(f"{INCOMPARABLE} does not compare with the others, as said below")
    if not fits:
        print(
            "\nParameters in which they differ, as `dvc exp run -S` takes them:", *list_params(rows, headings), sep="\n"
        )
    elif headings:
        print(f"To set a parameter: dvc exp run -S {argument_of(rows, headings[0])}=VALUE")


def width_of(table: Table, console: Console) -> int:
    return Measurement.get(console, console.options.update(max_width=100_000), table).maximum


def make_table(rows: list[Row], headings: list[str], incomparable: Collection[tuple[str, str]] = ()) -> Table:
    """A row for each revision: its metrics, and the parameters of `headings`."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("experiment", no_wrap=True)
    metrics = list(dict.fromkeys(name for row in rows for name in row.metrics))
    for name in metrics:
        table.add_column(name.replace(" ", "\n"), no_wrap=True, justify="right")
    for heading in headings:
        table.add_column(Text(break_heading(printable(heading))), no_wrap=True, justify="right")

    def compares(row: Row, metric: str) -> bool:
        return (row.name, metric.partition(" ")[0]) not in incomparable

    comparable = {name: [row for row in rows if name in row.metrics and compares(row, name)] for name in metrics}
    best = {name: min((row.metrics[name] for row in own), default=None) for name, own in comparable.items()}
    for row in rows:
        cells = [
            metric_cell(row.metrics.get(name), best[name], len(rows) > 1)
            if compares(row, name)
            else Text(f"{row.metrics[name]:.4f}{INCOMPARABLE}" if name in row.metrics else "- ")
            for name in metrics
        ]
        values = (row.params[heading].value if heading in row.params else "-" for heading in headings)
        table.add_row(Text(row.name), *cells, *(Text(printable(value.strip('"'))) for value in values))
    return table


def metric_cell(value: float | None, best: float | None, marked: bool) -> Text:
    if value is None:
        return Text("- ")
    if marked and value == best:
        return Text(f"{value:.4f}*", style="bold")
    return Text(f"{value:.4f} ")


def break_heading(heading: str) -> str:
    """A heading over several lines, broken behind dots, colons and underscores."""
    lines = [""]
    for word in heading.replace(": ", ":\0").replace(".", ".\0").replace("_", "_\1").split("\0"):
        lines.append("")
        for part in word.split("\1"):
            if len(lines[-1]) + len(part) > HEADING_WIDTH and lines[-1]:
                lines.append("")
            lines[-1] += part
    return "\n".join(line for line in lines if line)


def differing_params(rows: list[Row]) -> list[str]:
    """Headings of the parameters that do not have the same value in all rows."""
    headings = dict.fromkeys(heading for row in rows for heading in row.params)
    return [
        name for name in headings if len({row.params[name].value if name in row.params else None for row in rows}) > 1
    ]


def argument_of(rows: list[Row], heading: str) -> str:
    return next(row.params[heading].argument for row in rows if heading in row.params)


def list_params(rows: list[Row], headings: list[str]) -> list[str]:
    """A line for each row: its values of the parameters of `headings`."""
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


def summarize_seeds(rows: list[Row]) -> Iterator[str]:
    """For each group of experiments that differ in `seed` only: mean and standard deviation of each metric."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        others = {heading: param.value for heading, param in row.params.items() if heading != "seed"}
        groups[json.dumps(others, sort_keys=True)].append(row)
    for members in groups.values():
        # One row for each seed: the same experiment may have several names.
        seeds = {row.params["seed"].value: row for row in members if "seed" in row.params}
        if len(seeds) > 1:
            yield f"  {', '.join(row.name for row in seeds.values())} (seeds {', '.join(seeds)})"
            for name in next(iter(seeds.values())).metrics:
                values = [row.metrics[name] for row in seeds.values() if name in row.metrics]
                if len(values) == len(seeds):
                    yield f"    {name}: {statistics.mean(values):.4f} +- {statistics.stdev(values):.4f}"


if __name__ == "__main__":
    main()
