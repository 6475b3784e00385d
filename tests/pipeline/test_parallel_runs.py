"""The command of docs/recipes.md that runs several experiments at once, in a small DVC repository."""

import re
from pathlib import Path

import pytest
from small_repository import make_repository, run_shell

pytestmark = pytest.mark.slow

RECIPES = Path(__file__).parents[2] / "docs/recipes.md"


@pytest.fixture(scope="module")
def command() -> str:
    found = re.search(r"^```bash\n(printf .*)\n```$", RECIPES.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert found is not None
    return found[1]


def test_parallel_runs_all_become_experiments(tmp_path: Path, command: str) -> None:
    make_repository(tmp_path)
    run_shell(tmp_path, command)
    assert len(run_shell(tmp_path, "dvc exp list --name-only").split()) == 2
    assert run_shell(tmp_path, "git status --porcelain") == ""


def test_parallel_runs_of_which_one_fails_exit_with_an_error(tmp_path: Path, command: str) -> None:
    make_repository(tmp_path)
    run_shell(tmp_path, f"! {{ {command.replace(' 64 ', ' 0 ')}; }}")
    assert len(run_shell(tmp_path, "dvc exp list --name-only").split()) == 1
