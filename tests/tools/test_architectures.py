"""Tests of every architecture of conf/model: train two steps from scratch at toy size, save, load, train again."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from toys import ARCHITECTURES, MODEL_TASKS, VOCABULARIES, make_objective_config, make_toy_blocks, make_toy_trainer

from stages.core.artifacts import compute_sha256
from stages.model.models import build_model, load_directory
from stages.model.objectives import make_objective
from stages.model.schema import BASE_MODEL_CONFIG, Adapter, Model
from stages.model.trained import load_trained_model
from stages.train.saving import add_adapter, save_model

CONF = Path(__file__).parents[2] / "conf" / "model"
NAMES = sorted(file.stem for file in CONF.glob("*.yaml"))
BLOCK_SIZE = 24


def read_conf(name):
    return yaml.safe_load((CONF / f"{name}.yaml").read_text(encoding="utf-8"))


MODEL_TYPES = sorted({read_conf(name)["config"]["model_type"] for name in NAMES})
LORA = {"rank": 2, "alpha": 4.0, "dropout": 0.0, "targets": None}


def build_scratch_config(model_type):
    return Model(
        task=MODEL_TASKS[model_type],
        path=None,
        revision=None,
        files=None,
        from_scratch=True,
        max_positions=64,
        config={"model_type": model_type, "initializer_range": 0.4, **ARCHITECTURES[model_type]},
    )


def build_pinned_config(directory, model_type):
    names = ["config.json", "generation_config.json", "model.safetensors"]
    return Model(
        task=MODEL_TASKS[model_type],
        path=str(directory),
        revision=None,
        files={name: compute_sha256(directory / name) for name in names if (directory / name).is_file()},
        from_scratch=False,
        max_positions=64,
        config={"model_type": model_type},
    )


def train(directory, model, steps=2):
    """Train `model` for `steps` steps and return the losses."""
    task = MODEL_TASKS[model.config.model_type]
    objective = make_objective(task, VOCABULARIES[task], make_objective_config(task, True, mlm_probability=0.4), model)
    blocks = make_toy_blocks(directory / "blocks", task, 8, BLOCK_SIZE)
    arguments = {"per_device_train_batch_size": 4, "max_steps": steps, "logging_steps": 1, "learning_rate": 0.01}
    trainer = make_toy_trainer(directory, model, objective, blocks, **arguments)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def compute_logits(model):
    tokens = torch.arange(5, 25)[None]
    with torch.no_grad():
        return model.eval()(tokens).logits


def test_toys_cover_every_architecture_of_conf():
    assert set(MODEL_TYPES) == set(MODEL_TASKS)


@pytest.mark.parametrize("name", NAMES)
def test_model_conf_has_the_task_of_its_architecture_and_a_pinned_commit(name):
    settings = read_conf(name)
    assert settings["task"] == MODEL_TASKS[settings["config"]["model_type"]]
    for source in (settings, settings["tokenizer"]):
        if source.get("path") is not None:
            assert len(source["revision"]) == 40


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_training_from_scratch_can_be_saved_loaded_and_continued(tmp_path, model_type):
    vocabulary = VOCABULARIES[MODEL_TASKS[model_type]]
    model = build_model(build_scratch_config(model_type), vocabulary, 0)
    before = compute_logits(model)
    first = train(tmp_path, model, steps=2)
    assert len(first) == 2 and all(0.0 < loss < 20.0 for loss in first)
    assert not torch.equal(compute_logits(model), before)
    save_model(model, None, build_scratch_config(model_type), tmp_path / "saved")
    loaded = build_model(build_pinned_config(tmp_path / "saved", model_type), vocabulary, 1)
    torch.testing.assert_close(compute_logits(loaded), compute_logits(model), rtol=1e-4, atol=1e-4)
    assert len(train(tmp_path / "again", loaded, steps=2)) == 2


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_adapter_trains_only_its_weights_and_survives_saving_and_loading(tmp_path, model_type, merge):
    vocabulary, task = VOCABULARIES[MODEL_TASKS[model_type]], MODEL_TASKS[model_type]
    save_model(
        build_model(build_scratch_config(model_type), vocabulary, 0),
        None,
        build_scratch_config(model_type),
        tmp_path / "base",
    )
    source, adapter = build_pinned_config(tmp_path / "base", model_type), Adapter(**LORA, merge=merge)
    model = add_adapter(build_model(source, vocabulary, 1), adapter, source, seed=3)
    before = compute_logits(model)
    torch.testing.assert_close(before, compute_logits(load_directory(task, tmp_path / "base")), rtol=1e-4, atol=1e-4)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    train(tmp_path, model)
    after = compute_logits(model)
    assert not torch.equal(after, before)
    save_model(model, adapter, source, tmp_path / "out")
    assert (tmp_path / "out" / BASE_MODEL_CONFIG).is_file() == (not merge)
    torch.testing.assert_close(compute_logits(load_trained_model(task, tmp_path / "out")), after, rtol=1e-4, atol=1e-4)
    if not merge:
        written = json.loads((tmp_path / "out/adapter_config.json").read_text())
        assert written["base_model_name_or_path"] == str(tmp_path / "base")
        assert {file.name for file in (tmp_path / "out").iterdir()} == {
            "adapter_config.json", "adapter_model.safetensors", BASE_MODEL_CONFIG
        }  # fmt: skip
