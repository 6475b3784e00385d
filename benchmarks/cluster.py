"""Tokens per second of preprocessing and training on a Ray cluster of one and of two nodes, and without one.

Command python -m benchmarks.cluster [--documents N] [--steps N] [--nodes N ...]    (after `make ray`; 0: without)

Each node has one processor of this machine, so that two cannot do more than its two cores. Preprocessing is tokenize
and group_texts of the documents of benchmarks/preprocessing.py, in shards small enough for each node to get many.
Training is tiny-gpt2's on the embedded sample, a thread a process: the rate is that of the steps
between two runs, one with twice the other's. Starting takes what is left. The last line is one JSON object.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.preprocessing import ROOT, choices, download, own_tokenizer
from benchmarks.ray_cluster import missing, nodes

SMALL_SHARDS = """
import runpy, sys
from stages.core import artifacts
artifacts.SHARD_BYTES = 8 * 2**20
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""
TRAIN = [
    *["task=causal", "model=tiny-gpt2", "adapter=none", "framework=trainer", "seed=42", "block_size=128"],
    *["learning_rate=0.002", "batch_size=4", "num_train_epochs=10"],
]
Run = Callable[..., tuple[int, str]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--nodes", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    if reason := missing():
        sys.exit(reason)
    os.environ["PYTHONPATH"] = str(ROOT)
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        tokenizer = own_tokenizer(None, place / "tokenizer")
        stage(here, "download", download(place, arguments.documents, "raw"))
        told = choices(place, tokenizer)
        sample = {
            "download": ["data=sample", "data.path=data/sample/askscience.jsonl", f"out={place}/sample/raw"],
            "tokenize": ["task=causal", "data=sample", "model=tiny-gpt2", f"raw={place}/sample/raw"],
            "group_texts": ["block_size=128", f"raw={place}/sample/raw", f"tokens={place}/sample/tokens"],
        }
        sample["group_texts"].append(f"out={place}/sample/blocks")
        sample["tokenize"].append(f"out={place}/sample/tokens")
        for name, overrides in sample.items():
            stage(here, name, overrides)
        for number in arguments.nodes:
            if number:
                with nodes(number, place / "cache") as cluster:
                    on_ray = ["hardware=ray", f"hardware.ray.workers={number}"]
                    result[f"nodes_{number}"] = measure(cluster.run, told, place, arguments.steps, on_ray, "ray")
            else:
                alone = ["hardware=cpu", "hardware.num_threads=1"]
                result["without"] = measure(here, told, place, arguments.steps, alone, "")
    print(json.dumps(result))


def here(*command: str, **environment: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


def stage(run: Run, name: str, told: list[str], where: str = "") -> float:
    """Seconds that a stage takes as a process."""
    started = time.perf_counter()
    code, printed = run("-c", SMALL_SHARDS, f"stages.{name}", *told, LM_REPRO_PREPROCESSING=where)
    assert code == 0, printed
    return time.perf_counter() - started


def measure(run: Run, told: dict[str, list[str]], place: Path, steps: int, hardware: list[str], where: str) -> Any:
    seconds = {name: stage(run, name, told[name], where) for name in ("tokenize", "group_texts")}
    ledgers = [json.loads(file.read_text()) for file in (place / "tokens").glob("*/stats.json")]
    tokens = sum(ledger["tokens"] for ledger in ledgers)
    data = [f"tokens={place}/sample/tokens", f"blocks={place}/sample/blocks"]
    outs = [f"out={place}/model", f"report={place}/report"]
    once, twice = (
        stage(
            run, "train", [*TRAIN, *hardware, *data, *outs, f"++trainer.max_steps={number}", "trainer.eval_strategy=no"]
        )
        for number in (steps, 2 * steps)
    )
    figures = {
        "seconds": seconds | {"train": once},
        "preprocessing_tokens_per_second": round(tokens / sum(seconds.values())),
        "training_tokens_per_second": round(steps * 4 * 128 / (twice - once)),
        "training_start_seconds": round(2 * once - twice, 1),
    }
    print(json.dumps(figures), flush=True)
    return figures


if __name__ == "__main__":
    main()
