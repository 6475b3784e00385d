"""Composes the config of a stage from params.yaml, the files of conf/ that it names, and overrides by hand.

params.yaml names the configurations of an experiment and gives the values that it sweeps; none of them passes through a
shell. Hydra composes conf/STAGE.yaml with the named files. What is then still missing (`???`) comes from params.yaml.
dvc.yaml declares the same keys under `params:`, and `make check` compares the two.
"""

import functools
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf

from stages.core.config import CONF, MISSING, choices, find, flat, nearest, numbers_beyond_64_bits, read_yaml, validate
from stages.core.errors import ConfigError, printable
from stages.core.starts import NO_START, wrong_start

Schema = TypeVar("Schema")

PARAMS = CONF.parent / "params.yaml"
# Groups whose files contribute to the root of the config; a file of any other contributes to the key of its group.
GLOBAL_GROUPS = ("adapter", "base", "hardware", "task")

# A stage of dvc.yaml to the package that runs it, where the names differ.
_PACKAGES = {"source": "download"}
# What dvc.yaml runs a stage for each of (`foreach`): the override that chooses one, to its section of params.yaml.
_SECTIONS = {"task": "tasks", "source": "sources"}
# Sections of params.yaml with an entry for each task that has one.
_BY_TASK = ("pairs",)
# Keys of a task's section that stand nowhere else; another `sources` is a section of its own.
_OF_A_TASK = ("sources", "start")

_UNSET = "???"  # OmegaConf's sign for a value that must be given
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
_TEMPLATE = re.compile(r"\{(task|source|data|start)\}")
_PACKAGE = re.compile(r"#\s*@package\s+(\S+)")
# What differs between two composed configs in Hydra's own section, whatever the configs are.
_OWN_TO_A_COMPOSITION = ("hydra.runtime.", "hydra.overrides.")
_OWN_TO_A_JOB = ("hydra.job.name", "hydra.job.config_name", "hydra.job.override_dirname")


class Root(NamedTuple):
    """What conf/STAGE.yaml asks for."""

    groups: list[str]
    """Groups of which one configuration each is composed."""
    files: list[str]
    """Files of conf/ that are always composed, without their suffix."""
    unset: list[str]
    """Dotted keys whose values come from params.yaml."""
    paths: dict[str, str]
    """Key to the path that the stage reads or writes, or to a name.

    `{task}` and `{source}` stand for the one that the stage runs for, `{data}` for the name of the data configuration,
    `{start}` for the task that the task starts from; where that is none, the value is null.
    """

    @property
    def each(self) -> str | None:
        """What the stage runs once for each of: `task` or `source`; None: it runs once."""
        if "task" in self.groups:
            return "task"
        return next((each for each in _SECTIONS if any(f"{{{each}}}" in path for path in self.paths.values())), None)


class Composition(NamedTuple):
    """The values of a stage's config, and what they were composed of."""

    stage: str
    item: str | None
    """Name of the task, or of the source, that the stage runs for."""
    values: dict[str, Any]
    """Nested; a value that was given nowhere is `???`."""
    chosen: dict[str, str]
    """Group to the name of its configuration."""
    params: list[str]
    """Dotted keys of params.yaml that were read."""
    problems: list[str]
    """What is wrong with the choices and the values, before a schema has seen them."""
    missing: list[str]
    """What was given neither in params.yaml nor by hand."""


class Params:
    """params.yaml, as a stage reads it."""

    def __init__(self, each: str | None = None, item: str | None = None) -> None:
        """
        Args:
            each: `task` or `source` where the stage runs once for each of these.
            item: name of the task or source that it runs for.
        """
        self._values, self._each, self._item = read_yaml(PARAMS), each, item
        self.read: list[str] = []
        """Dotted keys that were read."""

    @property
    def tasks(self) -> dict[str, Any]:
        """The section of each task."""
        section = find(self._values, "tasks")
        return section if isinstance(section, dict) else {}

    def names(self, each: str) -> list[str]:
        """Names of the tasks or of the sources."""
        section = find(self._values, _SECTIONS[each])
        return [str(name) for name in section] if isinstance(section, dict) else []

    def get(self, key: str) -> tuple[str, Any]:
        """Where `key` is set, in the section of the task or source or at the top, and its value.

        Raises:
            ConfigError: if it is set in neither place, or in both.
        """
        places = self._places(key)
        found = [(place, find(self._values, place)) for place in places]
        found = [(place, value) for place, value in found if value is not MISSING]
        if len(found) == 1:
            self.read.append(found[0][0])
            return found[0]
        if found:
            raise ConfigError([f"{' and '.join(places)} are both set in params.yaml: keep one of them"])
        if self._item is None and any(
            find(self._values, f"tasks.{task}.{key}") is not MISSING for task in self.names("task")
        ):
            raise ConfigError([self.item_is_missing("task")])
        if self._each is not None and self._item is not None and self._item not in self.names(self._each):
            section = f"{_SECTIONS[self._each]}.{self._item}"
            missing = f"{self._each}={printable(self._item)}: params.yaml has no {printable(section)}"
            raise ConfigError([f"{missing}; {self._listed(self._each)}"])
        raise ConfigError([f"{key} is missing: params.yaml has no {' and no '.join(places)}"])

    def _places(self, key: str) -> list[str]:
        if self._item is None:
            return [key]
        first, _, rest = key.partition(".")
        if first in _BY_TASK:
            return [f"{first}.{self._item}.{rest}"]
        section = f"{_SECTIONS[self._each or 'task']}.{self._item}"
        # A source is a data section under another name.
        if self._each == "source":
            return [f"{section}.{key.removeprefix('data.')}"]
        return [f"{section}.{key}"] if key in _OF_A_TASK else [f"{section}.{key}", key]

    def get_choice(self, group: str) -> tuple[str, Any]:
        """Where the configuration of `group` is named, and the name; see `get`."""
        return self.get(f"{group}.name" if isinstance(find(self._values, group), dict) else group)

    def item_is_missing(self, each: str) -> str:
        """What to say where no task or source was chosen."""
        return f"{each} is not chosen: add {each}=NAME; {self._listed(each)}"

    def _listed(self, each: str) -> str:
        names = self.names(each)
        return _listed(names) if names else f"params.yaml has no {_SECTIONS[each]}"


