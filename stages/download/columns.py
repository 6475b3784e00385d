"""Column-wise reading of regular records, with the same result as reading record by record (batches.py).

A record is irregular if it is malformed, or if its columns are ambiguous (a null or a missing column?). Irregular
records are read one by one.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stages.core.artifacts import to_numpy
from stages.download.arrays import (
    Bools,
    Ints,
    compute_list_offsets,
    concatenate_ranges,
    fill_null,
    from_bools,
    get_text_offsets,
    make_lists,
    merge_chunks,
    repeat_text,
    sum_per_record,
    take_values,
    to_bools,
    to_scalar,
)
from stages.download.records import (
    FILTERED,
    KEPT,
    OPTIONAL_TEXTS,
    REMOVED_TEXTS,
    TITLE,
    URL_FIELDS,
    WITHOUT_ANSWERS,
    BadRecordError,
    Digests,
    digest_documents,
    format_scalar,
    hash_split_keys,
    join_key,
    list_group_columns,
    list_key_names,
    normalize_text,
    record_schema,
)
from stages.download.schema import SourceData

_STRING = pa.string()


class IrregularError(Exception):
    """Columns without the types of a regular source."""


class KeptRecords(NamedTuple):
    """Records in the schema of data/raw, with the hashes that decide their splits and duplicates."""

    table: pa.Table
    """[num_kept]"""
    split_hashes: npt.NDArray[np.uint64]
    """Hashes of the split keys, [num_kept], uint64; zeros unless split.by is hash."""
    digests: Digests
    """Hashes of the documents, [num_kept, 2], uint64."""
    num_characters: Ints
    """Numbers of characters in the texts, [num_kept], int64."""


class RegularRecords(NamedTuple):
    """The regular records of a batch."""

    is_regular: Bools
    """[num_records], bool"""
    verdicts: npt.NDArray[np.uint8]
    """Verdict on each record, [num_records], uint8; undefined for irregular records."""
    num_dropped: Ints
    """Numbers of empty or removed answers, [num_records], int64; undefined for irregular records."""
    kept: KeptRecords
    """The regular records that are kept."""


class SourceColumns(NamedTuple):
    """The columns of a batch, as its source has them."""

    batch: pa.RecordBatch
    is_regular: Bools
    """True for records that the source's format allows to read as columns, [num_records], bool."""
    null_may_be_absent: bool
    """If True, a null can also mean that the record lacks the column, which is an error."""


def read_regular(data: SourceData, source: str | None, columns: SourceColumns) -> RegularRecords:
    """Read the regular records of `columns`.

    Args:
        source: name of the source to write to each record; None: keep the records' own source and groups.

    Raises:
        IrregularError: if a column in use is absent, or has a type that regular sources do not have.
    """
    if data.columns.roles is not None:
        raise IrregularError("conversations")
    reader = _Reader(columns)
    passes = reader.match_filter(data.filter or {})
    title = reader.read_titles(data.columns.title)
    answers = _drop_removed_texts(*reader.read_answers(data.columns.texts))
    keys = [title if name == TITLE else reader.read_scalars(name) for name in list_key_names(data.split)]
    schema = record_schema(data.groups)
    fields = {
        **{name: reader.read_optional_texts(name) for name in OPTIONAL_TEXTS},
        **{name: {"url": reader.read_optional_lists(f"{name}.url")} for name in URL_FIELDS},
        "title": title,
        "answers": {
            "a_id": reader.read_parallel_values("answers.a_id", answers, pa.string(), ""),
            "text": answers.kept,
            "score": reader.read_parallel_values("answers.score", answers, pa.int64(), 0),
        },
    }
    if source is None:
        fields["source"] = reader.read_optional_texts("source")
        fields["groups"] = {
            name: reader.read_optional_scalars(f"groups.{name}") for name in list_group_columns(data.groups)
        }
    else:
        fields["source"] = repeat_text(source, len(title))
        fields["groups"] = {name: reader.read_scalars(name) for name in list_group_columns(data.groups)}
    verdicts = np.where(passes, np.where(answers.num_kept > 0, KEPT, WITHOUT_ANSWERS), FILTERED).astype(np.uint8)
    is_kept = reader.is_regular & (verdicts == KEPT)
    table = pa.Table.from_arrays([_build_column(fields[field.name], field) for field in schema], schema=schema)
    if not is_kept.all():
        table = table.filter(from_bools(is_kept)).combine_chunks()
        keys = [key.filter(from_bools(is_kept)) for key in keys]
    return RegularRecords(reader.is_regular, verdicts, answers.num_dropped, _build_kept_records(data, table, keys))


