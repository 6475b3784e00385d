"""The texts of records, flattened: what tokenize reads of download's Parquet files, ahead of its work."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stages.artifacts import damaged, to_arrow, to_numpy
from stages.data_config import Flatten

Item = TypeVar("Item")
_END: Any = object()


class TextFile:
    """The texts of the records in a Parquet file of download: the values of flatten.columns, joined.

    Iterating gives an array of strings for each row group: what is written a row group at a time follows from the
    records alone.
    """

    def __init__(self, path: Path, flatten: Flatten) -> None:
        self._path, self._flatten = path, flatten
        with named_damage(path):
            metadata = pq.read_metadata(path)
        texts = {column.path for column in metadata.schema if str(column.logical_type) == "String"}
        for name in flatten.columns:
            if (f"{name}.list.element" if name == "answers.text" else name) not in texts:
                raise damaged(path, f"no column {name} of text, as download writes it")
        self.num_documents: int = metadata.num_rows
        self.num_groups: int = metadata.num_row_groups

    def __iter__(self) -> Iterator[pa.Array]:
        yield from self.groups(range(self.num_groups))

    def groups(self, numbers: Iterable[int]) -> Iterator[pa.Array]:
        """The texts of the row groups numbered `numbers`, an array of strings each."""
        with named_damage(self._path), pq.ParquetFile(self._path, page_checksum_verification=True) as file:
            for number in numbers:
                yield self._read(file, number)

    def _read(self, file: pq.ParquetFile, number: int) -> pa.Array:
        names = list(self._flatten.columns)
        table = file.read_row_group(number, columns=names, use_threads=False)
        columns = []
        for name in names:
            values = table.column(name.partition(".")[0]).combine_chunks()
            answers = values.field("text") if name == "answers.text" else None
            if values.null_count or (answers is not None and (answers.null_count or answers.flatten().null_count)):
                raise damaged(self._path, f"nulls in {name}, where download writes none")
            columns.append(values if answers is None else join(answers, self._flatten.joiner))
        if len(columns) == 1:
            return columns[0]
        # Row by row, as lists. (Arrow's own join of columns, told to skip nulls, leaves out rows that are all null.)
        rows = np.arange(len(table) * len(names)).reshape(len(names), -1).T
        ends = np.arange(len(table) + 1) * len(names)
        values = pa.concat_arrays(columns).take(to_arrow(rows.ravel()))
        return join(pa.LargeListArray.from_arrays(to_arrow(ends), values), self._flatten.joiner)


def join(lists: pa.Array, joiner: str) -> pa.Array:
    """The strings of each list that are not empty, joined: an array of strings."""
    values, ends = lists.flatten(), to_numpy(lists.offsets)
    kept = to_numpy(pc.binary_length(values)) > 0
    before = np.concatenate([[0], np.cumsum(kept)])[ends - ends[0]]
    values = values if kept.all() else values.take(to_arrow(np.flatnonzero(kept)))
    # A scalar made by pyarrow from Python's str would import pandas, half a second's work.
    separator = strings([joiner.encode()])[0]
    return pc.binary_join(pa.LargeListArray.from_arrays(to_arrow(before), values), separator)


def strings(values: list[bytes]) -> pa.Array:
    """An Arrow array of the strings that `values` spell in UTF-8."""
    ends = np.cumsum([0, *map(len, values)], dtype=np.int32)
    return pa.StringArray.from_buffers(len(values), pa.py_buffer(ends), pa.py_buffer(b"".join(values)))


@contextmanager
def named_damage(file: Path) -> Iterator[None]:
    """Errors of a damaged Parquet file inside the block, as StageErrors that name it."""
    try:
        yield
    except (pa.ArrowInvalid, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise  # the system's: no such file, no permission
        raise damaged(file, error) from None


def ahead(items: Iterable[Item]) -> Iterator[Item]:
    """`items`, each computed by a thread while the one before is worked on."""
    iterator = iter(items)
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, iterator, _END)
        while (item := coming.result()) is not _END:
            coming = thread.submit(next, iterator, _END)
            yield item
