"""Update the terminal screenshots in docs/: a running training, the summary of a run, an error.

Command uv pip install pyte; python -m benchmarks.terminal_pictures    (after `make`; it trains again)
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

from benchmarks.report_pictures import PICTURE_DIRECTORY, open_chromium

COLUMNS, ROWS = 110, 40
# Name to the command and a pattern; the screen is captured when a line matches it (None: at the command's end).
COMMANDS: dict[str, tuple[str, str | None]] = {
    "training": ("dvc repro --force --single-item train@causal", r" 4\d\d/627"),
    "summary": ("dvc repro --force --single-item evaluate@causal && python -m tools.summary", None),
    "error": ("python -m stages.group_texts block_size=12.5 tokens=data/tokens/causal out=data/blocks/causal", None),
}
# The palette of a dark terminal, keyed by pyte's color names.
COLORS = {"black": "#4c566a", "red": "#ff6b6b", "green": "#a3d977", "brown": "#f5d76e", "blue": "#7aa2f7"}
COLORS |= {"magenta": "#d69ae0", "cyan": "#79d7e0", "white": "#e6e6e6"}


def main() -> None:
    with open_chromium() as browser:
        for name, (command, pattern) in COMMANDS.items():
            page = browser.new_page()
            page.set_content(build_html(f"$ {command}", capture_screen(command, pattern)))
            file = PICTURE_DIRECTORY / f"terminal-{name}.png"
            page.locator("pre").screenshot(path=file)
            page.close()
            print(f"{file}: {file.stat().st_size / 1e3:.0f} KB")


def capture_screen(command: str, pattern: str | None) -> list[Text]:
    """Run `command` in a terminal; return its lines once one matches `pattern`, or at the end if that is None."""
    screen = pyte.Screen(COLUMNS, ROWS)
    captured: list[Text] = []

    def check_screen() -> None:
        if pattern and not captured and any(re.search(pattern, line) for line in screen.display):
            captured.extend(render_lines(screen))

    run_in_terminal(command, pyte.ByteStream(screen), check_screen)
    assert captured or not pattern, f"{pattern} was never seen"
    return captured or render_lines(screen)


def run_in_terminal(command: str, stream: pyte.ByteStream, on_output: Callable[[], None]) -> None:
    """Run `command` in a new terminal and call `on_output` after each of its writes."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    inherited = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "COLUMNS")}
    env = {**inherited, "TERM": "xterm-256color"}
    process = subprocess.Popen(["bash", "-c", command], stdin=slave, stdout=slave, stderr=slave, env=env)
    os.close(slave)
    while True:
        try:
            written = os.read(master, 65536)
        except OSError:  # on Linux, the end of the output
            break
        if not written:
            break
        stream.feed(written)
        on_output()
    os.close(master)
    process.wait()


def render_lines(screen: pyte.Screen) -> list[Text]:
    """Return the lines of a screen with their colors, without trailing empty lines."""
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


def build_html(prompt: str, lines: list[Text]) -> str:
    """Return an HTML page with the terminal's lines in one `pre` element."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), color_system="truecolor", no_color=False)
    console.print(Text(prompt, "bold"))
    for line in lines:
        console.print(line)
    style = "background:#1d1f26; color:#e6e6e6; padding:16px; font:14px/1.3 'DejaVu Sans Mono',monospace"
    return console.export_html(
        inline_styles=True, code_format=f'<pre style="{style}; display:inline-block">{{code}}</pre>'
    )


if __name__ == "__main__":
    main()
