"""Training that starts from the model of another task, and its errors."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from configs import make_config
from data_helpers import hash_files
from safetensors.torch import load_file

from stages.core.errors import ConfigError, StageError
from stages.model.schema import ADAPTER_WEIGHTS
from stages.model.start import build_start_model
from stages.model.trained import load_trained_model

TASKS = ("causal", "mlm")


@pytest.fixture
def build(corpus, overrides, compose_stage, tmp_path):
    """`build(task, start, *more)`: initial model of train."""

    def start_of(task, start, *more):
        settings = compose_stage("train", *overrides("train", task, tmp_path, f"start={start}", *more))
        return build_start_model(settings.model, settings.start, Path(settings.tokens), settings.seed)

    return start_of


@pytest.mark.parametrize("task", TASKS)
def test_start_of_a_trained_model_has_its_weights_all_of_which_are_trained(build, trained, task):
    expected = load_trained_model(task, trained[task] / "model").state_dict()
    model = build(task, trained[task] / "model", "seed=5")
    assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_start_of_additions_to_a_model_has_them_in_its_weights_all_of_which_are_trained(
    build, run_toy, trained, tmp_path
):
    base = trained["causal"] / "model"
    files = ", ".join(f"{name}: '{digest}'" for name, digest in hash_files(base).items())
    pinned = [f"model.path={base}", f"model.files={{{files}}}", "model.from_scratch=false", "model.config={}"]
    run_toy("train", "causal", tmp_path, *pinned, "adapter=lora", "adapter.merge=false")
    assert (tmp_path / "model" / ADAPTER_WEIGHTS).is_file()
    model = build("causal", tmp_path / "model")
    assert all(parameter.requires_grad for parameter in model.parameters())
    moved = [
        not torch.equal(weight, load_file(base / "model.safetensors").get(name, weight))
        for name, weight in model.state_dict().items()
    ]
    assert any(moved)


def test_start_with_another_tokenizer_says_whose_is_whose(build, trained, corpus, tmp_path):
    shutil.copytree(trained["causal"] / "model", tmp_path / "start")
    file = tmp_path / "start/tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    tokenizer["model"]["merges"].pop()
    file.write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(
        StageError, match=f"{tmp_path}/start was trained with its own tokenizer, .*{corpus}/tokens/causal/tokenizer"
    ):
        build("causal", tmp_path / "start")


@pytest.mark.parametrize("stage", ["baseline", "train"])
def test_start_that_is_not_trained_yet_says_what_to_run(run_toy, tmp_path, stage):
    with pytest.raises(StageError, match="no such directory: run `dvc repro`"):
        run_toy(stage, "causal", tmp_path, f"start={tmp_path}/none")


def test_start_with_additions_that_are_not_merged_is_refused():
    assert make_config("train", "start=models/answers", adapter="lora").adapter.merge
    with pytest.raises(ConfigError, match=r"adapter\.merge=false needs a pinned base model, but models/answers"):
        make_config("train", "start=models/answers", "adapter.merge=false", adapter="lora", model="distilgpt2")


def test_baseline_of_a_start_has_the_figures_of_the_start(run_toy, trained, tmp_path):
    run_toy("baseline", "causal", tmp_path, f"start={trained['causal']}/model")
    before = json.loads((tmp_path / "baseline.json").read_text())["causal"]["test"]["bits_per_byte"]
    evaluated = json.loads((trained["causal"] / "evaluation/metrics.json").read_text())["causal"]["test"][
        "bits_per_byte"
    ]
    assert before == evaluated
