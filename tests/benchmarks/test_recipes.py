"""Tests of benchmarks/recipes.py: every recipe composes, and the default masked model uses its context."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.recipes import RECIPES, Recipe, evaluate_recipe, make_inputs, run_stage, train_recipe
from stages.core.artifacts import Documents
from stages.core.compose import compose_config, load_config
from stages.figures.samples import make_samples
from stages.model.trained import load_trained_model
from stages.tokens.texts import choose_flatten
from stages.tokens.vocabulary import Vocabulary
from tools.check import get_config_class

ALL_RECIPES = [(task, name) for task, recipes in RECIPES.items() for name in recipes]


@pytest.mark.parametrize(("task", "name"), ALL_RECIPES)
def test_recipe_composes_in_every_stage_that_it_changes(task: str, name: str) -> None:
    recipe = RECIPES[task][name]
    for stage, overrides in {
        "tokenize": recipe.model,
        "baseline": recipe.model,
        "train": [*recipe.model, *recipe.training],
    }.items():
        config = load_config(get_config_class(stage), compose_config(stage, [f"task={task}", *overrides]))
        assert isinstance(config, get_config_class(stage))


def compute_unigram_bits_per_byte(tokens: Path) -> float:
    """Return the bits per byte of the validation text under add-one token frequencies of the training text."""
    vocabulary = Vocabulary.read(tokens)
    training, validation = Documents(tokens / "train"), Documents(tokens / "validation")

    def count_tokens(documents: Documents) -> np.ndarray:  # [vocab_size], int64
        ids = np.concatenate([vocabulary.select_text_tokens(documents[index]) for index in range(len(documents))])
        return np.bincount(ids, minlength=vocabulary.size)

    probabilities = (count_tokens(training) + 1) / (count_tokens(training) + 1).sum()
    return float(-(count_tokens(validation) * np.log2(probabilities)).sum() / validation.num_bytes.sum())


@pytest.mark.slow
def test_default_masked_model_predicts_by_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LM_REPRO_CACHE", str(tmp_path / "cache"))
    run_stage("download", f"out={tmp_path / 'raw'}")
    make_inputs(tmp_path, tmp_path / "raw", "mlm", Recipe([], []), "hardware=cpu")
    train_recipe(tmp_path, "mlm", Recipe([], []), "hardware=cpu")
    figures = evaluate_recipe(tmp_path, "mlm", "hardware=cpu")
    assert figures["val"]["pseudo_bpb"] < 0.85 * compute_unigram_bits_per_byte(tmp_path / "mlm/tokens")
    config = load_config(get_config_class("evaluate"), compose_config("evaluate", ["task=mlm"]))
    model, tokens = load_trained_model("mlm", tmp_path / "mlm/model"), tmp_path / "mlm/tokens"
    flatten = choose_flatten(config.flatten, config.data)
    filled = make_samples(config.samples, "mlm", model, None, tokens / "tokenizer", Vocabulary.read(tokens), flatten)
    likeliest = [prompt["tokens"][0][0] for prompt in filled]
    assert len(set(likeliest)) == len(likeliest)
