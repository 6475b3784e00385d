"""Say what the last run trained, its metrics before and after, and what to try next.

Command python -m tools.summary
"""

import json
from pathlib import Path

import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from tools.compare import command


def main() -> None:
    params = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("task", "model", "test split"):
        table.add_column(heading, no_wrap=True)
    for heading in ("before", "trained", "change"):
        table.add_column(heading, no_wrap=True, justify="right")
    for task in ("causal", "mlm"):
        metrics = json.loads(Path(f"metrics/{task}.json").read_text(encoding="utf-8"))[task]["test"]
        table.add_row(task, params[task]["model"], *change(metrics))
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    console.print(
        "Samples are in reports/samples/, the models in models/. Next (after `source .venv/bin/activate`):\n"
        "  dvc exp run -S block_size=256\n"
        f"  {command('validation')}",
        markup=False,
    )


def change(metrics: dict[str, float]) -> tuple[str, str, str, str]:
    """The figure that compares, before and after training, and by what share it changed."""
    name = next(key for key in metrics if key.endswith("bits_per_byte") and not key.startswith("base_"))
    before, after = metrics[f"base_{name}"], metrics[name]
    return name, f"{before:.3f}", f"{after:.3f}", f"{(after - before) / before:+.0%}"


if __name__ == "__main__":
    main()
