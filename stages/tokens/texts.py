"""The texts of records, flattened: what is tokenized of download's Parquet files, read ahead of the work."""

import functools
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from stages.core.artifacts import damaged, to_arrow, to_numpy
from stages.core.config import part, whole

_Item = TypeVar("_Item")
_END: Any = object()

# Documents by which a faster engine proves itself: the first and the longest of the first row groups, and some of a few
# row groups of each file.
_FIRST_GROUPS, _RANDOM_GROUPS, _RANDOM_DOCUMENTS, _MOST_CHARACTERS = 4, 8, 96, 1_000_000


@whole
class Flatten:
    columns: Annotated[list[Literal["title", "selftext", "answers.text"]], Field(min_length=1)]
    """Columns of ELI5's schema that make up a document's text, in this order."""
    joiner: str
    """Stands between them, and between the answers."""


@part
class FlattenData:
    flatten: Flatten


class Rows(NamedTuple):
    """Some documents of a file."""

    groups: range
    """The row groups that hold them."""
    first: int
    """The number of the first of them in the file."""


class TextFile:
    """The texts of the records in a Parquet file of download: the values of flatten.columns, joined.

    Iterating gives an array of strings for each row group: what is written a row group at a time follows from the
    records alone.
    """

    def __init__(self, path: Path, flatten: Flatten, sources: list[str] | None = None) -> None:
        """
        Args:
            sources: names of those whose records are documents; None: all. A row group without any is left out.
        """
        self._path, self._flatten = path, flatten
        metadata = _metadata_of(path)
        texts = {column.path for column in metadata.schema if str(column.logical_type) == "String"}
        for name in flatten.columns:
            if _path(name) not in texts:
                raise damaged(path, f"no column {name} of text, as download writes it")
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        self._record_starts = np.cumsum([0, *(group.num_rows for group in groups)], dtype=np.int64)
        self.records: npt.NDArray[np.int64] | None = None if sources is None else find_records(path, sources)
        """[num_documents] number of each document's record; None: document i is record i."""
        ends = self._record_starts if self.records is None else np.searchsorted(self.records, self._record_starts)
        self._groups = np.flatnonzero(np.diff(ends))  # those with documents, of which the others know nothing
        self.num_groups: int = len(self._groups)
        paths = {_path(name) for name in flatten.columns}
        columns = [index for index, column in enumerate(metadata.schema) if column.path in paths]
        # The bytes of the texts of each row group.
        self._sizes = [
            sum(groups[group].column(index).total_uncompressed_size for index in columns) for group in self._groups
        ]
        self.group_starts = np.concatenate([ends[self._groups], ends[-1:]]).astype(np.int64)
        """[num_groups + 1] number of the first document of each row group, and the number of documents."""
        self.num_documents: int = int(ends[-1])

    def shards(self, size: int) -> list["Rows"]:
        """Runs of row groups, each of at least `size` bytes but the last; of no documents, one without groups."""
        ends = np.cumsum(self._sizes)
        runs: list[Rows] = []
        start = 0
        while start < self.num_groups or not runs:
            reached = size + (ends[start - 1] if start else 0)
            end = min(int(np.searchsorted(ends, reached)) + 1, self.num_groups)
            runs.append(Rows(range(start, end), int(self.group_starts[start])))
            start = end
        return runs

    def __iter__(self) -> Iterator[pa.Array]:
        yield from self.groups(range(self.num_groups))

    def groups(self, numbers: Iterable[int]) -> Iterator[pa.Array]:
        """The texts of the row groups numbered `numbers`, an array of strings each."""
        metadata = _metadata_of(self._path)
        with (
            named_damage(self._path),
            pq.ParquetFile(self._path, metadata=metadata, page_checksum_verification=True) as file,
        ):
            for number in numbers:
                yield self._read(file, number)

    def _read(self, file: pq.ParquetFile, number: int) -> pa.Array:
        names, group = list(self._flatten.columns), int(self._groups[number])
        table = file.read_row_group(group, columns=names, use_threads=False)
        if self.records is not None:
            chosen = self.records[self.group_starts[number] : self.group_starts[number + 1]]
            table = table.take(to_arrow(chosen - self._record_starts[group]))
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


def read_sources(file: Path) -> tuple[list[str], npt.NDArray[np.int64]]:
    """The names of the sources in a Parquet file of download, sorted, and the index of each record's: [num_records]."""
    with named_damage(file), pq.ParquetFile(file, page_checksum_verification=True) as parquet:
        if "source" not in parquet.schema_arrow.names:
            raise damaged(file, "no column source, as download writes it")
        column = parquet.read(columns=["source"]).column("source").combine_chunks().dictionary_encode()
    if column.null_count:
        raise damaged(file, "a record without a source")
    names = column.dictionary.to_pylist()
    rank = np.argsort(np.argsort(np.array(names, dtype=object)))
    return sorted(names), rank[to_numpy(column.indices)].astype(np.int64)


def find_records(file: Path, sources: list[str]) -> npt.NDArray[np.int64]:
    """Numbers of the records of `sources` in a Parquet file of download, ascending."""
    names, indices = read_sources(file)
    return np.flatnonzero(np.isin(indices, [number for number, name in enumerate(names) if name in sources]))


def _metadata_of(path: Path) -> pq.FileMetaData:
    """What the Parquet file `path` says of itself, parsed once a process (18 us a row group)."""
    stat = path.stat()
    return _metadata(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=4)
def _metadata(path: Path, *_: int) -> pq.FileMetaData:
    with named_damage(path):
        return pq.read_metadata(path)


def _path(name: str) -> str:
    """Where Parquet has the values of what `flatten` calls `name`."""
    return f"{name}.list.element" if name == "answers.text" else name


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


def sample_texts(files: list[TextFile]) -> list[str]:
    """Texts of the files by which a faster engine proves itself, each cut to _MOST_CHARACTERS.

    The first and the longest of the first row groups, and some of row groups drawn over all files.
    """
    chosen: list[str] = []
    for texts in files[0].groups(range(files[0].num_groups)[:_FIRST_GROUPS]):
        strings = texts.to_pylist()
        chosen += [strings[0], max(strings, key=len)]
    random = np.random.default_rng(0)
    for file in files:
        numbers = random.permutation(file.num_groups)[:_RANDOM_GROUPS].tolist()
        for texts in file.groups(numbers):
            some = random.permutation(len(texts))[: _RANDOM_DOCUMENTS // len(numbers)]
            chosen += texts.take(to_arrow(some)).to_pylist()
    return [text[:_MOST_CHARACTERS] for text in chosen]


def prefetch(items: Iterable[_Item]) -> Iterator[_Item]:
    """`items`, each computed by a thread while the one before is worked on."""
    iterator = iter(items)
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, iterator, _END)
        while (item := coming.result()) is not _END:
            coming = thread.submit(next, iterator, _END)
            yield item
