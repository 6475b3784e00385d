"""The keys of a config dataclass, each with what it may be in words, for help and documentation."""

import functools
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import yaml
from pydantic import TypeAdapter

SECTION = "a section (below)"


class Key(NamedTuple):
    """A key of a schema."""

    name: str
    """Dotted, below the place where the schema stands."""
    allowed: str
    meaning: str


@functools.cache
def keys_of(schema: Any) -> tuple[Key, ...]:
    """The keys of a dataclass, sections taken apart."""
    whole = TypeAdapter(schema).json_schema()
    return tuple(_keys(whole, whole.get("$defs", {}), ""))


def _keys(schema: dict[str, Any], definitions: dict[str, Any], prefix: str) -> Iterator[Key]:
    for name, value in schema["properties"].items():
        options = [definitions.get(str(option.get("$ref")).rpartition("/")[2], option) for option in _options(value)]
        section = next((option for option in options if "properties" in option), None)
        meaning = value.get("description") or (section or {}).get("description", "")
        if section is None or len(options) > 1 or meaning:
            yield Key(prefix + name, describe_type(value), " ".join(meaning.split()))
        if section is not None:
            yield from _keys(section, definitions, f"{prefix}{name}.")


def _options(schema: dict[str, Any]) -> list[dict[str, Any]]:
    options: list[dict[str, Any]] = schema.get("anyOf", [schema])
    return options


def describe_type(schema: dict[str, Any]) -> str:
    """The type and the range that a JSON schema states, in words."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(describe_type(option) for option in schema["anyOf"]))
    if "$ref" in schema:
        return SECTION
    if "discriminator" in schema:
        kinds = schema["discriminator"]
        return f"sections with {kinds['propertyName']}: {', '.join(map(code, kinds['mapping']))}"
    if "enum" in schema or "const" in schema:
        options = schema.get("enum", [schema.get("const")])
        return ", ".join(code(shown(option)) for option in options) if len(options) < 10 else f"{len(options)} names"
    if schema.get("type") == "array":
        return f"list of {describe_type(schema['items'])}" + (" (not empty)" if schema.get("minItems") else "")
    words = {"string": "text", "integer": "whole number", "number": "number", "object": "mapping", "null": "`null`"}
    words["boolean"] = "`true`, `false`"
    return words.get(schema.get("type", ""), "see transformers") + _range(schema)


def _range(schema: dict[str, Any]) -> str:
    words = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "to below"}
    return "".join(f" {word} {schema[bound]:.12g}" for bound, word in words.items() if bound in schema)


def shown(value: Any) -> str:
    """A value as YAML writes it in a line; `{...}` for a long one."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000, sort_keys=False)
    text = text.removesuffix("\n").removesuffix("\n...")
    if "\n" in text:  # YAML folds line breaks in a text, unless it escapes them
        text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[0] + "..." + text[-1]


def code(text: str) -> str:
    return f"`{text}`"
