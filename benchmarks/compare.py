"""Seconds that `make compare` and `make report` take with many experiments.

Command: python -m benchmarks.compare [--experiments 20] [--rounds 5]

A clone of HEAD in a temporary directory runs the default pipeline once. Each experiment is then saved (`dvc exp save`)
with a different learning rate and with noise added to its document scores. The tools read the same files as after real
trainings, but twenty trainings would take an hour. The last line printed is one JSON object.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--experiments", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        clone = Path(scratch) / "clone"
        run_command(ROOT, "git", "clone", "--quiet", str(ROOT), str(clone))
        run_command(clone, "dvc", "repro", "--quiet")
        run_command(clone, "git", "commit", "--quiet", "--all", "--allow-empty", "--message", "baseline")
        for number in range(arguments.experiments):
            save_experiment(clone, number)
        seconds = {tool: time_tool(clone, tool, arguments.rounds) for tool in ("compare", "report")}
    for tool, runs in seconds.items():
        print(f"{tool:10} {statistics.median(runs):6.2f} s (median of {len(runs)}, {min(runs):.2f} to {max(runs):.2f})")
    medians = {f"{tool}_seconds": round(statistics.median(runs), 2) for tool, runs in seconds.items()}
    print(json.dumps({"experiments": arguments.experiments, **medians}))


def run_command(directory: Path, *command: str) -> str:
    """Run `command` in `directory` with an empty checkpoint cache and return its standard output."""
    environment = os.environ | {"LM_REPRO_CACHE": str(directory / ".lm-repro_cache")}
    completed = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    if completed.returncode:
        sys.exit(f"{' '.join(command)} ended with {completed.returncode}:\n{completed.stderr}")
    return completed.stdout


def save_experiment(clone: Path, number: int) -> None:
    """Save an experiment based on the clone's baseline commit, then restore the workspace to that commit."""
    params = clone / "params.yaml"
    rate = f"learning_rate: {0.002 + 1e-5 * (number + 1):.5f}"
    params.write_text(params.read_text(encoding="utf-8").replace("learning_rate: 0.002", rate, 1), encoding="utf-8")
    rng = np.random.default_rng(number)
    for split in ("validation", "test"):
        file = clone / f"reports/evaluate/causal/{split}.parquet"
        table = pq.read_table(file)
        bits = np.array(table.column("bits_after"))
        bits = bits * (1 + rng.normal(0.001 * (number - 10), 0.01, len(bits)))
        column = table.schema.get_field_index("bits_after")
        file.unlink()  # it may be a link: writing through it would change DVC's cache
        pq.write_table(table.set_column(column, "bits_after", pa.array(bits)), file)
    run_command(clone, "dvc", "commit", "--quiet", "--force", "train@causal", "evaluate@causal")
    run_command(clone, "dvc", "exp", "save", "--quiet", "--name", f"rate-{number}")
    run_command(clone, "git", "reset", "--quiet", "--hard")
    run_command(clone, "dvc", "checkout", "--quiet", "--force")


def time_tool(clone: Path, tool: str, rounds: int) -> list[float]:
    """Return the seconds of each run of a tool, without the first run, which fills caches."""
    seconds = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        printed = run_command(clone, sys.executable, "-m", f"tools.{tool}")
        seconds.append(time.perf_counter() - started)
    print(printed, flush=True)
    return seconds[1:]


if __name__ == "__main__":
    main()
