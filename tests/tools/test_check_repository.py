"""Tests of tools.check in a broken repository: merge conflicts, no git, no DVC."""

import shutil
from pathlib import Path

import pytest
from dvc_project import commit_working_tree, run_command

pytestmark = pytest.mark.slow  # each check takes several seconds

FILES_WITH_CONFLICT = ("params.yaml", "dvc.yaml", "conf/train.yaml", "conf/model/tiny-gpt2.yaml")


@pytest.fixture(scope="module")
def committed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Repository with the working tree as its only commit."""
    directory = tmp_path_factory.mktemp("repository")
    commit_working_tree(directory)
    return directory


@pytest.fixture
def repository(committed: Path, tmp_path: Path) -> Path:
    """Copy of the committed repository for one test."""
    return Path(shutil.copytree(committed, tmp_path / "repository", symlinks=True))


def run_check(repository: Path) -> tuple[bool, str]:
    """Run the check; return True if it passes, and its output."""
    printed = run_command(repository, "sh", "-c", "python -m tools.check && echo FINE", check=False)
    assert "Traceback" not in printed
    return "FINE" in printed, printed


def commit_lock(repository: Path, size: int) -> None:
    """Set all sizes in dvc.lock to `size` and commit it."""
    lock = repository / "dvc.lock"
    lines = lock.read_text().splitlines()
    lock.write_text(
        "".join(f"{line.partition('size:')[0]}size: {size}\n" if "size:" in line else f"{line}\n" for line in lines)
    )
    run_command(repository, "git", "commit", "-q", "-a", "-m", f"size {size}")


@pytest.mark.parametrize("command", [("merge", "other"), ("rebase", "other"), ("stash", "pop")], ids=" ".join)
def test_check_dvc_lock_with_conflict_names_the_fix(repository: Path, command: tuple[str, ...]) -> None:
    run_command(repository, "git", "checkout", "-q", "-b", "other")
    commit_lock(repository, 1)
    if command[0] == "stash":
        run_command(repository, "git", "reset", "-q", "--soft", "main")
        run_command(repository, "git", "stash", "-q")
    run_command(repository, "git", "checkout", "-q", "main")
    commit_lock(repository, 2)
    assert "CONFLICT" in run_command(repository, "git", *command, check=False)
    passed, printed = run_check(repository)
    assert not passed
    assert "dvc.lock:" in printed and ": a merge conflict: run `git checkout HEAD -- dvc.lock`" in printed
    run_command(repository, "git", "checkout", "HEAD", "--", "dvc.lock")
    assert run_command(repository, "git", "ls-files", "--unmerged") == ""
    assert run_check(repository)[0]


@pytest.mark.parametrize("name", FILES_WITH_CONFLICT)
def test_check_file_with_conflict_markers_names_the_line(repository: Path, name: str) -> None:
    file = repository / name
    first, *others = file.read_text().splitlines(keepends=True)
    file.write_text("".join([first, "<<<<<<< HEAD\n", *others, "=======\n", *others, ">>>>>>> other\n"]))
    passed, printed = run_check(repository)
    assert not passed
    assert f"{name}:2: a merge conflict: keep one of the two sides" in printed


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (".git", "is not a git repository, which DVC needs: `git clone` the project, or run `git init` here"),
        (".dvc", "the directory .dvc of the project is missing: `git checkout HEAD -- .dvc`"),
    ],
)
def test_check_without_git_or_dvc_names_the_missing_one(repository: Path, missing: str, message: str) -> None:
    shutil.rmtree(repository / missing)
    passed, printed = run_check(repository)
    assert not passed
    assert message in printed and "fit together" not in printed
    run_command(
        repository, *(["git", "init", "-q"] if missing == ".git" else ["git", "checkout", "HEAD", "--", ".dvc"])
    )
    assert run_check(repository)[0]


def test_check_broken_dvc_configuration_names_the_file(repository: Path) -> None:
    (repository / ".dvc/config").write_text("<<<<<<< HEAD\n")
    passed, printed = run_check(repository)
    assert not passed
    assert ".dvc/config: config file error" in printed and "fit together" not in printed
