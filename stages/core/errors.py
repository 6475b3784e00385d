"""Errors for users, which say what is wrong, where, and how to fix it."""

import re

_LINE_LIMIT = 2000  # characters per line of a message
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


class StageError(ValueError):
    """Invalid input or a problem of the environment, with a message that a user can act on."""


class ConfigError(StageError):
    """All problems of a config, one per line."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__(problems[0] if len(problems) == 1 else "\n  ".join(["the configuration is wrong:", *problems]))
        self.problems = problems


def is_error(error: BaseException) -> bool:
    """Return True if `error` is a failure, not a request to exit such as KeyboardInterrupt.

    A panic of Rust code (tokenizers, safetensors) is not an Exception, and its class cannot be imported.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def printable(value: object, limit: int = 200) -> str:
    """Format `value` for a message: one line, shortened to about `limit` characters, with control characters escaped.

    Use it for all external text (names of files and columns, values, replies of servers). It may have megabytes, or
    control characters that move the cursor of a terminal or forge a line of a log.
    """
    text = str(value)
    if len(text) > limit:
        text = f"{text[:limit]}... ({len(text):,} characters)"
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


def format_cause(error: BaseException, limit: int = 500) -> str:
    """Format an error of a library as one printable line, with its type if the text is not clear without it."""
    text = " ".join(str(error).split())
    if not text:
        return type(error).__name__
    needs_type = isinstance(error, ArithmeticError | AssertionError | AttributeError | LookupError | TypeError)
    return printable(f"{type(error).__name__}: {text}" if needs_type else text, limit)


def escape_controls(text: str) -> str:
    """Escape control characters and marks that change the direction of text, except newlines and tabs."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def printable_lines(message: str) -> str:
    """Make each line of `message` printable: the last safeguard before a terminal or a log."""
    return "\n".join(printable(line, _LINE_LIMIT) for line in message.split("\n"))
