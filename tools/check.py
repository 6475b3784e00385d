"""Check the configuration of the current params.yaml, all stages and all problems at once, before any work.

Command python -m tools.check

Composes the config of every stage that dvc.yaml defines, as the stage itself will, checks it against its schema, and
checks that dvc.yaml declares exactly the values and the inputs that the stage uses.
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

from stages.core.artifacts import sha256, versions
from stages.core.compose import GLOBAL_GROUPS, PARAMS, Composition, Params, compose, load, package_of, read_root
from stages.core.config import CONF, MISSING, conflict_line, find, flat, key_of, nearest, read_yaml
from stages.core.errors import ConfigError, StageError, printable, printable_lines
from stages.core.source_code import hash_behaviour, hashed_names
from stages.core.starts import NO_START, wrong_start
from stages.download.cleaning import unmet
from stages.download.files import PATH_LIMIT, find_files
from stages.score.items import read_items
from stages.shell.cache import cache_directory
from stages.train.checkpoints import LIBRARIES
from tools.architectures import config_keys, model_types
from tools.lock_history import find_lock, trained_md5

ROOT = CONF.parent
# Unlike `git restore`, it also works during a merge or rebase.
RESTORE_LOCK = "run `git checkout HEAD -- dvc.lock`, then `dvc repro`; what finished stages made comes from DVC's cache"
SOURCES = "data/sources"  # where the stages source@NAME put their records
_GIVEN_PATHS = {"download": "data.path", "score": "pairs.path"}  # of a user's own files, by the package that reads them
# What dvc.yaml names for a task that starts from no other.
START_FILES = (f"models/{NO_START}", f"data/tokens/{NO_START}/tokenizer")
WHOLE_FILE = ""  # the key of a params file that dvc.yaml declares as a whole


class Declared(typing.NamedTuple):
    """A stage as dvc.yaml defines it, with the values of params.yaml in place."""

    name: str
    """As DVC names it: train@causal."""
    stage: str
    """As conf/ names it: train."""
    item: str | None
    """The task or source that it runs for."""
    deps: set[str]
    outs: set[str]
    params: dict[str, set[str]]
    """Params file to the dotted keys that are tracked; WHOLE_FILE for all of a file."""


def main() -> None:
    try:
        read_yaml(PARAMS)
        with Repo() as repo:
            stages = list(declared_stages(repo))
            problems = list(pipeline_problems(repo))
    except ConfigError as error:
        sys.exit(printable_lines(f"check: {error}"))
    except DvcException as error:
        sys.exit(printable_lines(f"check: {dvc_problem(error)}"))
    composed, found = compose_stages(stages)
    problems += found
    for check in (
        missing_source,
        wrong_task_sources,
        wrong_pairs,
        unread_params,
        unread_keys,
        wrong_architectures,
        changed_pins,
        refused_trainings,
    ):
        problems += check([composition for _, composition in composed])
    for stage, composition in composed:
        if not composition.problems and not composition.missing:
            problems += undeclared(stage, composition)
    problems += wrong_start_files()
    problems += filter(None, [damaged_rwlock()])
    for warning in other_versions():
        print(printable_lines(f"check: warning: {warning}"), file=sys.stderr)
    if problems:
        lines = "\n".join(f"  {problem}" for problem in dict.fromkeys(problems))
        sys.exit(printable_lines(f"check: the configuration is wrong:\n{lines}"))
    print(f"check: the configuration of {len(stages)} stages is in order")


def dvc_problem(error: DvcException) -> str:
    """What DVC's `error` means, and what to do about it."""
    with contextlib.suppress(ConfigError):
        if problems := list(wrong_starts()):  # which DVC calls a cycle, or items defined as a dependency and an output
            return "\n  ".join(problems)
    for name, remedy in (("dvc.yaml", "keep one of the two sides"), ("dvc.lock", RESTORE_LOCK)):
        file = ROOT / name
        if file.is_file() and (line := conflict_line(file.read_text(encoding="utf-8", errors="replace"))):
            return f"{name}:{line}: a merge conflict: {remedy}"
    if "dvc.lock" in str(error):  # which DVC writes in place
        return f"dvc.lock was cut short, by a kill while DVC wrote it? {RESTORE_LOCK}"
    if (problem := damaged_rwlock()) is not None:
        return problem
    if isinstance(error, SCMError):
        return f"{error}, which DVC needs: `git clone` the project, or run `git init` here"
    if isinstance(error, NotDvcRepoError):
        return f"{error}: the directory .dvc of the project is missing: `git checkout HEAD -- .dvc`"
    if isinstance(error, DvcConfigError):
        return f".dvc/config: {error}"
    return f"params.yaml and dvc.yaml do not fit together: {error}"


