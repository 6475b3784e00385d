"""Processor time of the imports of the stages that run a model, in one process on a CPU, and whole.

Command python -m benchmarks.imports [--rounds 5]

`lean` is what the stages do (stages/model/lean_import.py), `whole` the same imports without it. Both take turns, each
in a process of its own: user and system time of the process, Python's start included, medians. The last line printed is
one JSON object.
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
# What a stage imports, and how it calls import_lean.
STAGES = {
    "evaluate": (
        "import stages.evaluate.stage, stages.figures.metrics, stages.figures.samples, stages.model.models",
        "",
    ),
    "train": (
        "import stages.train.stage, stages.frameworks.trainer, stages.model.models, transformers",
        ", trainer=True",
    ),
}
MODEL = "import transformers.models.gpt2.modeling_gpt2"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    programs = {(stage, "whole"): f"{imports}\n{MODEL}" for stage, (imports, _) in STAGES.items()}
    programs |= {
        (stage, "lean"): f"{LEAN.format(more=more)}\n{imports}\n{MODEL}" for stage, (imports, more) in STAGES.items()
    }
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in programs}
    for _ in range(rounds):
        for key, program in programs.items():
            seconds[key].append(processor_seconds(program))
    result = {}
    for stage in STAGES:
        whole, lean = (statistics.median(seconds[stage, kind]) for kind in ("whole", "lean"))
        result[stage] = {"whole_seconds": whole, "lean_seconds": lean, "ratio": round(lean / whole, 3)}
        print(f"{stage:10} whole {whole:5.2f} s   lean {lean:5.2f} s   {lean / whole:.2f}")
    print(json.dumps(result))


def processor_seconds(program: str) -> float:
    """User and system time of a process that runs `program`."""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"ended with {os.waitstatus_to_exitcode(status)}: {program}")
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
