"""The report's comparisons: which experiments are better, in pairs of documents, and what moved most."""

import html
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from stages.core.errors import StageError, printable, without_controls
from tools.compare import full_split, read_rows, revisions
from tools.compare_pairs import Line, compare_rows, describe_table, describe_verdicts, judge_all
from tools.moved import Excerpt, Moved, MovedDocument, MovedGroup, Segment, find_moved
from tools.outs import Outs
from tools.report_parts import Cell, Figure, GroupTable, axis, number_cell, shortened

SPLIT = "val"
"""One chooses among experiments by validation."""
_COLORS = {"better": "--better", "worse": "--worse"}
_LEVELS = (0.25, 0.5, 1.0, 2.0)  # bits from which on a piece of text is colored, the more the stronger


class Compared(NamedTuple):
    """A comparison, what it came to, and what moved most in it."""

    line: Line
    verdict: str
    to_decide: str
    moved: Moved | None
    """None where there is no difference."""


class ComparedTask(NamedTuple):
    task: str
    caption: str
    notes: list[str]
    lines: list[Compared]


def read_compared(shown: list[dict[str, Any]], outs: Outs) -> list[ComparedTask]:
    """How the experiments of `dvc exp show --json` compare with the last commit, for each task that several have."""
    found = list(revisions(shown))
    rows, full = read_rows(found, SPLIT), full_split(SPLIT)
    if len(rows) < 2:
        return []
    try:
        comparison = compare_rows(rows, found, SPLIT, None, outs)
    except StageError:  # no run has figures of its own
        return []
    tasks = []
    for task, lines in comparison.lines.items():
        if lines:
            compared = [
                Compared(line, *verdict, None if line.difference is None else find_moved(line, task, full, outs))
                for line, verdict in zip(lines, judge_all(lines), strict=True)
            ]
            caption = describe_table(task, lines, comparison.baseline, full)
            tasks.append(ComparedTask(task, caption, list(describe_verdicts(lines)), compared))
    return tasks


def plot_points(task: ComparedTask) -> list[dict[str, Any]]:
    """A point for each difference of a task, for the template of .dvc/plots/difference.json."""
    points = []
    for line, verdict, _, _ in task.lines:
        if line.difference is not None:
            # An interval of a single document has no ends, for which JSON has no number.
            low, high = (bound if math.isfinite(bound) else None for bound in line.difference.interval)
            points.append(
                {
                    "experiment": _name_of(line),
                    "difference": line.difference.value,
                    "low": low,
                    "high": high,
                    "documents_better": line.difference.share_better,
                    "verdict": verdict,
                }
            )
    return points


# -- parts of the page -------------------------------------------------------------------------------------------------


class MovedParts(NamedTuple):
    """What moved most in a comparison, as the page shows it."""

    name: str
    groups: list[GroupTable]
    documents: list[tuple[str, list[tuple[str, str, str]]]]
    """A sentence on each document, and its excerpt: pieces of text, each with a class of report_page.css and a hint."""


class ComparedParts(NamedTuple):
    """A task's comparisons, as the page shows them."""

    task: str
    notes: list[str]
    table: GroupTable
    figure: Figure | None
    moved: list[MovedParts]


def compared_parts(compared: ComparedTask) -> ComparedParts:
    differing = [found for found in compared.lines if found.line.difference is not None]
    return ComparedParts(
        compared.task,
        compared.notes,
        _table_of(compared),
        _figure_of(compared, differing) if differing else None,
        [_moved_parts(found, found.moved) for found in differing if found.moved is not None and any(found.moved)],
    )


def _name_of(line: Line) -> str:
    return ", ".join(line.names) + (" (another seed)" if line.is_seed else "")


def _table_of(compared: ComparedTask) -> GroupTable:
    rows = []
    for line, verdict, to_decide, _ in compared.lines:
        difference = line.difference
        if difference is None:
            cells = [Cell("", "")] * 4 + [Cell(printable(line.reason), json.dumps(verdict)), Cell("", "")]
        else:
            cells = [
                _signed_cell(difference.value),
                Cell(" to ".join(f"{bound:+.4f}" for bound in difference.interval), ""),
                Cell(f"{difference.share_better:.0%}", json.dumps(difference.share_better)),
                Cell(" and ".join(map(str, difference.num_seeds)), json.dumps(sum(difference.num_seeds))),
                Cell(verdict, json.dumps(verdict)),
                Cell(to_decide, ""),
            ]
        rows.append((_name_of(line), cells))
    headings = ["difference", "95 % interval", "documents better", "seeds", "verdict", "to decide: more"]
    return GroupTable(compared.caption, True, "experiment", (), headings, rows)


