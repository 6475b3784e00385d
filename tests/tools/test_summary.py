"""Tests of tools.summary, the table of each task's metric before and after training at the end of `make`."""

import json
from pathlib import Path

import pytest

from tools import summary


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Directory with three tasks, two of them evaluated."""
    section = "{model: tiny, learning_rate: 1}"
    (tmp_path / "params.yaml").write_text(f"tasks: {{causal: {section}, prefix: {section}, mlm: {section}}}")
    monkeypatch.setattr(summary, "PARAMS", tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)
    for task, metric in (("causal", "bits_per_byte"), ("mlm", "pseudo_bits_per_byte")):
        file = tmp_path / f"reports/evaluate/{task}/metrics.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps({task: {"test": {metric: 3.0, f"{metric}_se": 0.1, f"base_{metric}": 4.0}}}))
    return tmp_path


def test_summary_shows_a_row_per_task_and_names_tasks_without_evaluation(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary.main()
    shown = capsys.readouterr()
    rows = [line.split() for line in shown.out.splitlines() if "tiny" in line]
    assert rows == [
        ["causal", "tiny", "bits_per_byte", "4.000", "3.000", "-25%"],
        ["mlm", "tiny", "pseudo_bits_per_byte", "4.000", "3.000", "-25%"],
    ]
    assert "summary: prefix is not evaluated yet: run `dvc repro`" in shown.err


def test_summary_of_a_damaged_report_exits_with_one_line(workspace: Path) -> None:
    (workspace / "reports/evaluate/mlm/metrics.json").write_text("{")
    with pytest.raises(SystemExit, match=r"summary: reports/evaluate/mlm/metrics\.json is damaged"):
        summary.main()
