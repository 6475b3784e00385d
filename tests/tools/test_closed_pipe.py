"""Tools that only print end silently when the reader of their output has ended, as in `python -m tools.keys | head`."""

import os
import signal
import subprocess
import sys

import pytest
from data_helpers import REPOSITORY


@pytest.mark.parametrize("tool", ["compare", "document", "generate", "keys", "plan", "summary", "why"])
def test_tool_ends_silently_if_nobody_reads_its_output(tool: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", f"tools.{tool}", "--help"]
    with os.fdopen(writing, "w") as closed:
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY, check=False)
    assert done.returncode == -signal.SIGPIPE and "BrokenPipeError" not in done.stderr