def read_root(stage: str) -> Root:
    """What the root config of `stage` asks for."""
    values = read_yaml(CONF / f"{stage}.yaml")
    defaults = values.pop("defaults", [])
    leaves = dict(flat(values))
    return Root(
        groups=[group for entry in defaults if isinstance(entry, dict) for group in entry],
        files=[entry for entry in defaults if isinstance(entry, str) and entry != "_self_"],
        unset=[key for key, value in leaves.items() if value == _UNSET],
        paths={key: value for key, value in leaves.items() if value != _UNSET},
    )


def package_of(stage: str) -> str:
    """The package of stages/ that runs `stage`."""
    return _PACKAGES.get(stage, stage)


def stage_of(package: str, dvc_stage: str, overrides: Sequence[str]) -> tuple[str, str | None]:
    """The stage that the command line of `package` asks for, and the task or source that DVC runs it for.

    Args:
        dvc_stage: what DVC says that it runs (source@books); so no name of params.yaml stands in the command, which
            DVC passes to a shell. An override wins over it.
    """
    name, _, item = dvc_stage.rpartition(":")[2].partition("@")
    if package_of(name) == package and item:
        return name, item
    keys = {override.partition("=")[0] for override in overrides}
    return next((stage for stage, runs in _PACKAGES.items() if runs == package and stage in keys), package), None


def compose(stage: str, overrides: Sequence[str] = (), item: str | None = None) -> Composition:
    """The config of `stage`.

    Args:
        overrides: as on the command line of a Hydra application; they win over params.yaml and conf/.
        item: the task or source that it runs for, unless an override names one.

    Raises:
        ConfigError: if an override or a file cannot be read or composed.
    """
    root = read_root(stage)
    each = root.each
    by_hand = {override.key_or_group: override for override in _parse(overrides)}
    if (chooser := each or "task") in by_hand:
        item = str(by_hand[chooser].value())
    params = Params(each, item)
    problems = list(_misplaced_groups(stage, root, by_hand))
    missing: list[str] = []
    chosen: dict[str, str] = {}
    if item is not None and ("." in item or not _PLAIN_NAME.fullmatch(item)):
        raise ConfigError([f"{chooser}={printable(item)}: the name of a {chooser} holds letters, digits, _ and - only"])
    for group in root.groups:
        try:
            key, name = _choice(group, by_hand, params, item)
        except ConfigError as error:
            missing += error.problems
            continue
        try:
            chosen[group] = _checked_name(group, key, name)
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
        if find(values, key) == _UNSET:
            try:
                _set(values, key, params.get(key)[1])
            except ConfigError as error:
                missing += error.problems
    names = {chooser: item, "data": chosen.get("data")}
    for key, template in root.paths.items():
        if find(values, key) != template or not (found := _TEMPLATE.search(template)):
            continue
        if found[1] == "start":
            try:
                names["start"] = params.get("start")[1]
            except ConfigError as error:
                missing += error.problems
                continue
            if wrong := list(wrong_start(params.tasks, str(item), names["start"], chosen.get("model"))):
                problems += wrong
                continue
        name = names[found[1]]
        if name is not None:
            _set(values, key, None if found[1] == "start" and name == NO_START else template.replace(found[0], name))
        elif found[1] == chooser:
            missing.append(params.item_is_missing(chooser))
    problems += [*forbidden_values(values), *numbers_beyond_64_bits(values)]
    return Composition(stage, item, values, chosen, params.read, problems, list(dict.fromkeys(missing)))


def load(schema: type[Schema], composition: Composition) -> Schema:
    """The composed config as an instance of `schema`.

    Raises:
        ConfigError: with all that is wrong, in the choices and in the values.
    """
    problems, config = [*composition.problems, *composition.missing], None
    try:
        config = validate(schema, composition.values, composition.stage)
    except ConfigError as error:
        # The keys of a configuration that was not found are missing too, which says nothing new.
        problems += [problem for problem in error.problems if not (problems and problem.endswith(" is missing"))]
    if config is None or problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return config


