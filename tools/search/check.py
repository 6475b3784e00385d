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
# Numbers of steps that differ between runs of different lengths if they are below 1, a fraction of all steps.
_STEP_COUNTS = ("warmup_ratio", "warmup_steps", "eval_steps", "logging_steps", "save_steps")
# Objective to the metrics that a search can minimize.
METRICS = {"causal": ("bits_per_byte", "loss"), "mlm": ("pseudo_bits_per_byte", "masked_loss")}
KEEP_FOR_BRANCHES_KEY = "conf/base/hardware.yaml:checkpoints.keep_for_branches"
KEEP_FOR_BRANCHES_VALUE = {"every_steps": None, "gigabytes": 10.0, "directory": None}


class CheckedSpace(NamedTuple):
    """What the composed configs of a task's stages say about a search space."""

    fingerprints: dict[str, str]
    """Stage to a hash of its code and of all values that it reads in one of the checked runs."""
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
    others = [{**base, key: value} for key, spec in space.keys.items() for value in spec.list_extremes()[1:]]
    # Without overrides, the compositions name every key of params.yaml that they read.
    used = [*compose_stages(stages, {})[0].values()]
    runs: list[dict[str, Composition]] = []
    found: list[str] = []
    for settings in (base, *others):
        composed, problems = compose_stages(stages, settings)
        found += problems
        runs.append(composed)
        used += composed.values()
    found += find_unused_keys(space, used)
    training = f"train@{space.task}"
    found += [problem for run in runs if training in run for problem in find_metric_problems(space, run[training])]
    if found:
        raise ConfigError(list(dict.fromkeys(found)))
    fingerprints = {stage: fingerprint_stage([run[stage] for run in runs]) for stage in stages}
    return CheckedSpace(fingerprints, *choose_checkpoints(space, [run[training] for run in runs]))


def find_metric_problems(space: Space, training: Composition) -> Iterator[str]:
    """Yield the problem of a metric that the objective of the task does not have."""
    metrics = METRICS.get(find_value(training.values, "objective.name"), ())
    if space.metric is not None and metrics and space.metric not in metrics:
        yield f"metric={space.metric}: {space.task} has {' and '.join(metrics)}"


def choose_checkpoints(space: Space, trainings: Sequence[Composition]) -> tuple[dict[str, Any], str]:
    """Return the settings with which a rung continues from the rung before, and a notice if it cannot."""
    if len(space.halving.epochs) == 1:
        return {}, ""
    for training in trainings:
        if reason := explain_unshared_steps(training):
            return {}, f"{reason}, so each rung trains from the beginning"
    unset = read_current_value(KEEP_FOR_BRANCHES_KEY) is None and KEEP_FOR_BRANCHES_KEY not in space.fixed
    return ({KEEP_FOR_BRANCHES_KEY: KEEP_FOR_BRANCHES_VALUE} if unset else {}), ""


def explain_unshared_steps(training: Composition) -> str:
    """Return the reason why a training cannot continue from the checkpoint of a shorter one; empty if it can."""
    if find_value(training.values, "hardware.ray") not in (MISSING, None):
        return "hardware.ray keeps no checkpoints for other runs"
    arguments = find_value(training.values, "trainer")
    schedule = arguments.get("lr_scheduler_type") or "linear"
    if schedule not in SHARING_SCHEDULES:
        return f"trainer.lr_scheduler_type is {printable(schedule)}, not {' or '.join(SHARING_SCHEDULES)}"
    fractions = {name: arguments[name] for name in _STEP_COUNTS if 0 < (arguments.get(name) or 0) < 1}
    return next((f"trainer.{name}={value} is a fraction of all steps" for name, value in fractions.items()), "")


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


def fingerprint_stage(compositions: Sequence[Composition]) -> str:
    """Return a hash of a stage's code and of all values that it reads in any of its compositions.

    Values of `checkpoints` are left out, because they do not change a result.
    """
    contents = []
    for composition in compositions:
        package = get_package(composition.stage)
        values = dataclasses.asdict(load_config(get_config_class(package), composition))
        values.pop("checkpoints", None)
        names = (package, f"{package}-{composition.chosen.get('framework')}")
        contents.append([values, [_hash_stage_code(name) for name in list_root_modules(package) if name in names]])
    return hashlib.sha256(json.dumps(contents, sort_keys=True, default=str).encode()).hexdigest()[:16]


@functools.cache
def _hash_stage_code(name: str) -> str:
    return json.dumps(hash_code(name), sort_keys=True)
