"""Evaluate one trained model with several block sizes: loss and perplexity change, bits per byte must not.

Command python -m benchmarks.block_sizes [--task causal] [--sizes 64 128 256]
Needs   a finished `dvc repro`

The last line printed is one JSON object that maps each block size to the metrics of the test split.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--task", choices=("causal", "mlm"), default="causal")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--hardware", default="cpu")
    arguments = parser.parse_args()
    task, metrics = arguments.task, {}
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory() as scratch:
            tokens, blocks, out = f"tokens=data/tokens/{task}", f"{scratch}/blocks", f"{scratch}/report"
            run_stage("group_texts", f"task={task}", f"block_size={size}", tokens, f"out={blocks}")
            inputs = [f"task={task}", f"hardware={arguments.hardware}", f"trained=models/{task}", tokens]
            outputs = [f"blocks={blocks}", f"baseline=reports/baseline/{task}", f"samples_out={scratch}/samples.md"]
            run_stage("evaluate", *inputs, *outputs, f"out={scratch}/metrics.json", f"report={out}")
            metrics[size] = json.loads(Path(f"{out}/metrics.json").read_text())[task]["test"]
    names = [name for name in metrics[arguments.sizes[0]] if isinstance(metrics[arguments.sizes[0]][name], float)]
    print("block_size", *(f"{name:>26}" for name in names))
    for size in arguments.sizes:
        print(f"{size:10}", *(f"{metrics[size][name]:26.15f}" for name in names))
    print(json.dumps(metrics))


def run_stage(name: str, *overrides: str) -> None:
    subprocess.run([sys.executable, "-m", f"stages.{name}", *overrides], check=True)


if __name__ == "__main__":
    main()