def _parse(overrides: Sequence[str]) -> list[Override]:
    try:
        parsed: list[Override] = OverridesParser.create().parse_overrides(list(overrides))
    except Exception as error:
        raise ConfigError([" ".join(str(error).split())]) from None
    return parsed


def _choice(group: str, by_hand: dict[str, Override], params: Params, item: str | None) -> tuple[str, Any]:
    """Where the configuration of `group` is named, and the name.

    Raises:
        ConfigError: if it is named nowhere.
    """
    if group == "task":
        if item is None:
            raise ConfigError([params.item_is_missing(group)])
        return group, item
    if group in by_hand:
        return group, by_hand[group].value()
    return params.get_choice(group)


def _checked_name(group: str, key: str, name: Any) -> str:
    names = choices(group)
    if not isinstance(name, str):
        raise ConfigError(
            [f"{printable(key)}={printable(name)}: it should be the name of a configuration; {_listed(names)}"]
        )
    if not _PLAIN_NAME.fullmatch(name):
        raise ConfigError(
            [f"{key}={printable(repr(name))}: a name holds letters, digits, dots, _ and - only; {_listed(names)}"]
        )
    if name not in names:
        shown = printable(name)
        raise ConfigError([f"{key}={shown}: there is no conf/{group}/{shown}.yaml; {nearest(name, names)}"])
    return name


def _listed(names: list[str]) -> str:
    return f"there are {', '.join(names)}"


def _misplaced_groups(stage: str, root: Root, by_hand: dict[str, Override]) -> Iterator[str]:
    for key, override in by_hand.items():
        if override.package is not None:
            yield f"{printable(override.input_line)}: a configuration cannot be moved to another key"
        elif key not in root.groups and (CONF / key).is_dir() and key != root.each:
            yield f"{key} is no group of {stage}: it has {', '.join(root.groups) or 'none'}"


def _check_files(files: list[str]) -> None:
    """Raise ConfigError if a file of conf/ (without its suffix) does more than set values, which DVC would not see."""
    problems = []
    for file in files:
        where, group = f"conf/{file}.yaml", file.partition("/")[0]
        try:
            values = read_yaml(CONF / f"{file}.yaml")
        except ConfigError as error:
            problems += error.problems
            continue
        if "defaults" in values:
            problems.append(f"{where}: defaults cannot be nested: copy the values that it takes from there")
        lines = (CONF / f"{file}.yaml").read_text(encoding="utf-8").splitlines()
        packages = [found[1] for line in lines if (found := _PACKAGE.match(line))]
        expected = ["_global_"] if group in GLOBAL_GROUPS else []
        if packages != expected:
            told = "`# @package _global_` in its first line" if expected else "no `# @package`"
            problems.append(f"{where}: it should have {told}, as every file of conf/{group}")
    if problems:
        raise ConfigError(problems)


def _compose_files(stage: str, chosen: list[str], overrides: list[str]) -> dict[str, Any]:
    """The values that Hydra composes.

    Raises:
        ConfigError: in Hydra's words, or if they change Hydra's own configuration.
    """
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            composed = hydra.compose(stage, [*chosen, *overrides], return_hydra_config=True)
        values: Any = OmegaConf.to_container(composed, resolve=False)
    except Exception as error:  # Hydra lets through what its parsers and its own configuration raise
        raise ConfigError([" ".join(str(error).split())]) from None
    own = _hydra_settings(values.pop("hydra"))
    changed = sorted({key for key, _ in own ^ _hydra_defaults()})
    if changed:
        raise ConfigError([f"{key}: what Hydra itself does cannot be set: take it out" for key in changed])
    return dict(values)


@functools.cache
def _hydra_defaults() -> frozenset[tuple[str, str]]:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return _hydra_settings(OmegaConf.to_container(hydra.compose(None, [], return_hydra_config=True).hydra))


def _hydra_settings(section: Any) -> frozenset[tuple[str, str]]:
    """Dotted key and value of what is the same in every composition that leaves Hydra as it is."""
    return frozenset(
        (key, repr(value))
        for key, value in flat({"hydra": section})
        if not key.startswith(_OWN_TO_A_COMPOSITION) and key not in _OWN_TO_A_JOB
    )


def forbidden_values(values: Any, key: str = "") -> Iterator[str]:
    """Values that would be something else when they are used than what is written."""
    if isinstance(values, dict):
        for name, value in values.items():
            if name == "_target_":
                yield f"{key or 'the config'} names something to call (_target_), which no stage does: take it out"
            yield from forbidden_values(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, list):
        for value in values:
            yield from forbidden_values(value, key)
    elif isinstance(values, str) and "${" in values:
        yield f"{printable(key)}={printable(values)}: interpolations are not resolved: write the value itself"


def _set(values: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, last = dotted.split(".")
    for section in sections:
        values = values[section]
    values[last] = value
