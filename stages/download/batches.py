"""Batches of records: each record judged, and those that are kept in the schema of data/raw.

Records of a regular batch are read column by column (columns.py). Whatever is irregular about a record is left to
`_judge`, which reads it by itself: what it says counts, so that both ways give the same records and the same errors.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stages.core.artifacts import to_arrow
from stages.download.arrays import Bools, Ints, combine, from_bools
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
    digest_documents,
    group_values,
    kept_groups,
    key_names,
    mismatch,
    record_schema,
    split_key,
    split_points,
    to_record,
)
from stages.download.schema import SourceData

# What a message says further of a column that is not there.
_LOOK = "; `python -m tools.add_data PATH` shows what the records hold, and writes a file of conf/data for them"


class Batch(NamedTuple):
    """Consecutive records of a source, judged."""

    own_split: str | None
    """The source's own split of all of them, where it has one."""
    verdicts: npt.NDArray[np.uint8]
    """What becomes of each, [num_records]."""
    num_dropped: Ints
    """Empty or removed answers of each, [num_records]."""
    table: pa.Table
    """Those that are kept, in the schema of data/raw, [num_kept]."""
    points: npt.NDArray[np.uint64]
    """Hash of the split key of each that is kept, [num_kept]; zeros where no hash decides the split."""
    digests: Digests
    """Hash of the document of each that is kept, [num_kept, 2]."""
    num_characters: Ints
    """Characters in the texts of each that is kept, [num_kept]."""
    first: dict[int, str]
    """Verdict to the place of the first record with it, and why: of those that a message may be about."""
    cleaned: "list[Cleaned]"
    """What cleaning did to records, in order."""
    signatures: Signatures | None = None
    """MinHash signatures of those that are kept, [num_kept, NUM_PERMUTATIONS]; None: near duplicates do not matter."""

    def until(self, length: int) -> "Batch":
        """The first `length` records."""
        verdicts = self.verdicts[:length]
        num_kept = int((verdicts == KEPT).sum())
        return self._replace(
            verdicts=verdicts,
            num_dropped=self.num_dropped[:length],
            table=self.table[:num_kept],
            points=self.points[:num_kept],
            digests=self.digests[:num_kept],
            num_characters=self.num_characters[:num_kept],
            first={verdict: place for verdict, place in self.first.items() if verdict in verdicts},
            cleaned=[record for record in self.cleaned if record.number < length],
            signatures=None if self.signatures is None else self.signatures[:num_kept],
        )

    def select(self, kept: Bools) -> "Batch":
        """The batch with those of its kept records that `kept`, [num_kept], is true of."""
        if kept.all():
            return self
        return self._replace(
            table=self.table.filter(from_bools(kept)),
            points=self.points[kept],
            digests=self.digests[kept],
            num_characters=self.num_characters[kept],
            signatures=None if self.signatures is None else self.signatures[kept],
        )


class Cleaned(NamedTuple):
    """A record of a batch that cleaning changed, or took texts from."""

    number: int
    where: str
    events: Sequence[Event]


class Rules(NamedTuple):
    """What is done with records: the same for all of a source."""

    data: SourceData
    source: str | None
    """Name under which the records are filed; None: that which they have, as the stage has read them before."""


class _Judged(NamedTuple):
    """A record that was read by itself."""

    verdict: int
    message: str = ""
    num_dropped: int = 0
    record: Record | None = None
    key: str = ""
    events: Sequence[Event] = ()
    """What cleaning did to its texts."""


