"""Output of a stage on a terminal: help, and errors, which are plain text if stderr is piped."""

import os
import pty
import subprocess
import sys

import pytest

from stages.core.config import CONF
from stages.core.source_code import list_stages

STAGES = [*list_stages(), "code"]


def python(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    kept = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        capture_output=True,
        text=True,
        cwd=CONF.parent,
        env={**kept, **environment},
        check=False,
    )


@pytest.mark.parametrize("stage", STAGES)
def test_terminal_help_names_inputs_and_outputs_of_a_stage_and_its_options(stage: str) -> None:
    done = python(f"stages.{stage}", "--help")
    assert done.returncode == 0, done.stderr
    for part in ("Reads ", "Writes ", "Command ", "--cfg job", f"python -m tools.keys {stage}"):
        assert part in done.stdout


WRONG = ("stages.group_texts", "block_size=0", "tokens=a", "out=b")


def run_on_terminal(*arguments: str, code: int, **environment: str) -> str:
    """Run Python on a terminal, check its exit code, and return its output."""
    ours, theirs = pty.openpty()
    command = [sys.executable, *arguments]
    process = subprocess.Popen(
        command, stdout=theirs, stderr=theirs, cwd=CONF.parent, env={**os.environ, **environment}
    )
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 4096):
            shown += chunk
    except OSError:  # the process, the terminal's last user, has ended
        pass
    os.close(ours)
    assert process.wait() == code
    return shown.decode()


def test_terminal_error_is_a_panel_run_on_terminal() -> None:
    shown = run_on_terminal("-m", *WRONG, code=1, TERM="xterm")
    assert "╭" in shown
    assert "group_texts: error" in shown
    assert "block_size=0" in shown


LOGGED_DURING_A_BAR = """
import logging
from stages.shell.app import start_logging
from stages.shell.progress import Progress
start_logging("train")
bar = Progress("training", 10, "steps")
bar.update(5)
logging.getLogger("stage").info("validation loss 1")
bar.close()
"""


def test_terminal_line_that_is_logged_during_a_bar_has_its_own_line() -> None:
    shown = run_on_terminal("-c", LOGGED_DURING_A_BAR, code=0, TERM="xterm")
    before, _, _ = shown.partition("train: validation loss 1\r\n")
    assert before != shown
    assert before.endswith(("\r\n", "\x1b[2K"))  # a new line, or one wiped clean


def test_terminal_error_is_plain_under_no_color() -> None:
    shown = run_on_terminal("-m", *WRONG, code=1, TERM="xterm", NO_COLOR="1")
    assert shown.startswith("group_texts: error: block_size=0")
    assert "\x1b" not in shown


def test_terminal_error_is_plain_where_piped() -> None:
    done = python(*WRONG)
    assert done.returncode == 1
    assert done.stderr.startswith("group_texts: error: block_size=0")
