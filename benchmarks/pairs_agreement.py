"""Compare scores of minimal pairs with those of other libraries, for the same models and sentences.

Command python -m benchmarks.pairs_agreement [--pairs data/pairs/english.jsonl]
Needs   the outputs of `dvc repro`, and `uv pip install lm_eval minicons`

Causal: lm_eval's loglikelihood of whole sentences, and of a choice after a prompt (the first word is the prompt, the
rest is the choice). Masked: minicons' pseudo-log-likelihood with the correction of Kauf and Ivanova (within_word_l2r).
The last line printed is one JSON object with the largest relative difference of each.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from minicons.scorer import MaskedLMScorer
from transformers import AutoTokenizer

from stages.model.trained import load_trained_model
from stages.score.items import Item
from stages.score.likelihoods import encode_choices, score_choices
from stages.tokens.vocabulary import Vocabulary, load_tokenizer

CONTEXT, BATCH_TOKENS = 128, 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--pairs", type=Path, default=Path("data/pairs/english.jsonl"))
    lines = [json.loads(line) for line in parser.parse_args().pairs.read_text(encoding="utf-8").splitlines()]
    sentences = [Item("pairs", row, "", [line["good"], line["bad"]], 0, []) for row, line in enumerate(lines, 1)]
    texts = [text for item in sentences for text in item.choices]
    first, rest = zip(*(text.split(" ", 1) for text in texts), strict=True)
    questions = [Item("pairs", 0, prompt, [text], 0, []) for prompt, text in zip(first, rest, strict=True)]
    harness, end = make_harness(Path("models/causal"))
    found = {
        "sentences": len(texts),
        "lm_eval_sentences": compute_largest_difference(
            score_with_pipeline("causal", sentences), compute_loglikelihoods(harness, [("", text) for text in texts])
        ),
        "lm_eval_choices": compute_largest_difference(
            score_with_pipeline("causal", questions),
            compute_loglikelihoods(
                harness, [(end + prompt, f" {text}") for prompt, text in zip(first, rest, strict=True)]
            ),
        ),
        "minicons_sentences": compute_largest_difference(
            score_with_pipeline("mlm", sentences), compute_pseudo_log_likelihoods("models/mlm", texts)
        ),
    }
    print(json.dumps(found))


def score_with_pipeline(task: str, items: list[Item]) -> np.ndarray:
    """The score of each choice by the trained model of `task`, [num_choices]."""
    tokens = Path(f"data/tokens/{task}")
    vocabulary = Vocabulary.read(tokens)
    choices = encode_choices(items, load_tokenizer(tokens / "tokenizer"), vocabulary, " ")
    model = load_trained_model(task, f"models/{task}")
    return score_choices(model, task, choices, vocabulary, CONTEXT, BATCH_TOKENS)[0]


def make_harness(model: Path) -> tuple[Any, str]:
    """Return lm_eval's model and the end-of-sequence token, which precedes every text as in training."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = load_trained_model("causal", model)
    harness = HFLM(pretrained=loaded, tokenizer=tokenizer, batch_size=16, device="cpu", add_bos_token=False)
    harness.custom_prefix_token_id = tokenizer.eos_token_id
    return harness, tokenizer.eos_token


def compute_loglikelihoods(harness: Any, requests: list[tuple[str, str]]) -> np.ndarray:
    instances = [Instance("loglikelihood", {}, request, index) for index, request in enumerate(requests)]
    with torch.inference_mode():
        return np.array([score for score, _ in harness.loglikelihood(instances, disable_tqdm=True)])


def compute_pseudo_log_likelihoods(model: str, texts: list[str]) -> np.ndarray:
    scorer = MaskedLMScorer(model, "cpu")
    scorer.tokenizer.batch_encode_plus = scorer.tokenizer.__call__  # renamed in transformers 5
    scores: list[float] = []
    for start in range(0, len(texts), 16):
        batch = texts[start : start + 16]
        scores += scorer.sequence_score(batch, reduction=lambda x: x.sum(0).item(), PLL_metric="within_word_l2r")
    return np.array(scores)


def compute_largest_difference(one: np.ndarray, other: np.ndarray) -> float:
    """Return the largest relative difference of two arrays `[num_scores]`, relative to `other`."""
    return float(np.max(np.abs(one - other) / np.abs(other)))


if __name__ == "__main__":
    main()
