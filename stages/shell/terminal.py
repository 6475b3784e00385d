"""Output of a stage on a terminal: errors as panels, or as plain text if stderr is piped or NO_COLOR is set."""

import os
import sys

from stages.core.errors import printable_lines


def is_plain() -> bool:
    """Return True if stderr should only get plain lines of text."""
    return not sys.stderr.isatty() or "NO_COLOR" in os.environ


def show_error(stage: str, text: str) -> None:
    """Write the error that ended `stage` to stderr."""
    text = printable_lines(text)
    if is_plain():
        sys.stderr.write(f"{stage}: error: {text}\n")
        return
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    Console(stderr=True).print(Panel(Text(text), title=f"{stage}: error", title_align="left", border_style="red"))
