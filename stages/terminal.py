"""What a stage shows on a terminal: help that documents it, errors as panels; plain where piped or NO_COLOR is set."""

import json
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf
from pydantic import TypeAdapter

LIMITS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def is_plain() -> bool:
    """Whether stderr gets lines of text and nothing else."""
    return not sys.stderr.isatty() or "NO_COLOR" in os.environ


def show_error(stage: str, text: str) -> None:
    """Write what ended `stage` to stderr."""
    if is_plain():
        sys.stderr.write(f"{stage}: error: {text}\n")
        return
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    Console(stderr=True).print(Panel(Text(text), title=f"{stage}: error", title_align="left", border_style="red"))


class Key(NamedTuple):
    """A key of a config, as its schema declares it."""

    name: str
    """Dotted, as on the command line."""
    kind: str
    """Type, allowed values and range."""
    meaning: str


def keys(schema: Any) -> Iterator[Key]:
    """The keys that `schema` takes, those of its sections included."""
    described = TypeAdapter(schema).json_schema()
    yield from _keys(described, described.get("$defs", {}), "")


def _keys(section: dict[str, Any], sections: dict[str, Any], prefix: str) -> Iterator[Key]:
    for name, field in section["properties"].items():
        options = [_resolved(option, sections) for option in field.get("anyOf", [field])]
        inner = next((option for option in options if "properties" in option), None)
        if inner is None or len(options) > 1 or "description" in field:
            kind = " | ".join("section" if "properties" in option else _kind(option, sections) for option in options)
            yield Key(prefix + name, kind, " ".join(field.get("description", "").split()))
        if inner is not None:
            yield from _keys(inner, sections, f"{prefix}{name}.")


def _resolved(value: dict[str, Any], sections: dict[str, Any]) -> dict[str, Any]:
    return sections[value["$ref"].rpartition("/")[2]] if "$ref" in value else value


def _kind(value: dict[str, Any], sections: dict[str, Any]) -> str:
    if "anyOf" in value:
        return " | ".join(_kind(_resolved(option, sections), sections) for option in value["anyOf"])
    if "enum" in value:
        return " | ".join(map(str, value["enum"]))
    if "const" in value:
        return str(value["const"])
    if value.get("type") == "array":
        return f"list of {_kind(_resolved(value.get('items', {}), sections), sections)}"
    limits = [f"{sign} {value[limit]:.12g}" for limit, sign in LIMITS.items() if limit in value]
    names = {"integer": "int", "number": "float", "string": "str", "boolean": "bool", "object": "mapping"}
    return " ".join([names.get(value.get("type", ""), value.get("type", "any")), *limits])


def help_text(documentation: str, schema: Any, composed: DictConfig, choices: dict[str, list[str]]) -> str:
    """What a stage does, its groups, and its keys with the values that were composed for them.

    Args:
        choices: the config groups of the stage to the names of their configurations.
    """
    width = shutil.get_terminal_size().columns
    lines = [documentation.strip(), "", "Groups, GROUP=NAME: the configurations conf/GROUP/NAME.yaml"]
    for group, names in choices.items():
        lines += _wrapped(", ".join(names), width, f"  {group:9} ", " " * 12)
    lines += ["", "Keys, KEY=VALUE: those of a group have their values in its files, shown where one is chosen"]
    for key in keys(schema):
        value = OmegaConf.select(composed, key.name)
        chosen = value is not None and not OmegaConf.is_dict(value)
        shown = f" = {json.dumps(OmegaConf.to_object(value) if OmegaConf.is_list(value) else value)}" if chosen else ""
        lines += ["", *_wrapped(f"{key.name}{shown}  ({key.kind})", width, "  ", " " * 6)]
        lines += _wrapped(key.meaning, width, " " * 6, " " * 6)
    return "\n".join([*lines, "", "--cfg job prints the configuration, --hydra-help tells of Hydra's own options."])


def _wrapped(text: str, width: int, first: str, others: str) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=others, break_on_hyphens=False)
