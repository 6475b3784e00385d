"""Check the configuration of all stages for the current params.yaml, and report all problems together.

Command python -m tools.check

Composes the config of every stage that dvc.yaml defines, as the stage does when it runs, and validates it against the
stage's schema. Also checks that dvc.yaml declares exactly the values and the inputs that each stage uses.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import json
import shlex
import sys
import typing
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from dvc.config import ConfigError as DvcConfigError
from dvc.exceptions import DvcException, NotDvcRepoError
from dvc.repo import Repo
from dvc.scm import SCMError

from stages.core.artifacts import compute_sha256, get_versions
from stages.core.compose import (
    GLOBAL_GROUPS,
    PARAMS,
    Composition,
    Params,
    compose_config,
    get_package,
    load_config,
    read_root,
)
from stages.core.config import (
    CONF,
    MISSING,
    find_conflict_line,
    find_value,
    flatten_values,
    get_field_key,
    read_yaml,
    suggest_name,
)
from stages.core.errors import ConfigError, StageError, printable, printable_lines
from stages.core.source_code import hash_behavior, list_root_modules
from stages.core.starts import NO_START, find_start_problems
from stages.download.cleaning import find_unmet_requirements
from stages.download.files import PATH_LIMIT, find_files
from stages.score.items import read_items
from stages.shell.cache import get_cache_directory
from stages.train.checkpoints import LIBRARIES
from tools.architectures import find_config_keys, list_model_types
from tools.lock_history import find_lock, find_model_md5

ROOT = CONF.parent
# Unlike `git restore`, this also works during a merge or rebase.
RESTORE_LOCK = "run `git checkout HEAD -- dvc.lock`, then `dvc repro`; finished stages are restored from DVC's cache"
SOURCES_DIRECTORY = "data/sources"  # the stages source@NAME write their records here
# Stage package to its key with the path of the user's own files.
USER_PATH_KEYS = {"download": "data.path", "score": "pairs.path"}
# dvc.yaml depends on these files for a task that does not start from another task.
START_FILES = (f"models/{NO_START}", f"data/tokens/{NO_START}/tokenizer")
WHOLE_FILE = ""  # marker for all keys of a params file


class DeclaredStage(typing.NamedTuple):
    """A stage of dvc.yaml, with the values of params.yaml filled in."""

    name: str
    """DVC's name of the stage: train@causal."""
    stage: str
    """Name of the stage in conf/: train."""
    item: str | None
    """The task or source that the stage runs for."""
    deps: set[str]
    outs: set[str]
    params: dict[str, set[str]]
    """Params file to the dotted keys that DVC tracks; WHOLE_FILE if it tracks the whole file."""


def main() -> None:
    try:
        read_yaml(PARAMS)
        with Repo() as repo:
            stages = list(list_declared_stages(repo))
            problems = list(find_pipeline_problems(repo))
    except ConfigError as error:
        sys.exit(printable_lines(f"check: {error}"))
    except DvcException as error:
        sys.exit(printable_lines(f"check: {explain_dvc_error(error)}"))
    composed, found = compose_stages(stages)
    problems += found
    for find_problems in (
        find_missing_data,
        find_task_source_problems,
        find_pairs_problems,
        find_unread_params,
        find_unread_keys,
        find_architecture_problems,
        find_changed_pins,
        find_training_problems,
    ):
        problems += find_problems([composition for _, composition in composed])
    for stage, composition in composed:
        if not composition.problems and not composition.missing:
            problems += find_declaration_problems(stage, composition)
    problems += find_start_file_problems()
    problems += filter(None, [find_rwlock_problem()])
    for warning in find_other_versions():
        print(printable_lines(f"check: warning: {warning}"), file=sys.stderr)
    if problems:
        lines = "\n".join(f"  {problem}" for problem in dict.fromkeys(problems))
        sys.exit(printable_lines(f"check: the configuration is wrong:\n{lines}"))
    print(f"check: the configuration of {len(stages)} stages is in order")