def _signed_cell(number: float) -> Cell:
    return Cell(f"{number:+.4f}", json.dumps(number))


def _figure_of(compared: ComparedTask, differing: Sequence[Compared]) -> Figure:
    """Each difference with its interval, and a line at none."""
    differences = [found.line.difference for found in differing if found.line.difference is not None]
    names = [_name_of(found.line) for found in differing]
    # An interval of a single document has no ends.
    reach = [[abs(bound - of.value) for of in differences for bound in [of.interval[end]]] for end in (0, 1)]
    low, high = ([bound if math.isfinite(bound) else 0 for bound in bounds] for bounds in reach)
    colors = [_COLORS.get(found.verdict, "--muted") for found in differing]
    # A trace each, since error bars take one color a trace.
    traces = [
        {
            "x": [differences[number].value],
            "y": [number],
            "error_x": {
                "array": [high[number]],
                "arrayminus": [low[number]],
                "symmetric": False,
                "color": colors[number],
            },
            "mode": "markers",
            "marker": {"size": 9, "color": colors[number]},
            "hovertemplate": f"%{{x:+.4f}}: {html.escape(found.verdict)}<extra>{html.escape(names[number])}</extra>",
        }
        for number, found in enumerate(differing)
    ]
    layout = {
        "xaxis": {**axis("bits per byte more than the baseline"), "zerolinecolor": "--ink", "rangemode": "tozero"},
        "yaxis": {
            "automargin": True,
            "showgrid": False,
            "zeroline": False,
            "tickvals": list(range(len(names))),
            "ticktext": [html.escape(shortened(name, 24)) for name in names],
            "range": [len(names) - 0.5, -0.5],
        },
        "dragmode": False,
        "showlegend": False,
        "margin": {"l": 8, "r": 16, "t": 8, "b": 40},
    }
    said = "; ".join(
        f"{name} {difference.value:+.4f}, {found.verdict}"
        for name, difference, found in zip(names, differences, differing, strict=True)
    )
    spec = {"data": traces, "layout": layout, "config": {"displayModeBar": False}}
    return Figure(compared.caption, spec, f"{compared.caption}, with 95 % intervals: {said}.", 72 + 40 * len(names))


def _moved_parts(compared: Compared, moved: Moved) -> MovedParts:
    documents = [_document_parts(document) for document in [*moved.better, *moved.worse]]
    name = _name_of(compared.line)
    return MovedParts(name, [_group_table(name, moved.groups)] if moved.groups else [], documents)


def _group_table(name: str, groups: Sequence[MovedGroup]) -> GroupTable:
    rows = [
        (
            printable(f"{moved.group}: {moved.value}"),
            [
                number_cell(moved.difference.num_documents),
                _signed_cell(moved.difference.value),
                Cell(" to ".join(f"{bound:+.4f}" for bound in moved.difference.interval), ""),
                Cell(f"{moved.bits:+,.1f}", json.dumps(moved.bits)),
            ],
        )
        for moved in groups
    ]
    headings = ["difference", "95 % interval", "bits in all"]
    return GroupTable(f"{name}: groups that moved most", True, "group", ("documents",), headings, rows)


def _document_parts(document: MovedDocument) -> tuple[str, list[tuple[str, str, str]]]:
    change = f"{abs(document.bits):,.1f} bits {'fewer' if document.bits < 0 else 'more'}"
    share = f"{document.bits / document.num_bytes:+.4f} a byte"
    known = [printable(known) for known in (document.q_id, document.source) if known]
    where = f"Record {document.record:,} ({', '.join(known)}, {document.num_bytes:,} bytes)"
    return f"{where}: {change} ({share})", list(_pieces_of(document.excerpt)) if document.excerpt else []


def _pieces_of(excerpt: Excerpt) -> Iterator[tuple[str, str, str]]:
    """Text, class and hint of the pieces of an excerpt; those that changed little are one piece."""
    if excerpt.begins_late:
        yield "… ", "", ""
    plain = ""
    for segment in excerpt.segments:
        level = _level_of(segment)
        text = without_controls(segment.text)
        if not level:
            plain += text
            continue
        if plain:
            yield plain, "", ""
        plain = ""
        yield text, level, f"{segment.bits:+.2f} bits"
    if plain or excerpt.ends_early:
        yield plain + (" …" if excerpt.ends_early else ""), "", ""


def _level_of(segment: Segment) -> str:
    """The class of report_page.css by which a piece of text is colored; empty for one that changed little."""
    level = sum(abs(segment.bits) >= least for least in _LEVELS)
    return f"{'better' if segment.bits < 0 else 'worse'}-{level}" if level else ""