def wrong_starts() -> Iterator[str]:
    """What keeps tasks from starting from those that they name."""
    tasks = Params().tasks
    for task, section in tasks.items():
        start, model = find(section, "start"), find(section, "model")
        if start is not MISSING:
            yield from wrong_start(tasks, str(task), start, model if isinstance(model, str) else None)


def wrong_start_files() -> Iterator[str]:
    """What keeps dvc.yaml from naming a file for a task that starts from no other."""
    if NO_START in Params().tasks:
        yield f"params.yaml: tasks.{NO_START}: `start: {NO_START}` would not name this task: give it another name"
    for file in START_FILES:
        if not (ROOT / file).is_file():
            yield f"{file} is missing, which dvc.yaml names for `start: {NO_START}`: `git checkout HEAD -- {file}`"


def damaged_rwlock() -> str | None:
    """What to do about the file by which DVC's processes know of each other, where a kill has cut it short."""
    file = ROOT / ".dvc/tmp/rwlock"
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        return None
    except ValueError:
        return (
            ".dvc/tmp/rwlock was cut short, by a kill while DVC wrote it? When no dvc runs here, remove it"
            " (rm .dvc/tmp/rwlock): DVC writes a new one"
        )
    return None


# -- dvc.yaml ----------------------------------------------------------------------------------------------------------


def declared_stages(repo: Repo) -> Iterator[Declared]:
    """The stages of dvc.yaml that are packages of stages/."""
    for stage in repo.index.stages:
        name, _, item = stage.addressing.partition("@")
        if _is_ours(name):
            params = {dep.def_path: set(dep.params) or {WHOLE_FILE} for dep in stage.params}
            deps = {dep.def_path for dep in stage.deps if dep not in stage.params}
            outs = {out.def_path for out in stage.outs}
            yield Declared(stage.addressing, name, item or None, deps, outs, params)


def pipeline_problems(repo: Repo) -> Iterator[str]:
    """What dvc.yaml and DVC's own configuration should not have."""
    if repo.config.get("hydra", {}).get("enabled"):
        yield (
            "hydra.enabled is on in DVC's configuration: `dvc exp run` would rewrite params.yaml, and `dvc repro` would"
            " compose nothing (run `dvc config hydra.enabled false`)"
        )
    for name, stage in yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"].items():
        command = str(stage.get("do", stage).get("cmd"))
        if "${" in command:
            yield f"dvc.yaml: {name}.cmd={command}: DVC passes it to a shell, so that no value may stand in it"
        elif _is_ours(name) and command != (expected := f"python -m stages.{package_of(name)}"):
            yield f"dvc.yaml: {name}.cmd={command}: it should be {expected}"


def _is_ours(stage: str) -> bool:
    """Whether a stage of dvc.yaml is a package of stages/; one of another kind is its user's own business."""
    return (ROOT / "stages" / package_of(stage) / "__main__.py").is_file()


def undeclared(stage: Declared, composition: Composition) -> Iterator[str]:
    """What dvc.yaml declares for a stage and the stage does not use, and the other way round."""
    used = used_params(composition)
    for file in sorted(used.keys() | stage.params.keys()):
        declared, needed = stage.params.get(file, set()), used.get(file, set())
        if declared == {WHOLE_FILE}:
            declared = set(read_yaml(ROOT / file))
            needed = {key.partition(".")[0] for key in needed}
        for key in sorted(needed - declared):
            yield f"dvc.yaml: {stage.name} uses {key} of {file}, and params does not declare it"
        for key in sorted(declared - needed):
            if find(read_yaml(ROOT / file), key) is MISSING:
                yield f"{file}: no key {key}, which dvc.yaml tracks for {stage.name}: add it ({key}: null)"
                continue
            yield f"dvc.yaml: {stage.name} declares {key} of {file}, and does not use it"
    paths, outs = used_paths(composition), stage.outs
    for path in sorted(paths - stage.deps - outs):
        yield f"dvc.yaml: {stage.name} uses {path}, and neither deps nor outs declares it"
    for path in sorted((stage.deps | outs) - paths):
        yield f"dvc.yaml: {stage.name} declares {path}, and does not use it"


