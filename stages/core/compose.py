"""Compose the config of a stage from params.yaml, the files of conf/ that it names, and command-line overrides.

params.yaml names the configurations of an experiment and sets the values that it sweeps; none of them passes through a
shell. Hydra composes conf/STAGE.yaml with the named files. Values that are then still missing (`???`) are taken from
params.yaml. dvc.yaml declares the same keys under `params:`, and `make check` compares the two.
"""

import functools
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf

from stages.core.config import (
    CONF,
    MISSING,
    find_numbers_beyond_64_bits,
    find_value,
    flatten_values,
    list_configurations,
    read_yaml,
    suggest_name,
    validate_values,
)
from stages.core.errors import ConfigError, printable
from stages.core.starts import NO_START, find_start_problems

Schema = TypeVar("Schema")

PARAMS = CONF.parent / "params.yaml"
# Groups with files that set keys at the root of the config. A file of another group sets keys below the group's name.
GLOBAL_GROUPS = ("adapter", "base", "hardware", "task")

# Stage of dvc.yaml to the package that runs it, if the names differ.
_PACKAGES = {"source": "download"}
# Kinds of items that dvc.yaml runs a stage for (`foreach`), to their section of params.yaml. The kind is also the
# override that chooses an item.
_SECTIONS = {"task": "tasks", "source": "sources"}
# Sections of params.yaml with one optional entry per task.
_SECTIONS_BY_TASK = ("pairs",)
# Keys that are read only from the section of a task. `sources` at the top of params.yaml is a different section.
_TASK_ONLY_KEYS = ("sources", "start")

_UNSET = "???"  # OmegaConf's marker for a mandatory value
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
_TEMPLATE = re.compile(r"\{(task|source|data|start)\}")
_PACKAGE = re.compile(r"#\s*@package\s+(\S+)")
# Keys of Hydra's own section that differ between any two composed configs.
_PER_COMPOSITION_PREFIXES = ("hydra.runtime.", "hydra.overrides.")
_PER_JOB_KEYS = ("hydra.job.name", "hydra.job.config_name", "hydra.job.override_dirname")


class RootConfig(NamedTuple):
    """The contents of conf/STAGE.yaml."""

    groups: list[str]
    """Groups from which one configuration each is chosen."""
    files: list[str]
    """Files of conf/ that are always composed, without their suffix."""
    unset: list[str]
    """Dotted keys that take their values from params.yaml."""
    paths: dict[str, str]
    """Key to the path that the stage reads or writes, or to a name.

    Placeholders: `{task}` and `{source}` are the item that the stage runs for, `{data}` is the name of the data
    configuration, and `{start}` is the task that the task starts from. Without a start, the value is null.
    """

    @property
    def item_kind(self) -> str | None:
        """`task` or `source` if the stage runs once per task or source; None if it runs once."""
        if "task" in self.groups:
            return "task"
        return next((kind for kind in _SECTIONS if any(f"{{{kind}}}" in path for path in self.paths.values())), None)


class Composition(NamedTuple):
    """The composed values of a stage's config, and their sources."""

    stage: str
    item: str | None
    """Name of the task, or of the source, that the stage runs for."""
    values: dict[str, Any]
    """Nested mappings; a value that was not set is `???`."""
    chosen: dict[str, str]
    """Group to the name of its chosen configuration."""
    params: list[str]
    """Dotted keys of params.yaml that were read."""
    problems: list[str]
    """Errors in the choices and the values, found before a schema validates them."""
    missing: list[str]
    """Errors for choices and values that are set neither in params.yaml nor by an override."""


