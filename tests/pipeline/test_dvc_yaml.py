"""What dvc.yaml declares for a stage is what the stage uses: modules, files and keys of conf/, both ways."""

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tools.check import GLOBAL_GROUPS, choices, pipeline, schema_of

ROOT = Path(__file__).parents[2]


# stages/train/stage.py imports one package of stages/frameworks, by its config: dvc.yaml names the chosen one.
FRAMEWORKS = sorted(file.parent.name for file in (ROOT / "stages/frameworks").glob("*/__init__.py"))
CHOSEN = "stages/frameworks/${framework}"


def project_imports(module: Path) -> set[str]:
    """Paths of the project's own modules that `module` imports, itself included, transitively, lazy imports too."""
    found, waiting = set(), [module]
    while waiting:
        file = waiting.pop()
        name = file.relative_to(ROOT).as_posix()
        if name not in found:
            found.add(name)
            waiting += direct_imports(file)
    return found


def direct_imports(file: Path) -> Iterator[Path]:
    """The project's own modules that a file imports; each framework where it imports one by its name."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [node.module] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        match node:
            case ast.JoinedStr(values=[ast.Constant(value="stages.frameworks."), ast.FormattedValue()]):
                names += [f"stages.frameworks.{framework}" for framework in FRAMEWORKS]
        yield from (file_of(name) for name in names if name and name.startswith("stages."))


def file_of(module: str) -> Path:
    """The file of a dotted name of a module or package."""
    path = ROOT / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def used_keys(schema: Any, file: Path, group: str) -> set[str]:
    """Dotted keys of a group's file that `schema` takes in; a `part` of a section counts key by key."""
    keys = yaml.safe_load(file.read_text(encoding="utf-8"))
    if group not in GLOBAL_GROUPS:
        schema = next(field.type for field in dataclasses.fields(schema) if field.name == group)
    used: set[str] = set()
    for field in dataclasses.fields(schema):
        if field.name not in keys:  # it comes on the command line
            continue
        partial = dataclasses.is_dataclass(field.type) and field.type.__pydantic_config__["extra"] == "ignore"
        names = [f"{field.name}.{part.name}" for part in dataclasses.fields(field.type)] if partial else [field.name]
        used.update(names)
    return used


@pytest.fixture(scope="module")
def declared() -> dict[str, dict[str, Any]]:
    """Stage definition of dvc.yaml by the stage's word."""
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    return {name: stage.get("do", stage) for name, stage in stages.items()}


COMMANDS = {command.name: command for command in pipeline()}


@pytest.mark.parametrize("name", COMMANDS)
def test_dvc_yaml_source_files_are_those_that_the_stage_imports(name: str, declared: dict[str, Any]) -> None:
    stage = COMMANDS[name].stage
    sources = {path for path in declared[stage]["deps"] if path.startswith("stages/")}
    imported = project_imports(ROOT / f"stages/{stage}.py")
    assert sources == {CHOSEN if path.startswith("stages/frameworks/") else path for path in imported}


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_framework_package_imports_all_of_its_modules_and_no_other_framework(framework: str) -> None:
    package = ROOT / "stages/frameworks" / framework
    imported = {file for module in package.rglob("*.py") for file in direct_imports(module)}
    found = {file for file in imported if ROOT / "stages/frameworks" in file.parents}
    assert found | {package / "__init__.py"} == set(package.rglob("*.py"))


@pytest.mark.parametrize("name", COMMANDS)
def test_dvc_yaml_params_are_the_files_and_keys_that_the_stage_composes(name: str, declared: dict[str, Any]) -> None:
    command = COMMANDS[name]
    chosen = choices(command)
    assert f"conf/{command.stage}.yaml" in declared[command.stage]["deps"]
    expected: dict[str, set[str] | None] = {}
    for group, choice in chosen.items():
        file = ROOT / "conf" / group / f"{choice}.yaml"
        expected[f"conf/{group}/{choice}.yaml"] = used_keys(schema_of(command.stage), file, group)
    templates = {"${key}": chosen.get("task", ""), "${data.name}": chosen.get("data", "")}
    templates |= {"${item.model}": chosen.get("model", ""), "${hardware}": chosen.get("hardware", "")}
    templates |= {"${item.adapter}": chosen.get("adapter", ""), "${framework}": chosen.get("framework", "")}
    actual: dict[str, set[str] | None] = {}
    for entry in declared[command.stage].get("params", []):
        for file, keys in entry.items():
            for template, value in templates.items():
                file = file.replace(template, value)
            actual[file] = set(keys) if keys else None
    assert actual == expected


@pytest.mark.parametrize("name", COMMANDS)
def test_dvc_yaml_root_config_has_no_hidden_defaults(name: str) -> None:
    """A nested defaults list would compose files that dvc.yaml does not name."""
    command = COMMANDS[name]
    root = yaml.safe_load((ROOT / f"conf/{command.stage}.yaml").read_text(encoding="utf-8"))
    assert {key for entry in root["defaults"] if entry != "_self_" for key in entry} == set(choices(command))
    for group, choice in choices(command).items():
        assert "defaults" not in yaml.safe_load((ROOT / f"conf/{group}/{choice}.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", COMMANDS)
def test_dvc_yaml_paths_in_the_command_are_declared(name: str, declared: dict[str, Any]) -> None:
    command = COMMANDS[name]
    task = name.partition("@")[2]
    stage = declared[command.stage]
    known = {*stage["deps"], *stage.get("outs", []), *(path for entry in stage.get("metrics", []) for path in entry)}
    known = {path.replace("${key}", task) for path in known}
    paths = {item.partition("=")[2] for item in command.overrides if "/" in item and not item.startswith("data.path")}
    artifacts = {path for path in known if not path.startswith(("stages/", "conf/", "${"))}
    assert paths == artifacts
