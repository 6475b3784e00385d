"""Bits per byte and training time of each step from the former default recipe to the current one.

Command python -m benchmarks.recipes [--tasks causal mlm] [--recipes NAME ...] [--rounds 1] [--hardware cpu]

The sample is downloaded, tokenized and grouped in a temporary directory. Each recipe is then trained and evaluated
there, one after the other, in this process; each round starts with the former default. Seconds are those of the train
stage without imports, as a ratio to the former default in the same round (median over the rounds). The ratio of
processor time is less affected by other processes on the machine.
The last line printed is one JSON object that maps each task and recipe to its figures.

Bits per byte of causal models can be compared across vocabularies. Pseudo bits per byte of masked models cannot, so all
masked recipes here use the same tokenizer.
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

from stages.core.compose import compose_config, load_config
from tools.check import get_config_class


class Seconds(NamedTuple):
    wall: float
    cpu: float
    """Processor seconds of all threads of this process."""


FORMER = "former"


class Recipe(NamedTuple):
    """Differences from params.yaml and conf/, as command-line overrides of the stages."""

    model: list[str]
    """Overrides for the stages that create the tokenizer and the model."""
    training: list[str]
    """Overrides for the train stage."""


FORMER_TRAINING = ["learning_rate=0.002"]
FORMER_MASKS = [
    "objective.mlm_probability=0.15",
    "objective.mask_replace_prob=0.8",
    "objective.random_replace_prob=0.1",
]
WIDE = ["model.config.n_embd=128", "model.config.n_head=4"]
ROBERTA = ["model=tiny-roberta"]
FULL_ATTENTION = ["model.config.layer_types=[full_attention,full_attention]"]

# Task to its recipes, step by step from the former default to the current one.
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
    parser.add_argument(
        "--recipes", nargs="+", metavar="NAME", help="recipes in addition to the former default (default: all)"
    )
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--hardware", default="cpu")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)  # no log lines of the stages
    result: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        os.environ["LM_REPRO_CACHE"] = str(directory / "cache")
        run_stage("download", f"out={directory / 'raw'}")
        for task in arguments.tasks:
            recipes = {
                name: recipe
                for name, recipe in RECIPES[task].items()
                if arguments.recipes is None or name in (FORMER, *arguments.recipes)
            }
            result[task] = measure_recipes(directory, task, recipes, arguments.rounds, f"hardware={arguments.hardware}")
            print_table(task, result[task])
    print(json.dumps(result))


def measure_recipes(
    directory: Path, task: str, recipes: dict[str, Recipe], rounds: int, hardware: str
) -> dict[str, Any]:
    """Return each recipe's validation and test metrics, steps, and time as a ratio to the former default's."""
    ratios: dict[str, list[Seconds]] = {name: [] for name in recipes}
    figures: dict[str, Any] = {}
    for name, recipe in recipes.items():
        make_inputs(directory / name, directory / "raw", task, recipe, hardware)
    for _ in range(rounds):
        seconds = {name: train_recipe(directory / name, task, recipe, hardware) for name, recipe in recipes.items()}
        for name in recipes:
            former = seconds[FORMER]
            ratios[name].append(Seconds(seconds[name].wall / former.wall, seconds[name].cpu / former.cpu))
    for name in recipes:
        (metric,) = {"bpb", "pseudo_bpb"} & (metrics := evaluate_recipe(directory / name, task, hardware))[
            "test"
        ].keys()
        figures[name] = {split: round(metrics[split][metric], 4) for split in ("val", "test")}
        figures[name]["steps"] = json.loads((directory / name / task / "curves/stats.json").read_text())["steps"]
        figures[name]["seconds_ratio"] = round(statistics.median(ratio.wall for ratio in ratios[name]), 3)
        figures[name]["processor_ratio"] = round(statistics.median(ratio.cpu for ratio in ratios[name]), 3)
    return figures


def make_inputs(directory: Path, raw: Path, task: str, recipe: Recipe, hardware: str) -> None:
    """Create the tokens, blocks and baseline of a recipe in `directory`."""
    tokens = f"tokens={directory / task}/tokens"
    run_stage("tokenize", f"task={task}", *recipe.model, f"raw={raw}", f"out={directory / task}/tokens")
    run_stage("group_texts", f"task={task}", tokens, f"raw={raw}", f"out={directory / task}/blocks")
    outs = [f"out={directory / task}/baseline.json", f"report={directory / task}/baseline"]
    run_stage("baseline", f"task={task}", hardware, *recipe.model, tokens, f"raw={raw}", *outs)


def train_recipe(directory: Path, task: str, recipe: Recipe, hardware: str) -> Seconds:
    """Run the train stage for a recipe and return its seconds, without imports."""
    inputs = [f"tokens={directory / task}/tokens", f"blocks={directory / task}/blocks"]
    outs = [f"out={directory / task}/model", f"report={directory / task}/curves"]
    return run_stage("train", f"task={task}", hardware, *recipe.model, *recipe.training, *inputs, *outs)


def evaluate_recipe(directory: Path, task: str, hardware: str) -> Any:
    """Run the evaluate stage and return the metrics that it writes for `task`."""
    inputs = [
        f"tokens={directory / task}/tokens",
        f"blocks={directory / task}/blocks",
        f"trained={directory / task}/model",
    ]
    outs = [
        f"out={directory / task}/metrics.json",
        f"report={directory / task}/report",
        f"samples_out={directory / task}/s.md",
    ]
    run_stage("evaluate", f"task={task}", hardware, *inputs, f"baseline={directory / task}/baseline", *outs)
    return json.loads((directory / task / "metrics.json").read_text())[task]


def run_stage(stage: str, *overrides: str) -> Seconds:
    """Run `stage` in this process and return its seconds, without imports and configuration."""
    config = load_config(get_config_class(stage), compose_config(stage, overrides))
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
