"""Records in ELI5's schema: built from a source's columns, validated and assigned to splits."""

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

# Schema of the guide's data set, with the same nesting.
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
    """Return ELI5's schema with the name of each record's source and the values of its groups.

    Args:
        groups: names of the columns to keep as groups.
        has_roles: if True, records are conversations, with the role of each text in `answers.role`.
    """
    schema = ELI5
    if has_roles:
        index = schema.get_field_index("answers")
        answers = schema.field(index).type
        schema = schema.set(index, pa.field("answers", pa.struct([*answers, pa.field("role", TEXTS)])))
    schema = schema.append(pa.field("source", pa.string()))
    names = list_group_columns(groups)
    return schema.append(pa.field("groups", pa.struct([(name, pa.string()) for name in names]))) if names else schema


def list_group_columns(groups: Sequence[str]) -> list[str]:
    """Return the distinct columns to keep as groups, except for the source, which has a separate column."""
    return [name for name in dict.fromkeys(groups) if name != "source"]


# Verdicts on records.
KEPT, WITHOUT_ANSWERS, FILTERED, MALFORMED = range(4)

# Text that Reddit leaves in place of an answer that its author or a moderator deleted.
REMOVED_TEXTS = {"", "[deleted]", "[removed]"}

URL_FIELDS = ("title_urls", "selftext_urls", "answers_urls")
OPTIONAL_TEXTS = ("q_id", "selftext", "document", "subreddit")
_OPTIONAL = (*OPTIONAL_TEXTS, "answers.a_id", "answers.score", *(f"{name}.url" for name in URL_FIELDS))

_MAX_LISTED_NAMES = 20  # in a message

Record = dict[str, Any]


class Row(NamedTuple):
    """A record as it is in its source."""

    location: str
    """File and line, or data set and index, for error messages."""
    split: str | None
    """The source's own split, if it has one."""
    value: Any
    """Column to value, or a BadRecordError if the record could not be read."""


class BadRecordError(ValueError):
    """A record that is malformed or does not match the config; the message gives the reason."""


class MissingColumnError(BadRecordError):
    """A record that lacks a column of the config."""


class RepeatedKeyError(BadRecordError):
    """A record with a repeated column."""


