"""What the metrics are made of: the bits of documents and the loss over blocks, in fp32, whatever the batch size.

`bits_per_byte` and `pseudo_bits_per_byte` depend on the model, the documents and `evaluate.context` alone; the first
may be compared between runs of any block_size and between lossless tokenizers, the second within one tokenizer, and
neither with the other. The loss over blocks and its perplexity belong to the run's block_size and tokenizer.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from stages.figures.scores import Scores, TokenBits
from stages.figures.texts import Texts
from stages.model.block_loss import row_sums
from stages.model.loss import TokenLoss
from stages.model.objectives import Objective, Text, Window
from stages.model.precision import full_precision
from stages.model.processes import of_all, rank, summed, world_size

_WINDOWS_AT_ONCE = 8192  # sorted by length together, so that batches hold windows of like length


def score_documents(
    model: Any, objective: Objective, texts: Texts, records: npt.NDArray[np.int64], context: int, batch_tokens: int
) -> tuple[Scores, list[TokenBits]]:
    """The scores of the documents numbered `records`, in windows of at most `context` tokens, and their tokens'."""
    mine = slice(rank(), None, world_size())  # of several processes, each takes its share
    num_bytes: list[int] = []
    tokens: list[TokenBits] = []

    def read() -> Iterator[Text]:
        for text in texts.read(records[mine]):
            num_bytes.append(text.num_bytes)
            tokens.append(TokenBits(text.ids, np.zeros(len(text.ids), np.float32)))
            yield text

    def keep(window: Window, nats: npt.NDArray[np.float64]) -> None:
        tokens[window.document].bits[window.places] = nats / math.log(2)

    columns = np.zeros((3, len(records)))  # bytes, tokens, nats
    windows = objective.windows(read(), context)
    nats, num_tokens = document_nats(model, windows, len(records[mine]), batch_tokens, keep)
    columns[:, mine] = num_bytes, num_tokens, nats
    columns = summed(columns)
    scores = Scores(columns[0].astype(np.int64), columns[1].astype(np.int64), columns[2] / math.log(2))
    shares = of_all(tokens)
    # The documents go round the processes, as `mine` says.
    return scores, [shares[number % len(shares)][number // len(shares)] for number in range(len(records))]


def choose_documents(total: int, most: int | None) -> npt.NDArray[np.int64]:
    """Indices of at most `most` of `total` documents, evenly spaced."""
    number = total if most is None else min(total, most)
    return np.arange(number, dtype=np.int64) * total // max(number, 1)


def document_nats(
    model: Any,
    windows: Iterator[Window],
    num_documents: int,
    batch_tokens: int,
    keep: Callable[[Window, npt.NDArray[np.float64]], None] | None = None,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Sum of -ln p over the tokens of each document, and their number; each [num_documents].

    Args:
        keep: called for each window with -ln p of its targets, [num_predicted].
    """
    nats, num_tokens = np.zeros(num_documents), np.zeros(num_documents, np.int64)
    loss = TokenLoss(model)
    with full_precision(model), loss.hidden_outputs():
        for batch in length_batches(windows, batch_tokens):
            counts = [len(window.targets) for window in batch]
            of_targets = window_nats(model, loss, batch)
            documents = [window.document for window in batch]
            np.add.at(nats, documents, row_sums(of_targets, np.repeat(np.arange(len(batch)), counts), len(batch)))
            np.add.at(num_tokens, documents, counts)
            if keep is not None:
                for window, own in zip(batch, np.split(of_targets, np.cumsum(counts)[:-1]), strict=True):
                    keep(window, own)
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
    """-ln p of the targets of all windows, one window after the other, from within loss.hidden_outputs()."""
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
    return loss.each(selected, targets).double().cpu().numpy()
