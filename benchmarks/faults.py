"""Kill `dvc repro` repeatedly and check that it ends with the dvc.lock of an undisturbed run.

Command python benchmarks/faults.py [--kills 40] [--seed 0] [--full]

All runs are in fresh clones of the last commit. One `dvc repro` is undisturbed. The others are killed at random moments
and restarted, several times each, until --kills is reached. The signals alternate: SIGKILL to the process group (a
power failure), SIGTERM to dvc only, and SIGHUP to the group (a closed terminal). Unless --full is given, training is
reduced to one epoch with a checkpoint every 20 steps, and evaluation to a few documents. The cost of a kill is the
extra time of a disturbed run divided by its number of kills.
The last line printed is one JSON object: kills, identical, seconds_lost_median.
"""

import argparse
import itertools
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
KILLS_PER_RUN = 8
KILL_METHODS = {
    "SIGKILL to all": (os.killpg, signal.SIGKILL),
    "SIGTERM to dvc": (os.kill, signal.SIGTERM),
    "SIGHUP to all": (os.killpg, signal.SIGHUP),
}
REDUCTIONS = {
    "params.yaml": [(r"num_train_epochs: .*", "num_train_epochs: 1")],
    "conf/task/causal.yaml": [(r"max_documents: null", "max_documents: 4")],
    "conf/task/mlm.yaml": [(r"max_documents: null", "max_documents: 4")],
    "conf/hardware/cpu.yaml": [(r"trainer:\n", "trainer:\n  save_strategy: steps\n  save_steps: 20\n")],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--full", action="store_true", help="the default run, with full training and evaluation")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as scratch:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "LM_REPRO_CACHE": f"{scratch}/cache"}
        project = clone_project(Path(scratch) / "undisturbed", arguments.full)
        started = time.monotonic()
        run_repro(project, environment)
        undisturbed_seconds = time.monotonic() - started
        lock = (project / "dvc.lock").read_bytes()
        print(f"undisturbed: {undisturbed_seconds:.1f} s", flush=True)
        identical, lost_seconds, kills_by_stage = 0, list[float](), Counter[str]()
        methods = itertools.cycle(KILL_METHODS)
        for first in range(0, arguments.kills, KILLS_PER_RUN):
            delays = [
                rng.uniform(0.5, undisturbed_seconds / 3)
                for _ in range(first, min(first + KILLS_PER_RUN, arguments.kills))
            ]
            project = clone_project(Path(scratch) / f"disturbed-{first}", arguments.full)
            started = time.monotonic()
            for delay, method in zip(delays, methods, strict=False):
                stage = run_repro(project, environment, delay, method)
                while stage is None:  # it finished before the kill: start over, so that every kill counts
                    subprocess.run(["git", "clean", "-qfdx"], cwd=project, check=True)
                    stage = run_repro(project, environment, delay, method)
                kills_by_stage[f"{stage} ({method})"] += 1
            run_repro(project, environment)
            lost_seconds.append((time.monotonic() - started - undisturbed_seconds) / len(delays))
            is_identical = (project / "dvc.lock").read_bytes() == lock
            identical += len(delays) * is_identical
            comparison = "identical" if is_identical else "DIFFERENT"
            print(f"{len(delays)} kills: {comparison}, {lost_seconds[-1]:.1f} s lost per kill", flush=True)
    print("killed in:", ", ".join(f"{stage} {count}" for stage, count in kills_by_stage.most_common()))
    result = {
        "kills": arguments.kills,
        "identical": identical,
        "seconds_lost_median": round(statistics.median(lost_seconds), 1),
    }
    print(json.dumps(result))


def clone_project(project: Path, full: bool) -> Path:
    """Clone the last commit, without any outputs, and return the clone's directory."""
    subprocess.run(["git", "clone", "-q", str(ROOT), str(project)], check=True)
    for name, changes in ({} if full else REDUCTIONS).items():
        text = (project / name).read_text(encoding="utf-8")
        for pattern, new in changes:
            text = re.sub(pattern, new, text)
        (project / name).write_text(text, encoding="utf-8")
    return project


def run_repro(
    project: Path, environment: dict[str, str], seconds: float | None = None, method: str = "SIGKILL to all"
) -> str | None:
    """Run `dvc repro` and kill it after `seconds`; return the stage that was running, or None if it had finished."""
    log = project / "repro.log"
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            ["dvc", "repro"], cwd=project, env=environment, stdout=output, stderr=output, start_new_session=True
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            children = psutil.Process(process.pid).children(recursive=True)
            send, number = KILL_METHODS[method]
            send(process.pid, number)
            process.wait()
            _, alive = psutil.wait_procs(children, timeout=120)  # twice the grace
            if alive:
                sys.exit(f"{method}: dvc is gone and {alive} still run")
            running = re.findall(r"Running stage '(\S+)'", log.read_text(encoding="utf-8"))
            return running[-1] if running else "dvc itself"
    output_text = log.read_text(encoding="utf-8")
    if code and "dvc.lock" in output_text:  # killed while DVC wrote it; remedy of docs/troubleshooting.md
        print("dvc.lock was cut short by a kill: restored", flush=True)
        subprocess.run(["git", "restore", "dvc.lock"], cwd=project, check=True)
        return run_repro(project, environment, seconds, method)
    if code and "rwlock" in output_text:  # also killed during a write
        print(".dvc/tmp/rwlock was cut short by a kill: removed", flush=True)
        (project / ".dvc/tmp/rwlock").unlink()
        return run_repro(project, environment, seconds, method)
    if code:
        sys.exit(f"dvc repro failed:\n{output_text}")
    return None


if __name__ == "__main__":
    main()
