"""Check the configuration of the current params.yaml, all stages and all problems at once, before any work.

Command python -m tools.check

Takes from dvc.yaml the very commands that `dvc repro` would run, composes each as Hydra would, checks it against its
schema, and checks that every key of the chosen files is one that some stage reads.
"""

import dataclasses
import importlib
import json
import shlex
import sys
import typing
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from dvc.exceptions import DvcException
from dvc.repo import Repo
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from stages.core.config import CONF, load, nearest
from stages.core.errors import ConfigError
from stages.hub.files import sha256
from tools.architectures import config_keys, model_types

GROUPS = ("data", "model", "adapter", "task", "hardware", "framework")
GLOBAL_GROUPS = ("adapter", "task", "hardware")  # their files contribute to the root (`# @package _global_`)


class Command(typing.NamedTuple):
    """A stage's command, taken apart."""

    name: str
    """As DVC names it: train@causal."""
    stage: str
    """As conf/ and stages/ name it: train."""
    overrides: list[str]


def main() -> None:
    try:
        commands = list(pipeline())
    except DvcException as error:
        if "dvc.lock" in str(error):  # which DVC writes in place
            sys.exit(
                "check: dvc.lock was cut short, by a kill while DVC wrote it? Run `git restore dvc.lock`; what finished"
                " stages made comes back from DVC's cache"
            )
        sys.exit(f"check: params.yaml and dvc.yaml do not fit together: {error}")
    except ValueError as error:
        sys.exit(f"check: a value of params.yaml cannot be passed to a stage, does it hold a quote? ({error})")
    checks = (unknown_choices, missing_source, wrong_configs, unused_keys, wrong_architectures, changed_pins)
    problems = dict.fromkeys(problem for check in checks for problem in check(commands))
    for warning in other_versions():
        print(f"check: warning: {warning}", file=sys.stderr)
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        sys.exit(f"check: the configuration is wrong:\n{lines}")
    print(f"check: the configuration of {len(commands)} stages is in order")


def pipeline() -> Iterator[Command]:
    """The commands of dvc.yaml with the values of params.yaml in place."""
    with Repo() as repo:
        for stage in repo.index.stages:
            python, flag, module, *overrides = shlex.split(stage.cmd)
            assert (python, flag) == ("python", "-m"), stage.cmd
            yield Command(stage.addressing, module.removeprefix("stages."), overrides)


def schema_of(stage: str) -> Any:
    """The config dataclass in the stage's module."""
    name = "".join(word.title() for word in stage.split("_")) + "Config"
    return getattr(importlib.import_module(f"stages.{stage}.stage"), name)


def wrong_configs(commands: list[Command]) -> Iterator[str]:
    """What Hydra or the schemas have against the stages' configs, each problem once with the stages that have it."""
    found: dict[str, list[str]] = {}
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for command in commands:
            for problem in problems_of(command):
                found.setdefault(problem, []).append(command.name)
    for problem, names in found.items():
        yield f"{problem} ({', '.join(names)})"


def problems_of(command: Command) -> list[str]:
    """What is wrong with one stage's config, unknown choices aside."""
    unknown = [group for group, name in choices(command).items() if name not in configurations(group)]
    known = [item for item in command.overrides if item.partition("=")[0] not in unknown]
    try:
        config = load(schema_of(command.stage), compose(command.stage, known), command.stage, unchosen=unknown)
    except ConfigError as error:
        return [problem for problem in error.problems if " is not chosen: " not in problem]
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        return [" ".join(str(error).split())]
    return list(missing_packages(config))


def missing_packages(config: Any) -> Iterator[str]:
    """Libraries of an extra that a stage's config asks for and that are not installed."""
    framework, hardware = getattr(config, "framework", None), getattr(config, "hardware", None)
    if framework is not None and framework.name == "keras" and find_spec("keras_hub") is None:
        yield "framework=keras: KerasHub is not installed: run `make keras`"
    if hardware is not None and hardware.ray is not None and find_spec("ray") is None:
        yield "hardware.ray: Ray is not installed: run `make ray`"


def choices(command: Command) -> dict[str, str]:
    """Config group to the configuration that the command chooses."""
    parsed = OverridesParser.create().parse_overrides(command.overrides)
    return {item.key_or_group: str(item.value()) for item in parsed if item.key_or_group in GROUPS}


def configurations(group: str) -> list[str]:
    """The configurations of a group."""
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))


