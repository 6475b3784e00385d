"""Packing: concatenate the documents of a split and cut them into blocks of equal length."""

from collections.abc import Iterable, Iterator

import numpy as np

from stages.core.artifacts import TokenIds


def pack_documents(documents: Iterable[TokenIds], block_size: int, blocks_per_batch: int) -> Iterator[TokenIds]:
    """Concatenate `documents` and yield their tokens as batches of blocks.

    All documents are one stream: only its last tokens, fewer than `block_size`, are dropped. The batches do not depend
    on how the stream is divided into arrays.

    Args:
        documents: arrays of tokens, [num_tokens], uint16 or uint32.

    Yields:
        [blocks_per_batch, block_size] of the same dtype; the last batch can have fewer rows.
    """
    batch_size = block_size * blocks_per_batch
    buffer: list[TokenIds] = []
    num_buffered = 0
    for ids in documents:
        buffer.append(ids)
        num_buffered += len(ids)
        if num_buffered >= batch_size:
            stream = np.concatenate(buffer)  # [num_buffered]
            end = num_buffered // batch_size * batch_size
            for start in range(0, end, batch_size):
                yield stream[start : start + batch_size].reshape(-1, block_size)
            buffer, num_buffered = [stream[end:]], num_buffered - end
    end = num_buffered // block_size * block_size
    if end:
        yield np.concatenate(buffer)[:end].reshape(-1, block_size)
