"""Memory of training steps with a vocabulary of 50,257 words, by the pipeline and by the guide's script, both in fp32.

Command python -m benchmarks.memory [--batch-size 16] [--block-size 512]

Peak memory of a process that trains DistilGPT2's or DistilRoBERTa's shape (benchmarks/training.py), what Python, torch
and the optimizer take included. The last line printed is one JSON object: case, ours_peak_rss_bytes,
guide_peak_rss_bytes and ratio of each.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.training import REPORT, ROOT, parse, write_blocks

CASES = {
    "causal": ("distilgpt2", []),
    "mlm": ("distilroberta", []),
    "causal, gradient checkpointing": ("distilgpt2", ["--gradient-checkpointing"]),
}


def main() -> None:
    given = ["--batch-size", "16", "--block-size", "512", "--steps", "2", *sys.argv[1:]]  # a later one counts
    result, guide = {}, {}
    for case, (shape, more) in CASES.items():
        if shape not in guide:
            guide[shape] = peak("guide", shape, given)
        ours = peak("ours", shape, [*given, *more])
        result[case] = {"ours_peak_rss_bytes": ours, "guide_peak_rss_bytes": guide[shape], "ratio": ours / guide[shape]}
        print(f"{case}: {ours / 2**30:.2f} GiB, the guide's {guide[shape] / 2**30:.2f} GiB")
    print(json.dumps(result))


def peak(side: str, shape: str, options: list[str]) -> int:
    """Bytes at most in memory of one side, alone."""
    with tempfile.TemporaryDirectory() as scratch:
        write_blocks(parse(["--shape", shape, *options]), Path(scratch))
        command = [sys.executable, "-m", "benchmarks.training", "--shape", shape, *options]
        command += ["--side", side, "--scratch", scratch]
        output = subprocess.run(
            command, input="\n" * 1000, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT
        ).stdout
    report = next(line for line in output.splitlines() if line.startswith(REPORT))
    return int(json.loads(report.removeprefix(REPORT))["peak_rss_bytes"])


if __name__ == "__main__":
    main()
