"""A task that starts from another task: the stages that a change runs, and recovery after a kill."""

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
from data_helpers import read_contents
from dvc_project import PER_TASK, build_environment, edit_yaml, parse_stages_run, run_command

CHAINED = ["baseline@answers", "evaluate@answers", "train@answers"]


@pytest.fixture(scope="module")
def chained_project(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Copy of the project in which the task `answers` starts from causal, with its results committed."""
    copy = tmp_path_factory.mktemp("chained") / "project"
    shutil.copytree(project, copy, symlinks=True)
    run_command(copy, "git", "reset", "-q", "--hard")
    run_command(copy, "dvc", "checkout", "-q", "--force")
    params = yaml.safe_load((copy / "params.yaml").read_text(encoding="utf-8"))
    params["tasks"]["answers"] = {**params["tasks"]["causal"], "start": "causal", "sources": ["sample"]}
    (copy / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")
    publishing = yaml.safe_load((copy / "conf/publish.yaml").read_text(encoding="utf-8"))
    edit_yaml(copy / "conf/publish.yaml", answers=publishing["causal"])
    assert "is in order" in run_command(copy, "python", "-m", "tools.check")
    assert parse_stages_run(run_command(copy, "dvc", "repro")) == {f"{stage}@answers" for stage in PER_TASK}
    run_command(copy, "git", "add", "-A")
    run_command(copy, "git", "commit", "-q", "-m", "chain")
    yield copy


@pytest.mark.slow
def test_chain_with_a_changed_first_task_runs_only_its_downstream_stages(chained_project: Path) -> None:
    assert parse_stages_run(run_command(chained_project, "dvc", "repro")) == set()
    untrained, started = (
        json.loads((chained_project / f"metrics/baseline/{task}.json").read_text())[task]
        for task in ("causal", "answers")
    )
    assert started["test"]["bits_per_byte"] < untrained["test"]["bits_per_byte"]
    edit_yaml(chained_project / "params.yaml", tasks__causal__learning_rate=0.003)
    assert parse_stages_run(run_command(chained_project, "dvc", "repro")) == {
        "train@causal",
        "evaluate@causal",
        *CHAINED,
    }
    assert parse_stages_run(run_command(chained_project, "dvc", "repro")) == set()
    edit_yaml(chained_project / "params.yaml", tasks__answers__learning_rate=0.003)
    assert parse_stages_run(run_command(chained_project, "dvc", "repro")) == {"train@answers", "evaluate@answers"}
    run_command(chained_project, "git", "reset", "-q", "--hard")
    assert parse_stages_run(run_command(chained_project, "dvc", "repro")) == set()  # all from the run cache


@pytest.mark.slow
def test_chain_on_the_card_has_the_md5_and_the_data_of_each_link(chained_project: Path) -> None:
    run_command(chained_project, "python", "-m", "tools.publish", "answers", "--dry-run", "card.md")
    card = (chained_project / "card.md").read_text(encoding="utf-8")
    (chained_project / "card.md").unlink()
    locked = yaml.safe_load((chained_project / "dvc.lock").read_text(encoding="utf-8"))["stages"]
    outs = {out["path"]: out["md5"] for stage in locked.values() for out in stage["outs"]}
    text = f"sample (askscience.jsonl, data/raw {outs['data/raw']})"
    assert f"1. models/answers (md5 {outs['models/answers']}), trained on the sources sample of {text}\n" in card
    assert f"2. starts from models/causal (md5 {outs['models/causal']}), trained on {text}\n" in card
    assert "3. starts from fresh weights (conf/model/tiny-gpt2.yaml)\n" in card
    assert "trained further from `causal`, a model of this repository" in card
    assert "This task uses the sources `sample`." in card


@pytest.mark.slow
def test_chain_killed_in_its_second_task_ends_with_the_same_bytes(chained_project: Path, tmp_path: Path) -> None:
    killed_copy = tmp_path / "project"
    shutil.copytree(chained_project, killed_copy, symlinks=True)
    edit_yaml(killed_copy / "params.yaml", tasks__answers__num_train_epochs=1.0)
    edit_yaml(killed_copy / "conf/base/hardware.yaml", checkpoints__minutes=0.005)
    run_command(killed_copy, "dvc", "repro", "train@causal", "group_texts@answers")
    undisturbed = tmp_path / "whole"
    shutil.copytree(killed_copy, undisturbed, symlinks=True)
    run_command(undisturbed, "dvc", "repro", "train@answers")
    with (tmp_path / "log").open("wb") as log:
        command = ["dvc", "repro", "train@answers"]
        killed = subprocess.Popen(
            command, cwd=killed_copy, env=build_environment(killed_copy), stdout=log, stderr=log, start_new_session=True
        )
        while not list(killed_copy.glob(".lm-repro_cache/checkpoints/*/checkpoint-*/trainer_state.json")):
            assert killed.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.05)
        os.killpg(killed.pid, signal.SIGKILL)
        killed.wait()
    assert not (killed_copy / "models/answers").exists(), (tmp_path / "log").read_text()
    assert "resuming from step" in run_command(killed_copy, "dvc", "repro", "train@answers")
    assert read_contents(killed_copy / "models/answers") == read_contents(undisturbed / "models/answers")
    assert read_contents(killed_copy / "reports/train/answers") == read_contents(undisturbed / "reports/train/answers")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "message"),
    [("answers", "a task cannot start from itself"), ("last", "did you mean"), ("mlm", "has objective.name")],
)
def test_chain_that_is_impossible_fails_the_check(chained_project: Path, start: str, message: str) -> None:
    edit_yaml(chained_project / "params.yaml", tasks__answers__start=start)
    try:
        output = run_command(chained_project, "python", "-m", "tools.check", check=False)
        assert output.startswith("check: the configuration is wrong") and f"tasks.answers.start={start}: " in output
        assert message in output or start == "last"
    finally:
        run_command(chained_project, "git", "reset", "-q", "--hard")


@pytest.mark.slow
def test_chain_from_an_experiment_is_pinned_and_shown(chained_project: Path) -> None:
    run_command(
        chained_project, "dvc", "exp", "run", "-n", "fast", "-S", "tasks.causal.learning_rate=0.01", "train@causal"
    )
    lock = yaml.safe_load((chained_project / "dvc.lock").read_text())["stages"]["train@causal"]["outs"]
    md5 = next(out["md5"] for out in lock if out["path"] == "models/causal")
    run_command(chained_project, "git", "reset", "-q", "--hard")
    run_command(chained_project, "dvc", "checkout", "-q", "--force")
    run_command(chained_project, "python", "-m", "tools.pin_model", "models/causal", "--rev", "fast", "--name", "mine")
    pin = yaml.safe_load((chained_project / "conf/model/mine.yaml").read_text())
    assert pin["from"] == pin["tokenizer"]["from"] == {"rev": "fast", "task": "causal", "md5": md5}
    run_command(chained_project, "python", "-m", "tools.pin_model", "models/causal", "--rev", "main", "--name", "main")
    head = run_command(chained_project, "git", "rev-parse", "HEAD").strip()
    assert yaml.safe_load((chained_project / "conf/model/main.yaml").read_text())["from"]["rev"] == head
    for arguments, message in (
        (["models/causal", "--rev", "nothing"], "git knows no commit and no experiment nothing"),
        (["models/nothing", "--rev", "fast"], "dvc.lock of fast has no models/nothing"),
        (["data/raw", "--rev", "fast"], "name the model of a task: models/TASK"),
    ):
        assert message in run_command(chained_project, "python", "-m", "tools.pin_model", *arguments, check=False)
    edit_yaml(chained_project / "params.yaml", tasks__causal__model="mine", tasks__answers__model="mine")
    assert "is in order" in run_command(chained_project, "python", "-m", "tools.check")
    run_command(chained_project, "git", "add", "-A")
    run_command(chained_project, "git", "commit", "-q", "-m", "mine")
    output = run_command(
        chained_project, "dvc", "exp", "run", "--temp", "-n", "onwards", "train@answers"
    )  # runs in a clone without DVC's workspace files
    assert parse_stages_run(output) >= {"tokenize@causal", "train@causal", "train@answers"}
    run_command(chained_project, "dvc", "repro", "train@answers")
    ledger = json.loads((chained_project / "reports/train/causal/stats.json").read_text())
    assert ledger["model"] == {"path": "models/causal", "md5": md5} and not ledger["from_scratch"]
    shown = " ".join(run_command(chained_project, "python", "-m", "tools.why", "train@answers").split())
    links = re.findall(r"starts from (models/causal of fast|models/causal|fresh weights)", shown)
    assert links[-3:] == ["models/causal", "models/causal of fast", "fresh weights"] and md5 in shown
    pin["from"]["rev"] = head
    (chained_project / "conf/model/mine.yaml").write_text(yaml.safe_dump(pin), encoding="utf-8")
    output = run_command(chained_project, "python", "-m", "tools.check", check=False)
    assert f"but from.md5 is {md5}" in output and "--name mine --force" in output
    pin["tokenizer"]["from"]["md5"] = "0" * 32 + ".dir"
    (chained_project / "conf/model/mine.yaml").write_text(yaml.safe_dump(pin), encoding="utf-8")
    assert "a model continues with its own tokenizer" in run_command(
        chained_project, "python", "-m", "tools.check", check=False
    )
    run_command(chained_project, "git", "reset", "-q", "--hard", "HEAD~1")