class Records(Protocol):
    """Consecutive records of a source."""

    split: str | None
    """The source's own split of all of them, where it has one."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Row: ...

    def columns(self) -> SourceColumns:
        """All of them.

        Raises:
            IrregularError: if they are to be read one by one.
        """
        ...


def judge(rules: Rules, records: Records) -> Batch:
    """The batch of `records`."""
    try:
        if rules.data.clean:
            raise IrregularError("texts are changed")
        regular = read_regular(rules.data, rules.source, records.columns())
    except IrregularError:
        judged = {number: _judge(records[number], rules) for number in range(len(records))}
        batch = _batch_of(rules, records.split, list(judged.values()))
    else:
        judged = {number: _judge(records[number], rules) for number in np.flatnonzero(~regular.is_regular).tolist()}
        batch = _merge(rules, records.split, regular, judged)
    for verdict in (MALFORMED, FILTERED):
        for number in np.flatnonzero(batch.verdicts == verdict)[:1].tolist():
            message = (judged.get(number) or _judge(records[number], rules)).message
            batch.first[verdict] = f"{records[number].where}: {message}"
    if records.split is None and rules.data.split is not None and rules.data.split.by == "source":  # an error
        for number in np.flatnonzero(batch.verdicts == KEPT)[:1].tolist():
            batch.first[KEPT] = records[number].where
    cleaned = [(number, item.events) for number, item in judged.items() if item.events]
    batch = batch._replace(cleaned=[Cleaned(number, records[number].where, events) for number, events in cleaned])
    if not rules.data.needs_signatures:
        return batch
    texts = pc.struct_field(combine(batch.table.column("answers")), "text")
    return batch._replace(signatures=sign_documents(texts))


def _judge(row: Row, rules: Rules) -> _Judged:
    """What becomes of a record that is read by itself."""
    data = rules.data
    try:
        if isinstance(row.value, BadRecordError):
            raise row.value
        if (other := mismatch(row.value, data.filter or {})) is not None:
            return _Judged(FILTERED, other)
        record, num_dropped = to_record(row.value, data.columns)
        origin = _origin(row.value, rules)
        events = clean_record(record, data.clean)
        key = split_key(row.value, record, key_names(data.split))
    except BadRecordError as error:
        is_column_missing = isinstance(error, MissingColumnError) and data.hub is None
        return _Judged(MALFORMED, f"{error}{_LOOK if is_column_missing else ''}")
    if not record["answers"]["text"]:
        return _Judged(WITHOUT_ANSWERS, num_dropped=num_dropped, events=events)
    return _Judged(KEPT, "", num_dropped, record | origin, key, events)


def _origin(row: Any, rules: Rules) -> Record:
    """The source and the groups of a record."""
    if rules.source is None:
        groups = row.get("groups") or {}
        return {"source": row["source"], "groups": {name: groups.get(name) for name in kept_groups(rules.data.groups)}}
    return {"source": rules.source, "groups": group_values(row, rules.data.groups)}


def _merge(rules: Rules, split: str | None, regular: RegularRecords, judged: dict[int, _Judged]) -> Batch:
    """The batch of the `regular` records and of those that were `judged` by themselves, in order."""
    fast = Batch(split, regular.verdicts, regular.num_dropped, *regular.kept, {}, [])
    if not judged:
        return fast
    single = _batch_of(rules, split, list(judged.values()))
    alone = ~regular.is_regular
    verdicts, num_dropped = fast.verdicts.copy(), fast.num_dropped.copy()
    verdicts[alone], num_dropped[alone] = single.verdicts, single.num_dropped
    # Numbers of the kept records of one and of the other, and the order that puts them into one sequence.
    numbers = [np.flatnonzero(~alone & (verdicts == KEPT)), np.flatnonzero(alone & (verdicts == KEPT))]
    order = np.argsort(np.concatenate(numbers), kind="stable")
    return Batch(
        split,
        verdicts,
        num_dropped,
        pa.concat_tables([fast.table, single.table]).take(to_arrow(order)),
        np.concatenate([fast.points, single.points])[order],
        np.concatenate([fast.digests, single.digests])[order],
        np.concatenate([fast.num_characters, single.num_characters])[order],
        {},
        [],
    )


def _batch_of(rules: Rules, own_split: str | None, judged: list[_Judged]) -> Batch:
    split = rules.data.split
    kept = [item for item in judged if item.record is not None]
    records = [item.record for item in kept if item.record is not None]
    points = np.zeros(len(kept), np.uint64)
    if split is not None and split.by == "hash":
        points = split_points([item.key for item in kept], split.seed)
    return Batch(
        own_split,
        np.array([item.verdict for item in judged], np.uint8),
        np.array([item.num_dropped for item in judged], np.int64),
        pa.Table.from_pylist(records, schema=record_schema(rules.data.groups, rules.data.columns.roles is not None)),
        points,
        digest_documents(" ".join(record["answers"]["text"]).encode() for record in records),
        np.array([sum(map(len, [*record["answers"]["text"], record["selftext"]])) for record in records], np.int64),
        {},
        [],
    )
