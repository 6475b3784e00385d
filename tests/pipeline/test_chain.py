"""A task that starts from another one: what runs when, and what a kill leaves."""

import json
import os
import re
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
    publishing = yaml.safe_load((place / "conf/publish.yaml").read_text(encoding="utf-8"))
    edit(place / "conf/publish.yaml", answers=publishing["causal"])
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
    edit(chained / "params.yaml", tasks__causal__learning_rate=0.003)
    assert stages_run(run(chained, "dvc", "repro")) == {"train@causal", "evaluate@causal", *CHAINED}
    assert stages_run(run(chained, "dvc", "repro")) == set()
    edit(chained / "params.yaml", tasks__answers__learning_rate=0.003)
    assert stages_run(run(chained, "dvc", "repro")) == {"train@answers", "evaluate@answers"}
    run(chained, "git", "reset", "-q", "--hard")
    assert stages_run(run(chained, "dvc", "repro")) == set()  # all from the run cache


@pytest.mark.slow
def test_chain_is_on_the_card_with_the_md5_and_the_text_of_each_link(chained: Path) -> None:
    run(chained, "python", "-m", "tools.publish", "answers", "--dry-run", "card.md")
    card = (chained / "card.md").read_text(encoding="utf-8")
    (chained / "card.md").unlink()
    locked = yaml.safe_load((chained / "dvc.lock").read_text(encoding="utf-8"))["stages"]
    outs = {out["path"]: out["md5"] for stage in locked.values() for out in stage["outs"]}
    text = f"sample (askscience.jsonl, data/raw {outs['data/raw']})"
    assert f"1. models/answers (md5 {outs['models/answers']}), trained on the sources sample of {text}\n" in card
    assert f"2. starts from models/causal (md5 {outs['models/causal']}), trained on {text}\n" in card
    assert "3. starts from fresh weights (conf/model/tiny-gpt2.yaml)\n" in card
    assert "trained further from `causal`, a model of this repository" in card
    assert "This task uses the sources `sample`." in card


@pytest.mark.slow
def test_chain_killed_in_its_second_task_ends_with_the_same_bytes(chained: Path, tmp_path: Path) -> None:
    place = tmp_path / "project"
    shutil.copytree(chained, place, symlinks=True)
    edit(place / "params.yaml", tasks__answers__num_train_epochs=1.0)
    edit(place / "conf/base/hardware.yaml", checkpoints__minutes=0.005)
    run(place, "dvc", "repro", "train@causal", "group_texts@answers")
    whole = tmp_path / "whole"
    shutil.copytree(place, whole, symlinks=True)
    run(whole, "dvc", "repro", "train@answers")
    with (tmp_path / "log").open("wb") as log:
        command = ["dvc", "repro", "train@answers"]
        killed = subprocess.Popen(
            command, cwd=place, env=environment(place), stdout=log, stderr=log, start_new_session=True
        )
        while not list(place.glob(".lm-repro_cache/checkpoints/*/checkpoint-*/trainer_state.json")):
            assert killed.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.05)
        os.killpg(killed.pid, signal.SIGKILL)
        killed.wait()
    assert not (place / "models/answers").exists(), (tmp_path / "log").read_text()
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


@pytest.mark.slow
def test_chain_from_an_experiment_is_pinned_and_shown(chained: Path) -> None:
    run(chained, "dvc", "exp", "run", "-n", "fast", "-S", "tasks.causal.learning_rate=0.01", "train@causal")
    lock = yaml.safe_load((chained / "dvc.lock").read_text())["stages"]["train@causal"]["outs"]
    md5 = next(out["md5"] for out in lock if out["path"] == "models/causal")
    run(chained, "git", "reset", "-q", "--hard")
    run(chained, "dvc", "checkout", "-q", "--force")
    run(chained, "python", "-m", "tools.pin_model", "models/causal", "--rev", "fast", "--name", "mine")
    pin = yaml.safe_load((chained / "conf/model/mine.yaml").read_text())
    assert pin["from"] == pin["tokenizer"]["from"] == {"rev": "fast", "task": "causal", "md5": md5}
    run(chained, "python", "-m", "tools.pin_model", "models/causal", "--rev", "main", "--name", "main")
    head = run(chained, "git", "rev-parse", "HEAD").strip()
    assert yaml.safe_load((chained / "conf/model/main.yaml").read_text())["from"]["rev"] == head
    for arguments, told in (
        (["models/causal", "--rev", "nothing"], "git knows no commit and no experiment nothing"),
        (["models/nothing", "--rev", "fast"], "dvc.lock of fast has no models/nothing"),
        (["data/raw", "--rev", "fast"], "name the model of a task: models/TASK"),
    ):
        assert told in run(chained, "python", "-m", "tools.pin_model", *arguments, check=False)
    edit(chained / "params.yaml", tasks__causal__model="mine", tasks__answers__model="mine")
    assert "is in order" in run(chained, "python", "-m", "tools.check")
    run(chained, "git", "add", "-A")
    run(chained, "git", "commit", "-q", "-m", "mine")
    said = run(chained, "dvc", "exp", "run", "--temp", "-n", "onwards", "train@answers")  # a clone of git alone
    assert stages_run(said) >= {"tokenize@causal", "train@causal", "train@answers"}
    run(chained, "dvc", "repro", "train@answers")
    ledger = json.loads((chained / "reports/train/causal/stats.json").read_text())
    assert ledger["model"] == {"path": "models/causal", "md5": md5} and not ledger["from_scratch"]
    shown = " ".join(run(chained, "python", "-m", "tools.why", "train@answers").split())
    links = re.findall(r"starts from (models/causal of fast|models/causal|fresh weights)", shown)
    assert links[-3:] == ["models/causal", "models/causal of fast", "fresh weights"] and md5 in shown
    pin["from"]["rev"] = head
    (chained / "conf/model/mine.yaml").write_text(yaml.safe_dump(pin), encoding="utf-8")
    said = run(chained, "python", "-m", "tools.check", check=False)
    assert f"and from.md5 is {md5}" in said and "--name mine --force" in said
    pin["tokenizer"]["from"]["md5"] = "0" * 32 + ".dir"
    (chained / "conf/model/mine.yaml").write_text(yaml.safe_dump(pin), encoding="utf-8")
    assert "a model goes on with its own tokenizer" in run(chained, "python", "-m", "tools.check", check=False)
    run(chained, "git", "reset", "-q", "--hard", "HEAD~1")
