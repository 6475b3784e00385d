"""Time, disk and memory of each data stage for many documents, and time of DVC for many shards.

Command python -m benchmarks.scale [--documents N] [--shards N ...] [--shard-bytes N]

The documents are those of benchmarks/preprocessing.py; near duplicates are counted, as by default. Disk is the size of
a stage's output. Memory is the peak of the sum over its processes, including mapped files. DVC is measured in another
repository with random shards: `dvc add` hashes them and copies them to its cache, `dvc status` checks them for changes.
The last line printed is one JSON object.
"""

import argparse
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.preprocessing import (
    ROOT,
    build_download_overrides,
    build_stage_overrides,
    measure_stage,
    write_documents,
    write_tokenizer,
)

MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--shards", type=int, nargs="*", default=[10, 100, 1000])
    parser.add_argument("--shard-bytes", type=int, default=4 * MIB)
    arguments = parser.parse_args()
    os.environ["PYTHONPATH"] = str(ROOT)
    result: dict[str, Any] = {"documents": arguments.documents, "shard_bytes": arguments.shard_bytes}
    with tempfile.TemporaryDirectory() as scratch:
        result["stages"] = measure_stages(Path(scratch), arguments.documents) if arguments.documents else {}
    result["dvc"] = {}
    for num_shards in arguments.shards:
        with tempfile.TemporaryDirectory() as scratch:
            result["dvc"][num_shards] = measure_dvc(Path(scratch), num_shards, arguments.shard_bytes)
    print(json.dumps(result))


def measure_stages(directory: Path, num_documents: int) -> dict[str, dict[str, float]]:
    """Return the seconds, bytes written and peak memory in bytes of each data stage for `num_documents` documents."""
    tokenizer = write_tokenizer(None, directory / "tokenizer")
    write_documents(directory / "raw.jsonl", num_documents)
    overrides_by_stage = {
        "download": [*build_download_overrides(directory, "raw", count=True), "source=files"],
        **build_stage_overrides(directory, tokenizer),
    }
    outs = {"download": "raw", "tokenize": "tokens", "group_texts": "blocks"}
    figures = {}
    for stage, overrides in overrides_by_stage.items():
        seconds, peak = measure_stage(stage, *overrides, root=ROOT)
        figures[stage] = {
            "seconds": round(seconds, 1),
            "bytes": get_num_bytes(directory / outs[stage]),
            "peak_bytes": peak,
        }
        print(
            f"{stage:12} {seconds:8.1f} s {figures[stage]['bytes'] / MIB:10,.0f} MiB written"
            f" {figures[stage]['peak_bytes'] / MIB:8,.0f} MiB of memory at most",
            flush=True,
        )
    ledgers = [json.loads(file.read_text()) for file in (directory / "tokens").glob("*/stats.json")]
    tokens = sum(ledger["tokens"] for ledger in ledgers)
    corpus_bytes = get_num_bytes(directory / "raw.jsonl")
    print(f"{num_documents:,} documents, {corpus_bytes / MIB:,.0f} MiB of JSONL, {tokens:,} tokens", flush=True)
    return figures | {"corpus": {"bytes": corpus_bytes, "tokens": tokens}}


def get_num_bytes(path: Path) -> int:
    """Return the bytes of a file, or of all files in a directory."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def measure_dvc(directory: Path, num_shards: int, shard_bytes: int) -> dict[str, float]:
    """Return the seconds of DVC commands on `num_shards` shards of `shard_bytes` bytes."""
    for command in (["git", "init", "--quiet"], ["dvc", "init", "--quiet"]):
        subprocess.run(command, cwd=directory, check=True)
    (directory / "empty").touch()
    (directory / "out").mkdir()
    for index in range(num_shards):
        (directory / f"out/shard-{index:05d}.arrow").write_bytes(os.urandom(shard_bytes))
    figures = {}
    for name, command in (("nothing", ["add", "empty"]), ("add", ["add", "out"]), ("status", ["status"])):
        started = time.perf_counter()
        subprocess.run(["dvc", *command, "--quiet"], cwd=directory, check=True, stdout=subprocess.DEVNULL)
        figures[name] = round(time.perf_counter() - started, 2)
    rate = num_shards * shard_bytes / MIB / (figures["add"] - figures["nothing"])
    print(
        f"{num_shards:5} shards of {shard_bytes / MIB:.0f} MiB: dvc add {figures['add']:.1f} s ({rate:,.0f} MiB/s),"
        f" dvc status {figures['status']:.1f} s (dvc add of one empty file: {figures['nothing']:.1f} s)",
        flush=True,
    )
    return figures


if __name__ == "__main__":
    main()
