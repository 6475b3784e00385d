"""HTML page of the report: tables, plotly figures, samples and data flows. The page makes no network requests.

Names of experiments and models, and generated text, are untrusted. The template escapes all of them, plotly's labels
are escaped for plotly, samples are rendered as Markdown without links, pictures or HTML, and the page's content
security policy blocks all requests and all scripts except its own two.
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
from tools.ladder.result import LadderResult
from tools.report_data import (
    ReportRun,
    build_flow,
    get_accuracy_path,
    get_curve_path,
    get_samples_path,
    group_identical_runs,
    list_tasks,
    parse_curve,
)
from tools.report_ladder import build_ladder_parts
from tools.report_pairs import ComparedTask, build_compared_parts
from tools.report_parts import (
    Cell,
    Figure,
    GroupTable,
    build_axis,
    build_number_cell,
    format_number,
    get_series_color,
    shorten_name,
)

HERE = Path(__file__).parent
MARKDOWN = MarkdownIt("zero").enable(["blockquote", "table", "emphasis", "backticks", "escape", "newline"])
COUNTS = ("documents", "bytes")
COMPARABLE_METRICS = {
    "bits_per_byte": "Bits per UTF-8 byte of text; lower is better. It can be compared between all rows evaluated on"
    " the same documents, whatever their block_size and tokenizer.",
    "pseudo_bits_per_byte": "Bits per UTF-8 byte of text; lower is better. It can only be compared between rows with"
    " the same tokenizer, and never with bits_per_byte.",
}


class Column(NamedTuple):
    key: str
    group: str
    label: str
    extra: bool
    """If True, the column is hidden until the user shows all metrics."""


def render_page(
    runs: list[ReportRun],
    compared: Sequence[ComparedTask] = (),
    live: Mapping[str, ReportRun] = MappingProxyType({}),
    ladders: Sequence[LadderResult] = (),
) -> str:
    """Render the page.

    Args:
        compared: comparisons between the runs, one per task; empty if there is nothing to compare.
        live: trainings without outs yet, by task; their curves are drawn too.
        ladders: results of scaling ladders.
    """
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    scripts = [get_plotlyjs(), (HERE / "report_page.js").read_text(encoding="utf-8")]
    tasks = list_tasks([run.metrics for run in runs])
    params, columns = find_differing_params(runs), build_metric_columns(runs)
    twin = find_workspace_twin(runs)
    plotted_runs = [run for run in runs if twin is None or run.kind != "workspace"]
    return environment.get_template("report_page.html").render(
        style=Markup((HERE / "report_page.css").read_text(encoding="utf-8")),
        scripts=[Markup(script) for script in scripts],
        policy=" ".join(f"'sha256-{hash_script(script)}'" for script in scripts),
        runs=runs,
        twin=twin,
        params=[split_param_name(param) for param in params],
        columns=columns,
        rows=[(run, [build_cell(run, key) for key in [*params, *(column.key for column in columns)]]) for run in runs],
        curves={
            task: build_curves(task, [*plotted_runs, live[task]] if task in live else plotted_runs)
            for task in dict.fromkeys([*tasks, *live])
        },
        bars=[
            (build_bars(key, plotted_runs), COMPARABLE_METRICS[key.rpartition(".")[2]])
            for key in choose_metrics(columns)
        ],
        pairs=[build_compared_parts(task) for task in compared],
        ladders=[build_ladder_parts(ladder) for ladder in ladders],
        groups={task: tables for task in tasks if (tables := build_group_tables(task, plotted_runs))},
        scores={task: tables for task in tasks if (tables := build_score_tables(task, plotted_runs))},
        samples={task: render_samples(task, plotted_runs) for task in tasks},
        flows={task: build_flow(task, plotted_runs) for task in tasks},
        label=join_run_names,
    )


def find_differing_params(runs: list[ReportRun]) -> list[str]:
    """Return the params with different values in the runs."""
    params = [run.params for run in runs if run.params]
    keys = dict.fromkeys(key for values in params for key in values)
    return [key for key in keys if len({values.get(key) for values in params}) > 1]


def hash_script(script: str) -> str:
    """Return the SHA-256 hash of a script in base64, for the content security policy."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def find_workspace_twin(runs: list[ReportRun]) -> str | None:
    """Return the commit or experiment identical to the workspace, which figures then show only once."""
    workspace = next((run for run in runs if run.kind == "workspace"), None)
    if workspace is None:
        return None
    content = (workspace.params, workspace.metrics, workspace.files)
    others = (run for run in runs if run is not workspace)
    return next((run.name for run in others if (run.params, run.metrics, run.files) == content), None)


