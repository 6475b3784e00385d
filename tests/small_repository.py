"""A DVC repository of one short stage, for tests of DVC's own behavior, and a shell in it."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

STAGE = """\
from pathlib import Path
import yaml

params = yaml.safe_load(Path("params.yaml").read_text())
depth = yaml.safe_load(Path("conf/model.yaml").read_text())["depth"]
Path("models").mkdir(exist_ok=True)
Path("metrics").mkdir(exist_ok=True)
Path("models/weights").write_text(f"{params['block_size']} {depth}")
Path("metrics/causal.json").write_text(f'{{"loss": {params["block_size"]}}}')
assert params["block_size"] > 0
"""
PIPELINE = """\
stages:
  train:
    cmd: python train.py
    deps: [train.py]
    params: [block_size, {conf/model.yaml: [depth]}]
    outs: [models/weights]
    metrics: [metrics/causal.json: {cache: false}]
"""
FILES = {
    "train.py": STAGE,
    "dvc.yaml": PIPELINE,
    "params.yaml": "block_size: 32\n",
    "conf/model.yaml": "depth: 2\n",
    ".gitignore": "/models/\n",
}


def run_shell(directory: Path, command: str, **variables: str) -> str:
    """Output of a shell command, run in `directory` with the Python of the tests and an identity for git."""
    identity = {f"GIT_{role}_{part}": "t@example.org" for role in ("AUTHOR", "COMMITTER") for part in ("NAME", "EMAIL")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=directory,
        env={**os.environ, **identity, "PATH": path, "DVC_NO_ANALYTICS": "true", **variables},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def write_files(directory: Path, files: Mapping[str, str]) -> None:
    """Write texts to files in `directory`, by their relative paths."""
    for name, text in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text, encoding="utf-8")


def make_repository(directory: Path) -> Path:
    """Write the repository to `directory`, run its stage, and commit the results."""
    write_files(directory, FILES)
    run_shell(directory, "git init -q -b main && dvc init -q && dvc repro -q && git add -A && git commit -q -m all")
    return directory