class Params:
    """The values of params.yaml for one stage."""

    def __init__(self, item_kind: str | None = None, item: str | None = None) -> None:
        """
        Args:
            item_kind: `task` or `source` if the stage runs once per task or source.
            item: name of the task or source that the stage runs for.
        """
        self._values, self._item_kind, self._item = read_yaml(PARAMS), item_kind, item
        self.keys_read: list[str] = []
        """Dotted keys that were read."""

    @property
    def tasks(self) -> dict[str, Any]:
        """Name to section of each task."""
        section = find_value(self._values, "tasks")
        return section if isinstance(section, dict) else {}

    def list_items(self, item_kind: str) -> list[str]:
        """Return the names of the tasks or of the sources."""
        section = find_value(self._values, _SECTIONS[item_kind])
        return [str(name) for name in section] if isinstance(section, dict) else []

    def get(self, key: str) -> tuple[str, Any]:
        """Return the full dotted name of `key`, and its value.

        The key is set either in the section of the task or source or at the top level.

        Raises:
            ConfigError: if it is set in neither, or in both.
        """
        candidates = self._list_candidate_keys(key)
        found = [(candidate, find_value(self._values, candidate)) for candidate in candidates]
        found = [(candidate, value) for candidate, value in found if value is not MISSING]
        if len(found) == 1:
            self.keys_read.append(found[0][0])
            return found[0]
        if found:
            raise ConfigError([f"{' and '.join(candidates)} are both set in params.yaml: keep one of them"])
        if self._item is None and any(
            find_value(self._values, f"tasks.{task}.{key}") is not MISSING for task in self.list_items("task")
        ):
            raise ConfigError([self.describe_missing_item("task")])
        if (
            self._item_kind is not None
            and self._item is not None
            and self._item not in self.list_items(self._item_kind)
        ):
            section = f"{_SECTIONS[self._item_kind]}.{self._item}"
            missing = f"{self._item_kind}={printable(self._item)}: params.yaml has no {printable(section)}"
            raise ConfigError([f"{missing}; {self._describe_items(self._item_kind)}"])
        raise ConfigError([f"{key} is missing: params.yaml has no {' and no '.join(candidates)}"])

    def _list_candidate_keys(self, key: str) -> list[str]:
        if self._item is None:
            return [key]
        first, _, rest = key.partition(".")
        if first in _SECTIONS_BY_TASK:
            return [f"{first}.{self._item}.{rest}"]
        section = f"{_SECTIONS[self._item_kind or 'task']}.{self._item}"
        # The section of a source has the keys of the section `data`.
        if self._item_kind == "source":
            return [f"{section}.{key.removeprefix('data.')}"]
        return [f"{section}.{key}"] if key in _TASK_ONLY_KEYS else [f"{section}.{key}", key]

    def get_choice(self, group: str) -> tuple[str, Any]:
        """Return the dotted key that names the configuration of `group`, and the name; see `get`."""
        return self.get(f"{group}.name" if isinstance(find_value(self._values, group), dict) else group)

    def describe_missing_item(self, item_kind: str) -> str:
        """Return the error text for a stage without a chosen task or source."""
        return f"{item_kind} is not chosen: add {item_kind}=NAME; {self._describe_items(item_kind)}"

    def _describe_items(self, item_kind: str) -> str:
        names = self.list_items(item_kind)
        return _format_names(names) if names else f"params.yaml has no {_SECTIONS[item_kind]}"


def read_root(stage: str) -> RootConfig:
    """Read the root config of `stage`."""
    values = read_yaml(CONF / f"{stage}.yaml")
    defaults = values.pop("defaults", [])
    leaves = dict(flatten_values(values))
    return RootConfig(
        groups=[group for entry in defaults if isinstance(entry, dict) for group in entry],
        files=[entry for entry in defaults if isinstance(entry, str) and entry != "_self_"],
        unset=[key for key, value in leaves.items() if value == _UNSET],
        paths={key: value for key, value in leaves.items() if value != _UNSET},
    )


def get_package(stage: str) -> str:
    """Return the package of stages/ that runs `stage`."""
    return _PACKAGES.get(stage, stage)


def identify_stage(package: str, dvc_stage: str, overrides: Sequence[str]) -> tuple[str, str | None]:
    """Return the stage that the command line of `package` runs, and the task or source that DVC runs it for.

    Args:
        dvc_stage: DVC's name of the running stage (source@books), or empty. DVC passes commands to a shell, so they
            contain no name from params.yaml. An override takes precedence.
    """
    name, _, item = dvc_stage.rpartition(":")[2].partition("@")
    if get_package(name) == package and item:
        return name, item
    keys = {override.partition("=")[0] for override in overrides}
    return next((stage for stage, runs in _PACKAGES.items() if runs == package and stage in keys), package), None


