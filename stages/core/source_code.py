"""What of the project's code decides the result of a stage: the modules that it imports, and what each of them does.

A module is known by a hash of its syntax tree, in which comments and formatting do not appear, without docstrings and
without the texts of log lines and errors. So a reworded message makes no stage run again, and a changed behaviour makes
exactly those run that import the module.
"""

import ast
import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.core.errors import StageError

PACKAGE = Path(__file__).resolve().parents[1]

# Imports by a name that only the config knows: a stage to the package of which it imports one subpackage. It has hashes
# for each of them.
DYNAMIC_IMPORTS = {"train": "stages.frameworks"}

_LOG_METHODS = {"critical", "debug", "error", "exception", "info", "log", "warning"}
_LOGGERS = {"getLogger", "log", "logger", "logging"}
_MESSAGE_FUNCTIONS = {"show_error", "warn"}
_TEXT = ast.Constant("text")


def list_stages() -> list[str]:
    """Names of the stages: the packages that can be run, without the one that writes these hashes."""
    return sorted(file.parent.name for file in PACKAGE.glob("*/__main__.py") if file.parent.name != "code")


def hashed_names(stage: str) -> dict[str, list[str]]:
    """Name to the modules whose imports count: STAGE, or STAGE-CHOICE for each choice of its dynamic import."""
    main = f"{PACKAGE.name}.{stage}.__main__"
    if stage not in DYNAMIC_IMPORTS:
        return {stage: [main]}
    package = DYNAMIC_IMPORTS[stage]
    names = sorted(file.parent.name for file in _file(package).parent.glob("*/__init__.py"))
    return {f"{stage}-{name}": [main, f"{package}.{name}"] for name in names}


def hash_code(name: str) -> dict[str, str]:
    """The modules that are imported under a name of `hashed_names`, each with the hash of what it does."""
    roots = hashed_names(name.partition("-")[0])[name]
    modules = set().union(*(imported_modules(root) for root in roots))
    return {module: hash_behaviour(_file(module)) for module in sorted(modules)}


def imported_modules(module: str) -> set[str]:
    """The project's modules that are loaded with `module`, itself included: transitively, lazy imports as well."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += [*direct_imports(name), *_packages(name)]
    return found


@functools.cache
def direct_imports(module: str) -> tuple[str, ...]:
    """The project's modules that `module` imports by name, at its top or inside functions."""
    root = PACKAGE.name
    names: list[str] = []
    for node in ast.walk(_WithoutTypeChecking().visit(_parse(_file(module)))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: a relative import"
            base = node.module or ""
            # `from package import name`: the name may be a module or something that the package defines.
            names += [base, *(name for alias in node.names if _exists(name := f"{base}.{alias.name}"))]
    return tuple(dict.fromkeys(name for name in names if name.partition(".")[0] == root))


def _packages(module: str) -> Iterator[str]:
    """The packages around a module, whose `__init__.py` run before it."""
    while module := module.rpartition(".")[0]:
        yield module


def _file(module: str) -> Path:
    path = PACKAGE.parent.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _exists(module: str) -> bool:
    return module.startswith(f"{PACKAGE.name}.") and _file(module).is_file()


def _parse(file: Path) -> ast.Module:
    try:
        return ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError) as error:
        raise StageError(f"{file.relative_to(PACKAGE.parent)} cannot be read as Python: {error}") from None


@functools.cache
def hash_behaviour(file: Path) -> str:
    """Hexadecimal SHA-256 of what the module in `file` does, the same under every version of Python."""
    return _hash(_without_texts(_parse(file)))


def hash_source(source: str) -> str:
    """`hash_behaviour` of a module with the text `source`.

    Raises:
        SyntaxError, ValueError: if it is not Python.
    """
    return _hash(_without_texts(ast.parse(source)))