def _build_column(values: Any, field: pa.Field) -> pa.Array:
    """Build a column, [num_records]: `values` itself, or a struct of the arrays of a dict."""
    if not isinstance(values, dict):
        return values
    return pa.StructArray.from_arrays([values[part.name] for part in field.type], fields=list(field.type))


def _build_kept_records(data: SourceData, table: pa.Table, keys: Sequence[pa.Array]) -> KeptRecords:
    """Compute the hashes and lengths of records.

    Args:
        table: the records, [num_records].
        keys: the values of each column in split.key, [num_records] each.
    """
    # List of texts per record, [num_records], joined to one document per record.
    texts = pc.struct_field(merge_chunks(table.column("answers")), "text")
    documents = pc.binary_join(texts, to_scalar(" "))
    # The bytes of all documents, and the start and end of each within them.
    content = memoryview(documents.buffers()[2] or b"")
    bounds = itertools.pairwise(get_text_offsets(documents).tolist())
    split_hashes = np.zeros(len(table), np.uint64)
    if data.split is not None and data.split.by == "hash":
        rows = zip(*(key.to_pylist() for key in keys), strict=True) if keys else itertools.repeat((), len(table))
        joined = (join_key([value or "" for value in values]) for values in rows)
        chosen = (key or normalize_text(documents[number].as_py()) for number, key in enumerate(joined))
        split_hashes = hash_split_keys(chosen, data.split.seed)
    digests = digest_documents(content[start:end] for start, end in bounds)
    return KeptRecords(table, split_hashes, digests, count_characters(table))


def count_characters(table: pa.Table) -> Ints:
    """Count the characters in the answers and the selftext of each record of `table`, [num_records], int64."""
    texts = pc.struct_field(merge_chunks(table.column("answers")), "text")
    selftext: Ints = to_numpy(pc.utf8_length(merge_chunks(table.column("selftext"))))
    return selftext + sum_per_record(compute_list_offsets(texts), to_numpy(pc.utf8_length(texts.flatten())))


class _Answers(NamedTuple):
    """Answers of a batch of records."""

    offsets: Ints
    """Index of each record's first text among all texts, [num_records + 1], int64."""
    is_kept: Bools
    """True for texts that are neither empty nor removed, [num_texts], bool."""
    kept: pa.ListArray
    """List of the kept texts per record, [num_records]."""

    @property
    def num_kept(self) -> Ints:
        """Number of kept texts per record, [num_records], int64."""
        return sum_per_record(self.offsets, self.is_kept)

    @property
    def num_dropped(self) -> Ints:
        """Number of empty or removed texts per record, [num_records], int64."""
        return sum_per_record(self.offsets, ~self.is_kept)


# First bytes that a removed text can have: ASCII white space, "[", and the first UTF-8 byte of other white space
# (U+0085, U+00A0, U+1680, U+2000 to U+205F, U+3000).
_CAN_BEGIN_REMOVED = np.zeros(256, np.bool_)
_CAN_BEGIN_REMOVED[[*range(0x21), ord("["), 0xC2, 0xE1, 0xE2, 0xE3]] = True


