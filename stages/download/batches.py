"""Batches of records: a verdict on every record, and the kept records in the schema of data/raw.

Records of a regular batch are read column by column (columns.py). `_judge_row` reads irregular records one by one. It
is the reference: both ways give the same records and the same errors.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stages.core.artifacts import to_arrow
from stages.download.arrays import Bools, Ints, from_bools, merge_chunks
from stages.download.cleaning import Event, clean_record
from stages.download.columns import IrregularError, RegularRecords, SourceColumns, read_regular
from stages.download.duplicates import Signatures, sign_documents
from stages.download.records import (
    FILTERED,
    KEPT,
    MALFORMED,
    WITHOUT_ANSWERS,
    BadRecordError,
    Digests,
    MissingColumnError,
    Record,
    Row,
    build_record,
    build_split_key,
    digest_documents,
    find_mismatch,
    hash_split_keys,
    list_group_columns,
    list_key_names,
    read_group_values,
    record_schema,
)
from stages.download.schema import SourceData

# Appended to the message about a missing column.
_ADD_DATA_HINT = (
    "; `python -m tools.add_data PATH` shows the columns of the records, and writes a file in conf/data for them"
)


class Batch(NamedTuple):
    """Consecutive records of a source, with a verdict on each."""

    own_split: str | None
    """The source's own split, which all records share; None if it has none."""
    verdicts: npt.NDArray[np.uint8]
    """Verdict on each record, [num_records], uint8."""
    num_dropped: Ints
    """Number of empty or removed answers of each record, [num_records], int64."""
    table: pa.Table
    """Kept records in the schema of data/raw, [num_kept]."""
    split_hashes: npt.NDArray[np.uint64]
    """Hash of the split key of each kept record, [num_kept], uint64; zeros unless split.by is hash."""
    digests: Digests
    """Hash of the document of each kept record, [num_kept, 2], uint64."""
    num_characters: Ints
    """Number of characters in the texts of each kept record, [num_kept], int64."""
    first_messages: dict[int, str]
    """Verdict to the location of the first record with it and the reason, for verdicts that messages mention."""
    cleaned: "list[Cleaned]"
    """Records that cleaning changed, in order."""
    signatures: Signatures | None = None
    """MinHash signatures of the kept records, [num_kept, NUM_PERMUTATIONS], uint32; None if they are not needed."""

    def take_first(self, length: int) -> "Batch":
        """Return the batch with only its first `length` records."""
        verdicts = self.verdicts[:length]
        num_kept = int((verdicts == KEPT).sum())
        return self._replace(
            verdicts=verdicts,
            num_dropped=self.num_dropped[:length],
            table=self.table[:num_kept],
            split_hashes=self.split_hashes[:num_kept],
            digests=self.digests[:num_kept],
            num_characters=self.num_characters[:num_kept],
            first_messages={
                verdict: message for verdict, message in self.first_messages.items() if verdict in verdicts
            },
            cleaned=[record for record in self.cleaned if record.number < length],
            signatures=None if self.signatures is None else self.signatures[:num_kept],
        )

    def select(self, kept: Bools) -> "Batch":
        """Return the batch with only the kept records for which `kept`, [num_kept], bool, is True."""
        if kept.all():
            return self
        return self._replace(
            table=self.table.filter(from_bools(kept)),
            split_hashes=self.split_hashes[kept],
            digests=self.digests[kept],
            num_characters=self.num_characters[kept],
            signatures=None if self.signatures is None else self.signatures[kept],
        )


class Cleaned(NamedTuple):
    """A record of a batch in which cleaning changed or removed texts."""

    number: int
    """Index in the batch."""
    location: str
    events: Sequence[Event]


class Rules(NamedTuple):
    """Rules for judging the records of a source."""

    data: SourceData
    source: str | None
    """Name of the source to write to each record; None: the records already have a source and groups."""


class _JudgedRow(NamedTuple):
    """Verdict on a record that was read individually."""

    verdict: int
    message: str = ""
    num_dropped: int = 0
    record: Record | None = None
    key: str = ""
    events: Sequence[Event] = ()
    """Changes that cleaning made to its texts."""


