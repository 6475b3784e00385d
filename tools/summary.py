"""Say what the last run trained, its metrics before and after, and what to try next.

Command python -m tools.summary
"""

import json
from pathlib import Path
from typing import Any

import yaml

from tools.compare import command


def main() -> None:
    params = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    print()
    for task in ("causal", "mlm"):
        metrics = json.loads(Path(f"metrics/{task}.json").read_text(encoding="utf-8"))[task]["test"]
        print(describe(task, params[task]["model"], metrics))
    print(
        "\nSamples are in reports/samples/, the models in models/. Next (after `source .venv/bin/activate`):\n"
        "  dvc exp run -S block_size=256\n"
        f"  {command('validation')}"
    )


def describe(task: str, model: str, metrics: dict[str, Any]) -> str:
    """One line: the task, its model, and the test split's figure before and after training."""
    name = next(key for key in metrics if key.endswith("bits_per_byte") and not key.startswith("base_"))
    before, after = metrics[f"base_{name}"], metrics[name]
    change = f"{(after - before) / before:+.0%}"
    return f"{task:7} {model:14} test {name}: {before:.3f} before training, {after:.3f} after ({change})"


if __name__ == "__main__":
    main()
