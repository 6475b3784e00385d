"""The loss over blocks, in fp32; it does not depend on the batch size or the number of processes."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from stages.core.artifacts import Blocks
from stages.core.errors import StageError
from stages.model.isolation import isolate_segments
from stages.model.loss import TokenLoss
from stages.model.masking import IGNORED
from stages.model.objectives import Objective, build_evaluation_batch
from stages.model.precision import full_precision
from stages.model.processes import get_rank, get_world_size, sum_over_processes


def sum_by_row(nats: npt.NDArray[np.float64], rows: npt.NDArray[np.int64], num_rows: int) -> npt.NDArray[np.float64]:
    """Sum `nats` by row.

    Args:
        nats: [num_tokens] float64.
        rows: [num_tokens] int64, the row of each token.

    Returns:
        [num_rows] float64; rows without a token sum to 0.
    """
    return np.bincount(rows, weights=nats, minlength=num_rows).astype(np.float64)


def compute_block_loss(model: Any, objective: Objective, blocks: Blocks, batch_tokens: int) -> float:
    """Compute the mean loss over all blocks, in nats per predicted token, with the masks of evaluation.

    All tokens have the same weight. Every process must call this function; all of them get the same loss.

    Args:
        model: a causal or masked model of transformers. A model sharded over processes works as well.
        batch_tokens: tokens per batch and process, rounded down to whole blocks, but at least one block.

    Raises:
        StageError: if no token of the blocks is predicted.
    """
    check_predictions(objective, blocks)
    loss, rows = TokenLoss(model), max(1, batch_tokens // blocks.block_size)
    starts = range(0, len(blocks), rows)
    sums, counts = np.zeros(len(starts)), np.zeros(len(starts))  # [num_batches] float64: nats and predicted tokens
    with full_precision(model), loss.hidden_outputs():
        # Batch i belongs to process i % world_size. A process that has run out of batches repeats the last one, since
        # the forward pass of a sharded model needs all processes; `is_own` below leaves the repetition out.
        for first in range(0, len(starts), get_world_size()):
            batch_index = min(first + get_rank(), len(starts) - 1)
            start = starts[batch_index]
            indices = range(start, min(start + rows, len(blocks)))
            batch = build_evaluation_batch(objective, blocks, indices)
            batch = {key: value.to(model.device) for key, value in batch.items()}
            targets = objective.get_targets(batch.pop("labels"))  # [rows, block_size] int64
            is_predicted = targets != IGNORED
            outputs = model(**isolate_segments(batch, model)).logits  # [rows, block_size, width or vocab_size]
            # [num_predicted] float64, in order of the rows.
            nats = loss.compute_nats(outputs[is_predicted], targets[is_predicted]).double().cpu().numpy()
            token_rows = is_predicted.nonzero()[:, 0].cpu().numpy()  # [num_predicted] int64
            # Summed per block first: batches of another size then change the last digits at most.
            sums[batch_index] = math.fsum(sum_by_row(nats, token_rows, len(indices)))
            counts[batch_index] = len(token_rows)
    is_own = np.arange(len(starts)) % get_world_size() == get_rank()  # [num_batches] bool
    return float(sum(sum_over_processes(sums * is_own).tolist()) / sum_over_processes(counts * is_own).sum())


def check_predictions(objective: Objective, blocks: Blocks) -> None:
    """Raise StageError if no token of `blocks` is predicted under the masks of evaluation."""
    for index in range(len(blocks)):
        labels = build_evaluation_batch(objective, blocks, [index])["labels"]
        if (objective.get_targets(labels) != IGNORED).any():
            return
    raise StageError(
        f"{blocks.directory}: no token is predicted in its {len(blocks)} blocks of {blocks.block_size} tokens: the"
        " masks of evaluation, which are the same in every run, select none of them. Give this split more text (split"
        " in conf/data), or raise block_size"
    )
