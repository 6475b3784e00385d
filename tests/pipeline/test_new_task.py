"""A task of one's own is one section of params.yaml and one file of conf/task."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from dvc_project import ALL, PER_TASK, edit, run, stages_run


@pytest.mark.slow
def test_task_of_ones_own_runs_and_every_tool_knows_it(clean: Path) -> None:
    shutil.copy(clean / "conf/task/causal.yaml", clean / "conf/task/packed.yaml")
    edit(clean / "conf/task/packed.yaml", objective__isolate_documents=False)
    params = yaml.safe_load((clean / "params.yaml").read_text(encoding="utf-8"))
    params["tasks"]["packed"] = {**params["tasks"]["causal"], "learning_rate": 0.003}
    (clean / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")

    assert f"{len(ALL) + len(PER_TASK)} stages is in order" in run(clean, "python", "-m", "tools.check")
    assert stages_run(run(clean, "dvc", "repro")) == {f"{stage}@packed" for stage in PER_TASK}
    metrics = json.loads((clean / "metrics/packed.json").read_text(encoding="utf-8"))
    assert metrics["packed"]["val"]["bpb"] > 0
    summary = run(clean, "python", "-m", "tools.summary")
    assert [line.split()[0] for line in summary.splitlines() if "bits_per_byte" in line] == ["causal", "mlm", "packed"]
    run(clean, "git", "add", "-A")
    run(clean, "git", "commit", "-qm", "a task")
    assert "packed" in run(clean, "env", "COLUMNS=120", "python", "-m", "tools.compare")
    run(clean, "python", "-m", "tools.document")
    assert "packed" in (clean / "docs/configuration.md").read_text(encoding="utf-8")
    run(clean, "python", "-m", "tools.report")
    page = (clean / "reports/report.html").read_text(encoding="utf-8")
    assert "packed, validation: bits_per_byte" in page and "causal, validation: bits_per_byte" in page
    said = run(clean, "python", "-m", "tools.publish", "packed", "--dry-run", check=False)
    assert "conf/publish.yaml" in said and "packed" in said and "Traceback" not in said
    run(clean, "git", "reset", "-q", "--hard", "HEAD~1")
