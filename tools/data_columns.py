"""Find the columns of a data source by reading its first records."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

from stages.core.errors import StageError, printable
from stages.download.files import PATH_LIMIT, find_files, get_format
from stages.download.records import BadRecordError, Row, find_column_value, normalize_text
from stages.download.sources import read_file_rows

MAX_CHARACTERS = 50_000_000  # of text, after which a preview reads no more records
MAX_COLUMNS = 1000
_MAX_DEPTH = 8  # levels of nested fields; deeper values are not split into columns
_TEXT_KINDS = ("text", "list of texts")
_SCALAR_KINDS = ("text", "number as text", "whole number", "number", "boolean", "date")
_NUMBER = re.compile(r"[+-]?(\d+([.,]\d+)*|\.\d+)([eE][+-]?\d+)?%?")


@dataclass
class Column:
    """Statistics of one column over the records of a preview."""

    name: str
    """Name of the column as conf/data expects it; dotted if it is nested."""
    kinds: Counter[str] = field(default_factory=Counter)
    """Kind of value to the number of records. Records in which the column is empty are not counted."""
    num_characters: int = 0
    """Total number of characters of the column's texts."""
    values: set[int] = field(default_factory=set)
    """Hashes of the distinct values."""
    example: str = ""
    """Excerpt of the first value that is not empty."""

    @property
    def num_filled(self) -> int:
        """Number of records in which the column is not empty."""
        return self.kinds.total()

    @property
    def mean_characters(self) -> float:
        """Mean number of characters of text per record in which the column is not empty."""
        return self.num_characters / max(1, self.num_filled)

    @property
    def distinct_share(self) -> float:
        """Number of distinct values as a share of the values that are not empty."""
        return len(self.values) / max(1, self.num_filled)

    def has_only_kinds(self, *kinds: str) -> bool:
        """Return True if every value is of one of `kinds`."""
        return self.kinds.keys() <= set(kinds)

    @property
    def is_text(self) -> bool:
        """True if the column can be the text of records; texts of only digits count too."""
        return self.has_only_kinds(*_TEXT_KINDS, "number as text")

    @property
    def is_prose(self) -> bool:
        """True if the column can be the text of records and not all of its values are numbers."""
        return self.is_text and any(self.kinds[kind] for kind in _TEXT_KINDS)

    @property
    def is_scalar(self) -> bool:
        """True if the column has a single value per record, as a key, a group or a title needs."""
        return self.has_only_kinds(*_SCALAR_KINDS)

    def add_value(self, value: Any) -> None:
        """Add the value of one more record to the statistics."""
        kind = classify_value(value)
        if kind == "empty":
            return
        self.kinds[kind] += 1
        texts = [item for item in (value if isinstance(value, list | tuple) else [value]) if isinstance(item, str)]
        self.num_characters += sum(map(len, texts))
        self.values.add(hash(repr(value)))
        if not self.example:
            self.example = make_excerpt(_drop_empty(texts)[0].strip() if kind in _TEXT_KINDS else value, 40)


def make_excerpt(value: object, length: int) -> str:
    """Return the first `length` characters of `value` as one printable line."""
    text = str(value)
    return printable(text if len(text) <= length else f"{text[:length]}...")


def classify_value(value: Any) -> str:
    """Return the kind of a value in words; `empty` for null, white space and lists of only these."""
    if value is None or (isinstance(value, str | list | tuple) and not _drop_empty(value)):
        return "empty"
    if isinstance(value, str):
        return "number as text" if _NUMBER.fullmatch(value.strip()) else "text"
    if isinstance(value, list | tuple):
        return "list of texts" if all(isinstance(item, str) for item in _drop_empty(value)) else "list"
    kinds = {"bool": "boolean", "int": "whole number", "float": "number", "Decimal": "number", "bytes": "bytes"}
    kinds |= {"date": "date", "datetime": "date", "Timestamp": "date", "time": "date"}
    return kinds.get(type(value).__name__, "mapping" if isinstance(value, Mapping) else type(value).__name__)


def _drop_empty(value: Any) -> Any:
    if isinstance(value, str):
        return value.strip()
    return [item for item in value if item is not None and not (isinstance(item, str) and not item.strip())]


class DataPreview(NamedTuple):
    """First records of a data source."""

    formats: Counter[str]
    """Format to the number of files."""
    rows: list[Row]
    """Records that could be read; for plain text, its lines."""
    first_bad_record: str
    """Location of the first record that could not be read, and the reason; the empty string if there is none."""
    num_bad_records: int

    @property
    def is_plain_text(self) -> bool:
        """True if all files are plain text, which has no columns."""
        return set(self.formats) == {"text"}

    @property
    def num_files(self) -> int:
        """Number of files of the source, including those that the preview does not read."""
        return self.formats.total()


