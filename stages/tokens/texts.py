"""Read the documents to tokenize from the records in download's Parquet files.

A document is one text, or several segments of which only some are counted: a prompt and its completion, or the parts of
a conversation.
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

from stages.core.artifacts import make_damage_error, to_arrow, to_numpy
from stages.core.config import config_section, config_view
from stages.core.errors import StageError
from stages.tokens.chat import ChatTemplate, read_chat_template

_Item = TypeVar("_Item")
_END_OF_ITEMS: Any = object()

# Columns with a record's texts (in a conversation, the contents of the messages) and with the role of each message.
_CONTENT_COLUMN, _ROLE_COLUMN = "answers.text", "answers.role"
# Size of the sample that a faster engine must encode exactly; see `sample_texts`.
_FIRST_GROUPS, _RANDOM_GROUPS, _RANDOM_DOCUMENTS, _MAX_CHARACTERS = 4, 8, 96, 1_000_000


_Columns = Annotated[list[Literal["title", "selftext", "answers.text"]], Field(min_length=1)]


@config_section
class Flatten:
    """The parts of a record that make up a document: `columns`, or `prompt` and `completion`, or `messages`."""

    columns: _Columns | None = None
    """Columns of ELI5's schema that make up a document's text, in this order."""
    prompt: _Columns | None = None
    """Columns that make up the beginning of a document; the model is neither trained nor evaluated on it."""
    completion: _Columns | None = None
    """Columns that make up the rest of a document; the model is trained and evaluated on it."""
    messages: bool = False
    """If true, documents are conversations in the tokenizer's chat template; the model learns the assistant's texts."""
    joiner: str = " "
    """Text inserted between columns, and between answers."""
    separator: str = "\n\n"
    """Text inserted between a prompt and its completion."""

    @model_validator(mode="after")
    def _check_kind(self) -> "Flatten":
        if (self.prompt is None) != (self.completion is None):
            missing = "prompt" if self.prompt is None else "completion"
            raise ValueError(f"flatten.{missing} is missing: a document is a prompt and its completion")
        if [self.columns is not None, self.prompt is not None, self.messages].count(True) != 1:
            raise ValueError("flatten: give either columns, or prompt and completion, or messages: true")
        return self

    @property
    def counts_all(self) -> bool:
        """True if all text of a document is counted."""
        return self.columns is not None

    @property
    def sections(self) -> list[list[str]]:
        """Columns of each segment of a document; empty for conversations."""
        return [list(columns) for columns in (self.columns, self.prompt, self.completion) if columns is not None]


@config_view
class FlattenData:
    flatten: Flatten


def choose_flatten(task_flatten: Flatten | None, data: FlattenData) -> Flatten:
    """Return the task's own `flatten` section, or that of conf/data if the task has none."""
    return task_flatten or data.flatten


def load_template(
    flatten: Flatten, directory: Path, tokenizer: Tokenizer, special: dict[str, int]
) -> ChatTemplate | None:
    """Return the chat template of the tokenizer in `directory`; None if documents are not conversations.

    Args:
        special: maps each role (bos_token, eos_token, ...) to its token id.

    Raises:
        StageError: if documents are conversations and the tokenizer has no chat template.
    """
    return read_chat_template(directory, tokenizer, special) if flatten.messages else None


