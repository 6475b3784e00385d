"""tools.check in a repository that is itself not in order: conflicts, no git, no DVC."""

import shutil
from pathlib import Path

import pytest
from dvc_project import commit_working_tree, run

pytestmark = pytest.mark.slow  # each check takes seconds

MARKED = ("params.yaml", "dvc.yaml", "conf/train.yaml", "conf/model/tiny-gpt2.yaml")


@pytest.fixture(scope="module")
def committed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working tree as the only commit of a repository."""
    directory = tmp_path_factory.mktemp("repository")
    commit_working_tree(directory)
    return directory


@pytest.fixture
def repository(committed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(committed, tmp_path / "repository", symlinks=True))


def check(repository: Path) -> tuple[bool, str]:
    """Whether the check finds all in order, and what it prints."""
    printed = run(repository, "sh", "-c", "python -m tools.check && echo FINE", check=False)
    assert "Traceback" not in printed
    return "FINE" in printed, printed


def commit_lock(repository: Path, size: int) -> None:
    """Commit a dvc.lock whose sizes are all `size`."""
    lock = repository / "dvc.lock"
    lines = lock.read_text().splitlines()
    lock.write_text(
        "".join(f"{line.partition('size:')[0]}size: {size}\n" if "size:" in line else f"{line}\n" for line in lines)
    )
    run(repository, "git", "commit", "-q", "-a", "-m", f"size {size}")


@pytest.mark.parametrize("command", [("merge", "other"), ("rebase", "other"), ("stash", "pop")], ids=" ".join)
def test_check_of_a_lock_with_a_conflict_says_so_and_how_to_mend_it(repository: Path, command: tuple[str, ...]) -> None:
    run(repository, "git", "checkout", "-q", "-b", "other")
    commit_lock(repository, 1)
    if command[0] == "stash":
        run(repository, "git", "reset", "-q", "--soft", "main")
        run(repository, "git", "stash", "-q")
    run(repository, "git", "checkout", "-q", "main")
    commit_lock(repository, 2)
    assert "CONFLICT" in run(repository, "git", *command, check=False)
    fine, printed = check(repository)
    assert not fine
    assert "dvc.lock:" in printed and ": a merge conflict: run `git checkout HEAD -- dvc.lock`" in printed
    run(repository, "git", "checkout", "HEAD", "--", "dvc.lock")
    assert run(repository, "git", "ls-files", "--unmerged") == ""
    assert check(repository)[0]


@pytest.mark.parametrize("name", MARKED)
def test_check_of_a_file_with_conflict_marks_names_the_line(repository: Path, name: str) -> None:
    file = repository / name
    first, *others = file.read_text().splitlines(keepends=True)
    file.write_text("".join([first, "<<<<<<< HEAD\n", *others, "=======\n", *others, ">>>>>>> other\n"]))
    fine, printed = check(repository)
    assert not fine
    assert f"{name}:2: a merge conflict: keep one of the two sides" in printed


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (".git", "is not a git repository, which DVC needs: `git clone` the project, or run `git init` here"),
        (".dvc", "the directory .dvc of the project is missing: `git checkout HEAD -- .dvc`"),
    ],
)
def test_check_where_git_or_dvc_is_missing_says_which(repository: Path, missing: str, message: str) -> None:
    shutil.rmtree(repository / missing)
    fine, printed = check(repository)
    assert not fine
    assert message in printed and "fit together" not in printed
    run(repository, *(["git", "init", "-q"] if missing == ".git" else ["git", "checkout", "HEAD", "--", ".dvc"]))
    assert check(repository)[0]


def test_check_of_a_broken_dvc_configuration_names_the_file(repository: Path) -> None:
    (repository / ".dvc/config").write_text("<<<<<<< HEAD\n")
    fine, printed = check(repository)
    assert not fine
    assert ".dvc/config: config file error" in printed and "fit together" not in printed
