"""Parts of a source, each read to a batch of judged records: by this process or by another."""

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stages.core.artifacts import SPLITS
from stages.core.errors import StageError, printable
from stages.download.batches import Batch, Rules, judge
from stages.download.columns import IrregularError, SourceColumns
from stages.download.files import PATH_LIMIT
from stages.download.json_lines import parse_lines
from stages.download.records import Row, columns_read, kept_groups, required_columns
from stages.download.schema import SourceData
from stages.download.sources import BYTE_ORDER_MARK, FileRange, Part, iterate_batches, parse_line, read_row, with_unread


def read_part(rules: Rules, part: Part) -> Batch:
    """The records of `part`, judged."""
    if isinstance(part.content, FileRange):
        return judge(rules, _Lines(rules.data, part, part.content.read()))
    if isinstance(part.content, bytes):
        return judge(rules, _Lines(rules.data, part, part.content))
    if isinstance(part.content, pa.RecordBatch):
        return judge(rules, _TableRows(part, part.content))
    return judge(rules, _Rows(part.split, part.content))


class _Lines:
    """The records of JSON Lines."""

    def __init__(self, data: SourceData, part: Part, content: bytes) -> None:
        self.split, self._data, self._part = part.split, data, part
        self._content = content.removeprefix(BYTE_ORDER_MARK) if part.first == 1 else content

    @functools.cached_property
    def _lines(self) -> list[tuple[int, bytes]]:
        """Number and content of the lines that are not blank."""
        lines = enumerate(self._content.split(b"\n"), self._part.first)
        return [(number, line) for number, line in lines if line.strip()]

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, number: int) -> Row:
        line_number, line = self._lines[number]
        return Row(f"{self._part.where}:{line_number}", self.split, parse_line(line))

    def columns(self) -> SourceColumns:
        return parse_lines(self._content, columns_read(self._data), required_columns(self._data))


class _TableRows:
    """The records of a batch of columns."""

    def __init__(self, part: Part, batch: pa.RecordBatch) -> None:
        self.split, self._part, self._batch = part.split, part, batch

    def __len__(self) -> int:
        return int(self._batch.num_rows)

    def __getitem__(self, number: int) -> Row:
        value = with_unread(read_row(self._batch, number), self._part.names)
        return Row(f"{self._part.where}:{self._part.first + number}", self.split, value)

    def columns(self) -> SourceColumns:
        try:
            self._batch.validate(full=True)
        except pa.ArrowInvalid:
            raise IrregularError("not UTF-8") from None
        return SourceColumns(self._batch, np.ones(len(self), np.bool_), null_may_be_absent=False)


class _Rows:
    """Records that have no form but their own."""

    def __init__(self, split: str | None, rows: Sequence[Row]) -> None:
        self.split, self._rows = split, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> Row:
        return self._rows[number]

    def columns(self) -> SourceColumns:
        raise IrregularError("rows")


def source_parts(data: SourceData) -> Iterator[Part]:
    """The records of several sources, which the stages source@NAME have read, in parts: source by source.

    Raises:
        StageError: if a source is not there or has no splits, or if no source has kept a column of `groups`.
    """
    files = {name: _split_files(data, name) for name in data.sources or []}
    found = [_groups_of(file) for splits in files.values() for file in splits]
    if unknown := [name for name in kept_groups(data.groups) if not any(name in groups for groups in found)]:
        there_are = ", ".join(sorted({printable(name, 60) for groups in found for name in groups})) or "none"
        raise StageError(
            f"groups (conf/data): no source has kept {printable(repr(unknown[0]))}; there are: {there_are} (the"
            " configuration of a source keeps columns by its own groups)"
        )
    for splits in files.values():
        for split, file in zip(SPLITS, splits, strict=True):
            first = 1
            for batch in iterate_batches(pq.ParquetFile(file)):
                yield Part(printable(file, PATH_LIMIT), split, first, batch, batch.schema.names)
                first += batch.num_rows


def _split_files(data: SourceData, name: str) -> list[Path]:
    directory = Path(data.path) / name
    files = [directory / f"{split}.parquet" for split in SPLITS]
    if (directory / "all.parquet").exists():
        raise StageError(
            f"the source {name} is only evaluated, since the split of its configuration is null: take it out of sources"
            " (conf/data), or give it a split"
        )
    if not all(file.exists() for file in files):
        raise StageError(
            f"there is no source {name} in {printable(data.path, PATH_LIMIT)}: name it under sources in params.yaml"
            f" ({name}: {{name: CONFIGURATION, path: PATH}}), and run `dvc repro`, which reads it; or take it out of"
            " sources (conf/data)"
        )
    return files


def _groups_of(file: Path) -> list[str]:
    """The columns that a file of records keeps as groups."""
    schema = pq.read_schema(file)
    return [field.name for field in schema.field("groups").type] if "groups" in schema.names else []