def compose_config(stage: str, overrides: Sequence[str] = (), item: str | None = None) -> Composition:
    """Compose the config of `stage`.

    Args:
        overrides: as on the command line of a Hydra application; they take precedence over params.yaml and conf/.
        item: the task or source that the stage runs for, unless an override names one.

    Raises:
        ConfigError: if an override or a file cannot be read or composed.
    """
    root = read_root(stage)
    by_hand = {override.key_or_group: override for override in _parse_overrides(overrides)}
    if (chooser := root.item_kind or "task") in by_hand:
        item = str(by_hand[chooser].value())
    params = Params(root.item_kind, item)
    problems = list(_find_misplaced_groups(stage, root, by_hand))
    missing: list[str] = []
    chosen: dict[str, str] = {}
    if item is not None and ("." in item or not _PLAIN_NAME.fullmatch(item)):
        raise ConfigError([f"{chooser}={printable(item)}: the name of a {chooser} has letters, digits, _ and - only"])
    for group in root.groups:
        try:
            key, name = _choose_configuration(group, by_hand, params, item)
        except ConfigError as error:
            missing += error.problems
            continue
        try:
            chosen[group] = _check_configuration_name(group, key, name)
        except ConfigError as error:
            problems += error.problems
    files = [*root.files, *(f"{group}/{name}" for group, name in chosen.items())]
    selected = [f"{group}='{name}'" for group, name in chosen.items()]
    by_key = [override.input_line for key, override in by_hand.items() if key not in (chooser, *root.groups)]
    try:
        _check_files(files)
        values = _compose_files(stage, selected, by_key)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from None
    for key in root.unset:
        if find_value(values, key) == _UNSET:
            try:
                _set_value(values, key, params.get(key)[1])
            except ConfigError as error:
                missing += error.problems
    names = {chooser: item, "data": chosen.get("data")}
    for key, template in root.paths.items():
        if find_value(values, key) != template or not (found := _TEMPLATE.search(template)):
            continue
        if found[1] == "start":
            try:
                names["start"] = params.get("start")[1]
            except ConfigError as error:
                missing += error.problems
                continue
            if wrong := list(find_start_problems(params.tasks, str(item), names["start"], chosen.get("model"))):
                problems += wrong
                continue
        name = names[found[1]]
        if name is not None:
            _set_value(
                values, key, None if found[1] == "start" and name == NO_START else template.replace(found[0], name)
            )
        elif found[1] == chooser:
            missing.append(params.describe_missing_item(chooser))
    problems += [*find_forbidden_values(values), *find_numbers_beyond_64_bits(values)]
    return Composition(stage, item, values, chosen, params.keys_read, problems, list(dict.fromkeys(missing)))


def load_config(schema: type[Schema], composition: Composition) -> Schema:
    """Validate a composed config, and return it as an instance of `schema`.

    Raises:
        ConfigError: with all problems of the choices and the values.
    """
    problems, config = [*composition.problems, *composition.missing], None
    try:
        config = validate_values(schema, composition.values, composition.stage)
    except ConfigError as error:
        # After another problem, leave out missing keys: they may be those of a configuration that was not found.
        problems += [problem for problem in error.problems if not (problems and problem.endswith(" is missing"))]
    if config is None or problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return config


def _parse_overrides(overrides: Sequence[str]) -> list[Override]:
    try:
        parsed: list[Override] = OverridesParser.create().parse_overrides(list(overrides))
    except Exception as error:
        raise ConfigError([" ".join(str(error).split())]) from None
    return parsed


def _choose_configuration(
    group: str, by_hand: dict[str, Override], params: Params, item: str | None
) -> tuple[str, Any]:
    """Return the key that names the configuration of `group`, and the name.

    Raises:
        ConfigError: if no configuration is named.
    """
    if group == "task":
        if item is None:
            raise ConfigError([params.describe_missing_item(group)])
        return group, item
    if group in by_hand:
        return group, by_hand[group].value()
    return params.get_choice(group)


