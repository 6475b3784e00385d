"""Memory of fp32 training with the pipeline and with the guide's script, for a vocabulary of 50,257 tokens.

Command python -m benchmarks.memory [--batch-size 16] [--block-size 512]

The figures are the peak memory of a process that trains DistilGPT2's or DistilRoBERTa's shape (benchmarks/training.py),
including Python, torch and the optimizer. The last line printed is one JSON object that maps each case to
ours_peak_rss_bytes, guide_peak_rss_bytes and ratio.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.training import REPORT_PREFIX, ROOT, parse_arguments, write_blocks

CASES = {
    "causal": ("distilgpt2", []),
    "mlm": ("distilroberta", []),
    "causal, gradient checkpointing": ("distilgpt2", ["--gradient-checkpointing"]),
}


def main() -> None:
    options = [
        "--batch-size",
        "16",
        "--block-size",
        "512",
        "--steps",
        "2",
        *sys.argv[1:],
    ]  # options of the command line override these
    result, guide_bytes = {}, {}
    for case, (shape, case_options) in CASES.items():
        if shape not in guide_bytes:
            guide_bytes[shape] = measure_peak_bytes("guide", shape, options)
        our_bytes = measure_peak_bytes("ours", shape, [*options, *case_options])
        result[case] = {
            "ours_peak_rss_bytes": our_bytes,
            "guide_peak_rss_bytes": guide_bytes[shape],
            "ratio": our_bytes / guide_bytes[shape],
        }
        print(f"{case}: {our_bytes / 2**30:.2f} GiB, the guide's {guide_bytes[shape] / 2**30:.2f} GiB")
    print(json.dumps(result))


def measure_peak_bytes(side: str, shape: str, options: list[str]) -> int:
    """Train one side in its own process and return its peak memory in bytes."""
    with tempfile.TemporaryDirectory() as scratch:
        write_blocks(parse_arguments(["--shape", shape, *options]), Path(scratch))
        command = [sys.executable, "-m", "benchmarks.training", "--shape", shape, *options]
        command += ["--side", side, "--scratch", scratch]
        output = subprocess.run(
            command, input="\n" * 1000, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT
        ).stdout
    report = next(line for line in output.splitlines() if line.startswith(REPORT_PREFIX))
    return int(json.loads(report.removeprefix(REPORT_PREFIX))["peak_rss_bytes"])


if __name__ == "__main__":
    main()
