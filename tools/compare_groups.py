"""Compare experiments by a group of documents (`python -m tools.compare --by GROUP`), with one table per task."""

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
from tools.compare import (
    HEADING_WIDTH,
    format_metric,
    get_full_split,
    get_revision_name,
    is_unfinished,
    measure_width,
    read_rows,
)
from tools.outs import Outs
from tools.report_data import get_metrics_path, list_task_metrics, read_all_metrics


class GroupFigures(NamedTuple):
    """Metrics of a task by the values of a group, for several experiments."""

    task: str
    metric: str
    """Full name of the metric."""
    rows: list[tuple[str, dict[str, float]]]
    """Name of each experiment, with its metric by value of the group."""
    values: list[str]
    """Values of the group, the one with the most bytes first."""


def compare_groups(found: list[dict[str, Any]], group: str, split: str, console: Console) -> None:
    """Print one table per task; exit with an error if no experiment has metrics by `group`."""
    with Repo() as repo:
        tasks, without = read_group_figures(found, split, Outs(repo))
    if not tasks:
        sys.exit("compare: no metrics by group: run `make`, or `dvc pull` if reports/evaluate was pushed")
    known = dict.fromkeys(name for rows in tasks.values() for _, groups in rows for name in groups)
    if group not in known:
        names = printable(", ".join(known))
        sys.exit(f"compare: --by {printable(group)}: no experiment has metrics by this group; there are {names}")
    for task, rows in tasks.items():
        if any(group in groups for _, groups in rows):
            print_group_table(
                collect_group_figures(task, [(name, groups.get(group, {})) for name, groups in rows]),
                group,
                split,
                console,
            )
    if without:
        print(f"\nNot shown because no metrics by group were found in the cache: {', '.join(without)}")


def read_group_figures(
    found: list[dict[str, Any]], split: str, outs: Outs
) -> tuple[dict[str, list[tuple[str, dict[str, Any]]]], list[str]]:
    """Read the metrics of a split by group.

    Returns:
        Task to a list of experiment name and its metrics, by group and value; and the names of experiments that have no
        metrics by group.
    """
    shown = {row.name for row in read_rows(found, split)}
    full = get_full_split(split)
    tasks, without = defaultdict(list), []
    for revision in found:
        name, files = get_revision_name(revision), (revision.get("data") or {}).get("metrics") or {}
        if name not in shown or is_unfinished(revision):
            continue
        paths = [get_metrics_path(task) for task, _ in list_task_metrics(files)]
        metrics = read_all_metrics(files, dict(zip(paths, outs.read_texts(revision["rev"], paths), strict=True)))
        groups = {task: splits[full]["groups"] for task, splits in metrics if "groups" in splits.get(full, {})}
        for task, by_group in groups.items():
            tasks[task].append((name, by_group))
        without += [] if groups else [name]
    return tasks, without


def collect_group_figures(task: str, rows: list[tuple[str, dict[str, Any]]]) -> GroupFigures:
    """Collect the first headline metric of each experiment and value.

    Args:
        rows: name of each experiment, with all its figures by value of the group.
    """
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
    return GroupFigures(task, metric, found, sorted(sizes, key=lambda value: -sizes[value]))


def print_group_table(by_group: GroupFigures, group: str, split: str, console: Console) -> None:
    """Print a table of as many values as fit into the console's width, then one line per remaining value."""
    print(f"{by_group.task}: {by_group.metric} by {printable(group)} ({split})")

    def measure_table(num_values: int) -> int:
        return measure_width(make_group_table(by_group, num_values), console)

    num_values = max(1, bisect.bisect_right(range(1, len(by_group.values) + 1), console.width, key=measure_table))
    table = make_group_table(by_group, num_values)
    Console(highlight=False, width=max(console.width, measure_table(num_values))).print(table)
    if len(by_group.rows) > 1:
        print("* best of its column; lower is better")
    if num_values < len(by_group.values):
        print(
            "\nOther values, most text first:",
            *format_remaining_values(by_group, num_values),
            sep="\n",
        )
    print()


def make_group_table(by_group: GroupFigures, num_values: int) -> Table:
    """Return a table with one row per experiment and one column for each of the first `num_values` values."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("experiment", no_wrap=True)
    values = by_group.values[:num_values]
    for value in values:
        heading = "\n".join(textwrap.wrap(printable(value), HEADING_WIDTH))
        table.add_column(Text(heading), no_wrap=True, justify="right")
    for name, figures in by_group.rows:
        table.add_row(Text(name), *(format_group_cell(by_group, value, figures) for value in values))
    return table


def format_group_cell(by_group: GroupFigures, value: str, figures: dict[str, float]) -> Text:
    best = min((others[value] for _, others in by_group.rows if value in others), default=0.0)
    return format_metric(figures.get(value), best, len(by_group.rows) > 1)


def format_remaining_values(by_group: GroupFigures, start: int) -> Iterator[str]:
    """Yield one line of text per value from index `start` on, with the metric of each experiment."""
    values = by_group.values[start:]
    width = min(max(len(printable(value)) for value in values), 40)
    for value in values:
        figures = (f"{name} {format_group_cell(by_group, value, found).plain.strip()}" for name, found in by_group.rows)
        yield f"  {printable(value):{width}}  {', '.join(figures)}"
