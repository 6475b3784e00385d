"""Training with Keras: the losses of the Trainer, reproducible bytes, and refused configurations."""

import csv
import functools
import json
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from data_helpers import REPOSITORY, read_contents
from toys import MODEL_TASKS, make_toy_blocks, make_toy_model, make_toy_objective, make_toy_trainer

from stages.core.artifacts import compute_sha256
from stages.core.errors import ConfigError, StageError
from stages.frameworks.keras.rules import ARCHITECTURES
from stages.model.isolation import isolate_segments
from stages.model.masking import IGNORED
from stages.model.models import load_directory
from stages.model.precision import full_precision
from stages.shell.interruption import Interrupted

needs_keras = pytest.mark.skipif(find_spec("keras_hub") is None, reason="Keras is not installed: `make keras`")
TASKS = ("causal", "mlm")
KERAS = ["framework=keras"]
DROPOUT = {
    "causal": [f"model.config.{name}_pdrop=0.1" for name in ("resid", "embd", "attn")],
    "mlm": ["model.config.hidden_dropout_prob=0.1", "model.config.attention_probs_dropout_prob=0.1"],
}
EVERY = ["++trainer.save_strategy=steps", "++trainer.save_steps=1", "trainer.logging_steps=4"]


@pytest.fixture(scope="module")
def models(compose_stage, overrides, tmp_path_factory):
    """Module stages.frameworks.keras.models, imported with the backend that the stage chooses."""
    from stages.frameworks import keras as framework

    place = tmp_path_factory.mktemp("keras")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LM_REPRO_CACHE", str(place))
        framework.prepare_framework(compose_stage("train", *overrides("train", "causal", place, *KERAS)))
        from stages.frameworks.keras import models

        yield models


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Cache directory for this file only: its tests leave checkpoints, which tests of other files must not find."""
    place = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LM_REPRO_CACHE", str(place))
        yield place


@pytest.fixture(scope="module")
def undisturbed(run_toy, cache, models, tmp_path_factory):
    """`undisturbed(task)`: outs of an uninterrupted Keras run with dropout."""

    @functools.cache
    def outs(task):
        root = tmp_path_factory.mktemp(task)
        run_toy("train", task, root, *KERAS, *EVERY, *DROPOUT[task])
        return read_contents(root)

    return outs


def curve(root, name):
    with (root / f"report/plots/metrics/{name}.tsv").open() as file:
        return {int(row["step"]): float(row[name.rpartition("/")[2]]) for row in csv.DictReader(file, delimiter="\t")}


# -- the model ---------------------------------------------------------------------------------------------------------


def logits(models, model, batch):
    """Logits of the predicted positions, from Keras and from torch."""
    from stages.frameworks.keras.training import build_arrays

    targets = make_toy_objective(model).get_targets(batch["labels"])
    inputs, wanted, weights = build_arrays(batch, targets, model.config)
    ours = np.array(models.build_keras_model(model)(inputs))[weights > 0]
    assert sorted(wanted[weights > 0]) == sorted(targets[targets != IGNORED].tolist())
    with full_precision(model):  # without the cache, with which GPT-2 does not isolate documents
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        theirs = model(**isolate_segments(inputs, model)).logits
    return ours, theirs[targets != IGNORED].numpy()


@needs_keras
@pytest.mark.parametrize("isolated", [True, False], ids=["isolated", "packed"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_keras_model_of_torch_weights_has_the_logits_of_torch(models, tmp_path, model_type, isolated):
    model = make_toy_model(model_type)
    blocks = make_toy_blocks(tmp_path, MODEL_TASKS[model_type], 3, 24)
    batch = make_toy_objective(model, isolated).build_batch(blocks[[0, 1, 2]], [0, 1, 2], 7, 0)
    ours, theirs = logits(models, model, batch)
    assert ours.shape == theirs.shape and ours.std() > 0.5
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@needs_keras
@pytest.mark.parametrize(
    ("model_type", "values"),
    [
        ("gpt2", {"activation_function": "gelu", "layer_norm_epsilon": 0.1}),
        ("bert", {"hidden_act": "gelu_new", "layer_norm_eps": 0.1, "type_vocab_size": 1}),
        ("roberta", {"hidden_act": "relu", "layer_norm_eps": 0.1}),
    ],
)
def test_keras_model_takes_the_values_of_the_configuration(models, tmp_path, model_type, values):
    model = make_toy_model(model_type, **values)
    batch = make_toy_objective(model).build_batch(
        make_toy_blocks(tmp_path, MODEL_TASKS[model_type], 2, 24)[[0, 1]], [0, 1], 7, 0
    )
    ours, theirs = logits(models, model, batch)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    plain, _ = logits(models, with_weights(make_toy_model(model_type), model), batch)
    assert np.abs(ours - plain).max() > 1e-3


@needs_keras
def test_keras_model_has_the_inner_width_of_the_configuration(models, tmp_path):
    model = make_toy_model("gpt2", n_inner=24)
    batch = make_toy_objective(model).build_batch(make_toy_blocks(tmp_path, "causal", 2, 24)[[0, 1]], [0, 1], 7, 0)
    np.testing.assert_allclose(*logits(models, model, batch), atol=1e-4)


def with_weights(model, other):
    model.load_state_dict(
        {name: value for name, value in other.state_dict().items() if "token_type" not in name}, False
    )
    return model


@needs_keras
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_keras_weights_are_each_parameter_of_torch_once_and_come_back_bit_for_bit(models, model_type):
    model, empty = make_toy_model(model_type), make_toy_model(model_type, seed=1)
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():  # all numbers differ; biases are zeros initially
        parameter.data.copy_(torch.randn(parameter.shape))
    seen = torch.cat([view.flatten() for view in models.map_weight_views(model).values()])
    every = torch.cat([parameter.detach().flatten() for parameter in parameters.values()])
    assert torch.equal(seen.sort().values, every.sort().values)
    models.copy_to_torch(models.build_keras_model(model), empty)
    for name, parameter in empty.named_parameters():
        assert torch.equal(parameter, parameters[name]), name


@needs_keras
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_keras_decays_the_weights_that_the_trainer_decays(models, tmp_path, model_type):
    model = make_toy_model(model_type)
    trainer = make_toy_trainer(
        tmp_path, model, make_toy_objective(model), make_toy_blocks(tmp_path, MODEL_TASKS[model_type], 2, 24)
    )
    names = set(trainer.get_decay_parameter_names(model))
    theirs = sum(parameter.numel() for name, parameter in model.named_parameters() if name in names)
    views = models.map_weight_views(model)
    assert sum(view.numel() for path, view in views.items() if models.has_weight_decay(path)) == theirs
    assert 0 < theirs < sum(view.numel() for view in views.values())


@needs_keras
@pytest.mark.parametrize(
    ("model_type", "values", "message"),
    [
        ("gpt2", {"attn_pdrop": 0.1}, "all dropout rates must be the same"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True: set it to False"),
        ("bert", {"hidden_act": "quick_gelu"}, "model.config.hidden_act=quick_gelu: supported are gelu,"),
        ("llama", {}, "llama is not mapped to KerasHub's layers; supported are bert, gpt2, roberta"),
    ],
)
def test_keras_model_that_the_layers_lack_is_refused_by_name(models, model_type, values, message):
    with pytest.raises(StageError, match=message):
        models.build_keras_model(make_toy_model(model_type, **values))


# -- training ----------------------------------------------------------------------------------------------------------


@needs_keras
@pytest.mark.parametrize("task", ["causal", pytest.param("mlm", marks=pytest.mark.slow)])
def test_keras_training_has_the_losses_and_ends_near_the_weights_of_the_trainer(run_toy, cache, models, tmp_path, task):
    # 20 steps, 8 per epoch. Warmup, clipping, decay and epsilon all have a visible effect.
    more = ["num_train_epochs=2.5", "trainer.logging_steps=1", "trainer.weight_decay=0.3", "++trainer.warmup_steps=4"]
    more += ["++trainer.max_grad_norm=0.5", "++trainer.adam_epsilon=1e-4", "++trainer.adam_beta2=0.95"]
    more += ["objective.mlm_probability=0.9"] if task == "mlm" else []  # batches of one shape: compiled once
    for framework in ("trainer", "keras"):
        run_toy("train", task, tmp_path / framework, f"framework={framework}", *more)
    for name in ("train/loss", "train/learning_rate", "train/grad_norm", "validation/loss"):
        theirs, ours = (curve(tmp_path / framework, name) for framework in ("trainer", "keras"))
        assert ours.keys() == theirs.keys() and len(ours) == (3 if name == "validation/loss" else 20)
        assert list(ours.values()) == pytest.approx(list(theirs.values()), abs=1e-3, rel=1e-4)
    theirs, ours = (load_directory(task, tmp_path / name / "model").state_dict() for name in ("trainer", "keras"))
    for name, weights in theirs.items():
        torch.testing.assert_close(ours[name], weights, atol=1e-4, rtol=1e-3)
    files = [read_contents(tmp_path / framework / "model") for framework in ("trainer", "keras")]
    assert {**files[0], "model.safetensors": b""} == {**files[1], "model.safetensors": b""}


@needs_keras
@pytest.mark.slow
@pytest.mark.parametrize("task", ["causal", "mlm"])
def test_keras_training_run_twice_gives_the_same_bytes(run_toy, undisturbed, tmp_path, task):
    run_toy("train", task, tmp_path, *KERAS, *EVERY, *DROPOUT[task])
    assert read_contents(tmp_path) == undisturbed(task)
    assert {"jax", "keras", "keras-hub"} <= json.loads(undisturbed(task)["report/stats.json"])["versions"].keys()


@needs_keras
def test_keras_training_with_another_seed_has_another_dropout(run_toy, undisturbed, tmp_path, models, monkeypatch):
    import keras

    expected = undisturbed("causal")  # computed before the patch, which would affect this run too
    original = keras.utils.set_random_seed
    monkeypatch.setattr(keras.utils, "set_random_seed", lambda seed: original(seed + 1))
    run_toy("train", "causal", tmp_path, *KERAS, *EVERY, *DROPOUT["causal"])
    assert read_contents(tmp_path)["model/model.safetensors"] != expected["model/model.safetensors"]


@needs_keras
@pytest.mark.slow  # a separate process: Keras has only one backend per process
@pytest.mark.parametrize("task", TASKS)
def test_keras_on_tensorflow_has_the_losses_of_the_trainer_and_the_same_bytes_however_it_is_interrupted(
    run_toy, overrides, tmp_path, task, monkeypatch
):
    monkeypatch.setenv("LM_REPRO_CACHE", str(tmp_path / "cache"))
    every = ["trainer.logging_steps=1", "num_train_epochs=40", "learning_rate=1e-3"]
    run_toy("train", task, tmp_path / "trainer", *every)
    for name in ("one", "two"):
        more = [
            *KERAS,
            "framework.backend=tensorflow",
            "++trainer.save_strategy=steps",
            "++trainer.save_steps=5",
            *every,
        ]
        command = [sys.executable, "-m", "stages.train", *overrides("train", task, tmp_path / name, *more)]
        if name == "two":
            killed = subprocess.Popen(command, cwd=REPOSITORY)
            while not list((tmp_path / "cache").glob("checkpoints/*/checkpoint-*/manifest-0.json")):  # in its place
                assert killed.poll() is None
                time.sleep(0.01)
            killed.kill()
            killed.wait()
            assert not (tmp_path / "two/model").exists()
        done = subprocess.run(command, cwd=REPOSITORY, check=False, stderr=subprocess.PIPE, text=True)
        assert done.returncode == 0, done.stderr
        assert (name == "two") == ("resuming from step" in done.stderr), done.stderr
    for name in ("train/loss", "validation/loss"):
        theirs, ours = (curve(tmp_path / framework, name) for framework in ("trainer", "one"))
        assert ours.keys() == theirs.keys()
        assert list(ours.values()) == pytest.approx(list(theirs.values()), abs=1e-3)
    assert read_contents(tmp_path / "one") == read_contents(tmp_path / "two")


@pytest.mark.slow  # a separate process
def test_trainer_imports_nothing_of_keras(overrides, cache, tmp_path):
    code = (
        "import os, runpy, sys; os._exit = lambda code: None;"
        "runpy.run_module('stages.train.stage', run_name='__main__', alter_sys=True);"
        "print(sorted({'jax', 'keras', 'keras_hub', 'tensorflow'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, *overrides("train", "causal", tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.PIPE, text=True)
    assert done.stdout.splitlines()[-1] == "[]"


class Killed(BaseException):
    """Exception that ends a run like SIGKILL: nothing is written after it."""


@needs_keras
@pytest.mark.parametrize(  # of two epochs of eight
    ("task", "step"),
    [
        ("causal", 3),
        ("causal", 8),
        pytest.param("mlm", 8, marks=pytest.mark.slow),
        pytest.param("mlm", 13, marks=pytest.mark.slow),
    ],
)
def test_keras_training_killed_goes_on_and_ends_with_the_same_bytes(
    run_toy, undisturbed, caplog, monkeypatch, tmp_path, task, step
):
    from stages.frameworks.keras.training import TrainerFlow

    def kill(self, batch, logs=None):
        if self._training.state.global_step == step:
            raise Killed
        original(self, batch, logs)

    original = TrainerFlow.on_train_batch_begin
    monkeypatch.setattr(TrainerFlow, "on_train_batch_begin", kill)
    with pytest.raises(Killed):
        run_toy("train", task, tmp_path, *KERAS, *EVERY, *DROPOUT[task])
    assert not [name for name in read_contents(tmp_path) if not name.startswith(".live-report/")]
    monkeypatch.undo()
    caplog.set_level("INFO")
    run_toy("train", task, tmp_path, *KERAS, *EVERY, *DROPOUT[task])
    assert f"resuming from step {step}" in [record.getMessage() for record in caplog.records]
    assert read_contents(tmp_path) == undisturbed(task)


@needs_keras
def test_keras_training_told_to_end_writes_a_checkpoint_and_goes_on(
    run_toy, undisturbed, caplog, monkeypatch, tmp_path
):
    from stages.frameworks.keras.training import TrainerFlow

    def tell(self, batch, logs=None):
        if self._training.state.global_step == 5:
            signal.raise_signal(signal.SIGTERM)
        original(self, batch, logs)

    original = TrainerFlow.on_train_batch_begin
    monkeypatch.setattr(TrainerFlow, "on_train_batch_begin", tell)
    more = [*KERAS, "trainer.logging_steps=4", *DROPOUT["causal"]]
    with pytest.raises(Interrupted, match="stopped at step 6 of 16") as caught:
        run_toy("train", "causal", tmp_path, *more)
    assert caught.value.exit_code == 143
    monkeypatch.undo()
    caplog.set_level("INFO")
    run_toy("train", "causal", tmp_path, *more)
    assert "resuming from step 6" in [record.getMessage() for record in caplog.records]
    assert read_contents(tmp_path) == undisturbed("causal")


@needs_keras
@pytest.mark.slow
def test_keras_training_that_diverges_stops_with_the_step(run_toy, cache, models, tmp_path):
    more = ["learning_rate=1e30", "++trainer.max_grad_norm=0", "trainer.logging_steps=1"]
    with pytest.raises(StageError, match=r"loss is (nan|inf) at step \d+"):
        run_toy("train", "causal", tmp_path, *KERAS, *more)


def checkpoint(directory):
    """Overrides to start from the saved model."""
    pins = ", ".join(f"{name}: '{compute_sha256(directory / name)}'" for name in ("config.json", "model.safetensors"))
    model_type = json.loads((directory / "config.json").read_text())["model_type"]
    values = [f"model.path={directory}", "model.from_scratch=false", f"model.files={{{pins}}}"]
    return [*values, f"model.config={{model_type: {model_type}}}"]


@needs_keras
@pytest.mark.slow
@pytest.mark.parametrize("task", ["causal", "mlm"])
def test_keras_training_from_a_checkpoint_has_the_losses_of_the_trainer(run_toy, cache, models, tmp_path, task):
    run_toy("train", task, tmp_path / "before")
    saved = tmp_path / "before/model"
    more = [*checkpoint(saved), "trainer.logging_steps=1"]
    for framework in ("trainer", "keras"):
        run_toy("train", task, tmp_path / framework, f"framework={framework}", *more)
    theirs, ours = (list(curve(tmp_path / name, "train/loss").values()) for name in ("trainer", "keras"))
    assert len(ours) == 16
    assert ours == pytest.approx(theirs, abs=1e-3)
    assert ours[0] < next(iter(curve(tmp_path / "before", "train/loss").values())) - 0.1


@needs_keras
@pytest.mark.slow
def test_keras_training_of_a_model_with_another_pad_token_is_refused(run_toy, cache, models, tmp_path, corpus):
    run_toy("train", "mlm", tmp_path / "before")
    saved = tmp_path / "before/model"
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "pad_token_id": config["pad_token_id"] + 1}))
    with pytest.raises(StageError, match=r"framework=keras: model.config.pad_token_id=\d+, but the tokenizer's is \d+"):
        run_toy("train", "mlm", tmp_path, *KERAS, *checkpoint(saved), "model.max_positions=32")


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["adapter=lora"], "it trains all weights: set adapter: none"),
        (["hardware=multi_cpu"], "it runs in one process"),
        (["hardware.device=mps"], "hardware.device=mps: it trains on the CPU"),
        (["hardware.per_device_batch_size=4"], "per_device_batch_size=4: it does not accumulate gradients"),
        (["model.config.model_type=gptj"], "gptj is not mapped to KerasHub's layers; supported are bert, gpt2"),
        (["model.config.attn_pdrop=0.3"], "all dropout rates must be the same"),
        (["++model.config.reorder_and_upcast_attn=true"], "reorder_and_upcast_attn=True: set it to False"),
        (["++model.config.activation_function=mish"], "model.config.activation_function=mish: supported are gelu, "),
        (["hardware=gpu"], "hardware.device=cuda: it trains on the CPU"),
        (["trainer.bf16=true"], "trainer.bf16=True is not supported: leave it at False"),
        (["trainer.optim=adafactor"], "trainer.optim=adafactor is not supported: leave it at adamw_torch or"),
        (["++trainer.lr_scheduler_type=cosine"], "trainer.lr_scheduler_type=cosine is not supported"),
        (["++trainer.save_strategy=best"], "trainer.save_strategy=best is not supported: leave it at no or"),
        (["framework.backend=null"], "framework.backend is missing for framework=keras"),
    ],
)
def test_keras_config_that_it_cannot_do_is_a_config_error_that_says_so(
    compose_stage, overrides, tmp_path, more, message
):
    with pytest.raises(ConfigError) as caught:
        compose_stage("train", *overrides("train", "causal", tmp_path, *KERAS, *more))
    assert [problem for problem in caught.value.problems if message in problem] == caught.value.problems


@pytest.mark.parametrize("task", TASKS)
def test_keras_config_of_the_defaults_is_in_order(compose_stage, overrides, tmp_path, task):
    config = compose_stage("train", *overrides("train", task, tmp_path, *KERAS))
    assert (config.framework.name, config.framework.backend) == ("keras", "jax")


def test_trainer_config_with_a_backend_is_a_config_error(compose_stage, overrides, tmp_path):
    with pytest.raises(ConfigError, match="backend has no meaning for framework=trainer"):
        compose_stage("train", *overrides("train", "causal", tmp_path, "framework.backend=jax"))


def test_keras_that_is_not_installed_is_a_stage_error_with_the_command(compose_stage, overrides, monkeypatch, tmp_path):
    from stages.frameworks import keras as framework

    monkeypatch.setenv("LM_REPRO_CACHE", str(tmp_path))
    for name in [name for name in sys.modules if name.startswith("stages.frameworks.keras.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "keras_hub", None)
    with pytest.raises(StageError, match=r"^framework=keras: keras_hub is not installed: run `make keras`$"):
        framework.prepare_framework(compose_stage("train", *overrides("train", "causal", tmp_path, *KERAS)))
