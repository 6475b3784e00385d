"""The `trainer` section: refused values with their reasons, and the arguments passed to TrainingArguments."""

import dataclasses
from typing import Any, Literal, Optional

import pytest
from transformers import PreTrainedConfig, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from stages.train.trainer_arguments import MERGED, OWNED, find_argument_problems, resolve_merged
from tools.argument_table import FILE, render_table, spell_default, spell_type

FIELDS = [field.name for field in dataclasses.fields(TrainingArguments)]


def test_argument_table_matches_the_installed_transformers():
    assert FILE.read_text(encoding="utf-8") == render_table(), "run `python -m tools.argument_table`"


@pytest.mark.parametrize(
    ("hint", "source"),
    [
        (bool, "bool"),
        (float | None, "float | None"),
        (Optional[dict[str, Any]], "dict[str, Any] | None"),  # noqa: UP045
        (IntervalStrategy | str, "Literal['no', 'steps', 'epoch']"),
        (str | None | Literal[False], "str | None | Literal[False]"),
        (list[IntervalStrategy] | str, "list[Literal['no', 'steps', 'epoch']] | str"),
        (PreTrainedConfig | None, "Any"),
        (list[PreTrainedConfig], "Any"),
        (Any, "Any"),
    ],
)
def test_spell_type_is_the_source_of_the_type(hint, source):
    assert spell_type(hint) == source


@pytest.mark.parametrize(
    ("default", "source"),
    [(IntervalStrategy.STEPS, "'steps'"), (5e-05, "5e-05"), (None, "None"), (dataclasses.MISSING, "None"), (-1, "-1")],
)
def test_spell_default_is_the_source_of_a_literal_or_none(default, source):
    assert spell_default(default) == source


@pytest.mark.parametrize("name", OWNED)
def test_owned_name_is_a_field_of_the_installed_training_arguments(name):
    assert name in FIELDS


@pytest.mark.parametrize("name", OWNED)
def test_problems_of_an_owned_name_refuses_it_with_the_reason(name):
    assert find_argument_problems({name: None}) == [f"trainer.{name} cannot be set: {OWNED[name]}"]


@pytest.mark.parametrize(("merged", "into"), MERGED.items())
def test_merged_name_is_no_field_of_the_installed_training_arguments_and_its_target_is(merged, into):
    assert merged not in FIELDS
    assert into in FIELDS


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("weight_decy", "weight_decay"), ("lr_scheduler", "lr_scheduler_type"), ("max_gradnorm", "max_grad_norm")],
)
def test_problems_of_an_unknown_name_names_the_nearest(name, nearest):
    (problem,) = find_argument_problems({name: 1})
    assert f"trainer.{name} is not an argument" in problem
    assert problem.endswith(f"did you mean {nearest}?")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weight_decay", 0.1),
        ("weight_decay", 0),
        ("max_steps", 10),
        ("warmup_steps", 0.05),
        ("warmup_steps", 100),
        ("lr_scheduler_type", "cosine"),
        ("lr_scheduler_kwargs", {"num_cycles": 2}),
        ("lr_scheduler_kwargs", None),
        ("optim", "adamw_torch_fused"),
        ("optim_args", None),
        ("eval_strategy", "epoch"),
        ("save_strategy", "best"),
        ("bf16", True),
        ("torch_compile_backend", None),
        ("load_best_model_at_end", True),
        ("metric_for_best_model", "loss"),
        ("warmup_ratio", 0.1),
        ("warmup_ratio", 0),
    ],
)
def test_problems_of_a_right_value_are_none(name, value):
    assert find_argument_problems({name: value}) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weight_decay", "0.1"),
        ("weight_decay", None),
        ("max_steps", 1.5),
        ("max_steps", "ten"),
        ("bf16", "yes"),
        ("bf16", 1),
        ("lr_scheduler_type", "cosin"),
        ("optim", "adam"),
        ("eval_strategy", "epochs"),
        ("eval_strategy", True),
        ("lr_scheduler_kwargs", 3),
        ("warmup_ratio", 1.0),
        ("warmup_ratio", -0.1),
        ("warmup_ratio", "a tenth"),
    ],
)
def test_problems_of_a_wrong_value_name_the_key_and_the_value(name, value):
    found = find_argument_problems({name: value})
    assert found
    assert all(problem.startswith(f"trainer.{name}={value!r}: it should be ") for problem in found)


