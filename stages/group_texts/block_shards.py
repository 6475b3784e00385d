"""Shards of blocks from shards of tokens: what group_texts does piece by piece, on one machine or on many."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from stages.core.artifacts import (
    SHARD_BYTES,
    TokenIds,
    check_shard,
    read_shard,
    shard_name,
    to_arrow,
    to_numpy,
    write_shard,
)
from stages.group_texts.packing import pack

TOKENS_AT_ONCE = 2**20  # of an Arrow batch: fixed, so that the bytes follow from the tokens alone


class _Counted(NamedTuple):
    """A shard of tokens."""

    file: Path
    documents: int
    tokens: int


class _Piece(NamedTuple):
    """A shard of blocks to write, and where its tokens are."""

    file: Path
    tokens: list[Path]
    """The shards that hold them."""
    skipped: int
    """Tokens before theirs in the first of these."""
    num_blocks: int
    at_once: int
    """Blocks of an Arrow batch."""


def counted(shard: tuple[Path, str]) -> _Counted:
    """The shard of tokens in a file, found to be what was written with the checksum beside it."""
    file, written = shard
    check_shard(file, written)
    columns = [batch.column("input_ids") for batch in read_shard(file)]
    return _Counted(file, sum(map(len, columns)), sum(len(column.flatten()) for column in columns))


def pieces(shards: Sequence[_Counted], block_size: int, item_bytes: int, directory: Path) -> Iterator[_Piece]:
    """The shards, in `directory`, of the blocks of `shards`, one after the other; of no block, one that is empty.

    Each but the last has as many whole batches as take it to SHARD_BYTES, at `item_bytes` a token. So its place in the
    stream of tokens is known before any other is written.
    """
    ends = np.cumsum([shard.tokens for shard in shards])
    num_blocks = int(ends[-1]) // block_size
    at_once = max(1, TOKENS_AT_ONCE // block_size)
    most = -(-SHARD_BYTES // (at_once * block_size * item_bytes)) * at_once
    for number, first in enumerate(range(0, max(num_blocks, 1), most)):
        here = min(most, num_blocks - first)
        start, end = first * block_size, (first + here) * block_size
        # From the shard that holds the token `start` to the one that holds the token `end - 1`.
        low, high = int(np.searchsorted(ends, start, side="right")), int(np.searchsorted(ends, end))
        holding = shards[low : high + 1] if here else []
        skipped = start - int(ends[low - 1]) if low else start
        yield _Piece(directory / shard_name(number), [shard.file for shard in holding], skipped, here, at_once)


def write_blocks(piece: _Piece, block_size: int, ids_type: pa.DataType) -> str:
    """Write a shard of blocks and return its checksum."""
    schema = pa.schema([("input_ids", pa.list_(ids_type, block_size))])

    def stream() -> Iterator[TokenIds]:
        skipped, left = piece.skipped, piece.num_blocks * block_size
        for tokens in piece.tokens:
            for batch in read_shard(tokens):
                held = to_numpy(batch.column("input_ids").flatten())
                ids = held[skipped:][:left]
                skipped, left = max(0, skipped - len(held)), left - len(ids)
                yield ids

    def batches() -> Iterator[pa.RecordBatch]:
        for blocks in pack(stream(), block_size, piece.at_once):
            input_ids = pa.FixedSizeListArray.from_arrays(to_arrow(blocks.reshape(-1)), block_size)
            yield pa.record_batch([input_ids], schema=schema)

    return write_shard(piece.file, schema, batches())
