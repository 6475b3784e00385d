"""Packing: a split's documents, one after the other, cut into blocks of equal length."""

from collections.abc import Iterable, Iterator

import numpy as np

from stages.core.artifacts import TokenIds


def pack(documents: Iterable[TokenIds], block_size: int, blocks_at_once: int) -> Iterator[TokenIds]:
    """The concatenated tokens of `documents` as arrays [at most blocks_at_once, block_size].

    The whole split is one stream: only its last tokens, fewer than block_size, are left out. All arrays but the last
    have exactly blocks_at_once rows, however the tokens were cut before.
    """
    size = block_size * blocks_at_once
    held: list[TokenIds] = []
    num_held = 0
    for ids in documents:
        held.append(ids)
        num_held += len(ids)
        if num_held >= size:
            stream = np.concatenate(held)
            whole = num_held // size * size
            for start in range(0, whole, size):
                yield stream[start : start + size].reshape(-1, block_size)
            held, num_held = [stream[whole:]], num_held - whole
    rest = num_held // block_size * block_size
    if rest:
        yield np.concatenate(held)[:rest].reshape(-1, block_size)