def _drop_removed_texts(texts: pa.StringArray, offsets: Ints) -> _Answers:
    """Drop the empty and removed texts of records.

    Args:
        texts: texts of all records, [num_texts].
        offsets: index of each record's first text, [num_records + 1], int64.
    """
    # Byte offset of each text in `content`, [num_texts + 1].
    starts = get_text_offsets(texts)
    content = np.frombuffer(texts.buffers()[2] or b"", np.uint8)
    is_kept = starts[1:] > starts[:-1]
    # Decode only the texts whose first byte a removed text can have.
    nonempty = np.flatnonzero(is_kept)
    for number in nonempty[_CAN_BEGIN_REMOVED[content[starts[nonempty]]]].tolist():
        is_kept[number] = texts[number].as_py().strip() not in REMOVED_TEXTS
    kept_offsets = np.concatenate([[0], np.cumsum(is_kept)])[offsets]
    kept = texts if is_kept.all() else texts.filter(from_bools(is_kept))
    return _Answers(offsets, is_kept, make_lists(kept_offsets, kept))


class _Reader:
    """Reads columns of a source by name, and marks the irregular records in `is_regular`."""

    def __init__(self, columns: SourceColumns) -> None:
        self._batch, self._null_may_be_absent = columns.batch, columns.null_may_be_absent
        self.is_regular = columns.is_regular.copy()
        self._num_rows = columns.batch.num_rows

    def match_filter(self, allowed: Mapping[str, Sequence[Any]]) -> Bools:
        """Return True for records with one of the `allowed` values in every column, [num_records], bool."""
        passes = np.ones(self._num_rows, np.bool_)
        for name, values in allowed.items():
            passes &= np.array([value in values for value in self._read_required(name).to_pylist()], np.bool_)
        return passes

    def read_titles(self, name: str | None) -> pa.StringArray:
        """Return the titles, [num_records]; empty texts if no column has them."""
        if name is None:
            return repeat_text("", self._num_rows)
        return fill_null(_to_strings(self._read_required(name)), "")

    def read_answers(self, names: Sequence[str]) -> tuple[pa.StringArray, Ints]:
        """Return the texts of the columns `names`, [num_texts], and each record's first index, [num_records + 1].

        The texts are ordered by record, then by column.
        """
        lists = [_to_lists(self._read_required(name)) for name in names]
        texts = [fill_null(item.flatten(), "") for item in lists]
        offsets = np.sum([compute_list_offsets(item) for item in lists], axis=0)
        if len(lists) == 1:
            return texts[0], offsets
        # Position of each column's texts in the result: after the texts of earlier columns of the same record.
        # next_free: [num_records], the first position of each record that is not yet taken.
        positions, next_free = [], offsets[:-1].copy()
        for item in lists:
            lengths = np.diff(compute_list_offsets(item))
            positions.append(concatenate_ranges(next_free, lengths))
            next_free += lengths
        return take_values(pa.concat_arrays(texts), np.argsort(np.concatenate(positions))), offsets

    def read_scalars(self, name: str) -> pa.StringArray:
        """Return a column of texts, numbers or dates as text in the form of `format_scalar`, [num_records]."""
        return _to_scalars(self._read_required(name), name)

    def read_optional_scalars(self, name: str) -> pa.StringArray:
        """Return a column of scalars that may be absent as text, [num_records]; all nulls if it is absent."""
        array = _find_column(self._batch, name)
        return pa.nulls(self._num_rows, pa.string()) if array is None else _to_scalars(array, name)

    def read_optional_texts(self, name: str) -> pa.StringArray:
        """Return a column of texts that may be absent, [num_records], with empty texts for nulls."""
        if name not in self._batch.schema.names:
            return repeat_text("", self._num_rows)
        return fill_null(_to_strings(self._batch.column(name)), "")

    def read_optional_lists(self, name: str) -> pa.ListArray:
        """Return a column of lists of texts that may be absent, [num_records], with empty lists for nulls."""
        array = _find_column(self._batch, name)
        if array is None:
            array = pa.nulls(self._num_rows, pa.string())
        lists = _to_lists(array)
        return make_lists(compute_list_offsets(lists), fill_null(lists.flatten(), ""))

    def read_parallel_values(self, name: str, answers: _Answers, kind: pa.DataType, filler: Any) -> pa.ListArray:
        """Return the values of a list parallel to the texts, for the kept texts, [num_records].

        Values are `filler` for records in which the list is absent or differs in length from the texts.
        """
        array = _find_column(self._batch, name)
        if array is None or not (pa.types.is_null(array.type) or _is_list(array.type)):
            values, starts, matches = pa.nulls(0, kind), np.zeros(self._num_rows, np.int64), np.False_
        else:
            lists = _to_lists(array, kind)
            values, starts = lists.flatten(), compute_list_offsets(lists)[:-1]
            matches = to_numpy(fill_null(pc.list_value_length(lists), -1)) == np.diff(answers.offsets)
        # Of each record: number of texts, [num_records]. Of each kept text: index in `values`, True if it has no value.
        lengths = np.diff(answers.offsets)
        positions = concatenate_ranges(starts, lengths)[answers.is_kept]
        absent = ~np.repeat(np.broadcast_to(matches, lengths.shape), lengths)[answers.is_kept]
        filled = fill_null(take_values(values, positions, absent), filler)
        return pa.ListArray.from_arrays(answers.kept.offsets, filled)

    def _read_required(self, name: str) -> pa.Array:
        """Return a column that every record must have, [num_records].

        Raises:
            IrregularError: if no record has it.
        """
        array = _find_column(self._batch, name)
        if array is None:
            raise IrregularError(name)
        if self._null_may_be_absent:
            self.is_regular &= ~_has_null(array)
        return array


