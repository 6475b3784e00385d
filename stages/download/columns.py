"""Regular records, read column by column, with the same result as record by record (batches.py).

What is wrong with a record, or what a column cannot say of it (a null from a column that is not there), makes it
irregular: it is then read by itself.
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
    combine,
    fill_null,
    from_bools,
    list_offsets,
    make_lists,
    ranges,
    repeat,
    sum_by,
    take,
    text_offsets,
    to_bools,
    to_scalar,
)
from stages.download.records import (
    FILTERED,
    KEPT,
    OPTIONAL_TEXTS,
    REMOVED,
    TITLE,
    URL_FIELDS,
    WITHOUT_ANSWERS,
    BadRecordError,
    Digests,
    digest_documents,
    join_key,
    kept_groups,
    key_names,
    normalise,
    record_schema,
    scalar_text,
    split_points,
)
from stages.download.schema import SourceData

_STRING = pa.string()


class IrregularError(Exception):
    """Columns that are not of the types of a regular source."""


class KeptRecords(NamedTuple):
    """Records in the schema of data/raw, with what is decided by."""

    table: pa.Table
    """[num_kept]"""
    points: npt.NDArray[np.uint64]
    """Hash of the split key of each, [num_kept]; zeros where no hash decides the split."""
    digests: Digests
    """Hash of the document of each, [num_kept, 2]."""
    num_characters: Ints
    """Characters in the texts of each, [num_kept]."""


class RegularRecords(NamedTuple):
    """The regular records of a batch."""

    is_regular: Bools
    """[num_records]"""
    verdicts: npt.NDArray[np.uint8]
    """What becomes of each, [num_records]; without meaning where it is not regular."""
    num_dropped: Ints
    """Empty or removed answers of each, [num_records]; without meaning where it is not regular."""
    kept: KeptRecords
    """The regular ones that are kept."""


class SourceColumns(NamedTuple):
    """The columns of a batch, as its source has them."""

    batch: pa.RecordBatch
    is_regular: Bools
    """Which records are regular as far as the source's format goes, [num_records]."""
    null_may_be_absent: bool
    """Whether a null may stand for a column that a record does not have, which is an error."""


def read_regular(data: SourceData, source: str | None, columns: SourceColumns) -> RegularRecords:
    """The regular records among those of `columns`.

    Args:
        source: name under which the records are filed; None: that which they have, with the groups that they have.

    Raises:
        IrregularError: if a column that is used is absent or of another type than those of regular sources.
    """
    if data.columns.roles is not None:
        raise IrregularError("conversations")
    reader = _Reader(columns)
    passes = reader.passes(data.filter or {})
    title = reader.titles(data.columns.title)
    answers = _clean(*reader.answers(data.columns.texts))
    keys = [title if name == TITLE else reader.scalars(name) for name in key_names(data.split)]
    schema = record_schema(data.groups)
    fields = {
        **{name: reader.optional_texts(name) for name in OPTIONAL_TEXTS},
        **{name: {"url": reader.optional_lists(f"{name}.url")} for name in URL_FIELDS},
        "title": title,
        "answers": {
            "a_id": reader.parallel("answers.a_id", answers, pa.string(), ""),
            "text": answers.kept,
            "score": reader.parallel("answers.score", answers, pa.int64(), 0),
        },
    }
    if source is None:
        fields["source"] = reader.optional_texts("source")
        fields["groups"] = {name: reader.optional_scalars(f"groups.{name}") for name in kept_groups(data.groups)}
    else:
        fields["source"] = repeat(source, len(title))
        fields["groups"] = {name: reader.scalars(name) for name in kept_groups(data.groups)}
    verdicts = np.where(passes, np.where(answers.num_kept > 0, KEPT, WITHOUT_ANSWERS), FILTERED).astype(np.uint8)
    is_kept = reader.is_regular & (verdicts == KEPT)
    table = pa.Table.from_arrays([_column(fields[field.name], field) for field in schema], schema=schema)
    if not is_kept.all():
        table = table.filter(from_bools(is_kept)).combine_chunks()
        keys = [key.filter(from_bools(is_kept)) for key in keys]
    return RegularRecords(reader.is_regular, verdicts, answers.num_dropped, _decide(data, table, keys))


def _column(values: Any, field: pa.Field) -> pa.Array:
    """A column of `field`: the values, or a struct of them where they are named."""
    if not isinstance(values, dict):
        return values
    return pa.StructArray.from_arrays([values[part.name] for part in field.type], fields=list(field.type))


