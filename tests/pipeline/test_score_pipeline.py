"""The stage score with the real DVC: on, off, and what runs it again."""

import csv
import io
import json
from pathlib import Path

import pytest
from data_helpers import contents
from dvc_project import edit, run, stages_run

ENTRY = "{name: english, path: data/pairs/english.jsonl}"
BOTH = {"score@causal", "score@mlm"}


@pytest.mark.slow
def test_score_pipeline_runs_where_params_name_pairs_and_nowhere_else(clean: Path) -> None:
    on = [f"-S=+pairs.{task}={ENTRY}" for task in ("causal", "mlm")]
    assert stages_run(run(clean, "dvc", "exp", "run", "-n", "on", *on)) == BOTH
    scored = {task: contents(clean / f"reports/score/{task}") for task in ("causal", "mlm")}
    assert all(set(files) == {"metrics.json", "items.parquet"} for files in scored.values())
    assert stages_run(run(clean, "dvc", "repro")) == set()

    edit(clean / "conf/pairs/english.yaml", groups=["field"])
    assert stages_run(run(clean, "dvc", "repro")) == BOTH
    figures = json.loads((clean / "reports/score/causal/metrics.json").read_text(encoding="utf-8"))["causal"]
    assert list(figures["groups"]) == ["field"]
    with (clean / "data/pairs/english.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"good": "A star is hot.", "bad": "A star are hot.", "field": "agreement", "phenomenon": "x"}\n')
    assert stages_run(run(clean, "dvc", "repro")) == BOTH

    run(clean, "git", "checkout", "-q", "conf/pairs", "data/pairs")
    assert stages_run(run(clean, "dvc", "repro")) == set()  # both come from the run cache
    assert {task: contents(clean / f"reports/score/{task}") for task in scored} == scored
    assert stages_run(run(clean, "dvc", "exp", "run", "-n", "off", "-S=~pairs.causal")) == set()
    assert "score@causal" not in run(clean, "dvc", "stage", "list")
    shown = csv.reader(io.StringIO(run(clean, "dvc", "exp", "show", "--csv")))
    assert {name for name in next(shown) if "accuracy" in name or "ties" in name or "items" in name} == set()


@pytest.mark.slow
def test_score_pipeline_of_a_scored_model_is_on_its_card_and_in_the_report(clean: Path) -> None:
    run(clean, "dvc", "exp", "run", "-n", "on", f"-S=+pairs.mlm={ENTRY}")
    run(clean, "git", "commit", "-qam", "pairs")
    run(clean, "python", "-m", "tools.publish", "mlm", "--dry-run", "card.md")
    card = (clean / "card.md").read_text(encoding="utf-8")
    assert "| `all` |" in card and "| `phenomenon: reflexive` |" in card
    assert "data/pairs/english.jsonl" in card and "dvc repro evaluate@mlm score@mlm" in card
    run(clean, "python", "-m", "tools.report")
    page = (clean / "reports/report.html").read_text(encoding="utf-8")
    assert "mlm: accuracy on 170 items by pseudo-log-likelihood" in page
    assert "causal: accuracy on" not in page
    run(clean, "git", "reset", "-q", "--hard", "HEAD~1")
