"""Records in ELI5's schema: found in a source's own columns, cleaned, and given to a split."""

import datetime
import hashlib
import itertools
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stages.core.errors import printable
from stages.download.schema import Columns, SourceData, Split

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


def record_schema(groups: Sequence[str], has_roles: bool = False) -> pa.Schema:
    """ELI5's schema with the name of each record's source and, where columns are kept as `groups`, their values.

    Args:
        has_roles: records are conversations, with the role of each text in `answers.role`.
    """
    schema = ELI5
    if has_roles:
        index = schema.get_field_index("answers")
        answers = schema.field(index).type
        schema = schema.set(index, pa.field("answers", pa.struct([*answers, pa.field("role", TEXTS)])))
    schema = schema.append(pa.field("source", pa.string()))
    names = kept_groups(groups)
    return schema.append(pa.field("groups", pa.struct([(name, pa.string()) for name in names]))) if names else schema


def kept_groups(groups: Sequence[str]) -> list[str]:
    """The columns that `groups` keeps; the source is kept anyway, in a column of its own."""
    return [name for name in dict.fromkeys(groups) if name != "source"]


# What becomes of a record.
KEPT, WITHOUT_ANSWERS, FILTERED, MALFORMED = range(4)

# What Reddit leaves of an answer that its author or a moderator took away.
REMOVED = {"", "[deleted]", "[removed]"}

URL_FIELDS = ("title_urls", "selftext_urls", "answers_urls")
OPTIONAL_TEXTS = ("q_id", "selftext", "document", "subreddit")
_OPTIONAL = (*OPTIONAL_TEXTS, "answers.a_id", "answers.score", *(f"{name}.url" for name in URL_FIELDS))

_NAMES = 20  # columns that a message lists

Record = dict[str, Any]


class Row(NamedTuple):
    """A record as its source holds it."""

    where: str
    """File and line, or data set and index, for error messages."""
    split: str | None
    """The source's own split, where it has one."""
    value: Any
    """Column to value, or a BadRecordError where nothing could be read."""


class BadRecordError(ValueError):
    """A record that is not what the config says; the message says how it differs."""


class MissingColumnError(BadRecordError):
    """A record without a column that the config names."""


class RepeatedKeyError(BadRecordError):
    """A record of which a column is there twice."""


