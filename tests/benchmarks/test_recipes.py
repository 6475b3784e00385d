"""The recipes of benchmarks/recipes.py: that they can be run, and that the default masked model uses its context."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.recipes import RECIPES, Recipe, evaluate, prepare, run_stage, train
from stages.core.artifacts import Documents
from stages.core.compose import compose, load
from stages.figures.samples import make_samples
from stages.model.trained import load_trained
from stages.tokens.vocabulary import Vocabulary
from tools.check import schema_of

EACH = [(task, name) for task, recipes in RECIPES.items() for name in recipes]


@pytest.mark.parametrize(("task", "name"), EACH)
def test_recipe_composes_in_every_stage_that_it_changes(task: str, name: str) -> None:
    recipe = RECIPES[task][name]
    for stage, overrides in {
        "tokenize": recipe.model,
        "baseline": recipe.model,
        "train": [*recipe.model, *recipe.training],
    }.items():
        config = load(schema_of(stage), compose(stage, [f"task={task}", *overrides]))
        assert isinstance(config, schema_of(stage))


def unigram_bits_per_byte(tokens: Path) -> float:
    """Of validation's text, by the frequencies of the tokens in training with one added to each count."""
    vocabulary = Vocabulary.read(tokens)
    training, validation = Documents(tokens / "train"), Documents(tokens / "validation")

    def counts(documents: Documents) -> np.ndarray:
        ids = np.concatenate([vocabulary.text_tokens(documents[index]) for index in range(len(documents))])
        return np.bincount(ids, minlength=vocabulary.size)

    shares = (counts(training) + 1) / (counts(training) + 1).sum()
    return float(-(counts(validation) * np.log2(shares)).sum() / validation.num_bytes.sum())


@pytest.mark.slow
def test_default_masked_model_predicts_by_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LM_REPRO_CACHE", str(tmp_path / "cache"))
    run_stage("download", f"out={tmp_path / 'raw'}")
    prepare(tmp_path, tmp_path / "raw", "mlm", Recipe([], []), "hardware=cpu")
    train(tmp_path, "mlm", Recipe([], []), "hardware=cpu")
    figures = evaluate(tmp_path, "mlm", "hardware=cpu")
    assert figures["val"]["pseudo_bpb"] < 0.85 * unigram_bits_per_byte(tmp_path / "mlm/tokens")
    samples = load(schema_of("evaluate"), compose("evaluate", ["task=mlm"])).samples
    model, tokens = load_trained("mlm", tmp_path / "mlm/model"), tmp_path / "mlm/tokens"
    filled = make_samples(samples, "mlm", model, None, tokens / "tokenizer", Vocabulary.read(tokens))
    likeliest = [prompt["tokens"][0][0] for prompt in filled]
    assert len(set(likeliest)) == len(likeliest)
