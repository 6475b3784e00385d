"""A small copy of the repository after one `dvc repro`, and helpers for tests that use it."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock

ROOT = Path(__file__).parent.parent
STAGES: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
TASKS = tuple(yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))["tasks"])
ONCE = tuple(name for name, stage in STAGES.items() if "foreach" not in stage)
PER_TASK = tuple(name for name, stage in STAGES.items() if stage.get("foreach") == "${tasks}")
ALL = {*ONCE} | {f"{stage}@{task}" for stage in PER_TASK for task in TASKS}


def mark_rest_slow(cases: Iterable[Any], num_fast: int) -> list[Any]:
    """Mark all parameter sets but the first `num_fast` as slow, for tests whose cases take the same path."""
    sets = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*values, marks=pytest.mark.slow if n >= num_fast else ()) for n, values in enumerate(sets)]


def build_environment(directory: Path) -> dict[str, str]:
    """Return the environment for commands in `directory`: the tests' Python first, no network, a private cache."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    own = {"PATH": path, "HF_HUB_OFFLINE": "1", "LM_REPRO_CACHE": str(directory / ".lm-repro_cache")}
    own |= {f"GIT_{role}_{part}": "t@example.org" for role in ("AUTHOR", "COMMITTER") for part in ("NAME", "EMAIL")}
    return {**os.environ, **own}


def run_command(directory: Path, *command: str, check: bool = True) -> str:
    """Run `command` in `directory`, and return its output."""
    done = subprocess.run(
        command,
        cwd=directory,
        env=build_environment(directory),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert not check or done.returncode == 0, done.stdout
    return done.stdout


def parse_stages_run(output: str) -> set[str]:
    """Return the stages that DVC reports as run."""
    return set(re.findall(r"^Running stage '([^']+)'", output, flags=re.MULTILINE))


def edit_yaml(file: Path, **changes: Any) -> None:
    """Set dotted keys (a__b for a.b) of a YAML file, and keep its `# @package` line."""
    text = file.read_text(encoding="utf-8")
    value = yaml.safe_load(text)
    for key, new in changes.items():
        *parents, last = key.split("__")
        node = value
        for parent in parents:
            node = node[parent]
        node[last] = new
    header = "# @package _global_\n" if text.startswith("# @package _global_") else ""
    file.write_text(header + yaml.safe_dump(value, sort_keys=False), encoding="utf-8")


def copy_working_tree(directory: Path) -> None:
    """Copy the files of the working tree that git does not ignore into `directory`."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, directory / name)


def commit_working_tree(directory: Path) -> None:
    """Make `directory` a git repository with the working tree as its only commit."""
    copy_working_tree(directory)
    run_command(directory, "git", "init", "-q", "-b", "main")
    run_command(directory, "git", "add", "-A")
    run_command(directory, "git", "commit", "-q", "-m", "all")


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small copy of the working tree, committed after one `dvc repro`."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return make_project(tmp_path_factory.mktemp("project"))
    # The first of several test processes creates the project; the others copy it.
    made = tmp_path_factory.getbasetemp().parent / "project"
    with FileLock(made.with_name("project.lock")):
        if not made.exists():
            make_project(aside := made.with_name("project-unfinished"))
            aside.rename(made)
    return shutil.copytree(made, tmp_path_factory.mktemp("copy") / "project", symlinks=True)


def make_project(directory: Path) -> Path:
    """Create the project in `directory`, which may exist if it is empty."""
    directory.mkdir(exist_ok=True)
    copy_working_tree(directory)
    edit_yaml(directory / "conf/data/sample.yaml", max_records=80)
    for task in TASKS:
        edit_yaml(directory / f"conf/task/{task}.yaml", trainer__logging_steps=1, evaluate__max_documents=2)
    edit_yaml(directory / "conf/model/tiny-gpt2.yaml", config__n_embd=32, tokenizer__train__vocab_size=400)
    for name in ("tiny-modernbert", "tiny-roberta"):
        edit_yaml(directory / f"conf/model/{name}.yaml", config__hidden_size=32, tokenizer__train__vocab_size=400)
    epochs = {f"tasks__{task}__num_train_epochs": 0.05 for task in TASKS}
    edit_yaml(directory / "params.yaml", **epochs, block_size=64)
    (directory / "dvc.lock").unlink(missing_ok=True)
    run_command(directory, "git", "init", "-q", "-b", "main")
    run_command(directory, "git", "add", "-A")
    run_command(directory, "git", "commit", "-q", "-m", "small")
    assert parse_stages_run(run_command(directory, "dvc", "repro")) == ALL
    run_command(directory, "git", "add", "-A")
    run_command(directory, "git", "commit", "-q", "-m", "baseline")
    return directory


@pytest.fixture
def clean(project: Path) -> Path:
    """The project as committed: changes by a previous test are undone."""
    # DVC may leave an index in which a changed file of the same size seems unchanged; a mere reset would trust it.
    run_command(project, "git", "read-tree", "HEAD")
    run_command(project, "git", "reset", "-q", "--hard")
    run_command(project, "git", "clean", "-qfd")
    for ref in run_command(project, "git", "for-each-ref", "--format=%(refname)", "refs/exps").split():  # experiments
        run_command(project, "git", "update-ref", "-d", ref)
    run_command(project, "dvc", "checkout", "-q", "--force")
    return project


def flatten_revisions(revisions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of `dvc exp show --json`: all revisions and their experiments."""
    rows = list(revisions)
    for revision in revisions:
        for experiment in revision.get("experiments") or []:
            rows += experiment["revs"]
    return rows


@pytest.fixture
def inside(clean: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project as the current directory."""
    monkeypatch.chdir(clean)
    return clean
