"""Tests of paired comparisons in `make compare`: comparability, seeds, stale metrics and the printed tables."""

import json
from io import BytesIO, StringIO
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from test_compare import make_revision

from tools.compare import print_metrics_table, read_rows
from tools.compare_pairs import (
    compare_with_baseline,
    drop_stale_metrics,
    explain_verdicts,
    find_baseline,
    make_pairs_table,
    read_evaluation,
)
from tools.outs import Outs

RANDOM = np.random.default_rng(0)
BYTES = RANDOM.integers(100, 900, 40)
BITS = BYTES * RANDOM.normal(2.4, 0.3, 40)


class FakeOuts:
    """Replacement of Outs with the scores and the ledger of each revision."""

    def __init__(self, **scores: dict[str, Any]) -> None:
        self._scores = scores

    def read_out(self, rev: str, path: str) -> bytes | None:
        scores = self._scores.get(rev)
        if scores is None:
            return None
        if path.endswith(".json"):
            return json.dumps({"documents_lossy": scores.get("lossy", 0)}).encode()
        num_bytes = scores.get("bytes", BYTES)
        table = pa.table(
            {
                "record": np.arange(len(num_bytes)),
                "bytes": num_bytes,
                "tokens": scores.get("tokens", num_bytes // 4),
                "bits_after": scores["bits"],
            }
        )
        stream = BytesIO()
        pq.write_table(table, stream)
        return stream.getvalue()


def make_named_revision(name: str, **changes: Any) -> dict[str, Any]:
    """Return a revision that has its name as its commit."""
    return make_revision(name, **changes) | {"rev": name}


def make_noisy_bits(effect: float, seed: int) -> np.ndarray:
    """Return bits per document, float64 `[num_documents]`, of a noisy model that needs `effect` more bits per byte."""
    return BITS + BYTES * (effect + np.random.default_rng(seed).normal(0, 0.01, len(BYTES)))


def compare_revisions(files: FakeOuts, *revisions: dict[str, Any], task: str = "causal") -> dict[str, Any]:
    """Compare revisions with the first one; return each comparison by the names of its experiment."""
    rows = read_rows(revisions, "val")
    evaluations = [read_evaluation(row, task, "val", files) for row in rows]  # type: ignore[arg-type]
    lines = compare_with_baseline(evaluations[0], [item for item in evaluations if item is not None])  # type: ignore[arg-type]
    return {" ".join(line.names): line for line in lines}


def render_pairs_table(lines: Any) -> str:
    console = Console(width=200, file=StringIO(), highlight=False)
    console.print(make_pairs_table(list(lines)))
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_compare_pairs_judges_experiments_on_the_same_documents() -> None:
    files = FakeOuts(
        main={"bits": make_noisy_bits(0, 1)},
        good={"bits": make_noisy_bits(-0.05, 2)},
        bad={"bits": make_noisy_bits(0.05, 3)},
        like={"bits": make_noisy_bits(0, 4)},
    )
    lines = compare_revisions(
        files,
        make_named_revision("main"),
        *(make_named_revision(name, block_size=size) for size, name in enumerate(("good", "bad", "like"))),
    )
    text = render_pairs_table(lines.values())
    verdicts = {line.split()[0]: line for line in text.splitlines() if line.split()}
    assert " better" in verdicts["good"] and " worse" in verdicts["bad"] and " not decided" in verdicts["like"]
    assert "seeds" not in text
    assert lines["good"].difference.value == pytest.approx(-0.05, abs=0.01)
    low, high = lines["good"].difference.interval
    assert f"{low:+.4f} to {high:+.4f}" in verdicts["good"]


def test_compare_pairs_experiments_that_differ_only_in_seed_are_one_comparison() -> None:
    files = FakeOuts(
        **{f"main{seed}": {"bits": make_noisy_bits(0, seed)} for seed in (1, 2, 3)},
        **{f"wide{seed}": {"bits": make_noisy_bits(0.05, 10 + seed)} for seed in (1, 2)},
    )
    revisions = [make_named_revision(f"main{seed}", seed=seed) for seed in (1, 2, 3)]
    lines = compare_revisions(
        files, *revisions, *(make_named_revision(f"wide{seed}", seed=seed, block_size=256) for seed in (1, 2))
    )
    assert set(lines) == {"wide1 wide2", "main2", "main3"}
    assert lines["wide1 wide2"].difference.num_seeds == (2, 3)
    assert lines["wide1 wide2"].difference.error_of_seeds > 0
    assert lines["main2"].is_seed_only and lines["main2"].difference.error_of_seeds == 0
    assert "2 and 3" in render_pairs_table(lines.values())
    assert any("does not include variation between seeds" in line for line in explain_verdicts(list(lines.values())))


def test_compare_pairs_ignores_parameters_of_other_tasks() -> None:
    files = FakeOuts(main={"bits": make_noisy_bits(0, 1)}, other={"bits": make_noisy_bits(0, 2)})
    assert compare_revisions(
        files, make_named_revision("main"), make_named_revision("other", seed=2, tasks__mlm__learning_rate=1.0)
    )["other"].is_seed_only
    line = compare_revisions(
        files, make_named_revision("main"), make_named_revision("other", seed=2, tasks__causal__learning_rate=1.0)
    )["other"]
    assert not line.is_seed_only


@pytest.mark.parametrize(
    ("scores", "changes", "task", "reason"),
    [
        ({"bytes": BYTES + 1}, {}, "causal", "other documents"),
        ({"bytes": BYTES[1:], "bits": BITS[1:]}, {}, "causal", "other documents"),
        ({}, {"files": {"conf/task/causal.yaml": {"evaluate": {"context": 64}}}}, "causal", "evaluate.context 64, not"),
        ({"tokens": BYTES // 5}, {}, "causal", ""),
        ({"tokens": BYTES // 5, "lossy": 1}, {}, "causal", "another tokenizer, and one of the two is lossy"),
        ({"lossy": 1}, {}, "causal", ""),  # the same lossy tokenizer on both sides
        ({"tokens": BYTES // 5}, {}, "mlm", "another tokenizer"),
    ],
)
def test_compare_pairs_incomparable_experiment_gives_a_reason(
    scores: dict[str, Any], changes: dict[str, Any], task: str, reason: str
) -> None:
    files = FakeOuts(main={"bits": BITS}, other={"bits": make_noisy_bits(-1, 2), **scores})
    line = compare_revisions(
        files, make_named_revision("main"), make_named_revision("other", block_size=256, **changes), task=task
    )["other"]
    assert line.reason.startswith(reason) and bool(line.reason) == bool(reason)
    assert (line.difference is None) == bool(reason)
    assert ("better" in render_pairs_table([line]).splitlines()[-2]) == (not reason)


def test_compare_pairs_table_marks_incomparable_metrics_and_excludes_them_from_best() -> None:
    rows = read_rows(
        [make_named_revision("main", bits=2.4), make_named_revision("other", bits=0.22, data__path="x")], "val"
    )
    console = Console(width=120, file=StringIO(), highlight=False)
    table_of = {
        name: line
        for line in _render_metrics_table(rows, {("other", "causal")}, console).splitlines()
        for name in line.split()[:1]
    }
    assert "2.4000*" in table_of["main"] and "0.2200\u2020" in table_of["other"]
    assert "3.0000*" in table_of["other"]  # metric of the other task


def _render_metrics_table(rows: Any, incomparable: Any, console: Console) -> str:
    from tools import compare

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "Console", lambda **_: console)
        print_metrics_table(rows, console, incomparable)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_find_baseline_is_last_commit_or_named_row() -> None:
    commit = make_named_revision("main")
    del commit["executor"]
    rows = read_rows([make_named_revision("workspace", bits=1.0), commit, make_named_revision("wide", bits=1.5)], "val")
    assert find_baseline(rows, None).name == "main"  # type: ignore[union-attr]
    assert find_baseline(rows, "wide").name == "wide"  # type: ignore[union-attr]
    assert find_baseline(rows, "nothing") is None


# -- stale metrics -----------------------------------------------------------------------------------------------------

LOCK = {
    "group_texts@causal": {
        "params": {"params.yaml": {"block_size": 256}},
        "outs": [{"path": "data/blocks/causal", "md5": "b1"}],
    },
    "evaluate@causal": {"deps": [{"path": "data/blocks/causal", "md5": "b1"}]},
    "group_texts@mlm": {
        "params": {"params.yaml": {"block_size": 128}},
        "outs": [{"path": "data/blocks/mlm", "md5": "b2"}],
    },
    "train@mlm": {
        "deps": [{"path": "data/blocks/mlm", "md5": "b2"}],
        "outs": [{"path": "models/mlm", "md5": "m1"}],
    },
    "evaluate@mlm": {"deps": [{"path": "models/mlm", "md5": "m1"}]},
}


class LockedOuts(Outs):
    def __init__(self, lock: dict[str, Any]) -> None:
        self.read_lock = lambda rev: lock  # type: ignore[assignment]
        self._list_files = lambda md5: None  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("params", "stale"),
    [
        ({"block_size": 256}, {"group_texts@mlm", "train@mlm", "evaluate@mlm"}),
        ({"block_size": 128}, {"group_texts@causal", "evaluate@causal"}),
        ({"block_size": 64}, set(LOCK)),
        ({}, set()),  # from another version of the project
    ],
)
def test_stale_stages_include_dependents_of_stages_with_other_parameters(
    params: dict[str, Any], stale: set[str]
) -> None:
    assert LockedOuts(LOCK).find_stale_stages("x", {"params.yaml": {"data": params}}) == stale


def test_stale_stages_include_stages_that_read_an_older_output() -> None:
    lock = json.loads(json.dumps(LOCK))
    lock["group_texts@mlm"]["outs"][0]["md5"] = "b3"
    assert LockedOuts(lock).find_stale_stages("x", {}) == {"train@mlm", "evaluate@mlm"}


def test_drop_stale_metrics_removes_metrics_of_stale_tasks() -> None:
    found = [make_named_revision("main", block_size=256)]
    (row,) = drop_stale_metrics(read_rows(found, "val"), found, LockedOuts(LOCK))
    assert list(row.metrics) == ["causal bpb"]
