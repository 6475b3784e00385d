"""The schema of conf/: types, ranges and cross-field rules of what Hydra composes, and the errors that name a key."""

import copy
import difflib
import functools
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from stages.core.errors import ConfigError, printable

Schema = TypeVar("Schema")
CONF = Path(__file__).resolve().parents[2] / "conf"
MISSING = object()  # what `find` returns where there is no value

# `part`: a stage's view of a config or file that other stages read too. `whole`: a section that belongs to its reader,
# where an unknown key is a mistake.
_COMMON = ConfigDict(strict=True, use_attribute_docstrings=True, populate_by_name=True)
part = dataclass(kw_only=True, config=ConfigDict(**_COMMON, extra="ignore"))
whole = dataclass(kw_only=True, config=ConfigDict(**_COMMON, extra="forbid"))

Seed = Annotated[int, Field(ge=0, lt=2**32)]
Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


def key_of(field: Any) -> str:
    """The key of a schema's field: its name, but `from` for `from_`, since Python has that word for itself."""
    return str(field.name.removesuffix("_"))


def validate(schema: type[Schema], values: dict[str, Any], stage: str) -> Schema:
    """`values` as an instance of `schema`; keys that the schema does not name are left out.

    Raises:
        ConfigError: naming every missing, unknown, mistyped or out-of-range key at once.
    """
    try:
        return TypeAdapter(schema).validate_json(json.dumps(_without_unset(values)))
    except ValidationError as error:
        # A rule may find several things, a line each.
        found = [problem for item in error.errors() for problem in _problem(dict(item), stage).split("\n")]
        raise ConfigError(list(dict.fromkeys(found))) from None


def _without_unset(value: Any) -> Any:
    """`value` without the keys whose value is OmegaConf's sign for one that must be given."""
    if not isinstance(value, dict):
        return value
    return {key: _without_unset(item) for key, item in value.items() if item != "???"}


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file that a user edits, read as Hydra reads it; empty for an empty file.

    Raises:
        ConfigError: if it cannot be read, or uses aliases (a few lines of which may stand for gigabytes) or tags
            (which name types of Python).
    """
    where = file.relative_to(CONF.parent).as_posix() if file.is_relative_to(CONF.parent) else str(file)
    text = ""
    try:
        text = file.read_text(encoding="utf-8")
        return copy.deepcopy(_parse_yaml(where, text))
    except ConfigError:
        raise
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException, RecursionError) as error:
        if line := conflict_line(text):
            raise ConfigError([f"{where}:{line}: a merge conflict: keep one of the two sides"]) from None
        if "integer string conversion" in str(error):  # Python converts 4,300 digits
            raise ConfigError(
                [f"{where}: a whole number of thousands of digits: give one of at most 63 bits"]
            ) from None
        raise ConfigError([f"{where}: {' '.join(str(error).split())}"]) from None


def conflict_line(text: str) -> int | None:
    """The line where a merge conflict begins that git has marked in `text`; None if there is none."""
    return next((number for number, line in enumerate(text.split("\n"), 1) if line.startswith("<<<<<<< ")), None)


@functools.cache
def _parse_yaml(where: str, text: str) -> dict[str, Any]:
    for event in yaml.parse(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None) is not None:
            line = event.start_mark.line + 1 if event.start_mark else 0
            raise ConfigError([f"{where}:{line}: aliases (*name) and tags (!name) cannot be used: write the value"])
    values = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)), resolve=False)
    if not isinstance(values, dict):
        raise ConfigError([f"{where}: it should hold keys and values"])
    if problems := list(numbers_beyond_64_bits(values)):
        raise ConfigError([f"{where}: {problem}" for problem in problems])
    return {str(key): value for key, value in values.items()}


def numbers_beyond_64_bits(values: Any, key: str = "") -> Iterator[str]:
    """The whole numbers in `values` that no library takes, as problems."""
    if isinstance(values, dict):
        for name, value in values.items():
            yield from numbers_beyond_64_bits(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, list):
        for value in values:
            yield from numbers_beyond_64_bits(value, key)
    elif isinstance(values, int) and not -(2**63) <= values < 2**63:
        # Not str(values), which Python refuses above 4,300 digits.
        yield f"{printable(key)}: a whole number of {values.bit_length()} bits: give one of at most 63"


def find(values: Any, dotted: str) -> Any:
    """The value of a dotted key in nested mappings; MISSING if there is none."""
    for section in dotted.split("."):
        if not isinstance(values, dict) or section not in values:
            return MISSING
        values = values[section]
    return values


def choices(group: str) -> list[str]:
    """Names of the configurations of a group."""
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))


def _problem(item: dict[str, Any], stage: str) -> str:
    key = ".".join(str(step) for step in item["loc"])
    if item["type"] == "value_error":  # a rule of ours: the message says it all
        return str(item["ctx"]["error"])
    if item["type"] == "missing":
        return f"{key} is missing"
    if item["type"] == "unexpected_keyword_argument":
        return f"{key} is not a key that {stage} knows"
    text = item["msg"][0].lower() + item["msg"][1:]
    given = printable(json.dumps(item["input"], ensure_ascii=False))
    return f"{printable(key)}={given}: {text.replace('input should', 'it should')}"


def nearest(name: str, names: list[str]) -> str:
    """`did you mean X?` for the name most like `name`, or which names there are."""
    found = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    if found:
        return f"did you mean {found[0]}?"
    return f"there are {', '.join(names)}" if len(names) <= 12 else "nothing is spelt like it"


def flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of each key."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
