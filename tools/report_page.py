"""The report as one HTML page: tables, figures for plotly, samples and flows. It asks no network for anything.

What experiments and models are called and what they say is text that anyone may have written: the template escapes all
of it, plotly's labels are escaped as it reads them, samples are Markdown without links, pictures or HTML, and the
page's own policy refuses every script but the two it brings and every request.
"""

import base64
import hashlib
import html
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from stages.core.errors import printable
from stages.score.accuracy import SCORES
from tools.report_data import Run, alike, curve, curve_file, flow, samples_file, score_file, tasks
from tools.report_pairs import ComparedTask, compared_parts
from tools.report_parts import Cell, Figure, GroupTable, axis, number_cell, shortened, shown

HERE = Path(__file__).parent
NUM_COLORS = 8  # of report_page.css
MARKDOWN = MarkdownIt("zero").enable(["blockquote", "table", "emphasis", "backticks", "escape", "newline"])
COUNTS = ("documents", "bytes")
COMPARES = {
    "bits_per_byte": "Bits per UTF-8 byte of text, less is better. It compares between all rows that were evaluated on"
    " the same documents, whatever their block_size and tokenizer.",
    "pseudo_bits_per_byte": "Bits per UTF-8 byte of text, less is better. It compares between rows with the same"
    " tokenizer, and never with bits_per_byte.",
}


class Column(NamedTuple):
    key: str
    group: str
    label: str
    extra: bool
    """Whether it is hidden at first."""


def render(
    runs: list[Run], compared: Sequence[ComparedTask] = (), live: Mapping[str, Run] = MappingProxyType({})
) -> str:
    """The page.

    Args:
        compared: how the runs compare, by task; none where there is nothing to compare.
        live: task to a training whose curves are shown with the others'.
    """
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    scripts = [get_plotlyjs(), (HERE / "report_page.js").read_text(encoding="utf-8")]
    named = tasks([run.metrics for run in runs])
    params, columns = differing_params(runs), metric_columns(runs)
    twin = workspace_twin(runs)
    drawn = [run for run in runs if twin is None or run.kind != "workspace"]
    return environment.get_template("report_page.html").render(
        style=Markup((HERE / "report_page.css").read_text(encoding="utf-8")),
        scripts=[Markup(script) for script in scripts],
        policy=" ".join(f"'sha256-{digest(script)}'" for script in scripts),
        runs=runs,
        twin=twin,
        params=[split_name(param) for param in params],
        columns=columns,
        rows=[(run, [cell(run, key) for key in [*params, *(column.key for column in columns)]]) for run in runs],
        curves={
            task: curves_of(task, [*drawn, live[task]] if task in live else drawn)
            for task in dict.fromkeys([*named, *live])
        },
        bars=[(bars_of(key, drawn), COMPARES[key.rpartition(".")[2]]) for key in chosen_metrics(columns)],
        pairs=[compared_parts(task) for task in compared],
        groups={task: tables for task in named if (tables := group_tables(task, drawn))},
        scores={task: tables for task in named if (tables := score_tables(task, drawn))},
        samples={task: samples_of(task, drawn) for task in named},
        flows={task: flow(task, drawn) for task in named},
        label=label,
    )


def differing_params(runs: list[Run]) -> list[str]:
    """The params whose values are not the same in all runs."""
    params = [run.params for run in runs if run.params]
    keys = dict.fromkeys(key for values in params for key in values)
    return [key for key in keys if len({values.get(key) for values in params}) > 1]