def split_param_name(param: str) -> tuple[str, str]:
    """Split a param into its file, empty for params.yaml, and its key."""
    file, colon, key = param.partition(":")
    return (file, key) if colon else ("", param)


def build_metric_columns(runs: list[ReportRun]) -> list[Column]:
    """Return the comparable metrics, validation first, then all other metrics as hidden columns."""
    keys = list(dict.fromkeys(key for run in runs for key in run.metrics))

    def column(key: str) -> Column:
        group, _, name = key.rpartition(".")
        return Column(key, group.replace(".", " "), name, name not in COMPARABLE_METRICS)

    def order(column: Column) -> tuple[bool, bool]:
        return column.extra, not column.group.endswith("validation")

    return sorted(map(column, keys), key=order)


def choose_metrics(columns: list[Column]) -> list[str]:
    """Return the metrics by which to choose among experiments."""
    return [column.key for column in columns if not column.extra and column.group.endswith("validation")]


def build_cell(run: ReportRun, key: str) -> Cell:
    """Build the cell of a param, or of a metric with the digits needed for comparisons."""
    if key in run.params:
        value = json.loads(run.params[key])
        return Cell(value if isinstance(value, str) else run.params[key], run.params[key])
    if key in run.metrics:
        return build_number_cell(run.metrics[key])
    return Cell("", "")


def join_run_names(members: list[ReportRun]) -> str:
    return ", ".join(run.name for run in members)


def get_color(run: ReportRun, runs: list[ReportRun]) -> str:
    """Return the CSS variable of a run's color, the same in every figure."""
    return get_series_color(runs.index(run))


class Curves(NamedTuple):
    figure: Figure
    rows: list[tuple[str, str, str, str]]
    """Run names, number of steps, last training loss, and lowest validation loss with its step."""


def build_curves(task: str, runs: list[ReportRun]) -> Curves | None:
    """Build the loss curves of a task, one line for identical runs; None if there are no curves."""
    traces, rows = [], []
    for members, texts in group_identical_runs(
        runs, [get_curve_path(task, split) for split in ("train", "validation")]
    ):
        name = join_run_names(members)
        training, validation = (parse_curve(text) if text else [] for text in texts)
        kinds = (
            ("training", training, "lines", {"width": 1.5}),
            ("validation", validation, "lines+markers", {"dash": "dot"}),
        )
        for kind, points, mode, line in kinds:
            traces.append(
                {
                    "name": html.escape(shorten_name(name, 48)),
                    "legendgroup": name,
                    "showlegend": kind == "training",
                    "x": [step for step, _ in points],
                    "y": [loss for _, loss in points],
                    "mode": mode,
                    "line": {**line, "color": get_color(members[0], runs)},
                    "marker": {"size": 8},
                    "hovertemplate": f"%{{y:.4f}} at step %{{x}}<extra>{html.escape(name)}, {kind}</extra>",
                }
            )
        step, lowest = min(validation, key=lambda point: point[1], default=(0, None))
        rows.append(
            (
                name,
                str(max((step for step, _ in [*training, *validation]), default="")),
                format_number(training[-1][1]) if training else "",
                f"{format_number(lowest)} at step {step}" if lowest is not None else "",
            )
        )
    if not rows:
        return None
    axes = {"xaxis": build_axis("step"), "yaxis": build_axis("loss (nats per predicted token)")}
    layout = {
        **axes,
        "legend": {"orientation": "h", "x": 0, "yref": "container", "y": 0, "yanchor": "bottom"},
        "margin": {"l": 56, "r": 8, "t": 32, "b": 40},
    }
    lowest_losses = "; ".join(f"{name}: {lowest or 'no validation loss'}" for name, _, _, lowest in rows)
    alt = (
        f"Training and validation loss of {task} by step, one line per run. Lowest validation loss of {lowest_losses}."
    )
    # An explicit list, because plotly's default buttons include an upload to its makers.
    buttons = [["zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d", "toImage"]]
    config = {"modeBarButtons": buttons, "toImageButtonOptions": {"filename": f"loss-{task}"}}
    return Curves(Figure(f"Loss of {task}", {"data": traces, "layout": layout, "config": config}, alt, 420), rows)


