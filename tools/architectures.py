"""What transformers knows of architectures, read from its source in milliseconds where importing it takes seconds."""

import ast
import functools
from importlib.util import find_spec
from pathlib import Path


@functools.cache
def _directory() -> Path:
    spec = find_spec("transformers")
    assert spec is not None and spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0])


def model_types() -> list[str]:
    """The names that `model_type` may have."""
    files = (_directory() / "models").glob("*/configuration_*.py")
    return sorted({name for file in files for name in _classes(file)})


def config_keys(model_type: str) -> set[str] | None:
    """The keys of the architecture's configuration; None where there is no such architecture."""
    models = _directory() / "models"
    usual = models / model_type / f"configuration_{model_type}.py"  # most have one of their own; the others are sought
    for file in [usual] if usual.is_file() else models.glob("*/configuration_*.py"):
        found = _classes(file).get(model_type)
        if found is not None:
            bodies = [found, *(node for node in _tree(_directory() / "configuration_utils.py").body if _is_base(node))]
            return {key for body in bodies for key in _keys(body)}
    return None


def _is_base(node: ast.stmt) -> bool:
    return isinstance(node, ast.ClassDef) and node.name == "PreTrainedConfig"


@functools.cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


@functools.cache
def _classes(file: Path) -> dict[str, ast.ClassDef]:
    """model_type to the class that has it, of a configuration file."""
    found = {}
    if "model_type" in file.read_text(encoding="utf-8"):
        for node in _tree(file).body:
            for item in node.body if isinstance(node, ast.ClassDef) else []:
                match item:
                    case ast.Assign(targets=[ast.Name(id="model_type")], value=ast.Constant(value=str(name))):
                        assert isinstance(node, ast.ClassDef)
                        found[name] = node
    return found


def _keys(node: ast.stmt) -> set[str]:
    assert isinstance(node, ast.ClassDef)
    keys = set()
    for item in node.body:
        match item:
            case ast.AnnAssign(target=ast.Name(id=name)):
                keys.add(name)
            case ast.Assign(targets=[ast.Name(id="attribute_map")], value=ast.Dict(keys=names)):
                keys |= {name.value for name in names if isinstance(name, ast.Constant) and isinstance(name.value, str)}
    return keys
