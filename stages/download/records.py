"""Records in ELI5's schema: found in a source's own columns, cleaned, and given to a split."""

import hashlib
import itertools
import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from stages.core.errors import printable
from stages.download.schema import Columns, Split

TEXTS = pa.list_(pa.string())

# The schema of the guide's data set, nested as it is there.
ELI5 = pa.schema(
    [
        ("q_id", pa.string()),
        ("title", pa.string()),
        ("selftext", pa.string()),
        ("document", pa.string()),
        ("subreddit", pa.string()),
        ("answers", pa.struct([("a_id", TEXTS), ("text", TEXTS), ("score", pa.list_(pa.int64()))])),
        ("title_urls", pa.struct([("url", TEXTS)])),
        ("selftext_urls", pa.struct([("url", TEXTS)])),
        ("answers_urls", pa.struct([("url", TEXTS)])),
    ]
)

# What Reddit leaves of an answer that its author or a moderator took away.
_REMOVED = {"", "[deleted]", "[removed]"}

_URL_FIELDS = ("title_urls", "selftext_urls", "answers_urls")
_OPTIONAL = ("q_id", "selftext", "document", "subreddit", "answers.a_id", "answers.score")

_NAMES = 20  # columns that a message lists

Record = dict[str, Any]


class BadRecordError(ValueError):
    """A record that is not what the config says; the message says how it differs."""


class MissingColumnError(BadRecordError):
    """A record without a column that the config names."""


def lookup(row: Mapping[str, Any], name: str) -> Any:
    """The value of column `name`: the key itself (a flattened record) or a path into nested fields.

    Raises:
        MissingColumnError: if there is no such column.
    """
    if name in row:
        return row[name]
    value: Any = row
    for step in name.split("."):
        if value is None:  # a nested field without a value
            return None
        if isinstance(value, list) and all(isinstance(item, Mapping) and step in item for item in value):
            value = [
                item[step] for item in value
            ]  # a list of structs, which other tools write for ELI5's struct of lists
            continue
        if not isinstance(value, Mapping) or step not in value:
            raise MissingColumnError(f"no column {_quoted(name)}; there are: {_listed(row)}")
        value = value[step]
    return value


def _quoted(name: str) -> str:
    return printable(repr(name))


def _listed(names: Collection[Any]) -> str:
    """The first of `names`, of which there may be a million."""
    shown = ", ".join(printable(name, 60) for name in itertools.islice(names, _NAMES))
    return f"{shown} and {len(names) - _NAMES:,} more" if len(names) > _NAMES else shown or "none"


def mismatch(row: Any, allowed: Mapping[str, Sequence[Any]]) -> str | None:
    """The first column of `row`, with its value, that holds none of those `allowed` there; None where all do.

    Raises:
        BadRecordError: if there is no such column.
    """
    if not isinstance(row, Mapping):
        return None  # to_record says what it is
    for name, values in allowed.items():
        value = lookup(row, name)
        if value not in values:
            return f"{printable(name)} is {printable(repr(value))}, none of {_listed(values)}"
    return None


def columns_read(columns: Columns, filtered: Iterable[str]) -> list[str]:
    """The names that `mismatch` and `to_record` look up in a row, those that it need not have included."""
    title = [] if columns.title is None else [columns.title]
    return [*filtered, *title, *columns.texts, *_OPTIONAL, *(f"{name}.url" for name in _URL_FIELDS)]


def to_record(row: Any, columns: Columns) -> tuple[Record, int]:
    """The record of ELI5's schema that `row` holds, and how many empty or removed answers were left out of it.

    Raises:
        BadRecordError: if a column is missing or of a wrong type.
    """
    if not isinstance(row, Mapping):
        raise BadRecordError(f"not an object with columns but {type(row).__name__}")
    title = "" if columns.title is None else _text(lookup(row, columns.title), columns.title)
    texts = [text for name in columns.texts for text in _texts(lookup(row, name), name)]
    kept = [index for index, text in enumerate(texts) if text.strip() not in _REMOVED]
    record = {
        "q_id": _optional(row, "q_id"),
        "title": title,
        "selftext": _optional(row, "selftext"),
        "document": _optional(row, "document"),
        "subreddit": _optional(row, "subreddit"),
        "answers": {
            "a_id": _parallel(row, "answers.a_id", kept, len(texts), ""),
            "text": [texts[index] for index in kept],
            "score": _parallel(row, "answers.score", kept, len(texts), 0),
        },
        **{name: {"url": _urls(row, f"{name}.url")} for name in _URL_FIELDS},
    }
    return record, len(texts) - len(kept)


