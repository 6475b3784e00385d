"""Setting values in the text of a YAML file; everything else, comments included, stays as it is."""

import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from stages.core.config import MISSING
from stages.core.errors import StageError, printable
from tools.data_config import yaml_value

_INDENT = 2


def edit_yaml(text: str, values: Mapping[str, Any], where: str) -> str:
    """`text` with the nested `values` set. A key that is not there is added at the end of its section.

    Args:
        values: an empty mapping replaces the section, any other is merged into it.
        where: name of the file, for messages.

    Raises:
        StageError: if the text has a form in which the values cannot be set.
    """
    expected = merge(load(text), values)
    newline = "\r\n" if "\r\n" in text else "\n"
    edited = text.replace("\r\n", "\n")
    try:
        for path, value in leaves(values):
            if not same(find_path(load(edited), path), value):
                edited = set_value(edited, path, value)
        understood = same(load(edited), expected)
    except (yaml.YAMLError, OmegaConfBaseException):
        understood = False
    if not understood:
        raise StageError(f"{where}: its form is not understood: set {printable(', '.join(values))} by hand")
    return edited.replace("\n", newline)


def load(text: str) -> Any:
    """The values of a YAML text, read as Hydra reads it."""
    return OmegaConf.to_container(OmegaConf.create(text), resolve=False)


def merge(values: Any, changes: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with the nested `changes` set."""
    merged = dict(values) if isinstance(values, dict) else {}
    for key, value in changes.items():
        merged[key] = merge(merged.get(key), value) if isinstance(value, dict) and value else value
    return merged


def leaves(values: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Path and value of each value that is not a section."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, (*path, str(key)))
        else:
            yield (*path, str(key)), value


def find_path(values: Any, path: tuple[str, ...]) -> Any:
    """The value at a path of nested mappings; MISSING if there is none."""
    for key in path:
        values = values.get(key, MISSING) if isinstance(values, dict) else MISSING
    return values


def same(left: Any, right: Any) -> bool:
    """Whether two values are equal and of the same types: 1, 1.0 and true are three values."""
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same, left, right))
    return type(left) is type(right) and bool(left == right)


def set_value(text: str, path: tuple[str, ...], value: Any) -> str:
    """`text` with the value at `path` set."""
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    if not isinstance(node, yaml.MappingNode) or node.flow_style:
        return text  # edit_yaml then says so
    for depth, key in enumerate(path):
        name, child = next(((name, child) for name, child in node.value if name.value == key), (None, None))
        if name is None or child is None:
            return insert(text, node, path[depth:], value)
        if depth + 1 == len(path) or not isinstance(child, yaml.MappingNode) or child.flow_style:
            if rest := path[depth + 1 :]:
                value = merge(find_path(load(text), path[: depth + 1]), nest(rest, value))
            if isinstance(child, yaml.CollectionNode) and not child.flow_style:
                return replace_block(text, text.index(":", name.end_mark.index) + 1, end_of(text, child), flow(value))
            return replace(text, child.start_mark.index, end_of(text, child), flow(value))
        node = child
    return text


def nest(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """The mapping that has `value` at `path`."""
    for key in reversed(path):
        value = {key: value}
    return dict(value)


def end_of(text: str, node: yaml.Node) -> int:
    """Where the text of a node ends; its own mark is where the next one begins."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return end_of(text, last[1] if isinstance(last, tuple) else last)
    start, end = node.start_mark.index, node.end_mark.index
    return start + len(text[start:end].rstrip())


def replace(text: str, start: int, end: int, new: str) -> str:
    """`text` with a value replaced; a comment after it stays in its column where there is room."""
    space = "" if text[start - 1 : start].isspace() else " "
    line_start = text.rfind("\n", 0, start) + 1
    head, tail = text[:start] + space + new, text[end:]
    if comment := re.match(r"( +)#", tail):
        column = end + len(comment[1]) - (text.rfind("\n", 0, end) + 1)
        tail = " " * max(1, column - (len(head) - line_start)) + tail[len(comment[1]) :]
    return head + tail


def replace_block(text: str, start: int, end: int, new: str) -> str:
    """`text` with the lines of a block, which begins after its key and colon, replaced by a value in one line."""
    comment = text[start : text.index("\n", start)].strip()
    return f"{text[:start]} {new}{'  ' if comment else ''}{comment}{text[end:]}"


def insert(text: str, node: yaml.MappingNode, path: tuple[str, ...], value: Any) -> str:
    """`text` with a key added after the last of a block mapping, in sections of its own where `path` has several."""
    column = node.value[0][0].start_mark.column
    lines = [f"{' ' * (column + _INDENT * depth)}{flow(key)}:" for depth, key in enumerate(path)]
    line_end = text.find("\n", end_of(text, node))
    head, tail = (text + "\n", "") if line_end < 0 else (text[: line_end + 1], text[line_end + 1 :])
    return head + "\n".join(lines) + f" {flow(value)}\n" + tail


def flow(value: Any) -> str:
    """A value in one line of YAML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{flow(str(key))}: {flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(flow, value)) + "]"
    if isinstance(value, float) and 1e-12 < abs(value) < 1e12:
        digits = f"{Decimal(repr(value)):f}"
        return digits if "." in digits else f"{digits}.0"
    if isinstance(value, bool | int | float):
        return yaml.safe_dump(value).split("\n")[0]
    return yaml_value(value)
