"""Print the models of the last run with their metrics before and after training, and the next steps.

Command python -m tools.summary
"""

import signal
import sys
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from stages.core.artifacts import read_json
from stages.core.compose import PARAMS
from stages.core.config import read_yaml
from stages.core.errors import StageError, printable, printable_lines

NEXT_STEPS = """\
Samples are in reports/samples/, the models in models/. Next (after `source .venv/bin/activate`):
  dvc exp run -S block_size=256
  make compare"""


def main() -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("task", "model", "test split"):
        table.add_column(heading, no_wrap=True)
    for heading in ("before", "trained", "change"):
        table.add_column(heading, no_wrap=True, justify="right")
    try:
        for task, section in read_yaml(PARAMS)["tasks"].items():
            report = Path(f"reports/evaluate/{task}/metrics.json")
            model = Text(printable(section["model"]))
            if report.is_file():
                table.add_row(task, model, *format_change(read_json(report)[task]["test"]))
            else:
                print(f"summary: {task} is not evaluated yet: run `dvc repro`", file=sys.stderr)
    except StageError as error:
        sys.exit(printable_lines(f"summary: {error}"))
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    console.print(NEXT_STEPS, markup=False)


def format_change(metrics: dict[str, Any]) -> tuple[str, str, str, str]:
    """Format the comparable metric: name, value before and after training, and relative change."""
    name = next(key for key in metrics if key.endswith("bits_per_byte") and not key.startswith("base_"))
    before, after = metrics[f"base_{name}"], metrics[name]
    return name, f"{before:.3f}", f"{after:.3f}", f"{(after - before) / before:+.0%}"


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end silently in `| head -1`
    main()