class Segments(NamedTuple):
    """Segments of a sequence of documents; each segment is encoded separately."""

    texts: pa.Array
    """[num_segments] string; empty for a control token."""
    offsets: npt.NDArray[np.int64]
    """[num_documents + 1] int64: the segments of document i are `offsets[i]` to `offsets[i + 1] - 1`."""
    is_counted: npt.NDArray[np.bool_]
    """[num_segments] bool: True if the model is trained and evaluated on the segment."""
    control_ids: npt.NDArray[np.int64] | None = None
    """[num_segments] int64: id of a control token, or -1 for text; None if all segments are text."""

    def get_document_numbers(self) -> npt.NDArray[np.int64]:
        """Return the index of the document of each segment, [num_segments] int64."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))

    def sum_by_document(self, values: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        """Sum `values`, [num_segments], over the segments of each document; [num_documents] int64."""
        # sums[i]: the sum over the first i segments, [num_segments + 1]. Unlike np.add.reduceat, the difference is also
        # right for a document without segments.
        sums = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
        return np.diff(sums[self.offsets])

    def take_documents(self, documents: npt.NDArray[np.int64]) -> "Segments":
        """Return the segments of the documents with the given indices, [num_taken] int64, in their order."""
        lengths = np.diff(self.offsets)[documents]  # [num_taken] segments per document
        offsets = np.concatenate([[0], np.cumsum(lengths)])  # [num_taken + 1]
        # Row of each taken segment, [offsets[-1]]: the first segment of its document, plus its place in the document.
        rows = np.repeat(self.offsets[documents] - offsets[:-1], lengths) + np.arange(offsets[-1])
        control = None if self.control_ids is None else self.control_ids[rows]
        return Segments(self.texts.take(to_arrow(rows)), offsets, self.is_counted[rows], control)


class RowGroupRange(NamedTuple):
    """Consecutive row groups of a file."""

    groups: range
    """Indices of the row groups."""
    first_document: int
    """Index in the file of the first document of these row groups."""


class TextFile:
    """Documents built from the records in a Parquet file of download.

    Iteration yields the segments of one row group at a time. The batches therefore depend only on the records, and so
    does an output that is written in these batches.
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
            flatten: parts of a record that make up a document.
            sources: names of the sources to read; None: all. Row groups without records of these sources are skipped.
            template: chat template that renders conversations; required if `flatten.messages` is set.

        Raises:
            StageError: if the file is damaged, or lacks a column that `flatten` needs.
        """
        self._path, self._flatten, self._template = path, flatten, template
        self.counts_all = flatten.counts_all
        """True if all text of the documents is counted."""
        self.is_rendered = flatten.messages
        """True if documents contain the control tokens of a chat template."""
        metadata = _read_metadata(path)
        texts = {column.path for column in metadata.schema if str(column.logical_type) == "String"}
        sections = [[_CONTENT_COLUMN]] if flatten.messages else flatten.sections
        names = [name for section in sections for name in section]
        for name in names:
            if _get_parquet_path(name) not in texts:
                raise make_damage_error(path, f"it has no text column {name}, which download writes")
        if flatten.messages and _get_parquet_path(_ROLE_COLUMN) not in texts:
            raise StageError(
                f"flatten.messages=true: the records in {path} have no roles: set columns.roles (conf/data) to the"
                " column with the author of each message"
            )
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        self._record_starts = np.cumsum([0, *(group.num_rows for group in groups)], dtype=np.int64)
        self.records: npt.NDArray[np.int64] | None = None if sources is None else _find_records(path, sources)
        """[num_documents] int64: index in the file of each document's record; None: document i is record i."""
        # ends[i]: documents in the row groups before row group i, [num_row_groups + 1].
        ends = self._record_starts if self.records is None else np.searchsorted(self.records, self._record_starts)
        # Row groups with documents, [num_groups]. All other members number only these row groups.
        self._groups = np.flatnonzero(np.diff(ends))
        self.num_groups: int = len(self._groups)
        paths = {_get_parquet_path(name) for name in names}
        columns = [index for index, column in enumerate(metadata.schema) if column.path in paths]
        # Bytes of text in each row group, [num_groups].
        self._sizes = [
            sum(groups[group].column(index).total_uncompressed_size for index in columns) for group in self._groups
        ]
        self.group_starts = np.concatenate([ends[self._groups], ends[-1:]]).astype(np.int64)
        """[num_groups + 1] int64: the documents of row group i are `group_starts[i]` to `group_starts[i + 1] - 1`."""
        self.num_documents: int = int(ends[-1])

    def plan_shards(self, size: int) -> list["RowGroupRange"]:
        """Split the row groups into ranges of at least `size` bytes of text; the last one can be smaller.

        A file without documents gives one empty range.
        """
        ends = np.cumsum(self._sizes)
        ranges: list[RowGroupRange] = []
        start = 0
        while start < self.num_groups or not ranges:
            reached = size + (ends[start - 1] if start else 0)
            end = min(int(np.searchsorted(ends, reached)) + 1, self.num_groups)
            ranges.append(RowGroupRange(range(start, end), int(self.group_starts[start])))
            start = end
        return ranges

    def __iter__(self) -> Iterator[Segments]:
        yield from self.read_groups(range(self.num_groups))

    def read_groups(self, numbers: Iterable[int]) -> Iterator[Segments]:
        """Yield the segments of each row group in `numbers`, one row group at a time.

        Raises:
            StageError: if the file is damaged, or if the chat template rejects a conversation.
        """
        metadata = _read_metadata(self._path)
        with (
            convert_parquet_errors(self._path),
            pq.ParquetFile(self._path, metadata=metadata, page_checksum_verification=True) as file,
        ):
            for number in numbers:
                yield self._read_group(file, number)

    def _read_group(self, file: pq.ParquetFile, number: int) -> Segments:
        if self._flatten.messages:
            return self._read_messages(file, number)
        sections = [self._read_section(file, number, names) for names in self._flatten.sections]
        num_documents = len(sections[0])
        if len(sections) == 1:
            return Segments(sections[0], np.arange(num_documents + 1), np.ones(num_documents, np.bool_))
        prompts, completions = sections
        # The separator is added only to non-empty prompts: index 1 of [b"", separator], [num_documents].
        is_given = to_numpy(pc.binary_length(prompts)) > 0
        separators = _build_string_array([b"", self._flatten.separator.encode()]).take(
            to_arrow(is_given.astype(np.int64))
        )
        prompts = pc.binary_join_element_wise(prompts, separators, _build_string_array([b""])[0])
        # Interleave prompts and completions: the rows 0, n, 1, n + 1, ... of the concatenation, [2 * num_documents].
        order = np.arange(2 * num_documents).reshape(2, -1).T.ravel()
        texts = pa.concat_arrays([prompts, completions]).take(to_arrow(order))
        return Segments(texts, 2 * np.arange(num_documents + 1), np.tile([False, True], num_documents))

    def _read_section(self, file: pq.ParquetFile, number: int, names: list[str]) -> pa.Array:
        """Return the values of the columns `names`, joined to one string per record, [num_records] string."""
        table = self._read_columns(file, number, names)
        columns = []
        for name in names:
            values = self._read_column(table, name)
            columns.append(_join_strings(values, self._flatten.joiner) if name == _CONTENT_COLUMN else values)
        if len(columns) == 1:
            return columns[0]
        # Build one list of column values per record, and join each list. (pyarrow's own join of columns, when it skips
        # nulls, drops rows that are all null.) rows is [num_records, num_columns]: where each value is in the
        # concatenation of the columns.
        rows = np.arange(len(table) * len(names)).reshape(len(names), -1).T
        ends = np.arange(len(table) + 1) * len(names)
        values = pa.concat_arrays(columns).take(to_arrow(rows.ravel()))
        return _join_strings(pa.LargeListArray.from_arrays(to_arrow(ends), values), self._flatten.joiner)

    def _read_columns(self, file: pq.ParquetFile, number: int, names: list[str]) -> pa.Table:
        """Return the columns `names` of a row group, reduced to the records of the chosen sources."""
        group = int(self._groups[number])
        table = file.read_row_group(group, columns=names, use_threads=False)
        if self.records is None:
            return table
        chosen = self.records[self.group_starts[number] : self.group_starts[number + 1]]
        return table.take(to_arrow(chosen - self._record_starts[group]))

    def _read_column(self, table: pa.Table, name: str) -> pa.Array:
        """Return a column of a table: [num_records] string or list of strings."""
        top, _, field = name.partition(".")
        values = table.column(top).combine_chunks()
        lists = values.field(field) if field else None
        if values.null_count or (lists is not None and (lists.null_count or lists.flatten().null_count)):
            raise make_damage_error(self._path, f"nulls in {name}, but download writes none")
        return values if lists is None else lists

    def _read_messages(self, file: pq.ParquetFile, number: int) -> Segments:
        assert self._template is not None  # required for flatten.messages
        table = self._read_columns(file, number, [_CONTENT_COLUMN, _ROLE_COLUMN])
        contents, roles = (self._read_column(table, name).to_pylist() for name in (_CONTENT_COLUMN, _ROLE_COLUMN))
        first = int(self.group_starts[number])
        found, offsets = [], [0]
        for document, (own_contents, own_roles) in enumerate(zip(contents, roles, strict=True), start=first):
            messages = [
                {"role": role, "content": content} for role, content in zip(own_roles, own_contents, strict=True)
            ]
            try:
                found += self._template.split_messages(messages)
            except ValueError as error:
                record = document if self.records is None else self.records[document]
                raise StageError(f"{self._path.stem} record {record}: {error}") from None
            offsets.append(len(found))
        return Segments(
            _build_string_array([segment.text.encode() for segment in found]),
            np.array(offsets, np.int64),
            np.array([segment.is_counted for segment in found], np.bool_),
            np.array([segment.control_id for segment in found], np.int64),
        )


