"""Hashes of the code that determines the result of a stage: of each module that the stage imports.

The hash of a module is that of its syntax tree, which has no comments and formatting, without docstrings and the texts
of log lines and errors. So a reworded message re-runs no stage, and a change of behavior re-runs exactly the stages
that import the module.
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

# Imports by a name from the config: stage to the package from which it imports one subpackage. The stage has one file
# of hashes per subpackage.
DYNAMIC_IMPORTS = {"train": "stages.frameworks"}

_LOG_METHODS = {"critical", "debug", "error", "exception", "info", "log", "warning"}
_LOGGERS = {"getLogger", "log", "logger", "logging"}
_MESSAGE_FUNCTIONS = {"show_error", "warn"}
_TEXT = ast.Constant("text")


def list_stages() -> list[str]:
    """Return the names of the stages: the packages that can be run, except `code`, which writes these hashes."""
    return sorted(file.parent.name for file in PACKAGE.glob("*/__main__.py") if file.parent.name != "code")


def list_root_modules(stage: str) -> dict[str, list[str]]:
    """Map names of hash files to the modules at which their imports start.

    The names are STAGE, or STAGE-CHOICE for each choice of a dynamic import.
    """
    main = f"{PACKAGE.name}.{stage}.__main__"
    if stage not in DYNAMIC_IMPORTS:
        return {stage: [main]}
    package = DYNAMIC_IMPORTS[stage]
    names = sorted(file.parent.name for file in _get_file(package).parent.glob("*/__init__.py"))
    return {f"{stage}-{name}": [main, f"{package}.{name}"] for name in names}


def hash_code(name: str) -> dict[str, str]:
    """Map each module imported under a name of `list_root_modules` to its `hash_behavior`."""
    roots = list_root_modules(name.partition("-")[0])[name]
    modules = set().union(*(find_imported_modules(root) for root in roots))
    return {module: hash_behavior(_get_file(module)) for module in sorted(modules)}


def find_imported_modules(module: str) -> set[str]:
    """Return the project's modules that `module` imports transitively, lazy imports and `module` itself included."""
    found: set[str] = set()
    pending = [module]
    while pending:
        name = pending.pop()
        if name not in found:
            found.add(name)
            pending += [*find_direct_imports(name), *_list_parent_packages(name)]
    return found


@functools.cache
def find_direct_imports(module: str) -> tuple[str, ...]:
    """Return the project's modules that `module` itself imports by name, at the top level or inside functions."""
    root = PACKAGE.name
    names: list[str] = []
    for node in ast.walk(_RemoveTypeChecking().visit(_parse_module(_get_file(module)))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: a relative import"
            base = node.module or ""
            # `from package import name`: the name may be a module or an object that the package defines.
            names += [base, *(name for alias in node.names if _is_module(name := f"{base}.{alias.name}"))]
    return tuple(dict.fromkeys(name for name in names if name.partition(".")[0] == root))


def _list_parent_packages(module: str) -> Iterator[str]:
    """Yield the packages that contain a module; Python runs their `__init__.py` before it."""
    while module := module.rpartition(".")[0]:
        yield module


def _get_file(module: str) -> Path:
    path = PACKAGE.parent.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _is_module(module: str) -> bool:
    return module.startswith(f"{PACKAGE.name}.") and _get_file(module).is_file()


def _parse_module(file: Path) -> ast.Module:
    try:
        return ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError) as error:
        raise StageError(f"{file.relative_to(PACKAGE.parent)} cannot be read as Python: {error}") from None


@functools.cache
def hash_behavior(file: Path) -> str:
    """Return the hexadecimal SHA-256 of the behavior of a module, which is the same under every version of Python."""
    return _hash_nodes(_strip_texts(_parse_module(file)))


def hash_source(source: str) -> str:
    """Return the `hash_behavior` of a module with the text `source`.

    Raises:
        SyntaxError, ValueError: if the text is not Python.
    """
    return _hash_nodes(_strip_texts(ast.parse(source)))


def hash_definitions(source: str) -> dict[str, str]:
    """Map each part of a module with the text `source` to the hash of its behavior.

    A part is a function, a class, a method (`Class.method`), a variable, or all imports or other statements of the
    module (`imports`, `statements`). The hash of a class does not cover its methods.

    Raises:
        SyntaxError, ValueError: if the text is not Python.
    """
    parts: dict[str, list[ast.AST]] = {}
    for node in _strip_texts(ast.parse(source)).body:
        for name, part in _split_definitions(node):
            parts.setdefault(name, []).append(part)
    return {name: _hash_nodes(nodes) for name, nodes in parts.items()}


def _split_definitions(node: ast.stmt) -> Iterator[tuple[str, ast.AST]]:
    """Yield the name and syntax tree of each part of a top-level statement."""
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


def _strip_texts(tree: ast.Module) -> ast.Module:
    """Remove from `tree`, in place, everything that does not affect a result."""
    cleaned: ast.Module = _RemoveTexts().visit(_RemoveTypeChecking().visit(tree))
    return cleaned


def _hash_nodes(node: Any) -> str:
    return hashlib.sha256(json.dumps(_to_json(node)).encode()).hexdigest()


def _to_json(node: Any) -> Any:
    """Convert a syntax tree to JSON values.

    Empty fields are left out: new versions of Python add fields, which are empty for existing code.
    """
    if isinstance(node, ast.AST):
        fields = {name: _to_json(value) for name, value in ast.iter_fields(node) if value is not None and value != []}
        return [type(node).__name__, fields]
    if isinstance(node, list):
        return [_to_json(item) for item in node]
    return [type(node).__name__, repr(node)]


class _RemoveTypeChecking(ast.NodeTransformer):
    """Removes `if TYPE_CHECKING:` blocks, which never run."""

    def visit_If(self, node: ast.If) -> Any:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return [self.visit(statement) for statement in node.orelse]
        return self.generic_visit(node)


class _RemoveTexts(ast.NodeTransformer):
    """Removes docstrings, and replaces all strings of log lines and errors by one constant."""

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
        if not _is_message_call(node.func):
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
        """Replace an operation on texts, such as `+` or `%`, by one text."""
        node = ast.BinOp(self.visit(node.left), node.op, self.visit(node.right))
        return _TEXT if _TEXT in (node.left, node.right) else node


def _is_message_call(function: ast.expr) -> bool:
    """Return True if a call creates a message for people: a log line, an error or a warning."""
    if isinstance(function, ast.Attribute):
        if function.attr in _LOG_METHODS:
            logger = function.value.func if isinstance(function.value, ast.Call) else function.value
            return getattr(logger, "id", getattr(logger, "attr", "")) in _LOGGERS
        return function.attr in _MESSAGE_FUNCTIONS or function.attr.endswith(("Error", "Warning"))
    name = getattr(function, "id", "")
    return name in _MESSAGE_FUNCTIONS or name.endswith(("Error", "Warning"))