class RepeatedKeys(dict[str, Any]):
    """An object of JSON that has some keys twice, with the last value of each."""

    def __init__(self, pairs: Sequence[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.repeated = {name for name, count in Counter(name for name, _ in pairs).items() if count > 1}


def lookup(row: Mapping[str, Any], name: str) -> Any:
    """The value of column `name`: the key itself (a flattened record) or a path into nested fields.

    Raises:
        MissingColumnError: if there is no such column.
        RepeatedKeyError: if there are two of it.
    """
    if name in row:
        return _value(row, name)
    value: Any = row
    for step in name.split("."):
        if value is None:  # a nested field without a value
            return None
        if isinstance(value, list) and all(isinstance(item, Mapping) and step in item for item in value):
            # A list of structs, which other tools write for ELI5's struct of lists.
            value = [_value(item, step) for item in value]
            continue
        if not isinstance(value, Mapping) or step not in value:
            raise MissingColumnError(f"no column {_quoted(name)}; there are: {_listed(row)}")
        value = _value(value, step)
    return value


def _value(fields: Mapping[str, Any], name: str) -> Any:
    if isinstance(fields, RepeatedKeys) and name in fields.repeated:
        raise RepeatedKeyError(f"an object has two keys {_quoted(name)}: rename or remove one")
    return fields.get(name)


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


def required_columns(data: SourceData) -> list[str]:
    """The names of the columns that every record of `data` must have."""
    title = [name for name in (data.columns.title, data.columns.roles) if name is not None]
    groups, keys = kept_groups(data.groups), [name for name in key_names(data.split) if name != TITLE]
    return list(dict.fromkeys([*(data.filter or {}), *title, *data.columns.texts, *groups, *keys]))


def columns_read(data: SourceData) -> list[str]:
    """The names of the columns that are looked up in a record of `data`, including those that it need not have."""
    return list(dict.fromkeys([*required_columns(data), *_OPTIONAL]))


def to_record(row: Any, columns: Columns) -> tuple[Record, int]:
    """The record of ELI5's schema that `row` holds, and how many empty or removed answers were left out of it.

    Raises:
        BadRecordError: if a column is missing or of a wrong type.
    """
    if not isinstance(row, Mapping):
        raise BadRecordError(f"not an object with columns but {type(row).__name__}")
    title = "" if columns.title is None else _text(lookup(row, columns.title), columns.title)
    texts = [text for name in columns.texts for text in _texts(lookup(row, name), name)]
    kept = [index for index, text in enumerate(texts) if text.strip() not in REMOVED]
    roles = None if columns.roles is None else _roles(lookup(row, columns.roles), columns.roles, len(texts))
    if roles is not None:
        kept = kept_messages(roles, kept)
    record: Record = {
        "title": title,
        **{name: _optional(row, name) for name in OPTIONAL_TEXTS},
        "answers": {
            "a_id": _parallel(row, "answers.a_id", kept, len(texts), ""),
            "text": [texts[index] for index in kept],
            "score": _parallel(row, "answers.score", kept, len(texts), 0),
        },
        **{name: {"url": _urls(row, f"{name}.url")} for name in URL_FIELDS},
    }
    if roles is not None:
        record["answers"]["role"] = [roles[index] for index in kept]
    return record, len(texts) - len(kept)


# Roles as other formats call them, to those of chat templates.
_ROLES = {
    **{name: name for name in ("system", "user", "assistant")},
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
}


def _roles(value: Any, name: str, num_texts: int) -> list[str]:
    """Who wrote each message."""
    roles = _texts(value, name)
    if len(roles) != num_texts:
        raise BadRecordError(f"column {_quoted(name)} holds {len(roles)} roles, for {num_texts} messages")
    for role in roles:
        if role not in _ROLES:
            raise BadRecordError(f"column {_quoted(name)} holds the role {_quoted(role)}, none of {_listed(_ROLES)}")
    return [_ROLES[role] for role in roles]


def kept_messages(roles: Sequence[str], kept: Sequence[int]) -> list[int]:
    """Of a conversation of which the messages `kept` are there, those up to the first that is missing.

    What follows a missing message answers nothing; a system message may be left out. Nothing is left where the
    assistant says nothing.
    """
    missing = [index for index in sorted(set(range(len(roles))) - set(kept)) if roles[index] != "system"]
    end = missing[0] if missing else len(roles)
    found = [index for index in kept if index < end]
    return found if any(roles[index] == "assistant" for index in found) else []


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
    return _text(_value(row, name), name)


def _parallel(row: Mapping[str, Any], name: str, kept: list[int], length: int, filler: Any) -> list[Any]:
    """The values of a list beside the texts, of those kept; fillers where it is absent or does not match them.

    Nothing is computed from these: whole numbers written as floats and gaps, as data frames leave them, are no error.
    """
    try:
        values = lookup(row, name)
    except RepeatedKeyError:
        raise
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
    except RepeatedKeyError:
        raise
    except BadRecordError:
        return []


def scalar_text(value: Any, name: str) -> str | None:
    """The value of a column that holds a text, a number or a date, as text: numbers as JSON writes them; None for null.

    Raises:
        BadRecordError: if it is anything else.
    """
    if value is None or isinstance(value, str):
        return None if value is None else _text(value, name)
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    if isinstance(value, datetime.date | datetime.time):  # a datetime is a date
        return value.isoformat()
    raise BadRecordError(f"column {_quoted(name)} holds {type(value).__name__}, not a text, number or date")


def group_values(row: Mapping[str, Any], groups: Sequence[str]) -> dict[str, str | None]:
    """The values of the columns that `groups` keeps, as text.

    Raises:
        BadRecordError: if a column is missing, or holds something other than a text, a number or a date.
    """
    return {name: scalar_text(lookup(row, name), name) for name in kept_groups(groups)}


TITLE = "title"  # in split.key: the record's title, whatever its column is called
_BETWEEN_KEYS = "\n"  # which no normalised text contains


def key_names(split: Split | None) -> list[str]:
    """The names in split.key; none where the text decides, or nothing does."""
    if split is None or split.by != "hash" or split.key is None:
        return []
    return [split.key] if isinstance(split.key, str) else split.key


def split_key(row: Mapping[str, Any], record: Record, names: Sequence[str]) -> str:
    """What decides a record's split: its normalised values of the columns `names`, or its text where these are empty.

    Args:
        row: the record as its source has it.
        record: the same in ELI5's schema; `title` among the names is its title.

    Raises:
        BadRecordError: if a column is missing, or holds something other than a text, a number or a date.
    """
    values = [record["title"] if name == TITLE else scalar_text(lookup(row, name), name) for name in names]
    return join_key([value or "" for value in values]) or normalise(" ".join(record["answers"]["text"]))


def join_key(values: Sequence[str]) -> str:
    """The normalised `values` in one text; the empty text where all of them are empty."""
    normalised = [normalise(value) for value in values]
    return _BETWEEN_KEYS.join(normalised) if any(normalised) else ""


def normalise(text: str) -> str:
    """`text` without differences of case, punctuation, spacing and compatibility characters.

    Compatibility forms are folded (NFKC), case is folded, punctuation and white space become single spaces, so that
    trivially different copies of a question stay on one side of the split.
    """
    if text.isascii():  # in a third of the time
        words = b" ".join(text.encode().translate(NORMALISED_ASCII).split()).decode()
    else:
        words = SYMBOLS.sub(" ", fold(text)).strip()
    return words or " ".join(text.split())  # a text of symbols alone is itself


SYMBOLS = re.compile(r"[\W_]+")
# Of each ASCII character, that of the normalised text: letters in lower case, digits, and a space for all others.
NORMALISED_ASCII = bytes(code if code >= 0x80 or chr(code).isalnum() else ord(" ") for code in range(256)).lower()


def fold(text: str) -> str:
    """`text` without differences of case and compatibility characters."""
    return _compatible(text).casefold()


# Longer than any run of combining marks in ordinary text; the two of half width combine once they are normalised.
_NUM_MARKS = 100
_MANY_MARKS = re.compile(rf"(?:[^\w\s\x00-\x7f]|[\uff9e\uff9f]){{{_NUM_MARKS},}}")


def _compatible(text: str) -> str:
    """The NFKC form of `text`, in a time that grows linearly.

    `unicodedata` orders the combining marks after a letter by insertion, so that a million take an hour. In runs of
    many they are put in that order first.
    """
    if len(text) - len(text.encode("ascii", "ignore")) >= _NUM_MARKS:  # a tenth of the time of the search below
        text = _MANY_MARKS.sub(_ordered_marks, text)
    return unicodedata.normalize("NFKC", text)


def _ordered_marks(run: re.Match[str]) -> str:
    characters = (part for character in run[0] for part in unicodedata.normalize("NFKD", character))
    groups = itertools.groupby(characters, key=lambda character: unicodedata.combining(character) > 0)
    return "".join(character for _, group in groups for character in sorted(group, key=unicodedata.combining))


Digests = npt.NDArray[np.uint64]


def digest_documents(documents: Iterable[bytes | memoryview]) -> Digests:
    """Hashes by which exact duplicates are told, [num_documents, 2]."""
    digests = [hashlib.blake2b(document, digest_size=16).digest() for document in documents]
    return np.frombuffer(b"".join(digests), np.uint64).reshape(-1, 2)


def split_points(keys: Iterable[str], seed: int) -> npt.NDArray[np.uint64]:
    """The hashes of keys that decide a split, [num_keys]: adding records moves none."""
    seeded = hashlib.blake2b(digest_size=8, key=str(seed).encode())
    digests = []
    for key in keys:
        digest = seeded.copy()
        digest.update(key.encode())
        digests.append(digest.digest())
    return np.frombuffer(b"".join(digests), ">u8").astype(np.uint64)


def assign_splits(points: npt.NDArray[np.uint64], split: Split) -> npt.NDArray[np.int64]:
    """The split of each point, as an index of SPLITS: parts of [0, 1) as large as the shares."""
    bounds = [split.train, split.train + split.validation]
    return np.searchsorted(bounds, points / 2.0**64, side="right")
