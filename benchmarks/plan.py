"""Error of `make plan` in memory and time: each stage is planned and then run.

Command python -m benchmarks.plan [--cases tiny-gpt2 distilgpt2 ...] [--rounds 3] [--text-megabytes 0.25]

A case is a model configuration in a clone of this repository. Its tokenizer is trained on a text of random words. The
distil cases train the shapes and vocabulary sizes of DistilGPT2 and DistilRoBERTa (benchmarks/training.py) from
scratch. Each round plans baseline, train and evaluate as `make plan` does and then runs them, so that changes of the
machine's speed affect both. An error is planned / actual - 1. The first figure is that of the medians over the rounds;
the one in brackets is the largest error of a round. The last line printed is one JSON object.
"""

import argparse
import dataclasses
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.training import ROOT, SHAPES, TINY
from tools.plan import PLANNED, plan_task

WORDS = 60_000  # more than the largest vocabulary, so that the tokenizer fills it
WORDS_PER_TEXT = 300
PLAN_PREFIX = "plan "  # of the output line with the plan


@dataclasses.dataclass
class Measurement:
    """Planned and actual cost of a stage in one round."""

    planned_seconds: float
    planned_bytes: int
    seconds: float
    bytes: int


def main() -> None:
    arguments = parse_arguments()
    if arguments.task:  # in a clone
        print_plan(arguments.task)
        return
    result: dict[str, Any] = {}
    for case in arguments.cases:
        with tempfile.TemporaryDirectory() as scratch:
            project = make_project(case, Path(scratch) / "project", arguments.text_megabytes)
            rounds = [measure_stages(project, SHAPES[case][0]) for _ in range(arguments.rounds)]
        for stage in PLANNED:
            result[f"{case} {stage}"] = line = summarize_rounds([measured[stage] for measured in rounds])
            print(f"{case:14} {stage:9} " + "  ".join(f"{key} {value}" for key, value in line.items()), flush=True)
    print(json.dumps(result))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--cases", nargs="+", choices=tuple(SHAPES), default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--text-megabytes", type=float, default=0.25)
    parser.add_argument("--task", help=argparse.SUPPRESS)
    return parser.parse_args()


def print_plan(task: str) -> None:
    """Plan the stages of `task` in the current directory and print their seconds and peak bytes."""
    with tempfile.TemporaryDirectory() as scratch:
        rows = list(plan_task(task, PLANNED, Path(scratch)))
    costs = {name.partition("@")[0]: cost for name, _, cost in rows if cost is not None}
    print(PLAN_PREFIX + json.dumps({name: [cost.seconds, cost.peak_bytes] for name, cost in costs.items()}))


def summarize_rounds(rounds: list[Measurement]) -> dict[str, str]:
    """Return the actual cost of a stage and the errors of its plan, formatted for the table."""
    seconds = [one.seconds for one in rounds]
    peak_bytes = [one.bytes for one in rounds]
    return {
        "time": f"{statistics.median(seconds):.1f} s",
        "time_error": format_deviation([one.planned_seconds for one in rounds], seconds),
        "memory": f"{statistics.median(peak_bytes) / 1e9:.2f} GB",
        "memory_error": format_deviation([one.planned_bytes for one in rounds], peak_bytes),
    }


def format_deviation(planned: Sequence[float], actual: Sequence[float]) -> str:
    """Return the error of the medians and, in brackets, the largest error of a round."""
    errors = [one / other - 1 for one, other in zip(planned, actual, strict=True)]
    median_error = statistics.median(planned) / statistics.median(actual) - 1
    return f"{median_error:+.0%} ({max(errors, key=abs):+.0%})"


# -- a case ------------------------------------------------------------------------------------------------------------


def make_project(case: str, project: Path, megabytes: float) -> Path:
    """Clone this repository, configure the model of `case` for its task, and run the data stages."""
    subprocess.run(["git", "clone", "-q", str(ROOT), str(project)], check=True)
    task, batch_size, vocab_size, shape = SHAPES[case]
    write_text(project / "text.jsonl", megabytes)
    params = yaml.safe_load((project / "params.yaml").read_text(encoding="utf-8"))
    params["data"] = {"name": "files", "path": "text.jsonl"}
    params["tasks"] = {task: {**params["tasks"][task], "model": "case", "batch_size": batch_size}}
    if shape:
        params["tasks"][task]["num_train_epochs"] = 1
    write_yaml(project / "params.yaml", params)
    model = yaml.safe_load((project / f"conf/model/{TINY[task]}.yaml").read_text(encoding="utf-8"))
    model["config"] |= shape
    model["tokenizer"]["train"]["vocab_size"] = vocab_size
    write_yaml(project / "conf/model/case.yaml", model)
    environment = {**os.environ, "LM_REPRO_CACHE": str(project / "cache")}
    subprocess.run(["dvc", "repro", "-q", f"group_texts@{task}"], cwd=project, check=True, env=environment)
    return project


def write_text(file: Path, megabytes: float) -> None:
    """Write records of random words in ELI5's schema."""
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(WORDS)]
    with file.open("w", encoding="utf-8") as lines:
        while lines.tell() < megabytes * 1e6:
            texts = [" ".join(rng.choices(words, k=rng.randint(10, WORDS_PER_TEXT))) for _ in range(2)]
            lines.write(json.dumps({"title": " ".join(rng.choices(words, k=8)), "answers": {"text": texts}}) + "\n")


def write_yaml(file: Path, value: Any) -> None:
    file.write_text(yaml.safe_dump(value, sort_keys=False), encoding="utf-8")


def measure_stages(project: Path, task: str) -> dict[str, Measurement]:
    """Plan and then run each stage of `task`; return its measurement by stage."""
    environment = {**os.environ, "LM_REPRO_CACHE": str(project / "cache")}
    command = [sys.executable, "-m", "benchmarks.plan", "--task", task]
    output = subprocess.run(command, cwd=project, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    plan = json.loads(
        next(line for line in output.splitlines() if line.startswith(PLAN_PREFIX)).removeprefix(PLAN_PREFIX)
    )
    measurements = {}
    for stage in PLANNED:
        started = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", f"stages.{stage}", f"task={task}"],
            cwd=project,
            env=environment,
            stderr=subprocess.DEVNULL,
        )
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"{stage} failed in {project}")
        seconds, (planned_seconds, planned_bytes) = time.monotonic() - started, plan[stage]
        measurements[stage] = Measurement(planned_seconds, planned_bytes, seconds, usage.ru_maxrss * 1024)
    return measurements


if __name__ == "__main__":
    main()