def build_bars(key: str, runs: list[ReportRun]) -> Figure:
    """Build the bars of a metric: all runs that have it, each next to its model before training."""
    group, _, name = key.rpartition(".")
    found = [run for run in runs if key in run.metrics]
    base = f"{group}.base_{name}"
    # Names may be long and need not be unique, so bars have numeric positions with names as tick labels.
    positions = list(range(len(found)))
    after = {
        "name": "after training",
        "x": [run.metrics[key] for run in found],
        "error_x": {
            "array": [run.metrics.get(f"{key}_se", 0) for run in found],
            "color": "--ink",
            "thickness": 1,
            "width": 3,
        },
        "marker": {"color": [get_color(run, runs) for run in found]},
        "insidetextfont": {"color": "--paper"},
    }
    before = {
        "name": "before training",
        "x": [run.metrics.get(base) for run in found],
        "marker": {"color": "--base"},
        "insidetextfont": {"color": "--ink"},
    }
    common = {
        "type": "bar",
        "orientation": "h",
        "y": positions,
        "texttemplate": "%{x:.4f}",
        "insidetextanchor": "start",
    }
    common |= {"textposition": "inside", "hovertemplate": "%{x:.4f}<extra>%{fullData.name}</extra>"}
    names = {
        "tickvals": positions,
        "ticktext": [html.escape(shorten_name(run.name, 24)) for run in found],
        "autorange": "reversed",
    }
    layout = {
        "xaxis": build_axis("bits per byte", rangemode="tozero"),
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
    values = "; ".join(f"{run.name} {format_before_after(run, key, base)}" for run in found)
    return Figure(
        title,
        {"data": [{**common, **after}, {**common, **before}], "layout": layout, "config": {"displayModeBar": False}},
        f"{title}, one pair of bars per run, after and before training: {values}.",
        96 + 56 * len(found),
    )


def format_before_after(run: ReportRun, key: str, base: str) -> str:
    before = f" (before training {format_number(run.metrics[base])})" if base in run.metrics else ""
    return f"{format_number(run.metrics[key])}{before}"


def build_group_tables(task: str, runs: list[ReportRun]) -> list[GroupTable]:
    """Build a task's tables: of sources that are only evaluated, and of each group with more than one value."""
    identical: dict[str, list[ReportRun]] = {}
    for run in runs:
        if task in run.groups:
            identical.setdefault(json.dumps(run.groups[task]), []).append(run)
    metrics_by_name = {join_run_names(members): members[0].groups[task] for members in identical.values()}
    tables = [
        build_group_table(
            task, "text", {name: metrics.get("texts", {}) for name, metrics in metrics_by_name.items()}, True
        )
    ]
    by_text = {name: dict(list_groups_by_text(metrics)) for name, metrics in metrics_by_name.items()}
    for text in dict.fromkeys(text for texts in by_text.values() for text in texts):
        by_group = {name: texts.get(text, {}) for name, texts in by_text.items()}
        for group in dict.fromkeys(group for groups in by_group.values() for group in groups):
            values = {name: groups.get(group, {}) for name, groups in by_group.items()}
            if any(len(figures) > 1 for figures in values.values()):
                tables.append(build_group_table(f"{task}, {text}", group, values, text == "validation"))
    return [table for table in tables if table.rows]


def list_groups_by_text(metrics: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each evaluated split or text with its metrics by group."""
    for split in ("validation", "test"):
        yield split, metrics.get(split, {}).get("groups", {})
    for name, figures in metrics.get("texts", {}).items():
        yield f"text {name}", figures.get("groups", {})


def build_group_table(scope: str, group: str, found: dict[str, dict[str, dict[str, Any]]], opened: bool) -> GroupTable:
    """Build the table of a group; `found` maps run names to the metrics of each value of the group."""
    largest: dict[str, dict[str, Any]] = {}
    for values in found.values():
        largest |= {value: figures for value, figures in values.items() if value not in largest}
    names = (name for figures in largest.values() for name in figures if name in COMPARABLE_METRICS)
    metric = next(names, "bits per byte")
    rows = [
        (
            printable(value),
            [
                *(build_number_cell(largest[value][count]) for count in COUNTS),
                *(build_group_cell(values.get(value, {}), metric) for values in found.values()),
            ],
        )
        for value in sorted(largest, key=lambda value: -largest[value]["bytes"])
    ]
    return GroupTable(f"{scope}: {metric} by {printable(group)}", opened, printable(group), COUNTS, list(found), rows)


def build_score_tables(task: str, runs: list[ReportRun]) -> list[GroupTable]:
    """Build the accuracy tables of minimal pairs and questions, overall and by group, one set per set of items."""
    found = [
        (join_run_names(members), json.loads(texts[0] or "")[task])
        for members, texts in group_identical_runs(runs, [get_accuracy_path(task)])
    ]
    tables = []
    for items_digest in dict.fromkeys(figures["digest"] for _, figures in found):
        same = {name: figures for name, figures in found if figures["digest"] == items_digest}
        first = next(iter(same.values()))
        method = first["method"].replace("_", "-")
        totals = {name: {score: get_shares(figures, score) for score in SCORES} for name, figures in same.items()}
        tables.append(
            build_score_table(f"{task}: accuracy on {first['items']:,} items by {method}", "score", totals, True)
        )
        for group in dict.fromkeys(group for figures in same.values() for group in figures["groups"]):
            values = {
                name: {
                    value: get_shares(group_figures)
                    for value, group_figures in figures["groups"].get(group, {}).items()
                }
                for name, figures in same.items()
            }
            tables.append(build_score_table(f"{task}: accuracy by {printable(group)}", printable(group), values, False))
    return tables


def get_shares(figures: dict[str, Any], score: str = "sum") -> dict[str, Any]:
    """Return the number of items and the share of correct ones with its interval."""
    return {"items": figures["items"], **figures["accuracy"][score]}


def build_score_table(
    caption: str, heading: str, found: dict[str, dict[str, dict[str, Any]]], opened: bool
) -> GroupTable:
    """Build a table of accuracies; `found` maps run names to the result of `get_shares` for each row."""
    rows = []
    for name in dict.fromkeys(name for values in found.values() for name in values):
        items = next(values[name]["items"] for values in found.values() if name in values)
        cells = [build_share_cell(values[name]) if name in values else Cell("", "") for values in found.values()]
        rows.append((printable(name), [build_number_cell(items), *cells]))
    return GroupTable(caption, opened, heading, ("items",), list(found), rows)


def build_share_cell(accuracy: dict[str, Any]) -> Cell:
    """Build the cell of an accuracy with its interval."""
    text = "{share:.1%} ({low:.1%} to {high:.1%})".format_map(accuracy)
    return Cell(text, json.dumps(accuracy["share"]))


def build_group_cell(figures: dict[str, Any], metric: str) -> Cell:
    """Build the cell of a metric with its standard error and its value before training."""
    if metric not in figures:
        return Cell("", "")
    error = f" ± {format_number(figures[error_name])}" if (error_name := f"{metric}_se") in figures else ""
    return Cell(
        f"{format_number(figures[metric])}{error} ({format_number(figures[f'base_{metric}'])})",
        json.dumps(figures[metric]),
    )


def render_samples(task: str, runs: list[ReportRun]) -> list[tuple[str, Markup]]:
    """Render the samples of each group of identical runs, without the title of the Markdown file."""
    return [
        (join_run_names(members), Markup(MARKDOWN.render((texts[0] or "").partition("\n")[2])))
        for members, texts in group_identical_runs(runs, [get_samples_path(task)])
    ]
