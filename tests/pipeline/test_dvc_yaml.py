"""dvc.yaml declares exactly the inputs that each stage uses, and `make check` reports any difference."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.repo import Repo
from dvc_project import ROOT, STAGES, TASKS, run_command

from stages.core.compose import compose_config
from stages.core.config import CONF, list_configurations
from tools.check import WHOLE_FILE, find_declaration_problems, get_used_params, list_declared_stages

with Repo(str(ROOT)) as _repo:
    DECLARED = {stage.name: stage for stage in list_declared_stages(_repo)}
GROUPS = sorted(folder.name for folder in CONF.iterdir() if folder.is_dir() and folder.name != "base")


@pytest.mark.parametrize("name", DECLARED)
def test_dvc_yaml_declares_exactly_the_inputs_that_the_stage_uses(name: str) -> None:
    stage = DECLARED[name]
    assert list(find_declaration_problems(stage, compose_config(stage.stage, item=stage.item))) == []


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("name", DECLARED)
def test_dvc_yaml_declares_the_used_keys_for_every_file_of_a_group(name: str, group: str) -> None:
    stage = DECLARED[name]
    chosen = compose_config(stage.stage, item=stage.item).chosen
    if group not in chosen or group == "task":
        return
    declared = stage.params.get(f"conf/{group}/{chosen[group]}.yaml", set())
    for choice in list_configurations(group):
        composition = compose_config(stage.stage, [f"{group}={choice}"], stage.item)
        used = get_used_params(composition).get(f"conf/{group}/{choice}.yaml", set())
        assert declared == {WHOLE_FILE} or declared == used


def test_dvc_yaml_is_short_and_names_no_module() -> None:
    text = (ROOT / "dvc.yaml").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 130
    assert "stages/" not in text and ".py" not in text
    definitions = [stage.get("do", stage) for stage in STAGES.values()]
    assert all(stage["desc"] and "${" not in stage["cmd"] for stage in definitions)


Edit = Callable[[dict[str, Any]], object]
BROKEN_PIPELINES: dict[str, tuple[Edit, str]] = {
    "value not declared": (
        lambda stages: stages["train"]["do"]["params"][0]["params.yaml"].remove("block_size"),
        "train@causal uses block_size of params.yaml, but its params do not declare it",
    ),
    "value not used": (
        lambda stages: stages["tokenize"]["do"]["params"].append("seed"),
        "tokenize@mlm declares seed of params.yaml, but the stage does not use it",
    ),
    "key of conf not declared": (
        lambda stages: stages["evaluate"]["do"]["params"].__setitem__(-1, {"conf/task/${key}.yaml": ["evaluate"]}),
        "evaluate@mlm uses samples of conf/task/mlm.yaml, but its params do not declare it",
    ),
    "file of conf not declared": (
        lambda stages: stages["baseline"]["do"]["params"].remove({"conf/base/hardware.yaml": ["hardware"]}),
        "baseline@causal uses hardware of conf/base/hardware.yaml, but its params do not declare it",
    ),
    "file of conf not used": (
        lambda stages: stages["group_texts"]["do"]["params"].append({"conf/hardware/${hardware}.yaml": ["hardware"]}),
        "group_texts@causal declares hardware of conf/hardware/cpu.yaml, but the stage does not use it",
    ),
    "input not declared": (
        lambda stages: stages["train"]["do"]["deps"].remove("data/blocks/${key}"),
        "train@mlm uses data/blocks/mlm, but neither its deps nor its outs declare it",
    ),
    "input not used": (
        lambda stages: stages["train"]["do"]["deps"].append("data/raw"),
        "train@mlm declares data/raw, but the stage does not use it",
    ),
    "code not declared": (
        lambda stages: stages["tokenize"]["do"]["deps"].remove("code/tokenize.json"),
        "tokenize@causal uses code/tokenize.json, but neither its deps nor its outs declare it",
    ),
    "code of another stage": (
        lambda stages: stages["evaluate"]["do"]["deps"].append("code/baseline.json"),
        "evaluate@causal declares code/baseline.json, but the stage does not use it",
    ),
    "command of another stage": (
        lambda stages: stages["baseline"]["do"].__setitem__("cmd", "python -m stages.evaluate"),
        "baseline.cmd=python -m stages.evaluate: it should be python -m stages.baseline",
    ),
}


@pytest.mark.parametrize("wrong", BROKEN_PIPELINES)
def test_check_reports_a_wrong_declaration_in_dvc_yaml(clean: Path, wrong: str) -> None:
    change, message = BROKEN_PIPELINES[wrong]
    pipeline = yaml.safe_load((clean / "dvc.yaml").read_text(encoding="utf-8"))
    change(pipeline["stages"])
    (clean / "dvc.yaml").write_text(yaml.safe_dump(pipeline, sort_keys=False), encoding="utf-8")
    checked = run_command(clean, "python", "-m", "tools.check", check=False)
    assert f"dvc.yaml: {message}" in checked


def test_check_refuses_dvcs_own_hydra(clean: Path) -> None:
    run_command(clean, "dvc", "config", "hydra.enabled", "true")
    assert "hydra.enabled is on in DVC's configuration" in run_command(
        clean, "python", "-m", "tools.check", check=False
    )


@pytest.mark.parametrize("task", TASKS)
def test_dvc_artifacts_are_the_models(clean: Path, tmp_path: Path, task: str) -> None:
    run_command(clean, "dvc", "remote", "add", "--default", "here", str(tmp_path / "remote"))
    run_command(clean, "dvc", "push", "-q", f"models/{task}")
    run_command(clean, "git", "commit", "-qam", "a remote")
    run_command(clean, "git", "tag", "-a", f"{task}@v1.0.0", "-m", "a version of the model")
    run_command(tmp_path, "dvc", "artifacts", "get", str(clean), task, "--out", str(tmp_path / "model"))
    run_command(clean, "git", "tag", "-d", f"{task}@v1.0.0")
    run_command(clean, "git", "reset", "-q", "--hard", "HEAD~1")
    assert (tmp_path / "model/model.safetensors").read_bytes() == (
        clean / f"models/{task}/model.safetensors"
    ).read_bytes()