def explain_dvc_error(error: DvcException) -> str:
    """Explain an error of DVC and how to fix its cause."""
    with contextlib.suppress(ConfigError):
        # DVC reports a wrong start as a cycle, or as a path that is both a dependency and an output.
        if problems := list(find_task_start_problems()):
            return "\n  ".join(problems)
    for name, remedy in (("dvc.yaml", "keep one of the two sides"), ("dvc.lock", RESTORE_LOCK)):
        file = ROOT / name
        if file.is_file() and (line := find_conflict_line(file.read_text(encoding="utf-8", errors="replace"))):
            return f"{name}:{line}: a merge conflict: {remedy}"
    if "dvc.lock" in str(error):  # DVC writes it in place
        return f"dvc.lock is truncated, probably because DVC was killed while writing it: {RESTORE_LOCK}"
    if (problem := find_rwlock_problem()) is not None:
        return problem
    if isinstance(error, SCMError):
        return f"{error}, which DVC needs: `git clone` the project, or run `git init` here"
    if isinstance(error, NotDvcRepoError):
        return f"{error}: the directory .dvc of the project is missing: `git checkout HEAD -- .dvc`"
    if isinstance(error, DvcConfigError):
        return f".dvc/config: {error}"
    return f"params.yaml and dvc.yaml do not fit together: {error}"


def find_task_start_problems() -> Iterator[str]:
    """Yield why a task cannot start from the task that params.yaml names."""
    tasks = Params().tasks
    for task, section in tasks.items():
        start, model = find_value(section, "start"), find_value(section, "model")
        if start is not MISSING:
            yield from find_start_problems(tasks, str(task), start, model if isinstance(model, str) else None)


def find_start_file_problems() -> Iterator[str]:
    """Yield problems with the files that dvc.yaml depends on for `start: none`."""
    if NO_START in Params().tasks:
        yield f"params.yaml: tasks.{NO_START}: `start: {NO_START}` means no start, so rename this task"
    for file in START_FILES:
        if not (ROOT / file).is_file():
            yield f"{file}: missing; dvc.yaml uses it for `start: {NO_START}`: run `git checkout HEAD -- {file}`"


def find_rwlock_problem() -> str | None:
    """Return how to fix DVC's .dvc/tmp/rwlock if it is truncated, which happens when DVC is killed while writing it."""
    file = ROOT / ".dvc/tmp/rwlock"
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        return None
    except ValueError:
        return (
            ".dvc/tmp/rwlock is truncated, probably because DVC was killed while writing it: make sure that no dvc is"
            " running here, then remove it (rm .dvc/tmp/rwlock)"
        )
    return None


# -- dvc.yaml ----------------------------------------------------------------------------------------------------------


def list_declared_stages(repo: Repo) -> Iterator[DeclaredStage]:
    """Yield the stages of dvc.yaml that are packages of stages/."""
    for stage in repo.index.stages:
        name, _, item = stage.addressing.partition("@")
        if is_project_stage(name):
            params = {dep.def_path: set(dep.params) or {WHOLE_FILE} for dep in stage.params}
            deps = {dep.def_path for dep in stage.deps if dep not in stage.params}
            outs = {out.def_path for out in stage.outs}
            yield DeclaredStage(stage.addressing, name, item or None, deps, outs, params)


def find_pipeline_problems(repo: Repo) -> Iterator[str]:
    """Yield forbidden settings of DVC, and commands in dvc.yaml other than `python -m stages.PACKAGE`."""
    if repo.config.get("hydra", {}).get("enabled"):
        yield (
            "hydra.enabled is on in DVC's configuration: with it, `dvc exp run` rewrites params.yaml and `dvc repro`"
            " composes nothing (run `dvc config hydra.enabled false`)"
        )
    for name, stage in yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"].items():
        command = str(stage.get("do", stage).get("cmd"))
        if "${" in command:
            yield f"dvc.yaml: {name}.cmd={command}: DVC passes it to a shell, so it must not contain ${{...}}"
        elif is_project_stage(name) and command != (expected := f"python -m stages.{get_package(name)}"):
            yield f"dvc.yaml: {name}.cmd={command}: it should be {expected}"


def is_project_stage(stage: str) -> bool:
    """Return True if a stage of dvc.yaml is a package of stages/. Stages that users add are not checked."""
    return (ROOT / "stages" / get_package(stage) / "__main__.py").is_file()


