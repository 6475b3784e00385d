"""File of a scaling ladder: model sizes, lengths of training, and the settings of each."""

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field, StringConstraints

from stages.core.compose import PARAMS, find_forbidden_values
from stages.core.config import (
    MISSING,
    Seed,
    config_section,
    find_value,
    list_configurations,
    read_yaml,
    suggest_name,
    validate_values,
)
from stages.core.errors import ConfigError, printable
from tools.experiments import find_unpassable_values, parse_key

MIN_KINDS = 3
"""Least number of sizes and of lengths; with two, the curvature of the law cannot be told from its limit."""

_Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=40)]
_Value = bool | int | Annotated[float, Field(allow_inf_nan=False)] | str | None
_Settings = dict[str, _Value]


@config_section
class LadderFile:
    """Content of a ladder file. Settings map names as in `dvc exp run -S` to values."""

    task: str
    """Task of params.yaml to train."""
    set_: Annotated[_Settings, Field(alias="set", default_factory=dict)]
    """Settings of all rungs."""
    sizes: dict[_Name, _Settings]
    """Settings of each model size, including its learning rate."""
    lengths: dict[_Name, _Settings]
    """Settings of each length of training."""
    seeds: Annotated[list[Seed], Field(min_length=1)] | None = None
    """Seeds, each of which trains every rung; null: the one of params.yaml."""


class Rung(NamedTuple):
    """One training of a ladder."""

    experiment: str
    """Name of its DVC experiment."""
    size: str
    length: str
    settings: dict[str, _Value]


class Ladder(NamedTuple):
    """Ladder as read from its file."""

    name: str
    task: str
    rungs: list[Rung]

    @property
    def target(self) -> str:
        """Stage that a rung runs, with those that it needs."""
        return f"evaluate@{self.task}"


def read_ladder(file: Path) -> Ladder:
    """Read a ladder file. The name of the ladder is that of the file.

    Raises:
        ConfigError: if the file cannot be read, or a name, setting or value in it is wrong.
    """
    if not file.is_file():
        found = sorted(path.as_posix() for path in file.parent.glob("*.yaml") if path.is_file())
        hint = f"; {suggest_name(str(file), found)}" if found else ""
        raise ConfigError([f"{printable(file)} is not a file{hint}"])
    where, values = printable(file), read_yaml(file)
    try:
        content = validate_values(LadderFile, values, "a ladder")
    except ConfigError as error:
        raise ConfigError([f"{where}: {problem}" for problem in error.problems]) from None
    if problems := list(_find_problems(file.stem, content)):
        raise ConfigError([f"{where}: {problem}" for problem in problems])
    return Ladder(file.stem, content.task, list(_list_rungs(file.stem, content)))


def _list_rungs(name: str, content: LadderFile) -> Iterator[Rung]:
    """Yield the rungs, the seeds of a rung one after the other."""
    seeds: list[int | None] = [None] if content.seeds is None else [*content.seeds]
    for size, length, seed in itertools.product(content.sizes, content.lengths, seeds):
        settings = {**content.set_, **content.sizes[size], **content.lengths[length]}
        suffix = "" if seed is None else f"-seed{seed}"
        yield Rung(
            f"ladder-{name}-{size}-{length}{suffix}", size, length, settings | ({} if seed is None else {"seed": seed})
        )


def _find_problems(name: str, content: LadderFile) -> Iterator[str]:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}", name):
        yield "experiments are named after the file: give it a name of at most 40 letters, digits, - and _"
    tasks = list(read_yaml(Path(PARAMS.name)).get("tasks") or {})
    if content.task not in tasks:
        yield f"task={printable(content.task)} is not a task of params.yaml; {suggest_name(content.task, tasks)}"
    for kind, found in (("sizes", content.sizes), ("lengths", content.lengths)):
        if len(found) < MIN_KINDS:
            yield f"{kind} has {len(found)}: a law needs at least {MIN_KINDS}"
        if len({json.dumps(settings, sort_keys=True) for settings in found.values()}) < len(found):
            yield f"two of {kind} have the same settings"
    names = [f"{size}-{length}" for size, length in itertools.product(content.sizes, content.lengths)]
    if repeated := sorted(name for name, number in Counter(names).items() if number > 1):
        yield f"two rungs would have the name {repeated[0]}: rename a size or a length"
    if content.seeds and len(set(content.seeds)) < len(content.seeds):
        yield "seeds has a seed twice"
    sections = {
        "set": content.set_,
        **{f"sizes.{size}": settings for size, settings in content.sizes.items()},
        **{f"lengths.{length}": settings for length, settings in content.lengths.items()},
    }
    for section, settings in sections.items():
        yield from (f"{section}: {problem}" for problem in _find_setting_problems(settings))
    for size, length in itertools.product(content.sizes, content.lengths):
        if both := _list_keys(content.sizes[size]) & _list_keys(content.lengths[length]):
            yield f"sizes.{size} and lengths.{length} both set {printable(min(both))}"
    if content.seeds and any("seed" in _list_keys(settings) for settings in sections.values()):
        yield "seed is set both by `seeds` and as a setting"


def _list_keys(settings: Mapping[str, Any]) -> set[str]:
    """Return the names of settings, without the mark of new keys."""
    return {name.replace("+", "") for name in settings}


def _find_setting_problems(settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield the settings that `dvc exp run` or the stages would refuse, or that would have no effect."""
    for name, value in settings.items():
        shown = printable(name)
        try:
            key = parse_key(name)
        except ConfigError as error:
            yield from error.problems
            continue
        yield from find_forbidden_values({name: value})
        yield from find_unpassable_values(name, value)
        if not Path(key.file).is_file():
            group = Path(key.file).parent.name
            yield f"{shown}: there is no {key.file}; {suggest_name(Path(key.file).stem, list_configurations(group))}"
            continue
        exists = find_value(read_yaml(Path(key.file)), key.name) is not MISSING
        if key.file == PARAMS.name and not exists:
            yield f"{shown}: params.yaml has no key {printable(key.name)}"
        elif not exists and not key.may_be_new:
            yield f"{shown}: {key.file} has no key {printable(key.name)} (to add it, write {key.file}:+{key.name})"
