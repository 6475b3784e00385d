"""The metrics: bits per byte of documents and the loss over blocks, in fp32, whatever the batch size.

`bits_per_byte` and `pseudo_bits_per_byte` depend on the model, the documents and `evaluate.context` alone; the first
may be compared between runs of any block_size and between lossless tokenizers, the second within one tokenizer, and
neither with the other. The loss over blocks and its perplexity belong to the run's block_size and tokenizer.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from stages.core.artifacts import Documents
from stages.core.errors import StageError
from stages.figures.schema import Evaluate
from stages.model.block_loss import row_sums
from stages.model.loss import TokenLoss
from stages.model.objectives import Objective, Window
from stages.model.precision import full_precision
from stages.model.processes import rank, summed, world_size
from stages.tokens.vocabulary import Vocabulary

_WINDOWS_AT_ONCE = 8192  # sorted by length together, so that batches hold windows of like length


def document_metrics(
    model: Any, objective: Objective, documents: Documents, vocabulary: Vocabulary, config: Evaluate, batch_tokens: int
) -> dict[str, float]:
    """The block-independent metric of the documents, its standard error, and counts.

    Keys: objective.document_metric (bits per UTF-8 byte of text), the same with `_se` (its standard error over
    documents), documents, tokens (of text), bytes.
    """
    chosen = choose_documents(len(documents), config.max_documents)
    mine = slice(rank(), None, world_size())  # of several processes, each takes its share
    texts = (vocabulary.text_tokens(documents[index]) for index in chosen[mine])
    nats, counts = np.zeros(len(chosen)), np.zeros(1)
    nats[mine], counts[0] = document_nats(
        model, objective.windows(texts, config.context), len(chosen[mine]), batch_tokens
    )
    nats, num_tokens = summed(nats), int(summed(counts)[0])
    num_bytes = documents.num_bytes[chosen]
    ratio, error = ratio_with_error(nats / math.log(2), num_bytes)
    return {
        objective.document_metric: ratio,
        f"{objective.document_metric}_se": error,
        "documents": len(chosen),
        "tokens": num_tokens,
        "bytes": int(num_bytes.sum()),
    }


def choose_documents(total: int, most: int | None) -> npt.NDArray[np.int64]:
    """Indices of at most `most` of `total` documents, evenly spaced."""
    number = total if most is None else min(total, most)
    return np.arange(number, dtype=np.int64) * total // max(number, 1)


def ratio_with_error(bits: npt.NDArray[np.float64], num_bytes: npt.NDArray[np.int64]) -> tuple[float, float]:
    """sum(bits) / sum(num_bytes) and its standard error over documents (ratio estimator: Cochran 1977, section 6.4).

    The error is 0 for a single document, which says nothing about others.
    """
    total, count = int(num_bytes.sum()), len(bits)
    if total == 0:
        raise StageError("the documents to evaluate hold no text, so that they have no bits per byte: give more text")
    ratio = math.fsum(bits) / total
    residuals = math.fsum((bits - ratio * num_bytes) ** 2)
    return ratio, math.sqrt(residuals * count / (count - 1)) / total if count > 1 else 0.0


def document_nats(
    model: Any, windows: Iterator[Window], num_documents: int, batch_tokens: int
) -> tuple[npt.NDArray[np.float64], int]:
    """Sum of -ln p over the tokens of each document, [num_documents] float64, and the number of tokens."""
    nats, num_tokens = np.zeros(num_documents), 0
    loss = TokenLoss(model)
    with full_precision(model), loss.hidden_outputs():
        for batch in length_batches(windows, batch_tokens):
            sums = window_nats(model, loss, batch)
            np.add.at(nats, [window.document for window in batch], sums)
            num_tokens += sum(len(window.targets) for window in batch)
    return nats, num_tokens


def length_batches(windows: Iterator[Window], batch_tokens: int) -> Iterator[list[Window]]:
    """The windows in batches of at most `batch_tokens` tokens, padding included, of like length."""
    while True:
        pool = [window for _, window in zip(range(_WINDOWS_AT_ONCE), windows, strict=False)]
        if not pool:
            return
        pool.sort(key=lambda window: -len(window.input_ids))
        start = 0
        while start < len(pool):
            rows = max(1, batch_tokens // max(1, len(pool[start].input_ids)))
            yield pool[start : start + rows]
            start += rows


def window_nats(model: Any, loss: TokenLoss, windows: Sequence[Window]) -> npt.NDArray[np.float64]:
    """Sum of -ln p over the targets of each window, [len(windows)] float64, from within loss.hidden_outputs()."""
    longest = max(len(window.input_ids) for window in windows)
    padding = getattr(model.config, "pad_token_id", None) or 0
    input_ids = torch.full((len(windows), longest), padding, dtype=torch.int64)
    attention = torch.zeros(len(windows), longest, dtype=torch.int64)
    for row, window in enumerate(windows):
        input_ids[row, : len(window.input_ids)] = torch.from_numpy(window.input_ids)
        attention[row, : len(window.input_ids)] = 1
    padded = not bool(attention.all())
    device = model.device
    outputs = model(input_ids.to(device), attention_mask=attention.to(device) if padded else None).logits
    rows = np.repeat(np.arange(len(windows)), [len(window.targets) for window in windows])
    positions = np.concatenate([window.positions for window in windows])
    targets = torch.from_numpy(np.concatenate([window.targets for window in windows])).to(device)
    selected = outputs[torch.from_numpy(rows).to(device), torch.from_numpy(positions).to(device)]
    return row_sums(loss.each(selected, targets), rows, len(windows))
