"""Compare experiments by a group of documents, as `python -m tools.compare --by GROUP` does: a table for each task."""

import bisect
import sys
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

from dvc.repo import Repo
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from stages.core.errors import printable
from stages.figures.names import SHORT_NAMES
from tools.compare import HEADING_WIDTH, full_split, is_unfinished, metric_cell, name_of, read_rows, width_of
from tools.outs import Outs
from tools.report_data import all_metrics, metrics_file, metrics_of


class ByGroup(NamedTuple):
    """The figures of a task by the values of a group."""

    task: str
    metric: str
    """Its full name."""
    rows: list[tuple[str, dict[str, float]]]
    """Name of an experiment, and its figure of each value."""
    values: list[str]
    """Those with the most bytes first."""


def compare_groups(found: list[dict[str, Any]], group: str, split: str, console: Console) -> None:
    """Print the tables of all tasks; exit with an error if no experiment has figures by `group`."""
    with Repo() as repo:
        tasks, without = read_groups(found, split, Outs(repo))
    if not tasks:
        sys.exit("compare: no figures by group: run `make`, or `dvc pull` if reports/evaluate was pushed")
    known = dict.fromkeys(name for rows in tasks.values() for _, groups in rows for name in groups)
    if group not in known:
        names = printable(", ".join(known))
        sys.exit(f"compare: --by {printable(group)}: no experiment has figures by this group; there are {names}")
    for task, rows in tasks.items():
        if any(group in groups for _, groups in rows):
            draw_groups(arrange(task, [(name, groups.get(group, {})) for name, groups in rows]), group, split, console)
    if without:
        print(f"\nNot shown, since their figures by group are in no cache (or there are none): {', '.join(without)}")


def read_groups(
    found: list[dict[str, Any]], split: str, outs: Outs
) -> tuple[dict[str, list[tuple[str, dict[str, Any]]]], list[str]]:
    """Task to names of experiments with their figures of a split by group; and the names of those that have none."""
    shown = {row.name for row in read_rows(found, split)}
    full = full_split(split)
    tasks, without = defaultdict(list), []
    for revision in found:
        name, files = name_of(revision), (revision.get("data") or {}).get("metrics") or {}
        if name not in shown or is_unfinished(revision):
            continue
        paths = [metrics_file(task) for task, _ in metrics_of(files)]
        metrics = all_metrics(files, dict(zip(paths, outs.read_texts(revision["rev"], paths), strict=True)))
        groups = {task: splits[full]["groups"] for task, splits in metrics if "groups" in splits.get(full, {})}
        for task, by_group in groups.items():
            tasks[task].append((name, by_group))
        without += [] if groups else [name]
    return tasks, without


def arrange(task: str, rows: list[tuple[str, dict[str, Any]]]) -> ByGroup:
    """The table of a task; `rows` have the figures of each value of the group."""
    sizes: dict[str, int] = {}
    for _, values in rows:
        for value, figures in values.items():
            sizes[value] = max(sizes.get(value, 0), figures["bytes"])
    metric = next(
        (name for _, values in rows for figures in values.values() for name in figures if name in SHORT_NAMES), ""
    )
    found = [
        (name, {value: figures[metric] for value, figures in values.items() if metric in figures})
        for name, values in rows
    ]
    return ByGroup(task, metric, found, sorted(sizes, key=lambda value: -sizes[value]))


def draw_groups(by_group: ByGroup, group: str, split: str, console: Console) -> None:
    """Print a table with as many values as fit into the console's width, and the others below it, a line each."""
    print(f"{by_group.task}: {by_group.metric} by {printable(group)} ({split})")

    def width(num_values: int) -> int:
        return width_of(group_table(by_group, num_values), console)

    num_values = max(1, bisect.bisect_right(range(1, len(by_group.values) + 1), console.width, key=width))
    table = group_table(by_group, num_values)
    Console(highlight=False, width=max(console.width, width(num_values))).print(table)
    if len(by_group.rows) > 1:
        print("* the best of its column; less is better")
    if num_values < len(by_group.values):
        print("\nFurther values, those with the most text first:", *list_values(by_group, num_values), sep="\n")
    print()


def group_table(by_group: ByGroup, num_values: int) -> Table:
    """A row for each experiment, a column for each of the first `num_values` values."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("experiment", no_wrap=True)
    values = by_group.values[:num_values]
    for value in values:
        heading = "\n".join(textwrap.wrap(printable(value), HEADING_WIDTH))
        table.add_column(Text(heading), no_wrap=True, justify="right")
    for name, figures in by_group.rows:
        table.add_row(Text(name), *(cell(by_group, value, figures) for value in values))
    return table


def cell(by_group: ByGroup, value: str, figures: dict[str, float]) -> Text:
    best = min((others[value] for _, others in by_group.rows if value in others), default=0.0)
    return metric_cell(figures.get(value), best, len(by_group.rows) > 1)


def list_values(by_group: ByGroup, start: int) -> Iterator[str]:
    """A line for each value from number `start` on: the figure of each experiment."""
    values = by_group.values[start:]
    width = min(max(len(printable(value)) for value in values), 40)
    for value in values:
        figures = (f"{name} {cell(by_group, value, found).plain.strip()}" for name, found in by_group.rows)
        yield f"  {printable(value):{width}}  {', '.join(figures)}"
