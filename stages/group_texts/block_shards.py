"""Write shards of blocks from shards of tokens. Shards are independent, so one or many machines can write them."""

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
    get_shard_name,
    has_marks,
    read_record_column,
    read_shard,
    to_arrow,
    to_numpy,
    write_shard,
)
from stages.group_texts.packing import pack_documents
from stages.tokens.vocabulary import mark_control_tokens

TOKENS_PER_BATCH = 2**20  # tokens per Arrow batch, about; fixed, so that the bytes depend only on the tokens

_DOCUMENTS_PER_READ = 4096  # documents gathered from a shard in one step


class DocumentRun(NamedTuple):
    """A run of documents from one shard of tokens, to be packed one after the other."""

    file: Path
    """The shard."""
    num_tokens: int
    """Number of tokens of the run, including `lead`."""
    rows: npt.NDArray[np.int64] | None = None
    """[num_run_documents] int64: rows of the documents in the shard, in the order of packing; None: all, in order."""
    num_lead: int = 0
    """Number of control tokens to remove from the start of the shard's first document."""
    lead: list[int] | None = None
    """Control token ids to add before the first document of the run."""


class BlockShard(NamedTuple):
    """A shard of blocks to write, and the location of its tokens."""

    file: Path
    """The file to write."""
    runs: list[DocumentRun]
    """Runs that contain the tokens of the shard."""
    num_skipped: int
    """Number of tokens at the start of the first run that belong to the shard before."""
    num_blocks: int
    """Number of blocks in the shard."""
    blocks_per_batch: int
    """Number of blocks per Arrow batch."""


def count_tokens(shard: tuple[Path, str]) -> tuple[int, int]:
    """Count the documents and the tokens of a shard, a file with its expected checksum.

    Raises:
        StageError: if the file does not have that checksum.
    """
    columns = _read_checked_columns(shard)
    return sum(map(len, columns)), sum(len(column.flatten()) for column in columns)


def count_document_tokens(shard: tuple[Path, str]) -> npt.NDArray[np.int64]:
    """Count the tokens of each document of a shard, a file with its expected checksum.

    Returns:
        [num_documents] int64.

    Raises:
        StageError: if the file does not have that checksum.
    """
    return np.concatenate([np.diff(to_numpy(column.offsets)) for column in _read_checked_columns(shard)])


def read_record_numbers(shards: Iterable[Path]) -> npt.NDArray[np.int64] | None:
    """Read the index of each document's record from shards of tokens; see `read_record_column`.

    The checksums of the shards are not checked here.

    Returns:
        [num_documents] int64; None if document i is record i.
    """
    return read_record_column(batch for file in shards for batch in read_shard(file))


def _read_checked_columns(shard: tuple[Path, str]) -> list[pa.LargeListArray]:
    """Check a shard and read its `input_ids`, one array of lists per record batch."""
    file, checksum = shard
    check_shard(file, checksum)
    return [batch.column("input_ids") for batch in read_shard(file)]


def plan_block_shards(
    runs: Sequence[DocumentRun], block_size: int, item_bytes: int, directory: Path
) -> Iterator[BlockShard]:
    """Plan the shards of a split: yield each with the runs that contain its tokens.

    All shards but the last have the same number of batches, the smallest that reaches SHARD_BYTES. The position of each
    shard in the stream of tokens is therefore known before any shard is written. A split without blocks gets one empty
    shard.

    Args:
        item_bytes: bytes per token id.
        directory: output directory of the split.
    """
    ends = np.cumsum([run.num_tokens for run in runs])  # [num_runs] position in the stream where each run ends
    num_blocks = int(ends[-1]) // block_size
    blocks_per_batch = max(1, TOKENS_PER_BATCH // block_size)
    # Blocks per shard: the batches that reach SHARD_BYTES, rounded up.
    blocks_per_shard = -(-SHARD_BYTES // (blocks_per_batch * block_size * item_bytes)) * blocks_per_batch
    for number, first in enumerate(range(0, max(num_blocks, 1), blocks_per_shard)):
        shard_blocks = min(blocks_per_shard, num_blocks - first)
        start, end = first * block_size, (first + shard_blocks) * block_size
        # low: the run with token `start`, the first run that ends after it. high: the run with token `end - 1`.
        low, high = int(np.searchsorted(ends, start, side="right")), int(np.searchsorted(ends, end))
        shard_runs = list(runs[low : high + 1]) if shard_blocks else []
        num_skipped = start - int(ends[low - 1]) if low else start
        yield BlockShard(directory / get_shard_name(number), shard_runs, num_skipped, shard_blocks, blocks_per_batch)


def write_blocks(shard: BlockShard, block_size: int, ids_type: pa.DataType) -> str:
    """Write a shard of blocks, with marks if the tokens have them, and return its checksum."""
    types = {"input_ids": ids_type}
    if shard.runs and has_marks([next(read_shard(shard.runs[0].file))]):
        types["marks"] = pa.uint8()
    schema = pa.schema([(name, pa.list_(kind, block_size)) for name, kind in types.items()])

    def read_stream(column: str) -> Iterator[TokenIds]:
        num_skipped, num_left = shard.num_skipped, shard.num_blocks * block_size
        for run in shard.runs:
            for run_values in _read_run(run, column):
                values = run_values[num_skipped:][:num_left]
                num_skipped, num_left = max(0, num_skipped - len(run_values)), num_left - len(values)
                yield values

    def build_batches() -> Iterator[pa.RecordBatch]:
        packed = (pack_documents(read_stream(column), block_size, shard.blocks_per_batch) for column in types)
        for columns in zip(*packed, strict=True):
            lists = [pa.FixedSizeListArray.from_arrays(to_arrow(rows.reshape(-1)), block_size) for rows in columns]
            yield pa.record_batch(lists, schema=schema)

    return write_shard(shard.file, schema, build_batches())


def _read_run(run: DocumentRun, column: str) -> Iterator[TokenIds]:
    """Yield the values of `column`, `input_ids` or `marks`, for the tokens of a run: arrays [num_tokens]."""
    columns = [batch.column(column) for batch in read_shard(run.file)]
    if run.rows is None:
        yield from (to_numpy(column.flatten()) for column in columns)
        return
    if run.lead:
        lead = run.lead if column == "input_ids" else mark_control_tokens(run.lead)
        yield np.array(lead, to_numpy(columns[0].values).dtype)
    values = [to_numpy(column.values) for column in columns]  # per record batch: [num_batch_tokens]
    offsets = [to_numpy(column.offsets) for column in columns]  # per record batch: [num_batch_documents + 1]
    ends = np.cumsum([len(column) for column in columns])  # [num_batches] documents up to and including each batch
    for start in range(0, len(run.rows), _DOCUMENTS_PER_READ):
        rows = run.rows[start : start + _DOCUMENTS_PER_READ]
        # Record batch of each document, and its row in that batch: [at most _DOCUMENTS_PER_READ].
        batches = np.searchsorted(ends, rows, side="right")
        within = rows - np.concatenate([[0], ends])[batches]
        documents = [
            values[batch][offsets[batch][row] : offsets[batch][row + 1]]
            for batch, row in zip(batches.tolist(), within.tolist(), strict=True)
        ]
        if run.num_lead and (first := np.flatnonzero(rows == 0)).size:
            documents[first[0]] = documents[first[0]][run.num_lead :]
        yield np.concatenate(documents)