def digest(script: str) -> str:
    """By which a content security policy knows a script."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def workspace_twin(runs: list[Run]) -> str | None:
    """The commit or experiment that the workspace is as, so that figures need not show it twice."""
    workspace = next((run for run in runs if run.kind == "workspace"), None)
    if workspace is None:
        return None
    holds = (workspace.params, workspace.metrics, workspace.files)
    others = (run for run in runs if run is not workspace)
    return next((run.name for run in others if (run.params, run.metrics, run.files) == holds), None)


def split_name(param: str) -> tuple[str, str]:
    """The file of a param, empty for params.yaml, and its key there."""
    file, colon, key = param.partition(":")
    return (file, key) if colon else ("", param)


def metric_columns(runs: list[Run]) -> list[Column]:
    """The figures that compare, validation first; then all others, hidden until they are asked for."""
    keys = list(dict.fromkeys(key for run in runs for key in run.metrics))

    def column(key: str) -> Column:
        group, _, name = key.rpartition(".")
        return Column(key, group.replace(".", " "), name, name not in COMPARES)

    def order(column: Column) -> tuple[bool, bool]:
        return column.extra, not column.group.endswith("validation")

    return sorted(map(column, keys), key=order)


def chosen_metrics(columns: list[Column]) -> list[str]:
    """One chooses among experiments by these."""
    return [column.key for column in columns if not column.extra and column.group.endswith("validation")]


def cell(run: Run, key: str) -> Cell:
    """A param, or a metric with the digits that one compares by."""
    if key in run.params:
        value = json.loads(run.params[key])
        return Cell(value if isinstance(value, str) else run.params[key], run.params[key])
    if key in run.metrics:
        return number_cell(run.metrics[key])
    return Cell("", "")


def label(members: list[Run]) -> str:
    return ", ".join(run.name for run in members)


def color(run: Run, runs: list[Run]) -> str:
    """The same for a run in every figure."""
    return f"--series-{runs.index(run) % NUM_COLORS}"


class Curves(NamedTuple):
    figure: Figure
    rows: list[tuple[str, str, str, str]]
    """Runs, steps, last training loss, lowest validation loss with its step."""


def curves_of(task: str, runs: list[Run]) -> Curves | None:
    """Training and validation loss of all runs of a task; None where there are no curves. Runs alike share a line."""
    traces, rows = [], []
    for members, texts in alike(runs, [curve_file(task, split) for split in ("train", "validation")]):
        name = label(members)
        training, validation = (curve(text) if text else [] for text in texts)
        kinds = (
            ("training", training, "lines", {"width": 1.5}),
            ("validation", validation, "lines+markers", {"dash": "dot"}),
        )
        for kind, points, mode, line in kinds:
            traces.append(
                {
                    "name": html.escape(shortened(name, 48)),
                    "legendgroup": name,
                    "showlegend": kind == "training",
                    "x": [step for step, _ in points],
                    "y": [loss for _, loss in points],
                    "mode": mode,
                    "line": {**line, "color": color(members[0], runs)},
                    "marker": {"size": 8},
                    "hovertemplate": f"%{{y:.4f}} at step %{{x}}<extra>{html.escape(name)}, {kind}</extra>",
                }
            )
        step, lowest = min(validation, key=lambda point: point[1], default=(0, None))
        rows.append(
            (
                name,
                str(max((step for step, _ in [*training, *validation]), default="")),
                shown(training[-1][1]) if training else "",
                f"{shown(lowest)} at step {step}" if lowest is not None else "",
            )
        )
    if not rows:
        return None
    axes = {"xaxis": axis("step"), "yaxis": axis("loss (nats per predicted token)")}
    layout = {
        **axes,
        "legend": {"orientation": "h", "x": 0, "yref": "container", "y": 0, "yanchor": "bottom"},
        "margin": {"l": 56, "r": 8, "t": 32, "b": 40},
    }
    ends = "; ".join(f"{name}: {lowest or 'no validation loss'}" for name, _, _, lowest in rows)
    alt = f"Training and validation loss of {task} by step, a line for each run. Lowest validation loss of {ends}."
    # Named one by one: left to itself, plotly also offers to upload the figure to its makers.
    buttons = [["zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d", "toImage"]]
    config = {"modeBarButtons": buttons, "toImageButtonOptions": {"filename": f"loss-{task}"}}
    return Curves(Figure(f"Loss of {task}", {"data": traces, "layout": layout, "config": config}, alt, 420), rows)


def bars_of(key: str, runs: list[Run]) -> Figure:
    """A metric of all runs that have it, beside the same of the model before training."""
    group, _, name = key.rpartition(".")
    found = [run for run in runs if key in run.metrics]
    base = f"{group}.base_{name}"
    # Category names need not be unique, nor short: bars stand at positions, which names label.
    places = list(range(len(found)))
    after = {
        "name": "after training",
        "x": [run.metrics[key] for run in found],
        "error_x": {
            "array": [run.metrics.get(f"{key}_se", 0) for run in found],
            "color": "--ink",
            "thickness": 1,
            "width": 3,
        },
        "marker": {"color": [color(run, runs) for run in found]},
        "insidetextfont": {"color": "--paper"},
    }
    before = {
        "name": "before training",
        "x": [run.metrics.get(base) for run in found],
        "marker": {"color": "--base"},
        "insidetextfont": {"color": "--ink"},
    }
    common = {"type": "bar", "orientation": "h", "y": places, "texttemplate": "%{x:.4f}", "insidetextanchor": "start"}
    common |= {"textposition": "inside", "hovertemplate": "%{x:.4f}<extra>%{fullData.name}</extra>"}
    names = {
        "tickvals": places,
        "ticktext": [html.escape(shortened(run.name, 24)) for run in found],
        "autorange": "reversed",
    }
    layout = {
        "xaxis": axis("bits per byte", rangemode="tozero"),
        "yaxis": {
            "automargin": True,
            "showgrid": False,
            "ticks": "outside",
            "ticklen": 6,
            "tickcolor": "--paper",
            **names,
        },
        "bargap": 0.25,
        "dragmode": False,
        "showlegend": False,
        "margin": {"l": 8, "r": 16, "t": 32, "b": 40},
    }
    title = f"{group.replace('.', ', ')}: {name}"
    each = "; ".join(f"{run.name} {before_after(run, key, base)}" for run in found)
    return Figure(
        title,
        {"data": [{**common, **after}, {**common, **before}], "layout": layout, "config": {"displayModeBar": False}},
        f"{title}, a pair of bars for each run, after and before training: {each}.",
        96 + 56 * len(found),
    )


def before_after(run: Run, key: str, base: str) -> str:
    before = f" (before training {shown(run.metrics[base])})" if base in run.metrics else ""
    return f"{shown(run.metrics[key])}{before}"


def group_tables(task: str, runs: list[Run]) -> list[GroupTable]:
    """The tables of a task: of its sources for evaluation only, and of each group that has more than one value."""
    alike: dict[str, list[Run]] = {}
    for run in runs:
        if task in run.groups:
            alike.setdefault(json.dumps(run.groups[task]), []).append(run)
    found = {label(members): members[0].groups[task] for members in alike.values()}
    tables = [group_table(task, "text", {name: metrics.get("texts", {}) for name, metrics in found.items()}, True)]
    by_place = {name: dict(groups_by_place(metrics)) for name, metrics in found.items()}
    for place in dict.fromkeys(place for places in by_place.values() for place in places):
        by_group = {name: places.get(place, {}) for name, places in by_place.items()}
        for group in dict.fromkeys(group for groups in by_group.values() for group in groups):
            values = {name: groups.get(group, {}) for name, groups in by_group.items()}
            if any(len(figures) > 1 for figures in values.values()):
                tables.append(group_table(f"{task}, {place}", group, values, place == "validation"))
    return [table for table in tables if table.rows]


def groups_by_place(metrics: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What was evaluated, and its figures by group."""
    for split in ("validation", "test"):
        yield split, metrics.get(split, {}).get("groups", {})
    for name, figures in metrics.get("texts", {}).items():
        yield f"text {name}", figures.get("groups", {})


