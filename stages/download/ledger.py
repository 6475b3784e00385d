"""The ledger of download: what went in, came out and was left out."""

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stages.core.artifacts import SPLITS, versions
from stages.core.errors import StageError, printable
from stages.download.batches import Batch
from stages.download.cleaning import CleaningLedger, libraries_of
from stages.download.cleaning_schema import Step
from stages.download.files import PATH_LIMIT, format_of
from stages.download.records import FILTERED, KEPT, MALFORMED, TITLE, WITHOUT_ANSWERS, key_names
from stages.download.schema import SourceData

log = logging.getLogger(__name__)

# Distinct keys, with fewer of which a split may be off its share for want of them: a share of 0.1 of 100 keys is off by
# a factor of two in one of 30 draws.
_FEW = 100


class Ledger:
    """What went in, came out and was left out."""

    def __init__(self, splits: Sequence[str], steps: Sequence[Step] = ()) -> None:
        """
        Args:
            steps: of cleaning.
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
        """Records that passed the filter."""
        return self.records_in - self.skipped["filtered"]

    def add(self, batch: Batch) -> None:
        """Enter the records of `batch`, those that are kept as well as the others."""
        for verdict, name in ((MALFORMED, "malformed"), (FILTERED, "filtered"), (WITHOUT_ANSWERS, "without_answers")):
            self.skipped[name] += int((batch.verdicts == verdict).sum())
        self.first_malformed = self.first_malformed or batch.first.get(MALFORMED, "")
        self.first_filtered = self.first_filtered or batch.first.get(FILTERED, "")
        self.records_in += len(batch.verdicts)
        answered = np.isin(batch.verdicts, [KEPT, WITHOUT_ANSWERS])
        num_dropped, already_cleaned = int(batch.num_dropped[answered].sum()), self.cleaning.answers_removed
        for record in batch.cleaned:
            self.cleaning.add(record.events, record.where)
        num_cleaned = self.cleaning.answers_removed - already_cleaned
        self.answers_dropped += num_dropped
        self.answers_in += num_dropped + num_cleaned + _count_answers(batch.table)

    def add_kept(self, split: str, table: pa.Table) -> None:
        """Enter the records of `table` as written to `split`."""
        self.records_out[split] += len(table)
        self.answers_out += _count_answers(table)

    def skip_exact_duplicates(self, table: pa.Table) -> None:
        """Enter the records of `table` as left out."""
        self.skipped["exact_duplicate"] += len(table)
        self.answers_of_duplicates += _count_answers(table)

    def drop_near_duplicates(self, table: pa.Table) -> None:
        """Enter the records of `table` as taken out of train again."""
        self.skipped["near_duplicate"] += len(table)
        self.records_out["train"] -= len(table)
        num_answers = _count_answers(table)
        self.answers_of_duplicates += num_answers
        self.answers_out -= num_answers

    def add_split_keys(self, points: npt.NDArray[np.uint64]) -> None:
        """Note what decides the split of records, while there are few of these."""
        if len(self._split_keys) < _FEW:
            self._split_keys.update(points.tolist())

    def check(self, data: SourceData) -> None:
        """Raise StageError unless every split has records; assert that none was lost on the way."""
        assert self.records_in == self.records_out.total() + self.skipped.total()
        answers = self.answers_out + self.answers_dropped + self.answers_of_duplicates + self.cleaning.answers_removed
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
        empty = [split for split in self.records_out if not self.records_out[split]]
        if empty:
            raise StageError(f"no record for {' and '.join(empty)} ({self.summary()}): {self._more_records(data)}")

    def warn(self, data: SourceData) -> None:
        """Log what was left out as malformed, and shares that the split key does not allow for."""
        if self.first_malformed:
            log.warning("%d malformed records left out; the first: %s", self.skipped["malformed"], self.first_malformed)
        self._warn_of_shares(data)

    def _warn_of_shares(self, data: SourceData) -> None:
        """Warn where the key has so few values that a split is off its share by more than a factor of two."""
        num_keys, num_records = len(self._split_keys), self.records_out.total()
        if data.split is None or not 0 < num_keys < _FEW or num_keys > num_records // 2:
            return
        for split in SPLITS:
            asked, achieved = getattr(data.split, split), self.records_out[split] / num_records
            if not asked / 2 <= achieved <= asked * 2:
                log.warning(
                    "%s has %.1f %% of the records where %.1f %% were asked for: %s",
                    split,
                    100 * achieved,
                    100 * asked,
                    self._few_keys(data),
                )

    def _more_records(self, data: SourceData) -> str:
        """What fills an empty split."""
        num_keys, num_records = len(self._split_keys), self.records_out.total()
        if 0 < num_keys < _FEW and num_keys <= num_records // 2:  # more of the same would go where these went
            return self._few_keys(data)
        remedy = "give more records, or raise its share in conf/data (split)"
        if data.text_record == "file" and self.records_in < 30 and format_of(data.path) in ("text", None):
            remedy += "; for one long text set text_record: paragraph there"
        return remedy

    def _few_keys(self, data: SourceData) -> str:
        """That the key has few values, and what to do about it."""
        num_keys = len(self._split_keys)
        values = "1 value" if num_keys == 1 else f"{num_keys} values"
        few = (
            f"decides the split and has only {values} in {self.records_out.total():,} records (case and punctuation"
            " aside)"
        )
        columns = [data.columns.title if name == TITLE else name for name in key_names(data.split)]
        named = ", ".join(printable(repr(name)) for name in columns if name is not None)
        if not named:
            return f"the text {few}: give records with other texts"
        return f"column {named} {few}: set split.key in conf/data to another, or to null: the text then decides"

    def summary(self) -> str:
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
            "versions": versions("pyarrow", "rensa", *libraries_of(data.clean)),
        }


def _count_answers(table: pa.Table) -> int:
    """Number of the answers of records."""
    return sum(len(pc.struct_field(chunk, "text").flatten()) for chunk in table.column("answers").chunks)
