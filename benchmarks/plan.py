"""How far `make plan` is off, in memory and time: each stage planned, then run.

Command python -m benchmarks.plan [--cases tiny-gpt2 distilgpt2 ...] [--rounds 3] [--text-megabytes 0.25]

A case is a model configuration in a clone of this repository, with a text of random words from which its tokenizer is
trained; the distil cases have the shapes of DistilGPT2 and DistilRoBERTa (benchmarks/training.py), from scratch, with
vocabularies of their size. In each round, baseline, train and evaluate are planned as `make plan` does it and then run,
so that a machine whose speed varies is the same for both. An error is planned / actual - 1: of the medians over the
rounds, and in brackets of the round that was furthest off. The last line printed is one JSON object.
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

WORDS = 60_000  # more than a vocabulary has, so that it is full
WORDS_PER_TEXT = 300
PLAN = "plan "  # what the line of a plan begins with


@dataclasses.dataclass
class Measured:
    """A stage in one round."""

    planned_seconds: float
    planned_bytes: int
    seconds: float
    bytes: int


def main() -> None:
    arguments = parse()
    if arguments.task:  # in a clone
        print_plan(arguments.task)
        return
    result: dict[str, Any] = {}
    for case in arguments.cases:
        with tempfile.TemporaryDirectory() as scratch:
            project = make_project(case, Path(scratch) / "project", arguments.text_megabytes)
            rounds = [measure(project, SHAPES[case][0]) for _ in range(arguments.rounds)]
        for stage in PLANNED:
            result[f"{case} {stage}"] = line = errors([measured[stage] for measured in rounds])
            print(f"{case:14} {stage:9} " + "  ".join(f"{key} {value}" for key, value in line.items()), flush=True)
    print(json.dumps(result))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--cases", nargs="+", choices=tuple(SHAPES), default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--text-megabytes", type=float, default=0.25)
    parser.add_argument("--task", help=argparse.SUPPRESS)
    return parser.parse_args()


def print_plan(task: str) -> None:
    """Plan the stages of `task` in the current directory and print what they should take."""
    with tempfile.TemporaryDirectory() as scratch:
        rows = list(plan_task(task, PLANNED, Path(scratch)))
    costs = {name.partition("@")[0]: cost for name, _, cost in rows if cost is not None}
    print(PLAN + json.dumps({name: [cost.seconds, cost.peak_bytes] for name, cost in costs.items()}))


def errors(rounds: list[Measured]) -> dict[str, str]:
    """What a stage took and how far its plan was off."""
    seconds = [one.seconds for one in rounds]
    sizes = [one.bytes for one in rounds]
    return {
        "time": f"{statistics.median(seconds):.1f} s",
        "time_error": error([one.planned_seconds for one in rounds], seconds),
        "memory": f"{statistics.median(sizes) / 1e9:.2f} GB",
        "memory_error": error([one.planned_bytes for one in rounds], sizes),
    }


def error(planned: Sequence[float], actual: Sequence[float]) -> str:
    """The error of the medians, and in brackets the largest one."""
    each = [one / other - 1 for one, other in zip(planned, actual, strict=True)]
    whole = statistics.median(planned) / statistics.median(actual) - 1
    return f"{whole:+.0%} ({max(each, key=abs):+.0%})"


# -- a case ------------------------------------------------------------------------------------------------------------


def make_project(case: str, project: Path, megabytes: float) -> Path:
    """A clone of this repository with the model of `case` as its task's, and the data stages behind it."""
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
    """Records of random words in ELI5's schema."""
    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(draw.choices(letters, k=draw.randint(2, 9))) for _ in range(WORDS)]
    with file.open("w", encoding="utf-8") as lines:
        while lines.tell() < megabytes * 1e6:
            texts = [" ".join(draw.choices(words, k=draw.randint(10, WORDS_PER_TEXT))) for _ in range(2)]
            lines.write(json.dumps({"title": " ".join(draw.choices(words, k=8)), "answers": {"text": texts}}) + "\n")


def write_yaml(file: Path, value: Any) -> None:
    file.write_text(yaml.safe_dump(value, sort_keys=False), encoding="utf-8")


def measure(project: Path, task: str) -> dict[str, Measured]:
    """Each stage of `task`, planned and then run."""
    environment = {**os.environ, "LM_REPRO_CACHE": str(project / "cache")}
    command = [sys.executable, "-m", "benchmarks.plan", "--task", task]
    said = subprocess.run(command, cwd=project, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    plan = json.loads(next(line for line in said.splitlines() if line.startswith(PLAN)).removeprefix(PLAN))
    found = {}
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
        found[stage] = Measured(*plan[stage], time.monotonic() - started, usage.ru_maxrss * 1024)
    return found


if __name__ == "__main__":
    main()
