"""The loss over blocks, in fp32, whatever the batch size and the number of processes."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from stages.core.artifacts import Blocks
from stages.core.errors import StageError
from stages.model.loss import TokenLoss
from stages.model.masking import IGNORED
from stages.model.objectives import Objective, evaluation_batch, move_batch
from stages.model.precision import full_precision
from stages.model.processes import rank, summed, world_size


def row_sums(nats: npt.NDArray[np.float64], rows: npt.NDArray[np.int64], num_rows: int) -> npt.NDArray[np.float64]:
    """Sums of `nats` [num_tokens] by row, [num_rows] float64; `rows` [num_tokens] says to which each belongs."""
    return np.bincount(rows, weights=nats, minlength=num_rows).astype(np.float64)


def block_loss(model: Any, objective: Objective, blocks: Blocks, batch_tokens: int) -> float:
    """Nats per predicted token over all blocks, token-weighted; masks are those of every evaluation.

    Raises:
        StageError: if no token of them is predicted.
    """
    check_predictions(objective, blocks)
    loss, rows = TokenLoss(model), max(1, batch_tokens // blocks.block_size)
    starts = range(0, len(blocks), rows)
    sums, counts = np.zeros(len(starts)), np.zeros(len(starts))
    with full_precision(model), loss.hidden_outputs():
        for first in range(0, len(starts), world_size()):  # of several processes, each takes one of so many
            batch_index = min(first + rank(), len(starts) - 1)  # again where they are fewer: shards need all at once
            start = starts[batch_index]
            indices = range(start, min(start + rows, len(blocks)))
            batch = move_batch(evaluation_batch(objective, blocks[indices], indices), model.device)
            targets = objective.targets(batch.pop("labels"))
            predicted = targets != IGNORED
            nats = loss.each(model(**batch).logits[predicted], targets[predicted]).double().cpu().numpy()
            row = predicted.nonzero()[:, 0].cpu().numpy()
            # Block by block, so that the sum does not depend on how they are batched beyond the last digits.
            sums[batch_index] = math.fsum(row_sums(nats, row, len(indices)))
            counts[batch_index] = len(row)
    mine = np.arange(len(starts)) % world_size() == rank()
    return float(sum(summed(sums * mine).tolist()) / summed(counts * mine).sum())


def check_predictions(objective: Objective, blocks: Blocks) -> None:
    """Raise StageError if evaluation's masks leave nothing to predict in `blocks`."""
    for index in range(len(blocks)):
        labels = evaluation_batch(objective, blocks[[index]], [index])["labels"]
        if (objective.targets(labels) != IGNORED).any():
            return
    raise StageError(
        f"{blocks.directory}: in its {len(blocks)} blocks of {blocks.block_size} tokens, no token is predicted: "
        "evaluation's masks, which are the same in every run, choose none. Give more text to this split (split in"
        " conf/data), or raise block_size"
    )