class RepeatedKeys(dict[str, Any]):
    """A JSON object with repeated keys, which have the last of their values."""

    def __init__(self, pairs: Sequence[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.repeated = {name for name, count in Counter(name for name, _ in pairs).items() if count > 1}


def find_column_value(row: Mapping[str, Any], name: str) -> Any:
    """Find the value of column `name`, which is a key (flattened records) or a dotted path of nested fields.

    Raises:
        MissingColumnError: if there is no such column.
        RepeatedKeyError: if the column is repeated.
    """
    if name in row:
        return _get_field(row, name)
    value: Any = row
    for step in name.split("."):
        if value is None:  # a nested field without a value
            return None
        if isinstance(value, list) and all(isinstance(item, Mapping) and step in item for item in value):
            # A list of structs, which some tools write instead of ELI5's struct of lists.
            value = [_get_field(item, step) for item in value]
            continue
        if not isinstance(value, Mapping) or step not in value:
            raise MissingColumnError(f"no column {_quote(name)}; there are: {_format_names(row)}")
        value = _get_field(value, step)
    return value


def _get_field(fields: Mapping[str, Any], name: str) -> Any:
    if isinstance(fields, RepeatedKeys) and name in fields.repeated:
        raise RepeatedKeyError(f"an object has two keys {_quote(name)}: rename or remove one")
    return fields.get(name)


def _quote(name: str) -> str:
    return printable(repr(name))


def _format_names(names: Collection[Any]) -> str:
    """Format at most _MAX_LISTED_NAMES of `names` for a message; there may be a million of them."""
    shown = ", ".join(printable(name, 60) for name in itertools.islice(names, _MAX_LISTED_NAMES))
    return f"{shown} and {len(names) - _MAX_LISTED_NAMES:,} more" if len(names) > _MAX_LISTED_NAMES else shown or "none"


def find_mismatch(row: Any, allowed: Mapping[str, Sequence[Any]]) -> str | None:
    """Describe the first column of `row` whose value is not `allowed`; return None if all values are.

    Raises:
        BadRecordError: if a column is missing.
    """
    if not isinstance(row, Mapping):
        return None  # build_record raises an error with its type
    for name, values in allowed.items():
        value = find_column_value(row, name)
        if value not in values:
            return f"{printable(name)} is {printable(repr(value))}, not one of {_format_names(values)}"
    return None


def list_required_columns(data: SourceData) -> list[str]:
    """Return the names of the columns that every record of `data` must have."""
    title = [name for name in (data.columns.title, data.columns.roles) if name is not None]
    groups, keys = list_group_columns(data.groups), [name for name in list_key_names(data.split) if name != TITLE]
    return list(dict.fromkeys([*(data.filter or {}), *title, *data.columns.texts, *groups, *keys]))


def list_used_columns(data: SourceData) -> list[str]:
    """Return the names of all columns that are read from a record of `data`, both required and optional."""
    return list(dict.fromkeys([*list_required_columns(data), *_OPTIONAL]))


def build_record(row: Any, columns: Columns) -> tuple[Record, int]:
    """Build a record in ELI5's schema from `row`.

    Returns:
        The record, and the number of empty or removed answers that were left out of it.

    Raises:
        BadRecordError: if a column is missing or has the wrong type.
    """
    if not isinstance(row, Mapping):
        raise BadRecordError(f"not an object with columns, but {type(row).__name__}")
    title = "" if columns.title is None else _to_text(find_column_value(row, columns.title), columns.title)
    texts = [text for name in columns.texts for text in _to_texts(find_column_value(row, name), name)]
    kept = [index for index, text in enumerate(texts) if text.strip() not in REMOVED_TEXTS]
    roles = (
        None if columns.roles is None else _read_roles(find_column_value(row, columns.roles), columns.roles, len(texts))
    )
    if roles is not None:
        kept = select_messages(roles, kept)
    record: Record = {
        "title": title,
        **{name: _read_optional_text(row, name) for name in OPTIONAL_TEXTS},
        "answers": {
            "a_id": _read_parallel_values(row, "answers.a_id", kept, len(texts), ""),
            "text": [texts[index] for index in kept],
            "score": _read_parallel_values(row, "answers.score", kept, len(texts), 0),
        },
        **{name: {"url": _read_urls(row, f"{name}.url")} for name in URL_FIELDS},
    }
    if roles is not None:
        record["answers"]["role"] = [roles[index] for index in kept]
    return record, len(texts) - len(kept)


# Role names of common formats, to those of chat templates.
_ROLES = {
    **{name: name for name in ("system", "user", "assistant")},
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
}


def _read_roles(value: Any, name: str, num_texts: int) -> list[str]:
    """Return the role of each message in the names of chat templates."""
    roles = _to_texts(value, name)
    if len(roles) != num_texts:
        raise BadRecordError(f"column {_quote(name)} contains {len(roles)} roles, for {num_texts} messages")
    for role in roles:
        if role not in _ROLES:
            raise BadRecordError(
                f"column {_quote(name)} contains the role {_quote(role)}, not one of {_format_names(_ROLES)}"
            )
    return [_ROLES[role] for role in roles]


def select_messages(roles: Sequence[str], kept: Sequence[int]) -> list[int]:
    """Select the messages of a conversation up to the first missing one.

    Messages after a missing one have lost their context; only a system message can be missing without effect. A
    conversation without messages of the assistant is dropped.

    Args:
        roles: the role of each message.
        kept: indices of the messages that are not missing.

    Returns:
        Indices of the selected messages; an empty list if the conversation is dropped.
    """
    missing = [index for index in sorted(set(range(len(roles))) - set(kept)) if roles[index] != "system"]
    end = missing[0] if missing else len(roles)
    found = [index for index in kept if index < end]
    return found if any(roles[index] == "assistant" for index in found) else []


def _to_text(value: Any, name: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRecordError(f"column {_quote(name)} contains {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRecordError(
            f"column {_quote(name)} contains half of a surrogate pair, which is not Unicode text"
        ) from None
    return value


def _to_texts(value: Any, name: str) -> list[str]:
    if value is None:
        return []
    return [_to_text(item, name) for item in value] if isinstance(value, list | tuple) else [_to_text(value, name)]


def _read_optional_text(row: Mapping[str, Any], name: str) -> str:
    return _to_text(_get_field(row, name), name)


def _read_parallel_values(row: Mapping[str, Any], name: str, kept: list[int], length: int, filler: Any) -> list[Any]:
    """Return the values of a list parallel to the texts, for the texts `kept`.

    Values are `filler` if the list is absent or differs in length from the texts. Integers written as floats and
    missing values, which data frames produce, are not errors, since nothing is computed from these values.

    Raises:
        BadRecordError: if a value has the wrong type.
    """
    try:
        values = find_column_value(row, name)
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
        raise BadRecordError(f"column {_quote(name)} contains something other than {type(filler).__name__}")
    if isinstance(filler, int) and not all(-(2**63) <= value < 2**63 for value in values):
        raise BadRecordError(f"column {_quote(name)} contains a number of more than 64 bits")
    if isinstance(filler, str):
        _to_texts(values, name)
    return [values[index] for index in kept]


def _read_urls(row: Mapping[str, Any], name: str) -> list[str]:
    try:
        return _to_texts(find_column_value(row, name), name)
    except RepeatedKeyError:
        raise
    except BadRecordError:
        return []


def format_scalar(value: Any, name: str) -> str | None:
    """Convert a text, number or date to text. Numbers are written as in JSON; None stays None.

    Raises:
        BadRecordError: if `value` has another type.
    """
    if value is None or isinstance(value, str):
        return None if value is None else _to_text(value, name)
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    if isinstance(value, datetime.date | datetime.time):  # datetime is a subclass of date
        return value.isoformat()
    raise BadRecordError(f"column {_quote(name)} contains {type(value).__name__}, not a text, number or date")


def read_group_values(row: Mapping[str, Any], groups: Sequence[str]) -> dict[str, str | None]:
    """Read the values of the group columns as text.

    Raises:
        BadRecordError: if a column is missing, or its value is not a text, a number or a date.
    """
    return {name: format_scalar(find_column_value(row, name), name) for name in list_group_columns(groups)}


TITLE = "title"  # in split.key: the record's title, also if its column has another name
_KEY_SEPARATOR = "\n"  # occurs in no normalized text


def list_key_names(split: Split | None) -> list[str]:
    """Return the names in split.key; an empty list if the text decides the split, or there is no hash split."""
    if split is None or split.by != "hash" or split.key is None:
        return []
    return [split.key] if isinstance(split.key, str) else split.key


def build_split_key(row: Mapping[str, Any], record: Record, names: Sequence[str]) -> str:
    """Build the key that decides a record's split: its values of `names`, or its text if they are empty, normalized.

    Args:
        row: the record as it is in its source.
        record: the record in ELI5's schema.
        names: columns of `row`; `title` is the title of `record`.

    Raises:
        BadRecordError: if a column is missing, or its value is not a text, a number or a date.
    """
    values = [record["title"] if name == TITLE else format_scalar(find_column_value(row, name), name) for name in names]
    return join_key([value or "" for value in values]) or normalize_text(" ".join(record["answers"]["text"]))


def join_key(values: Sequence[str]) -> str:
    """Join the normalized `values` to one text; the result is empty if all of them are."""
    normalized = [normalize_text(value) for value in values]
    return _KEY_SEPARATOR.join(normalized) if any(normalized) else ""


def normalize_text(text: str) -> str:
    """Remove differences of case, punctuation, spacing and compatibility characters.

    Compatibility forms (NFKC) and case are folded, and punctuation and white space become single spaces, so that
    trivially different copies of a question go to the same split.
    """
    if text.isascii():  # takes a third of the time
        words = b" ".join(text.encode().translate(NORMALIZED_ASCII).split()).decode()
    else:
        words = SYMBOLS.sub(" ", fold_text(text)).strip()
    return words or " ".join(text.split())  # a text that consists of symbols is only stripped of extra spaces


SYMBOLS = re.compile(r"[\W_]+")
# Translation of ASCII characters for normalized text: letters to lower case, digits unchanged, all others to a space.
NORMALIZED_ASCII = bytes(code if code >= 0x80 or chr(code).isalnum() else ord(" ") for code in range(256)).lower()


def fold_text(text: str) -> str:
    """Fold compatibility characters (NFKC) and case."""
    return _normalize_nfkc(text).casefold()


# Longer than any sequence of combining marks in ordinary text. The two half-width marks combine once normalized.
_NUM_MARKS = 100
_MANY_MARKS = re.compile(rf"(?:[^\w\s\x00-\x7f]|[\uff9e\uff9f]){{{_NUM_MARKS},}}")


def _normalize_nfkc(text: str) -> str:
    """Return the NFKC form of `text` in linear time.

    `unicodedata` orders the combining marks after a letter by insertion sort, which takes an hour for a million marks.
    Long sequences of marks are therefore sorted first.
    """
    if len(text) - len(text.encode("ascii", "ignore")) >= _NUM_MARKS:  # takes a tenth of the time of the search below
        text = _MANY_MARKS.sub(_order_marks, text)
    return unicodedata.normalize("NFKC", text)


def _order_marks(run: re.Match[str]) -> str:
    """Sort each sequence of combining marks by its combining class, stably, as NFKC does."""
    characters = (part for character in run[0] for part in unicodedata.normalize("NFKD", character))
    groups = itertools.groupby(characters, key=lambda character: unicodedata.combining(character) > 0)
    return "".join(character for _, group in groups for character in sorted(group, key=unicodedata.combining))


Digests = npt.NDArray[np.uint64]


def digest_documents(documents: Iterable[bytes | memoryview]) -> Digests:
    """Hash documents to find exact duplicates, [num_documents, 2], uint64: 128 bits each."""
    digests = [hashlib.blake2b(document, digest_size=16).digest() for document in documents]
    return np.frombuffer(b"".join(digests), np.uint64).reshape(-1, 2)


def hash_split_keys(keys: Iterable[str], seed: int) -> npt.NDArray[np.uint64]:
    """Hash split keys, [num_keys], uint64. Hashes do not depend on other records, so adding records moves none."""
    seeded = hashlib.blake2b(digest_size=8, key=str(seed).encode())
    digests = []
    for key in keys:
        digest = seeded.copy()
        digest.update(key.encode())
        digests.append(digest.digest())
    return np.frombuffer(b"".join(digests), ">u8").astype(np.uint64)


def assign_splits(split_hashes: npt.NDArray[np.uint64], split: Split) -> npt.NDArray[np.int64]:
    """Assign each hash to a split by the split's share of the range of hashes.

    Args:
        split_hashes: [num_records], uint64.

    Returns:
        Indices in SPLITS, [num_records], int64.
    """
    bounds = [split.train, split.train + split.validation]
    return np.searchsorted(bounds, split_hashes / 2.0**64, side="right")
