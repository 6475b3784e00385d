"""Stage `download`: the records of a source, cleaned and split, in ELI5's schema.

Reads   the source that conf/data/NAME.yaml describes (files at data.path, or a data set of the Hub)
Writes  data/raw/{train,validation,test}.parquet and the ledger data/raw/stats.json
Command python -m stages.download
"""

import itertools
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stages.core.artifacts import SPLITS, staged, versions, write_json
from stages.core.config import part
from stages.core.errors import StageError, printable
from stages.download.cleaning import REMOVED, Cleaner, CleaningLedger, libraries_of
from stages.download.duplicates import ExactDuplicates, near_duplicates
from stages.download.files import PATH_LIMIT, format_of
from stages.download.hub_data import read_hub, resolve_commit
from stages.download.records import (
    ELI5,
    BadRecordError,
    MissingColumnError,
    Record,
    mismatch,
    split_key,
    split_of,
    to_record,
)
from stages.download.schema import SourceData
from stages.download.sources import Row, read

log = logging.getLogger(__name__)

# A row group, which later stages read whole, ends after so many records or after the record that takes its texts past
# so many characters: decided by the records alone, so that the same records give the same file.
ROW_GROUP, ROW_GROUP_CHARACTERS = 1024, 8 * 2**20

_FEW = 30  # different titles, with fewer of which a split may be left empty for want of them

_NEAR_DUPLICATES_OF = (
    20_000  # held-out documents at most that are looked for where they are only counted: some 10 KB each
)


@part
class DownloadConfig:
    data: SourceData
    out: str
    """Directory to write."""


def main(config: DownloadConfig) -> None:
    data = config.data
    log.info("reading %s", data.hub.id if data.hub else data.path)
    ledger = _Ledger()
    if data.clean:
        ledger.cleaner, ledger.cleaning = Cleaner(data.clean), CleaningLedger(data.clean)
    if data.hub is not None:
        commit = resolve_commit(data.hub)
        rows = read_hub(data.hub, commit, whole=data.max_records is None)
    else:
        commit, rows = None, read(data)
    with staged(config.out, ["stats.json", *(f"{split}.parquet" for split in SPLITS)]) as directory:
        writers = {split: _SplitWriter(directory / f"{split}.parquet") for split in SPLITS}
        for row in rows:
            if ledger.records_in - ledger.skipped["filtered"] == data.max_records:
                break
            placed = _assign_split(row, data, ledger)
            if placed is not None:
                split, record = placed
                writers[split].write(record)
                ledger.records_out[split] += 1
                ledger.answers_out += len(record["answers"]["text"])
        for writer in writers.values():
            writer.close()
        if data.deduplicate == "near" or data.count_near_duplicates:
            _look_for_near_duplicates(directory, ledger, drop=data.deduplicate == "near")
        ledger.check(data)
        if ledger.cleaning is not None:
            ledger.cleaning.write_samples(directory / REMOVED)
        write_json(directory / "stats.json", ledger.as_json(data, commit))
    if ledger.first_malformed:
        log.warning("%d malformed records left out; the first: %s", ledger.skipped["malformed"], ledger.first_malformed)
    log.info("%d records -> %s (%s)", ledger.records_in, config.out, ledger.summary())


