"""Reading of the parts of a source to batches of judged records, in the main process or a worker."""

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stages.core.artifacts import SPLITS
from stages.core.errors import StageError, printable
from stages.download.batches import Batch, Rules, judge_records
from stages.download.columns import IrregularError, SourceColumns
from stages.download.files import PATH_LIMIT
from stages.download.json_lines import parse_json_lines
from stages.download.records import Row, list_group_columns, list_required_columns, list_used_columns
from stages.download.schema import SourceData
from stages.download.sources import (
    BYTE_ORDER_MARK,
    FileRange,
    Part,
    add_unread_columns,
    convert_row,
    iterate_batches,
    parse_json_line,
)


def read_part(rules: Rules, part: Part) -> Batch:
    """Read the records of `part` and judge them."""
    if isinstance(part.content, FileRange):
        return judge_records(rules, _Lines(rules.data, part, part.content.read()))
    if isinstance(part.content, bytes):
        return judge_records(rules, _Lines(rules.data, part, part.content))
    if isinstance(part.content, pa.RecordBatch):
        return judge_records(rules, _TableRows(part, part.content))
    return judge_records(rules, _Rows(part.split, part.content))


class _Lines:
    """Records of a part with JSON Lines."""

    def __init__(self, data: SourceData, part: Part, content: bytes) -> None:
        self.split, self._data, self._part = part.split, data, part
        self._content = content.removeprefix(BYTE_ORDER_MARK) if part.first_number == 1 else content

    @functools.cached_property
    def _lines(self) -> list[tuple[int, bytes]]:
        """Line number and content of all lines that are not blank."""
        lines = enumerate(self._content.split(b"\n"), self._part.first_number)
        return [(number, line) for number, line in lines if line.strip()]

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, number: int) -> Row:
        line_number, line = self._lines[number]
        return Row(f"{self._part.location}:{line_number}", self.split, parse_json_line(line))

    def read_columns(self) -> SourceColumns:
        return parse_json_lines(self._content, list_used_columns(self._data), list_required_columns(self._data))


class _TableRows:
    """Records of a part with an Arrow batch."""

    def __init__(self, part: Part, batch: pa.RecordBatch) -> None:
        self.split, self._part, self._batch = part.split, part, batch

    def __len__(self) -> int:
        return int(self._batch.num_rows)

    def __getitem__(self, number: int) -> Row:
        value = add_unread_columns(convert_row(self._batch, number), self._part.names)
        return Row(f"{self._part.location}:{self._part.first_number + number}", self.split, value)

    def read_columns(self) -> SourceColumns:
        try:
            self._batch.validate(full=True)
        except pa.ArrowInvalid:
            raise IrregularError("not UTF-8") from None
        return SourceColumns(self._batch, np.ones(len(self), np.bool_), null_may_be_absent=False)


class _Rows:
    """Records of a part with individual rows, which cannot be read as columns."""

    def __init__(self, split: str | None, rows: Sequence[Row]) -> None:
        self.split, self._rows = split, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> Row:
        return self._rows[number]

    def read_columns(self) -> SourceColumns:
        raise IrregularError("rows")


def read_mixed_parts(data: SourceData) -> Iterator[Part]:
    """Yield the records of several sources in parts, source by source, from the files of the stages source@NAME.

    Raises:
        StageError: if a source is missing or has no splits, or if no source has a column of `groups`.
    """
    files = {name: _find_split_files(data, name) for name in data.sources or []}
    found = [_read_group_names(file) for splits in files.values() for file in splits]
    if unknown := [name for name in list_group_columns(data.groups) if not any(name in groups for groups in found)]:
        existing = ", ".join(sorted({printable(name, 60) for groups in found for name in groups})) or "none"
        raise StageError(
            f"groups (conf/data): no source has the group {printable(repr(unknown[0]))}; there are: {existing} (set"
            " groups in the configuration of a source to keep its columns)"
        )
    for splits in files.values():
        for split, file in zip(SPLITS, splits, strict=True):
            first = 1
            for batch in iterate_batches(pq.ParquetFile(file)):
                yield Part(printable(file, PATH_LIMIT), split, first, batch, batch.schema.names)
                first += batch.num_rows


def _find_split_files(data: SourceData, name: str) -> list[Path]:
    """Return the files of the splits of the source `name`, in the order of SPLITS."""
    directory = Path(data.path) / name
    files = [directory / f"{split}.parquet" for split in SPLITS]
    if (directory / "all.parquet").exists():
        raise StageError(
            f"the source {name} is only evaluated, since the split in its configuration is null: remove it from sources"
            " (conf/data), or set its split"
        )
    if not all(file.exists() for file in files):
        raise StageError(
            f"there is no source {name} in {printable(data.path, PATH_LIMIT)}: add it to sources in params.yaml"
            f" ({name}: {{name: CONFIGURATION, path: PATH}}), and run `dvc repro`, which reads it; or remove it from"
            " sources (conf/data)"
        )
    return files


def _read_group_names(file: Path) -> list[str]:
    """Return the names of the groups in a file of records."""
    schema = pq.read_schema(file)
    return [field.name for field in schema.field("groups").type] if "groups" in schema.names else []
