"""Several sources in the pipeline: a changed file reads that source again, changed weights tokenize nothing."""

from pathlib import Path

import pytest
from data_helpers import write_jsonl
from dvc_project import edit, run, stages_run

from stages.core.artifacts import read_json

WEIGHTS = {"first": 0.5, "second": 0.3, "third": 0.2}
LIKELIER = {"first": 0.2, "second": 0.3, "third": 0.5}


def write_source(file: Path, number: int) -> None:
    texts = [f"{file.stem} answers {index}. " * 9 for index in range(number)]
    write_jsonl(file, [{"title": f"{file.stem} {i}?", "answers.text": [text]} for i, text in enumerate(texts)])


@pytest.mark.slow
def test_pipeline_of_three_sources_runs_what_a_change_asks_for(clean: Path) -> None:
    for name in WEIGHTS:
        write_source(clean / f"{name}.jsonl", 90)
    sources = {name: {"name": "files", "path": f"{name}.jsonl"} for name in WEIGHTS}
    edit(clean / "params.yaml", sources=sources, data={"name": "mix", "path": "data/sources"})
    edit(clean / "conf/data/mix.yaml", sources=list(WEIGHTS), weights=WEIGHTS)
    downstream = {"group_texts@causal", "train@causal", "evaluate@causal"}

    def repro() -> set[str]:
        return stages_run(run(clean, "dvc", "repro", "evaluate@causal"))

    def shares() -> dict[str, float]:
        entries = read_json(clean / "data/blocks/causal/train/stats.json")["sources"]
        total = sum(entry["tokens"] for entry in entries.values())
        return {name: entry["tokens"] / total for name, entry in entries.items()}

    reading = {f"source@{name}" for name in WEIGHTS}
    assert repro() == {*reading, "download", "tokenize@causal", "baseline@causal", *downstream}
    assert shares() == pytest.approx(WEIGHTS, abs=0.03)
    edit(clean / "conf/data/mix.yaml", weights=LIKELIER)
    assert repro() == downstream
    assert shares() == pytest.approx(LIKELIER, abs=0.03)
    write_source(clean / "second.jsonl", 91)
    assert repro() == {"source@second", "download", "tokenize@causal", "baseline@causal", *downstream}
    assert repro() == set()
