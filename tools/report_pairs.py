"""Comparisons in the report: which experiments are better on the same documents, and the largest changes."""

import html
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from stages.core.errors import StageError, escape_controls, printable
from tools.compare import get_full_split, list_revisions, read_rows
from tools.compare_pairs import (
    BaselineComparison,
    compare_rows,
    explain_verdicts,
    format_table_title,
    judge_comparisons,
)
from tools.moved import Excerpt, Moved, MovedDocument, MovedGroup, Segment, find_moved
from tools.outs import Outs
from tools.report_parts import Cell, Figure, GroupTable, build_axis, build_number_cell, shorten_name

SPLIT = "val"
"""The validation split, by which to choose among experiments."""
_COLORS = {"better": "--better", "worse": "--worse"}
_LEVELS = (0.25, 0.5, 1.0, 2.0)  # bits; lower bounds of the color levels of a piece of text, from faint to strong


class Compared(NamedTuple):
    """Comparison with its verdict and its largest changes."""

    comparison: BaselineComparison
    verdict: str
    to_decide: str
    moved: Moved | None
    """None if there is no difference."""


class ComparedTask(NamedTuple):
    task: str
    caption: str
    notes: list[str]
    comparisons: list[Compared]


def read_comparisons(exp_show: list[dict[str, Any]], outs: Outs) -> list[ComparedTask]:
    """Compare the experiments of `dvc exp show --json` with the last commit, for each task that several have."""
    found = list(list_revisions(exp_show))
    rows, full = read_rows(found, SPLIT), get_full_split(SPLIT)
    if len(rows) < 2:
        return []
    try:
        result = compare_rows(rows, found, SPLIT, None, outs)
    except StageError:  # no run has metrics of its own
        return []
    tasks = []
    for task, comparisons in result.comparisons.items():
        if comparisons:
            compared = [
                Compared(
                    comparison,
                    *verdict,
                    None if comparison.difference is None else find_moved(comparison, task, full, outs),
                )
                for comparison, verdict in zip(comparisons, judge_comparisons(comparisons), strict=True)
            ]
            caption = format_table_title(task, comparisons, result.baseline_name, full)
            tasks.append(ComparedTask(task, caption, list(explain_verdicts(comparisons)), compared))
    return tasks


def build_plot_points(task: ComparedTask) -> list[dict[str, Any]]:
    """Build one point per difference of a task, for the template .dvc/plots/difference.json."""
    points = []
    for comparison, verdict, _, _ in task.comparisons:
        if comparison.difference is not None:
            # The interval of a single document is infinite, which JSON cannot represent.
            low, high = (bound if math.isfinite(bound) else None for bound in comparison.difference.interval)
            points.append(
                {
                    "experiment": _format_name(comparison),
                    "difference": comparison.difference.value,
                    "low": low,
                    "high": high,
                    "documents_better": comparison.difference.share_better,
                    "verdict": verdict,
                }
            )
    return points


# -- parts of the page -------------------------------------------------------------------------------------------------


class MovedParts(NamedTuple):
    """Largest changes of a comparison, as parts of the page."""

    name: str
    groups: list[GroupTable]
    documents: list[tuple[str, list[tuple[str, str, str]]]]
    """A sentence about each document, and its excerpt as (text, class of report_page.css, tooltip) pieces."""


class ComparedParts(NamedTuple):
    """Comparisons of a task, as parts of the page."""

    task: str
    notes: list[str]
    table: GroupTable
    figure: Figure | None
    moved: list[MovedParts]


def build_compared_parts(compared: ComparedTask) -> ComparedParts:
    differing = [found for found in compared.comparisons if found.comparison.difference is not None]
    return ComparedParts(
        compared.task,
        compared.notes,
        _build_table(compared),
        _build_figure(compared, differing) if differing else None,
        [_build_moved_parts(found, found.moved) for found in differing if found.moved is not None and any(found.moved)],
    )


def _format_name(comparison: BaselineComparison) -> str:
    return ", ".join(comparison.names) + (" (another seed)" if comparison.is_seed_only else "")


def _build_table(compared: ComparedTask) -> GroupTable:
    rows = []
    for comparison, verdict, to_decide, _ in compared.comparisons:
        difference = comparison.difference
        if difference is None:
            cells = [Cell("", "")] * 4 + [Cell(printable(comparison.reason), json.dumps(verdict)), Cell("", "")]
        else:
            cells = [
                _build_signed_cell(difference.value),
                Cell(" to ".join(f"{bound:+.4f}" for bound in difference.interval), ""),
                Cell(f"{difference.share_better:.0%}", json.dumps(difference.share_better)),
                Cell(" and ".join(map(str, difference.num_seeds)), json.dumps(sum(difference.num_seeds))),
                Cell(verdict, json.dumps(verdict)),
                Cell(to_decide, ""),
            ]
        rows.append((_format_name(comparison), cells))
    headings = ["difference", "95 % interval", "documents better", "seeds", "verdict", "to decide: more"]
    return GroupTable(compared.caption, True, "experiment", (), headings, rows)