def _check_configuration_name(group: str, key: str, name: Any) -> str:
    names = list_configurations(group)
    if not isinstance(name, str):
        raise ConfigError(
            [f"{printable(key)}={printable(name)}: it should be the name of a configuration; {_format_names(names)}"]
        )
    if not _PLAIN_NAME.fullmatch(name):
        raise ConfigError(
            [f"{key}={printable(repr(name))}: a name has letters, digits, dots, _ and - only; {_format_names(names)}"]
        )
    if name not in names:
        shown = printable(name)
        raise ConfigError([f"{key}={shown}: there is no conf/{group}/{shown}.yaml; {suggest_name(name, names)}"])
    return name


def _format_names(names: list[str]) -> str:
    return f"there are {', '.join(names)}"


def _find_misplaced_groups(stage: str, root: RootConfig, by_hand: dict[str, Override]) -> Iterator[str]:
    for key, override in by_hand.items():
        if override.package is not None:
            yield f"{printable(override.input_line)}: a configuration cannot be moved to another key"
        elif key not in root.groups and (CONF / key).is_dir() and key != root.item_kind:
            yield f"{key} is not a group of {stage}, which has {', '.join(root.groups) or 'no groups'}"


def _check_files(files: list[str]) -> None:
    """Check that files of conf/ (named without their suffix) only set values: DVC would not track anything else.

    Raises:
        ConfigError: if a file has a defaults list or the wrong `# @package`.
    """
    problems = []
    for file in files:
        path, group = f"conf/{file}.yaml", file.partition("/")[0]
        try:
            values = read_yaml(CONF / f"{file}.yaml")
        except ConfigError as error:
            problems += error.problems
            continue
        if "defaults" in values:
            problems.append(f"{path}: defaults cannot be nested: copy the values of the other files into this one")
        lines = (CONF / f"{file}.yaml").read_text(encoding="utf-8").splitlines()
        packages = [found[1] for line in lines if (found := _PACKAGE.match(line))]
        expected = ["_global_"] if group in GLOBAL_GROUPS else []
        if packages != expected:
            header = "`# @package _global_` in its first line" if expected else "no `# @package`"
            problems.append(f"{path}: it should have {header}, as every file of conf/{group}")
    if problems:
        raise ConfigError(problems)


def _compose_files(stage: str, chosen: list[str], overrides: list[str]) -> dict[str, Any]:
    """Return the values that Hydra composes.

    Raises:
        ConfigError: with Hydra's message, or if the values change Hydra's own configuration.
    """
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            composed = hydra.compose(stage, [*chosen, *overrides], return_hydra_config=True)
        values: Any = OmegaConf.to_container(composed, resolve=False)
    except Exception as error:  # Hydra does not wrap the errors of its parsers and of its own configuration
        raise ConfigError([" ".join(str(error).split())]) from None
    own = _collect_hydra_settings(values.pop("hydra"))
    changed = sorted({key for key, _ in own ^ _read_hydra_defaults()})
    if changed:
        raise ConfigError([f"{key}: Hydra's own settings cannot be changed: remove it" for key in changed])
    return dict(values)


@functools.cache
def _read_hydra_defaults() -> frozenset[tuple[str, str]]:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return _collect_hydra_settings(OmegaConf.to_container(hydra.compose(None, [], return_hydra_config=True).hydra))


def _collect_hydra_settings(section: Any) -> frozenset[tuple[str, str]]:
    """Return (dotted key, repr of the value) pairs that are the same in every composition with Hydra's defaults."""
    return frozenset(
        (key, repr(value))
        for key, value in flatten_values({"hydra": section})
        if not key.startswith(_PER_COMPOSITION_PREFIXES) and key not in _PER_JOB_KEYS
    )


def find_forbidden_values(values: Any, key: str = "") -> Iterator[str]:
    """Yield an error text for each value that Hydra or OmegaConf would not use literally: calls and interpolations."""
    if isinstance(values, dict):
        for name, value in values.items():
            if name == "_target_":
                yield f"{key or 'the config'} has a _target_, and no stage instantiates objects from conf/: remove it"
            yield from find_forbidden_values(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, list):
        for value in values:
            yield from find_forbidden_values(value, key)
    elif isinstance(values, str) and "${" in values:
        yield f"{printable(key)}={printable(values)}: interpolations are not resolved: write the value itself"


def _set_value(values: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, last = dotted.split(".")
    for section in sections:
        values = values[section]
    values[last] = value
