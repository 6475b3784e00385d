"""What stages show: help that names every key with its meaning, plain errors where piped."""

import os
import pty
import subprocess
import sys

import pytest

from stages.core.compose import read_root
from stages.core.config import CONF
from stages.core.source_code import list_stages
from stages.shell.keys import keys_of
from tools.check import schema_of

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
def test_terminal_keys_are_each_explained(stage: str) -> None:
    unexplained = [key.name for key in keys_of(schema_of(stage)) if not key.meaning]
    assert unexplained == []


@pytest.mark.parametrize("stage", STAGES)
def test_terminal_help_names_what_a_stage_reads_and_writes_its_groups_and_all_its_keys(stage: str) -> None:
    done = python(f"stages.{stage}", "--help")
    assert done.returncode == 0, done.stderr
    for part in ("Reads ", "Writes ", "Command ", "--cfg job"):
        assert part in done.stdout
    for group in read_root(stage).groups:
        for name in (file.stem for file in (CONF / group).glob("*.yaml")):
            assert name in done.stdout
    listed = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ") and line.endswith(")")]
    assert {key.name for key in keys_of(schema_of(stage))} <= set(listed) | set(done.stdout.split())
    assert max(map(len, done.stdout.partition("Keys,")[2].splitlines()[1:])) <= 80


def test_terminal_help_shows_the_values_of_the_chosen_configurations_and_their_range() -> None:
    shown = python("stages.train", "--help", "hardware=cpu", "block_size=64", COLUMNS="200").stdout
    assert "hardware.num_threads = 2  (whole number from 1)" in shown
    assert "block_size = 64  (whole number from 1)" in shown
    assert "seed = 42  (whole number from 0 to below 4294967296)" in shown


def test_terminal_help_with_an_unknown_choice_names_the_choices() -> None:
    done = python("stages.train", "--help", "hardware=abacus")
    assert done.returncode == 1
    assert "there is no conf/hardware/abacus.yaml; did you mean cpu?" in done.stderr
    assert "Traceback" not in done.stderr


WRONG = ("stages.group_texts", "block_size=0", "tokens=a", "out=b")


def on_a_terminal(*arguments: str, code: int, **environment: str) -> str:
    """What Python writes to a terminal before it exits with `code`."""
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


def test_terminal_error_is_a_panel_on_a_terminal() -> None:
    shown = on_a_terminal("-m", *WRONG, code=1, TERM="xterm")
    assert "╭" in shown
    assert "group_texts: error" in shown
    assert "block_size=0" in shown


LOGGED_BESIDE_A_BAR = """
import logging
from stages.shell.app import start_logging
from stages.shell.progress import Progress
start_logging("train")
bar = Progress("training", 10, "steps")
bar.update(5)
logging.getLogger("stage").info("validation loss 1")
bar.close()
"""


def test_terminal_line_that_is_logged_beside_a_bar_has_a_line_of_its_own() -> None:
    shown = on_a_terminal("-c", LOGGED_BESIDE_A_BAR, code=0, TERM="xterm")
    before, _, _ = shown.partition("train: validation loss 1\r\n")
    assert before != shown
    assert before.endswith(("\r\n", "\x1b[2K"))  # a new line, or one wiped clean


def test_terminal_error_is_plain_under_no_color() -> None:
    shown = on_a_terminal("-m", *WRONG, code=1, TERM="xterm", NO_COLOR="1")
    assert shown.startswith("group_texts: error: block_size=0")
    assert "\x1b" not in shown


def test_terminal_error_is_plain_where_piped() -> None:
    done = python(*WRONG)
    assert done.returncode == 1
    assert done.stderr.startswith("group_texts: error: block_size=0")
