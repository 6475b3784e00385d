"""Stage train: its rules, its outs, the best model, and the same bytes from the same inputs."""

import csv
import functools
import json
import math

import pytest
import torch
import transformers
from data_helpers import read_contents
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, TrainingArguments

from stages.core.artifacts import Blocks
from stages.core.errors import ConfigError, StageError
from stages.model.block_loss import compute_block_loss
from stages.model.hardware import Hardware
from stages.model.objectives import make_objective
from stages.model.trained import load_trained_model
from stages.tokens.vocabulary import Vocabulary, load_tokenizer
from stages.train.batches import split_batch

TASKS = ("causal", "mlm")
AUTO = {"causal": AutoModelForCausalLM, "mlm": AutoModelForMaskedLM}


def curve(report, name):
    with (report / "plots" / "metrics" / f"{name}.tsv").open() as file:
        return [(int(row["step"]), float(row[name.rpartition("/")[2]])) for row in csv.DictReader(file, delimiter="\t")]


# -- rules -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["hardware.per_device_batch_size=3"], "batch_size=8 is not a multiple of 3"),
        (["block_size=65"], "block_size=65 is above the model's positions, 64"),
        (["model.task=mlm"], "model.task=mlm: this model cannot be trained with objective.name=causal"),
        (["++trainer.learning_rate=1"], "trainer.learning_rate cannot be set: it is set in params.yaml"),
        (["++trainer.weight_decy=1"], "did you mean weight_decay?"),
        (["early_stopping={patience: 1, threshold: 0.0}"], "early_stopping needs trainer.load_best_model_at_end"),
        (["learning_rate=0"], "learning_rate=0: it should be greater than 0"),
        (["num_train_epochs=0"], "num_train_epochs=0: it should be greater than 0"),
        (["num_train_epochs=null"], "num_train_epochs=null: set a number, or set trainer.max_steps"),
        (
            ["checkpoints.keep_for_branches={every_steps: null, gigabytes: 1.0, directory: kept}"],
            "checkpoints.keep_for_branches.directory=kept: it should be an absolute path",
        ),
        (["batch_size=0"], "batch_size=0: it should be greater than or equal to 1"),
        (["seed=-1"], "seed=-1: it should be greater than or equal to 0"),
        (["++objective.mlm_probability=0.15"], "objective.mlm_probability has no meaning"),
        (["block_size=1"], "block_size=1: a causal model predicts a token from those before it"),
    ],
)
def test_train_config_that_breaks_a_rule_is_a_config_error_that_names_it(
    compose_stage, overrides, tmp_path, more, message
):
    with pytest.raises(ConfigError) as caught:
        compose_stage("train", *overrides("train", "causal", tmp_path, *more))
    assert len(caught.value.problems) == 1
    assert message in caught.value.problems[0]


def test_train_config_with_several_mistakes_names_them_all(compose_stage, overrides, tmp_path):
    more = ["block_size=65", "hardware.per_device_batch_size=3", "++trainer.weight_decy=1", "learning_rate=-1"]
    with pytest.raises(ConfigError) as caught:
        compose_stage("train", *overrides("train", "causal", tmp_path, *more))
    assert len(caught.value.problems) == len(more)


@pytest.mark.parametrize(
    ("at_once", "processes", "expected"),
    [(None, 1, (8, 1)), (4, 1, (4, 2)), (8, 1, (8, 1)), (None, 2, (4, 1)), (2, 2, (2, 2))],
)
def test_split_batch_on_any_hardware_adds_up_to_batch_size(at_once, processes, expected):
    assert split_batch(8, hardware(at_once), processes) == expected


@pytest.mark.parametrize(
    ("at_once", "processes", "message"),
    [
        (3, 1, "multiple of 3, for 3 sequences .*; set it to 6 or 9"),
        (None, 16, "multiple of 16, for 16 processes .*; set it to 16"),
        (4, 3, "multiple of 12, for 3 processes .* of 4 sequences .*; set it to 12"),
    ],
)
def test_split_batch_of_a_size_that_does_not_divide_names_the_nearest_that_do(at_once, processes, message):
    with pytest.raises(ValueError, match=f"batch_size=8 is not a {message}"):
        split_batch(8, hardware(at_once), processes)


def hardware(at_once):
    return Hardware(device="cpu", num_threads=1, per_device_batch_size=at_once, evaluate_batch_tokens=64)