def read_sources(file: Path) -> tuple[list[str], npt.NDArray[np.int64]]:
    """Read the sources of the records in a Parquet file of download.

    Returns:
        The sorted names of the sources, and the index in them of each record's source, [num_records] int64.

    Raises:
        StageError: if the file is damaged.
    """
    with convert_parquet_errors(file), pq.ParquetFile(file, page_checksum_verification=True) as parquet:
        if "source" not in parquet.schema_arrow.names:
            raise make_damage_error(file, "it has no column source, which download writes")
        column = parquet.read(columns=["source"]).column("source").combine_chunks().dictionary_encode()
    if column.null_count:
        raise make_damage_error(file, "a record without a source")
    names = column.dictionary.to_pylist()
    rank = np.argsort(np.argsort(np.array(names, dtype=object)))  # [num_sources] position of each name when sorted
    return sorted(names), rank[to_numpy(column.indices)].astype(np.int64)


def _find_records(file: Path, sources: list[str]) -> npt.NDArray[np.int64]:
    """Return the indices of the records of `sources` in a Parquet file of download, ascending, int64."""
    names, indices = read_sources(file)
    return np.flatnonzero(np.isin(indices, [number for number, name in enumerate(names) if name in sources]))


def _read_metadata(path: Path) -> pq.FileMetaData:
    """Return the metadata of a Parquet file, parsed once per process (18 us per row group)."""
    stat = path.stat()
    return _read_cached_metadata(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=4)
