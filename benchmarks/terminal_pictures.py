"""Take the pictures of a terminal in docs/ anew: training in the middle, the end of a run, an error.

Command uv pip install pyte; python -m benchmarks.terminal_pictures    (after `make`; it trains once more)
"""

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import termios
from collections.abc import Callable

import pyte
from rich.console import Console
from rich.style import Style
from rich.text import Text

from benchmarks.report_pictures import PICTURES, chromium

COLUMNS, ROWS = 110, 40
# Name: command, and what a line shows when the picture is taken (a pattern; None: at the command's end).
TAKEN: dict[str, tuple[str, str | None]] = {
    "training": ("dvc repro --force --single-item train@causal", r" 4\d\d/627"),
    "summary": ("dvc repro --force --single-item evaluate@causal && python -m tools.summary", None),
    "error": ("python -m stages.group_texts block_size=12.5 tokens=data/tokens/causal out=data/blocks/causal", None),
}
# The palette of a dark terminal, by the names that pyte gives.
COLORS = {"black": "#4c566a", "red": "#ff6b6b", "green": "#a3d977", "brown": "#f5d76e", "blue": "#7aa2f7"}
COLORS |= {"magenta": "#d69ae0", "cyan": "#79d7e0", "white": "#e6e6e6"}


def main() -> None:
    with chromium() as browser:
        for name, (command, moment) in TAKEN.items():
            page = browser.new_page()
            page.set_content(html(f"$ {command}", screen_of(command, moment)))
            file = PICTURES / f"terminal-{name}.png"
            page.locator("pre").screenshot(path=file)
            page.close()
            print(f"{file}: {file.stat().st_size / 1e3:.0f} KB")


def screen_of(command: str, moment: str | None) -> list[Text]:
    """The lines of a terminal in which `command` runs, at its end or once `moment` can be read there."""
    screen = pyte.Screen(COLUMNS, ROWS)
    found: list[Text] = []

    def seen() -> None:
        if moment and not found and any(re.search(moment, line) for line in screen.display):
            found.extend(lines_of(screen))

    run(command, pyte.ByteStream(screen), seen)
    assert found or not moment, f"{moment} was never seen"
    return found or lines_of(screen)


def run(command: str, stream: pyte.ByteStream, seen: Callable[[], None]) -> None:
    """Run `command` in a terminal of its own, and call `seen` whenever it has written something."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    kept = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "COLUMNS")}
    env = {**kept, "TERM": "xterm-256color"}
    process = subprocess.Popen(["bash", "-c", command], stdin=theirs, stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    while True:
        try:
            written = os.read(ours, 65536)
        except OSError:  # Linux's way to say that nobody writes any more
            break
        if not written:
            break
        stream.feed(written)
        seen()
    os.close(ours)
    process.wait()


def lines_of(screen: pyte.Screen) -> list[Text]:
    """What a screen shows, in its colors, without the empty lines below."""
    lines = []
    for row in range(ROWS):
        line = Text()
        for column in range(COLUMNS):
            cell = screen.buffer[row][column]
            color = COLORS.get(cell.fg, cell.fg if cell.fg == "default" else f"#{cell.fg}")
            line.append(cell.data, Style(color=None if color == "default" else color, bold=cell.bold))
        line.rstrip()
        lines.append(line)
    while lines and not lines[-1].plain:
        lines.pop()
    return lines


def html(prompt: str, lines: list[Text]) -> str:
    """A page of one `pre`."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), color_system="truecolor", no_color=False)
    console.print(Text(prompt, "bold"))
    for line in lines:
        console.print(line)
    look = "background:#1d1f26; color:#e6e6e6; padding:16px; font:14px/1.3 'DejaVu Sans Mono',monospace"
    return console.export_html(
        inline_styles=True, code_format=f'<pre style="{look}; display:inline-block">{{code}}</pre>'
    )


if __name__ == "__main__":
    main()
