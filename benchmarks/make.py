"""Where the seconds of the default run go: by stage, and in each by import and work.

Command: python -m benchmarks.make    (a clone of HEAD in a temporary directory runs `dvc repro`)

Imports are what `python -X importtime` adds up in the stage's process; work is the rest of the stage's time: DVC's own,
the start of Python, and what the stage is for. The last line is one JSON object.
"""

import json
import os
import re
import subprocess
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
IMPORT = re.compile(r"import time:\s+(\d+) \|")  # microseconds of one module, without those that it imports
STAGE = re.compile(r"Running stage '(.+)':")
PROPER = ("baseline", "train", "evaluate")
START = "dvc"  # before the first stage, DVC's own imports included


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        clone = Path(scratch) / "clone"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        seconds, imports = timed_repro(clone, Path(scratch) / "cache")
    total = sum(seconds.values())
    print(f"{'stage':20} {'seconds':>8} {'imports':>8} {'work':>8}")
    for stage, wall in seconds.items():
        print(f"{stage:20} {wall:8.1f} {imports[stage]:8.1f} {wall - imports[stage]:8.1f}")
    proper = sum(wall - imports[stage] for stage, wall in seconds.items() if stage.startswith(PROPER))
    print(f"{'total':20} {total:8.1f} {sum(imports.values()):8.1f} {total - sum(imports.values()):8.1f}")
    print(json.dumps({"seconds": total, "imports": sum(imports.values()), "training_and_evaluation": proper}))


def timed_repro(clone: Path, cache: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Stage to its seconds and to those of its imports, of a `dvc repro` in which everything runs."""
    env = os.environ | {"PYTHONPROFILEIMPORTTIME": "1", "LM_REPRO_CACHE": str(cache), "PYTHONUNBUFFERED": "1"}
    seconds, imports, stage = {START: 0.0}, {START: 0.0}, START
    began = time.perf_counter()
    with subprocess.Popen(
        ["dvc", "repro"], cwd=clone, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if found := IMPORT.match(line):
                imports[stage] += int(found[1]) / 1e6
            elif named := STAGE.search(line):
                now = time.perf_counter()
                seconds[stage] += now - began
                stage, began = named[1], now
                seconds[stage] = imports[stage] = 0.0
    seconds[stage] += time.perf_counter() - began
    if process.returncode:
        raise SystemExit(f"dvc repro ended with {process.returncode}")
    return seconds, imports


if __name__ == "__main__":
    main()
