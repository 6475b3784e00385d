"""What `make compare` says of experiments in pairs: what compares with what, over which seeds, and how it is shown."""

import json
from io import BytesIO, StringIO
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from test_compare import revision

from tools.compare import draw, read_rows
from tools.compare_pairs import (
    compare_with,
    describe_verdicts,
    find_baseline,
    leave_out_stale_metrics,
    make_pairs_table,
    read_evaluation,
)
from tools.outs import Outs

RANDOM = np.random.default_rng(0)
BYTES = RANDOM.integers(100, 900, 40)
BITS = BYTES * RANDOM.normal(2.4, 0.3, 40)


class Files:
    """Stands in for Outs: the scores and the ledger of each revision."""

    def __init__(self, **scores: dict[str, Any]) -> None:
        self._scores = scores

    def read(self, rev: str, path: str) -> bytes | None:
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


def named(name: str, **changes: Any) -> dict[str, Any]:
    """A revision of which the commit is its name."""
    return revision(name, **changes) | {"rev": name}


def noisy(effect: float, seed: int) -> np.ndarray:
    """Bits of a model that needs `effect` bits per byte more, and has noise of its own."""
    return BITS + BYTES * (effect + np.random.default_rng(seed).normal(0, 0.01, len(BYTES)))


def compared(files: Files, *revisions: dict[str, Any], task: str = "causal") -> dict[str, Any]:
    """Names to the line of each comparison with the first revision."""
    rows = read_rows(revisions, "val")
    evaluations = [read_evaluation(row, task, "val", files) for row in rows]  # type: ignore[arg-type]
    lines = compare_with(evaluations[0], [item for item in evaluations if item is not None])  # type: ignore[arg-type]
    return {" ".join(line.names): line for line in lines}


def shown(lines: Any) -> str:
    console = Console(width=200, file=StringIO(), highlight=False)
    console.print(make_pairs_table(list(lines)))
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_experiments_are_judged_in_pairs() -> None:
    files = Files(
        main={"bits": noisy(0, 1)},
        good={"bits": noisy(-0.05, 2)},
        bad={"bits": noisy(0.05, 3)},
        like={"bits": noisy(0, 4)},
    )
    lines = compared(
        files, named("main"), *(named(name, block_size=size) for size, name in enumerate(("good", "bad", "like")))
    )
    text = shown(lines.values())
    verdicts = {line.split()[0]: line for line in text.splitlines() if line.split()}
    assert " better" in verdicts["good"] and " worse" in verdicts["bad"] and " not decided" in verdicts["like"]
    assert "seeds" not in text
    assert lines["good"].difference.value == pytest.approx(-0.05, abs=0.01)
    low, high = lines["good"].difference.interval
    assert f"{low:+.4f} to {high:+.4f}" in verdicts["good"]


def test_experiments_that_differ_only_in_seed_are_one_with_several_seeds() -> None:
    files = Files(
        **{f"main{seed}": {"bits": noisy(0, seed)} for seed in (1, 2, 3)},
        **{f"wide{seed}": {"bits": noisy(0.05, 10 + seed)} for seed in (1, 2)},
    )
    revisions = [named(f"main{seed}", seed=seed) for seed in (1, 2, 3)]
    lines = compared(files, *revisions, *(named(f"wide{seed}", seed=seed, block_size=256) for seed in (1, 2)))
    assert set(lines) == {"wide1 wide2", "main2", "main3"}
    assert lines["wide1 wide2"].difference.num_seeds == (2, 3)
    assert lines["wide1 wide2"].difference.error_of_seeds > 0
    assert lines["main2"].is_seed and lines["main2"].difference.error_of_seeds == 0
    assert "2 and 3" in shown(lines.values())
    assert any("not in the interval" in line for line in describe_verdicts(list(lines.values())))


def test_another_tasks_parameters_make_no_other_experiment() -> None:
    files = Files(main={"bits": noisy(0, 1)}, other={"bits": noisy(0, 2)})
    assert compared(files, named("main"), named("other", seed=2, tasks__mlm__learning_rate=1.0))["other"].is_seed
    line = compared(files, named("main"), named("other", seed=2, tasks__causal__learning_rate=1.0))["other"]
    assert not line.is_seed


