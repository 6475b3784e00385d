"""A new task needs only a section in params.yaml and a file in conf/task."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from dvc_project import ALL, PER_TASK, edit_yaml, parse_stages_run, run_command


@pytest.mark.slow
def test_new_task_runs_and_every_tool_knows_it(clean: Path) -> None:
    shutil.copy(clean / "conf/task/causal.yaml", clean / "conf/task/packed.yaml")
    edit_yaml(clean / "conf/task/packed.yaml", objective__isolate_documents=False)
    params = yaml.safe_load((clean / "params.yaml").read_text(encoding="utf-8"))
    params["tasks"]["packed"] = {**params["tasks"]["causal"], "learning_rate": 0.003}
    (clean / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")

    assert f"{len(ALL) + len(PER_TASK)} stages is in order" in run_command(clean, "python", "-m", "tools.check")
    assert parse_stages_run(run_command(clean, "dvc", "repro")) == {f"{stage}@packed" for stage in PER_TASK}
    metrics = json.loads((clean / "metrics/packed.json").read_text(encoding="utf-8"))
    assert metrics["packed"]["val"]["bpb"] > 0
    summary = run_command(clean, "python", "-m", "tools.summary")
    assert [line.split()[0] for line in summary.splitlines() if "bits_per_byte" in line] == ["causal", "mlm", "packed"]
    run_command(clean, "git", "add", "-A")
    run_command(clean, "git", "commit", "-qm", "a task")
    assert "packed" in run_command(clean, "env", "COLUMNS=120", "python", "-m", "tools.compare")
    run_command(clean, "python", "-m", "tools.document")
    assert "packed" in (clean / "docs/configuration.md").read_text(encoding="utf-8")
    run_command(clean, "python", "-m", "tools.report")
    page = (clean / "reports/report.html").read_text(encoding="utf-8")
    assert "packed, validation: bits_per_byte" in page and "causal, validation: bits_per_byte" in page
    output = run_command(clean, "python", "-m", "tools.publish", "packed", "--dry-run", check=False)
    assert "conf/publish.yaml" in output and "packed" in output and "Traceback" not in output
    run_command(clean, "git", "reset", "-q", "--hard", "HEAD~1")
