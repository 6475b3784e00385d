"""What dvc.yaml declares for a stage is what the stage uses, both ways, and `make check` says where it is not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.repo import Repo
from dvc_project import ROOT, STAGES, TASKS, run

from stages.core.compose import compose
from stages.core.config import CONF, choices
from tools.check import WHOLE_FILE, declared_stages, undeclared, used_params

with Repo(str(ROOT)) as _repo:
    DECLARED = {stage.name: stage for stage in declared_stages(_repo)}
GROUPS = sorted(folder.name for folder in CONF.iterdir() if folder.is_dir() and folder.name != "base")


@pytest.mark.parametrize("name", DECLARED)
def test_dvc_yaml_declares_what_the_stage_uses_and_nothing_else(name: str) -> None:
    stage = DECLARED[name]
    assert list(undeclared(stage, compose(stage.stage, item=stage.item))) == []


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("name", DECLARED)
def test_dvc_yaml_declares_the_keys_that_are_used_of_every_file_of_a_group(name: str, group: str) -> None:
    stage = DECLARED[name]
    chosen = compose(stage.stage, item=stage.item).chosen
    if group not in chosen or group == "task":
        return
    declared = stage.params.get(f"conf/{group}/{chosen[group]}.yaml", set())
    for choice in choices(group):
        composition = compose(stage.stage, [f"{group}={choice}"], stage.item)
        used = used_params(composition).get(f"conf/{group}/{choice}.yaml", set())
        assert declared == {WHOLE_FILE} or declared == used


def test_dvc_yaml_is_read_at_a_sitting_and_names_no_module() -> None:
    text = (ROOT / "dvc.yaml").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 130
    assert "stages/" not in text and ".py" not in text
    definitions = [stage.get("do", stage) for stage in STAGES.values()]
    assert all(stage["desc"] and "${" not in stage["cmd"] for stage in definitions)


Edit = Callable[[dict[str, Any]], object]
WRONG: dict[str, tuple[Edit, str]] = {
    "value not declared": (
        lambda stages: stages["train"]["do"]["params"][0]["params.yaml"].remove("block_size"),
        "train@causal uses block_size of params.yaml, and params does not declare it",
    ),
    "value not used": (
        lambda stages: stages["tokenize"]["do"]["params"].append("seed"),
        "tokenize@mlm declares seed of params.yaml, and does not use it",
    ),
    "key of conf not declared": (
        lambda stages: stages["evaluate"]["do"]["params"].__setitem__(-1, {"conf/task/${key}.yaml": ["evaluate"]}),
        "evaluate@mlm uses samples of conf/task/mlm.yaml, and params does not declare it",
    ),
    "file of conf not declared": (
        lambda stages: stages["baseline"]["do"]["params"].remove({"conf/base/hardware.yaml": ["hardware"]}),
        "baseline@causal uses hardware of conf/base/hardware.yaml, and params does not declare it",
    ),
    "file of conf not used": (
        lambda stages: stages["group_texts"]["do"]["params"].append({"conf/hardware/${hardware}.yaml": ["hardware"]}),
        "group_texts@causal declares hardware of conf/hardware/cpu.yaml, and does not use it",
    ),
    "input not declared": (
        lambda stages: stages["train"]["do"]["deps"].remove("data/blocks/${key}"),
        "train@mlm uses data/blocks/mlm, and neither deps nor outs declares it",
    ),
    "input not used": (
        lambda stages: stages["train"]["do"]["deps"].append("data/raw"),
        "train@mlm declares data/raw, and does not use it",
    ),
    "code not declared": (
        lambda stages: stages["tokenize"]["do"]["deps"].remove("code/tokenize.json"),
        "tokenize@causal uses code/tokenize.json, and neither deps nor outs declares it",
    ),
    "code of another stage": (
        lambda stages: stages["evaluate"]["do"]["deps"].append("code/baseline.json"),
        "evaluate@causal declares code/baseline.json, and does not use it",
    ),
    "command of another stage": (
        lambda stages: stages["baseline"]["do"].__setitem__("cmd", "python -m stages.evaluate"),
        "baseline.cmd=python -m stages.evaluate: it should be python -m stages.baseline",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_check_names_what_dvc_yaml_declares_wrongly(clean: Path, wrong: str) -> None:
    change, said = WRONG[wrong]
    pipeline = yaml.safe_load((clean / "dvc.yaml").read_text(encoding="utf-8"))
    change(pipeline["stages"])
    (clean / "dvc.yaml").write_text(yaml.safe_dump(pipeline, sort_keys=False), encoding="utf-8")
    checked = run(clean, "python", "-m", "tools.check", check=False)
    assert f"dvc.yaml: {said}" in checked


def test_check_refuses_dvcs_own_hydra(clean: Path) -> None:
    run(clean, "dvc", "config", "hydra.enabled", "true")
    assert "hydra.enabled is on in DVC's configuration" in run(clean, "python", "-m", "tools.check", check=False)


@pytest.mark.parametrize("task", TASKS)
def test_dvc_artifacts_are_the_models(clean: Path, tmp_path: Path, task: str) -> None:
    run(clean, "dvc", "remote", "add", "--default", "here", str(tmp_path / "remote"))
    run(clean, "dvc", "push", "-q", f"models/{task}")
    run(clean, "git", "commit", "-qam", "a remote")
    run(clean, "git", "tag", "-a", f"{task}@v1.0.0", "-m", "a version of the model")
    run(tmp_path, "dvc", "artifacts", "get", str(clean), task, "--out", str(tmp_path / "model"))
    run(clean, "git", "tag", "-d", f"{task}@v1.0.0")
    run(clean, "git", "reset", "-q", "--hard", "HEAD~1")
    assert (tmp_path / "model/model.safetensors").read_bytes() == (
        clean / f"models/{task}/model.safetensors"
    ).read_bytes()
