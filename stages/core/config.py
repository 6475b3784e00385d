"""The schema of conf/: types, ranges and cross-field rules of what Hydra composes, and the errors that name a key."""

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from stages.core.errors import ConfigError

Schema = TypeVar("Schema")
CONF = Path(__file__).resolve().parents[2] / "conf"

# `part`: a stage's view of a config or file that other stages read too. `whole`: a section that belongs to its reader,
# where an unknown key is a mistake.
_COMMON = ConfigDict(strict=True, use_attribute_docstrings=True)
part = dataclass(kw_only=True, config=ConfigDict(**_COMMON, extra="ignore"))
whole = dataclass(kw_only=True, config=ConfigDict(**_COMMON, extra="forbid"))

Seed = Annotated[int, Field(ge=0, lt=2**32)]
Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


def load(schema: type[Schema], composed: DictConfig, stage: str, unchosen: list[str] | None = None) -> Schema:
    """`composed` as an instance of `schema`; fields that the schema does not name are left out.

    Args:
        unchosen: config groups of which no configuration was composed: what they lack is reported once a group.

    Raises:
        ConfigError: naming every missing, unknown, mistyped or out-of-range key at once.
    """
    values = _without_missing(OmegaConf.to_container(composed, resolve=True))
    try:
        return TypeAdapter(schema).validate_json(json.dumps(values))
    except ValidationError as error:
        problems = [
            f"{group} is not chosen: add {group}=NAME, one of {', '.join(choices(group))}" for group in unchosen or []
        ]
        # A rule may find several things, a line each.
        found = [problem for item in error.errors() for problem in _problem(dict(item), stage).split("\n")]
        problems += [problem for problem in found if not (unchosen and problem.endswith(" is missing"))]
        raise ConfigError(list(dict.fromkeys(problems))) from None


def _without_missing(value: Any) -> Any:
    """`value` without the keys whose value is OmegaConf's sign for a missing one."""
    if not isinstance(value, dict):
        return value
    return {key: _without_missing(item) for key, item in value.items() if item != "???"}


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
    return f"{key}={json.dumps(item['input'], ensure_ascii=False)}: {text.replace('input should', 'it should')}"


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
