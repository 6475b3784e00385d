"""The whole pipeline with the real DVC, and the guide's data set and models from a local Hub."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc_project import ALL, ROOT, TASKS, edit_yaml, parse_stages_run, run_command
from hub_cases import COMMIT, encode_parquet, make_guide_questions, make_small_model
from mini_hub import MiniHub


@pytest.mark.slow
def test_hub_pipeline_of_the_guides_data_and_models_runs_and_names_every_revision(clean: Path, tmp_path: Path) -> None:
    models = {"causal": "distilgpt2", "mlm": "distilroberta"}
    confs = {task: yaml.safe_load((ROOT / f"conf/model/{name}.yaml").read_text()) for task, name in models.items()}
    repositories = {
        conf["path"]: {conf["revision"]: make_small_model(task, tmp_path / task)} for task, conf in confs.items()
    }
    repositories["datasets/dany0407/eli5_category"] = {
        COMMIT: {"data/train-00000-of-00001.parquet": encode_parquet(make_guide_questions())}
    }
    chosen = {f"tasks__{task}__model": name for task, name in models.items()}
    edit_yaml(clean / "params.yaml", data__name="eli5_category", **chosen)
    edit_yaml(clean / "conf/data/eli5_category.yaml", filter={"category": ["Physics"]}, max_records=80)
    with MiniHub(repositories, branches={"main": COMMIT}).serve() as url:
        hub = ("env", "HF_HUB_OFFLINE=0", f"HF_ENDPOINT={url}", f"HF_HOME={tmp_path}/hf", "NO_PROXY=127.0.0.1")
        assert parse_stages_run(run_command(clean, *hub, "dvc", "repro")) == ALL - {"code"}
    assert parse_stages_run(run_command(clean, "dvc", "repro")) == set()

    def read_ledger(name: str) -> Any:
        return json.loads((clean / name / "stats.json").read_text())

    data = read_ledger("data/raw")
    assert data["source"] == {"hub": "dany0407/eli5_category", "revision": "main", "commit": COMMIT}
    assert (sum(data["records_out"].values()), data["records_skipped"]["filtered"]) == (80, 80)
    for task, conf in confs.items():
        pin = {key: conf[key] for key in ("path", "revision")}
        assert read_ledger(f"data/tokens/{task}")["tokenizer"] == read_ledger(f"reports/train/{task}")["model"] == pin
        figures = json.loads((clean / f"reports/evaluate/{task}/metrics.json").read_text())[task]["test"]
        assert figures["documents"] > 0 and figures["loss" if task == "causal" else "masked_loss"] > 0
    assert set(TASKS) == set(confs)
