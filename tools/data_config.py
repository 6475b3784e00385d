"""Build and check the configuration that tools.add_data writes to conf/data, and quote commands for a shell."""

import re
import shlex
from typing import Any, NamedTuple

import yaml

from stages.core.compose import PARAMS, compose_config, load_config
from stages.core.config import CONF, find_value, read_yaml
from stages.core.errors import ConfigError, printable
from tools.check import find_missing_packages, get_config_class

TEMPLATE = "files"  # name of the configuration that is copied
# These replace its last section, `flatten`, which says how documents are built from records.
MESSAGES_SECTION = """\
flatten:
  messages: true            # a document is a conversation; only the assistant's messages count
"""
ANSWERS_SECTION = r"""flatten:
  prompt: [title, selftext] # given; does not count
  completion: [answers.text]
  joiner: " "
  separator: "\\n\\n"         # between prompt and completion
"""  # escaped as a replacement of re.sub


class DataChoice(NamedTuple):
    """Columns and options that are written to a configuration of conf/data."""

    texts: list[str]
    title: str | None
    key: list[str]
    """Columns that decide the split. Empty: the title decides, or the text if there is no title column."""
    groups: list[str]
    text_record: str
    roles: str | None = None
    """Column with the role of each text. The texts are then messages of a conversation."""
    answers_only: bool = False
    """If True, the title is the prompt and only the texts, as its completion, are trained on."""


def build_configuration(path: str, choice: DataChoice) -> str:
    """Return the text of conf/data/NAME.yaml: the template with the chosen values."""
    text = (CONF / "data" / f"{TEMPLATE}.yaml").read_text(encoding="utf-8")
    body = re.sub(r"\A(#.*\n)*", "", text)
    if choice.roles is not None or choice.answers_only:
        body = re.sub(
            r"^flatten:(.|\n)*",
            MESSAGES_SECTION if choice.roles is not None else ANSWERS_SECTION,
            body,
            flags=re.MULTILINE,
        )
    header = f"# {printable(path)}, written by `python -m tools.add_data`.\n"
    return header + set_yaml_values(body, get_changed_values(choice))


def get_changed_values(choice: DataChoice) -> dict[str, Any]:
    """Return the values to set in the template, by dotted key."""
    values: dict[str, Any] = {"columns.title": choice.title, "columns.texts": choice.texts}
    values |= {"text_record": choice.text_record, "groups": choice.groups, "columns.roles": choice.roles}
    if choice.key:
        values["split.key"] = choice.key[0] if len(choice.key) == 1 else choice.key
    return values


def set_yaml_values(text: str, values: dict[str, Any]) -> str:
    """Set the dotted keys of `values` in YAML text, and keep its comments.

    Args:
        text: YAML with sections nested at most one level deep and one value per line.
    """
    lines, section, remaining = [], "", dict(values)
    for line in text.splitlines():
        match = re.fullmatch(r"( *)(\w+):(.*?)( *)(#.*)?", line)
        if match and not match[1]:
            section = match[2]
        key = f"{section}.{match[2]}" if match and match[1] else section
        if match and key in remaining:
            new = f"{match[1]}{match[2]}: {format_yaml_value(remaining.pop(key))}"
            comment_column = line.index(match[5]) if match[5] else 0
            line = f"{new.ljust(comment_column - 1)} {match[5]}" if match[5] else new
        lines.append(line)
    assert not remaining, remaining
    return "\n".join(lines) + "\n"


def format_yaml_value(value: Any) -> str:
    """Format a text, a list of texts or None as one line of YAML that all parsers read as the same value."""
    if value is None:
        return "null"
    if isinstance(value, list):
        return f"[{', '.join(map(format_yaml_value, value))}]"
    # Versions of YAML differ in which unquoted texts are numbers, dates or booleans.
    if re.fullmatch(r"[A-Za-z/][\w./-]*", value, flags=re.ASCII) and isinstance(yaml.safe_load(value), str):
        return str(value)
    quoted = yaml.safe_dump(value, default_style='"', allow_unicode=True, width=10**9)
    return str(quoted).strip()


def check_configuration(name: str, path: str, choice: DataChoice) -> dict[str, list[str]]:
    """Find the problems that tools.check would report with data.name and data.path set to `name` and `path`.

    Returns:
        Task to its problems. Problems with the data itself are listed for every task.
    """
    written = read_yaml(CONF / "data" / f"{name}.yaml")
    changed = get_changed_values(choice)
    assert all(find_value(written, key) == value for key, value in changed.items()), "YAML reads other values"
    data_problems = _find_stage_problems("download", [f"data={name}", f"data.path={quote_hydra_value(path)}"], None)
    tasks = list(read_yaml(PARAMS).get("tasks") or {})
    found = {task: [*data_problems, *_find_stage_problems("tokenize", [f"data={name}"], task)] for task in tasks}
    return {task: list(dict.fromkeys(problems)) for task, problems in found.items()}


def _find_stage_problems(stage: str, overrides: list[str], task: str | None) -> list[str]:
    try:
        return list(
            find_missing_packages(load_config(get_config_class(stage), compose_config(stage, overrides, item=task)))
        )
    except ConfigError as error:
        return error.problems


# -- commands ----------------------------------------------------------------------------------------------------------


def build_option(option: str, names: list[str]) -> list[str]:
    """Return the command-line arguments that pass `names` to `option`."""
    if any(name.startswith("-") for name in names):
        return [f"{option}={name}" for name in names]
    return [option, *names]


def format_path_argument(path: str) -> str:
    """Return `path` in a form that a command line does not take for an option."""
    return f"./{path}" if path.startswith("-") else path


def format_command(*words: str) -> str:
    """Return a command line for a shell, with each word quoted."""
    return " ".join(quote_shell_word(word) for word in words)


def quote_shell_word(word: str) -> str:
    """Quote `word` for a shell. Control characters are escaped because a terminal that shows them would act on them."""
    if word.isprintable():
        return shlex.quote(word)
    escaped = (c if c.isprintable() and c not in "\\'" else f"\\U{ord(c):08x}" for c in word)
    return f"$'{''.join(escaped)}'"


def quote_hydra_value(text: str) -> str:
    """Return `text` as the value of a Hydra override, quoted unless Hydra reads it as the same text without quotes."""
    if re.fullmatch(r"[A-Za-z./][A-Za-z0-9_./:-]*", text) and text.lower() not in (
        "true",
        "false",
        "null",
        "nan",
        "inf",
    ):
        return text
    escaped = re.sub(r"(\\*)'", lambda found: found[1] * 2 + r"\'", text)
    return "'" + re.sub(r"\\+$", lambda found: found[0] * 2, escaped) + "'"
