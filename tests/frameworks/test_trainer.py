"""Checks of the `trainer` section by the optimizer and the schedule, before a model is built."""

import pytest

from stages.core.errors import StageError
from stages.frameworks.trainer.arguments import try_arguments

REFUSED = [
    ({"lr_scheduler_type": "warmup_stable_decay"}, "trainer.lr_scheduler_type=warmup_stable_decay: .*num_decay_steps"),
    ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 9.0}}, "trainer.lr_scheduler_type=polyn"),
    ({"lr_scheduler_kwargs": {"cycles": 1}}, "trainer.lr_scheduler_type=linear: .*'cycles'"),
    ({"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "no"}, "trainer: .*requires an eval strategy"),
    (
        {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 7,
         "save_steps": 10},
        "trainer: .*multiple of the evaluation steps",
    ),
    ({"adam_beta1": 2.0}, "trainer.optim=adamw_torch_fused: Invalid beta parameter"),
    ({"adam_epsilon": -1.0}, "trainer.optim=adamw_torch_fused: Invalid epsilon"),
    ({"optim": "lomo"}, "trainer.optim=lomo: You need to install"),
    ({"optim": "adamw_bnb_8bit"}, "trainer.optim=adamw_bnb_8bit: You need to install"),
    ({"optim": "sgd", "optim_args": "momentum=much"}, "trainer.optim=sgd: could not convert"),
    ({"dataloader_prefetch_factor": 2}, "trainer: .*prefetch_factor"),
    ({"logging_steps": 2.5}, "trainer: .*must be an integer"),
]  # fmt: skip
IGNORED = [
    ({"lr_scheduler_type": "constant", "warmup_steps": 10}, r"trainer.warmup_steps=10 \(or warmup_ratio\)"),
    ({"lr_scheduler_type": "constant", "warmup_ratio": 0.1}, "trainer.warmup_steps=0.1"),
    ({"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"a": 1}}, "trainer.lr_scheduler_kwargs="),
    ({"optim": "adafactor", "adam_beta1": 0.8}, "trainer.adam_beta1=0.8: trainer.optim=adafactor ignores it"),
    ({"optim": "sgd", "adam_epsilon": 1e-7}, "trainer.adam_epsilon=1e-07: trainer.optim=sgd ignores it"),
    ({"optim_args": "momentum=0.9"}, "trainer.optim_args='momentum=0.9'"),
    ({"optim": "sgd", "optim_args": "momentun=0.9"}, "trainer.optim_args='momentun=0.9'"),
    ({"optim_target_modules": ["attn"]}, "trainer.optim_target_modules="),
]
TAKEN = [
    {},
    {"lr_scheduler_type": "cosine", "warmup_ratio": 0.01},
    {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 3},
    {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 10}},
    {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"factor": 0.5, "patience": 1}},
    {"optim": "sgd", "optim_args": "momentum=0.9"},
    {"optim": "adafactor", "weight_decay": 0.1},
    {"adam_beta1": 0.8, "adam_beta2": 0.99, "adam_epsilon": 1e-6},
    {"warmup_steps": 0, "optim_args": None},
]


@pytest.fixture
def configured(compose_stage, overrides, tmp_path):
    """`configured(arguments)`: train config with these arguments in its trainer section."""

    def configure(arguments):
        config = compose_stage("train", *overrides("train", "causal", tmp_path))
        config.trainer = {**config.trainer, **arguments}
        return config

    return configure


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_arguments_that_the_library_refuses_are_refused_before_any_work(configured, arguments, message):
    with pytest.raises(StageError, match=message):
        try_arguments(configured(arguments))


@pytest.mark.parametrize(("arguments", "message"), IGNORED)
def test_arguments_that_would_be_ignored_are_refused_by_name(configured, arguments, message):
    with pytest.raises(StageError, match=message) as caught:
        try_arguments(configured(arguments))
    assert str(caught.value).endswith("ignores it: remove it")


@pytest.mark.parametrize("arguments", TAKEN)
def test_arguments_that_have_an_effect_are_taken(configured, arguments):
    try_arguments(configured(arguments))


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_arguments_for_a_device_that_is_not_here_can_be_tried(configured, device):
    config = configured({"bf16": True, "tf32": True, "fsdp": True, "optim": "adamw_torch"})
    config.hardware.device = device
    try_arguments(config)
    assert config.hardware.device == device  # unchanged


def test_train_refuses_what_would_be_ignored_too(run_toy, cache, tmp_path):
    with pytest.raises(StageError, match=r"trainer\.adam_beta1=0\.8: trainer\.optim=sgd ignores it"):
        run_toy("train", "causal", tmp_path, "trainer.optim=sgd", "++trainer.adam_beta1=0.8")
    assert not (tmp_path / "model").exists()
