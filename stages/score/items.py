"""Read the items to score, minimal pairs and multiple-choice questions, from a JSONL file or a data set of the Hub."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from stages.core.config import suggest_name
from stages.core.errors import StageError, printable
from stages.hub.files import find_pinned_files
from stages.score.schema import HubPairs, PairColumns, Pairs


class Item(NamedTuple):
    """A multiple-choice question, or a minimal pair: its choices are the acceptable and the unacceptable text."""

    source: str
    """Name of the file, or configuration of the data set."""
    row: int
    """Line in the file, or row in the data set, from 1."""
    prompt: str
    """Empty for a minimal pair."""
    choices: list[str]
    answer: int
    """Index of the right choice; 0 for a minimal pair."""
    groups: list[str | None]
    """[num_groups] value of each column of pairs.groups; None if the item has no value."""


def read_items(pairs: Pairs) -> list[Item]:
    """Read all items of the `pairs` section, in order.

    Raises:
        StageError: if an item cannot be scored (with its file and line), if there are no items, or if no item has a
            column of `pairs.groups`.
    """
    items: list[Item] = []
    columns: set[str] = set()
    for source, place, row, values in _read_rows(pairs):
        columns.update(values)
        try:
            items.append(_build_item(source, row, values, pairs))
        except ValueError as error:
            raise StageError(f"{place}:{row}: {error}") from None
    if not items:
        raise StageError(f"pairs.path={printable(pairs.path)}: the file has no lines")
    for name in pairs.groups:
        if name not in columns:
            known = suggest_name(name, sorted(columns))
            raise StageError(f"pairs.groups: no item has the column {printable(name)}; {printable(known)}")
    return items


def compute_digest(items: list[Item]) -> str:
    """Return the SHA-256 of the items' prompts, choices and answers, as `sha256:HEX`.

    Figures can be compared if their digests are equal.
    """
    texts = json.dumps([(item.prompt, item.choices, item.answer) for item in items])
    return f"sha256:{hashlib.sha256(texts.encode()).hexdigest()}"


def _read_rows(pairs: Pairs) -> Iterator[tuple[str, str, int, dict[str, Any]]]:
    """Yield the source, the place (for messages), the row number and the values of each item."""
    if pairs.hub is None:
        path = Path(pairs.path)
        for row, values in _read_jsonl(path):
            yield path.name, printable(path), row, values
    else:
        for name, file in _fetch_files(pairs.hub).items():
            place = printable(f"{pairs.hub.path}[{name}]")
            for row, values in enumerate(_read_parquet(file, place), 1):
                yield name, place, row, values


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the line number and the values of each line that is not blank."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                values = json.loads(text, object_pairs_hook=_build_object) if text.strip() else None
            except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
                raise StageError(f"{printable(path)}:{number}: not a JSON object: {printable(error)}") from None
            if text.strip() and not isinstance(values, dict):
                raise StageError(f"{printable(path)}:{number}: not a JSON object")
            if values is not None:
                yield number, values


def _build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object; raise ValueError for a duplicate key (by default, `json` keeps the last value)."""
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("an object has the same key twice")
    return found


def _fetch_files(hub: HubPairs) -> dict[str, Path]:
    """Download the file of each configuration; return a map from configuration to cached file."""
    return {
        name: find_pinned_files("pairs.hub", hub.path, hub.revision, None, [file], [file], "dataset")[file]
        for name, file in hub.files.items()
    }


def _read_parquet(file: Path, place: str) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = pq.read_table(file).to_pylist()
    except (pa.ArrowException, ValueError) as error:
        raise StageError(f"{place} is not a Parquet file: {printable(error)}") from None
    return rows


def _build_item(source: str, row: int, values: dict[str, Any], pairs: Pairs) -> Item:
    """Build the item of a line or row.

    Raises:
        ValueError: if the values are neither a pair nor a question, or are invalid.
    """
    names = pairs.columns
    is_pair = names.good in values or names.bad in values
    if is_pair == (names.choices in values):
        raise ValueError(
            f"{'both' if is_pair else 'neither'} a minimal pair ({printable(names.good)}, {printable(names.bad)})"
            f" {'and' if is_pair else 'nor'} a multiple-choice question ({printable(names.prompt)},"
            f" {printable(names.choices)}, {printable(names.answer)}); pairs.columns (conf/pairs) names the columns"
        )
    prompt, choices, answer = ("", _read_pair(values, names), 0) if is_pair else _read_question(values, names)
    return Item(source, row, prompt, choices, answer, [_format_group(name, values.get(name)) for name in pairs.groups])


def _read_pair(values: dict[str, Any], names: PairColumns) -> list[str]:
    good, bad = (_check_text(name, values.get(name)) for name in (names.good, names.bad))
    if good == bad:
        raise ValueError(f"{printable(names.good)} and {printable(names.bad)} are the same text")
    return [good, bad]


def _read_question(values: dict[str, Any], names: PairColumns) -> tuple[str, list[str], int]:
    given, answer = values[names.choices], values.get(names.answer)
    if not isinstance(given, list) or len(given) < 2:
        raise ValueError(f"{printable(names.choices)} is not a list of at least two texts")
    choices = [_check_text(f"{names.choices}[{number}]", choice) for number, choice in enumerate(given)]
    if len(set(choices)) < len(choices):
        raise ValueError(f"two of {printable(names.choices)} are the same text")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise ValueError(
            f"{printable(names.answer)}={_format_value(answer)}: it should be an index from 0 to {len(choices) - 1}"
        )
    return _check_text(names.prompt, values.get(names.prompt), may_be_empty=True), choices, answer


def _check_text(name: str, value: Any, may_be_empty: bool = False) -> str:
    """Return `value`, the value of the column `name`, if it is valid text; otherwise raise ValueError."""
    if not isinstance(value, str):
        raise ValueError(f"{printable(name)}={_format_value(value)}: it should be a string")
    if not value and not may_be_empty:
        raise ValueError(f"{printable(name)} is empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{printable(name)} has half of a surrogate pair, which is not Unicode text") from None
    return value


def _format_group(name: str, value: Any) -> str | None:
    """Return a value of a group as text; numbers and booleans are formatted as in JSON."""
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    return None if value is None else _check_text(name, value, may_be_empty=True)


def _format_value(value: Any) -> str:
    return printable(json.dumps(value, ensure_ascii=False, default=str))
