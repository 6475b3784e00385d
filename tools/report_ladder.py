"""Scaling ladders in the report: the rungs against compute, the law, and its prediction of the largest rung."""

import html
import json
from typing import Any, NamedTuple

from tools.ladder.result import LadderResult, describe_result
from tools.report_parts import Cell, Figure, GroupTable, build_axis, build_number_cell, get_series_color, shorten_name


class LadderParts(NamedTuple):
    """A ladder, as parts of the page."""

    title: str
    figure: Figure
    sentences: list[str]
    table: GroupTable


def build_ladder_parts(result: LadderResult) -> LadderParts:
    """Build the parts of a ladder."""
    sentences = [line.strip() for text in describe_result(result) for line in text.split("\n") if line.strip()]
    return LadderParts(f"{result.name} ({result.task})", _build_figure(result), sentences, _build_table(result))


def _build_figure(result: LadderResult) -> Figure:
    colors = {curve.size: get_series_color(number) for number, curve in enumerate(result.back_test.curves)}
    held_out = result.points[-1]
    traces = [*_build_band(result), *_build_curves(result, colors)]
    for size, color in colors.items():
        points = [point for point in result.points[:-1] if point.size == size]
        traces.append(
            {
                "name": html.escape(shorten_name(size, 24)),
                "legendgroup": size,
                "x": [point.compute for point in points],
                "y": [point.bits for point in points],
                "text": [html.escape(f"{point.size} {point.length}") for point in points],
                "mode": "markers",
                "marker": {"size": 9, "color": color},
                "hovertemplate": "%{y:.4f} with %{x:.2e} operations<extra>%{text}</extra>",
            }
        )
    predicted = result.back_test.predicted
    traces.append(
        {
            "name": "predicted",
            "x": [held_out.compute],
            "y": [predicted.value],
            "error_y": {
                "array": [predicted.high - predicted.value],
                "arrayminus": [predicted.value - predicted.low],
                "symmetric": False,
                "color": "--ink",
                "thickness": 1,
            },
            "mode": "markers",
            "marker": {"size": 1, "color": "--ink"},
            "showlegend": False,
            "hovertemplate": f"%{{y:.4f}} ({predicted.low:.4f} to {predicted.high:.4f})<extra>predicted</extra>",
        }
    )
    traces.append(
        {
            "name": html.escape(f"largest: {shorten_name(f'{held_out.size} {held_out.length}', 24)}"),
            "x": [held_out.compute],
            "y": [held_out.bits],
            "mode": "markers",
            "marker": {"size": 12, "symbol": "diamond-open", "color": colors[held_out.size], "line": {"width": 2}},
            "hovertemplate": "%{y:.4f} measured<extra>%{fullData.name}</extra>",
        }
    )
    layout = {
        "xaxis": build_axis("operations of training, 6 x parameters x tokens", type="log", exponentformat="power"),
        "yaxis": build_axis("bits per byte"),
        "legend": {"orientation": "h", "x": 0, "yref": "container", "y": 0, "yanchor": "bottom"},
        "margin": {"l": 56, "r": 8, "t": 8, "b": 40},
    }
    values = "; ".join(f"{point.size} {point.length} {point.bits:.4f}" for point in result.points)
    verdict = "within" if result.back_test.within else "outside"
    alt = (
        f"Bits per byte of ladder {result.name} against compute: {values}. The last was predicted as"
        f" {predicted.value:.4f}, 95 % interval {predicted.low:.4f} to {predicted.high:.4f}, and is {verdict} it."
    )
    spec = {"data": traces, "layout": layout, "config": {"displayModeBar": False}}
    return Figure(f"Ladder {result.name}", spec, alt, 460)


def _build_band(result: LadderResult) -> list[dict[str, Any]]:
    """Build the interval of the size of the largest rung: its lower limit, and its upper limit filled down to it."""
    curve = next(curve for curve in result.back_test.curves if curve.size == result.back_test.size)
    common = {"x": curve.compute, "mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False}
    return [{**common, "y": curve.low}, {**common, "y": curve.high, "fill": "tonexty", "fillcolor": "--band"}]


def _build_curves(result: LadderResult, colors: dict[str, str]) -> list[dict[str, Any]]:
    return [
        {
            "x": curve.compute,
            "y": curve.values,
            "mode": "lines",
            "line": {"width": 1.5, "color": colors[curve.size]},
            "legendgroup": curve.size,
            "hoverinfo": "skip",
            "showlegend": False,
        }
        for curve in result.back_test.curves
    ]


def _build_table(result: LadderResult) -> GroupTable:
    rows = [
        (
            f"{point.size} {point.length}",
            [
                build_number_cell(point.num_parameters),
                build_number_cell(point.num_non_embedding),
                build_number_cell(point.num_tokens),
                Cell(f"{point.num_epochs:.3g}", json.dumps(point.num_epochs)),
                Cell(f"{point.compute:.2e}", json.dumps(point.compute)),
                build_number_cell(point.bits),
                build_number_cell(point.fitted) if point.fitted is not None else Cell("", ""),
            ],
        )
        for point in result.points
    ]
    counts = ("parameters", "outside embeddings", "tokens", "epochs", "operations")
    return GroupTable(f"Rungs of {result.name}", False, "rung", counts, [result.metric, "law of all rungs"], rows)
