"""Processor time of the imports of train and evaluate on a CPU, with and without the lean import.

Command python -m benchmarks.imports [--rounds 5]

`lean` imports as the stages do (stages/model/lean_import.py); `whole` runs the same imports without it. They alternate,
each in a new process. The figures are medians of the process's user and system time, including Python's start-up. The
last line printed is one JSON object.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEAN = """
from stages.model.hardware import Hardware
from stages.model.lean_import import import_lean
import_lean(Hardware(device="cpu", num_threads=2, per_device_batch_size=None, evaluate_batch_tokens=1){more})
"""
# Stage to its import statement and its extra arguments of import_lean.
STAGE_IMPORTS = {
    "evaluate": (
        "import stages.evaluate.stage, stages.figures.metrics, stages.figures.samples, stages.model.models",
        "",
    ),
    "train": (
        "import stages.train.stage, stages.frameworks.trainer, stages.model.models, transformers",
        ", trainer=True",
    ),
}
MODEL_IMPORT = "import transformers.models.gpt2.modeling_gpt2"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    programs = {(stage, "whole"): f"{imports}\n{MODEL_IMPORT}" for stage, (imports, _) in STAGE_IMPORTS.items()}
    programs |= {
        (stage, "lean"): f"{LEAN.format(more=more)}\n{imports}\n{MODEL_IMPORT}"
        for stage, (imports, more) in STAGE_IMPORTS.items()
    }
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in programs}
    for _ in range(rounds):
        for key, program in programs.items():
            seconds[key].append(measure_processor_seconds(program))
    result = {}
    for stage in STAGE_IMPORTS:
        whole, lean = (statistics.median(seconds[stage, kind]) for kind in ("whole", "lean"))
        result[stage] = {"whole_seconds": whole, "lean_seconds": lean, "ratio": round(lean / whole, 3)}
        print(f"{stage:10} whole {whole:5.2f} s   lean {lean:5.2f} s   {lean / whole:.2f}")
    print(json.dumps(result))


def measure_processor_seconds(program: str) -> float:
    """Run `program` in a new process and return its user and system time in seconds."""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"ended with {os.waitstatus_to_exitcode(status)}: {program}")
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