# -- outs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_train_of_a_toy_corpus_writes_model_tokenizer_curves_and_ledger(trained, corpus, task):
    root = trained[task]
    files = read_contents(root / "model")
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= files.keys()
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl"))]
    tokenizer = corpus / "tokens" / task / "tokenizer"
    assert (tokenizer / "tokenizer.json").read_bytes() == files["tokenizer.json"]
    ledger = json.loads((root / "report" / "stats.json").read_text())
    num_blocks = len(Blocks(corpus / "blocks-16" / task / "train"))
    assert ledger["blocks"] == num_blocks
    assert ledger["steps"] == 2 * math.ceil(num_blocks / 8)
    validation = curve(root / "report", "validation/loss")
    assert [step for step, _ in validation] == [ledger["steps"] // 2, ledger["steps"]]
    assert curve(root / "report", "train/loss")


@pytest.mark.parametrize("task", TASKS)
def test_train_of_a_toy_corpus_ends_with_the_validation_loss_of_the_saved_model(
    trained, corpus, compose_stage, overrides, task
):
    root, vocabulary = trained[task], Vocabulary.read(corpus / "tokens" / task)
    config = compose_stage("train", *overrides("train", task, root))
    model = load_trained_model(task, root / "model")
    objective = make_objective(task, vocabulary, config.objective, model)
    loss = compute_block_loss(model, objective, Blocks(corpus / "blocks-16" / task / "validation"), 4096)
    assert curve(root / "report", "validation/loss")[-1][1] == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("task", TASKS)
def test_train_run_twice_gives_the_same_bytes(trained, run_toy, cache, tmp_path, task):
    run_toy("train", task, tmp_path)
    assert read_contents(tmp_path / "model") == read_contents(trained[task] / "model")
    assert read_contents(tmp_path / "report") == read_contents(trained[task] / "report")


def test_train_with_another_seed_gives_other_weights(trained, run_toy, cache, tmp_path):
    run_toy("train", "causal", tmp_path, "seed=43")
    ours, theirs = (read_contents(root / "model")["model.safetensors"] for root in (tmp_path, trained["causal"]))
    assert ours != theirs


def test_train_with_accumulation_ends_near_the_weights_of_the_whole_batch(run_toy, cache, tmp_path):
    run_toy("train", "causal", tmp_path, "hardware.per_device_batch_size=2", "++trainer.adam_epsilon=1e-3")
    run_toy("train", "causal", tmp_path / "whole", "++trainer.adam_epsilon=1e-3")
    ours, theirs = (
        load_trained_model("causal", root / "model").state_dict() for root in (tmp_path, tmp_path / "whole")
    )
    for name, weights in theirs.items():
        torch.testing.assert_close(ours[name], weights, rtol=1e-4, atol=1e-5)


def test_train_of_so_many_steps_is_that_long(run_toy, cache, tmp_path):
    run_toy("train", "causal", tmp_path, "num_train_epochs=null", "+trainer.max_steps=5", "trainer.logging_steps=1")
    assert [step for step, _ in curve(tmp_path / "report", "train/loss")] == [1, 2, 3, 4, 5]


def test_train_leaves_no_checkpoints(trained, cache):
    assert not list(cache.rglob("checkpoint-*"))


@pytest.mark.parametrize("task", TASKS)
def test_trained_model_loads_with_transformers_auto_classes(trained, corpus, task):
    directory = trained[task] / "model"
    model, tokenizer = AUTO[task].from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    special = Vocabulary.read(corpus / "tokens" / task).special
    assert model.config.vocab_size == len(tokenizer) == 300
    assert {role: getattr(tokenizer, f"{role}_id") for role in special} == special
    text = "A café — 日本 shines."
    ours = load_tokenizer(corpus / "tokens" / task / "tokenizer").encode(text).ids
    assert tokenizer(text)["input_ids"] == ours
    assert tokenizer.decode(ours, skip_special_tokens=True) == text


def test_trained_causal_model_runs_in_the_text_generation_pipeline(trained):
    generate = transformers.pipeline("text-generation", model=str(trained["causal"] / "model"), device="cpu")
    (found,) = generate("Rain falls", max_new_tokens=4, do_sample=False)
    assert found["generated_text"].startswith("Rain falls")
    assert len(found["generated_text"]) > len("Rain falls")


def test_trained_masked_model_runs_in_the_fill_mask_pipeline(trained):
    fill = transformers.pipeline("fill-mask", model=str(trained["mlm"] / "model"), device="cpu")
    found = fill("Rain falls when air <mask>.", top_k=3)
    assert len(found) == 3
    assert 0.0 < found[0]["score"] <= 1.0


def test_trained_causal_model_keeps_the_cache_that_generation_needs(trained):
    assert json.loads((trained["causal"] / "model" / "config.json").read_text())["use_cache"] is True


# -- the best model ----------------------------------------------------------------------------------------------------

# The learning rate rises until it ruins the model, so that the last model is not the best.
RUINED = ["learning_rate=5", "++trainer.lr_scheduler_type=constant_with_warmup", "++trainer.warmup_steps=40"]
BEST = ["++trainer.load_best_model_at_end=true", "++trainer.save_strategy=epoch", "++trainer.eval_strategy=epoch"]


@pytest.mark.parametrize("task", TASKS)
def test_train_with_the_best_model_at_the_end_saves_the_one_of_least_validation_loss(
    run_toy, cache, corpus, compose_stage, overrides, tmp_path, task
):
    more = [*BEST, *RUINED, "num_train_epochs=5"]
    run_toy("train", task, tmp_path, *more)
    losses = dict(curve(tmp_path / "report", "validation/loss"))
    ledger = json.loads((tmp_path / "report" / "stats.json").read_text())
    assert ledger["best_step"] == min(losses, key=losses.get) != max(losses)
    assert ledger["best_validation_loss"] == pytest.approx(min(losses.values()), rel=1e-6)
    config = compose_stage("train", *overrides("train", task, tmp_path, *more))
    model = load_trained_model(task, tmp_path / "model")
    objective = make_objective(task, Vocabulary.read(corpus / "tokens" / task), config.objective, model)
    saved = compute_block_loss(model, objective, Blocks(corpus / "blocks-16" / task / "validation"), 4096)
    assert saved == pytest.approx(min(losses.values()), rel=1e-6)
    assert not list(cache.rglob("checkpoint-*"))


@pytest.mark.parametrize("patience", [1, 2])
def test_train_with_early_stopping_stops_after_patience_evaluations_without_improvement(
    run_toy, cache, tmp_path, patience
):
    more = [*BEST, *RUINED, "num_train_epochs=20"]
    run_toy("train", "causal", tmp_path, *more, f"early_stopping={{patience: {patience}, threshold: 0.0}}")
    losses = [loss for _, loss in curve(tmp_path / "report", "validation/loss")]
    best = losses.index(min(losses))
    assert len(losses) == best + 1 + patience < 20


def test_train_with_the_best_model_at_the_end_run_twice_gives_the_same_bytes(run_toy, cache, tmp_path):
    for name in ("one", "two"):
        run_toy("train", "causal", tmp_path / name, *BEST)
    assert read_contents(tmp_path / "one") == read_contents(tmp_path / "two")


def test_train_that_diverges_stops_with_the_step_and_writes_nothing(run_toy, cache, tmp_path):
    with pytest.raises(StageError, match=r"loss is (nan|inf) at step \d+"):
        run_toy(
            "train", "causal", tmp_path, "learning_rate=1e30", "++trainer.max_grad_norm=0", "++trainer.logging_steps=1"
        )
    assert not (tmp_path / "model").exists()


def test_train_that_diverges_behind_a_checkpoint_names_it(run_toy, cache, tmp_path):
    rising = [
        "learning_rate=1e30",
        "++trainer.max_grad_norm=0",
        "++trainer.warmup_steps=1000",
        "trainer.logging_steps=1",
    ]
    with pytest.raises(StageError, match=r"at step \d+: .* \(the last checkpoint: .*/checkpoint-\d+\)"):
        run_toy("train", "causal", tmp_path, *rising, "++trainer.save_strategy=steps", "++trainer.save_steps=1")


def test_training_in_one_process_uses_one_of_several_gpus(overrides, compose_stage, tmp_path, monkeypatch):
    from stages.frameworks.trainer.arguments import make_arguments

    original = TrainingArguments._setup_devices

    def find_two_gpus(self):
        device = original.func(self)
        self._n_gpu = 2
        return device

    replacement = functools.cached_property(find_two_gpus)
    replacement.__set_name__(TrainingArguments, "_setup_devices")
    monkeypatch.setattr(TrainingArguments, "_setup_devices", replacement)
    assert TrainingArguments(str(tmp_path), per_device_train_batch_size=8).train_batch_size == 16
    config = compose_stage("train", *overrides("train", "causal", tmp_path))
    assert make_arguments(config, config.trainer, str(tmp_path), 8, 1).train_batch_size == 8
