"""Errors of stages on hostile input, as the user sees them, and sources of hostile input."""

import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import load_stage_config
from data_helpers import REPOSITORY, hash_files

from stages.shell.app import format_error

IS_ROOT = os.geteuid() == 0
# Root ignores file modes. Without these capabilities, file modes apply to root too.
AS_UNPRIVILEGED = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--"] if IS_ROOT else []
needs_modes = pytest.mark.skipif(
    IS_ROOT and shutil.which("setpriv") is None, reason="file modes apply to root only under setpriv, which is missing"
)


def run_stage_for_error(stage: str, *overrides: str, **sections: Any) -> str:
    """Run `stage` in this process, and return its error message; empty if it succeeds.

    Args:
        sections: parts of the config that replace the composed ones.
    """
    try:
        config = load_stage_config(stage, *overrides)
        for name, section in sections.items():
            setattr(config, name, section)
        importlib.import_module(f"stages.{stage}.stage").main(config)
    except Exception as error:
        text = format_error(error, stage)
        assert "LM_REPRO_DEBUG" not in text, f"not written for users: {text}"
        assert text.count("\n") <= 1, f"more than two lines: {text}"
        return text
    return ""


def run_process_for_error(
    stage: str, *overrides: str, prefix: tuple[str, ...] | list[str] = (), code: str = "", **environment: str
) -> str:
    """Run the command of `stage`, which must exit with 1, and return its error message on stderr.

    Args:
        prefix: a command that runs it.
        code: Python code that runs in its process before the stage, to inject a fault.
    """
    script = ["-c", f"{code}\nimport runpy\nrunpy.run_module('stages.{stage}', run_name='__main__')"]
    command = [*prefix, sys.executable, *(script if code else ["-m", f"stages.{stage}"]), *overrides]
    done = subprocess.run(
        command, cwd=REPOSITORY, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    said = done.stderr.partition(f"{stage}: error: ")[2].rstrip("\n")
    assert said and said.count("\n") <= 1, done.stderr
    return said


def list_files(directory: Path) -> list[str]:
    """Return the names of the files below `directory`, including hidden ones."""
    return sorted(file.relative_to(directory).as_posix() for file in directory.rglob("*") if not file.is_dir())


def pin_tokenizer(directory: Path) -> list[str]:
    """Return overrides that use the tokenizer in `directory`, pinned to its current files."""
    files = ",".join(f"{name}:'{digest}'" for name, digest in hash_files(directory).items())
    source = [f"+model.tokenizer.path={directory}", f"+model.tokenizer.files={{{files}}}"]
    return ["model=tiny-gpt2", "~model.tokenizer.train", *source]


@contextmanager
def mount(directory: Path, *options: str) -> Iterator[Path]:
    """Mount a file system on the directory; skip the test if that is not permitted."""
    directory.mkdir(exist_ok=True)
    if not shutil.which("mount") or not IS_ROOT:
        pytest.skip("mounting a file system needs root")
    done = subprocess.run(["mount", *options, str(directory)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)