def unknown_choices(commands: list[Command]) -> Iterator[str]:
    """Names in params.yaml for which conf/ has no file."""
    for command in commands:
        for group, name in choices(command).items():
            if name not in configurations(group):
                task = command.name.partition("@")[2]
                key = f"{task}.{group}" if group in ("model", "adapter") else {"data": "data.name"}.get(group, group)
                yield f"{key}={name}: there is no conf/{group}/{name}.yaml; {nearest(name, configurations(group))}"


def unused_keys(commands: list[Command]) -> Iterator[str]:
    """Keys of the chosen files that no stage reads: misspelt ones."""
    read: dict[str, set[str]] = {}
    for stage in {command.stage for command in commands}:
        for field in dataclasses.fields(schema_of(stage)):
            read.setdefault("", set()).add(field.name)
            if dataclasses.is_dataclass(field.type):
                read.setdefault(field.name, set()).update(part.name for part in dataclasses.fields(field.type))
    chosen = {choice for command in commands for choice in choices(command).items()}
    for group, name in sorted(chosen):
        file = CONF / group / f"{name}.yaml"
        if not file.is_file():
            continue
        known = read[""] if group in GLOBAL_GROUPS else read[group]
        try:
            keys = yaml.safe_load(file.read_text(encoding="utf-8"))
        except yaml.YAMLError:
            continue  # composing it says so
        for key in set(keys or {}) - known:
            yield f"conf/{group}/{name}.yaml: no stage reads the key {key}; {nearest(str(key), sorted(known))}"


def chosen_models(commands: list[Command]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """File and content of each model configuration that is chosen and can be read."""
    names = {choices(command)["model"] for command in commands if "model" in choices(command)}
    for name in sorted(names & set(configurations("model"))):
        file = CONF / "model" / f"{name}.yaml"
        try:
            yield file, yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        except yaml.YAMLError:
            continue  # composing it says so


def wrong_architectures(commands: list[Command]) -> Iterator[str]:
    """Architectures, and keys of their configurations, that transformers does not know."""
    for file, model in chosen_models(commands):
        config = model.get("config")
        if not isinstance(config, dict) or "model_type" not in config:
            continue
        known = config_keys(config["model_type"])
        if known is None:
            name = str(config["model_type"])
            yield f"{where(file)}: config.model_type={name} is no architecture; {nearest(name, model_types())}"
            continue
        for key in sorted(set(config) - known):
            yield f"{where(file)}: config.{key} is no key of {config['model_type']}; {nearest(key, sorted(known))}"


def changed_pins(commands: list[Command]) -> Iterator[str]:
    """Local files that are not what their pin says. Weights are hashed anew only if newer than the pin."""
    for file, model in chosen_models(commands):
        for source in (model, model.get("tokenizer") or {}):
            for name, pinned in (source.get("files") or {}).items():
                path = Path(str(source.get("path"))).expanduser() / name
                if not path.is_file():
                    yield f"{where(file)}: {path} is pinned but not there"
                    continue
                newer = path.suffix != ".safetensors" or path.stat().st_mtime > file.stat().st_mtime
                if newer and sha256(path) != pinned:
                    yield f"{where(file)}: {path} changed since its pin (python -m tools.pin_model pins it anew)"


def where(file: Path) -> str:
    return file.relative_to(CONF.parent).as_posix()


def missing_source(commands: list[Command]) -> Iterator[str]:
    """The user's own text, where it is a local path that is not there."""
    for command in commands:
        for item in OverridesParser.create().parse_overrides(command.overrides):
            path = str(item.value())
            if item.key_or_group == "data.path" and "://" not in path and not Path(path).exists():
                yield f"data.path={path}: no such file or directory"


def other_versions() -> Iterator[str]:
    """Libraries that made the artifacts in another version than the one installed."""
    made: dict[tuple[str, str], str] = {}
    for ledger in [*Path("data").glob("**/stats.json"), *Path("reports").glob("train/*/stats.json")]:
        for library, used in json.loads(ledger.read_text(encoding="utf-8")).get("versions", {}).items():
            made.setdefault((library, used), str(ledger.parent))
    for (library, used), where in sorted(made.items()):
        try:
            installed = version(library)
        except PackageNotFoundError:
            installed = "none"
        if installed != used:
            yield f"{where} was made with {library} {used}; installed is {installed} (`dvc repro -f` makes all anew)"


if __name__ == "__main__":
    main()
