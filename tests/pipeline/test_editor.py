"""What editors with a DVC extension read: the commands that VS Code's extension runs, with their options."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc_project import TASKS, edit_yaml, run_command

ROOT = Path(__file__).parents[2]
PLOTS = [file for plot in yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["plots"] for file in plot]


@pytest.fixture
def saved(clean: Path) -> Path:
    """The project with an experiment `other`, which has another learning rate; nothing is trained for it."""
    edit_yaml(clean / "params.yaml", tasks__causal__learning_rate=0.5)
    run_command(clean, "dvc", "exp", "save", "-n", "other")
    run_command(clean, "git", "checkout", "HEAD", "--", "params.yaml")
    return clean


def read_json(project: Path, *command: str) -> Any:
    """Value that a command prints as JSON, after any lines of logging."""
    output = run_command(project, *command)
    return json.loads(output[min(output.find(bracket) for bracket in "[{" if bracket in output) :])


def test_editor_shows_parameters_and_metrics_of_workspace_commit_and_experiment(saved: Path) -> None:
    workspace, commit = read_json(saved, "dvc", "exp", "show", "--num", "1", "--json")
    (experiment,) = (branch["revs"][0] for branch in commit["experiments"])
    assert (workspace["rev"], commit["name"], experiment["name"]) == ("workspace", "main", "other")
    for row, rate in ((workspace, None), (commit, None), (experiment, 0.5)):
        params = row["data"]["params"]
        assert {"params.yaml", "conf/task/causal.yaml", "conf/hardware/cpu.yaml"} <= params.keys()
        learning_rate = params["params.yaml"]["data"]["tasks"]["causal"]["learning_rate"]
        assert (learning_rate == 0.5) == (rate == 0.5)
        metrics = row["data"]["metrics"]
        assert metrics.keys() == {f"metrics/{task}.json" for task in TASKS}
        assert metrics["metrics/causal.json"]["data"]["causal"]["test"]["bpb"] > 0


def test_editor_draws_the_plots_of_dvc_yaml_for_workspace_and_experiment(saved: Path) -> None:
    revisions = ("workspace", "other")
    command = ("dvc", "plots", "diff", *revisions, "-o", ".dvc/tmp/plots", "--split", "--json")
    drawn = read_json(saved, *command)
    assert "errors" not in drawn
    assert drawn["data"].keys() == set(PLOTS)
    for plots in drawn["data"].values():
        assert [plot["type"] for plot in plots] == ["vega"]
        points = plots[0]["anchor_definitions"]["<DVC_METRIC_DATA>"]
        assert {point["rev"] for point in points} == set(revisions)


def test_editor_finds_no_changed_data_in_a_clean_workspace(clean: Path) -> None:
    status = read_json(clean, "dvc", "data", "status", "--granular", "--unchanged", "--json")
    assert not status.get("uncommitted") and not status.get("committed")
    assert "models/causal/model.safetensors" in status["unchanged"]
