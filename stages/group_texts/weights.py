"""Weighted sources: choose how often each training document is packed, and in which order.

Weights do not change the number of training tokens, so experiments with different weights take the same number of
steps. Each source gets its share of the tokens in whole passes over its documents and one partial pass. The seed draws
the documents of the partial pass.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from stages.core.errors import StageError, printable
from stages.core.random_numbers import draw_uint64

_IntArray = npt.NDArray[np.int64]

# Random stream that draws the documents of partial passes. Pass n uses stream n.
_PARTIAL_PASS_STREAM = 2**32 - 1
# Number of documents considered for removal from a partial pass, and for addition to it.
_MAX_CANDIDATES = 4096


def check_weights(weights: Mapping[str, float], names: Sequence[str]) -> list[float]:
    """Return the shares of the sources `names`, in their order.

    Raises:
        StageError: if `weights` does not name exactly these sources.
    """
    wrong = [f"names {printable(name)}, which is not a source" for name in weights if name not in names]
    wrong += [f"has no {printable(name)}" for name in names if name not in weights]
    if wrong:
        shown = ", ".join(map(printable, names))
        raise StageError(f"data.weights {' and '.join(wrong)}: the training split has {shown} (conf/data)")
    return [weights[name] for name in names]


def choose_sources(
    names: Sequence[str], sources: _IntArray, shares: Sequence[float] | None, records: _IntArray
) -> tuple[list[str], _IntArray, list[float] | None]:
    """Reduce the sources of all records to those of the task's documents.

    Args:
        names: names of all sources.
        sources: [num_records] int64: index in `names` of each record's source.
        shares: [num_sources] share of each source in the tokens, or None.
        records: [num_documents] int64: index of each document's record.

    Returns:
        The names of the remaining sources; the index in them of each document's source, [num_documents] int64; and
        their shares, scaled to add up to 1, or None.

    Raises:
        StageError: if the shares of all remaining sources are 0.
    """
    present, indices = np.unique(sources[records], return_inverse=True)
    chosen = [names[index] for index in present]
    if shares is None:
        return chosen, indices, None
    total = sum(shares[index] for index in present)
    if not total:
        raise StageError(
            f"data.weights are 0 for all sources of the task: {', '.join(map(printable, chosen))} (conf/data)"
        )
    return chosen, indices, [shares[index] / total for index in present]


def repeat_documents(lengths: _IntArray, sources: _IntArray, shares: Sequence[float], seed: int) -> _IntArray:
    """Choose how often each document is packed.

    Args:
        lengths: [num_documents] int64: tokens of each document.
        sources: [num_documents] int64: index in `shares` of each document's source.
        shares: [num_sources] share of each source in the tokens; they add up to 1.

    Returns:
        [num_documents] int64.
    """
    copies = np.zeros(len(lengths), np.int64)
    # A random permutation of all documents; `drawn` is its part of one source.
    order = np.argsort(draw_uint64(seed, _PARTIAL_PASS_STREAM, np.arange(len(lengths)), 1)[:, 0], kind="stable")
    for source, share in enumerate(shares):
        drawn = order[sources[order] == source]
        available, target = int(lengths[drawn].sum()), round(share * int(lengths.sum()))
        passes, rest = divmod(target, available)
        copies[drawn] = passes
        copies[drawn[_select_documents(lengths[drawn], rest)]] += 1
    return copies


def _select_documents(lengths: _IntArray, target: int) -> _IntArray:
    """Select documents with `target` tokens in total, or nearly as many.

    The selection begins with the first documents that fit. Then at most one of them is removed, and at most one later
    document added, to come as close to `target` as possible.

    Args:
        lengths: [num_documents] int64: tokens of each document.

    Returns:
        Indices of the selected documents, int64.
    """
    ends = np.concatenate([[0], np.cumsum(lengths)])  # [num_documents + 1]
    num_fitting = int(np.searchsorted(ends, target, side="right")) - 1
    num_missing, first = target - int(ends[num_fitting]), max(0, num_fitting - _MAX_CANDIDATES)
    # Lengths of the candidates for removal, [num_removable + 1], and for addition, [num_addable + 1]. The length 0 at
    # the end of each means that no document is removed or added.
    removable = np.append(lengths[first:num_fitting], 0)
    addable = np.append(lengths[num_fitting : num_fitting + _MAX_CANDIDATES], 0)
    order = np.argsort(addable, kind="stable")
    wanted = num_missing + removable  # [num_removable + 1] ideal length of the added document, for each removal
    position = np.searchsorted(addable[order], wanted)
    # Positions in `order` of the nearest lengths below and above each wanted length, [2, num_removable + 1].
    near = np.stack([np.clip(position - 1, 0, None), np.clip(position, None, len(order) - 1)])
    errors = np.abs(addable[order][near] - wanted)  # [2, num_removable + 1]
    side, removed = np.unravel_index(int(errors.argmin()), errors.shape)
    added = int(order[near[side, removed]])
    selected = np.arange(num_fitting)
    if removed < len(removable) - 1:
        selected = np.delete(selected, first + removed)
    return np.append(selected, num_fitting + added) if added < len(addable) - 1 else selected


def order_documents(copies: _IntArray, shard_ends: _IntArray, seed: int) -> Iterator[tuple[int, _IntArray]]:
    """Yield the packed documents as runs, in the order of packing.

    The seed draws the order of the shards in each pass, and the order of the documents in each shard. A document is
    repeated only after all other documents of its shard, and each shard is read once per pass.

    Args:
        copies: [num_documents] int64: how often each document is packed.
        shard_ends: [num_shards] int64: number of documents in the shards up to and including each.

    Yields:
        The index of a shard, and rows of that shard, [num_run_documents] int64.
    """
    starts = np.concatenate([[0], shard_ends[:-1]])
    for number in range(int(copies.max(initial=0))):
        for shard in np.argsort(draw_uint64(seed, number, starts, 2)[:, 1], kind="stable").tolist():
            documents = np.arange(starts[shard], shard_ends[shard])
            packed = documents[copies[documents] > number]
            if len(packed):
                draws = draw_uint64(seed, number, packed, 1)[:, 0]
                yield shard, packed[np.argsort(draws, kind="stable")] - starts[shard]


def summarize_sources(
    names: Sequence[str], sources: _IntArray, lengths: _IntArray, copies: _IntArray, shares: Sequence[float] | None
) -> dict[str, dict[str, Any]]:
    """Summarize the share of each source in the packed tokens, for the ledger.

    Args:
        names: [num_sources] names of the sources.
        sources: [num_documents] int64: index in `names` of each document's source.
        lengths: [num_documents] int64: tokens of each document.
        copies: [num_documents] int64: how often each document is packed.
        shares: [num_sources] requested share of each source in the tokens, or None.
    """
    total = int((lengths * copies).sum())
    summary = {}
    for index, name in enumerate(names):
        is_own = sources == index  # [num_documents] bool
        available, tokens = int(lengths[is_own].sum()), int((lengths * copies)[is_own].sum())
        summary[name] = {
            "documents": int(is_own.sum()),
            "tokens_available": available,
            "tokens": tokens,
            "share_asked": None if shares is None else shares[index],
            "share": tokens / total,
            "repetitions": tokens / available,
        }
    return summary
