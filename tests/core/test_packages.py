"""Allowed imports between packages."""

import ast
from pathlib import Path

import pytest
from data_helpers import REPOSITORY

from stages.core.source_code import find_direct_imports, list_stages

SHARED = {
    "core": set(),
    "shell": {"core"},
    "hub": {"core"},
    "tokens": {"core"},
    "model": {"core", "hub", "tokens"},  # no shell: computation does not depend on a terminal
    "figures": {"core", "model", "tokens"},
    "launch": {"core", "shell", "model"},
}
STAGES = [*list_stages(), "code"]
ALLOWED = {**SHARED, **{stage: set(SHARED) for stage in STAGES}, "frameworks": {*SHARED, "train"}}
MODULES = sorted((REPOSITORY / "stages").rglob("*.py"))


def module_of(file: Path) -> str:
    parts = file.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def packages_of(module: str) -> set[str]:
    return {name.split(".")[1] for name in find_direct_imports(module) if "." in name}


@pytest.mark.parametrize("file", MODULES, ids=module_of)
def test_module_imports_only_the_packages_that_its_own_may(file: Path) -> None:
    package = file.relative_to(REPOSITORY / "stages").parts[0]
    if package != "__init__.py":
        assert packages_of(module_of(file)) - {package} <= ALLOWED[package]


def test_every_package_is_shared_or_a_stage_or_the_frameworks() -> None:
    assert {file.parent.name for file in (REPOSITORY / "stages").glob("*/__init__.py")} == ALLOWED.keys()


@pytest.mark.parametrize("framework", sorted((REPOSITORY / "stages/frameworks").glob("*/__init__.py")), ids=str)
def test_framework_imports_no_other_framework(framework: Path) -> None:
    own = module_of(framework)
    for file in framework.parent.rglob("*.py"):
        others = [name for name in find_direct_imports(module_of(file)) if name.startswith("stages.frameworks.")]
        assert all(name.startswith(own) for name in others)


@pytest.mark.parametrize("file", MODULES, ids=module_of)
def test_module_of_stages_imports_no_tool_test_or_benchmark(file: Path) -> None:
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
        names |= {node.module or ""} if isinstance(node, ast.ImportFrom) else set()
    assert {name.partition(".")[0] for name in names}.isdisjoint({"tools", "tests", "benchmarks"})
