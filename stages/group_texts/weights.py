"""Weighted sources: how often each training document is packed, and in which order.

The number of training tokens stays what it is without weights, so that experiments with different weights take the same
number of steps. A source gets its share of them in whole passes over its documents and one partial pass, whose
documents are drawn by the seed.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from stages.core.errors import StageError, printable
from stages.core.random_numbers import random_uint64

_Counts = npt.NDArray[np.int64]

_DRAW = 2**32 - 1  # stream of the random numbers that choose the documents of a partial pass; passes have the others
_CANDIDATES = 4096  # documents tried to leave a partial pass, and to come in their place


def check_weights(weights: Mapping[str, float], names: Sequence[str]) -> list[float]:
    """The share of each of the sources `names`.

    Raises:
        StageError: if `weights` are not those of exactly these sources.
    """
    wrong = [f"names {printable(name)}, which is no source" for name in weights if name not in names]
    wrong += [f"has no {printable(name)}" for name in names if name not in weights]
    if wrong:
        shown = ", ".join(map(printable, names))
        raise StageError(f"data.weights {' and '.join(wrong)}: the training split has {shown} (conf/data)")
    return [weights[name] for name in names]


def choose_sources(
    names: Sequence[str], sources: _Counts, shares: Sequence[float] | None, records: _Counts
) -> tuple[list[str], _Counts, list[float] | None]:
    """Names, the index of each document's and shares of the sources that some records have; shares add up to 1 again.

    Args:
        sources: [num_records] index in `names` of each record's.
        records: [num_documents] number of each document's record.

    Raises:
        StageError: if none of these sources has a share.
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


def repeat_documents(lengths: _Counts, sources: _Counts, shares: Sequence[float], seed: int) -> _Counts:
    """How often each document is packed, [num_documents].

    Args:
        lengths: [num_documents] tokens of each document.
        sources: [num_documents] index of its source in `shares`.
        shares: [num_sources] each source's part of the tokens; they add up to 1.
    """
    copies = np.zeros(len(lengths), np.int64)
    order = np.argsort(random_uint64(seed, _DRAW, np.arange(len(lengths)), 1)[:, 0], kind="stable")
    for source, share in enumerate(shares):
        drawn = order[sources[order] == source]
        available, target = int(lengths[drawn].sum()), round(share * int(lengths.sum()))
        passes, rest = divmod(target, available)
        copies[drawn] = passes
        copies[drawn[_fill(lengths[drawn], rest)]] += 1
    return copies


def _fill(lengths: _Counts, target: int) -> _Counts:
    """Indices of documents whose lengths add up to `target` tokens, or nearly.

    They are the first documents that fit, of which one may give way to a later one: those two, or only the one or the
    other, that come closest to what is missing.
    """
    ends = np.concatenate([[0], np.cumsum(lengths)])
    fitting = int(np.searchsorted(ends, target, side="right")) - 1
    missing, first = target - int(ends[fitting]), max(0, fitting - _CANDIDATES)
    leaving = np.append(lengths[first:fitting], 0)  # 0: none leaves, and below none comes
    coming = np.append(lengths[fitting : fitting + _CANDIDATES], 0)
    order = np.argsort(coming, kind="stable")
    wanted = missing + leaving  # of the one that comes, for each that may leave
    place = np.searchsorted(coming[order], wanted)
    # The nearest below and above each wanted length.
    near = np.stack([np.clip(place - 1, 0, None), np.clip(place, None, len(order) - 1)])
    errors = np.abs(coming[order][near] - wanted)
    side, leaves = np.unravel_index(int(errors.argmin()), errors.shape)
    comes = int(order[near[side, leaves]])
    kept = np.delete(np.arange(fitting), first + leaves) if leaves < len(leaving) - 1 else np.arange(fitting)
    return np.append(kept, fitting + comes) if comes < len(coming) - 1 else kept


def order_documents(copies: _Counts, shard_ends: _Counts, seed: int) -> Iterator[tuple[int, _Counts]]:
    """The packed documents as runs: the index of a shard, and rows of it, in the order of packing.

    A pass takes the shards one after the other and the documents within each in an order drawn by the seed, so that a
    document is repeated only after all others of its shard, and a shard is read once a pass.

    Args:
        copies: [num_documents] how often each document is packed.
        shard_ends: [num_shards] the number of documents in the shards up to and including each.
    """
    starts = np.concatenate([[0], shard_ends[:-1]])
    for number in range(int(copies.max(initial=0))):
        for shard in np.argsort(random_uint64(seed, number, starts, 2)[:, 1], kind="stable").tolist():
            documents = np.arange(starts[shard], shard_ends[shard])
            packed = documents[copies[documents] > number]
            if len(packed):
                draws = random_uint64(seed, number, packed, 1)[:, 0]
                yield shard, packed[np.argsort(draws, kind="stable")] - starts[shard]


def describe_sources(
    names: Sequence[str], sources: _Counts, lengths: _Counts, copies: _Counts, shares: Sequence[float] | None
) -> dict[str, dict[str, Any]]:
    """The part that each source has in the packed tokens, for the ledger."""
    total = int((lengths * copies).sum())
    described = {}
    for index, name in enumerate(names):
        here = sources == index
        available, tokens = int(lengths[here].sum()), int((lengths * copies)[here].sum())
        described[name] = {
            "documents": int(here.sum()),
            "tokens_available": available,
            "tokens": tokens,
            "share_asked": None if shares is None else shares[index],
            "share": tokens / total,
            "repetitions": tokens / available,
        }
    return described