def _build_signed_cell(number: float) -> Cell:
    return Cell(f"{number:+.4f}", json.dumps(number))


def _build_figure(compared: ComparedTask, differing: Sequence[Compared]) -> Figure:
    """Build the figure of the differences with their intervals and a line at zero."""
    differences = [found.comparison.difference for found in differing if found.comparison.difference is not None]
    names = [_format_name(found.comparison) for found in differing]
    # The interval of a single document is infinite and gets no error bar.
    reach = [
        [abs(bound - difference.value) for difference in differences for bound in [difference.interval[end]]]
        for end in (0, 1)
    ]
    low, high = ([bound if math.isfinite(bound) else 0 for bound in bounds] for bounds in reach)
    colors = [_COLORS.get(found.verdict, "--muted") for found in differing]
    # One trace per difference, because error bars have one color per trace.
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
        "xaxis": {
            **build_axis("bits per byte more than the baseline"),
            "zerolinecolor": "--ink",
            "rangemode": "tozero",
        },
        "yaxis": {
            "automargin": True,
            "showgrid": False,
            "zeroline": False,
            "tickvals": list(range(len(names))),
            "ticktext": [html.escape(shorten_name(name, 24)) for name in names],
            "range": [len(names) - 0.5, -0.5],
        },
        "dragmode": False,
        "showlegend": False,
        "margin": {"l": 8, "r": 16, "t": 8, "b": 40},
    }
    summary = "; ".join(
        f"{name} {difference.value:+.4f}, {found.verdict}"
        for name, difference, found in zip(names, differences, differing, strict=True)
    )
    spec = {"data": traces, "layout": layout, "config": {"displayModeBar": False}}
    return Figure(compared.caption, spec, f"{compared.caption}, with 95 % intervals: {summary}.", 72 + 40 * len(names))


def _build_moved_parts(compared: Compared, moved: Moved) -> MovedParts:
    documents = [_build_document_parts(document) for document in [*moved.better, *moved.worse]]
    name = _format_name(compared.comparison)
    return MovedParts(name, [_build_group_table(name, moved.groups)] if moved.groups else [], documents)


def _build_group_table(name: str, groups: Sequence[MovedGroup]) -> GroupTable:
    rows = [
        (
            printable(f"{moved.group}: {moved.value}"),
            [
                build_number_cell(moved.difference.num_documents),
                _build_signed_cell(moved.difference.value),
                Cell(" to ".join(f"{bound:+.4f}" for bound in moved.difference.interval), ""),
                Cell(f"{moved.bits:+,.1f}", json.dumps(moved.bits)),
            ],
        )
        for moved in groups
    ]
    headings = ["difference", "95 % interval", "bits in all"]
    return GroupTable(f"{name}: groups with the largest changes", True, "group", ("documents",), headings, rows)


def _build_document_parts(document: MovedDocument) -> tuple[str, list[tuple[str, str, str]]]:
    change = f"{abs(document.bits):,.1f} bits {'fewer' if document.bits < 0 else 'more'}"
    share = f"{document.bits / document.num_bytes:+.4f} per byte"
    known = [printable(known) for known in (document.q_id, document.source) if known]
    where = f"Record {document.record:,} ({', '.join(known)}, {document.num_bytes:,} bytes)"
    return f"{where}: {change} ({share})", list(_split_excerpt(document.excerpt)) if document.excerpt else []


def _split_excerpt(excerpt: Excerpt) -> Iterator[tuple[str, str, str]]:
    """Yield text, class and tooltip of each piece of an excerpt, joining pieces that changed little."""
    if excerpt.begins_late:
        yield "… ", "", ""
    plain = ""
    for segment in excerpt.segments:
        level = _choose_level(segment)
        text = escape_controls(segment.text)
        if not level:
            plain += text
            continue
        if plain:
            yield plain, "", ""
        plain = ""
        yield text, level, f"{segment.bits:+.2f} bits"
    if plain or excerpt.ends_early:
        yield plain + (" …" if excerpt.ends_early else ""), "", ""


def _choose_level(segment: Segment) -> str:
    """Return the class of report_page.css that colors a piece of text; empty if it changed little."""
    level = sum(abs(segment.bits) >= least for least in _LEVELS)
    return f"{'better' if segment.bits < 0 else 'worse'}-{level}" if level else ""
