"""Bits of documents, from which the metrics are computed, in fp32 and independent of the batch size.

`bits_per_byte` and `pseudo_bits_per_byte` depend only on the model, the documents and `evaluate.context`. The first
can be compared between runs with any block_size and between lossless tokenizers, the second within one tokenizer; the
two cannot be compared with each other. The loss over blocks and its perplexity (stages/model/block_loss.py) are
specific to the run's block_size and tokenizer.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from stages.figures.scores import Scores, TokenBits
from stages.figures.texts import Texts
from stages.model.block_loss import sum_by_row
from stages.model.loss import TokenLoss
from stages.model.objectives import Objective, Window
from stages.model.precision import full_precision
from stages.model.processes import gather_from_all, get_rank, get_world_size, sum_over_processes
from stages.tokens.encoding import DocumentText

_POOL_SIZE = 8192  # windows that are sorted by length together, so that a batch has windows of similar length


def score_documents(
    model: Any, objective: Objective, texts: Texts, records: npt.NDArray[np.int64], context: int, batch_tokens: int
) -> tuple[Scores, list[TokenBits]]:
    """Score documents in windows of at most `context` tokens. Several processes share the work.

    Args:
        records: numbers of the documents, ascending, [num_documents] int64.
        batch_tokens: maximum number of tokens per batch, padding included.

    Returns:
        The scores of all documents, and the bits of each document's tokens, on every process.
    """
    own = slice(get_rank(), None, get_world_size())  # the documents of this process
    num_bytes: list[int] = []
    tokens: list[TokenBits] = []

    def read_own_texts() -> Iterator[DocumentText]:
        for text in texts.read_texts(records[own]):
            num_bytes.append(text.num_bytes)
            tokens.append(TokenBits(text.ids, np.zeros(len(text.ids), np.float32)))
            yield text

    def store_bits(window: Window, nats: npt.NDArray[np.float64]) -> None:
        tokens[window.document_index].bits[window.document_positions] = nats / math.log(2)

    columns = np.zeros((3, len(records)))  # [3, num_documents]: bytes, tokens, nats
    windows = objective.build_windows(read_own_texts(), context)
    nats, num_tokens = compute_document_nats(model, windows, len(records[own]), batch_tokens, store_bits)
    columns[:, own] = num_bytes, num_tokens, nats
    columns = sum_over_processes(columns)
    scores = Scores(columns[0].astype(np.int64), columns[1].astype(np.int64), columns[2] / math.log(2))
    shares = gather_from_all(tokens)
    # Documents are dealt to the processes in turn (see `own`): document i is the (i // n)-th of process i % n.
    return scores, [shares[number % len(shares)][number // len(shares)] for number in range(len(records))]


def choose_documents(num_documents: int, max_documents: int | None) -> npt.NDArray[np.int64]:
    """Return the indices of at most `max_documents` documents, evenly spaced, [num_chosen] int64; None: all."""
    num_chosen = num_documents if max_documents is None else min(num_documents, max_documents)
    return np.arange(num_chosen, dtype=np.int64) * num_documents // max(num_chosen, 1)


def compute_document_nats(
    model: Any,
    windows: Iterator[Window],
    num_documents: int,
    batch_tokens: int,
    on_window: Callable[[Window, npt.NDArray[np.float64]], None] | None = None,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Sum -ln p over the predicted tokens of each document.

    Args:
        on_window: called for each window with -ln p of its targets, [num_targets] float64.

    Returns:
        The sums, [num_documents] float64, and the numbers of predicted tokens, [num_documents] int64.
    """
    nats, num_tokens = np.zeros(num_documents), np.zeros(num_documents, np.int64)
    loss = TokenLoss(model)
    with full_precision(model), loss.hidden_outputs():
        for batch in batch_by_length(windows, batch_tokens):
            counts = [len(window.targets) for window in batch]
            target_nats = compute_window_nats(model, loss, batch)  # [sum(counts)]
            documents = [window.document_index for window in batch]
            # Sum per window first, [len(batch)]; several windows of the batch may be of the same document.
            np.add.at(nats, documents, sum_by_row(target_nats, np.repeat(np.arange(len(batch)), counts), len(batch)))
            np.add.at(num_tokens, documents, counts)
            if on_window is not None:
                for window, window_nats in zip(batch, np.split(target_nats, np.cumsum(counts)[:-1]), strict=True):
                    on_window(window, window_nats)
    return nats, num_tokens


def batch_by_length(windows: Iterator[Window], batch_tokens: int) -> Iterator[list[Window]]:
    """Yield batches of windows of similar length, with at most `batch_tokens` tokens, padding included.

    A window that is longer than that is a batch of one.
    """
    while True:
        pool = [window for _, window in zip(range(_POOL_SIZE), windows, strict=False)]
        if not pool:
            return
        pool.sort(key=lambda window: -len(window.input_ids))
        start = 0
        while start < len(pool):
            rows = max(1, batch_tokens // max(1, len(pool[start].input_ids)))
            yield pool[start : start + rows]
            start += rows


def compute_window_nats(model: Any, loss: TokenLoss, windows: Sequence[Window]) -> npt.NDArray[np.float64]:
    """Return -ln p of the targets of all windows, concatenated in their order, [num_targets] float64.

    Call it within `loss.hidden_outputs()`.
    """
    longest = max(len(window.input_ids) for window in windows)
    padding = getattr(model.config, "pad_token_id", None) or 0
    input_ids = torch.full((len(windows), longest), padding, dtype=torch.int64)
    attention = torch.zeros(len(windows), longest, dtype=torch.int64)
    for row, window in enumerate(windows):
        input_ids[row, : len(window.input_ids)] = torch.from_numpy(window.input_ids)
        attention[row, : len(window.input_ids)] = 1
    padded = not bool(attention.all())
    device = model.device
    # [len(windows), longest, width]: hidden states or logits, see hidden_outputs.
    outputs = model(input_ids.to(device), attention_mask=attention.to(device) if padded else None).logits
    # Index pairs (row, position) of all targets, [num_targets] each.
    rows = np.repeat(np.arange(len(windows)), [len(window.targets) for window in windows])
    positions = np.concatenate([window.positions for window in windows])
    targets = torch.from_numpy(np.concatenate([window.targets for window in windows])).to(device)
    selected = outputs[torch.from_numpy(rows).to(device), torch.from_numpy(positions).to(device)]
    return loss.compute_nats(selected, targets).double().cpu().numpy()
