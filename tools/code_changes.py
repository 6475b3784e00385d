"""Find the modules, functions and classes of a stage that changed since its last run."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from stages.core.source_code import hash_definitions, hash_source
from tools.lock_history import read_committed_versions


class CodeChange(NamedTuple):
    """A module of a stage that changed, that the stage now imports, or that it no longer imports."""

    file: str
    description: str
    """Names of the changed parts, or a phrase for an added or removed module."""


def find_code_changes(before: Mapping[str, str], now: Mapping[str, str]) -> Iterator[CodeChange]:
    """Yield the differences between two versions of a stage's modules, sorted by module.

    Args:
        before, now: module name to the hash of its behavior (`hash_source`).
    """
    for module in sorted(before.keys() | now.keys()):
        file = _get_module_file(module)
        if module not in now:
            yield CodeChange(file, "not imported any more")
        elif module not in before:
            yield CodeChange(file, "imported now")
        elif before[module] != now[module]:
            yield CodeChange(file, _describe_changed_parts(file, before[module]))


def hash_committed_modules(modules: Iterable[str]) -> dict[str, str]:
    """Return the hash of each module's behavior in the last commit; modules that the commit lacks are left out."""
    texts = {module: next(read_committed_versions(_get_module_file(module), max_commits=1), "") for module in modules}
    return {module: hash_valid_source(text) for module, text in texts.items() if text}


def _get_module_file(module: str) -> str:
    path = Path(*module.split("."))
    return str(path / "__init__.py" if path.is_dir() else path.with_suffix(".py"))


def _describe_changed_parts(file: str, before: str) -> str:
    """Describe the parts of the module in `file` that changed since its hash was `before`."""
    source = next((text for text in read_committed_versions(file) if hash_valid_source(text) == before), None)
    if source is None:
        return "changed (no commit has the version of the last run)"
    return describe_changed_definitions(source, Path(file).read_text(encoding="utf-8"))


def hash_valid_source(source: str) -> str:
    """Return `hash_source(source)`, or the empty string if `source` is not valid Python."""
    try:
        return hash_source(source)
    except (SyntaxError, ValueError):
        return ""


def describe_changed_definitions(before: str, now: str) -> str:
    """Return the names of functions, classes and variables that differ between two versions of a module's source."""
    old, new = hash_definitions(before), hash_definitions(now)
    names = [name for name in new if name in old and new[name] != old[name]]
    names += [f"{name} (new)" for name in new if name not in old]
    names += [f"{name} (removed)" for name in old if name not in new]
    return ", ".join(names) or "the order of its parts"
