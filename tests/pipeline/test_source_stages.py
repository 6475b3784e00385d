"""The pipeline with several sources: a changed file reloads its source; changed weights do not run tokenize again."""

from pathlib import Path

import pytest
from data_helpers import write_jsonl
from dvc_project import edit_yaml, parse_stages_run, run_command

from stages.core.artifacts import read_json

WEIGHTS = {"first": 0.5, "second": 0.3, "third": 0.2}
CHANGED_WEIGHTS = {"first": 0.2, "second": 0.3, "third": 0.5}


def write_source(file: Path, number: int) -> None:
    texts = [f"{file.stem} answers {index}. " * 9 for index in range(number)]
    write_jsonl(file, [{"title": f"{file.stem} {i}?", "answers.text": [text]} for i, text in enumerate(texts)])


@pytest.mark.slow
def test_pipeline_of_three_sources_runs_only_the_stages_that_a_change_affects(clean: Path) -> None:
    for name in WEIGHTS:
        write_source(clean / f"{name}.jsonl", 90)
    sources = {name: {"name": "files", "path": f"{name}.jsonl"} for name in WEIGHTS}
    edit_yaml(clean / "params.yaml", sources=sources, data={"name": "mix", "path": "data/sources"})
    edit_yaml(clean / "conf/data/mix.yaml", sources=list(WEIGHTS), weights=WEIGHTS)
    downstream = {"group_texts@causal", "train@causal", "evaluate@causal"}

    def run_repro() -> set[str]:
        return parse_stages_run(run_command(clean, "dvc", "repro", "evaluate@causal"))

    def get_shares() -> dict[str, float]:
        entries = read_json(clean / "data/blocks/causal/train/stats.json")["sources"]
        total = sum(entry["tokens"] for entry in entries.values())
        return {name: entry["tokens"] / total for name, entry in entries.items()}

    reading = {f"source@{name}" for name in WEIGHTS}
    assert run_repro() == {*reading, "download", "tokenize@causal", "baseline@causal", *downstream}
    assert get_shares() == pytest.approx(WEIGHTS, abs=0.03)
    edit_yaml(clean / "conf/data/mix.yaml", weights=CHANGED_WEIGHTS)
    assert run_repro() == downstream
    assert get_shares() == pytest.approx(CHANGED_WEIGHTS, abs=0.03)
    write_source(clean / "second.jsonl", 91)
    assert run_repro() == {"source@second", "download", "tokenize@causal", "baseline@causal", *downstream}
    assert run_repro() == set()