def find_declaration_problems(stage: DeclaredStage, composition: Composition) -> Iterator[str]:
    """Yield differences between the params, deps and outs that dvc.yaml declares and those that the stage uses."""
    used = get_used_params(composition)
    for file in sorted(used.keys() | stage.params.keys()):
        declared, needed = stage.params.get(file, set()), used.get(file, set())
        if declared == {WHOLE_FILE}:
            declared = set(read_yaml(ROOT / file))
            needed = {key.partition(".")[0] for key in needed}
        for key in sorted(needed - declared):
            yield f"dvc.yaml: {stage.name} uses {key} of {file}, but its params do not declare it"
        for key in sorted(declared - needed):
            if find_value(read_yaml(ROOT / file), key) is MISSING:
                yield f"{file}: key {key} is missing; dvc.yaml tracks it for {stage.name}: add it ({key}: null)"
                continue
            yield f"dvc.yaml: {stage.name} declares {key} of {file}, but the stage does not use it"
    paths, outs = get_used_paths(composition), stage.outs
    for path in sorted(paths - stage.deps - outs):
        yield f"dvc.yaml: {stage.name} uses {path}, but neither its deps nor its outs declare it"
    for path in sorted((stage.deps | outs) - paths):
        yield f"dvc.yaml: {stage.name} declares {path}, but the stage does not use it"


def get_used_params(composition: Composition) -> dict[str, set[str]]:
    """Return the dotted keys that a stage uses, by params file."""
    schema = get_config_class(composition.stage)
    used = {PARAMS.name: set(composition.params)} if composition.params else {}
    files = [*read_root(composition.stage).files, *(f"{group}/{name}" for group, name in composition.chosen.items())]
    for file in files:
        if keys := get_used_keys(schema, read_yaml(CONF / f"{file}.yaml"), file.partition("/")[0]):
            used[f"conf/{file}.yaml"] = keys
    return used


def get_used_keys(schema: Any, values: dict[str, Any], group: str) -> set[str]:
    """Return the dotted keys of a group's file that `schema` reads.

    A section is one key if the schema reads all of it. If its dataclass ignores extra keys, each key that the dataclass
    defines is returned separately.
    """
    if group not in GLOBAL_GROUPS:
        schema = next(field.type for field in dataclasses.fields(schema) if field.name == group)
    used: set[str] = set()
    for field in dataclasses.fields(schema):
        if (name := get_field_key(field)) in values:
            kind: Any = field.type
            partial = dataclasses.is_dataclass(kind) and kind.__pydantic_config__["extra"] == "ignore"  # type: ignore[union-attr]
            keys = [f"{name}.{get_field_key(part)}" for part in dataclasses.fields(kind)] if partial else [name]
            used.update(keys)
    return used


def get_used_paths(composition: Composition) -> set[str]:
    """Return the paths that a stage reads and writes: its code, its root config, and the paths in its config."""
    stage, package = composition.stage, get_package(composition.stage)
    if stage == "code":
        return {"stages", "conf/code.yaml", str(composition.values["out"])}
    names = {package, *(f"{package}-{name}" for name in composition.chosen.values())}
    code = {f"code/{name}.json" for name in names.intersection(list_root_modules(package))}
    paths = {
        # The value is None without a start: dvc.yaml then has the path of the placeholder task NO_START.
        path.replace("{start}", NO_START) if (value := find_value(composition.values, key)) is None else str(value)
        for key, path in read_root(stage).paths.items()
        if "/" in path
    }
    given = {str(find_value(composition.values, USER_PATH_KEYS[package]))} if package in USER_PATH_KEYS else set()
    return {*code, *paths, *given, f"conf/{stage}.yaml"}


# -- conf/ and params.yaml ---------------------------------------------------------------------------------------------


def compose_stages(stages: Iterable[DeclaredStage]) -> tuple[list[tuple[DeclaredStage, Composition]], list[str]]:
    """Compose the config of each stage.

    Returns:
        The stages that could be composed, each with its composition; and the distinct problems, each followed by the
        names of the stages that have it.
    """
    composed: list[tuple[DeclaredStage, Composition]] = []
    found: dict[str, list[str]] = {}
    for stage in stages:
        try:
            composition = compose_config(stage.stage, item=stage.item)
            composed.append((stage, composition))
            problems = list(find_missing_packages(load_config(get_config_class(stage.stage), composition)))
        except ConfigError as error:
            problems = error.problems
        for problem in problems:
            found.setdefault(problem, []).append(stage.name)
    return composed, [f"{problem} ({', '.join(names)})" for problem, names in found.items()]