def used_params(composition: Composition) -> dict[str, set[str]]:
    """Params file to the dotted keys of it that a stage uses."""
    schema = schema_of(composition.stage)
    used = {PARAMS.name: set(composition.params)} if composition.params else {}
    files = [*read_root(composition.stage).files, *(f"{group}/{name}" for group, name in composition.chosen.items())]
    for file in files:
        if keys := used_keys(schema, read_yaml(CONF / f"{file}.yaml"), file.partition("/")[0]):
            used[f"conf/{file}.yaml"] = keys
    return used


def used_keys(schema: Any, values: dict[str, Any], group: str) -> set[str]:
    """Dotted keys of a group's file that `schema` takes in; a section of which it is a part counts key by key."""
    if group not in GLOBAL_GROUPS:
        schema = next(field.type for field in dataclasses.fields(schema) if field.name == group)
    used: set[str] = set()
    for field in dataclasses.fields(schema):
        if (name := key_of(field)) in values:
            kind: Any = field.type
            partial = dataclasses.is_dataclass(kind) and kind.__pydantic_config__["extra"] == "ignore"  # type: ignore[union-attr]
            keys = [f"{name}.{key_of(part)}" for part in dataclasses.fields(kind)] if partial else [name]
            used.update(keys)
    return used


def used_paths(composition: Composition) -> set[str]:
    """What a stage reads and writes: its code, its root config, and the paths in its config."""
    stage, package = composition.stage, package_of(composition.stage)
    if stage == "code":
        return {"stages", "conf/code.yaml", str(composition.values["out"])}
    names = {package, *(f"{package}-{name}" for name in composition.chosen.values())}
    code = {f"code/{name}.json" for name in names.intersection(hashed_names(package))}
    paths = {
        # Without a start, what stands for none in dvc.yaml.
        path.replace("{start}", NO_START) if (value := find(composition.values, key)) is None else str(value)
        for key, path in read_root(stage).paths.items()
        if "/" in path
    }
    given = {str(find(composition.values, _GIVEN_PATHS[package]))} if package in _GIVEN_PATHS else set()
    return {*code, *paths, *given, f"conf/{stage}.yaml"}


# -- conf/ and params.yaml ---------------------------------------------------------------------------------------------


def compose_stages(stages: Iterable[Declared]) -> tuple[list[tuple[Declared, Composition]], list[str]]:
    """The stages whose configs could be composed, and all problems, each once with the stages that have it."""
    composed: list[tuple[Declared, Composition]] = []
    found: dict[str, list[str]] = {}
    for stage in stages:
        try:
            composition = compose(stage.stage, item=stage.item)
            composed.append((stage, composition))
            problems = list(missing_packages(load(schema_of(stage.stage), composition)))
        except ConfigError as error:
            problems = error.problems
        for problem in problems:
            found.setdefault(problem, []).append(stage.name)
    return composed, [f"{problem} ({', '.join(names)})" for problem, names in found.items()]


def schema_of(stage: str) -> Any:
    """The config dataclass in the stage's module."""
    stage = package_of(stage)
    name = "".join(word.title() for word in stage.split("_")) + "Config"
    return getattr(importlib.import_module(f"stages.{stage}.stage"), name)


def missing_packages(config: Any) -> Iterator[str]:
    """Libraries of an extra that a stage's config asks for and that are not installed, and files of cleaning steps."""
    framework, hardware = getattr(config, "framework", None), getattr(config, "hardware", None)
    if framework is not None and framework.name == "keras" and find_spec("keras_hub") is None:
        yield "framework=keras: KerasHub is not installed: run `make keras`"
    if hardware is not None and hardware.ray is not None and find_spec("ray") is None:
        yield "hardware.ray: Ray is not installed: run `make ray`"
    yield from unmet(getattr(getattr(config, "data", None), "clean", []))


def unread_params(compositions: list[Composition]) -> Iterator[str]:
    """Keys of params.yaml that no stage reads: misspelt ones."""
    read = {key for composition in compositions for key in composition.params}
    for key in dict(flat(read_yaml(PARAMS))).keys() - read:
        yield f"params.yaml: no stage reads the key {key}; {nearest(key, sorted(read))}"