def _decide(data: SourceData, table: pa.Table, keys: Sequence[pa.Array]) -> KeptRecords:
    """The records of `table`, whose values of the columns in split.key are `keys`, with what is decided by."""
    texts = pc.struct_field(combine(table.column("answers")), "text")
    documents = pc.binary_join(texts, to_scalar(" "))
    content, bounds = memoryview(documents.buffers()[2] or b""), itertools.pairwise(text_offsets(documents).tolist())
    points = np.zeros(len(table), np.uint64)
    if data.split is not None and data.split.by == "hash":
        rows = zip(*(key.to_pylist() for key in keys), strict=True) if keys else itertools.repeat((), len(table))
        joined = (join_key([value or "" for value in values]) for values in rows)
        chosen = (key or normalise(documents[number].as_py()) for number, key in enumerate(joined))
        points = split_points(chosen, data.split.seed)
    digests = digest_documents(content[start:end] for start, end in bounds)
    return KeptRecords(table, points, digests, count_characters(table))


def count_characters(table: pa.Table) -> Ints:
    """Characters in the answers and the own text of each record of `table`, [num_records]."""
    texts = pc.struct_field(combine(table.column("answers")), "text")
    own: Ints = to_numpy(pc.utf8_length(combine(table.column("selftext"))))
    return own + sum_by(list_offsets(texts), to_numpy(pc.utf8_length(texts.flatten())))


class _Answers(NamedTuple):
    """The texts of a batch of records."""

    offsets: Ints
    """Where those of each record begin among all, empty and removed ones included, [num_records + 1]."""
    is_kept: Bools
    """Which of all texts are neither empty nor removed."""
    kept: pa.ListArray
    """Those of each record, [num_records]."""

    @property
    def num_kept(self) -> Ints:
        """[num_records]"""
        return sum_by(self.offsets, self.is_kept)

    @property
    def num_dropped(self) -> Ints:
        """[num_records]"""
        return sum_by(self.offsets, ~self.is_kept)


# Bytes with which a removed text may begin: white space, "[", and the first of those of wider white space (U+0085,
# U+00A0, U+1680, U+2000 to U+205F, U+3000).
_BEGINS_REMOVED = np.zeros(256, np.bool_)
_BEGINS_REMOVED[[*range(0x21), ord("["), 0xC2, 0xE1, 0xE2, 0xE3]] = True


def _clean(texts: pa.StringArray, offsets: Ints) -> _Answers:
    """The answers of records of which the texts, [num_texts], begin at `offsets`, [num_records + 1]."""
    starts = text_offsets(texts)
    content = np.frombuffer(texts.buffers()[2] or b"", np.uint8)
    is_kept = starts[1:] > starts[:-1]
    nonempty = np.flatnonzero(is_kept)
    for number in nonempty[_BEGINS_REMOVED[content[starts[nonempty]]]].tolist():
        is_kept[number] = texts[number].as_py().strip() not in REMOVED
    kept_offsets = np.concatenate([[0], np.cumsum(is_kept)])[offsets]
    kept = texts if is_kept.all() else texts.filter(from_bools(is_kept))
    return _Answers(offsets, is_kept, make_lists(kept_offsets, kept))


