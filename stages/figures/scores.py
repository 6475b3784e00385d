"""Scores of documents: bits, bytes and tokens, stored as Parquet tables with one row per document.

All metrics of documents are computed from these tables, so others can be computed later: differences between two models
document by document, or metrics by any property of the documents.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stages.core.artifacts import TokenIds, make_damage_error, to_arrow, to_numpy
from stages.tokens.texts import convert_parquet_errors


class TokenBits(NamedTuple):
    """The tokens of a document's text."""

    ids: TokenIds
    """Token ids, [num_tokens] uint16 or uint32."""
    bits: npt.NDArray[np.float32]
    """-log2 p of each token, [num_tokens] float32; 0 for a token that is not predicted."""


_ROW_GROUP_SIZE = 1024  # documents; a reader of a few documents reads few others


class Scores(NamedTuple):
    """The scores of documents by one model; each array is [num_documents]."""

    num_bytes: npt.NDArray[np.int64]
    """Bytes of the document's text in UTF-8."""
    num_tokens: npt.NDArray[np.int64]
    """Tokens of its text, without control tokens."""
    bits: npt.NDArray[np.float64]
    """Sum of -log2 p over the tokens of the text."""

    def select(self, rows: npt.NDArray[np.int64]) -> "Scores":
        """Return the scores of some of the documents.

        Args:
            rows: indices of these documents, [num_rows] int64.
        """
        return Scores(self.num_bytes[rows], self.num_tokens[rows], self.bits[rows])


def read_record_columns(files: list[Path], records: npt.NDArray[np.int64]) -> pa.Table:
    """Read the columns of download that identify records.

    Args:
        files: Parquet files of download; records are numbered consecutively over all files.
        records: numbers of the records, [num_records] int64.

    Returns:
        Columns record int64 (the number), q_id string (omitted if it is empty in all rows), source string and, if
        download stored groups, groups struct<NAME: string, ...>.

    Raises:
        StageError: if the files have no sources, or fewer records than `records` needs.
    """
    parts = [_read_columns(file, ["q_id", "source", "groups"]) for file in files]
    for file, part in zip(files, parts, strict=True):
        if "source" not in part.column_names or part.column("source").null_count:
            raise make_damage_error(file, "no column source, or it has nulls, which download never writes")
    rows = pa.concat_tables(parts, promote_options="default")
    if len(records) and records.max() >= len(rows):
        raise make_damage_error(files[-1], f"it ends before record {records.max()}, which tokenize read")
    rows = rows.take(to_arrow(records)).combine_chunks()
    if "q_id" in rows.column_names and not pc.max(pc.binary_length(rows.column("q_id"))).as_py():
        rows = rows.drop_columns(["q_id"])
    return rows.add_column(0, "record", to_arrow(records))


def add_scores(table: pa.Table, scores: Scores, name: str) -> pa.Table:
    """Return `table` with the bits of each document as column `name`, and with its bytes and tokens if it has none."""
    if "bytes" not in table.column_names:
        table = table.append_column("bytes", to_arrow(scores.num_bytes))
        table = table.append_column("tokens", to_arrow(scores.num_tokens))
    return table.append_column(name, to_arrow(scores.bits))


def get_scores(table: pa.Table, name: str) -> Scores:
    """Return the scores in a table, with the bits from column `name`: the inverse of `add_scores`."""
    return Scores(*(to_numpy(table.column(column).combine_chunks()) for column in ("bytes", "tokens", name)))


def write_scores(file: Path, table: pa.Table) -> None:
    """Write `table` to a Parquet file. Equal tables give equal bytes."""
    pq.write_table(table, file, compression="zstd", write_page_checksum=True)


def write_token_bits(file: Path, records: npt.NDArray[np.int64], documents: Sequence[TokenBits]) -> None:
    """Write the tokens of each document's text and their bits to a Parquet file, with one row per document.

    Columns: record int64, input_ids large_list<uint16 or uint32>, bits large_list<float>. Equal values give
    equal bytes.

    Args:
        records: number of each document's record, [num_documents] int64.
    """
    offsets = to_arrow(np.cumsum([0, *(len(document.ids) for document in documents)], dtype=np.int64))
    ids, bits = (np.concatenate(values) for values in zip(*documents, strict=True))  # [total_tokens] each
    columns = {
        "record": to_arrow(records),
        "input_ids": pa.LargeListArray.from_arrays(offsets, to_arrow(ids)),
        "bits": pa.LargeListArray.from_arrays(offsets, to_arrow(bits)),
    }
    pq.write_table(
        pa.table(columns),
        file,
        row_group_size=_ROW_GROUP_SIZE,
        compression="zstd",
        use_dictionary=["input_ids.list.element"],
        write_page_checksum=True,
    )


def read_scores(file: Path) -> pa.Table:
    """Read the table that baseline wrote to `file`.

    Raises:
        StageError: if the file is damaged or lacks a column.
    """
    table = _read_columns(file, None)
    if missing := {"record", "source", "bytes", "tokens", "bits_before"}.difference(table.column_names):
        raise make_damage_error(file, f"no column {' and no '.join(sorted(missing))}, which baseline writes")
    return table


def _read_columns(file: Path, names: list[str] | None) -> pa.Table:
    """Read those columns of a Parquet file that are in `names`; None: all columns."""
    with convert_parquet_errors(file), pq.ParquetFile(file, page_checksum_verification=True) as parquet:
        existing = parquet.schema_arrow.names
        return parquet.read(columns=None if names is None else [name for name in names if name in existing])
