"""Shards of blocks from shards of tokens: what group_texts does piece by piece, on one machine or on many."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stages.core.artifacts import (
    SHARD_BYTES,
    TokenIds,
    check_shard,
    has_marks,
    read_shard,
    record_column,
    shard_name,
    to_arrow,
    to_numpy,
    write_shard,
)
from stages.group_texts.packing import pack
from stages.tokens.vocabulary import mark_control_tokens

TOKENS_AT_ONCE = 2**20  # of an Arrow batch: fixed, so that the bytes follow from the tokens alone

_DOCUMENTS_AT_ONCE = 4096  # gathered from a shard at once


class Run(NamedTuple):
    """Documents of a shard of tokens, which are packed one after the other."""

    file: Path
    tokens: int
    """Of these documents."""
    rows: npt.NDArray[np.int64] | None = None
    """Their rows in the shard, in the order of packing; None: all, as they come."""
    num_lead: int = 0
    """Control tokens that the shard has before its first document, which are left out."""
    lead: list[int] | None = None
    """Control tokens that are put before the first of these documents."""


class _Piece(NamedTuple):
    """A shard of blocks to write, and where its tokens are."""

    file: Path
    runs: list[Run]
    """Those that hold them."""
    skipped: int
    """Tokens before theirs in the first of these."""
    num_blocks: int
    at_once: int
    """Blocks of an Arrow batch."""


def count_tokens(shard: tuple[Path, str]) -> tuple[int, int]:
    """Documents and tokens of a shard, found to be what was written with the checksum beside it."""
    columns = _checked_columns(shard)
    return sum(map(len, columns)), sum(len(column.flatten()) for column in columns)


def measure_documents(shard: tuple[Path, str]) -> npt.NDArray[np.int64]:
    """Tokens of each document of a shard, [num_documents], checked as `count_tokens` does."""
    return np.concatenate([np.diff(to_numpy(column.offsets)) for column in _checked_columns(shard)])


def read_records(shards: Iterable[Path]) -> npt.NDArray[np.int64] | None:
    """The records of the documents in shards of tokens, which other functions check; see `record_column`."""
    return record_column(batch for file in shards for batch in read_shard(file))


def _checked_columns(shard: tuple[Path, str]) -> list[pa.LargeListArray]:
    file, written = shard
    check_shard(file, written)
    return [batch.column("input_ids") for batch in read_shard(file)]


def pieces(runs: Sequence[Run], block_size: int, item_bytes: int, directory: Path) -> Iterator[_Piece]:
    """The shards, in `directory`, of the blocks of `runs`, one after the other; of no block, one that is empty.

    Each but the last has as many whole batches as take it to SHARD_BYTES, at `item_bytes` a token. So its place in the
    stream of tokens is known before any other is written.
    """
    ends = np.cumsum([run.tokens for run in runs])
    num_blocks = int(ends[-1]) // block_size
    at_once = max(1, TOKENS_AT_ONCE // block_size)
    most = -(-SHARD_BYTES // (at_once * block_size * item_bytes)) * at_once
    for number, first in enumerate(range(0, max(num_blocks, 1), most)):
        here = min(most, num_blocks - first)
        start, end = first * block_size, (first + here) * block_size
        # From the run that holds the token `start` to the one that holds the token `end - 1`.
        low, high = int(np.searchsorted(ends, start, side="right")), int(np.searchsorted(ends, end))
        holding = list(runs[low : high + 1]) if here else []
        skipped = start - int(ends[low - 1]) if low else start
        yield _Piece(directory / shard_name(number), holding, skipped, here, at_once)


def write_blocks(piece: _Piece, block_size: int, ids_type: pa.DataType) -> str:
    """Write a shard of blocks, with the marks of their tokens if these have any, and return its checksum."""
    types = {"input_ids": ids_type}
    if piece.runs and has_marks([next(read_shard(piece.runs[0].file))]):
        types["marks"] = pa.uint8()
    schema = pa.schema([(name, pa.list_(kind, block_size)) for name, kind in types.items()])

    def stream(column: str) -> Iterator[TokenIds]:
        skipped, left = piece.skipped, piece.num_blocks * block_size
        for run in piece.runs:
            for held in _read_run(run, column):
                values = held[skipped:][:left]
                skipped, left = max(0, skipped - len(held)), left - len(values)
                yield values

    def batches() -> Iterator[pa.RecordBatch]:
        packed = (pack(stream(column), block_size, piece.at_once) for column in types)
        for columns in zip(*packed, strict=True):
            lists = [pa.FixedSizeListArray.from_arrays(to_arrow(rows.reshape(-1)), block_size) for rows in columns]
            yield pa.record_batch(lists, schema=schema)

    return write_shard(piece.file, schema, batches())


def _read_run(run: Run, column: str) -> Iterator[TokenIds]:
    """The values that `column`, input_ids or marks, has for the tokens of a run."""
    columns = [batch.column(column) for batch in read_shard(run.file)]
    if run.rows is None:
        yield from (to_numpy(column.flatten()) for column in columns)
        return
    if run.lead:
        lead = run.lead if column == "input_ids" else mark_control_tokens(run.lead)
        yield np.array(lead, to_numpy(columns[0].values).dtype)
    values = [to_numpy(column.values) for column in columns]
    offsets = [to_numpy(column.offsets) for column in columns]
    ends = np.cumsum([len(column) for column in columns])
    for start in range(0, len(run.rows), _DOCUMENTS_AT_ONCE):
        rows = run.rows[start : start + _DOCUMENTS_AT_ONCE]
        batches = np.searchsorted(ends, rows, side="right")
        within = rows - np.concatenate([[0], ends])[batches]
        documents = [
            values[batch][offsets[batch][row] : offsets[batch][row + 1]]
            for batch, row in zip(batches.tolist(), within.tolist(), strict=True)
        ]
        if run.num_lead and (first := np.flatnonzero(rows == 0)).size:
            documents[first[0]] = documents[first[0]][run.num_lead :]
        yield np.concatenate(documents)
