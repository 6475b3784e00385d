"""Tokens per second of preprocessing and training without Ray and on Ray clusters of one and two nodes.

Command python -m benchmarks.cluster [--documents N] [--steps N] [--nodes N ...]
Needs   `make ray`; `--nodes 0` runs without Ray

Each node gets one processor of this machine, so two nodes can use at most its two cores. Preprocessing runs tokenize
and group_texts on the documents of benchmarks/preprocessing.py, with shards small enough that each node gets many.
Training runs tiny-gpt2 on the embedded sample with one thread per process. Two trainings are timed, the second with
twice the steps: their difference gives the rate, and the rest is start-up. The last line printed is one JSON object.
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

from benchmarks.preprocessing import (
    ROOT,
    build_download_overrides,
    build_stage_overrides,
    write_documents,
    write_tokenizer,
)
from benchmarks.ray_cluster import find_obstacle, start_cluster

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
RunCommand = Callable[..., tuple[int, str]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--nodes", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    if reason := find_obstacle():
        sys.exit(reason)
    os.environ["PYTHONPATH"] = str(ROOT)
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        tokenizer = write_tokenizer(None, directory / "tokenizer")
        write_documents(directory / "raw.jsonl", arguments.documents)
        time_stage(run_locally, "download", build_download_overrides(directory, "raw", count=False))
        overrides_by_stage = build_stage_overrides(directory, tokenizer)
        sample = {
            "download": ["data=sample", "data.path=data/sample/askscience.jsonl", f"out={directory}/sample/raw"],
            "tokenize": ["task=causal", "data=sample", "model=tiny-gpt2", f"raw={directory}/sample/raw"],
            "group_texts": ["block_size=128", f"raw={directory}/sample/raw", f"tokens={directory}/sample/tokens"],
        }
        sample["group_texts"].append(f"out={directory}/sample/blocks")
        sample["tokenize"].append(f"out={directory}/sample/tokens")
        for name, overrides in sample.items():
            time_stage(run_locally, name, overrides)
        for num_nodes in arguments.nodes:
            if num_nodes:
                with start_cluster(num_nodes, directory / "cache") as cluster:
                    ray_hardware = ["hardware=ray", f"hardware.ray.workers={num_nodes}"]
                    result[f"nodes_{num_nodes}"] = measure_hardware(
                        cluster.run, overrides_by_stage, directory, arguments.steps, ray_hardware, "ray"
                    )
            else:
                one_thread = ["hardware=cpu", "hardware.num_threads=1"]
                result["without"] = measure_hardware(
                    run_locally, overrides_by_stage, directory, arguments.steps, one_thread, ""
                )
    print(json.dumps(result))


def run_locally(*command: str, **environment: str) -> tuple[int, str]:
    completed = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )
    return completed.returncode, completed.stdout + completed.stderr


def time_stage(run: RunCommand, name: str, overrides: list[str], executor: str = "") -> float:
    """Run a stage as a process and return its seconds; `executor` is the value of LM_REPRO_PREPROCESSING."""
    started = time.perf_counter()
    code, printed = run("-c", SMALL_SHARDS, f"stages.{name}", *overrides, LM_REPRO_PREPROCESSING=executor)
    assert code == 0, printed
    return time.perf_counter() - started


def measure_hardware(
    run: RunCommand,
    overrides_by_stage: dict[str, list[str]],
    directory: Path,
    max_steps: int,
    hardware: list[str],
    executor: str,
) -> Any:
    seconds = {name: time_stage(run, name, overrides_by_stage[name], executor) for name in ("tokenize", "group_texts")}
    ledgers = [json.loads(file.read_text()) for file in (directory / "tokens").glob("*/stats.json")]
    tokens = sum(ledger["tokens"] for ledger in ledgers)
    data = [f"tokens={directory}/sample/tokens", f"blocks={directory}/sample/blocks"]
    outs = [f"out={directory}/model", f"report={directory}/report"]
    once, twice = (
        time_stage(
            run,
            "train",
            [*TRAIN, *hardware, *data, *outs, f"++trainer.max_steps={num_steps}", "trainer.eval_strategy=no"],
        )
        for num_steps in (max_steps, 2 * max_steps)
    )
    figures = {
        "seconds": seconds | {"train": once},
        "preprocessing_tokens_per_second": round(tokens / sum(seconds.values())),
        "training_tokens_per_second": round(max_steps * 4 * 128 / (twice - once)),
        "training_start_seconds": round(2 * once - twice, 1),
    }
    print(json.dumps(figures), flush=True)
    return figures


if __name__ == "__main__":
    main()
