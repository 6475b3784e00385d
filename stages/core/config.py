"""Read and validate configs: strict schemas with types, ranges and cross-field rules, and errors that name the key."""

import copy
import difflib
import functools
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, dataclass_transform

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from stages.core.errors import ConfigError, printable

Schema = TypeVar("Schema")
CONF = Path(__file__).resolve().parents[2] / "conf"
MISSING = object()  # returned by `find_value` if there is no value

# `config_view`: the keys that one stage reads of a config or file that other stages read too; others are ignored.
# `config_section`: a section with a single schema, in which an unknown key is an error.
_COMMON = ConfigDict(strict=True, use_attribute_docstrings=True, populate_by_name=True)
if TYPE_CHECKING:

    @dataclass_transform(kw_only_default=True)
    def config_view(schema: type[Schema]) -> type[Schema]: ...

    @dataclass_transform(kw_only_default=True)
    def config_section(schema: type[Schema]) -> type[Schema]: ...
else:
    config_view = dataclass(kw_only=True, config=ConfigDict(**_COMMON, extra="ignore"))
    config_section = dataclass(kw_only=True, config=ConfigDict(**_COMMON, extra="forbid"))

Seed = Annotated[int, Field(ge=0, lt=2**32)]
Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


def get_field_key(field: Any) -> str:
    """Return the YAML key of a dataclass field: its name without a final underscore (`from_`: a Python keyword)."""
    return str(field.name.removesuffix("_"))


def validate_values(schema: type[Schema], values: dict[str, Any], stage: str) -> Schema:
    """Validate `values`, and return them as an instance of `schema`. A `config_view` ignores unknown keys.

    Raises:
        ConfigError: with every missing, unknown, mistyped or out-of-range key.
    """
    try:
        return TypeAdapter(schema).validate_json(json.dumps(_drop_unset(values)))
    except ValidationError as error:
        # A cross-field rule may report several problems, one per line.
        found = [problem for item in error.errors() for problem in _describe_problem(dict(item), stage).split("\n")]
        raise ConfigError(list(dict.fromkeys(found))) from None


def _drop_unset(value: Any) -> Any:
    """Return `value` without the keys that OmegaConf marks as mandatory and unset (`???`)."""
    if not isinstance(value, dict):
        return value
    return {key: _drop_unset(item) for key, item in value.items() if item != "???"}


def read_yaml(file: Path) -> dict[str, Any]:
    """Read the mapping in a YAML file that a user edits, by Hydra's rules. An empty file gives an empty mapping.

    Raises:
        ConfigError: if the file cannot be read, or uses aliases (a few lines can expand to gigabytes) or tags (which
            can name Python types).
    """
    shown_path = file.relative_to(CONF.parent).as_posix() if file.is_relative_to(CONF.parent) else str(file)
    text = ""
    try:
        text = file.read_text(encoding="utf-8")
        return copy.deepcopy(_parse_yaml(shown_path, text))
    except ConfigError:
        raise
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException, RecursionError) as error:
        if line := find_conflict_line(text):
            raise ConfigError([f"{shown_path}:{line}: a merge conflict: keep one of the two sides"]) from None
        if "integer string conversion" in str(error):  # Python converts at most 4,300 digits
            raise ConfigError(
                [f"{shown_path}: a whole number of thousands of digits: give one of at most 63 bits"]
            ) from None
        raise ConfigError([f"{shown_path}: {' '.join(str(error).split())}"]) from None


def find_conflict_line(text: str) -> int | None:
    """Return the line number of git's first merge conflict marker in `text`; None if there is no conflict."""
    return next((number for number, line in enumerate(text.split("\n"), 1) if line.startswith("<<<<<<< ")), None)


@functools.cache
def _parse_yaml(shown_path: str, text: str) -> dict[str, Any]:
    for event in yaml.parse(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None) is not None:
            line = event.start_mark.line + 1 if event.start_mark else 0
            raise ConfigError(
                [f"{shown_path}:{line}: aliases (*name) and tags (!name) are not allowed: write the value"]
            )
    values = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)), resolve=False)
    if not isinstance(values, dict):
        raise ConfigError([f"{shown_path}: it should be a mapping of keys to values"])
    if problems := list(find_numbers_beyond_64_bits(values)):
        raise ConfigError([f"{shown_path}: {problem}" for problem in problems])
    return {str(key): value for key, value in values.items()}


def find_numbers_beyond_64_bits(values: Any, key: str = "") -> Iterator[str]:
    """Yield an error text for each whole number in `values` that does not fit in a signed 64-bit integer."""
    if isinstance(values, dict):
        for name, value in values.items():
            yield from find_numbers_beyond_64_bits(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, list):
        for value in values:
            yield from find_numbers_beyond_64_bits(value, key)
    elif isinstance(values, int) and not -(2**63) <= values < 2**63:
        # Show the number of bits: Python does not convert more than 4,300 digits to text.
        yield f"{printable(key)}: a whole number of {values.bit_length()} bits: give one of at most 63"


def find_value(values: Any, dotted: str) -> Any:
    """Return the value of a dotted key in nested mappings; MISSING if there is none."""
    for section in dotted.split("."):
        if not isinstance(values, dict) or section not in values:
            return MISSING
        values = values[section]
    return values


def list_configurations(group: str) -> list[str]:
    """Return the names of the configurations in a group of conf/."""
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))


def _describe_problem(item: dict[str, Any], stage: str) -> str:
    key = ".".join(str(step) for step in item["loc"])
    if item["type"] == "value_error":  # raised by a validator of a schema, with a complete message
        return str(item["ctx"]["error"])
    if item["type"] == "missing":
        return f"{key} is missing"
    if item["type"] == "unexpected_keyword_argument":
        return f"{key} is not a key that {stage} knows"
    text = item["msg"][0].lower() + item["msg"][1:]
    given = printable(json.dumps(item["input"], ensure_ascii=False))
    return f"{printable(key)}={given}: {text.replace('input should', 'it should')}"


def suggest_name(name: str, names: list[str]) -> str:
    """Return `did you mean X?` for the name closest to `name`, or a list of the names."""
    found = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    if found:
        return f"did you mean {found[0]}?"
    return f"there are {', '.join(names)}" if len(names) <= 12 else "no known name is similar"


def flatten_values(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and the value of each leaf of nested mappings."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flatten_values(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
