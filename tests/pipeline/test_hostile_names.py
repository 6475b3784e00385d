"""External names and values with control characters, newlines or a megabyte are shown escaped, on one line."""

import subprocess
import sys
from pathlib import Path

import pytest
from data_helpers import REPOSITORY

from stages.core.errors import escape_controls
from tools import card

HOSTILE_NAMES = {
    "escape sequence": "a\x1b[2J\x1b]0;title\x07",
    "newline that forges a line": "a\ndownload: done in 0.1 s",
    "carriage return": "a\rdownload: done",
    "C1 control": "a\x9b31m",
    "right to left": "a\u202elnosj",
}
# Sets a value of a megabyte, too long for a command line, whose arguments are limited to 128 kB.
COMPOSE_SCRIPT = """
import sys
from stages.core.compose import compose_config, load_config
from tools.check import get_config_class
try:
    load_config(get_config_class("train"), compose_config("train", ["task=causal", sys.argv[1] + "=" + "x" * 10**6]))
except ValueError as error:
    sys.exit(str(error))
"""


def run_for_error(*command: str) -> str:
    """Run a command that must fail and return its error, checked for length, control characters and forged lines."""
    run = subprocess.run([sys.executable, *command], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert run.returncode == 1, run.stderr
    assert "Traceback" not in run.stderr
    assert escape_controls(run.stderr) == run.stderr
    assert len(run.stderr) < 5000
    assert not any(line.startswith("download: done") for line in run.stderr.splitlines())
    return run.stderr


@pytest.mark.parametrize("name", HOSTILE_NAMES.values(), ids=HOSTILE_NAMES)
def test_hostile_name_of_a_data_file_is_shown_on_one_line(tmp_path: Path, name: str) -> None:
    file = tmp_path / f"{name}.jsonl"
    file.write_text("not JSON\n")
    assert "not JSON" in run_for_error(
        "-m", "stages.download", "data=files", f'data.path="{file}"', f"out={tmp_path}/raw"
    )


@pytest.mark.slow  # starts two processes per case
@pytest.mark.parametrize("name", HOSTILE_NAMES.values(), ids=HOSTILE_NAMES)
@pytest.mark.parametrize("tool", ["generate", "pin_model"])
def test_hostile_name_of_a_model_directory_is_shown_on_one_line(tmp_path: Path, tool: str, name: str) -> None:
    more = ["Once"] if tool == "generate" else []
    assert f"{tool}: " in run_for_error("-m", f"tools.{tool}", str(tmp_path / name), *more)
    (tmp_path / name).mkdir()
    assert f"{tool}: " in run_for_error("-m", f"tools.{tool}", str(tmp_path / name), *more)


@pytest.mark.parametrize(
    ("key", "remedy"),
    [
        ("block_size", "it should be a valid integer"),
        ("seed", "it should be a valid integer"),
        ("hardware", "there is no conf/hardware/"),
        ("model.config.model_type", "set isolate_documents: false"),
    ],
)
def test_value_of_a_megabyte_is_shortened_and_the_remedy_stays(key: str, remedy: str) -> None:
    words = run_for_error("-c", COMPOSE_SCRIPT, key)
    assert "... (1,000,00" in words
    assert remedy in words


@pytest.mark.parametrize("prompt", [f"{text} {{mask}}" for text in HOSTILE_NAMES.values()], ids=HOSTILE_NAMES)
@pytest.mark.parametrize("objective", ["causal", "mlm"])
def test_usage_on_a_card_quotes_its_prompt_as_python_without_controls(
    monkeypatch: pytest.MonkeyPatch, prompt: str, objective: str
) -> None:
    class Run:
        task = objective

    Run.objective = objective  # type: ignore[attr-defined]
    values = {f"conf/task/{objective}.yaml": {"samples": {"prompts": [prompt]}}}
    monkeypatch.setattr(card, "get_locked_params", lambda _: values)
    page = card.render_usage(Run(), "o/n")  # type: ignore[arg-type]
    assert escape_controls(page) == page
    assert repr(prompt) in page
