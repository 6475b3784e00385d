"""Measures of how much of its training text a model gives away: continuations and membership.

Both compare documents of train with held-out ones, and score tokens as the metrics do.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import brentq
from transformers import GenerationConfig

from stages.core.artifacts import Documents
from stages.figures.metrics import choose_documents, compute_document_nats
from stages.figures.texts import SplitTexts
from stages.model.objectives import Objective, Window
from stages.model.precision import full_precision
from stages.score.accuracy import compute_wilson_interval
from stages.tokens.encoding import DocumentText
from stages.tokens.vocabulary import Vocabulary

PROMPT_TOKENS = CONTINUATION_TOKENS = 50
"""Tokens of a prompt and of its continuation (Carlini et al. 2023, arXiv:2202.07646), at most half of a document."""
MIN_DOCUMENT_TOKENS = 16
"""Shorter documents are left out: a few tokens agree by chance, and say little."""
NEAR_VERBATIM = 0.1
"""Edit distance, as a share of the tokens, up to which a continuation counts as near-verbatim (Gemma Team 2024,
arXiv:2403.08295). Ippolito et al. 2023 (arXiv:2210.17546) show that exact matches miss most of what is memorized."""
PIECE_TOKENS = 32
"""Tokens of the short pieces for the membership score, the shortest of WikiMIA's lengths (Shi et al. 2024,
arXiv:2310.16789). Longer texts are easier to recognize, and the score of all models approaches 1."""
FALSE_POSITIVES = 0.01
"""False-positive rate at which the true-positive rate is reported (Carlini et al. 2022, arXiv:2112.03570)."""

_Z = 1.959963984540054  # standard normal quantile of a two-sided 95 % interval


class SampledText(NamedTuple):
    """A document of the sample."""

    split: str
    record: int
    """Number of its record in the split."""
    text: DocumentText


def sample_texts(
    splits: dict[str, Documents], vocabulary: Vocabulary, num_documents: int, include_prompts: bool
) -> list[SampledText]:
    """Return at most `num_documents` documents, evenly spaced over all splits in their order.

    Args:
        include_prompts: `evaluate.include_prompts`: whether all text of a document is scored or only what counts.
    """
    chosen = choose_documents(sum(map(len, splits.values())), num_documents)
    sampled: list[SampledText] = []
    start = 0
    for split, documents in splits.items():
        numbers = chosen[(chosen >= start) & (chosen < start + len(documents))] - start
        texts = SplitTexts(documents, vocabulary, include_prompts)
        records = texts.get_records(numbers).tolist()
        sampled += map(SampledText, [split] * len(numbers), records, texts.read_texts(numbers))
        start += len(documents)
    return sampled


# -- continuations -----------------------------------------------------------------------------------------------------


class Continuation(NamedTuple):
    """The model's most likely continuation of the beginning of a document, and the document's own."""

    source: SampledText
    prompt: list[int]
    truth: list[int]
    generated: list[int]
    """As long as `truth`."""

    @property
    def distance(self) -> float:
        """Edit distance from the truth, as a share of its tokens."""
        return compute_edit_distance(self.generated, self.truth) / len(self.truth)


def continue_texts(
    model: Any, vocabulary: Vocabulary, sampled: Sequence[SampledText], context: int, batch_tokens: int
) -> list[Continuation]:
    """Let a causal model continue the first half of each document, greedily; documents that are too short are left out.

    Args:
        context: maximum number of tokens of a prompt and its continuation.
        batch_tokens: maximum number of tokens per batch.
    """
    lead = vocabulary.lead
    most = min(PROMPT_TOKENS + CONTINUATION_TOKENS, context)
    by_length: dict[int, list[tuple[int, SampledText, list[int]]]] = defaultdict(list)
    for number, source in enumerate(sampled):
        ids = source.text.ids[:most].tolist()
        if len(ids) >= MIN_DOCUMENT_TOKENS:
            by_length[len(ids) // 2].append((number, source, ids))
    found: dict[int, Continuation] = {}
    # Replaces the generation settings of the checkpoint. Generation goes on past the end of a document.
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=vocabulary.special["eos_token"])
    with full_precision(model):
        # The prompts of a batch have equal lengths, so that no padding changes the model's output.
        for length, items in by_length.items():
            rows = max(1, batch_tokens // (len(lead) + 2 * length + 1))
            for batch in (items[start : start + rows] for start in range(0, len(items), rows)):
                # [batch, num_lead + length]
                inputs = torch.tensor([[*lead, *ids[:length]] for _, _, ids in batch], device=model.device)
                num_new = max(len(ids) - length for _, _, ids in batch)
                outputs = model.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=num_new)
                for (number, source, ids), row in zip(batch, outputs[:, inputs.shape[1] :].tolist(), strict=True):
                    truth = ids[length:]
                    found[number] = Continuation(source, ids[:length], truth, row[: len(truth)])
    return [found[number] for number in sorted(found)]


def compute_edit_distance(one: Sequence[int], other: Sequence[int]) -> int:
    """Compute the least number of insertions, deletions and substitutions between two sequences (Levenshtein 1966)."""
    above = list(range(len(other) + 1))
    for row, left in enumerate(one, 1):
        current = [row]
        for column, right in enumerate(other, 1):
            current.append(min(above[column] + 1, current[-1] + 1, above[column - 1] + (left != right)))
        above = current
    return above[-1]


def summarize_continuations(continuations: Sequence[Continuation], num_sampled: int) -> dict[str, Any] | None:
    """Return the share of near-verbatim continuations with its 95 % interval (Wilson 1927); None without documents.

    Args:
        num_sampled: number of documents, including those that are too short to be continued.
    """
    if not continuations:
        return None
    num_verbatim = sum(item.distance <= NEAR_VERBATIM for item in continuations)
    low, high = compute_wilson_interval(num_verbatim, len(continuations))
    return {
        "documents": len(continuations),
        "too_short": num_sampled - len(continuations),
        "exact": sum(item.generated == item.truth for item in continuations),
        "near_verbatim": num_verbatim,
        "share": num_verbatim / len(continuations),
        "low": low,
        "high": high,
    }


# -- membership --------------------------------------------------------------------------------------------------------


def compute_piece_scores(
    models: Sequence[Any], objective: Objective, texts: Sequence[DocumentText], lengths: Sequence[int], batch: int
) -> npt.NDArray[np.float64]:
    """Compute the share of the bits of the beginning of each document that training did not save.

    This is the loss calibrated by that of the model before any training, as in Carlini et al. 2021 (arXiv:2012.07805),
    who divide by the loss of another model. Documents of train have lower scores than others if the model remembers
    them.

    Args:
        models: the model before any training by this project, and the trained one.
        lengths: numbers of tokens of the beginnings, ascending; only the tokens that are predicted are counted.
        batch: maximum number of tokens per batch.

    Returns:
        [num_lengths, num_documents] float64; NaN for a document with fewer than MIN_DOCUMENT_TOKENS predicted tokens.
    """
    pieces = [cut_text(text, lengths[-1]) for text in texts]
    nats = np.stack([sum_piece_nats(model, objective, pieces, lengths, batch) for model in models])
    scores: npt.NDArray[np.float64] = nats[1] / nats[0]
    return scores


def cut_text(text: DocumentText, num_tokens: int) -> DocumentText:
    """Return the beginning of a document with `num_tokens` predicted tokens, or the document if it has fewer."""
    if text.is_predicted is None:
        return text._replace(ids=text.ids[:num_tokens])
    predicted = np.flatnonzero(text.is_predicted)[:num_tokens]
    end = int(predicted[-1]) + 1 if len(predicted) else 0
    return text._replace(ids=text.ids[:end], is_predicted=text.is_predicted[:end])


def sum_piece_nats(
    model: Any, objective: Objective, pieces: Sequence[DocumentText], lengths: Sequence[int], batch_tokens: int
) -> npt.NDArray[np.float64]:
    """Sum -ln p over the first predicted tokens of each document.

    Returns:
        [num_lengths, num_documents] float64; NaN for a document with fewer than MIN_DOCUMENT_TOKENS predicted tokens.
    """
    tokens = [np.full(len(piece.ids), np.nan) for piece in pieces]

    def store_nats(window: Window, nats: npt.NDArray[np.float64]) -> None:
        tokens[window.document_index][window.document_positions] = nats

    windows = objective.build_windows(pieces, lengths[-1])
    compute_document_nats(model, windows, len(pieces), batch_tokens, store_nats)
    predicted = [nats[~np.isnan(nats)] for nats in tokens]
    return np.array(
        [
            [nats[:length].sum() if len(nats) >= MIN_DOCUMENT_TOKENS else np.nan for nats in predicted]
            for length in lengths
        ]
    )


def measure_membership(
    train: npt.NDArray[np.float64], held_out: npt.NDArray[np.float64]
) -> dict[str, float | int] | None:
    """Measure how well a score tells documents of train from held-out ones; None without documents on a side.

    Keys: the numbers of documents; auc, the probability that a document of train has the lower score, with the ends of
    its 95 % interval; tpr, the share of train that is found if at most FALSE_POSITIVES of the others are taken for it;
    fpr, the false-positive rate to expect at that threshold, which is above FALSE_POSITIVES for few documents. tpr has
    no interval: Wilson's would take the threshold as known, and covers 29 % instead of 95 % with 51 held-out documents.

    Args:
        train: [num_train] float64; NaN is left out.
        held_out: [num_held_out] float64; the same.
    """
    members, others = np.sort(-train[~np.isnan(train)]), np.sort(-held_out[~np.isnan(held_out)])  # higher: a member
    if not len(members) or not len(others):
        return None
    below, up_to = (np.searchsorted(others, members, side=side).sum() for side in ("left", "right"))
    auc = float(below + up_to) / (2 * len(members) * len(others))
    low, high = compute_auc_interval(auc, len(members), len(others))
    num_false = int(FALSE_POSITIVES * len(others))
    threshold = others[-1 - num_false]
    return {
        "train": len(members),
        "held_out": len(others),
        "auc": auc,
        "low": low,
        "high": high,
        "tpr": float((members > threshold).mean()),
        "fpr": (num_false + 1) / (len(others) + 1),
    }


def compute_auc_interval(auc: float, num_members: int, num_others: int) -> tuple[float, float]:
    """Compute the 95 % interval of an area under the ROC curve (Newcombe 2006, doi:10.1002/sim.2324, method 5).

    Like Wilson's interval of a proportion, it takes the variance at the bound, so it is not empty at 0 and 1.
    """
    half = (num_members + num_others) / 2 - 1

    def exceed(bound: float, value: float) -> float:
        spread = 1 + half * (1 - bound) / (2 - bound) + half * bound / (1 + bound)
        return (value - bound) ** 2 - _Z**2 * bound * (1 - bound) * spread / (num_members * num_others)

    def find_lower(value: float) -> float:
        # The function is positive at 0 and negative just below the value.
        return 0.0 if value <= 0 else float(brentq(exceed, 0.0, min(value, 1 - 1e-12), args=(value,)))

    return find_lower(auc), 1 - find_lower(1 - auc)
