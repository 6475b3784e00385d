"""Measure the steps and seconds that kept checkpoints save, and kill trainings that continue from them.

Command python benchmarks/branches.py [--kills 20] [--seed 0]

All runs train the default causal model in a fresh clone of the last commit. First more and more epochs at a constant
learning rate, then three decays of warmup_stable_decay: each is trained once from the first step, and once with
checkpoints.keep_for_branches. Then a training of three epochs that continues from the end of the first epoch is killed
(SIGKILL to its process group) at random moments, several times in each of several runs.
The last line printed is one JSON object: rows, kills, identical.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KILLS_PER_RUN = 4
CONSTANT = ["++trainer.lr_scheduler_type=constant_with_warmup", "++trainer.warmup_steps=30"]
STABLE = ["num_train_epochs=4", "++trainer.lr_scheduler_type=warmup_stable_decay", "++trainer.warmup_steps=30"]
RUNS = {f"constant, {epochs} epochs": [*CONSTANT, f"num_train_epochs={epochs}"] for epochs in (1, 2, 3, 4)} | {
    f"decay {kind}": [*STABLE, f"++trainer.lr_scheduler_kwargs={{num_decay_steps: 120, decay_type: {kind}}}"]
    for kind in ("linear", "cosine", "1-sqrt")
}
KEEP = "checkpoints.keep_for_branches={every_steps: null, gigabytes: 10.0, directory: null}"
OFTEN = ["++trainer.save_strategy=steps", "++trainer.save_steps=20"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        project = Path(scratch, "project")
        subprocess.run(["git", "clone", "-q", ROOT, project], check=True)
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        dvc = ["dvc", "repro", "-q", "group_texts@causal"]
        subprocess.run(dvc, cwd=project, env={**os.environ, "PATH": path}, check=True)
        rows = [measure_run(project, Path(scratch), name) for name in RUNS]
        killed, identical = kill_runs(project, Path(scratch), arguments.kills, random.Random(arguments.seed))
    print(json.dumps({"rows": rows, "kills": killed, "identical": identical}))


def measure_run(project: Path, scratch: Path, name: str) -> dict[str, object]:
    """Train from the first step and from a kept checkpoint, print a row of the table, and return it."""
    more, number = RUNS[name], list(RUNS).index(name)
    fresh, branch = scratch / f"fresh-{number}", scratch / f"branch-{number}"
    fresh_seconds, _ = train(project, fresh, fresh / "cache", more)
    branch_seconds, log = train(project, branch, scratch / "shared", [*more, KEEP])
    shared = [line.split()[3] for line in log.splitlines() if "taken from a kept checkpoint" in line]
    row = {
        "run": name,
        "steps": json.loads((fresh / "report/stats.json").read_text(encoding="utf-8"))["steps"],
        "shared": int(shared[0]) if shared else 0,
        "fresh_seconds": round(fresh_seconds, 1),
        "branch_seconds": round(branch_seconds, 1),
        "identical": read_outs(fresh) == read_outs(branch),
    }
    print(" | ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return row


def kill_runs(project: Path, scratch: Path, kills: int, rng: random.Random) -> tuple[int, int]:
    """Kill trainings that continue from the first epoch; return the numbers of kills, and of those without effect."""
    first, three = [*CONSTANT, *OFTEN, "num_train_epochs=1"], [*CONSTANT, *OFTEN, "num_train_epochs=3"]
    train(project, scratch / "first", scratch / "kept", [*first, KEEP])
    train(project, scratch / "whole", scratch / "whole/cache", three)
    shutil.copytree(scratch / "kept", scratch / "timed")
    seconds, _ = train(project, scratch / "timed-outs", scratch / "timed", [*three, KEEP])
    killed = identical = 0
    while killed < kills:
        out, cache, kills_of_run = scratch / f"killed-{killed}", scratch / f"cache-{killed}", 0
        shutil.copytree(scratch / "kept", cache)
        while kills_of_run < min(KILLS_PER_RUN, kills - killed):
            process, started = start_training(project, out, cache, [*three, KEEP]), time.monotonic()
            try:
                process.communicate(timeout=rng.uniform(0.3, 1.0) * seconds)
                seconds = time.monotonic() - started  # the speed of the machine may vary
                shutil.rmtree(out)  # it finished before the kill: start over, so that every kill counts
                shutil.rmtree(cache)
                shutil.copytree(scratch / "kept", cache)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                kills_of_run += 1
        train(project, out, cache, [*three, KEEP])
        is_identical = read_outs(out) == read_outs(scratch / "whole")
        killed, identical = killed + kills_of_run, identical + is_identical * kills_of_run
        print(f"{kills_of_run} kills: {'identical' if is_identical else 'DIFFERENT'}", flush=True)
    return killed, identical


def train(project: Path, out: Path, cache: Path, more: list[str]) -> tuple[float, str]:
    """Train to the end; return the seconds and the log."""
    started = time.monotonic()
    process = start_training(project, out, cache, more)
    _, log = process.communicate()
    if process.returncode:
        sys.exit(log)
    return time.monotonic() - started, log


def start_training(project: Path, out: Path, cache: Path, more: list[str]) -> "subprocess.Popen[str]":
    """Start a training in a process group of its own."""
    command = [sys.executable, "-m", "stages.train", "task=causal", f"out={out}/model", f"report={out}/report", *more]
    environment = {**os.environ, "LM_REPRO_CACHE": str(cache)}
    return subprocess.Popen(
        command, cwd=project, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def read_outs(out: Path) -> dict[str, bytes]:
    """Map the path of each written file to its content."""
    files = [file for part in ("model", "report") for file in sorted((out / part).rglob("*")) if file.is_file()]
    return {file.relative_to(out).as_posix(): file.read_bytes() for file in files}


if __name__ == "__main__":
    main()
