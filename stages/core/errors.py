"""The errors that are written for users: what is wrong, where, and how to mend it."""

import re

_LINE_LIMIT = 2000  # characters of a line of a message
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


class StageError(ValueError):
    """Bad input or surroundings, in words that a user can act on."""


class ConfigError(StageError):
    """All that is wrong with a config, a line each."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__(problems[0] if len(problems) == 1 else "\n  ".join(["the configuration is wrong:", *problems]))
        self.problems = problems


def is_error(error: BaseException) -> bool:
    """Whether `error` says that something failed, rather than that the process is to end.

    A panic of Rust code (tokenizers, safetensors) is no Exception, and its class cannot be imported.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def printable(value: object, limit: int = 200) -> str:
    """`value` as text for a message: in one line of at most some `limit` characters.

    Whatever comes from outside (names of files and columns, values, what a server says) passes through here, since it
    may hold megabytes, or control characters with which it would move a terminal's cursor or forge a line of a log.
    """
    text = str(value)
    if len(text) > limit:
        text = f"{text[:limit]}... ({len(text):,} characters)"
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


def without_controls(text: str) -> str:
    """`text` with control characters and marks that change the direction of text escaped; lines and tabs stay."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def printable_lines(message: str) -> str:
    """`message` with each of its lines made printable: the last guard before a terminal or a log."""
    return "\n".join(printable(line, _LINE_LIMIT) for line in message.split("\n"))