@pytest.mark.parametrize(
    ("scores", "changes", "task", "reason"),
    [
        ({"bytes": BYTES + 1}, {}, "causal", "other documents"),
        ({"bytes": BYTES[1:], "bits": BITS[1:]}, {}, "causal", "other documents"),
        ({}, {"files": {"conf/task/causal.yaml": {"evaluate": {"context": 64}}}}, "causal", "evaluate.context 64, not"),
        ({"tokens": BYTES // 5}, {}, "causal", ""),
        ({"tokens": BYTES // 5, "lossy": 1}, {}, "causal", "another tokenizer, of which one is lossy"),
        ({"lossy": 1}, {}, "causal", ""),  # the same tokenizer loses the same
        ({"tokens": BYTES // 5}, {}, "mlm", "another tokenizer"),
    ],
)
def test_what_cannot_be_paired_is_named_and_not_compared(
    scores: dict[str, Any], changes: dict[str, Any], task: str, reason: str
) -> None:
    files = Files(main={"bits": BITS}, other={"bits": noisy(-1, 2), **scores})
    line = compared(files, named("main"), named("other", block_size=256, **changes), task=task)["other"]
    assert line.reason.startswith(reason) and bool(line.reason) == bool(reason)
    assert (line.difference is None) == bool(reason)
    assert ("better" in shown([line]).splitlines()[-2]) == (not reason)


def test_table_marks_what_does_not_compare_and_never_takes_it_for_the_best() -> None:
    rows = read_rows([named("main", bits=2.4), named("other", bits=0.22, data__path="x")], "val")
    console = Console(width=120, file=StringIO(), highlight=False)
    table_of = {
        name: line for line in _drawn(rows, {("other", "causal")}, console).splitlines() for name in line.split()[:1]
    }
    assert "2.4000*" in table_of["main"] and "0.2200\u2020" in table_of["other"]
    assert "3.0000*" in table_of["other"]  # of the other task


def _drawn(rows: Any, incomparable: Any, console: Console) -> str:
    from tools import compare

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "Console", lambda **_: console)
        draw(rows, console, incomparable)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_baseline_is_the_last_commit_or_the_one_that_is_named() -> None:
    commit = named("main")
    del commit["executor"]
    rows = read_rows([named("workspace", bits=1.0), commit, named("wide", bits=1.5)], "val")
    assert find_baseline(rows, None).name == "main"  # type: ignore[union-attr]
    assert find_baseline(rows, "wide").name == "wide"  # type: ignore[union-attr]
    assert find_baseline(rows, "nothing") is None


# -- stale figures -----------------------------------------------------------------------------------------------------

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


class Locked(Outs):
    def __init__(self, lock: dict[str, Any]) -> None:
        self.read_lock = lambda rev: lock  # type: ignore[assignment]
        self._list_files = lambda md5: None  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("params", "stale"),
    [
        ({"block_size": 256}, {"group_texts@mlm", "train@mlm", "evaluate@mlm"}),
        ({"block_size": 128}, {"group_texts@causal", "evaluate@causal"}),
        ({"block_size": 64}, set(LOCK)),
        ({}, set()),  # of another version of the project
    ],
)
def test_stages_of_other_parameters_are_stale_with_all_that_reads_them(params: dict[str, Any], stale: set[str]) -> None:
    assert Locked(LOCK).stale_stages("x", {"params.yaml": {"data": params}}) == stale


def test_stage_that_read_what_was_written_again_is_stale() -> None:
    lock = json.loads(json.dumps(LOCK))
    lock["group_texts@mlm"]["outs"][0]["md5"] = "b3"
    assert Locked(lock).stale_stages("x", {}) == {"train@mlm", "evaluate@mlm"}


def test_stale_figures_are_left_out() -> None:
    found = [named("main", block_size=256)]
    (row,) = leave_out_stale_metrics(read_rows(found, "val"), found, Locked(LOCK))
    assert list(row.metrics) == ["causal bpb"]
