"""The `trainer` node: what is refused, why, and what reaches transformers.TrainingArguments."""

import dataclasses

import pytest
from transformers import TrainingArguments

from stages.train.trainer_arguments import MERGED, OWNED, known_arguments, problems, resolve

FIELDS = [field.name for field in dataclasses.fields(TrainingArguments)]


def test_known_arguments_are_all_fields_of_the_installed_training_arguments():
    assert sorted(known_arguments()) == sorted(FIELDS)


@pytest.mark.parametrize("name", OWNED)
def test_owned_name_is_a_field_of_the_installed_training_arguments(name):
    assert name in FIELDS


@pytest.mark.parametrize("name", OWNED)
def test_problems_of_an_owned_name_refuses_it_with_the_reason(name):
    assert problems({name: None}) == [f"trainer.{name} cannot be set: {OWNED[name]}"]


@pytest.mark.parametrize(("merged", "into"), MERGED.items())
def test_merged_name_is_no_field_of_the_installed_training_arguments_and_its_target_is(merged, into):
    assert merged not in FIELDS
    assert into in FIELDS


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("weight_decy", "weight_decay"), ("lr_scheduler", "lr_scheduler_type"), ("max_gradnorm", "max_grad_norm")],
)
def test_problems_of_an_unknown_name_names_the_nearest(name, nearest):
    (problem,) = problems({name: 1})
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
        ("fsdp_config", {"min_num_params": 0}),
        ("warmup_ratio", 0.1),
        ("warmup_ratio", 0),
    ],
)
def test_problems_of_a_right_value_are_none(name, value):
    assert problems({name: value}) == []


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
    found = problems({name: value})
    assert found
    assert all(problem.startswith(f"trainer.{name}={value!r}: it should be ") for problem in found)


def test_problems_of_a_wrong_enumeration_name_the_allowed_values():
    (problem,) = problems({"eval_strategy": "epochs"})
    assert all(f"'{allowed}'" in problem for allowed in ("no", "steps", "epoch"))


def test_problems_of_several_arguments_are_reported_together():
    assert len(problems({"seed": 1, "weight_decy": 0.1, "max_steps": "ten", "bf16": False})) == 3


@pytest.mark.parametrize(
    ("arguments", "number"),
    [
        ({"warmup_ratio": 0.1, "warmup_steps": 0.05}, 1),
        ({"warmup_ratio": 0.1, "warmup_steps": 100}, 1),
        ({"warmup_ratio": 0.1, "warmup_steps": 0}, 0),
    ],
)
def test_problems_of_warmup_given_twice_are_found(arguments, number):
    assert len(problems(arguments)) == number


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
    assert resolve(arguments) == resolved


def test_resolve_of_a_warmup_ratio_warms_up_for_that_share_of_all_steps(tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **resolve({"warmup_ratio": 0.1}))
    assert arguments.get_warmup_steps(200) == 20


def test_problems_of_a_warmup_ratio_whose_steps_are_null_are_none():
    # As the error says: "give one (the other null)".
    arguments = {"warmup_ratio": 0.1, "warmup_steps": None}
    assert problems(arguments) == []
    assert resolve(arguments) == {"warmup_steps": 0.1}
