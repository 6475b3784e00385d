"""The configuration in conf/data that tools.add_data writes, its check, and commands quoted for a shell."""

import re
import shlex
from typing import Any, NamedTuple

import yaml

from stages.core.compose import PARAMS, compose, load
from stages.core.config import CONF, find, read_yaml
from stages.core.errors import ConfigError, printable
from tools.check import missing_packages, schema_of

TEMPLATE = "files"  # the configuration that is copied
# In place of its last section: what a document is made of.
MESSAGES = """\
flatten:
  messages: true            # a document is a conversation; what the assistant says counts
"""
ANSWERS = r"""flatten:
  prompt: [title, selftext] # given, and does not count
  completion: [answers.text]
  joiner: " "
  separator: "\\n\\n"         # between the two
"""  # escaped as a replacement of re.sub


class Choice(NamedTuple):
    """What a configuration says of the columns."""

    texts: list[str]
    title: str | None
    key: list[str]
    """Columns that decide the split; none: the title, or the text where there is no title."""
    groups: list[str]
    text_record: str
    roles: str | None = None
    """Column of the roles beside the texts, which are then messages."""
    answers_only: bool = False
    """The title is a prompt, and the texts are the completion that counts."""


def configuration(path: str, choice: Choice) -> str:
    """The text of conf/data/NAME.yaml: the template's, with the values chosen."""
    text = (CONF / "data" / f"{TEMPLATE}.yaml").read_text(encoding="utf-8")
    body = re.sub(r"\A(#.*\n)*", "", text)
    if choice.roles is not None or choice.answers_only:
        body = re.sub(r"^flatten:(.|\n)*", MESSAGES if choice.roles is not None else ANSWERS, body, flags=re.MULTILINE)
    header = f"# {printable(path)}, as `python -m tools.add_data` found it.\n"
    return header + set_values(body, changed_values(choice))


def changed_values(choice: Choice) -> dict[str, Any]:
    """Dotted key to value of what differs from the template."""
    values: dict[str, Any] = {"columns.title": choice.title, "columns.texts": choice.texts}
    values |= {"text_record": choice.text_record, "groups": choice.groups, "columns.roles": choice.roles}
    if choice.key:
        values["split.key"] = choice.key[0] if len(choice.key) == 1 else choice.key
    return values


def set_values(text: str, values: dict[str, Any]) -> str:
    """The YAML `text` with the dotted keys of `values` set; its comments stay in place.

    Args:
        text: sections of at most one level, each value in its line.
    """
    lines, section, left = [], "", dict(values)
    for line in text.splitlines():
        match = re.fullmatch(r"( *)(\w+):(.*?)( *)(#.*)?", line)
        if match and not match[1]:
            section = match[2]
        key = f"{section}.{match[2]}" if match and match[1] else section
        if match and key in left:
            new = f"{match[1]}{match[2]}: {yaml_value(left.pop(key))}"
            place = line.index(match[5]) if match[5] else 0
            line = f"{new.ljust(place - 1)} {match[5]}" if match[5] else new
        lines.append(line)
    assert not left, left
    return "\n".join(lines) + "\n"


def yaml_value(value: Any) -> str:
    """A text, a list of texts or null in one line of YAML, which every reader takes for the same."""
    if value is None:
        return "null"
    if isinstance(value, list):
        return f"[{', '.join(map(yaml_value, value))}]"
    # What is plain to one version of YAML is a number, a date or a boolean to another.
    if re.fullmatch(r"[A-Za-z/][\w./-]*", value, flags=re.ASCII) and isinstance(yaml.safe_load(value), str):
        return str(value)
    quoted = yaml.safe_dump(value, default_style='"', allow_unicode=True, width=10**9)
    return str(quoted).strip()


def check(name: str, path: str, choice: Choice) -> dict[str, list[str]]:
    """What is wrong with the configuration `name`, as tools.check would find it with data.name and data.path set.

    Returns:
        name of each task to the problems that it has with the data; to those of the data by itself in each.
    """
    written = read_yaml(CONF / "data" / f"{name}.yaml")
    assert all(find(written, key) == value for key, value in changed_values(choice).items()), "YAML reads otherwise"
    of_data = _problems_of("download", [f"data={name}", f"data.path={hydra_value(path)}"], None)
    tasks = list(read_yaml(PARAMS).get("tasks") or {})
    found = {task: [*of_data, *_problems_of("tokenize", [f"data={name}"], task)] for task in tasks}
    return {task: list(dict.fromkeys(problems)) for task, problems in found.items()}


def _problems_of(stage: str, overrides: list[str], task: str | None) -> list[str]:
    try:
        return list(missing_packages(load(schema_of(stage), compose(stage, overrides, item=task))))
    except ConfigError as error:
        return error.problems


# -- commands to type --------------------------------------------------------------------------------------------------


def options(option: str, names: list[str]) -> list[str]:
    """Words of a command line that give `names` to `option`."""
    if any(name.startswith("-") for name in names):
        return [f"{option}={name}" for name in names]
    return [option, *names]


def shell_path(path: str) -> str:
    """`path` as an argument that is not taken for an option."""
    return f"./{path}" if path.startswith("-") else path


def command(*words: str) -> str:
    """`words` as they are typed in a shell."""
    return " ".join(shell_word(word) for word in words)


def shell_word(word: str) -> str:
    """`word` quoted for a shell, without control characters, which would act on the terminal that shows them."""
    if word.isprintable():
        return shlex.quote(word)
    escaped = (c if c.isprintable() and c not in "\\'" else f"\\U{ord(c):08x}" for c in word)
    return f"$'{''.join(escaped)}'"


def hydra_value(text: str) -> str:
    """`text` as the value of an override, in Hydra's quotes where it would not be taken as it is."""
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
