"""The texts of records, flattened: what is tokenized of download's Parquet files, read ahead of the work.

A document is one text, or several segments of which only some count: a prompt and its completion, or the parts of a
conversation.
"""

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
from pydantic import Field, model_validator
from tokenizers import Tokenizer

from stages.core.artifacts import damaged, to_arrow, to_numpy
from stages.core.config import part, whole
from stages.core.errors import StageError
from stages.tokens.chat import ChatTemplate, read_chat_template

_Item = TypeVar("_Item")
_END: Any = object()

# Columns of the texts of a record, which are the contents of messages in a conversation, and of the roles beside them.
_CONTENTS, _ROLES = "answers.text", "answers.role"
# Documents by which a faster engine proves itself: the first and the longest of the first row groups, and some of a few
# row groups of each file.
_FIRST_GROUPS, _RANDOM_GROUPS, _RANDOM_DOCUMENTS, _MOST_CHARACTERS = 4, 8, 96, 1_000_000


_Columns = Annotated[list[Literal["title", "selftext", "answers.text"]], Field(min_length=1)]


@whole
class Flatten:
    """Either `columns`, or `prompt` and `completion`, or `messages`."""

    columns: _Columns | None = None
    """Columns of ELI5's schema that make up a document's text, in this order."""
    prompt: _Columns | None = None
    """Columns that make up the beginning of a document, which is given and does not count."""
    completion: _Columns | None = None
    """Columns that make up the rest of a document: the model is trained and evaluated on it."""
    messages: bool = False
    """A document is a conversation, by the tokenizer's chat template; the assistant's messages count."""
    joiner: str = " "
    """Inserted between columns, and between answers."""
    separator: str = "\n\n"
    """Inserted between a prompt and its completion."""

    @model_validator(mode="after")
    def _is_one_kind(self) -> "Flatten":
        if (self.prompt is None) != (self.completion is None):
            missing = "prompt" if self.prompt is None else "completion"
            raise ValueError(f"flatten.{missing} is missing: a document is a prompt and its completion")
        if [self.columns is not None, self.prompt is not None, self.messages].count(True) != 1:
            raise ValueError("flatten: give either columns, or prompt and completion, or messages: true")
        return self

    @property
    def counts_all(self) -> bool:
        """Whether all text of a document counts."""
        return self.columns is not None

    @property
    def sections(self) -> list[list[str]]:
        """The columns of each segment of a document that is no conversation."""
        return [list(columns) for columns in (self.columns, self.prompt, self.completion) if columns is not None]


@part
class FlattenData:
    flatten: Flatten


def choose_flatten(of_task: Flatten | None, data: FlattenData) -> Flatten:
    """How documents are made of records: the task's own way, or that of conf/data."""
    return of_task or data.flatten


def open_template(
    flatten: Flatten, directory: Path, tokenizer: Tokenizer, special: dict[str, int]
) -> ChatTemplate | None:
    """What renders conversations, of the tokenizer in `directory`; None where documents are none.

    Raises:
        StageError: as `read_chat_template`.
    """
    return read_chat_template(directory, tokenizer, special) if flatten.messages else None