class _Reader:
    """Takes columns by name from those of a source, and notes which records are irregular."""

    def __init__(self, columns: SourceColumns) -> None:
        self._batch, self._null_may_be_absent = columns.batch, columns.null_may_be_absent
        self.is_regular = columns.is_regular.copy()
        self._num_rows = columns.batch.num_rows

    def passes(self, allowed: Mapping[str, Sequence[Any]]) -> Bools:
        """Whether each record holds one of the `allowed` values in every column, [num_records]."""
        passes = np.ones(self._num_rows, np.bool_)
        for name, values in allowed.items():
            passes &= np.array([value in values for value in self._required(name).to_pylist()], np.bool_)
        return passes

    def titles(self, name: str | None) -> pa.StringArray:
        if name is None:
            return repeat("", self._num_rows)
        return fill_null(_as_strings(self._required(name)), "")

    def answers(self, names: Sequence[str]) -> tuple[pa.StringArray, Ints]:
        """All texts of the columns `names`, and where those of each record begin, [num_records + 1]."""
        lists = [_as_lists(self._required(name)) for name in names]
        texts = [fill_null(item.flatten(), "") for item in lists]
        offsets = np.sum([list_offsets(item) for item in lists], axis=0)
        if len(lists) == 1:
            return texts[0], offsets
        # Positions of each column's texts: behind those of the columns before it in the same record.
        positions, next_free = [], offsets[:-1].copy()
        for item in lists:
            own = list_offsets(item)
            positions.append(ranges(next_free, np.diff(own)))
            next_free += np.diff(own)
        return take(pa.concat_arrays(texts), np.argsort(np.concatenate(positions))), offsets

    def scalars(self, name: str) -> pa.StringArray:
        """The values of a column of texts, numbers or dates, as `scalar_text` gives them."""
        return _as_scalars(self._required(name), name)

    def optional_scalars(self, name: str) -> pa.StringArray:
        array = _find(self._batch, name)
        return pa.nulls(self._num_rows, pa.string()) if array is None else _as_scalars(array, name)

    def optional_texts(self, name: str) -> pa.StringArray:
        if name not in self._batch.schema.names:
            return repeat("", self._num_rows)
        return fill_null(_as_strings(self._batch.column(name)), "")

    def optional_lists(self, name: str) -> pa.ListArray:
        array = _find(self._batch, name)
        if array is None:
            array = pa.nulls(self._num_rows, pa.string())
        lists = _as_lists(array)
        return make_lists(list_offsets(lists), fill_null(lists.flatten(), ""))

    def parallel(self, name: str, answers: _Answers, kind: pa.DataType, filler: Any) -> pa.ListArray:
        """The values of a list beside the texts, of those kept; fillers where it is absent or does not match them."""
        array = _find(self._batch, name)
        if array is None or not (pa.types.is_null(array.type) or _is_list(array.type)):
            values, starts, matches = pa.nulls(0, kind), np.zeros(self._num_rows, np.int64), np.False_
        else:
            lists = _as_lists(array, kind)
            values, starts = lists.flatten(), list_offsets(lists)[:-1]
            matches = to_numpy(fill_null(pc.list_value_length(lists), -1)) == np.diff(answers.offsets)
        lengths = np.diff(answers.offsets)
        positions = ranges(starts, lengths)[answers.is_kept]
        absent = ~np.repeat(np.broadcast_to(matches, lengths.shape), lengths)[answers.is_kept]
        taken = fill_null(take(values, positions, absent), filler)
        return pa.ListArray.from_arrays(answers.kept.offsets, taken)

    def _required(self, name: str) -> pa.Array:
        array = _find(self._batch, name)
        if array is None:
            raise IrregularError(name)
        if self._null_may_be_absent:
            self.is_regular &= ~_holds_null(array)
        return array


def _find(batch: pa.RecordBatch, name: str) -> pa.Array | None:
    """The column that `lookup` finds in every record; None where it finds none in any.

    Raises:
        IrregularError: if that is not the same for all.
    """
    if name in batch.schema.names:
        return batch.column(name)
    first, *steps = name.split(".")
    array = batch.column(first) if steps and first in batch.schema.names else None
    for step in steps:
        array = None if array is None else _step_into(array, step)
    return array


def _step_into(array: pa.Array, step: str) -> pa.Array | None:
    kind = array.type
    if pa.types.is_struct(kind):
        return pc.struct_field(array, step) if kind.get_field_index(step) >= 0 else None
    if _is_list(kind) and pa.types.is_struct(kind.value_type):
        items = array.flatten()
        if items.null_count:
            raise IrregularError(step)
        found = _step_into(items, step)
        if found is None:
            return None
        return make_lists(list_offsets(array), found, to_bools(array.is_null()))
    if pa.types.is_null(kind):
        return array
    if (
        pa.types.is_primitive(kind)
        or pa.types.is_string(kind)
        or (_is_list(kind) and not pa.types.is_nested(kind.value_type))
    ):
        return None
    raise IrregularError(step)


def _holds_null(array: pa.Array) -> Bools:
    """Whether each value, or an item of a list, is null, [len(array)]."""
    is_null = to_bools(array.is_null())
    if _is_list(array.type) and (items := array.flatten()).null_count:
        is_null = is_null | (sum_by(list_offsets(array), to_bools(items.is_null())) > 0)
    return is_null


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind))


def _as_strings(array: pa.Array) -> pa.StringArray:
    if not _is_text(array.type):
        raise IrregularError(str(array.type))
    return array.cast(pa.string())


def _as_lists(array: pa.Array, kind: pa.DataType = _STRING) -> pa.ListArray:
    """Lists of texts or numbers: an array of texts as lists of one each."""
    if _is_list(array.type):
        item = array.type.value_type
        fits = _is_text(item) if kind == _STRING else pa.types.is_signed_integer(item) or pa.types.is_null(item)
        if not fits:
            raise IrregularError(str(array.type))
        return array.cast(pa.list_(kind))
    texts = _as_strings(array)
    offsets = np.concatenate([[0], np.cumsum(to_bools(texts.is_valid()))])
    return make_lists(offsets, texts.drop_null().cast(kind))


def _as_scalars(array: pa.Array, name: str) -> pa.StringArray:
    if _is_text(array.type):
        return array.cast(pa.string())
    try:
        return pa.array([scalar_text(value, name) for value in array.to_pylist()], pa.string())
    except BadRecordError:
        raise IrregularError(name) from None