class Records(Protocol):
    """Consecutive records of a source, readable one by one or as columns."""

    split: str | None
    """The source's own split, which all records share; None if it has none."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Row: ...

    def read_columns(self) -> SourceColumns:
        """Return all records as columns.

        Raises:
            IrregularError: if the records must be read one by one.
        """
        ...


def judge_records(rules: Rules, records: Records) -> Batch:
    """Judge `records`, and return them as a batch."""
    try:
        if rules.data.clean:
            raise IrregularError("cleaning changes texts")
        regular = read_regular(rules.data, rules.source, records.read_columns())
    except IrregularError:
        judged = {number: _judge_row(records[number], rules) for number in range(len(records))}
        batch = _build_batch(rules, records.split, list(judged.values()))
    else:
        judged = {number: _judge_row(records[number], rules) for number in np.flatnonzero(~regular.is_regular).tolist()}
        batch = _merge_batches(rules, records.split, regular, judged)
    for verdict in (MALFORMED, FILTERED):
        for number in np.flatnonzero(batch.verdicts == verdict)[:1].tolist():
            message = (judged.get(number) or _judge_row(records[number], rules)).message
            batch.first_messages[verdict] = f"{records[number].location}: {message}"
    # A kept record without a split is an error here, which names its location.
    if records.split is None and rules.data.split is not None and rules.data.split.by == "source":
        for number in np.flatnonzero(batch.verdicts == KEPT)[:1].tolist():
            batch.first_messages[KEPT] = records[number].location
    cleaned = [(number, item.events) for number, item in judged.items() if item.events]
    batch = batch._replace(cleaned=[Cleaned(number, records[number].location, events) for number, events in cleaned])
    if not rules.data.needs_signatures:
        return batch
    texts = pc.struct_field(merge_chunks(batch.table.column("answers")), "text")
    return batch._replace(signatures=sign_documents(texts))


def _judge_row(row: Row, rules: Rules) -> _JudgedRow:
    """Judge a single record."""
    data = rules.data
    try:
        if isinstance(row.value, BadRecordError):
            raise row.value
        if (other := find_mismatch(row.value, data.filter or {})) is not None:
            return _JudgedRow(FILTERED, other)
        record, num_dropped = build_record(row.value, data.columns)
        source_and_groups = _read_source_and_groups(row.value, rules)
        events = clean_record(record, data.clean)
        key = build_split_key(row.value, record, list_key_names(data.split))
    except BadRecordError as error:
        is_column_missing = isinstance(error, MissingColumnError) and data.hub is None
        return _JudgedRow(MALFORMED, f"{error}{_ADD_DATA_HINT if is_column_missing else ''}")
    if not record["answers"]["text"]:
        return _JudgedRow(WITHOUT_ANSWERS, num_dropped=num_dropped, events=events)
    return _JudgedRow(KEPT, "", num_dropped, record | source_and_groups, key, events)


def _read_source_and_groups(row: Any, rules: Rules) -> Record:
    """Return the source and the groups of a record."""
    if rules.source is None:
        groups = row.get("groups") or {}
        return {
            "source": row["source"],
            "groups": {name: groups.get(name) for name in list_group_columns(rules.data.groups)},
        }
    return {"source": rules.source, "groups": read_group_values(row, rules.data.groups)}


def _merge_batches(rules: Rules, split: str | None, regular: RegularRecords, judged: dict[int, _JudgedRow]) -> Batch:
    """Merge the `regular` records with the individually `judged` ones (index to verdict), in their original order."""
    fast = Batch(split, regular.verdicts, regular.num_dropped, *regular.kept, {}, [])
    if not judged:
        return fast
    single = _build_batch(rules, split, list(judged.values()))
    is_single = ~regular.is_regular  # [num_records]
    verdicts, num_dropped = fast.verdicts.copy(), fast.num_dropped.copy()
    verdicts[is_single], num_dropped[is_single] = single.verdicts, single.num_dropped
    # Indices of the kept records of `fast` and of `single`. Sorting their concatenation, [num_kept], gives the order in
    # which to take the rows of both tables.
    numbers = [np.flatnonzero(~is_single & (verdicts == KEPT)), np.flatnonzero(is_single & (verdicts == KEPT))]
    order = np.argsort(np.concatenate(numbers), kind="stable")
    return Batch(
        split,
        verdicts,
        num_dropped,
        pa.concat_tables([fast.table, single.table]).take(to_arrow(order)),
        np.concatenate([fast.split_hashes, single.split_hashes])[order],
        np.concatenate([fast.digests, single.digests])[order],
        np.concatenate([fast.num_characters, single.num_characters])[order],
        {},
        [],
    )


def _build_batch(rules: Rules, own_split: str | None, judged: list[_JudgedRow]) -> Batch:
    """Build the batch of individually judged records."""
    split = rules.data.split
    kept = [item for item in judged if item.record is not None]
    records = [item.record for item in kept if item.record is not None]
    split_hashes = np.zeros(len(kept), np.uint64)
    if split is not None and split.by == "hash":
        split_hashes = hash_split_keys([item.key for item in kept], split.seed)
    return Batch(
        own_split,
        np.array([item.verdict for item in judged], np.uint8),
        np.array([item.num_dropped for item in judged], np.int64),
        pa.Table.from_pylist(records, schema=record_schema(rules.data.groups, rules.data.columns.roles is not None)),
        split_hashes,
        digest_documents(" ".join(record["answers"]["text"]).encode() for record in records),
        np.array([sum(map(len, [*record["answers"]["text"], record["selftext"]])) for record in records], np.int64),
        {},
        [],
    )