class Segments(NamedTuple):
    """Documents as pieces of text and control tokens, each encoded by itself."""

    texts: pa.Array
    """[num_segments] strings; empty for a control token."""
    offsets: npt.NDArray[np.int64]
    """[num_documents + 1] the first segment of each document, and the number of segments."""
    is_counted: npt.NDArray[np.bool_]
    """[num_segments]"""
    control: npt.NDArray[np.int64] | None = None
    """[num_segments] id of the control token that a segment stands for, -1 for text; None: all are text."""

    def owners(self) -> npt.NDArray[np.int64]:
        """The document of each segment, [num_segments]."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))

    def sum_by_document(self, values: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        """Sums of `values` [num_segments] over the segments of each document, [num_documents]."""
        sums = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
        return np.diff(sums[self.offsets])

    def take(self, documents: npt.NDArray[np.int64]) -> "Segments":
        """Those of some documents, by number."""
        lengths = np.diff(self.offsets)[documents]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        # The first segment of each document, plus 0, 1, ... within it.
        rows = np.repeat(self.offsets[documents] - offsets[:-1], lengths) + np.arange(offsets[-1])
        control = None if self.control is None else self.control[rows]
        return Segments(self.texts.take(to_arrow(rows)), offsets, self.is_counted[rows], control)


class Rows(NamedTuple):
    """Some documents of a file."""

    groups: range
    """The row groups that hold them."""
    first: int
    """The number of the first of them in the file."""


class TextFile:
    """The documents of the records in a Parquet file of download, as `flatten` makes them.

    Iterating gives the segments of each row group: what is written a row group at a time follows from the records
    alone.
    """

    def __init__(
        self,
        path: Path,
        flatten: Flatten,
        sources: list[str] | None = None,
        template: ChatTemplate | None = None,
    ) -> None:
        """
        Args:
            sources: names of those whose records are documents; None: all. A row group without any is left out.
            template: renders conversations, for flatten.messages.
        """
        self._path, self._flatten, self._template = path, flatten, template
        self.counts_all = flatten.counts_all
        """Whether all text counts."""
        self.is_rendered = flatten.messages
        """Whether documents hold control tokens of a chat template."""
        metadata = _metadata_of(path)
        texts = {column.path for column in metadata.schema if str(column.logical_type) == "String"}
        sections = [[_CONTENTS]] if flatten.messages else flatten.sections
        names = [name for section in sections for name in section]
        for name in names:
            if _path(name) not in texts:
                raise damaged(path, f"no column {name} of text, as download writes it")
        if flatten.messages and _path(_ROLES) not in texts:
            raise StageError(
                f"flatten.messages=true: the records in {path} have no roles: set columns.roles (conf/data) to the"
                " column that says who wrote a message"
            )
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        self._record_starts = np.cumsum([0, *(group.num_rows for group in groups)], dtype=np.int64)
        self.records: npt.NDArray[np.int64] | None = None if sources is None else find_records(path, sources)
        """[num_documents] number of each document's record; None: document i is record i."""
        ends = self._record_starts if self.records is None else np.searchsorted(self.records, self._record_starts)
        self._groups = np.flatnonzero(np.diff(ends))  # those with documents, of which the others know nothing
        self.num_groups: int = len(self._groups)
        paths = {_path(name) for name in names}
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

    def __iter__(self) -> Iterator[Segments]:
        yield from self.groups(range(self.num_groups))

    def groups(self, numbers: Iterable[int]) -> Iterator[Segments]:
        """The documents of the row groups numbered `numbers`, those of a row group at a time."""
        metadata = _metadata_of(self._path)
        with (
            named_damage(self._path),
            pq.ParquetFile(self._path, metadata=metadata, page_checksum_verification=True) as file,
        ):
            for number in numbers:
                yield self._read(file, number)

    def _read(self, file: pq.ParquetFile, number: int) -> Segments:
        if self._flatten.messages:
            return self._read_messages(file, number)
        sections = [self._read_section(file, number, names) for names in self._flatten.sections]
        num_documents = len(sections[0])
        if len(sections) == 1:
            return Segments(sections[0], np.arange(num_documents + 1), np.ones(num_documents, np.bool_))
        prompts, completions = sections
        is_given = to_numpy(pc.binary_length(prompts)) > 0  # the separator follows a prompt only where there is one
        separators = strings([b"", self._flatten.separator.encode()]).take(to_arrow(is_given.astype(np.int64)))
        prompts = pc.binary_join_element_wise(prompts, separators, strings([b""])[0])
        # Of each document its prompt, then its completion.
        order = np.arange(2 * num_documents).reshape(2, -1).T.ravel()
        texts = pa.concat_arrays([prompts, completions]).take(to_arrow(order))
        return Segments(texts, 2 * np.arange(num_documents + 1), np.tile([False, True], num_documents))

    def _read_section(self, file: pq.ParquetFile, number: int, names: list[str]) -> pa.Array:
        """The values of the columns `names`, joined: a string a record."""
        table = self._read_columns(file, number, names)
        columns = []
        for name in names:
            values = self._read_column(table, name)
            columns.append(join(values, self._flatten.joiner) if name == _CONTENTS else values)
        if len(columns) == 1:
            return columns[0]
        # Row by row, as lists. (Arrow's own join of columns, told to skip nulls, leaves out rows that are all null.)
        rows = np.arange(len(table) * len(names)).reshape(len(names), -1).T
        ends = np.arange(len(table) + 1) * len(names)
        values = pa.concat_arrays(columns).take(to_arrow(rows.ravel()))
        return join(pa.LargeListArray.from_arrays(to_arrow(ends), values), self._flatten.joiner)

    def _read_columns(self, file: pq.ParquetFile, number: int, names: list[str]) -> pa.Table:
        """The columns `names` of the records in a row group that are documents."""
        group = int(self._groups[number])
        table = file.read_row_group(group, columns=names, use_threads=False)
        if self.records is None:
            return table
        chosen = self.records[self.group_starts[number] : self.group_starts[number + 1]]
        return table.take(to_arrow(chosen - self._record_starts[group]))

    def _read_column(self, table: pa.Table, name: str) -> pa.Array:
        """The strings, or lists of strings, of a column."""
        top, _, field = name.partition(".")
        values = table.column(top).combine_chunks()
        lists = values.field(field) if field else None
        if values.null_count or (lists is not None and (lists.null_count or lists.flatten().null_count)):
            raise damaged(self._path, f"nulls in {name}, where download writes none")
        return values if lists is None else lists

    def _read_messages(self, file: pq.ParquetFile, number: int) -> Segments:
        assert self._template is not None  # whoever reads conversations gives one
        table = self._read_columns(file, number, [_CONTENTS, _ROLES])
        contents, roles = (self._read_column(table, name).to_pylist() for name in (_CONTENTS, _ROLES))
        first = int(self.group_starts[number])
        found, offsets = [], [0]
        for document, (own_contents, own_roles) in enumerate(zip(contents, roles, strict=True), start=first):
            messages = [
                {"role": role, "content": content} for role, content in zip(own_roles, own_contents, strict=True)
            ]
            try:
                found += self._template.split(messages)
            except ValueError as error:
                record = document if self.records is None else self.records[document]
                raise StageError(f"{self._path.stem} record {record}: {error}") from None
            offsets.append(len(found))
        return Segments(
            strings([segment.text.encode() for segment in found]),
            np.array(offsets, np.int64),
            np.array([segment.is_counted for segment in found], np.bool_),
            np.array([segment.control for segment in found], np.int64),
        )


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
    return f"{name}.list.element" if name in (_CONTENTS, _ROLES) else name


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
    for segments in files[0].groups(range(files[0].num_groups)[:_FIRST_GROUPS]):
        strings = segments.texts.to_pylist()
        chosen += [strings[0], max(strings, key=len)]
    random = np.random.default_rng(0)
    for file in files:
        numbers = random.permutation(file.num_groups)[:_RANDOM_GROUPS].tolist()
        for segments in file.groups(numbers):
            some = random.permutation(len(segments.texts))[: _RANDOM_DOCUMENTS // len(numbers)]
            chosen += segments.texts.take(to_arrow(some)).to_pylist()
    return [text[:_MOST_CHARACTERS] for text in chosen]


def prefetch(items: Iterable[_Item]) -> Iterator[_Item]:
    """`items`, each computed by a thread while the one before is worked on."""
    iterator = iter(items)
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, iterator, _END)
        while (item := coming.result()) is not _END:
            coming = thread.submit(next, iterator, _END)
            yield item