def preview_data(path: str, num_records: int) -> DataPreview:
    """Read the first records of a file, a directory or a URL. Of a directory, read some records of each file.

    Raises:
        StageError: if there are no records, or none that can be read.
    """
    files = find_files(path)
    per_file = max(1, -(-num_records // len(files)))
    rows: list[Row] = []
    bad: list[str] = []
    num_characters = 0
    for file_system, file in files[:num_records]:
        for row in islice(read_file_rows(file_system, file, "line"), per_file):
            if isinstance(row.value, Mapping):
                rows.append(row)
                num_characters += _count_characters(row.value)
            else:
                reason = row.value if isinstance(row.value, BadRecordError) else "not an object with columns"
                bad.append(f"{row.location}: {reason}")
            if num_characters > MAX_CHARACTERS:
                break
        if num_characters > MAX_CHARACTERS or len(rows) + len(bad) >= num_records:
            break
    shown = printable(path, PATH_LIMIT)
    if not rows and bad:
        raise StageError(f"{shown} has no readable records; the first problem: {bad[0]}")
    if not rows:
        raise StageError(f"{shown} has no records")
    formats = Counter(str(get_format(file)) for _, file in files)
    return DataPreview(formats, rows, bad[0] if bad else "", len(bad))


def _count_characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return sum(map(_count_characters, items))


def collect_columns(rows: Sequence[Row]) -> dict[str, Column]:
    """Return the columns of `rows` by (dotted) name, in order of first appearance; at most MAX_COLUMNS."""
    columns: dict[str, Column] = {}
    for row in rows:
        for name in dict.fromkeys(_list_leaf_names(row.value)):
            if name not in columns and len(columns) == MAX_COLUMNS:
                continue
            try:
                value = find_column_value(row.value, name)
            except BadRecordError:  # the name of a nested field contains a dot, so no dotted name can refer to it
                continue
            columns.setdefault(name, Column(name)).add_value(value)
    return columns


def _list_leaf_names(row: Mapping[str, Any], prefix: str = "", depth: int = 1) -> Iterator[str]:
    """Yield the dotted names of the values in `row`. Fields of structs in a list count as fields of the list."""
    for key, value in row.items():
        name = f"{prefix}{key}"
        structs = value if isinstance(value, list) else [value]
        if structs and depth < _MAX_DEPTH and all(isinstance(item, Mapping) and item for item in structs):
            yield from _list_leaf_names(structs[0], f"{name}.", depth + 1)
        else:
            yield name


def count_keys(rows: Sequence[Row], names: Sequence[str]) -> int:
    """Count the distinct combinations of values of the columns `names`, normalized as for the split."""
    keys = set()
    for row in rows:
        try:
            keys.add(tuple(normalize_text(str(find_column_value(row.value, name))) for name in names))
        except BadRecordError:
            continue
    return len(keys)


# -- plain text --------------------------------------------------------------------------------------------------------

_MIN_FILES_TO_SPLIT = 30  # enough records that splitting by hash leaves no split empty
_MAX_PARAGRAPH_LINES = 50


def group_paragraphs(rows: Sequence[Row]) -> list[list[str]]:
    """Group the lines of plain text into paragraphs, which end at an empty line or at the end of a file."""
    paragraphs: list[list[str]] = []
    last = ("", -1)
    for row in rows:
        file, _, number = row.location.rpartition(":")
        if last != (file, int(number) - 1):
            paragraphs.append([])
        paragraphs[-1].append(row.value["answers.text"])
        last = (file, int(number))
    return paragraphs


def propose_text_record(preview: DataPreview) -> tuple[str, str]:
    """Propose a value of `text_record` for plain text, and return it with the reason."""
    paragraphs = group_paragraphs(preview.rows)
    per_paragraph = len(preview.rows) / len(paragraphs)
    files = "there is 1 file" if preview.num_files == 1 else f"there are {preview.num_files:,} files"
    if preview.num_files >= _MIN_FILES_TO_SPLIT:
        return "file", files
    if len(paragraphs) > preview.num_files and per_paragraph <= _MAX_PARAGRAPH_LINES:
        return "paragraph", f"{files} with paragraphs of {per_paragraph:.1f} lines, separated by empty lines"
    return "line", f"{files}, too few for three splits, and no paragraphs separated by empty lines"


def get_first_text_record(preview: DataPreview, text_record: str) -> str:
    """Return the first record of plain text, or the part of it that the preview contains."""
    file = preview.rows[0].location.rpartition(":")[0]
    lines = [row.value["answers.text"] for row in preview.rows if row.location.rpartition(":")[0] == file]
    return "\n".join({"line": lines[:1], "paragraph": group_paragraphs(preview.rows)[0], "file": lines}[text_record])
