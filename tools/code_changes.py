"""Which parts of which modules a stage would now run with another behaviour than at its last run."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from stages.core.source_code import hash_definitions, hash_source
from tools.lock_history import read_committed


class CodeChange(NamedTuple):
    """A module that does something else than it did, or that is new among the stage's, or gone."""

    file: str
    what: str
    """Its parts that changed, or what became of it."""


def code_changes(before: Mapping[str, str], now: Mapping[str, str]) -> Iterator[CodeChange]:
    """The differences between the modules of a stage, each with the hash of what it does."""
    for module in sorted(before.keys() | now.keys()):
        file = _file(module)
        if module not in now:
            yield CodeChange(file, "not imported any more")
        elif module not in before:
            yield CodeChange(file, "imported now")
        elif before[module] != now[module]:
            yield CodeChange(file, _changed_parts(file, before[module]))


def committed_hashes(modules: Iterable[str]) -> dict[str, str]:
    """Those of `modules` that the last commit has, each with the hash of what it does there."""
    texts = {module: next(read_committed(_file(module), most=1), "") for module in modules}
    return {module: hash_of(text) for module, text in texts.items() if text}


def _file(module: str) -> str:
    path = Path(*module.split("."))
    return str(path / "__init__.py" if path.is_dir() else path.with_suffix(".py"))


def _changed_parts(file: str, before: str) -> str:
    """The parts of the module in `file` that changed since its hash was `before`."""
    source = next((text for text in read_committed(file) if hash_of(text) == before), None)
    if source is None:
        return "changed (no commit has the version of the last run)"
    return describe_parts(source, Path(file).read_text(encoding="utf-8"))


def hash_of(source: str) -> str:
    """hash_source, empty for a text that is not Python."""
    try:
        return hash_source(source)
    except (SyntaxError, ValueError):
        return ""


def describe_parts(before: str, now: str) -> str:
    """The parts in which two texts of a module differ: functions, classes and variables, by name."""
    old, new = hash_definitions(before), hash_definitions(now)
    words = [name for name in new if name in old and new[name] != old[name]]
    words += [f"{name} (new)" for name in new if name not in old]
    words += [f"{name} (removed)" for name in old if name not in new]
    return ", ".join(words) or "the order of its parts"
