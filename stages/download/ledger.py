"""Ledger of download: the records and answers read, written and left out."""

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stages.core.artifacts import SPLITS, get_versions
from stages.core.errors import StageError, printable
from stages.download.batches import Batch
from stages.download.cleaning import CleaningLedger, list_cleaning_libraries
from stages.download.cleaning_schema import Step
from stages.download.files import PATH_LIMIT, get_format
from stages.download.records import FILTERED, KEPT, MALFORMED, TITLE, WITHOUT_ANSWERS, list_key_names
from stages.download.schema import SourceData

log = logging.getLogger(__name__)

# With fewer distinct split keys than this, the size of a split can be far from its share: with 100 keys, a share of 0.1
# is off by a factor of two in 1 of 30 draws.
_FEW_KEYS = 100


class Ledger:
    """Counts of the records and answers read, written and left out."""

    def __init__(self, splits: Sequence[str], steps: Sequence[Step] = ()) -> None:
        """
        Args:
            splits: names of the files of records.
            steps: the cleaning steps.
        """
        self.records_in = 0
        self.answers_in = 0
        self.answers_dropped = 0
        self.answers_out = 0
        self.answers_of_duplicates = 0
        self.records_out = Counter(dict.fromkeys(splits, 0))
        self.first_malformed = ""
        self.first_filtered = ""
        self.skipped = Counter(
            {"malformed": 0, "filtered": 0, "without_answers": 0, "exact_duplicate": 0, "near_duplicate": 0}
        )
        self.num_exact_duplicates = 0
        self.near_duplicates: dict[str, int] | None = None
        self.cleaning = CleaningLedger(steps)
        self._split_keys: set[int] = set()

    @property
    def num_passed(self) -> int:
        """Number of records that passed the filter."""
        return self.records_in - self.skipped["filtered"]

    def add_batch(self, batch: Batch) -> None:
        """Count all records of `batch`, both kept and left out."""
        for verdict, name in ((MALFORMED, "malformed"), (FILTERED, "filtered"), (WITHOUT_ANSWERS, "without_answers")):
            self.skipped[name] += int((batch.verdicts == verdict).sum())
        self.first_malformed = self.first_malformed or batch.first_messages.get(MALFORMED, "")
        self.first_filtered = self.first_filtered or batch.first_messages.get(FILTERED, "")
        self.records_in += len(batch.verdicts)
        answered = np.isin(batch.verdicts, [KEPT, WITHOUT_ANSWERS])
        num_dropped, already_cleaned = int(batch.num_dropped[answered].sum()), self.cleaning.answers_removed
        for record in batch.cleaned:
            self.cleaning.add(record.events, record.location)
        num_cleaned = self.cleaning.answers_removed - already_cleaned
        self.answers_dropped += num_dropped
        self.answers_in += num_dropped + num_cleaned + _count_answers(batch.table)

    def add_kept(self, split: str, table: pa.Table) -> None:
        """Count the records of `table` as written to `split`."""
        self.records_out[split] += len(table)
        self.answers_out += _count_answers(table)

    def skip_exact_duplicates(self, table: pa.Table) -> None:
        """Count the records of `table` as exact duplicates that are left out."""
        self.skipped["exact_duplicate"] += len(table)
        self.answers_of_duplicates += _count_answers(table)

    def drop_near_duplicates(self, table: pa.Table) -> None:
        """Count the records of `table` as near duplicates that are removed from train."""
        self.skipped["near_duplicate"] += len(table)
        self.records_out["train"] -= len(table)
        num_answers = _count_answers(table)
        self.answers_of_duplicates += num_answers
        self.answers_out -= num_answers

    def add_split_keys(self, split_hashes: npt.NDArray[np.uint64]) -> None:
        """Collect distinct hashes of split keys, [num_records], uint64, up to about _FEW_KEYS of them."""
        if len(self._split_keys) < _FEW_KEYS:
            self._split_keys.update(split_hashes.tolist())

    def check_counts(self, data: SourceData) -> None:
        """Check that every split has records, and assert that no record or answer was lost.

        Raises:
            StageError: if the source or a split has no records.
        """
        assert self.records_in == self.records_out.total() + self.skipped.total()
        answers = self.answers_out + self.answers_dropped + self.answers_of_duplicates + self.cleaning.answers_removed
        assert self.answers_in == answers
        source = printable(data.hub.id if data.hub else data.path, PATH_LIMIT)
        if not self.records_in:
            raise StageError(f"{source} contains no records")
        if self.skipped["filtered"] == self.records_in:
            raise StageError(f"{source} contains no record that passes the filter (conf/data): {self.first_filtered}")
        if not self.records_out.total():
            columns = printable(", ".join(data.columns.texts))
            malformed = f"; malformed: {self.first_malformed}" if self.first_malformed else ""
            raise StageError(
                f"{source} contains no record with an answer ({self.format_summary()}): the texts that `columns` in"
                f" conf/data selects ({columns}) are missing, empty or [deleted] in every record{malformed}"
            )
        empty = [split for split in self.records_out if not self.records_out[split]]
        if empty:
            raise StageError(
                f"no record for {' and '.join(empty)} ({self.format_summary()}): {self._suggest_more_records(data)}"
            )

    def log_warnings(self, data: SourceData) -> None:
        """Warn about malformed records that were left out, and about splits that are far from their shares."""
        if self.first_malformed:
            log.warning("%d malformed records left out; the first: %s", self.skipped["malformed"], self.first_malformed)
        self._warn_about_shares(data)

    def _warn_about_shares(self, data: SourceData) -> None:
        """Warn if a split is off its share by more than a factor of two because the key has few values."""
        num_keys, num_records = len(self._split_keys), self.records_out.total()
        if data.split is None or not 0 < num_keys < _FEW_KEYS or num_keys > num_records // 2:
            return
        for split in SPLITS:
            share, achieved = getattr(data.split, split), self.records_out[split] / num_records
            if not share / 2 <= achieved <= share * 2:
                log.warning(
                    "%s has %.1f %% of the records where %.1f %% were asked for: %s",
                    split,
                    100 * achieved,
                    100 * share,
                    self._explain_few_keys(data),
                )

    def _suggest_more_records(self, data: SourceData) -> str:
        """Return a remedy for an empty split, for an error message."""
        num_keys, num_records = len(self._split_keys), self.records_out.total()
        if 0 < num_keys < _FEW_KEYS and num_keys <= num_records // 2:  # new records with the same keys would not help
            return self._explain_few_keys(data)
        remedy = "add records, or raise its share in conf/data (split)"
        if data.text_record == "file" and self.records_in < 30 and get_format(data.path) in ("text", None):
            remedy += "; for one long text set text_record: paragraph there"
        return remedy

    def _explain_few_keys(self, data: SourceData) -> str:
        """Say that the split key has few values, and how to choose another."""
        num_keys = len(self._split_keys)
        values = "1 value" if num_keys == 1 else f"{num_keys} values"
        few = (
            f"decides the split and has only {values} in {self.records_out.total():,} records (case and punctuation"
            " aside)"
        )
        columns = [data.columns.title if name == TITLE else name for name in list_key_names(data.split)]
        named = ", ".join(printable(repr(name)) for name in columns if name is not None)
        if not named:
            return f"the text {few}: add records with other texts"
        return (
            f"column {named} {few}: set split.key in conf/data to another, or to null: the text then decides the split"
        )

    def format_summary(self) -> str:
        parts = [f"{name} {count}" for name, count in self.records_out.items()]
        parts += [f"skipped {name} {count}" for name, count in self.skipped.items() if count]
        return ", ".join(parts)

    def as_json(self, data: SourceData, commit: str | None) -> dict[str, Any]:
        return {
            "source": {"hub": data.hub.id, "revision": data.hub.revision, "commit": commit}
            if data.hub
            else {"sources": data.sources}
            if data.sources
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
            **({"clean": self.cleaning.as_json()} if data.clean else {}),
            "versions": get_versions("pyarrow", "rensa", *list_cleaning_libraries(data.clean)),
        }


def _count_answers(table: pa.Table) -> int:
    """Return the total number of answers in a table of records."""
    return sum(len(pc.struct_field(chunk, "text").flatten()) for chunk in table.column("answers").chunks)