def _text(value: Any, name: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRecordError(f"column {_quoted(name)} holds {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRecordError(
            f"column {_quoted(name)} holds half of a surrogate pair, which is not Unicode text"
        ) from None
    return value


def _texts(value: Any, name: str) -> list[str]:
    if value is None:
        return []
    return [_text(item, name) for item in value] if isinstance(value, list | tuple) else [_text(value, name)]


def _optional(row: Mapping[str, Any], name: str) -> str:
    return _text(row.get(name), name)


def _parallel(row: Mapping[str, Any], name: str, kept: list[int], length: int, filler: Any) -> list[Any]:
    """The values of a list beside the texts, of those kept; fillers where it is absent or does not match them.

    Nothing is computed from these: whole numbers written as floats and gaps, as data frames leave them, are no error.
    """
    try:
        values = lookup(row, name)
    except BadRecordError:
        values = None
    if not isinstance(values, list | tuple) or len(values) != length:
        return [filler] * len(kept)
    values = [filler if value is None else value for value in values]
    if isinstance(filler, int):
        values = [int(value) if isinstance(value, float) and value.is_integer() else value for value in values]
    if not all(type(value) is type(filler) for value in values):
        raise BadRecordError(f"column {_quoted(name)} holds something other than {type(filler).__name__}")
    if isinstance(filler, int) and not all(-(2**63) <= value < 2**63 for value in values):
        raise BadRecordError(f"column {_quoted(name)} holds a number of more than 64 bits")
    if isinstance(filler, str):
        _texts(values, name)
    return [values[index] for index in kept]


def _urls(row: Mapping[str, Any], name: str) -> list[str]:
    try:
        return _texts(lookup(row, name), name)
    except BadRecordError:
        return []


def split_key(record: Record) -> str:
    """What decides a record's split: its normalised title, or its normalised text where it has none.

    Normalised: compatibility forms folded (NFKC), case folded, punctuation and white space reduced to single spaces,
    so that trivially different copies of a question stay on one side.
    """
    return normalise(record["title"]) or normalise(" ".join(record["answers"]["text"]))


def normalise(text: str) -> str:
    """`text` without differences of case, punctuation, spacing and compatibility characters."""
    words = re.sub(r"[\W_]+", " ", _compatible(text).casefold()).strip()
    return words or " ".join(text.split())  # a text of symbols alone is itself


# Longer than any run of combining marks in ordinary text; the two of half width combine once they are normalised.
_MANY_MARKS = re.compile(r"(?:[^\w\s\x00-\x7f]|[\uff9e\uff9f]){100,}")


def _compatible(text: str) -> str:
    """The NFKC form of `text`, in a time that grows linearly.

    `unicodedata` orders the combining marks after a letter by insertion, so that a million take an hour. In runs of
    many they are put in that order first.
    """
    return unicodedata.normalize("NFKC", _MANY_MARKS.sub(_ordered_marks, text))


def _ordered_marks(run: re.Match[str]) -> str:
    characters = (part for character in run[0] for part in unicodedata.normalize("NFKD", character))
    groups = itertools.groupby(characters, key=lambda character: unicodedata.combining(character) > 0)
    return "".join(character for _, group in groups for character in sorted(group, key=unicodedata.combining))


def split_of(key: str, split: Split) -> str:
    """The split of a record with `key`: a function of the key and the seed, so that adding records moves none."""
    digest = hashlib.blake2b(key.encode(), digest_size=8, key=str(split.seed).encode()).digest()
    point = int.from_bytes(digest, "big") / 2**64
    if point < split.train:
        return "train"
    return "validation" if point < split.train + split.validation else "test"
