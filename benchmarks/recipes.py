"""What each step from the former default recipe to the present one is worth: bits per byte against seconds of training.

Command python -m benchmarks.recipes [--tasks causal mlm] [--recipes NAME ...] [--rounds 1] [--hardware cpu]

Downloads, tokenizes and groups the sample in a temporary directory, then trains and evaluates each recipe there, one
after the other, in this process; each round begins with the former default again. Seconds are those of the stage
`train` without imports, given as a ratio to the former default's of the same round (the median over the rounds). The
ratio of processor time is given as well: other processes on the machine change it less.
The last line printed is one JSON object: task to recipe to its figures.

Bits per byte of a causal model compare across vocabularies. Pseudo bits per byte of a masked one do not, and all masked
recipes here have the same tokenizer.
"""

import argparse
import importlib
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from stages.core.compose import compose, load
from tools.check import schema_of


class Seconds(NamedTuple):
    wall: float
    cpu: float
    """Of all threads of this process."""


FORMER = "former"


class Recipe(NamedTuple):
    """What differs from params.yaml and conf/, as overrides of the stages' command lines."""

    model: list[str]
    """Of the stages that make the tokenizer and the model."""
    training: list[str]
    """Of the stage `train`."""


FORMER_TRAINING = ["learning_rate=0.002"]
FORMER_MASKS = [
    "objective.mlm_probability=0.15",
    "objective.mask_replace_prob=0.8",
    "objective.random_replace_prob=0.1",
]
WIDE = ["model.config.n_embd=128", "model.config.n_head=4"]
ROBERTA = ["model=tiny-roberta"]
FULL_ATTENTION = ["model.config.layer_types=[full_attention,full_attention]"]

# Task to the recipes, from the former default to the present one, a step after the other.
RECIPES = {
    "causal": {
        FORMER: Recipe([*WIDE, "model.tokenizer.train.vocab_size=1024"], [*FORMER_TRAINING, "num_train_epochs=3"]),
        "vocabulary": Recipe(WIDE, [*FORMER_TRAINING, "num_train_epochs=3"]),
        "width": Recipe([], FORMER_TRAINING),
        "default": Recipe([], []),
    },
    "mlm": {
        FORMER: Recipe(ROBERTA, [*FORMER_TRAINING, *FORMER_MASKS, "num_train_epochs=2"]),
        "training": Recipe(ROBERTA, []),
        "positions": Recipe(FULL_ATTENTION, []),
        "window": Recipe([], FORMER_MASKS),
        "default": Recipe([], []),
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--tasks", nargs="+", choices=tuple(RECIPES), default=list(RECIPES))
    parser.add_argument("--recipes", nargs="+", metavar="NAME", help="besides the former default (default: all)")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--hardware", default="cpu")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)  # what stages say of themselves
    result: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        os.environ["LM_REPRO_CACHE"] = str(place / "cache")
        run_stage("download", f"out={place / 'raw'}")
        for task in arguments.tasks:
            recipes = {
                name: recipe
                for name, recipe in RECIPES[task].items()
                if arguments.recipes is None or name in (FORMER, *arguments.recipes)
            }
            result[task] = measure(place, task, recipes, arguments.rounds, f"hardware={arguments.hardware}")
            print_table(task, result[task])
    print(json.dumps(result))


def measure(place: Path, task: str, recipes: dict[str, Recipe], rounds: int, hardware: str) -> dict[str, Any]:
    """Recipe to validation and test figures, steps, and its time as a ratio to the first one's."""
    ratios: dict[str, list[Seconds]] = {name: [] for name in recipes}
    figures: dict[str, Any] = {}
    for name, recipe in recipes.items():
        prepare(place / name, place / "raw", task, recipe, hardware)
    for _ in range(rounds):
        seconds = {name: train(place / name, task, recipe, hardware) for name, recipe in recipes.items()}
        for name in recipes:
            former = seconds[FORMER]
            ratios[name].append(Seconds(seconds[name].wall / former.wall, seconds[name].cpu / former.cpu))
    for name in recipes:
        (metric,) = {"bpb", "pseudo_bpb"} & (found := evaluate(place / name, task, hardware))["test"].keys()
        figures[name] = {split: round(found[split][metric], 4) for split in ("val", "test")}
        figures[name]["steps"] = json.loads((place / name / task / "curves/stats.json").read_text())["steps"]
        figures[name]["seconds_ratio"] = round(statistics.median(ratio.wall for ratio in ratios[name]), 3)
        figures[name]["processor_ratio"] = round(statistics.median(ratio.cpu for ratio in ratios[name]), 3)
    return figures


def prepare(place: Path, raw: Path, task: str, recipe: Recipe, hardware: str) -> None:
    """Make tokens, blocks and the baseline of a recipe below `place`."""
    tokens = f"tokens={place / task}/tokens"
    run_stage("tokenize", f"task={task}", *recipe.model, f"raw={raw}", f"out={place / task}/tokens")
    run_stage("group_texts", f"task={task}", tokens, f"raw={raw}", f"out={place / task}/blocks")
    outs = [f"out={place / task}/baseline.json", f"report={place / task}/baseline"]
    run_stage("baseline", f"task={task}", hardware, *recipe.model, tokens, f"raw={raw}", *outs)


def train(place: Path, task: str, recipe: Recipe, hardware: str) -> Seconds:
    """What the stage takes, imports left out."""
    inputs = [f"tokens={place / task}/tokens", f"blocks={place / task}/blocks"]
    outs = [f"out={place / task}/model", f"report={place / task}/curves"]
    return run_stage("train", f"task={task}", hardware, *recipe.model, *recipe.training, *inputs, *outs)


def evaluate(place: Path, task: str, hardware: str) -> Any:
    """What the stage writes to metrics/TASK.json for its task."""
    inputs = [f"tokens={place / task}/tokens", f"blocks={place / task}/blocks", f"trained={place / task}/model"]
    outs = [f"out={place / task}/metrics.json", f"report={place / task}/report", f"samples_out={place / task}/s.md"]
    run_stage("evaluate", f"task={task}", hardware, *inputs, f"baseline={place / task}/baseline", *outs)
    return json.loads((place / task / "metrics.json").read_text())[task]


def run_stage(stage: str, *overrides: str) -> Seconds:
    """Run `stage` in this process; what it took, its imports and configuration left out."""
    config = load(schema_of(stage), compose(stage, overrides))
    module = importlib.import_module(f"stages.{stage}.stage")
    if stage == "train":
        importlib.import_module("stages.frameworks.trainer")
    started = Seconds(time.monotonic(), time.process_time())
    module.main(config)
    return Seconds(time.monotonic() - started.wall, time.process_time() - started.cpu)


def print_table(task: str, figures: dict[str, Any]) -> None:
    print(f"{task:8} {'recipe':12} {'validation':>10} {'test':>8} {'steps':>6} {'seconds':>8} {'processor':>10}")
    for name, row in figures.items():
        ratios = f"{row['seconds_ratio']:8.2f} {row['processor_ratio']:10.2f}"
        print(f"{'':8} {name:12} {row['val']:10.4f} {row['test']:8.4f} {row['steps']:6} {ratios}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
