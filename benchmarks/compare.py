"""How long `make compare` and `make report` take with many experiments.

Command: python -m benchmarks.compare [--experiments 20] [--rounds 5]

A clone of HEAD in a temporary directory runs the default pipeline once. Each experiment is then saved (`dvc exp save`)
with a learning rate of its own and with its scores of documents changed by noise: what the tools read of experiments is
as after a training, without the hour that twenty would take. The last line is one JSON object.
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
        run(ROOT, "git", "clone", "--quiet", str(ROOT), str(clone))
        run(clone, "dvc", "repro", "--quiet")
        run(clone, "git", "commit", "--quiet", "--all", "--allow-empty", "--message", "baseline")
        for number in range(arguments.experiments):
            save_experiment(clone, number)
        seconds = {tool: time_tool(clone, tool, arguments.rounds) for tool in ("compare", "report")}
    for tool, runs in seconds.items():
        print(f"{tool:10} {statistics.median(runs):6.2f} s (median of {len(runs)}, {min(runs):.2f} to {max(runs):.2f})")
    medians = {f"{tool}_seconds": round(statistics.median(runs), 2) for tool, runs in seconds.items()}
    print(json.dumps({"experiments": arguments.experiments, **medians}))


def run(directory: Path, *command: str) -> str:
    """What `command` prints, run in `directory` without anyone's cache of checkpoints."""
    environment = os.environ | {"LM_REPRO_CACHE": str(directory / ".lm-repro_cache")}
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    return done.stdout


def save_experiment(clone: Path, number: int) -> None:
    """Save an experiment on the clone's baseline, and bring the workspace back to it."""
    params = clone / "params.yaml"
    rate = f"learning_rate: {0.002 + 1e-5 * (number + 1):.5f}"
    params.write_text(params.read_text(encoding="utf-8").replace("learning_rate: 0.002", rate, 1), encoding="utf-8")
    chance = np.random.default_rng(number)
    for split in ("validation", "test"):
        file = clone / f"reports/evaluate/causal/{split}.parquet"
        table = pq.read_table(file)
        bits = np.array(table.column("bits_after"))
        bits = bits * (1 + chance.normal(0.001 * (number - 10), 0.01, len(bits)))
        place = table.schema.get_field_index("bits_after")
        file.unlink()  # a link into the cache stays as it is
        pq.write_table(table.set_column(place, "bits_after", pa.array(bits)), file)
    run(clone, "dvc", "commit", "--quiet", "--force", "train@causal", "evaluate@causal")
    run(clone, "dvc", "exp", "save", "--quiet", "--name", f"rate-{number}")
    run(clone, "git", "reset", "--quiet", "--hard")
    run(clone, "dvc", "checkout", "--quiet", "--force")


def time_tool(clone: Path, tool: str, rounds: int) -> list[float]:
    """Seconds of each run of a tool, the first, which fills caches, left out."""
    seconds = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        shown = run(clone, sys.executable, "-m", f"tools.{tool}")
        seconds.append(time.perf_counter() - started)
    print(shown, flush=True)
    return seconds[1:]


if __name__ == "__main__":
    main()
