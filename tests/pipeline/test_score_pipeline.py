"""The score stage with the real DVC: enabled, disabled, and the changes that run it again."""

import csv
import io
import json
from pathlib import Path

import pytest
from data_helpers import read_contents
from dvc_project import edit_yaml, parse_stages_run, run_command

PAIRS_ENTRY = "{name: english, path: data/pairs/english.jsonl}"
SCORE_STAGES = {"score@causal", "score@mlm"}


@pytest.mark.slow
def test_score_pipeline_runs_only_for_tasks_with_pairs_in_params(clean: Path) -> None:
    on = [f"-S=+pairs.{task}={PAIRS_ENTRY}" for task in ("causal", "mlm")]
    assert parse_stages_run(run_command(clean, "dvc", "exp", "run", "-n", "on", *on)) == SCORE_STAGES
    scored = {task: read_contents(clean / f"reports/score/{task}") for task in ("causal", "mlm")}
    assert all(set(files) == {"metrics.json", "items.parquet"} for files in scored.values())
    assert parse_stages_run(run_command(clean, "dvc", "repro")) == set()

    edit_yaml(clean / "conf/pairs/english.yaml", groups=["field"])
    assert parse_stages_run(run_command(clean, "dvc", "repro")) == SCORE_STAGES
    figures = json.loads((clean / "reports/score/causal/metrics.json").read_text(encoding="utf-8"))["causal"]
    assert list(figures["groups"]) == ["field"]
    with (clean / "data/pairs/english.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"good": "A star is hot.", "bad": "A star are hot.", "field": "agreement", "phenomenon": "x"}\n')
    assert parse_stages_run(run_command(clean, "dvc", "repro")) == SCORE_STAGES

    run_command(clean, "git", "checkout", "-q", "conf/pairs", "data/pairs")
    assert parse_stages_run(run_command(clean, "dvc", "repro")) == set()  # both come from the run cache
    assert {task: read_contents(clean / f"reports/score/{task}") for task in scored} == scored
    assert parse_stages_run(run_command(clean, "dvc", "exp", "run", "-n", "off", "-S=~pairs.causal")) == set()
    assert "score@causal" not in run_command(clean, "dvc", "stage", "list")
    shown = csv.reader(io.StringIO(run_command(clean, "dvc", "exp", "show", "--csv")))
    assert {name for name in next(shown) if "accuracy" in name or "ties" in name or "items" in name} == set()


@pytest.mark.slow
def test_score_pipeline_of_a_scored_model_is_on_its_card_and_in_the_report(clean: Path) -> None:
    run_command(clean, "dvc", "exp", "run", "-n", "on", f"-S=+pairs.mlm={PAIRS_ENTRY}")
    run_command(clean, "git", "commit", "-qam", "pairs")
    run_command(clean, "python", "-m", "tools.publish", "mlm", "--dry-run", "card.md")
    card = (clean / "card.md").read_text(encoding="utf-8")
    assert "| `all` |" in card and "| `phenomenon: reflexive` |" in card
    assert "data/pairs/english.jsonl" in card and "dvc repro evaluate@mlm score@mlm" in card
    run_command(clean, "python", "-m", "tools.report")
    page = (clean / "reports/report.html").read_text(encoding="utf-8")
    assert "mlm: accuracy on 170 items by pseudo-log-likelihood" in page
    assert "causal: accuracy on" not in page
    run_command(clean, "git", "reset", "-q", "--hard", "HEAD~1")