def _find_column(batch: pa.RecordBatch, name: str) -> pa.Array | None:
    """Return the column that `find_column_value` would find, [num_records], or None if there is none.

    Raises:
        IrregularError: if the column may exist in only some of the records.
    """
    if name in batch.schema.names:
        return batch.column(name)
    first, *steps = name.split(".")
    array = batch.column(first) if steps and first in batch.schema.names else None
    for step in steps:
        array = None if array is None else _find_field(array, step)
    return array


def _find_field(array: pa.Array, step: str) -> pa.Array | None:
    kind = array.type
    if pa.types.is_struct(kind):
        return pc.struct_field(array, step) if kind.get_field_index(step) >= 0 else None
    if _is_list(kind) and pa.types.is_struct(kind.value_type):
        items = array.flatten()
        if items.null_count:
            raise IrregularError(step)
        found = _find_field(items, step)
        if found is None:
            return None
        return make_lists(compute_list_offsets(array), found, to_bools(array.is_null()))
    if pa.types.is_null(kind):
        return array
    if (
        pa.types.is_primitive(kind)
        or pa.types.is_string(kind)
        or (_is_list(kind) and not pa.types.is_nested(kind.value_type))
    ):
        return None
    raise IrregularError(step)


def _has_null(array: pa.Array) -> Bools:
    """Return True for values that are null or lists with a null item, [len(array)], bool."""
    is_null = to_bools(array.is_null())
    if _is_list(array.type) and (items := array.flatten()).null_count:
        is_null = is_null | (sum_per_record(compute_list_offsets(array), to_bools(items.is_null())) > 0)
    return is_null


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind))


def _to_strings(array: pa.Array) -> pa.StringArray:
    if not _is_text(array.type):
        raise IrregularError(str(array.type))
    return array.cast(pa.string())


def _to_lists(array: pa.Array, kind: pa.DataType = _STRING) -> pa.ListArray:
    """Convert to lists of `kind`, [len(array)]; texts become lists of one item, nulls empty lists."""
    if _is_list(array.type):
        item = array.type.value_type
        fits = _is_text(item) if kind == _STRING else pa.types.is_signed_integer(item) or pa.types.is_null(item)
        if not fits:
            raise IrregularError(str(array.type))
        return array.cast(pa.list_(kind))
    texts = _to_strings(array)
    offsets = np.concatenate([[0], np.cumsum(to_bools(texts.is_valid()))])
    return make_lists(offsets, texts.drop_null().cast(kind))


def _to_scalars(array: pa.Array, name: str) -> pa.StringArray:
    if _is_text(array.type):
        return array.cast(pa.string())
    try:
        return pa.array([format_scalar(value, name) for value in array.to_pylist()], pa.string())
    except BadRecordError:
        raise IrregularError(name) from None
