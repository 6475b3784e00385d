"""A killed `dvc repro` needs no manual repair, leaves no orphans and ends with the same artifacts."""

import random
import subprocess
from pathlib import Path

import psutil
import pytest
from dvc_project import build_environment

from benchmarks.faults import KILL_METHODS, run_repro


def find_running_stages(project: Path) -> list[int]:
    """Return the ids of the stage processes that still run in `project`."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline", "cwd"]):
        if process.info["cwd"] == str(project) and "-m" in (process.info["cmdline"] or []):
            found.append(process.info["pid"])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_repro_killed_at_random_moments_ends_with_the_lock_of_an_undisturbed_one(
    clean: Path, tmp_path: Path, seed: int
) -> None:
    project, rng = tmp_path / "killed", random.Random(seed)
    subprocess.run(["git", "clone", "-q", str(clean), str(project)], check=True)
    killed = 0
    for method in KILL_METHODS:
        killed += run_repro(project, build_environment(project), rng.uniform(0.5, 15.0), method) is not None
        assert find_running_stages(project) == []
    assert killed
    assert run_repro(project, build_environment(project)) is None
    assert (project / "dvc.lock").read_bytes() == (clean / "dvc.lock").read_bytes()
    assert not list(project.rglob(".tmp*"))
