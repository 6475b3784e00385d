"""Names and values from outside with control characters, newlines or a megabyte: shown in a line, obeyed by nobody."""

import subprocess
import sys
from pathlib import Path

import pytest
from data_helpers import REPOSITORY

from stages.core.errors import without_controls
from tools import card

HOSTILE = {
    "escape sequence": "a\x1b[2J\x1b]0;title\x07",
    "newline that forges a line": "a\ndownload: done in 0.1 s",
    "carriage return": "a\rdownload: done",
    "C1 control": "a\x9b31m",
    "right to left": "a\u202elnosj",
}
# With a value that no command line takes, since an argument has 128 kB at most.
COMPOSE = """
import sys
from stages.core.compose import compose, load
from tools.check import schema_of
try:
    load(schema_of("train"), compose("train", ["task=causal", sys.argv[1] + "=" + "x" * 10**6]))
except ValueError as error:
    sys.exit(str(error))
"""


def said(*command: str) -> str:
    """What a command that fails writes: never long, no control characters, and no line that a name forges."""
    run = subprocess.run([sys.executable, *command], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert run.returncode == 1, run.stderr
    assert "Traceback" not in run.stderr
    assert without_controls(run.stderr) == run.stderr
    assert len(run.stderr) < 5000
    assert not any(line.startswith("download: done") for line in run.stderr.splitlines())
    return run.stderr


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
def test_hostile_name_of_a_data_file_is_shown_in_a_line(tmp_path: Path, name: str) -> None:
    file = tmp_path / f"{name}.jsonl"
    file.write_text("not JSON\n")
    assert "not JSON" in said("-m", "stages.download", "data=files", f'data.path="{file}"', f"out={tmp_path}/raw")


@pytest.mark.slow  # a process each
@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("tool", ["generate", "pin_model"])
def test_hostile_name_of_a_model_directory_is_shown_in_a_line(tmp_path: Path, tool: str, name: str) -> None:
    more = ["Once"] if tool == "generate" else []
    assert f"{tool}: " in said("-m", f"tools.{tool}", str(tmp_path / name), *more)
    (tmp_path / name).mkdir()
    assert f"{tool}: " in said("-m", f"tools.{tool}", str(tmp_path / name), *more)


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
    words = said("-c", COMPOSE, key)
    assert "... (1,000,00" in words
    assert remedy in words


@pytest.mark.parametrize("prompt", [f"{text} {{mask}}" for text in HOSTILE.values()], ids=HOSTILE)
@pytest.mark.parametrize("objective", ["causal", "mlm"])
def test_usage_of_a_card_holds_its_prompt_as_python_without_controls(
    monkeypatch: pytest.MonkeyPatch, prompt: str, objective: str
) -> None:
    class Run:
        task = objective

    Run.objective = objective  # type: ignore[attr-defined]
    values = {f"conf/task/{objective}.yaml": {"samples": {"prompts": [prompt]}}}
    monkeypatch.setattr(card, "locked_params", lambda _: values)
    page = card.usage(Run(), "o/n")  # type: ignore[arg-type]
    assert without_controls(page) == page
    assert repr(prompt) in page
