"""Search space of `python -m tools.search`: its file, and the checks of it."""

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, Field, ValidationInfo, model_validator

from stages.core.compose import find_forbidden_values
from stages.core.config import (
    CONF,
    config_section,
    find_value,
    read_yaml,
    validate_values,
)
from stages.core.errors import ConfigError, printable
from tools.experiments import find_unpassable_values, parse_key

SIGNIFICANT_DIGITS = 4
"""Digits to which numbers of a range are rounded, so that `-S` and tables are readable."""


def check_number(value: Any, info: ValidationInfo) -> Any:
    """Return a number as it is: pydantic's float would not keep whole numbers, which make another range."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        given = printable(json.dumps(value, ensure_ascii=False))
        raise ValueError(f"{info.field_name}={given}: it should be a finite number")
    return value


def check_optional_number(value: Any, info: ValidationInfo) -> Any:
    """Return None or a number as it is."""
    return None if value is None else check_number(value, info)


Number = Annotated[Any, AfterValidator(check_number)]


@config_section
class Range:
    """Numbers between two bounds; whole numbers if all of its numbers are whole."""

    low: Number
    """Lower bound, included."""
    high: Number
    """Upper bound, included."""
    log: bool = False
    """If True, numbers are sampled on a logarithmic scale."""
    step: Annotated[Any, AfterValidator(check_optional_number)] = None
    """Distance of the numbers from each other, counted from `low`; null: any number."""

    @model_validator(mode="after")
    def check_bounds(self) -> "Range":
        if self.low >= self.high:
            raise ValueError(f"low={self.low} should be below high={self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"low={self.low}: it should be above 0 with log: true")
        if self.log and self.step is not None:
            raise ValueError("log: true and step cannot be combined: remove one of them")
        if self.step is not None and not 0 < self.step <= self.high - self.low:
            raise ValueError(f"step={self.step}: it should be above 0 and at most high - low")
        if self.step is not None and not math.isclose(round(steps := (self.high - self.low) / self.step), steps):
            raise ValueError(f"high={self.high}: it should be low plus a multiple of step")
        return self

    @property
    def is_whole(self) -> bool:
        """True if only whole numbers are sampled."""
        return all(isinstance(number, int) for number in (self.low, self.high, self.step or 1))

    def round_value(self, value: float) -> int | float:
        """Round a sampled number to SIGNIFICANT_DIGITS, within the bounds."""
        if self.is_whole:
            return int(value)
        return float(min(max(float(f"{value:.{SIGNIFICANT_DIGITS}g}"), self.low), self.high))

    def list_extremes(self) -> list[Any]:
        """Return the bounds."""
        return [self.low, self.high]


@config_section
class Choices:
    """A list of values of any type."""

    choices: list[Any]

    @model_validator(mode="after")
    def check_choices(self) -> "Choices":
        texts = [json.dumps(choice, sort_keys=True) for choice in self.choices]
        if len(set(texts)) < max(2, len(texts)):
            raise ValueError("choices: there should be at least two values, all different")
        return self

    def list_extremes(self) -> list[Any]:
        """Return all values."""
        return self.choices


@config_section
class Halving:
    """Successive halving over the epochs of a training."""

    epochs: Annotated[list[Number], Field(min_length=1)]
    """Epochs of the rungs, increasing. Every trial is trained for the first number of epochs."""
    factor: Annotated[int, Field(ge=2)] = 3
    """Of this number of trials in a rung, the best goes on to the next rung."""

    @model_validator(mode="after")
    def check_epochs(self) -> "Halving":
        if any(first >= second for first, second in itertools.pairwise([0, *self.epochs])):
            raise ValueError(f"halving.epochs={self.epochs}: the numbers should be above 0 and increase")
        return self


@config_section
class SpaceFile:
    """Content of a file like conf/search.yaml."""

    task: str
    """Task of params.yaml whose model is searched."""
    metric: Literal["bits_per_byte", "pseudo_bits_per_byte", "loss", "masked_loss"] | None = None
    """Metric of the validation split to minimize; null: the task's bits per byte."""
    halving: Halving
    keys: Annotated[dict[str, Any], Field(min_length=1)]
    """Key, as in `dvc exp run -S`, to its values: `{low, high, log, step}` or `{choices: [...]}`."""
    fixed: dict[str, Any] = Field(default_factory=dict)
    """Key, as in `dvc exp run -S`, to its value in every trial."""


