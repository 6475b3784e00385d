"""Architectures of transformers and the keys of their configurations, read from its source without importing it."""

import ast
import functools
from importlib.util import find_spec
from pathlib import Path


@functools.cache
def _find_package() -> Path:
    spec = find_spec("transformers")
    assert spec is not None and spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0])


def list_model_types() -> list[str]:
    """Return all values of `model_type`."""
    files = (_find_package() / "models").glob("*/configuration_*.py")
    return sorted({name for file in files for name in _find_config_classes(file)})


def find_config_keys(model_type: str) -> set[str] | None:
    """Return the keys of an architecture's configuration, or None if it does not exist."""
    models = _find_package() / "models"
    usual = models / model_type / f"configuration_{model_type}.py"  # most have their own file; others are searched for
    for file in [usual] if usual.is_file() else models.glob("*/configuration_*.py"):
        found = _find_config_classes(file).get(model_type)
        if found is not None:
            base_file = _parse_file(_find_package() / "configuration_utils.py")
            bodies = [found, *(node for node in base_file.body if _is_base_class(node))]
            return {key for body in bodies for key in _list_class_keys(body)}
    return None


def _is_base_class(node: ast.stmt) -> bool:
    return isinstance(node, ast.ClassDef) and node.name == "PreTrainedConfig"


@functools.cache
def _parse_file(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


@functools.cache
def _find_config_classes(file: Path) -> dict[str, ast.ClassDef]:
    """Return model_type to configuration class, for the classes of a file."""
    found = {}
    if "model_type" in file.read_text(encoding="utf-8"):
        for node in _parse_file(file).body:
            for item in node.body if isinstance(node, ast.ClassDef) else []:
                match item:
                    case ast.Assign(targets=[ast.Name(id="model_type")], value=ast.Constant(value=str(name))):
                        assert isinstance(node, ast.ClassDef)
                        found[name] = node
    return found


def _list_class_keys(node: ast.stmt) -> set[str]:
    assert isinstance(node, ast.ClassDef)
    keys = set()
    for item in node.body:
        match item:
            case ast.AnnAssign(target=ast.Name(id=name)):
                keys.add(name)
            case ast.Assign(targets=[ast.Name(id="attribute_map")], value=ast.Dict(keys=names)):
                keys |= {name.value for name in names if isinstance(name, ast.Constant) and isinstance(name.value, str)}
    return keys
