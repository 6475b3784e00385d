"""Checks of a search space against the stages of its task: which keys they read, and which values they accept."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from stages.core.compose import GLOBAL_GROUPS, PARAMS, Composition, compose_config, get_package, load_config, read_root
from stages.core.config import CONF, MISSING, find_value, flatten_values, read_yaml, suggest_name
from stages.core.errors import ConfigError, printable
from stages.core.source_code import hash_code, list_root_modules
from tools.check import get_config_class, get_used_params
from tools.experiments import format_override, parse_key
from tools.search.space import Space, make_settings, read_current_value

# Under these schedules, the learning rate of a step does not depend on the number of later steps (except for the decay
# at the end), so that a training can go on from a checkpoint of a shorter one.
SHARING_SCHEDULES = ("constant", "constant_with_warmup", "warmup_stable_decay")
KEEP_FOR_BRANCHES_KEY = "conf/base/hardware.yaml:checkpoints.keep_for_branches"
KEEP_FOR_BRANCHES_VALUE = {"every_steps": None, "gigabytes": 10.0, "directory": None}


class CheckedSpace(NamedTuple):
    """What the composed configs of a task's stages say about a search space."""

    fingerprints: dict[str, str]
    """Stage to a hash of its code and of all values that the search does not set."""
    settings: dict[str, Any]
    """Key to value of settings for every run that do not change its result."""
    notice: str
    """Reason why runs cannot go on from shorter ones; empty if they can."""


def check_space(space: Space, stages: Sequence[str]) -> CheckedSpace:
    """Compose the stages for each bound and choice, one at a time, and check that every key is read.

    Args:
        stages: names of the task's stages in dvc.yaml: train@causal.

    Raises:
        ConfigError: with every problem.
    """
    first = {key: spec.list_extremes()[0] for key, spec in space.keys.items()}
    base = make_settings(space, first, space.halving.epochs[-1])
    compositions, found = compose_stages(stages, base)
    # Without overrides, the compositions name every key of params.yaml that they read.
    used = [*compose_stages(stages, {})[0].values(), *compositions.values()]
    for key, spec in space.keys.items():
        for value in spec.list_extremes()[1:]:
            composed, problems = compose_stages(stages, {**base, key: value})
            found += problems
            used += composed.values()
    found += find_unused_keys(space, used)
    if found:
        raise ConfigError(list(dict.fromkeys(found)))
    fingerprints = {stage: fingerprint_stage(composition) for stage, composition in compositions.items()}
    return CheckedSpace(fingerprints, *choose_checkpoints(space, compositions[f"train@{space.task}"]))


def choose_checkpoints(space: Space, training: Composition) -> tuple[dict[str, Any], str]:
    """Return the settings with which a rung continues from the rung before, and a notice if it cannot."""
    if len(space.halving.epochs) == 1:
        return {}, ""
    schedule = find_value(training.values, "trainer.lr_scheduler_type")
    schedule = "linear" if schedule in (MISSING, None) else schedule
    if schedule not in SHARING_SCHEDULES:
        return {}, (
            f"trainer.lr_scheduler_type is {printable(schedule)}, so each rung trains from the beginning; with"
            f" {' or '.join(SHARING_SCHEDULES)} it continues from the checkpoint of the rung before"
        )
    if find_value(training.values, "hardware.ray") not in (MISSING, None):
        return {}, "hardware.ray keeps no checkpoints for other runs, so each rung trains from the beginning"
    unset = read_current_value(KEEP_FOR_BRANCHES_KEY) is None and KEEP_FOR_BRANCHES_KEY not in space.fixed
    return ({KEEP_FOR_BRANCHES_KEY: KEEP_FOR_BRANCHES_VALUE} if unset else {}), ""


def compose_stages(stages: Sequence[str], settings: Mapping[str, Any]) -> tuple[dict[str, Composition], list[str]]:
    """Return the compositions of `stages` with `settings`, and the problems of their configs."""
    compositions, problems = {}, []
    for stage in stages:
        name, _, item = stage.partition("@")
        overrides = [
            override
            for key, value in settings.items()
            if (override := make_override(name, item, key, value)) is not None
        ]
        try:
            compositions[stage] = composition = compose_config(name, overrides, item or None)
            load_config(get_config_class(name), composition)
        except ConfigError as error:
            problems += [f"{problem} ({stage})" for problem in error.problems]
    return compositions, problems


def make_override(stage: str, item: str, key: str, value: Any) -> str | None:
    """Return the override of a stage's command line that sets `key`; None if the stage does not read it."""
    parsed, root = parse_key(key), read_root(stage)
    if parsed.file != PARAMS.name:
        group = Path(parsed.file).parent.name
        if group not in (*root.groups, *(file.partition("/")[0] for file in root.files)):
            return None
        return format_override(f"++{parsed.name if group in GLOBAL_GROUPS else f'{group}.{parsed.name}'}", value)
    name = parsed.name.removeprefix(f"tasks.{item}.")
    group = name.removesuffix(".name")
    if group in root.groups:
        return format_override(group, value)
    return format_override(f"++{name}", value) if name in root.unset else None


def find_unused_keys(space: Space, compositions: Sequence[Composition]) -> Iterator[str]:
    """Yield keys of the search that no stage reads, with the nearest key that one reads."""
    used: dict[str, set[str]] = {}
    for composition in compositions:
        for file, names in get_used_params(composition).items():
            used.setdefault(file, set()).update(names)
    for text in (*space.keys, *space.fixed):
        key = parse_key(text)
        if key.file not in used:
            hint = suggest_name(key.file, sorted(used))
            yield f"{printable(text)}: no stage of {space.task} reads {printable(key.file)}; {hint}"
            continue
        names, known = used[key.file], dict(flatten_values(read_yaml(CONF.parent / key.file)))
        is_read = any(key.name == name or key.name.startswith(f"{name}.") for name in names)
        if is_read and (key.may_be_new or read_current_value(text) is not MISSING):
            continue
        similar = [key for key in known if any(key == name or key.startswith(f"{name}.") for name in names)]
        hint = suggest_name(key.name, similar)
        if is_read and key.file != PARAMS.name:
            hint += f" To add it, write {key.file}:+{key.name}"
        yield f"{printable(text)}: {key.file} has no such key that a stage of {space.task} reads; {hint}"


def fingerprint_stage(composition: Composition) -> str:
    """Return a hash of a stage's code and of all values that it reads, without those of checkpoints."""
    package = get_package(composition.stage)
    values = dataclasses.asdict(load_config(get_config_class(package), composition))
    values.pop("checkpoints", None)
    names = (package, f"{package}-{composition.chosen.get('framework')}")
    codes = [_hash_stage_code(name) for name in list_root_modules(package) if name in names]
    content = json.dumps([values, codes], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


@functools.cache
def _hash_stage_code(name: str) -> str:
    return json.dumps(hash_code(name), sort_keys=True)
