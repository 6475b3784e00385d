"""What many documents and many shards cost: each data stage's time, disk and memory, and DVC's time over its outs.

Command python -m benchmarks.scale [--documents N] [--shards N ...] [--shard-bytes N]

The documents are those of benchmarks/preprocessing.py; near duplicates are counted, as by default. Disk is what a stage
writes; memory is the most that its processes hold together, files mapped into them included. DVC's part is a repository
of its own with random shards: `dvc add` hashes and copies them to its cache, `dvc status` looks whether they changed.
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

from benchmarks.preprocessing import ROOT, choices, download, own_tokenizer, watched, write_documents

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
        result["stages"] = of_stages(Path(scratch), arguments.documents) if arguments.documents else {}
    result["dvc"] = {}
    for number in arguments.shards:
        with tempfile.TemporaryDirectory() as scratch:
            result["dvc"][number] = of_dvc(Path(scratch), number, arguments.shard_bytes)
    print(json.dumps(result))


def of_stages(place: Path, number: int) -> dict[str, dict[str, float]]:
    """Seconds, bytes written and peak memory in bytes of each data stage on `number` documents."""
    tokenizer = own_tokenizer(None, place / "tokenizer")
    write_documents(place / "raw.jsonl", number)
    told = {"download": [*download(place, "raw", count=True), "source=files"], **choices(place, tokenizer)}
    outs = {"download": "raw", "tokenize": "tokens", "group_texts": "blocks"}
    figures = {}
    for stage, overrides in told.items():
        seconds, peak = watched(stage, *overrides, root=ROOT)
        figures[stage] = {"seconds": round(seconds, 1), "bytes": size_of(place / outs[stage]), "peak_bytes": peak}
        print(
            f"{stage:12} {seconds:8.1f} s {figures[stage]['bytes'] / MIB:10,.0f} MiB written"
            f" {figures[stage]['peak_bytes'] / MIB:8,.0f} MiB of memory at most",
            flush=True,
        )
    ledgers = [json.loads(file.read_text()) for file in (place / "tokens").glob("*/stats.json")]
    tokens = sum(ledger["tokens"] for ledger in ledgers)
    print(
        f"{number:,} documents, {size_of(place / 'raw.jsonl') / MIB:,.0f} MiB of JSONL, {tokens:,} tokens", flush=True
    )
    return figures | {"corpus": {"bytes": size_of(place / "raw.jsonl"), "tokens": tokens}}


def size_of(path: Path) -> int:
    """Bytes of a file, or of those below a directory."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def of_dvc(place: Path, number: int, size: int) -> dict[str, float]:
    """Seconds that DVC takes over `number` shards of `size` bytes."""
    for command in (["git", "init", "--quiet"], ["dvc", "init", "--quiet"]):
        subprocess.run(command, cwd=place, check=True)
    (place / "empty").touch()
    (place / "out").mkdir()
    for index in range(number):
        (place / f"out/shard-{index:05d}.arrow").write_bytes(os.urandom(size))
    figures = {}
    for name, command in (("nothing", ["add", "empty"]), ("add", ["add", "out"]), ("status", ["status"])):
        started = time.perf_counter()
        subprocess.run(["dvc", *command, "--quiet"], cwd=place, check=True, stdout=subprocess.DEVNULL)
        figures[name] = round(time.perf_counter() - started, 2)
    rate = number * size / MIB / (figures["add"] - figures["nothing"])
    print(
        f"{number:5} shards of {size / MIB:.0f} MiB: dvc add {figures['add']:.1f} s ({rate:,.0f} MiB/s),"
        f" dvc status {figures['status']:.1f} s (dvc add of one empty file: {figures['nothing']:.1f} s)",
        flush=True,
    )
    return figures


if __name__ == "__main__":
    main()