class _Ledger:
    """What went in, came out and was left out."""

    def __init__(self) -> None:
        self.records_in = 0
        self.answers_in = 0
        self.answers_dropped = 0
        self.answers_out = 0
        self.answers_of_duplicates = 0
        self.records_out = Counter(dict.fromkeys(SPLITS, 0))
        self.first_malformed = ""
        self.first_filtered = ""
        self.skipped = Counter(
            {"malformed": 0, "filtered": 0, "without_answers": 0, "exact_duplicate": 0, "near_duplicate": 0}
        )
        self.exact_duplicates = ExactDuplicates()
        self.num_exact_duplicates = 0
        self.near_duplicates: dict[str, int] | None = None
        self._split_keys: set[int] = set()
        self.cleaner: Cleaner | None = None
        self.cleaning: CleaningLedger | None = None

    @property
    def answers_cleaned(self) -> int:
        """Answers that cleaning removed."""
        return self.cleaning.answers_removed if self.cleaning is not None else 0

    def add_split_key(self, key: str) -> None:
        """Note what decides a record's split, while there are few of these."""
        if len(self._split_keys) < _FEW:
            self._split_keys.add(hash(key))

    def check(self, data: SourceData) -> None:
        """Raise StageError unless every split has records; assert that none was lost on the way."""
        assert self.records_in == self.records_out.total() + self.skipped.total()
        answers = self.answers_out + self.answers_dropped + self.answers_of_duplicates + self.answers_cleaned
        assert self.answers_in == answers
        source = printable(data.hub.id if data.hub else data.path, PATH_LIMIT)
        if not self.records_in:
            raise StageError(f"{source} holds no records")
        if self.skipped["filtered"] == self.records_in:
            raise StageError(f"{source} holds no record that passes filter (conf/data): {self.first_filtered}")
        if not self.records_out.total():
            columns = printable(", ".join(data.columns.texts))
            malformed = f"; malformed: {self.first_malformed}" if self.first_malformed else ""
            raise StageError(
                f"{source} holds no record with an answer ({self.summary()}): what columns in conf/data names"
                f" ({columns}) is missing, empty or [deleted] in every record{malformed}"
            )
        empty = [split for split in SPLITS if not self.records_out[split]]
        if empty:
            raise StageError(f"no record for {' and '.join(empty)} ({self.summary()}): {self._more_records(data)}")

    def _more_records(self, data: SourceData) -> str:
        """What fills an empty split."""
        num_keys, num_records = len(self._split_keys), self.records_out.total()
        if 0 < num_keys < _FEW and num_keys <= num_records // 2:  # more of the same would go where these went
            values = "1 value" if num_keys == 1 else f"{num_keys} values"
            few = f"decides the split and has only {values} in {num_records:,} records (case and punctuation aside)"
            if data.columns.title is None:
                return f"the text {few}: give records with other texts"
            title = printable(repr(data.columns.title))
            return f"column {title} {few}: set columns.title in conf/data to another, or to null: the text then decides"
        remedy = "give more records, or raise its share in conf/data (split)"
        if data.text_record == "file" and self.records_in < 30 and format_of(data.path) in ("text", None):
            remedy += "; for one long text set text_record: paragraph there"
        return remedy

    def summary(self) -> str:
        parts = [f"{name} {count}" for name, count in self.records_out.items()]
        parts += [f"skipped {name} {count}" for name, count in self.skipped.items() if count]
        return ", ".join(parts)

    def as_json(self, data: SourceData, commit: str | None) -> dict[str, Any]:
        return {
            "source": {"hub": data.hub.id, "revision": data.hub.revision, "commit": commit}
            if data.hub
            else {"files": Path(data.path).name},
            "records_in": self.records_in,
            "records_out": dict(self.records_out),
            "records_skipped": dict(self.skipped),
            "answers_in": self.answers_in,
            "answers_out": self.answers_out,
            "answers_dropped": self.answers_dropped,
            "answers_of_duplicates": self.answers_of_duplicates,
            "exact_duplicates": self.num_exact_duplicates,
            "held_out_with_near_duplicate_in_train": self.near_duplicates,
            **({"clean": self.cleaning.as_json()} if self.cleaning is not None else {}),
            "versions": versions("datasketch", "pyarrow", *libraries_of(data.clean)),
        }