def _read_cached_metadata(path: Path, *_: int) -> pq.FileMetaData:
    with convert_parquet_errors(path):
        return pq.read_metadata(path)


def _get_parquet_path(name: str) -> str:
    """Return the path in Parquet's schema of the values of the column `name`."""
    return f"{name}.list.element" if name in (_CONTENT_COLUMN, _ROLE_COLUMN) else name


def _join_strings(lists: pa.Array, joiner: str) -> pa.Array:
    """Join the non-empty strings of each list.

    Args:
        lists: [num_lists] list of strings.

    Returns:
        [num_lists] string.
    """
    values, ends = lists.flatten(), to_numpy(lists.offsets)  # [num_values], [num_lists + 1]
    is_filled = to_numpy(pc.binary_length(values)) > 0  # [num_values] bool
    # Offsets of the lists once empty values are dropped, [num_lists + 1]. In a sliced array, ends[0] is not 0.
    offsets = np.concatenate([[0], np.cumsum(is_filled)])[ends - ends[0]]
    values = values if is_filled.all() else values.take(to_arrow(np.flatnonzero(is_filled)))
    # pa.scalar(joiner) would import pandas, which takes half a second.
    separator = _build_string_array([joiner.encode()])[0]
    return pc.binary_join(pa.LargeListArray.from_arrays(to_arrow(offsets), values), separator)


def _build_string_array(values: list[bytes]) -> pa.Array:
    """Build a pyarrow array of strings, [num_values], from their UTF-8 bytes."""
    ends = np.cumsum([0, *map(len, values)], dtype=np.int32)  # [num_values + 1]
    return pa.StringArray.from_buffers(len(values), pa.py_buffer(ends), pa.py_buffer(b"".join(values)))


@contextmanager
def convert_parquet_errors(file: Path) -> Iterator[None]:
    """Convert the errors of a damaged Parquet file, raised inside the block, to a StageError that names the file."""
    try:
        yield
    except (pa.ArrowInvalid, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise  # from the operating system: no such file, no permission
        raise make_damage_error(file, error) from None


def sample_texts(files: list[TextFile]) -> list[str]:
    """Choose the texts that a faster engine must encode exactly, each cut to _MAX_CHARACTERS.

    They are the first and the longest text of each of the first row groups of the first file, and random texts from
    random row groups of every file.
    """
    chosen: list[str] = []
    for segments in files[0].read_groups(range(files[0].num_groups)[:_FIRST_GROUPS]):
        texts = segments.texts.to_pylist()
        chosen += [texts[0], max(texts, key=len)]
    random = np.random.default_rng(0)
    for file in files:
        numbers = random.permutation(file.num_groups)[:_RANDOM_GROUPS].tolist()
        for segments in file.read_groups(numbers):
            some = random.permutation(len(segments.texts))[: _RANDOM_DOCUMENTS // len(numbers)]
            chosen += segments.texts.take(to_arrow(some)).to_pylist()
    return [text[:_MAX_CHARACTERS] for text in chosen]


def prefetch(items: Iterable[_Item]) -> Iterator[_Item]:
    """Yield `items`; a thread computes the next item while the caller works on the current one."""
    iterator = iter(items)
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, iterator, _END_OF_ITEMS)
        while (item := coming.result()) is not _END_OF_ITEMS:
            coming = thread.submit(next, iterator, _END_OF_ITEMS)
            yield item