def get_config_class(stage: str) -> Any:
    """Return the config dataclass of a stage."""
    stage = get_package(stage)
    name = "".join(word.title() for word in stage.split("_")) + "Config"
    return getattr(importlib.import_module(f"stages.{stage}.stage"), name)


def find_missing_packages(config: Any) -> Iterator[str]:
    """Yield optional libraries that a config needs and that are not installed, and missing files of cleaning steps."""
    framework, hardware = getattr(config, "framework", None), getattr(config, "hardware", None)
    if framework is not None and framework.name == "keras" and find_spec("keras_hub") is None:
        yield "framework=keras: KerasHub is not installed: run `make keras`"
    if hardware is not None and hardware.ray is not None and find_spec("ray") is None:
        yield "hardware.ray: Ray is not installed: run `make ray`"
    yield from find_unmet_requirements(getattr(getattr(config, "data", None), "clean", []))


def find_unread_params(compositions: list[Composition]) -> Iterator[str]:
    """Yield keys of params.yaml that no stage reads, probably because of a typo."""
    read = {key for composition in compositions for key in composition.params}
    for key in dict(flatten_values(read_yaml(PARAMS))).keys() - read:
        yield f"params.yaml: no stage reads the key {key}; {suggest_name(key, sorted(read))}"


def find_unread_keys(compositions: list[Composition]) -> Iterator[str]:
    """Yield keys of the chosen files of conf/ that no stage reads, probably because of a typo."""
    read: dict[str, set[str]] = {}
    for stage in {composition.stage for composition in compositions}:
        for field in dataclasses.fields(get_config_class(stage)):
            read.setdefault("", set()).add(field.name)
            if dataclasses.is_dataclass(field.type):
                read.setdefault(field.name, set()).update(
                    get_field_key(part) for part in dataclasses.fields(field.type)
                )
    chosen = {choice for composition in compositions for choice in composition.chosen.items()}
    for group, name in sorted(chosen):
        known = read[""] if group in GLOBAL_GROUPS else read[group]
        for key in read_yaml(CONF / group / f"{name}.yaml").keys() - known:
            yield f"conf/{group}/{name}.yaml: no stage reads the key {key}; {suggest_name(str(key), sorted(known))}"