class Space(NamedTuple):
    """A search space."""

    task: str
    metric: str | None
    halving: Halving
    keys: dict[str, Range | Choices]
    """Key to its values, in the order of the file."""
    fixed: dict[str, Any]

    @property
    def epochs_key(self) -> str:
        return f"tasks.{self.task}.num_train_epochs"

    def describe(self) -> dict[str, Any]:
        """Return everything that decides which trials are run, as values of JSON."""
        return {
            "task": self.task,
            "metric": self.metric,
            "halving": _list_fields(self.halving),
            "keys": {key: _list_fields(spec) for key, spec in self.keys.items()},
            "fixed": self.fixed,
        }


def _list_fields(section: Any) -> dict[str, Any]:
    return dataclasses.asdict(section)


def read_space(file: Path) -> Space:
    """Read a search space and check its form: keys, ranges, types.

    Raises:
        ConfigError: with all problems of the file.
    """
    if not file.is_file():
        raise ConfigError([f"{printable(file)} is not a file: name a search space (docs/search.md)"])
    content = read_yaml(file)
    if problems := list(find_forbidden_values(content)):
        raise ConfigError([f"{printable(file)}: {problem}" for problem in problems])
    try:
        values = validate_values(SpaceFile, content, "a search space")
    except ConfigError as error:
        raise ConfigError([f"{printable(file)}: {problem}" for problem in error.problems]) from None
    keys: dict[str, Range | Choices] = {}
    found: list[str] = []
    for text, spec in values.keys.items():
        try:
            keys[text] = read_key_values(text, spec)
        except ConfigError as error:
            found += error.problems
    space = Space(values.task, values.metric, values.halving, keys, values.fixed)
    found += find_key_problems(space, [*values.keys, *values.fixed])
    for text, value in values.fixed.items():
        found += find_unpassable_values(text, value)
    if found:
        raise ConfigError([f"{printable(file)}: {problem}" for problem in found])
    return space


def read_key_values(text: str, spec: Any) -> Range | Choices:
    """Validate the values of a key.

    Raises:
        ConfigError: with all problems, which name the key.
    """
    if not isinstance(spec, dict):
        given = printable(json.dumps(spec, ensure_ascii=False))
        raise ConfigError([f"{printable(text)}={given}: it should be {{low: ..., high: ...}} or {{choices: [...]}}"])
    try:
        schema: Any = Choices if "choices" in spec else Range
        values: Range | Choices = validate_values(schema, spec, "a search space")
    except ConfigError as error:
        raise ConfigError([f"{printable(text)}: {problem}" for problem in error.problems]) from None
    if problems := [problem for value in values.list_extremes() for problem in find_unpassable_values(text, value)]:
        raise ConfigError(problems)
    return values


def find_key_problems(space: Space, texts: Sequence[str]) -> Iterator[str]:
    """Yield keys that are malformed, set twice, or not open to a search."""
    seen: dict[tuple[str, str], str] = {}
    for text in texts:
        try:
            key = parse_key(text)
        except ConfigError as error:
            yield from error.problems
            continue
        if (other := seen.get((key.file, key.name))) is not None:
            yield f"{printable(text)}: {other} already sets it: remove one of them"
        seen[key.file, key.name] = text
        if text == space.epochs_key:
            yield f"{text} cannot be searched or fixed: halving.epochs sets it"
        if key.file.startswith("conf/task/") and key.name.partition(".")[0] == "evaluate":
            yield f"{text} cannot be searched or fixed: it changes the metric, not the model"


# -- values ------------------------------------------------------------------------------------------------------------


def read_current_value(key: str) -> Any:
    """Return the value of a key in the workspace; MISSING if there is none."""
    parsed = parse_key(key)
    return find_value(read_yaml(CONF.parent / parsed.file), parsed.name)


def format_epochs(epochs: float) -> str:
    """Return `1 epoch`, `2 epochs`."""
    return f"{epochs:g} epoch{'' if epochs == 1 else 's'}"


def make_settings(space: Space, values: Mapping[str, Any], epochs: float) -> dict[str, Any]:
    """Return key to value of everything that a trial sets.

    Args:
        values: key to value of the searched keys.
        epochs: epochs of training.
    """
    return {**space.fixed, **values, space.epochs_key: epochs}