def group_table(where: str, group: str, found: dict[str, dict[str, dict[str, Any]]], opened: bool) -> GroupTable:
    """The table of a group; `found` has, by runs, the figures of each of its values."""
    largest: dict[str, dict[str, Any]] = {}
    for values in found.values():
        largest |= {value: figures for value, figures in values.items() if value not in largest}
    names = (name for figures in largest.values() for name in figures if name in COMPARES)
    metric = next(names, "bits per byte")
    rows = [
        (
            printable(value),
            [
                *(number_cell(largest[value][count]) for count in COUNTS),
                *(group_cell(values.get(value, {}), metric) for values in found.values()),
            ],
        )
        for value in sorted(largest, key=lambda value: -largest[value]["bytes"])
    ]
    return GroupTable(f"{where}: {metric} by {printable(group)}", opened, printable(group), COUNTS, list(found), rows)


def score_tables(task: str, runs: list[Run]) -> list[GroupTable]:
    """Accuracy on minimal pairs and questions, of all and by group; runs with other items have tables of their own."""
    found = [(label(members), json.loads(texts[0] or "")[task]) for members, texts in alike(runs, [score_file(task)])]
    tables = []
    for digest in dict.fromkeys(figures["digest"] for _, figures in found):
        same = {name: figures for name, figures in found if figures["digest"] == digest}
        first = next(iter(same.values()))
        method = first["method"].replace("_", "-")
        totals = {name: {score: shares(figures, score) for score in SCORES} for name, figures in same.items()}
        tables.append(score_table(f"{task}: accuracy on {first['items']:,} items by {method}", "score", totals, True))
        for group in dict.fromkeys(group for figures in same.values() for group in figures["groups"]):
            values = {
                name: {value: shares(some) for value, some in figures["groups"].get(group, {}).items()}
                for name, figures in same.items()
            }
            tables.append(score_table(f"{task}: accuracy by {printable(group)}", printable(group), values, False))
    return tables


def shares(figures: dict[str, Any], score: str = "sum") -> dict[str, Any]:
    """The number of items, and the share of them that is correct, with its interval."""
    return {"items": figures["items"], **figures["accuracy"][score]}


def score_table(caption: str, heading: str, found: dict[str, dict[str, dict[str, Any]]], opened: bool) -> GroupTable:
    """The table of accuracies; `found` has, by runs, the `shares` of each row."""
    rows = []
    for name in dict.fromkeys(name for values in found.values() for name in values):
        items = next(values[name]["items"] for values in found.values() if name in values)
        cells = [share_cell(values[name]) if name in values else Cell("", "") for values in found.values()]
        rows.append((printable(name), [number_cell(items), *cells]))
    return GroupTable(caption, opened, heading, ("items",), list(found), rows)


def share_cell(shares: dict[str, Any]) -> Cell:
    """An accuracy with its interval."""
    text = "{share:.1%} ({low:.1%} to {high:.1%})".format_map(shares)
    return Cell(text, json.dumps(shares["share"]))


def group_cell(figures: dict[str, Any], metric: str) -> Cell:
    """A figure with its standard error, and that before training."""
    if metric not in figures:
        return Cell("", "")
    error = f" ± {shown(figures[error_name])}" if (error_name := f"{metric}_se") in figures else ""
    return Cell(f"{shown(figures[metric])}{error} ({shown(figures[f'base_{metric}'])})", json.dumps(figures[metric]))


def samples_of(task: str, runs: list[Run]) -> list[tuple[str, Markup]]:
    """Runs and what their model says, without the page's title; those that say the same once."""
    return [
        (label(members), Markup(MARKDOWN.render((texts[0] or "").partition("\n")[2])))
        for members, texts in alike(runs, [samples_file(task)])
    ]
