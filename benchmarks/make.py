"""Seconds of each stage of the default run, divided into imports and work.

Command: python -m benchmarks.make    (a clone of HEAD in a temporary directory runs `dvc repro`)

Imports are the sum of the times that `python -X importtime` reports in the stage's process. Work is the rest of the
stage's time: DVC, the start of Python, and the stage itself. The last line printed is one JSON object.
"""

import json
import os
import re
import subprocess
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
IMPORT_LINE = re.compile(r"import time:\s+(\d+) \|")  # microseconds of one module, without its own imports
STAGE_LINE = re.compile(r"Running stage '(.+)':")
MODEL_STAGES = ("baseline", "train", "evaluate")
START = "dvc"  # the time before the first stage, including DVC's imports


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        clone = Path(scratch) / "clone"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        seconds, imports = time_repro(clone, Path(scratch) / "cache")
    total = sum(seconds.values())
    print(f"{'stage':20} {'seconds':>8} {'imports':>8} {'work':>8}")
    for stage, wall in seconds.items():
        print(f"{stage:20} {wall:8.1f} {imports[stage]:8.1f} {wall - imports[stage]:8.1f}")
    proper = sum(wall - imports[stage] for stage, wall in seconds.items() if stage.startswith(MODEL_STAGES))
    print(f"{'total':20} {total:8.1f} {sum(imports.values()):8.1f} {total - sum(imports.values()):8.1f}")
    print(json.dumps({"seconds": total, "imports": sum(imports.values()), "training_and_evaluation": proper}))


def time_repro(clone: Path, cache: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Run `dvc repro` from scratch; return each stage's seconds and the seconds of its imports."""
    env = os.environ | {"PYTHONPROFILEIMPORTTIME": "1", "LM_REPRO_CACHE": str(cache), "PYTHONUNBUFFERED": "1"}
    seconds, imports, stage = {START: 0.0}, {START: 0.0}, START
    began = time.perf_counter()
    with subprocess.Popen(
        ["dvc", "repro"], cwd=clone, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if found := IMPORT_LINE.match(line):
                imports[stage] += int(found[1]) / 1e6
            elif started_stage := STAGE_LINE.search(line):
                now = time.perf_counter()
                seconds[stage] += now - began
                stage, began = started_stage[1], now
                seconds[stage] = imports[stage] = 0.0
    seconds[stage] += time.perf_counter() - began
    if process.returncode:
        raise SystemExit(f"dvc repro ended with {process.returncode}")
    return seconds, imports


if __name__ == "__main__":
    main()
