"""The scores of a split's documents: what each takes in bits, in bytes and in tokens, a row a document in Parquet.

Every figure of documents is computed from such a table, so that one may compute others from it: differences between two
models document by document, or figures by any property of the documents.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stages.core.artifacts import TokenIds, damaged, to_arrow, to_numpy
from stages.tokens.texts import named_damage


class TokenBits(NamedTuple):
    """The tokens of a document's text."""

    ids: TokenIds
    """[num_tokens]"""
    bits: npt.NDArray[np.float32]
    """[num_tokens] -log2 p of each; 0 for one that is not predicted."""


_ROW_GROUP = 1024  # documents: who looks at a few of them reads few of the others


class Scores(NamedTuple):
    """What a model makes of some documents; each array is [num_documents]."""

    num_bytes: npt.NDArray[np.int64]
    """Of the document's text in UTF-8."""
    num_tokens: npt.NDArray[np.int64]
    """Of its text, without control tokens."""
    bits: npt.NDArray[np.float64]
    """-log2 p, summed over the tokens of the text."""

    def of(self, rows: npt.NDArray[np.int64]) -> "Scores":
        """Those of some of the documents."""
        return Scores(self.num_bytes[rows], self.num_tokens[rows], self.bits[rows])


def describe_records(files: list[Path], records: npt.NDArray[np.int64]) -> pa.Table:
    """What download says of the records numbered `records` in its Parquet files, which are counted through.

    Columns: record int64 (the number), q_id string (left out where it is empty in all), source string and, if groups
    are kept, groups struct<NAME: string, ...>.
    """
    parts = [_read_columns(file, ["q_id", "source", "groups"]) for file in files]
    for file, part in zip(files, parts, strict=True):
        if "source" not in part.column_names or part.column("source").null_count:
            raise damaged(file, "no column source, or nulls in it, where download writes none")
    rows = pa.concat_tables(parts, promote_options="default")
    if len(records) and records.max() >= len(rows):
        raise damaged(files[-1], f"it ends before record {records.max()}, which tokenize has read")
    rows = rows.take(to_arrow(records)).combine_chunks()
    if "q_id" in rows.column_names and not pc.max(pc.binary_length(rows.column("q_id"))).as_py():
        rows = rows.drop_columns(["q_id"])
    return rows.add_column(0, "record", to_arrow(records))


def add_scores(table: pa.Table, scores: Scores, name: str) -> pa.Table:
    """`table` with columns for the bytes and tokens of each document, unless it has them, and its bits under `name`."""
    if "bytes" not in table.column_names:
        table = table.append_column("bytes", to_arrow(scores.num_bytes))
        table = table.append_column("tokens", to_arrow(scores.num_tokens))
    return table.append_column(name, to_arrow(scores.bits))


def scores_in(table: pa.Table, name: str) -> Scores:
    """The inverse of `add_scores`."""
    return Scores(*(to_numpy(table.column(column).combine_chunks()) for column in ("bytes", "tokens", name)))


def write_scores(file: Path, table: pa.Table) -> None:
    """Write `table` to `file`: the same bytes for the same table."""
    pq.write_table(table, file, compression="zstd", write_page_checksum=True)


def write_token_bits(file: Path, records: npt.NDArray[np.int64], documents: Sequence[TokenBits]) -> None:
    """Write the tokens of each document's text and their bits, a row a document: the same bytes for the same values.

    Columns: record int64, input_ids large_list<uint16 or uint32>, bits large_list<float>.
    """
    offsets = to_arrow(np.cumsum([0, *(len(document.ids) for document in documents)], dtype=np.int64))
    ids, bits = (np.concatenate(values) for values in zip(*documents, strict=True))
    columns = {
        "record": to_arrow(records),
        "input_ids": pa.LargeListArray.from_arrays(offsets, to_arrow(ids)),
        "bits": pa.LargeListArray.from_arrays(offsets, to_arrow(bits)),
    }
    pq.write_table(
        pa.table(columns),
        file,
        row_group_size=_ROW_GROUP,
        compression="zstd",
        use_dictionary=["input_ids.list.element"],
        write_page_checksum=True,
    )


def read_scores(file: Path) -> pa.Table:
    """The table that baseline wrote to `file`."""
    table = _read_columns(file, None)
    if missing := {"record", "source", "bytes", "tokens", "bits_before"}.difference(table.column_names):
        raise damaged(file, f"no column {' and no '.join(sorted(missing))}, as baseline writes it")
    return table


def _read_columns(file: Path, names: list[str] | None) -> pa.Table:
    """The columns of a Parquet file that are among `names`; None: all of them."""
    with named_damage(file), pq.ParquetFile(file, page_checksum_verification=True) as parquet:
        there = parquet.schema_arrow.names
        return parquet.read(columns=None if names is None else [name for name in names if name in there])