def hash_definitions(source: str) -> dict[str, str]:
    """The parts of a module with the text `source`, each with the hash of what it does.

    A part is a function, a class, a method (`Class.method`), a variable, or all imports or other statements of the
    module (`imports`, `statements`). The hash of a class does not cover its methods.

    Raises:
        SyntaxError, ValueError: if it is not Python.
    """
    parts: dict[str, list[ast.AST]] = {}
    for node in _without_texts(ast.parse(source)).body:
        for name, part in _definitions(node):
            parts.setdefault(name, []).append(part)
    return {name: _hash(nodes) for name, nodes in parts.items()}


def _definitions(node: ast.stmt) -> Iterator[tuple[str, ast.AST]]:
    """The parts of a statement at the top of a module, by name."""
    if isinstance(node, ast.ClassDef):
        methods = [item for item in node.body if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)]
        yield from ((f"{node.name}.{method.name}", method) for method in methods)
        node.body = [item for item in node.body if item not in methods]
        yield node.name, node
    elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        yield node.name, node
    elif isinstance(node, ast.Import | ast.ImportFrom):
        yield "imports", node
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        names = [target.id for target in targets if isinstance(target, ast.Name)]
        yield ", ".join(names) or "statements", node
    else:
        yield "statements", node


def _without_texts(tree: ast.Module) -> ast.Module:
    """`tree`, which is changed, with nothing in it but what decides a result."""
    cleaned: ast.Module = _WithoutTexts().visit(_WithoutTypeChecking().visit(tree))
    return cleaned


def _hash(node: Any) -> str:
    return hashlib.sha256(json.dumps(_plain(node)).encode()).hexdigest()


def _plain(node: Any) -> Any:
    """A syntax tree as JSON. Empty fields are left out: versions of Python add fields that old code leaves empty."""
    if isinstance(node, ast.AST):
        fields = {name: _plain(value) for name, value in ast.iter_fields(node) if value is not None and value != []}
        return [type(node).__name__, fields]
    if isinstance(node, list):
        return [_plain(item) for item in node]
    return [type(node).__name__, repr(node)]


class _WithoutTypeChecking(ast.NodeTransformer):
    """Removes `if TYPE_CHECKING:` blocks, which never run."""

    def visit_If(self, node: ast.If) -> Any:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return [self.visit(statement) for statement in node.orelse]
        return self.generic_visit(node)


class _WithoutTexts(ast.NodeTransformer):
    """Removes docstrings, and replaces the strings of log lines and errors by one and the same text."""

    def visit_Expr(self, node: ast.Expr) -> Any:
        if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            return None  # a docstring, of a module, class, function or attribute
        return self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> Any:
        return _ReplaceStrings().visit(node)

    def visit_Assert(self, node: ast.Assert) -> Any:
        node.test = self.visit(node.test)
        node.msg = None
        return node

    def visit_Call(self, node: ast.Call) -> Any:
        if not _is_message(node.func):
            return self.generic_visit(node)
        node.func = self.visit(node.func)
        node.args = [_ReplaceStrings().visit(argument) for argument in node.args]
        return node


class _ReplaceStrings(ast.NodeTransformer):
    def visit_Constant(self, node: ast.Constant) -> Any:
        return _TEXT if isinstance(node.value, str) else node

    def visit_JoinedStr(self, node: ast.JoinedStr) -> Any:
        return _TEXT

    def visit_BinOp(self, node: ast.BinOp) -> Any:
        """Texts put together are a text, and so are those that `%` fills in."""
        node = ast.BinOp(self.visit(node.left), node.op, self.visit(node.right))
        return _TEXT if _TEXT in (node.left, node.right) else node


def _is_message(function: ast.expr) -> bool:
    """Whether a call takes texts for people: of a logger, of an error or a warning."""
    if isinstance(function, ast.Attribute):
        if function.attr in _LOG_METHODS:
            logger = function.value.func if isinstance(function.value, ast.Call) else function.value
            return getattr(logger, "id", getattr(logger, "attr", "")) in _LOGGERS
        return function.attr in _MESSAGE_FUNCTIONS or function.attr.endswith(("Error", "Warning"))
    name = getattr(function, "id", "")
    return name in _MESSAGE_FUNCTIONS or name.endswith(("Error", "Warning"))
