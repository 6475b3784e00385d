"""Measure the cost of the state chain: its share of the steps of a training.

Command python -m benchmarks.state_chain [--shape distilgpt2] [--hardware cpu] [--steps 40]

Both times are from the same steps of one training, on random blocks and without validation.
The last line printed is one JSON object: shape, hardware, chain_milliseconds, step_milliseconds, share.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.training import SHAPES, make_setup, make_training_config, parse_arguments, write_blocks

WARM_UP_STEPS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--shape", choices=tuple(SHAPES), default="tiny-gpt2")
    parser.add_argument("--hardware", default="cpu")
    parser.add_argument("--steps", type=int, default=40)
    given = parser.parse_args()
    options = ["--shape", given.shape, "--hardware", given.hardware, "--steps", str(given.steps)]
    with tempfile.TemporaryDirectory() as scratch:
        arguments = parse_arguments([*options, "--scratch", scratch])
        write_blocks(arguments, Path(scratch))
        chain, steps = measure_training(arguments)
    result: dict[str, Any] = {"shape": given.shape, "hardware": given.hardware}
    result |= {"chain_milliseconds": round(chain, 3), "step_milliseconds": round(steps, 2)}
    print(json.dumps(result | {"share": round(chain / steps, 4)}))


def measure_training(arguments: argparse.Namespace) -> tuple[float, float]:
    """Train and return the medians of the chain's time and of the whole step, in milliseconds."""
    from stages.frameworks.trainer import make_trainer, prepare_framework
    from stages.model.models import prepare_torch

    config = make_training_config(arguments)
    prepare_torch(config.hardware)
    prepare_framework(config)
    trainer = make_trainer(*make_setup(arguments, config), arguments.scratch)
    add_link, chain_seconds, ends = trainer.state_chain.on_step_end, list[float](), list[float]()

    def add_link_timed(*values: Any, **named: Any) -> None:
        started = time.perf_counter()
        add_link(*values, **named)
        ends.append(time.perf_counter())
        chain_seconds.append(ends[-1] - started)

    trainer.state_chain.on_step_end = add_link_timed  # type: ignore[method-assign]
    trainer.train()
    steps = [after - before for before, after in itertools.pairwise(ends)]
    return 1e3 * statistics.median(chain_seconds[WARM_UP_STEPS:]), 1e3 * statistics.median(steps[WARM_UP_STEPS:])


if __name__ == "__main__":
    main()
