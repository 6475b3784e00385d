"""Changes of a module's behavior, and the modules that a stage imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from data_helpers import REPOSITORY

from stages.core import source_code
from stages.core.errors import StageError
from stages.core.source_code import (
    DYNAMIC_IMPORTS,
    find_direct_imports,
    find_imported_modules,
    hash_behavior,
    hash_code,
    hash_definitions,
    hash_source,
    list_root_modules,
    list_stages,
)

MODULE = '''
"""A module."""
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from somewhere import Thing

log = logging.getLogger(__name__)
LIMIT = 3


class Config:
    """A config."""

    size: int
    """How large."""


def check(value: int, names: list[str]) -> str:
    """Return True if it fits."""
    # Why this is so.
    assert value > 0, f"value is {value}"
    if value > LIMIT:
        log.warning("%d is above %d", value, LIMIT)
        raise ValueError(f"value={value} is too large: " + ", ".join(names))
    logging.getLogger("stage").info("fine")
    return "fine"
'''


def hash_of(tmp_path: Path, text: str) -> str:
    file = tmp_path / f"m{len(list(tmp_path.iterdir()))}.py"
    file.write_text(text, encoding="utf-8")
    return hash_behavior(file)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"""A module."""', '"""Another text."""'),
        ('"""A module."""\n', ""),
        ('    """A config."""\n\n', ""),
        ('    """How large."""\n', ""),
        ('    """Return True if it fits."""\n', '    """Return True if it does."""\n    # Or not.\n'),
        ("    # Why this is so.\n", ""),
        ('f"value is {value}"', '"no"'),
        ('assert value > 0, f"value is {value}"', "assert value > 0"),
        ('"%d is above %d"', '"%d > %d"'),
        ('f"value={value} is too large: " + ", ".join(names)', 'f"{names} " + f"too large: {value}"'),
        ('f"value={value} is too large: " + ", ".join(names)', '"too large"'),
        ('.info("fine")', '.info("good")'),
        ("    from somewhere import Thing\n", "    from elsewhere import Other\n"),
        ("LIMIT = 3", "LIMIT   =   3  # three"),
        ("LIMIT = 3", "LIMIT = (\n    3\n)"),
        ("value > LIMIT", "(value > LIMIT)"),
    ],
)
def test_hash_of_code_that_behaves_the_same_stays(tmp_path: Path, old: str, new: str) -> None:
    assert old in MODULE
    if "join" in old and "join" not in new:  # a call within a message still counts
        return
    assert hash_of(tmp_path, MODULE) == hash_of(tmp_path, MODULE.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("LIMIT = 3", "LIMIT = 4"),
        ("value > LIMIT", "value >= LIMIT"),
        ("assert value > 0", "assert value > 1"),
        ("raise ValueError", "raise KeyError"),
        ("log.warning", "log.error"),
        ('return "fine"', 'return "good"'),
        ("size: int", "size: float"),
        ("size: int", "size: int = 3"),
        ("value, LIMIT)\n", "value, 2)\n"),
        ('getLogger("stage")', 'getLogger("other")'),
        ("def check(value: int,", "def check(value: float,"),
    ],
)
def test_hash_of_code_that_behaves_otherwise_changes(tmp_path: Path, old: str, new: str) -> None:
    assert old in MODULE
    assert hash_of(tmp_path, MODULE) != hash_of(tmp_path, MODULE.replace(old, new))


@pytest.mark.parametrize("call", ["print('a')", "table['a']", "write('a')", "x = 'a'", "f(text='a')", "log.add('a')"])
def test_hash_string_that_is_no_message_counts(tmp_path: Path, call: str) -> None:
    assert hash_of(tmp_path, call) != hash_of(tmp_path, call.replace("'a'", "'b'"))


@pytest.mark.parametrize(
    "call",
    ["raise E('a') from e", "raise E(['a', f'{x}'])", "f(BadError('a'))", "warnings.warn('a')", "show_error(s, 'a')"],
)
def test_hash_string_of_a_message_does_not_count(tmp_path: Path, call: str) -> None:
    assert hash_of(tmp_path, call) == hash_of(tmp_path, call.replace("'a'", "'b'"))


def test_hash_of_a_file_that_is_no_python_names_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(source_code, "PACKAGE", tmp_path / "stages")
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages/broken.py").write_text("def f(:\n", encoding="utf-8")
    with pytest.raises(StageError, match=r"stages/broken.py cannot be read as Python: .*line 1"):
        hash_behavior(tmp_path / "stages/broken.py")


@pytest.mark.parametrize(
    ("old", "new", "changed"),
    [
        ("value > LIMIT", "value >= LIMIT", {"check"}),
        ("LIMIT = 3", "LIMIT = 4", {"LIMIT"}),
        ("size: int", "size: float", {"Config"}),
        ("import logging", "import logging.config", {"imports"}),
        ('"""Return True if it fits."""', '"""Check that it fits."""', set()),
        ("is too large", "is above it", set()),
        ("    # Why this is so.\n", "", set()),
    ],
    ids=str,
)
def test_definitions_of_a_module_differ_where_its_behaviour_does(old: str, new: str, changed: set[str]) -> None:
    before, now = hash_definitions(MODULE), hash_definitions(MODULE.replace(old, new))
    assert {name for name in before.keys() | now.keys() if before.get(name) != now.get(name)} == changed
    assert (hash_source(MODULE) != hash_source(MODULE.replace(old, new))) == bool(changed)


def test_definitions_of_a_class_are_its_methods_and_the_rest_of_it() -> None:
    text = "class A:\n    x = 1\n\n    def f(self): return 1\n\n    async def g(self): return 2\n"
    before, now = hash_definitions(text), hash_definitions(text.replace("return 2", "return 3"))
    assert list(before) == ["A.f", "A.g", "A"]
    assert [name for name in before if before[name] != now[name]] == ["A.g"]


def test_imports_are_followed_through_functions_and_packages_and_not_through_type_checking(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files = {
        "stages/__init__.py": "",
        "stages/a/__init__.py": "import stages.e\n",
        "stages/a/one.py": "from stages.b import two, NAME\n\ndef f():\n    import stages.c.three\n",
        "stages/b/__init__.py": "NAME = 1\n",
        "stages/b/two.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from stages import d\n",
        "stages/c/__init__.py": "",
        "stages/c/three.py": "from stages.a import one\n",
        "stages/d.py": "",
        "stages/e.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(source_code, "PACKAGE", tmp_path / "stages")
    find_direct_imports.cache_clear()
    found = find_imported_modules("stages.a.one")
    find_direct_imports.cache_clear()
    assert found == {
        *("stages", "stages.a", "stages.a.one", "stages.b", "stages.b.two", "stages.c", "stages.c.three", "stages.e")
    }


@pytest.mark.parametrize("stage", list_stages())
def test_code_of_a_stage_holds_every_module_that_its_process_loads(stage: str) -> None:
    name = next(iter(sorted(list_root_modules(stage), reverse=True)))  # of train, the Trainer's
    program = f"import sys, stages.{stage}.__main__\nprint(*(m for m in sys.modules if m.split('.')[0] == 'stages'))"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= hash_code(name).keys()


def test_code_of_train_holds_one_framework() -> None:
    for name, other in (("trainer", "keras"), ("keras", "trainer")):
        modules = hash_code(f"train-{name}")
        assert any(module.startswith(f"stages.frameworks.{name}") for module in modules)
        assert not any(module.startswith(f"stages.frameworks.{other}") for module in modules)


def test_dynamic_imports_are_only_those_that_are_declared() -> None:
    importing = set()
    for file in sorted((REPOSITORY / "stages").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            called = node.func if isinstance(node, ast.Call) else None
            method, name = getattr(called, "attr", ""), getattr(called, "id", "")
            if {method, name} & {"import_module", "__import__", "run_module", "run_path"}:
                assert isinstance(node, ast.Call)
                importing.add((file.relative_to(REPOSITORY / "stages").parts[0], ast.unparse(node.args[0])))
    assert {stage for stage, _ in importing} == DYNAMIC_IMPORTS.keys()
    for stage, argument in importing:
        assert argument.startswith(f"f'{DYNAMIC_IMPORTS[stage]}.{{")
