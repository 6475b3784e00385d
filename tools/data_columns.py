"""The columns of a data source, found by looking at its first records."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

from stages.core.errors import StageError, printable
from stages.download.files import PATH_LIMIT, find_files, format_of
from stages.download.records import BadRecordError, Row, lookup, normalise
from stages.download.sources import read_rows

# Looking ends at the number of records asked for, or after this many characters of text.
MAX_CHARACTERS = 50_000_000
MAX_COLUMNS = 1000
_MAX_DEPTH = 8  # nested fields below which a value counts as one
_TEXTS = ("text", "list of texts")
_SCALARS = ("text", "number as text", "whole number", "number", "boolean", "date")
_NUMBER = re.compile(r"[+-]?(\d+([.,]\d+)*|\.\d+)([eE][+-]?\d+)?%?")


@dataclass
class Column:
    """What one column holds in the records looked at."""

    name: str
    """As conf/data takes it: dotted where it is nested."""
    kinds: Counter[str] = field(default_factory=Counter)
    """Kind of value to the number of records; records where the column is empty are not counted."""
    num_characters: int = 0
    """Characters of all its texts."""
    values: set[int] = field(default_factory=set)
    """Hashes of its values."""
    example: str = ""

    @property
    def num_filled(self) -> int:
        """Records with a value that is not empty."""
        return self.kinds.total()

    @property
    def mean_characters(self) -> float:
        """Characters of text in a record that is not empty."""
        return self.num_characters / max(1, self.num_filled)

    @property
    def distinct(self) -> float:
        """Share of different values among those that are not empty."""
        return len(self.values) / max(1, self.num_filled)

    def holds(self, *kinds: str) -> bool:
        """Whether every value is of one of `kinds`."""
        return self.kinds.keys() <= set(kinds)

    @property
    def is_text(self) -> bool:
        """Whether it can be read as the text of records; text of digits alone can, too."""
        return self.holds(*_TEXTS, "number as text")

    @property
    def is_prose(self) -> bool:
        """Whether it holds text other than numbers."""
        return self.is_text and any(self.kinds[kind] for kind in _TEXTS)

    @property
    def is_scalar(self) -> bool:
        """Whether it holds one value a record: a key, a group or a title."""
        return self.holds(*_SCALARS)

    def add(self, value: Any) -> None:
        """Count the value of one more record."""
        kind = kind_of(value)
        if kind == "empty":
            return
        self.kinds[kind] += 1
        texts = [item for item in (value if isinstance(value, list | tuple) else [value]) if isinstance(item, str)]
        self.num_characters += sum(map(len, texts))
        self.values.add(hash(repr(value)))
        if not self.example:
            self.example = excerpt(_without_empty(texts)[0].strip() if kind in _TEXTS else value, 40)


def excerpt(value: object, length: int) -> str:
    """The beginning of `value` as text, in one line of about `length` characters."""
    text = str(value)
    return printable(text if len(text) <= length else f"{text[:length]}...")


def kind_of(value: Any) -> str:
    """What a value is, in words; `empty` for null, white space and lists of these."""
    if value is None or (isinstance(value, str | list | tuple) and not _without_empty(value)):
        return "empty"
    if isinstance(value, str):
        return "number as text" if _NUMBER.fullmatch(value.strip()) else "text"
    if isinstance(value, list | tuple):
        return "list of texts" if all(isinstance(item, str) for item in _without_empty(value)) else "list"
    words = {"bool": "boolean", "int": "whole number", "float": "number", "Decimal": "number", "bytes": "bytes"}
    words |= {"date": "date", "datetime": "date", "Timestamp": "date", "time": "date"}
    return words.get(type(value).__name__, "mapping" if isinstance(value, Mapping) else type(value).__name__)


def _without_empty(value: Any) -> Any:
    if isinstance(value, str):
        return value.strip()
    return [item for item in value if item is not None and not (isinstance(item, str) and not item.strip())]


class Look(NamedTuple):
    """The beginning of a data source."""

    formats: Counter[str]
    """Format to the number of files."""
    rows: list[Row]
    """Records that could be read; the lines of plain text."""
    first_bad: str
    """Where the first record is that could not be read, and why; the empty string if all could be."""
    num_bad: int

    @property
    def is_plain_text(self) -> bool:
        """Whether it consists of plain text, which has no columns."""
        return set(self.formats) == {"text"}

    @property
    def num_files(self) -> int:
        """Files of the source, those not looked at included."""
        return self.formats.total()


def look_at(path: str, num_records: int) -> Look:
    """The first records at `path`: a file, a directory (some of each file) or a URL.

    Raises:
        StageError: if there are none, or none that can be read.
    """
    files = find_files(path)
    per_file = max(1, -(-num_records // len(files)))
    rows: list[Row] = []
    bad: list[str] = []
    num_characters = 0
    for file_system, file in files[:num_records]:
        for row in islice(read_rows(file_system, file, "line"), per_file):
            if isinstance(row.value, Mapping):
                rows.append(row)
                num_characters += _num_characters(row.value)
            else:
                reason = row.value if isinstance(row.value, BadRecordError) else "not an object with columns"
                bad.append(f"{row.where}: {reason}")
            if num_characters > MAX_CHARACTERS:
                break
        if num_characters > MAX_CHARACTERS or len(rows) + len(bad) >= num_records:
            break
    shown = printable(path, PATH_LIMIT)
    if not rows and bad:
        raise StageError(f"{shown} holds no record that can be read; the first: {bad[0]}")
    if not rows:
        raise StageError(f"{shown} holds no records")
    formats = Counter(str(format_of(file)) for _, file in files)
    return Look(formats, rows, bad[0] if bad else "", len(bad))


def _num_characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return sum(map(_num_characters, items))


def columns_of(rows: Sequence[Row]) -> dict[str, Column]:
    """The columns of `rows` by name, nested ones dotted, in the order in which they first appear."""
    columns: dict[str, Column] = {}
    for row in rows:
        for name in dict.fromkeys(_leaves(row.value)):
            if name not in columns and len(columns) == MAX_COLUMNS:
                continue
            try:
                value = lookup(row.value, name)
            except BadRecordError:  # a name with a dot inside a nested field: no dotted name leads there
                continue
            columns.setdefault(name, Column(name)).add(value)
    return columns


def _leaves(row: Mapping[str, Any], prefix: str = "", depth: int = 1) -> Iterator[str]:
    """The dotted names of the values in `row`; fields of structs in a list count as fields of the list."""
    for key, value in row.items():
        name = f"{prefix}{key}"
        structs = value if isinstance(value, list) else [value]
        if structs and depth < _MAX_DEPTH and all(isinstance(item, Mapping) and item for item in structs):
            yield from _leaves(structs[0], f"{name}.", depth + 1)
        else:
            yield name


def num_keys(rows: Sequence[Row], names: Sequence[str]) -> int:
    """How many different values the columns `names`, taken together, have in `rows`, as the split sees them."""
    keys = set()
    for row in rows:
        try:
            keys.add(tuple(normalise(str(lookup(row.value, name))) for name in names))
        except BadRecordError:
            continue
    return len(keys)


# -- plain text --------------------------------------------------------------------------------------------------------

_MANY_FILES = 30  # records of which a hash leaves no split empty
_LONG_PARAGRAPH = 50  # lines


def paragraphs_of(rows: Sequence[Row]) -> list[list[str]]:
    """The lines in `rows`, grouped: an empty line or the end of a file ends a paragraph."""
    paragraphs: list[list[str]] = []
    last = ("", -1)
    for row in rows:
        file, _, number = row.where.rpartition(":")
        if last != (file, int(number) - 1):
            paragraphs.append([])
        paragraphs[-1].append(row.value["answers.text"])
        last = (file, int(number))
    return paragraphs


def propose_text_record(look: Look) -> tuple[str, str]:
    """What a record of plain text should be, and why."""
    paragraphs = paragraphs_of(look.rows)
    per_paragraph = len(look.rows) / len(paragraphs)
    files = "there is 1 file" if look.num_files == 1 else f"there are {look.num_files:,} files"
    if look.num_files >= _MANY_FILES:
        return "file", files
    if len(paragraphs) > look.num_files and per_paragraph <= _LONG_PARAGRAPH:
        return "paragraph", f"{files} with paragraphs of {per_paragraph:.1f} lines between empty ones"
    return "line", f"{files}, too few for three splits, and empty lines do not divide them into paragraphs"


def text_excerpt(look: Look, text_record: str) -> str:
    """The first record of plain text, or its beginning."""
    file = look.rows[0].where.rpartition(":")[0]
    lines = [row.value["answers.text"] for row in look.rows if row.where.rpartition(":")[0] == file]
    return "\n".join({"line": lines[:1], "paragraph": paragraphs_of(look.rows)[0], "file": lines}[text_record])
