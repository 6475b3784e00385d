"""Models of another clone: `dvc get`, `dvc import` and `dvc update`, as docs/sharing.md uses them."""

from pathlib import Path

import pytest
import yaml
from dvc_project import edit_yaml, run_command

pytestmark = pytest.mark.slow

MODEL = Path("models/causal")


@pytest.fixture
def clones(clean: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A clone with outputs, whose model differs between `main~1` and `main`, and a clone without."""
    source, other = tmp_path / "source", tmp_path / "other"
    for clone in (source, other):
        run_command(clean, "git", "clone", "-q", ".", str(clone))
    run_command(source, "dvc", "config", "--local", "cache.dir", str(clean / ".dvc/cache"))
    run_command(source, "dvc", "checkout", "-q")
    settings = source / MODEL / "generation_config.json"
    text = settings.read_text(encoding="utf-8")
    settings.unlink()  # it may be a link into the cache
    settings.write_text(text + "\n", encoding="utf-8")
    run_command(source, "dvc", "commit", "-q", "--force", "train@causal")
    run_command(source, "git", "commit", "-q", "-a", "-m", "another model")
    return source, other


def read_files(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(directory.iterdir())}


def test_model_that_dvc_get_copies_generates_text(clones: tuple[Path, Path]) -> None:
    source, other = clones
    run_command(other, "dvc", "get", "-q", str(source), str(MODEL), "-o", "../copied")
    assert read_files(other.parent / "copied") == read_files(source / MODEL)
    assert "Rain" in run_command(other, "python", "-m", "tools.generate", "../copied", "Rain", "--max-new-tokens", "2")


def test_imported_model_is_that_of_the_revision_until_it_is_updated(clones: tuple[Path, Path], clean: Path) -> None:
    source, other = clones
    (other / "imported").mkdir()
    command = ("dvc", "import", "-q", str(source), str(MODEL), "-o", "imported/model", "--rev")
    run_command(other, *command, "main~1")
    assert read_files(other / "imported/model") == read_files(clean / MODEL)
    run_command(other, "dvc", "update", "-q", "imported/model.dvc", "--rev", "main")
    assert read_files(other / "imported/model") == read_files(source / MODEL) != read_files(clean / MODEL)
    recorded = yaml.safe_load((other / "imported/model.dvc").read_text(encoding="utf-8"))["deps"][0]["repo"]
    assert recorded["rev_lock"] == run_command(source, "git", "rev-parse", "main").strip()
    assert "imported/model.dvc" in run_command(other, "git", "status", "--porcelain", "--untracked-files=all")


def test_imported_model_can_be_pinned_and_trained_further(clones: tuple[Path, Path]) -> None:
    source, other = clones
    (other / "imported").mkdir()
    run_command(other, "dvc", "import", "-q", str(source), str(MODEL), "-o", "imported/model")
    run_command(other, "python", "-m", "tools.pin_model", "imported/model", "--name", "imported")
    edit_yaml(other / "params.yaml", tasks__causal__model="imported")
    assert "in order" in run_command(other, "python", "-m", "tools.check")


@pytest.mark.parametrize("directory", ["data", "models"])
def test_import_below_a_directory_that_git_ignores_is_refused(clones: tuple[Path, Path], directory: str) -> None:
    source, other = clones
    command = ("dvc", "import", str(source), str(MODEL), "-o", f"{directory}/imported")
    assert "is git-ignored" in run_command(other, *command, check=False)
