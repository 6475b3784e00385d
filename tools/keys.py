"""Print the keys of a stage: type, range, meaning and the value that its configuration composes.

Command python -m tools.keys train [KEY=VALUE ...]

Also the descriptions of keys that docs/configuration.md and the errors of other tools show.
"""

import argparse
import functools
import json
import shutil
import signal
import sys
import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple

import yaml
from pydantic import TypeAdapter

from stages.core.compose import compose_config, identify_stage, read_root
from stages.core.config import MISSING, find_value, list_configurations
from stages.core.errors import ConfigError, StageError
from stages.core.source_code import list_stages

SECTION = "a section (below)"


def main() -> None:
    from tools.check import get_config_class

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], prog="python -m tools.keys")
    parser.add_argument("stage", choices=[*list_stages(), "code"])
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as on the command line of the stage")
    arguments = parser.parse_intermixed_args()
    try:
        name, item = identify_stage(arguments.stage, "", arguments.overrides)
        composition = compose_config(name, arguments.overrides, item)
        if composition.problems:
            raise ConfigError(composition.problems)
    except StageError as error:
        sys.exit(f"keys: error: {error}")
    print(format_keys(get_config_class(arguments.stage), composition.values, read_root(name).groups))


def format_keys(schema: Any, values: dict[str, Any], groups: list[str]) -> str:
    """Return the config groups of a stage and its keys, with the `values` that were composed for them."""
    width = shutil.get_terminal_size().columns
    lines = ["Groups (GROUP=NAME chooses conf/GROUP/NAME.yaml):"]
    for group in groups:
        lines += _wrap(", ".join(list_configurations(group)), width, f"  {group:9} ", " " * 12)
    lines += ["", "Keys (KEY=VALUE; a key of a group that is not chosen has no value here):"]
    for key in list_keys(schema):
        value = find_value(values, key.name)
        given = "" if value in (MISSING, None, "???") or isinstance(value, dict) else f" = {format_value(value)}"
        lines += ["", *_wrap(f"{key.name}{given}  ({key.allowed})", width, "  ", " " * 6)]
        lines += _wrap(key.meaning, width, " " * 6, " " * 6)
    return "\n".join(lines)


def _wrap(text: str, width: int, first: str, others: str) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=others, break_on_hyphens=False)


class Key(NamedTuple):
    """A key of a config dataclass."""

    name: str
    """Dotted name, relative to the dataclass."""
    allowed: str
    """Type and range in words."""
    meaning: str
    """Docstring of the field."""


@functools.cache
def list_keys(schema: Any) -> tuple[Key, ...]:
    """Return the keys of a dataclass, including those of its sections."""
    whole = TypeAdapter(schema).json_schema()
    return tuple(_walk_keys(whole, whole.get("$defs", {}), ""))


def _walk_keys(schema: dict[str, Any], definitions: dict[str, Any], prefix: str) -> Iterator[Key]:
    for name, value in schema["properties"].items():
        names = [(str(option.get("$ref")).rpartition("/")[2], option) for option in _get_options(value)]
        options = [definitions.get(reference, option) for reference, option in names]
        section = next((option for option in options if "properties" in option), None)
        meaning = value.get("description") or (section or {}).get("description", "")
        if section is None or len(options) > 1 or meaning:
            yield Key(prefix + name, describe_type(value), " ".join(meaning.split()))
        if section is not None:
            yield from _walk_keys(section, definitions, f"{prefix}{name}.")


def _get_options(schema: dict[str, Any]) -> list[dict[str, Any]]:
    options: list[dict[str, Any]] = schema.get("anyOf", [schema])
    return options


def describe_type(schema: dict[str, Any]) -> str:
    """Return the type and the range of a JSON schema in words."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(describe_type(option) for option in schema["anyOf"]))
    if "$ref" in schema:
        return SECTION
    if "discriminator" in schema:
        kinds = schema["discriminator"]
        return f"sections with {kinds['propertyName']}: {', '.join(map(format_code, kinds['mapping']))}"
    if "enum" in schema or "const" in schema:
        options = schema.get("enum", [schema.get("const")])
        if len(options) >= 10:
            return f"{len(options)} names"
        return ", ".join(format_code(format_value(option)) for option in options)
    if schema.get("type") == "array":
        return f"list of {describe_type(schema['items'])}" + (" (not empty)" if schema.get("minItems") else "")
    words = {"string": "text", "integer": "whole number", "number": "number", "object": "mapping", "null": "`null`"}
    words["boolean"] = "`true`, `false`"
    return words.get(schema.get("type", ""), "see transformers") + _describe_range(schema)


def _describe_range(schema: dict[str, Any]) -> str:
    words = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "to below"}
    return "".join(f" {word} {schema[bound]:.12g}" for bound, word in words.items() if bound in schema)


def format_value(value: Any) -> str:
    """Return a value as YAML on one line; `{...}` if it is long."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000, sort_keys=False)
    text = text.removesuffix("\n").removesuffix("\n...")
    if "\n" in text:  # YAML folds a text with line breaks unless it escapes them
        text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[0] + "..." + text[-1]


def format_code(text: str) -> str:
    return f"`{text}`"


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end silently in `| head -1`
    main()
