"""How a stage ends on hostile input, as its user sees it, and the places that such input comes from."""

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
from conftest import compose_config
from data_helpers import REPOSITORY, hashes

from stages.shell.app import describe_error

IS_ROOT = os.geteuid() == 0
# Root reads and writes anything: without these capabilities it is bound by modes as anyone is.
AS_ANYONE = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--"] if IS_ROOT else []
needs_modes = pytest.mark.skipif(
    IS_ROOT and shutil.which("setpriv") is None, reason="root is bound by modes only under setpriv, which is not here"
)


def error_of(stage: str, *overrides: str, **sections: Any) -> str:
    """What `stage` says when it ends in an error; empty where it ends well.

    Args:
        sections: parts of the config that take the place of the composed ones.
    """
    try:
        config = compose_config(stage, *overrides)
        for name, section in sections.items():
            setattr(config, name, section)
        importlib.import_module(f"stages.{stage}.stage").main(config)
    except Exception as error:
        text = describe_error(error, stage)
        assert "LM_REPRO_DEBUG" not in text, f"not written for users: {text}"
        assert text.count("\n") <= 1, f"more than two lines: {text}"
        return text
    return ""


def process_error(
    stage: str, *overrides: str, prefix: tuple[str, ...] | list[str] = (), code: str = "", **environment: str
) -> str:
    """What the command of `stage` says on stderr as it exits with 1.

    Args:
        prefix: a command that runs it.
        code: Python that goes before the stage in its process, to break what it stands on.
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


def files_below(directory: Path) -> list[str]:
    """Names of the files below `directory`, hidden ones too."""
    return sorted(file.relative_to(directory).as_posix() for file in directory.rglob("*") if not file.is_dir())


def pinned_tokenizer(directory: Path) -> list[str]:
    """Overrides that take the tokenizer in `directory`, pinned as it is."""
    files = ",".join(f"{name}:'{digest}'" for name, digest in hashes(directory).items())
    source = [f"+model.tokenizer.path={directory}", f"+model.tokenizer.files={{{files}}}"]
    return ["model=tiny-gpt2", "~model.tokenizer.train", *source]


@contextmanager
def mounted(directory: Path, *options: str) -> Iterator[Path]:
    """The directory, with a file system mounted on it; a test is skipped where that is not permitted."""
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