def _assign_split(row: Row, data: SourceData, ledger: _Ledger) -> tuple[str, Record] | None:
    """The split and the record of `row`, entered into the ledger; None where it is skipped.

    Raises:
        StageError: if the row is malformed and data.on_bad_record is `error`.
    """
    ledger.records_in += 1
    try:
        if isinstance(row.value, BadRecordError):
            raise row.value
        if (other := mismatch(row.value, data.filter or {})) is not None:
            ledger.skipped["filtered"] += 1
            ledger.first_filtered = ledger.first_filtered or f"{row.where}: {other}"
            return None
        record, dropped = to_record(row.value, data.columns)
    except BadRecordError as error:
        if data.on_bad_record == "error":
            look = "; `python -m tools.add_data PATH` shows what they hold, and writes a file of conf/data for them"
            hint = look if isinstance(error, MissingColumnError) and data.hub is None else ""
            raise StageError(
                f"{row.where}: {error} (in conf/data, columns and filter name yours, and"
                f" on_bad_record: skip leaves such records out{hint})"
            ) from None
        ledger.skipped["malformed"] += 1
        ledger.first_malformed = ledger.first_malformed or f"{row.where}: {error}"
        return None
    num_answers = len(record["answers"]["text"])
    ledger.answers_in += num_answers + dropped
    ledger.answers_dropped += dropped
    if ledger.cleaner is not None and ledger.cleaning is not None:
        ledger.cleaning.add(ledger.cleaner.clean_record(record), row.where)
        num_answers = len(record["answers"]["text"])
    if not num_answers:
        ledger.skipped["without_answers"] += 1
        return None
    if ledger.exact_duplicates.add(document(record["answers"]["text"])):
        ledger.num_exact_duplicates += 1
        if data.deduplicate != "none":
            ledger.skipped["exact_duplicate"] += 1
            ledger.answers_of_duplicates += num_answers
            return None
    if data.split.by == "hash":
        key = split_key(record)
        ledger.add_split_key(key)
        return split_of(key, data.split), record
    if row.split is None:
        raise StageError(f"{row.where}: split.by: source needs files or splits named train, validation and test")
    return row.split, record


def document(answers: list[str]) -> str:
    """The text that duplicates share."""
    return " ".join(answers)


def _look_for_near_duplicates(directory: Path, ledger: _Ledger, drop: bool) -> None:
    """Enter into the ledger how many held-out documents have a near duplicate in train; drop those of train if told so.

    Where they are only counted, they are looked for among NEAR_DUPLICATES_OF documents, evenly spaced.
    """

    def texts(split: str) -> Iterator[str]:
        for batch in pq.ParquetFile(directory / f"{split}.parquet").iter_batches(ROW_GROUP, columns=["answers.text"]):
            yield from (document(record["answers"]["text"]) for record in batch.to_pylist())

    held_out = ledger.records_out["validation"] + ledger.records_out["test"]
    step = 1 if drop else max(1, -(-held_out // _NEAR_DUPLICATES_OF))
    looked_for = itertools.islice(itertools.chain(texts("validation"), texts("test")), 0, None, step)
    leaked, leaking = near_duplicates(looked_for, texts("train"))
    in_test = sum(number * step >= ledger.records_out["validation"] for number in leaked)
    ledger.near_duplicates = {
        "validation": len(leaked) - in_test,
        "test": in_test,
        "looked_for": len(range(0, held_out, step)),
    }
    if drop and leaking:
        whole, file = directory / "whole.parquet", directory / "train.parquet"
        file.rename(whole)
        writer = _SplitWriter(file)
        rows = (row for batch in pq.ParquetFile(whole).iter_batches(ROW_GROUP) for row in batch.to_pylist())
        for number, record in enumerate(rows):
            if number in leaking:
                num_answers = len(record["answers"]["text"])
                ledger.records_out["train"] -= 1
                ledger.answers_out -= num_answers
                ledger.skipped["near_duplicate"] += 1
                ledger.answers_of_duplicates += num_answers
            else:
                writer.write(record)
        writer.close()
        whole.unlink()


class _SplitWriter:
    """Writes records to a Parquet file in row groups that the records alone decide."""

    def __init__(self, file: Path) -> None:
        # Texts hardly repeat: a dictionary of them costs time in writing and in reading. Checksums: zstd alone lets
        # some flipped bits through as other text.
        self._writer = pq.ParquetWriter(file, ELI5, compression="zstd", use_dictionary=False, write_page_checksum=True)
        self._rows: list[Record] = []
        self._num_characters = 0

    def write(self, record: Record) -> None:
        self._rows.append(record)
        self._num_characters += sum(map(len, record["answers"]["text"])) + len(record["selftext"])
        if len(self._rows) == ROW_GROUP or self._num_characters >= ROW_GROUP_CHARACTERS:
            self._flush()

    def _flush(self) -> None:
        self._writer.write_table(pa.Table.from_pylist(self._rows, schema=ELI5))
        self._rows.clear()
        self._num_characters = 0

    def close(self) -> None:
        if self._rows:
            self._flush()
        self._writer.close()