def unread_keys(compositions: list[Composition]) -> Iterator[str]:
    """Keys of the chosen files that no stage reads: misspelt ones."""
    read: dict[str, set[str]] = {}
    for stage in {composition.stage for composition in compositions}:
        for field in dataclasses.fields(schema_of(stage)):
            read.setdefault("", set()).add(field.name)
            if dataclasses.is_dataclass(field.type):
                read.setdefault(field.name, set()).update(key_of(part) for part in dataclasses.fields(field.type))
    chosen = {choice for composition in compositions for choice in composition.chosen.items()}
    for group, name in sorted(chosen):
        known = read[""] if group in GLOBAL_GROUPS else read[group]
        for key in read_yaml(CONF / group / f"{name}.yaml").keys() - known:
            yield f"conf/{group}/{name}.yaml: no stage reads the key {key}; {nearest(str(key), sorted(known))}"


def chosen_models(compositions: list[Composition]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """File and content of each model configuration that is chosen."""
    for name in sorted({item.chosen["model"] for item in compositions if "model" in item.chosen}):
        file = CONF / "model" / f"{name}.yaml"
        yield file, read_yaml(file)


def wrong_architectures(compositions: list[Composition]) -> Iterator[str]:
    """Architectures, and keys of their configurations, that transformers does not know."""
    for file, model in chosen_models(compositions):
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


def refused_trainings(compositions: list[Composition]) -> Iterator[str]:
    """What transformers or peft would refuse of a task's `trainer` or `adapter` section, or ignore.

    To ask them takes some seconds of imports: what passed is remembered, for the installed libraries.
    """
    for composition in compositions:
        if composition.stage != "train" or composition.problems or composition.missing:
            continue
        try:
            config = load(schema_of("train"), composition)
        except ConfigError:
            continue  # said already
        if config.framework.name != "trainer":
            continue
        values = {key: composition.values[key] for key in ("trainer", "learning_rate", "num_train_epochs")}
        if config.adapter is not None:
            values |= {key: composition.values[key] for key in ("adapter", "model")}
        modules = [ROOT / "stages/frameworks/trainer/arguments.py", ROOT / "stages/train/saving.py"]
        known = json.dumps([values, versions(*LIBRARIES), *map(hash_behaviour, modules)])
        passed = cache_directory() / "passed" / hashlib.sha256(known.encode()).hexdigest()[:32]
        if passed.exists():
            continue
        from stages.frameworks.trainer.arguments import try_arguments
        from stages.train.saving import try_adapter

        try:
            try_arguments(config)
            if config.adapter is not None:
                try_adapter(config.adapter, config.model)
        except StageError as error:
            yield f"{error} (train@{composition.item})"
            continue
        with contextlib.suppress(OSError):  # then it is asked again
            passed.parent.mkdir(parents=True, exist_ok=True)
            passed.touch()


def changed_pins(compositions: list[Composition]) -> Iterator[str]:
    """Local files that are not what their pin says. Weights are hashed anew only if newer than the pin."""
    for file, model in chosen_models(compositions):
        origins = [source.get("from") for source in (model, model.get("tokenizer") or {})]
        yield from wrong_origins(where(file), *origins)
        for source in (model, model.get("tokenizer") or {}):
            for name, pinned in (source.get("files") or {}).items():
                path = Path(str(source.get("path"))).expanduser() / name
                if not path.is_file():
                    yield f"{where(file)}: {printable(path)} is pinned but not there"
                    continue
                newer = path.suffix != ".safetensors" or path.stat().st_mtime > file.stat().st_mtime
                if newer and sha256(path) != pinned:
                    shown = printable(path)
                    yield f"{where(file)}: {shown} changed since its pin (python -m tools.pin_model pins it anew)"


def wrong_origins(file: str, model: Any, tokenizer: Any) -> Iterator[str]:
    """Trained models that are not what their pin says, where git knows their revision, and a tokenizer of another."""
    valid = [origin for origin in (model, tokenizer) if isinstance(origin, dict) and origin.get("md5")]
    if len(valid) == 2 and model["md5"] != tokenizer["md5"]:
        whose = [f"models/{origin.get('task')} of {printable(origin.get('rev'))}" for origin in valid]
        yield f"{file}: from is {whose[0]}, tokenizer.from {whose[1]}: a model goes on with its own tokenizer"
    for origin in valid[:1]:
        lock = find_lock(str(origin.get("rev")))
        if lock is None:
            continue  # a clone without the experiment: the md5 decides
        md5, task = trained_md5(lock, str(origin.get("task"))), printable(origin.get("task"))
        if md5 != origin["md5"]:
            name = Path(file).stem
            yield (
                f"{file}: models/{task} of {printable(origin.get('rev'))} has the md5 {md5}, and from.md5 is"
                f" {printable(origin['md5'])}: python -m tools.pin_model models/{task} --rev"
                f" {printable(origin.get('rev'))} --name {name} --force pins what it is now"
            )


def where(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def missing_source(compositions: list[Composition]) -> Iterator[str]:
    """The user's own text, where it is a local path at which none can be read."""
    for composition in compositions:
        is_download = package_of(composition.stage) == "download"
        path = str(find(composition.values, "data.path")) if is_download else "://"
        if "://" in path:
            continue
        kind = find(composition.values, "data.source")
        if kind == "sources":
            yield from wrong_sources(composition)
        elif not Path(path).exists():
            yield f"data.path={printable(path, PATH_LIMIT)}: no such file or directory"
        elif kind != "hub":
            try:
                find_files(path)
            except (StageError, OSError) as error:
                yield str(error)


def wrong_sources(composition: Composition) -> Iterator[str]:
    """What keeps a data set of several sources from being what the sources of params.yaml are."""
    where = f"conf/data/{composition.chosen['data']}.yaml"
    if composition.stage == "source":
        yield f"sources.{composition.item}.name: {where} consists of sources itself: name a configuration of one"
        return
    if (path := find(composition.values, "data.path")) != SOURCES:
        yield f"data.path={printable(path)}: data.source=sources ({where}) reads {SOURCES}: set data.path={SOURCES}"
    known = Params().names("source")
    for name in find(composition.values, "data.sources") or []:
        if name not in known:
            shown = printable(name)
            yield f"{where}: sources names {shown}: params.yaml has no sources.{shown}; {nearest(str(name), known)}"
    for directory in sorted(Path(SOURCES).glob("*/")):
        if directory.name not in known:
            remedy = f"remove it (rm -r {shlex.quote(str(directory))})"
            yield f"{printable(directory)} belongs to no source of params.yaml: {remedy}"


def wrong_task_sources(compositions: list[Composition]) -> Iterator[str]:
    """Sources that a task chooses and the data set does not have."""
    for composition in compositions:
        chosen, data = find(composition.values, "sources"), composition.chosen.get("data")
        if composition.stage != "tokenize" or not isinstance(chosen, list) or data is None:
            continue
        values = read_yaml(CONF / "data" / f"{data}.yaml")
        known = [str(name) for name in values.get("sources") or []] if values.get("source") == "sources" else [data]
        for name in chosen:
            if name not in known:
                key = f"tasks.{composition.item}.sources"
                has = f"conf/data/{data}.yaml has no such source; {nearest(str(name), known)}"
                yield f"{key} names {printable(name)}: {has}"


def wrong_pairs(compositions: list[Composition]) -> Iterator[str]:
    """What keeps the items of a stage `score` from being read, and its model from scoring them."""
    positions = {item.item: find(item.values, "model.max_positions") for item in compositions if item.stage == "train"}
    for composition in compositions:
        if composition.stage != "score" or composition.problems or composition.missing:
            continue
        section, tasks = f"pairs.{composition.item}", Params().names("task")
        if composition.item not in tasks:
            yield f"params.yaml: {section}: there is no such task; {nearest(str(composition.item), tasks)}"
        try:
            pairs = load(schema_of("score"), composition).pairs
        except ConfigError:
            continue  # said already
        if pairs.context > positions.get(composition.item, pairs.context):
            most = positions[composition.item]
            yield f"pairs.context={pairs.context} is above the model's positions, {most} (score@{composition.item})"
        if not Path(pairs.path).is_file():  # of a data set of the Hub as well: DVC depends on it
            yield f"{section}.path={printable(pairs.path, PATH_LIMIT)}: no such file"
        elif pairs.hub is None:
            try:
                read_items(pairs)
            except (StageError, OSError) as error:
                yield str(error)


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