def read_chosen_models(compositions: list[Composition]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield the file and the content of each chosen model configuration."""
    for name in sorted({item.chosen["model"] for item in compositions if "model" in item.chosen}):
        file = CONF / "model" / f"{name}.yaml"
        yield file, read_yaml(file)


def find_architecture_problems(compositions: list[Composition]) -> Iterator[str]:
    """Yield architectures that transformers does not have, and config keys that an architecture does not have."""
    for file, model in read_chosen_models(compositions):
        config = model.get("config")
        if not isinstance(config, dict) or "model_type" not in config:
            continue
        known = find_config_keys(config["model_type"])
        if known is None:
            name = str(config["model_type"])
            suggestion = suggest_name(name, list_model_types())
            yield f"{get_relative_path(file)}: config.model_type={name} is not a known architecture; {suggestion}"
            continue
        for key in sorted(set(config) - known):
            suggestion = suggest_name(key, sorted(known))
            yield f"{get_relative_path(file)}: config.{key} is not a key of {config['model_type']}; {suggestion}"


def find_training_problems(compositions: list[Composition]) -> Iterator[str]:
    """Yield values of a task's `trainer` or `adapter` section that transformers or peft would refuse or ignore.

    Importing the two takes several seconds. Values that pass are therefore recorded in the cache directory, together
    with the versions of the installed libraries, and not tried again.
    """
    for composition in compositions:
        if composition.stage != "train" or composition.problems or composition.missing:
            continue
        try:
            config = load_config(get_config_class("train"), composition)
        except ConfigError:
            continue  # reported by compose_stages
        if config.framework.name != "trainer":
            continue
        values = {key: composition.values[key] for key in ("trainer", "learning_rate", "num_train_epochs")}
        if config.adapter is not None:
            values |= {key: composition.values[key] for key in ("adapter", "model")}
        modules = [ROOT / "stages/frameworks/trainer/arguments.py", ROOT / "stages/train/saving.py"]
        known = json.dumps([values, get_versions(*LIBRARIES), *map(hash_behavior, modules)])
        passed = get_cache_directory() / "passed" / hashlib.sha256(known.encode()).hexdigest()[:32]
        if passed.exists():
            continue
        from stages.frameworks.trainer.arguments import try_arguments
        from stages.train.saving import check_adapter

        try:
            try_arguments(config)
            if config.adapter is not None:
                check_adapter(config.adapter, config.model)
        except StageError as error:
            yield f"{error} (train@{composition.item})"
            continue
        with contextlib.suppress(OSError):  # without the record, the next check tries the values again
            passed.parent.mkdir(parents=True, exist_ok=True)
            passed.touch()


def find_changed_pins(compositions: list[Composition]) -> Iterator[str]:
    """Yield pinned local files that are missing or changed. Weights are hashed only if newer than the pin."""
    for file, model in read_chosen_models(compositions):
        origins = [source.get("from") for source in (model, model.get("tokenizer") or {})]
        yield from find_pinned_model_problems(get_relative_path(file), *origins)
        for source in (model, model.get("tokenizer") or {}):
            for name, pinned in (source.get("files") or {}).items():
                path = Path(str(source.get("path"))).expanduser() / name
                if not path.is_file():
                    yield f"{get_relative_path(file)}: {printable(path)} is pinned but does not exist"
                    continue
                newer = path.suffix != ".safetensors" or path.stat().st_mtime > file.stat().st_mtime
                if newer and compute_sha256(path) != pinned:
                    changed = f"{printable(path)} changed since it was pinned"
                    yield f"{get_relative_path(file)}: {changed} (python -m tools.pin_model pins it again)"


def find_pinned_model_problems(file: str, model: Any, tokenizer: Any) -> Iterator[str]:
    """Yield problems with the `from` sections of a model configuration, which pin a trained model and its tokenizer.

    The md5 of a trained model is compared with dvc.lock at the pinned revision, if git has that revision. The
    tokenizer must come from the same model.
    """
    valid = [origin for origin in (model, tokenizer) if isinstance(origin, dict) and origin.get("md5")]
    if len(valid) == 2 and model["md5"] != tokenizer["md5"]:
        names = [f"models/{origin.get('task')} of {printable(origin.get('rev'))}" for origin in valid]
        yield f"{file}: from is {names[0]}, tokenizer.from {names[1]}: a model continues with its own tokenizer"
    for origin in valid[:1]:
        lock = find_lock(str(origin.get("rev")))
        if lock is None:
            continue  # a clone without the experiment; the md5 is checked when the model is read
        md5, task = find_model_md5(lock, str(origin.get("task"))), printable(origin.get("task"))
        if md5 != origin["md5"]:
            name = Path(file).stem
            yield (
                f"{file}: models/{task} of {printable(origin.get('rev'))} has the md5 {md5}, but from.md5 is"
                f" {printable(origin['md5'])}: python -m tools.pin_model models/{task} --rev"
                f" {printable(origin.get('rev'))} --name {name} --force updates the pin"
            )


def get_relative_path(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def find_missing_data(compositions: list[Composition]) -> Iterator[str]:
    """Yield problems with a local data.path: it does not exist, or has no files that can be read."""
    for composition in compositions:
        is_download = get_package(composition.stage) == "download"
        path = str(find_value(composition.values, "data.path")) if is_download else "://"
        if "://" in path:
            continue
        kind = find_value(composition.values, "data.source")
        if kind == "sources":
            yield from find_source_problems(composition)
        elif not Path(path).exists():
            yield f"data.path={printable(path, PATH_LIMIT)}: no such file or directory"
        elif kind != "hub":
            try:
                find_files(path)
            except (StageError, OSError) as error:
                yield str(error)


def find_source_problems(composition: Composition) -> Iterator[str]:
    """Yield differences between a data set of several sources and the `sources` section of params.yaml."""
    file = f"conf/data/{composition.chosen['data']}.yaml"
    if composition.stage == "source":
        yield f"sources.{composition.item}.name: {file} itself combines sources: name a configuration of one source"
        return
    if (path := find_value(composition.values, "data.path")) != SOURCES_DIRECTORY:
        reads = f"data.source=sources ({file}) reads {SOURCES_DIRECTORY}"
        yield f"data.path={printable(path)}: {reads}: set data.path={SOURCES_DIRECTORY}"
    known = Params().list_items("source")
    for name in find_value(composition.values, "data.sources") or []:
        if name not in known:
            shown = printable(name)
            yield f"{file}: sources names {shown}: params.yaml has no sources.{shown}; {suggest_name(str(name), known)}"
    for directory in sorted(Path(SOURCES_DIRECTORY).glob("*/")):
        if directory.name not in known:
            remedy = f"remove it (rm -r {shlex.quote(str(directory))})"
            yield f"{printable(directory)} belongs to no source of params.yaml: {remedy}"


def find_task_source_problems(compositions: list[Composition]) -> Iterator[str]:
    """Yield sources that a task chooses but the data set does not have."""
    for composition in compositions:
        chosen, data = find_value(composition.values, "sources"), composition.chosen.get("data")
        if composition.stage != "tokenize" or not isinstance(chosen, list) or data is None:
            continue
        values = read_yaml(CONF / "data" / f"{data}.yaml")
        known = [str(name) for name in values.get("sources") or []] if values.get("source") == "sources" else [data]
        for name in chosen:
            if name not in known:
                key = f"tasks.{composition.item}.sources"
                has = f"conf/data/{data}.yaml has no such source; {suggest_name(str(name), known)}"
                yield f"{key} names {printable(name)}: {has}"


def find_pairs_problems(compositions: list[Composition]) -> Iterator[str]:
    """Yield why a `score` stage could not read its pairs, or its model could not score them."""
    positions = {
        item.item: find_value(item.values, "model.max_positions") for item in compositions if item.stage == "train"
    }
    for composition in compositions:
        if composition.stage != "score" or composition.problems or composition.missing:
            continue
        section, tasks = f"pairs.{composition.item}", Params().list_items("task")
        if composition.item not in tasks:
            yield f"params.yaml: {section}: there is no such task; {suggest_name(str(composition.item), tasks)}"
        try:
            pairs = load_config(get_config_class("score"), composition).pairs
        except ConfigError:
            continue  # reported by compose_stages
        if pairs.context > positions.get(composition.item, pairs.context):
            most = positions[composition.item]
            yield f"pairs.context={pairs.context} is above the model's positions, {most} (score@{composition.item})"
        if not Path(pairs.path).is_file():  # pairs from the Hub need the file too: it is a dependency in dvc.yaml
            yield f"{section}.path={printable(pairs.path, PATH_LIMIT)}: no such file"
        elif pairs.hub is None:
            try:
                read_items(pairs)
            except (StageError, OSError) as error:
                yield str(error)


def find_other_versions() -> Iterator[str]:
    """Yield artifacts that were made with another version of a library than the installed one."""
    files = [*Path("data").glob("**/stats.json"), *Path("reports").glob("train/*/stats.json")]
    for directory, library, used, installed in compare_versions({str(file.parent): file for file in files}):
        remedy = "`dvc repro -f` runs all stages again"
        yield f"{directory} was made with {library} {used}; installed is {installed} ({remedy})"


def compare_versions(ledgers: dict[str, Path]) -> Iterator[tuple[str, str, str, str]]:
    """Yield artifact, library, its version in the ledger and the installed version, for each version that differs.

    Args:
        ledgers: artifact to its ledger.
    """
    made: dict[tuple[str, str], str] = {}
    for artifact, ledger in ledgers.items():
        for library, used in json.loads(ledger.read_text(encoding="utf-8")).get("versions", {}).items():
            made.setdefault((library, used), artifact)
    for (library, used), artifact in sorted(made.items()):
        try:
            installed = version(library)
        except PackageNotFoundError:
            installed = "none"
        if installed != used:
            yield artifact, library, used, installed


if __name__ == "__main__":
    main()
