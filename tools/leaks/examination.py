"""Examination of a trained model: all figures of the leak report."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from stages.baseline.stage import BaselineConfig
from stages.core.artifacts import Documents, read_json
from stages.evaluate.stage import EvaluateConfig
from stages.figures.metrics import compute_document_nats
from stages.figures.names import EVALUATED
from stages.model.models import build_model, prepare_torch
from stages.model.objectives import make_objective
from stages.model.schema import Model
from stages.model.trained import load_trained_model
from stages.tokens.encoding import DocumentText, TokenizersEngine
from stages.tokens.texts import TextFile, choose_flatten, load_template
from stages.tokens.vocabulary import Vocabulary, load_tokenizer
from tools.leaks.canaries import compute_exposure, count_planted, draw_alternatives, mask_digits, summarize_exposures
from tools.leaks.measures import (
    CONTINUATION_TOKENS,
    PIECE_TOKENS,
    PROMPT_TOKENS,
    Continuation,
    SampledText,
    compute_piece_scores,
    continue_texts,
    measure_membership,
    sample_texts,
    summarize_continuations,
)

_SEED = 0  # of the random texts that canaries are compared with
_NUM_EXAMPLES = 3


def examine_model(
    evaluate: EvaluateConfig,
    baseline: BaselineConfig,
    initial: Model | None,
    canaries: Sequence[str],
    num_documents: int,
) -> dict[str, Any]:
    """Measure all figures of a trained model.

    Args:
        initial: model before any training by this project. It is not `baseline.start`, which has learned most of the
            same text: the loss would hardly differ from that of the trained model. None: unknown.
        canaries: texts that were added to the data; may be empty.
        num_documents: highest number of documents of train, and of held-out ones.

    Returns:
        Keys: objective, documents, seed, continuation (None for a masked model), membership (a list, first for short
        pieces; None if the initial model is unknown), exposure (None without canaries).
    """
    prepare_torch(evaluate.hardware)
    name, tokens, context = evaluate.objective.name, Path(evaluate.tokens), evaluate.evaluate.context
    vocabulary, batch_tokens = Vocabulary.read(tokens), evaluate.hardware.evaluate_batch_tokens
    include_prompts = evaluate.evaluate.include_prompts
    objective, tokenizer = make_objective(name, vocabulary), load_tokenizer(tokens / "tokenizer")
    sides = []  # documents of train, and held-out ones
    for splits in (("train",), EVALUATED):
        documents = {split: Documents(tokens / split) for split in splits}
        sampled = sample_texts(documents, vocabulary, num_documents, include_prompts)
        sides.append([item for item in sampled if not has_canary(item, tokenizer, canaries)])
    device = evaluate.hardware.device
    model = load_trained_model(name, evaluate.trained).to(device)
    membership = None
    if initial is not None:
        models = (build_model(initial, vocabulary, baseline.seed).to(device), model)
        lengths = sorted({min(PIECE_TOKENS, context), context})
        scores = [
            compute_piece_scores(models, objective, [item.text for item in side], lengths, batch_tokens)
            for side in sides
        ]
        measured = [(length, measure_membership(*pair)) for length, *pair in zip(lengths, *scores, strict=True)]
        membership = [{"tokens": length, **found} for length, found in measured if found is not None]
    continuation = None
    if name == "causal":
        train, held_out = (continue_texts(model, vocabulary, side, context, batch_tokens) for side in sides)
        continuation = {
            "prompt_tokens": min(PROMPT_TOKENS, context // 2),
            "continuation_tokens": min(CONTINUATION_TOKENS, context - context // 2),
            "train": summarize_continuations(train, len(sides[0])),
            "held_out": summarize_continuations(held_out, len(sides[1])),
            "examples": list_examples(train, tokenizer),
        }

    def compute_nats(texts: list[str]) -> npt.NDArray[np.float64]:
        encoded = TokenizersEngine(tokenizer)(texts)
        documents = [DocumentText(ids, 0) for ids in np.split(encoded.ids, encoded.offsets[1:-1])]
        windows = objective.build_windows(documents, context)
        return compute_document_nats(model, windows, len(documents), batch_tokens)[0]

    exposure = None
    if canaries:
        exposures = measure_exposures(compute_nats, canaries)
        flatten = choose_flatten(evaluate.flatten, evaluate.data)
        template = load_template(flatten, tokens / "tokenizer", tokenizer, vocabulary.special)
        sources = read_json(tokens / "stats.json")["sources"]
        texts = TextFile(Path(baseline.raw) / "train.parquet", flatten, sources, template)
        exposure = summarize_exposures(canaries, count_planted(texts, canaries), exposures)
    return {
        "objective": name,
        "documents": num_documents,
        "seed": _SEED,
        "continuation": continuation,
        "membership": membership,
        "exposure": exposure,
    }


def has_canary(sampled: SampledText, tokenizer: Tokenizer, canaries: Sequence[str]) -> bool:
    """Return True if a document contains a canary.

    Such documents are only measured as canaries: held-out ones look like those of train, from which they differ in
    their digits only.
    """
    text = tokenizer.decode(sampled.text.ids.tolist(), skip_special_tokens=False) if canaries else ""
    return any(canary in text for canary in canaries)


def list_examples(continuations: Sequence[Continuation], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Return the continuations that are closest to their documents, as text.

    Where a token ends within a character, the text has U+FFFD.
    """
    closest = sorted(continuations, key=lambda item: (item.distance, -len(item.truth)))[:_NUM_EXAMPLES]
    return [
        {
            "record": item.source.record,
            "edit_distance": item.distance,
            "prompt": tokenizer.decode(item.prompt, skip_special_tokens=False),
            "document": tokenizer.decode(item.truth, skip_special_tokens=False),
            "model": tokenizer.decode(item.generated, skip_special_tokens=False),
        }
        for item in closest
    ]


def measure_exposures(
    compute_nats: Callable[[list[str]], npt.NDArray[np.float64]], canaries: Sequence[str]
) -> list[float]:
    """Measure the exposure of each canary in bits, among random texts of its form.

    Args:
        compute_nats: computes -ln p of texts, [num_texts] float64.
    """
    generator = random.Random(_SEED)
    # The same alternatives serve all canaries of a form.
    alternatives = {
        form: compute_nats(draw_alternatives(form, generator)) for form in dict.fromkeys(map(mask_digits, canaries))
    }
    nats = compute_nats(list(canaries)).tolist()
    return [
        compute_exposure(value, alternatives[mask_digits(canary)]) for value, canary in zip(nats, canaries, strict=True)
    ]
