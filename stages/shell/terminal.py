"""What a stage shows on a terminal: help that documents it, errors as panels; plain where piped or NO_COLOR is set."""

import os
import shutil
import sys
import textwrap
from typing import Any

from stages.core.config import MISSING, choices, find
from stages.core.errors import printable_lines
from stages.shell.keys import keys_of, shown


def is_plain() -> bool:
    """Whether stderr gets lines of text and nothing else."""
    return not sys.stderr.isatty() or "NO_COLOR" in os.environ


def show_error(stage: str, text: str) -> None:
    """Write what ended `stage` to stderr."""
    text = printable_lines(text)
    if is_plain():
        sys.stderr.write(f"{stage}: error: {text}\n")
        return
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    Console(stderr=True).print(Panel(Text(text), title=f"{stage}: error", title_align="left", border_style="red"))


def help_text(documentation: str, schema: Any, values: dict[str, Any], groups: list[str]) -> str:
    """What a stage does, its config groups, and its keys with the values that were composed for them."""
    width = shutil.get_terminal_size().columns
    lines = [documentation.strip(), "", "Groups, GROUP=NAME: the configurations conf/GROUP/NAME.yaml"]
    for group in groups:
        lines += _wrapped(", ".join(choices(group)), width, f"  {group:9} ", " " * 12)
    lines += ["", "Keys, KEY=VALUE: those of a group have their values in its files, shown where one is chosen"]
    for key in keys_of(schema):
        value = find(values, key.name)
        given = "" if value in (MISSING, None, "???") or isinstance(value, dict) else f" = {shown(value)}"
        lines += ["", *_wrapped(f"{key.name}{given}  ({key.allowed})", width, "  ", " " * 6)]
        lines += _wrapped(key.meaning, width, " " * 6, " " * 6)
    return "\n".join([*lines, "", "--cfg job prints the configuration."])


def _wrapped(text: str, width: int, first: str, others: str) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=others, break_on_hyphens=False)
