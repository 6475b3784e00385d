"""A `dvc repro` that is killed: no remedy by hand, no orphan, and the same artifacts in the end."""

import random
import subprocess
from pathlib import Path

import psutil
import pytest
from dvc_project import environment

from benchmarks.faults import WAYS, repro


def left_running(place: Path) -> list[int]:
    """Stages that still run in `place`."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline", "cwd"]):
        if process.info["cwd"] == str(place) and "-m" in (process.info["cmdline"] or []):
            found.append(process.info["pid"])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_repro_killed_at_random_moments_ends_with_the_lock_of_an_undisturbed_one(
    clean: Path, tmp_path: Path, seed: int
) -> None:
    place, chance = tmp_path / "killed", random.Random(seed)
    subprocess.run(["git", "clone", "-q", str(clean), str(place)], check=True)
    killed = 0
    for way in WAYS:
        killed += repro(place, environment(place), chance.uniform(0.5, 15.0), way) is not None
        assert left_running(place) == []
    assert killed
    assert repro(place, environment(place)) is None
    assert (place / "dvc.lock").read_bytes() == (clean / "dvc.lock").read_bytes()
    assert not list(place.rglob(".tmp*"))
