"""Building blocks of the report: figures, tables and their cells."""

import json
from typing import Any, NamedTuple

NUM_COLORS = 8  # defined in report_page.css


class Figure(NamedTuple):
    title: str
    spec: dict[str, Any]
    """plotly's data and layout; a color that begins with -- is a variable of report_page.css."""
    alt: str
    height: int
    """Height in pixels."""


class Cell(NamedTuple):
    text: str
    value: str
    """Sort key as JSON; empty if there is no value."""


class GroupTable(NamedTuple):
    """Table of a metric by group value, or by source that is only evaluated."""

    caption: str
    opened: bool
    """If True, the table is expanded when the page opens."""
    heading: str
    """Column heading of the row names."""
    counts: tuple[str, ...]
    runs: list[str]
    rows: list[tuple[str, list[Cell]]]
    """Row names, each with the cells of its counts and of the metric per run."""


def build_axis(title: str, **more: Any) -> dict[str, Any]:
    return {
        "title": {"text": title, "standoff": 8},
        "gridcolor": "--rule",
        "zerolinecolor": "--rule",
        "automargin": True,
        **more,
    }


def get_series_color(number: int) -> str:
    """Return the CSS variable of the color of a figure's series; the colors repeat after the last."""
    return f"--series-{number % NUM_COLORS}"


def build_number_cell(number: float) -> Cell:
    return Cell(format_number(number), json.dumps(number))


def format_number(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:.4f}"


def shorten_name(name: str, most: int) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"