@pytest.mark.parametrize(
    ("arguments", "device", "problem"),
    [
        ({"fp16": True}, "cpu", "trainer.fp16=True: hardware.device=cpu ignores it (it is for cuda and mps)"),
        ({"tf32": True}, "cpu", "trainer.tf32=True: hardware.device=cpu ignores it (it is for cuda)"),
        ({"tf32": True}, "mps", "trainer.tf32=True: hardware.device=mps ignores it"),
        ({"torch_empty_cache_steps": 5}, "cpu", "trainer.torch_empty_cache_steps=5: hardware.device=cpu"),
        ({"fp16": True, "bf16": True}, "cuda", "trainer.fp16 and trainer.bf16 are both true"),
        ({"greater_is_better": True}, "cpu", "trainer.greater_is_better=True: a lower loss is better"),
        ({"metric_for_best_model": "accuracy"}, "cpu", "trainer.metric_for_best_model='accuracy': validation during"),
        ({"debug": "tpu_metrics_debug"}, "cpu", "trainer.debug='tpu_metrics_debug': the other features are for TPUs"),
        (
            {"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 4}}},
            "cpu",
            "gradient_accumulation_kwargs cannot be set: the pipeline makes its own batches",
        ),
        ({"accelerator_config": {"split_batches": True, "non_blocking": True}}, "cpu", "split_batches cannot be set"),
        ({"accelerator_config": "accelerate.json"}, "cpu", "it should be a section with keys and values"),
        ({"fsdp_config": "fsdp.json", "fsdp": True}, "cuda", "it should be a section with keys and values"),
        ({"lr_scheduler_kwargs": '{"num_cycles": 2}'}, "cpu", "it should be a section with keys and values"),
        ({"logging_steps": 0}, "cpu", "trainer.logging_steps=0: it should be above 0"),
        ({"eval_steps": -1, "eval_strategy": "steps"}, "cpu", "trainer.eval_steps=-1: it should be above 0"),
        ({"save_steps": 0, "save_strategy": "steps"}, "cpu", "trainer.save_steps=0: it should be above 0"),
        ({"max_steps": 0}, "cpu", "trainer.max_steps=0: it should be 1 or above, or -1"),
        ({"max_grad_norm": float("nan")}, "cpu", "trainer.max_grad_norm=nan: it should be 0 or above"),
        ({"weight_decay": -0.1}, "cpu", "trainer.weight_decay=-0.1: it should be 0 or above"),
        ({"eval_steps": 5, "eval_strategy": "epoch"}, "cpu", "it has no effect without trainer.eval_strategy steps"),
        ({"eval_delay": 2}, "cpu", "it has no effect without trainer.eval_strategy epoch or steps"),
        ({"save_steps": 5}, "cpu", "it has no effect without trainer.save_strategy steps"),
        ({"logging_steps": 5, "logging_strategy": "epoch"}, "cpu", "without trainer.logging_strategy steps"),
        ({"torch_compile_mode": "max-autotune", "torch_compile": False}, "cpu", "without trainer.torch_compile"),
        ({"fsdp_config": {"min_num_params": 1}}, "cuda", "it has no effect without trainer.fsdp"),
        ({"activation_checkpointing_kwargs": {"a": 1}}, "cpu", "without trainer.activation_checkpointing"),
        ({"dataloader_multiprocessing_context": "spawn"}, "cpu", "without trainer.dataloader_num_workers"),
        ({"gradient_checkpointing": True, "activation_checkpointing": False}, "cpu", "it is the old name of"),
    ],
)
def test_problems_of_a_value_that_would_be_ignored_or_do_harm_say_why(arguments, device, problem):
    (found,) = find_argument_problems(arguments, device)
    assert problem in found


@pytest.mark.parametrize(
    ("arguments", "device"),
    [
        ({"fp16": True}, "cuda"),
        ({"fp16": True}, "mps"),
        ({"fp16": False, "tf32": False}, "cpu"),
        ({"tf32": True, "bf16": True}, "cuda"),
        ({"greater_is_better": False, "metric_for_best_model": "eval_loss"}, "cpu"),
        ({"accelerator_config": {"non_blocking": True}}, "cuda"),
        ({"eval_steps": 5, "eval_strategy": "steps", "eval_delay": 1}, "cpu"),
        ({"eval_steps": None, "eval_delay": 0, "torch_compile_mode": None}, "cpu"),
        ({"logging_steps": 0.1}, "cpu"),
        ({"save_steps": 5, "save_strategy": "steps"}, "cpu"),
        ({"torch_compile": True, "torch_compile_backend": "inductor"}, "cuda"),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}, "cpu"),
    ],
)
def test_problems_of_arguments_that_go_together_are_none(arguments, device):
    assert find_argument_problems(arguments, device) == []


def test_problems_of_a_wrong_enumeration_name_the_allowed_values():
    (problem,) = find_argument_problems({"eval_strategy": "epochs"})
    assert all(f"'{allowed}'" in problem for allowed in ("no", "steps", "epoch"))


def test_problems_of_several_arguments_are_reported_together():
    assert len(find_argument_problems({"seed": 1, "weight_decy": 0.1, "max_steps": "ten", "bf16": False})) == 3


@pytest.mark.parametrize(
    ("arguments", "number"),
    [
        ({"warmup_ratio": 0.1, "warmup_steps": 0.05}, 1),
        ({"warmup_ratio": 0.1, "warmup_steps": 100}, 1),
        ({"warmup_ratio": 0.1, "warmup_steps": 0}, 0),
    ],
)
def test_problems_of_warmup_given_twice_are_found(arguments, number):
    assert len(find_argument_problems(arguments)) == number


@pytest.mark.parametrize(
    ("arguments", "resolved"),
    [
        ({"warmup_ratio": 0.1, "bf16": False}, {"warmup_steps": 0.1, "bf16": False}),
        ({"warmup_ratio": 0.1, "warmup_steps": 0}, {"warmup_steps": 0.1}),
        ({"warmup_steps": 7}, {"warmup_steps": 7}),
        ({}, {}),
    ],
)
def test_resolve_puts_the_merged_argument_into_the_one_that_took_it_in(arguments, resolved):
    assert resolve_merged(arguments) == resolved


def test_resolve_of_a_warmup_ratio_warms_up_for_that_share_of_all_steps(tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **resolve_merged({"warmup_ratio": 0.1}))
    assert arguments.get_warmup_steps(200) == 20


def test_problems_of_a_warmup_ratio_whose_steps_are_null_are_none():
    # As the error says: "give one (the other null)".
    arguments = {"warmup_ratio": 0.1, "warmup_steps": None}
    assert find_argument_problems(arguments) == []
    assert resolve_merged(arguments) == {"warmup_steps": 0.1}
