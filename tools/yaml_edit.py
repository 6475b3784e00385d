"""Set values in the text of a YAML file, leaving everything else, including comments, unchanged."""

import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from stages.core.config import MISSING
from stages.core.errors import StageError, printable
from tools.data_config import format_yaml_value

_INDENT = 2


def edit_yaml(text: str, values: Mapping[str, Any], where: str) -> str:
    """Return `text` with the nested `values` set. A missing key is added at the end of its section.

    Args:
        values: an empty mapping replaces a section; any other mapping is merged into it.
        where: name of the file, for messages.

    Raises:
        StageError: if the values cannot be set in YAML of this form.
    """
    expected = merge_values(load_yaml(text), values)
    newline = "\r\n" if "\r\n" in text else "\n"
    edited = text.replace("\r\n", "\n")
    try:
        for path, value in list_leaves(values):
            if not is_same_value(find_path_value(load_yaml(edited), path), value):
                edited = set_value(edited, path, value)
        understood = is_same_value(load_yaml(edited), expected)
    except (yaml.YAMLError, OmegaConfBaseException):
        understood = False
    if not understood:
        raise StageError(f"{where}: this form of YAML cannot be edited: set {printable(', '.join(values))} by hand")
    return edited.replace("\n", newline)


def load_yaml(text: str) -> Any:
    """Load the values of a YAML text as Hydra does."""
    return OmegaConf.to_container(OmegaConf.create(text), resolve=False)


def merge_values(values: Any, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of `values` with the nested `changes` set."""
    merged = dict(values) if isinstance(values, dict) else {}
    for key, value in changes.items():
        merged[key] = merge_values(merged.get(key), value) if isinstance(value, dict) and value else value
    return merged


def list_leaves(values: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield path and value of each value that is not a section."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from list_leaves(value, (*path, str(key)))
        else:
            yield (*path, str(key)), value


def find_path_value(values: Any, path: tuple[str, ...]) -> Any:
    """Return the value at a path of nested mappings; MISSING if there is none."""
    for key in path:
        values = values.get(key, MISSING) if isinstance(values, dict) else MISSING
    return values


def is_same_value(left: Any, right: Any) -> bool:
    """Return True if two values are equal and have the same types; 1, 1.0 and true are different."""
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(is_same_value(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(is_same_value, left, right))
    return type(left) is type(right) and bool(left == right)


def set_value(text: str, path: tuple[str, ...], value: Any) -> str:
    """Return `text` with the value at `path` set."""
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    if not isinstance(node, yaml.MappingNode) or node.flow_style:
        return text  # unchanged, which edit_yaml reports
    for depth, key in enumerate(path):
        name, child = next(((name, child) for name, child in node.value if name.value == key), (None, None))
        if name is None or child is None:
            return insert_key(text, node, path[depth:], value)
        if depth + 1 == len(path) or not isinstance(child, yaml.MappingNode) or child.flow_style:
            if rest := path[depth + 1 :]:
                value = merge_values(find_path_value(load_yaml(text), path[: depth + 1]), nest_value(rest, value))
            if isinstance(child, yaml.CollectionNode) and not child.flow_style:
                return replace_block(
                    text, text.index(":", name.end_mark.index) + 1, find_end(text, child), format_flow(value)
                )
            return replace_value(text, child.start_mark.index, find_end(text, child), format_flow(value))
        node = child
    return text


def nest_value(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """Return nested mappings with `value` at `path`."""
    for key in reversed(path):
        value = {key: value}
    return dict(value)


def find_end(text: str, node: yaml.Node) -> int:
    """Return the index at which the text of a node ends; its `end_mark` may be at the start of the next node."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return find_end(text, last[1] if isinstance(last, tuple) else last)
    start, end = node.start_mark.index, node.end_mark.index
    return start + len(text[start:end].rstrip())


def replace_value(text: str, start: int, end: int, new: str) -> str:
    """Replace a value in `text`; a comment after it stays in its column if there is room."""
    space = "" if text[start - 1 : start].isspace() else " "
    line_start = text.rfind("\n", 0, start) + 1
    head, tail = text[:start] + space + new, text[end:]
    if comment := re.match(r"( +)#", tail):
        column = end + len(comment[1]) - (text.rfind("\n", 0, end) + 1)
        tail = " " * max(1, column - (len(head) - line_start)) + tail[len(comment[1]) :]
    return head + tail


def replace_block(text: str, start: int, end: int, new: str) -> str:
    """Replace a block in `text`, which starts after its key and colon, by a value on one line."""
    comment = text[start : text.index("\n", start)].strip()
    return f"{text[:start]} {new}{'  ' if comment else ''}{comment}{text[end:]}"


def insert_key(text: str, node: yaml.MappingNode, path: tuple[str, ...], value: Any) -> str:
    """Add a key at the end of a block mapping in `text`, creating sections if `path` has several keys."""
    column = node.value[0][0].start_mark.column
    lines = [f"{' ' * (column + _INDENT * depth)}{format_flow(key)}:" for depth, key in enumerate(path)]
    line_end = text.find("\n", find_end(text, node))
    head, tail = (text + "\n", "") if line_end < 0 else (text[: line_end + 1], text[line_end + 1 :])
    return head + "\n".join(lines) + f" {format_flow(value)}\n" + tail


def format_flow(value: Any) -> str:
    """Format a value as one line of YAML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{format_flow(str(key))}: {format_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(format_flow, value)) + "]"
    if isinstance(value, float) and 1e-12 < abs(value) < 1e12:
        digits = f"{Decimal(repr(value)):f}"
        return digits if "." in digits else f"{digits}.0"
    if isinstance(value, bool | int | float):
        return yaml.safe_dump(value).split("\n")[0]
    return format_yaml_value(value)
