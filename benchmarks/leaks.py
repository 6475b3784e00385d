"""Figures of the leak report on the default models, with canaries in their text, and on models overfitted on purpose.

Command python -m benchmarks.leaks [--tasks causal mlm] [--recipes NAME ...] [--documents 200]

Each recipe is downloaded, tokenized, trained and examined in a temporary directory, one after the other, in this
process. `canaries` and `overfitted` have eight canaries in their data, each planted once; they fall into the splits as
all records do. The last line printed is one JSON object that maps each task and recipe to its report, without examples.
"""

import argparse
import json
import logging
import os
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.recipes import run_stage
from stages.core.compose import compose_config, load_config
from tools.check import get_config_class
from tools.leaks.canaries import make_canaries, read_canaries
from tools.leaks.examination import examine_model
from tools.leaks.report import find_excesses, list_figures
from tools.publish import read_publication

SAMPLE = Path("data/sample/askscience.jsonl")
NUM_CANARIES = 8


class Recipe(NamedTuple):
    """Differences from params.yaml and conf/, as command-line overrides of the stages."""

    download: list[str]
    training: list[str]
    has_canaries: bool


RECIPES = {
    "default": Recipe([], [], has_canaries=False),
    "canaries": Recipe([], [], has_canaries=True),
    "overfitted": Recipe(["data.max_records=60"], ["num_train_epochs=60"], has_canaries=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--tasks", nargs="+", choices=("causal", "mlm"), default=["causal", "mlm"])
    parser.add_argument("--recipes", nargs="+", choices=tuple(RECIPES), default=list(RECIPES))
    parser.add_argument("--documents", type=int, default=200)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)  # no log lines of the stages
    result: dict[str, dict[str, Any]] = {task: {} for task in arguments.tasks}
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["LM_REPRO_CACHE"] = f"{scratch}/cache"
        canaries = Path(scratch) / "canaries.jsonl"
        make_canaries(NUM_CANARIES, canaries)
        for name in arguments.recipes:
            data = make_data(Path(scratch) / name, RECIPES[name], canaries)
            for task in arguments.tasks:
                texts = read_canaries(canaries) if RECIPES[name].has_canaries else []
                report = examine_recipe(data, task, RECIPES[name], texts, arguments.documents)
                print_figures(f"{task}, {name}", task, report)
                result[task][name] = report
    print(json.dumps(result))


def make_data(directory: Path, recipe: Recipe, canaries: Path) -> Path:
    """Download the sample, after the canaries if the recipe has any, and return the directory."""
    directory.mkdir()
    data = []
    if recipe.has_canaries:  # first, so that data.max_records includes them
        (directory / "records.jsonl").write_bytes(canaries.read_bytes() + SAMPLE.read_bytes())
        data = ["data=files", f"data.path={directory}/records.jsonl"]
    run_stage("download", *data, *recipe.download, f"out={directory}/raw")
    return directory


def examine_recipe(data: Path, task: str, recipe: Recipe, canaries: list[str], num_documents: int) -> dict[str, Any]:
    """Train a recipe and return the report on its model, without examples and with the seconds it took."""
    common = [f"task={task}", *(["data=files"] if recipe.has_canaries else [])]
    raw, tokens = f"raw={data}/raw", f"tokens={data}/{task}/tokens"
    blocks, model = f"blocks={data}/{task}/blocks", f"{data}/{task}/model"
    run_stage("tokenize", *common, raw, f"out={data}/{task}/tokens")
    run_stage("group_texts", *common, tokens, raw, f"out={data}/{task}/blocks")
    curves = f"report={data}/{task}/curves"
    run_stage("train", f"task={task}", tokens, blocks, *recipe.training, f"out={model}", curves)
    overrides = {"evaluate": [tokens, blocks, f"trained={model}"], "baseline": [tokens, raw]}
    evaluate, baseline = (
        load_config(get_config_class(stage), compose_config(stage, [*common, *overrides[stage]])) for stage in overrides
    )
    started = time.monotonic()
    report = examine_model(evaluate, baseline, baseline.model, canaries, num_documents)
    seconds = time.monotonic() - started
    if report["continuation"]:
        del report["continuation"]["examples"]
    return {**report, "seconds": round(seconds, 1)}


def print_figures(title: str, task: str, report: dict[str, Any]) -> None:
    limits = read_publication(task).leaks
    above = ", ".join(item.key for item in find_excesses(report, limits)) or "none"
    print(f"{title} ({report['seconds']} s); above the limit: {above}")
    for figure in list_figures(report, limits):
        print(f"  {figure.name:36} {figure.value:>7} {figure.interval:>16} {figure.held_out:>8} {figure.limit:>8}")
    for item in (report["exposure"] or {}).get("canaries", []):
        print(f"  canary in {item['planted']} documents of train: {item['exposure']:.1f} bits", flush=True)


if __name__ == "__main__":
    main()
