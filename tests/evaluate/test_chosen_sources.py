"""Scores of a task with chosen sources: each document belongs to its record, also after records that were left out."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import run_stage
from data_helpers import write_records

TEXTS = [f"{animal} sleeps {how}." for animal in ("The cat", "A fox", "The bear") for how in ("badly", "a lot", "well")]
SOURCES = ["web", "books", "web", "news", "books", "books", "web", "books", "news"]
CHOSEN = ["books", "news"]


@pytest.fixture
def evaluated(corpus: Path, trained: dict[str, Path], run_toy: Any, tmp_path: Path) -> Path:
    """Outs of baseline and evaluate of the trained model on two of three sources."""
    for split in ("train", "validation", "test"):
        ids = [f"q{number}" for number in range(len(TEXTS))]
        write_records(tmp_path / f"raw/{split}.parquet", TEXTS, sources=SOURCES, q_ids=ids, rows=2)
    raw, tokens, blocks = (f"{name}={tmp_path / name}" for name in ("raw", "tokens", "blocks"))
    start = f"start={corpus}/tokens/causal/tokenizer"
    chosen = ["model=tiny-gpt2", f"sources=[{','.join(CHOSEN)}]"]
    run_stage("tokenize", "task=causal", "data=files", *chosen, start, raw, f"out={tmp_path}/tokens")
    run_stage("group_texts", "data=files", "block_size=16", "seed=0", tokens, raw, f"out={tmp_path}/blocks")
    most = "evaluate.max_documents=4"
    run_toy("baseline", "causal", tmp_path, tokens, raw, most, f"start={trained['causal']}/model")
    run_toy("evaluate", "causal", tmp_path, tokens, blocks, most, f"trained={trained['causal']}/model")
    return tmp_path


@pytest.mark.parametrize("split", ["validation", "test"])
def test_scores_of_chosen_sources_are_of_the_documents_of_their_records(evaluated: Path, split: str) -> None:
    table = pq.read_table(evaluated / f"evaluation/{split}.parquet")
    of_chosen = [number for number, source in enumerate(SOURCES) if source in CHOSEN]
    records = [of_chosen[number * len(of_chosen) // 4] for number in range(4)]
    assert table.column("record").to_pylist() == records
    assert table.column("q_id").to_pylist() == [f"q{record}" for record in records]
    assert table.column("source").to_pylist() == [SOURCES[record] for record in records]
    assert table.column("bytes").to_pylist() == [len(TEXTS[record]) for record in records]
    bits = pq.read_table(evaluated / f"evaluation/tokens/{split}.parquet")
    assert bits.column("record").to_pylist() == records
    sums = [np.sum(row) for row in bits.column("bits").to_pylist()]
    assert sums == pytest.approx(table.column("bits_after").to_pylist(), rel=1e-5)
    assert [len(row) for row in bits.column("input_ids").to_pylist()] == table.column("tokens").to_pylist()
    assert table.column("bits_before").to_pylist() == pytest.approx(table.column("bits_after").to_pylist())
