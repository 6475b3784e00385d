"""The command of docs/recipes.md that returns to the committed state, in a small DVC repository."""

import re
import shutil
from pathlib import Path

import pytest
from small_repository import make_repository, run_shell

RECIPES = Path(__file__).parents[2] / "docs/recipes.md"
SETTINGS = "-S block_size=64 -S conf/model.yaml:depth=4"
EDIT = "echo 'block_size: 64' > params.yaml && echo 'depth: 4' > conf/model.yaml"
# Name to the commands that leave the committed state.
WAYS = {
    "exp run": f"dvc exp run -q {SETTINGS}",
    "exp run of staged edits": f"{EDIT} && git add -A && dvc exp run -q",
    "exp apply": f"dvc exp run -q --temp -n other {SETTINGS} && dvc exp apply -q other",
    "repro with autostage": f"dvc config --local core.autostage true && {EDIT} && dvc repro -q",
    "staged results": f"{EDIT} && dvc repro -q && git add -A",
    "stage that failed": "! dvc exp run -q -S block_size=0",
    "deleted files": "rm -r models/weights metrics dvc.lock && git add -A",
}


@pytest.fixture(scope="module")
def back() -> str:
    """The first command of docs/recipes.md."""
    found = re.search(r"^\$ (.*dvc checkout.*)$", RECIPES.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert found is not None
    return found[1]


@pytest.fixture(scope="module")
def committed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with its results committed."""
    return make_repository(tmp_path_factory.mktemp("committed"))


@pytest.fixture
def repository(committed: Path, tmp_path: Path) -> Path:
    """A copy of `committed` to change."""
    return Path(shutil.copytree(committed, tmp_path / "repository", symlinks=True))


@pytest.mark.parametrize("page", ["README.md", "docs/tutorial.md"])
def test_going_back_command_is_the_same_on_all_pages(back: str, page: str) -> None:
    assert f"$ {back}\n" in (RECIPES.parents[1] / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("way", WAYS)
def test_going_back_restores_the_committed_state(repository: Path, back: str, way: str) -> None:
    run_shell(repository, WAYS[way])
    assert run_shell(repository, "git status --porcelain") != ""
    run_shell(repository, back)
    assert run_shell(repository, "git status --porcelain") == ""
    assert (repository / "models/weights").read_text(encoding="utf-8") == "32 2"
    assert "up to date" in run_shell(repository, "dvc status")


@pytest.mark.parametrize("stage", ["", " && git add conf"], ids=["untracked", "staged"])
def test_going_back_keeps_a_new_configuration(repository: Path, back: str, stage: str) -> None:
    run_shell(repository, f"echo 'depth: 8' > conf/mine.yaml{stage}")
    run_shell(repository, back)
    assert (repository / "conf/mine.yaml").read_text(encoding="utf-8") == "depth: 8\n"
