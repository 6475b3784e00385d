"""Kill `dvc repro` again and again, and see that it ends with the dvc.lock of an undisturbed run.

Command python benchmarks/faults.py [--kills 40] [--seed 0] [--full]

In fresh clones of the last commit: one `dvc repro` is left alone; the others are ended at random moments (a few in
each, until --kills are done) and started again each time, in turn by SIGKILL to the process group (a power failure),
SIGTERM to dvc only, and SIGHUP to the group (a closed terminal). Training is cut to one epoch with a checkpoint every
20 steps, and evaluation to a few documents, unless --full asks for the default run. What a kill costs is the time that
a disturbed run takes more than the undisturbed one, by the number of its kills.
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
KILLS_IN_A_RUN = 8
WAYS = {
    "SIGKILL to all": (os.killpg, signal.SIGKILL),
    "SIGTERM to dvc": (os.kill, signal.SIGTERM),
    "SIGHUP to all": (os.killpg, signal.SIGHUP),
}
CUT = {
    "params.yaml": [(r"num_train_epochs: .*", "num_train_epochs: 1")],
    "conf/task/causal.yaml": [(r"max_documents: null", "max_documents: 4")],
    "conf/task/mlm.yaml": [(r"max_documents: null", "max_documents: 4")],
    "conf/hardware/cpu.yaml": [(r"trainer:\n", "trainer:\n  save_strategy: steps\n  save_steps: 20\n")],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--full", action="store_true", help="the default run, neither training nor evaluation cut")
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as scratch:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "LM_REPRO_CACHE": f"{scratch}/cache"}
        place = clone(Path(scratch) / "undisturbed", arguments.full)
        started = time.monotonic()
        repro(place, environment)
        alone = time.monotonic() - started
        lock = (place / "dvc.lock").read_bytes()
        print(f"undisturbed: {alone:.1f} s", flush=True)
        identical, lost, where = 0, list[float](), Counter[str]()
        ways = itertools.cycle(WAYS)
        for first in range(0, arguments.kills, KILLS_IN_A_RUN):
            moments = [
                chance.uniform(0.5, alone / 3) for _ in range(first, min(first + KILLS_IN_A_RUN, arguments.kills))
            ]
            place = clone(Path(scratch) / f"disturbed-{first}", arguments.full)
            started = time.monotonic()
            for moment, way in zip(moments, ways, strict=False):
                stage = repro(place, environment, moment, way)
                while stage is None:  # it was done before: begin again, so that every kill counts
                    subprocess.run(["git", "clean", "-qfdx"], cwd=place, check=True)
                    stage = repro(place, environment, moment, way)
                where[f"{stage} ({way})"] += 1
            repro(place, environment)
            lost.append((time.monotonic() - started - alone) / len(moments))
            same = (place / "dvc.lock").read_bytes() == lock
            identical += len(moments) * same
            print(
                f"{len(moments)} kills: {'identical' if same else 'DIFFERENT'}, {lost[-1]:.1f} s lost a kill",
                flush=True,
            )
    print("killed in:", ", ".join(f"{stage} {count}" for stage, count in where.most_common()))
    result = {
        "kills": arguments.kills,
        "identical": identical,
        "seconds_lost_median": round(statistics.median(lost), 1),
    }
    print(json.dumps(result))


def clone(place: Path, full: bool) -> Path:
    """A fresh clone of the last commit, with nothing computed."""
    subprocess.run(["git", "clone", "-q", str(ROOT), str(place)], check=True)
    for name, changes in ({} if full else CUT).items():
        text = (place / name).read_text(encoding="utf-8")
        for pattern, new in changes:
            text = re.sub(pattern, new, text)
        (place / name).write_text(text, encoding="utf-8")
    return place


def repro(
    place: Path, environment: dict[str, str], seconds: float | None = None, way: str = "SIGKILL to all"
) -> str | None:
    """Run `dvc repro` to its end, or end it after `seconds`: the stage that it was in, None if it had ended."""
    log = place / "repro.log"
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            ["dvc", "repro"], cwd=place, env=environment, stdout=output, stderr=output, start_new_session=True
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            family = psutil.Process(process.pid).children(recursive=True)
            send, number = WAYS[way]
            send(process.pid, number)
            process.wait()
            _, alive = psutil.wait_procs(family, timeout=120)  # twice the grace
            if alive:
                sys.exit(f"{way}: dvc is gone and {alive} still run")
            running = re.findall(r"Running stage '(\S+)'", log.read_text(encoding="utf-8"))
            return running[-1] if running else "dvc itself"
    said = log.read_text(encoding="utf-8")
    if code and "dvc.lock" in said:  # killed while DVC wrote it: as docs/troubleshooting.md says
        print("dvc.lock was cut short by a kill: restored", flush=True)
        subprocess.run(["git", "restore", "dvc.lock"], cwd=place, check=True)
        return repro(place, environment, seconds, way)
    if code and "rwlock" in said:  # the same
        print(".dvc/tmp/rwlock was cut short by a kill: removed", flush=True)
        (place / ".dvc/tmp/rwlock").unlink()
        return repro(place, environment, seconds, way)
    if code:
        sys.exit(f"dvc repro failed:\n{said}")
    return None


if __name__ == "__main__":
    main()
