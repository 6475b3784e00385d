"""A task that starts from another one: what runs when, and what a kill leaves."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from data_helpers import contents
from dvc_project import PER_TASK, edit, environment, run, stages_run

CHAINED = ["baseline@answers", "evaluate@answers", "train@answers"]


@pytest.fixture(scope="module")
def chained(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of the project in which the task `answers`, of answers only, starts from causal: run and committed."""
    place = tmp_path_factory.mktemp("chained") / "project"
    shutil.copytree(project, place, symlinks=True)
    run(place, "git", "reset", "-q", "--hard")
    run(place, "dvc", "checkout", "-q", "--force")
    params = yaml.safe_load((place / "params.yaml").read_text(encoding="utf-8"))
    params["tasks"]["answers"] = {**params["tasks"]["causal"], "start": "causal", "sources": ["sample"]}
    (place / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")
    assert "is in order" in run(place, "python", "-m", "tools.check")
    assert stages_run(run(place, "dvc", "repro")) == {f"{stage}@answers" for stage in PER_TASK}
    run(place, "git", "add", "-A")
    run(place, "git", "commit", "-q", "-m", "chain")
    yield place


@pytest.mark.slow
def test_chain_after_a_change_of_its_first_task_runs_what_follows_from_it_and_nothing_else(chained: Path) -> None:
    assert stages_run(run(chained, "dvc", "repro")) == set()
    untrained, started = (
        json.loads((chained / f"metrics/baseline/{task}.json").read_text())[task] for task in ("causal", "answers")
    )
    assert started["test"]["bits_per_byte"] < untrained["test"]["bits_per_byte"]
    assert started["test"]["bytes"] == untrained["test"]["bytes"]  # of the answers, which causal takes as documents
    edit(chained / "params.yaml", tasks__causal__learning_rate=0.003)
    assert stages_run(run(chained, "dvc", "repro")) == {"train@causal", "evaluate@causal", *CHAINED}
    assert stages_run(run(chained, "dvc", "repro")) == set()
    edit(chained / "params.yaml", tasks__answers__learning_rate=0.003)
    assert stages_run(run(chained, "dvc", "repro")) == {"train@answers", "evaluate@answers"}
    run(chained, "git", "reset", "-q", "--hard")
    assert stages_run(run(chained, "dvc", "repro")) == set()  # all from the run cache


@pytest.mark.slow
def test_chain_killed_in_its_second_task_ends_with_the_same_bytes(chained: Path, tmp_path: Path) -> None:
    place = tmp_path / "project"
    shutil.copytree(chained, place, symlinks=True)
    edit(place / "params.yaml", tasks__answers__num_train_epochs=1.0)
    edit(place / "conf/base/hardware.yaml", checkpoints__minutes=0.005)
    whole = tmp_path / "whole"
    shutil.copytree(place, whole, symlinks=True)
    run(whole, "dvc", "repro", "train@answers")
    with (tmp_path / "log").open("wb") as log:
        command = ["dvc", "repro", "train@answers"]
        killed = subprocess.Popen(
            command, cwd=place, env=environment(place), stdout=log, stderr=log, start_new_session=True
        )
        while not list(place.glob(".lm-repro_cache/**/checkpoint-*/trainer_state.json")):
            assert killed.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.05)
        os.killpg(killed.pid, signal.SIGKILL)
        killed.wait()
    assert not (place / "models/answers").exists()
    assert "resuming from step" in run(place, "dvc", "repro", "train@answers")
    assert contents(place / "models/answers") == contents(whole / "models/answers")
    assert contents(place / "reports/train/answers") == contents(whole / "reports/train/answers")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "told"),
    [("answers", "a task cannot start from itself"), ("last", "did you mean"), ("mlm", "has objective.name")],
)
def test_chain_of_tasks_that_cannot_be_is_an_error_of_the_check(chained: Path, start: str, told: str) -> None:
    edit(chained / "params.yaml", tasks__answers__start=start)
    try:
        said = run(chained, "python", "-m", "tools.check", check=False)
        assert said.startswith("check: the configuration is wrong") and f"tasks.answers.start={start}: " in said
        assert told in said or start == "last"
    finally:
        run(chained, "git", "reset", "-q", "--hard")
