"""What the parts of the report are made of: figures, tables and their cells."""

import json
from typing import Any, NamedTuple


class Figure(NamedTuple):
    title: str
    spec: dict[str, Any]
    """What plotly draws; a color that begins with -- is a variable of report_page.css."""
    alt: str
    height: int
    """In pixels."""


class Cell(NamedTuple):
    text: str
    value: str
    """What to sort by, as JSON; empty where there is nothing."""


class GroupTable(NamedTuple):
    """A metric of the values of a group, or of the sources that are only evaluated."""

    caption: str
    opened: bool
    """Whether it is shown at first."""
    heading: str
    """What the rows are."""
    counts: tuple[str, ...]
    runs: list[str]
    rows: list[tuple[str, list[Cell]]]
    """Each value with its counts, and the metric of each run."""


def axis(title: str, **more: Any) -> dict[str, Any]:
    return {
        "title": {"text": title, "standoff": 8},
        "gridcolor": "--rule",
        "zerolinecolor": "--rule",
        "automargin": True,
        **more,
    }


def number_cell(number: float) -> Cell:
    return Cell(shown(number), json.dumps(number))


def shown(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:.4f}"


def shortened(name: str, most: int) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"
