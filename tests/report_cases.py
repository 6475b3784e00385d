"""Small made-up output of `dvc exp show --json` and files of a few runs, with hostile names and texts."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from stages.figures.scores import Scores
from tools.compare_pairs import BaselineComparison, Evaluation
from tools.moved import Excerpt, Moved, MovedDocument, MovedGroup, Segment
from tools.paired import Difference
from tools.report_data import ReportRun, read_runs
from tools.report_pairs import Compared, ComparedTask

HOSTILE = "<img/src=x/onerror=alert(1)>"
SAMPLES_PAGE = (
    "# Samples\n\n> **Why** </script><script>alert(1)</script> ![p](http://example.org/p.png) [l](javascript:x)\n"
)


def make_figures(task: str, bits: float) -> dict[str, Any]:
    """Return the contents of metrics/TASK.json."""
    name = {"causal": "bpb", "mlm": "pseudo_bpb"}[task]
    return {f"metrics/{task}.json": {"data": {task: {"val": {name: bits}, "test": {name: bits + 0.1}}}}}


def make_full_figures(task: str, bits: float) -> dict[str, Any]:
    """Return the contents of reports/evaluate/TASK/metrics.json."""
    name = {"causal": "bits_per_byte", "mlm": "pseudo_bits_per_byte"}[task]
    values = {name: bits, f"{name}_se": 0.02, f"base_{name}": 3.8, "loss": bits * 2, "documents": 2600}
    return {task: {"validation": values, "test": {**values, name: bits + 0.1}}}


def make_grouped_figures(bits: float) -> dict[str, Any]:
    """The same of the causal task by source and by a group with a hostile value, and of texts only evaluated."""

    def values(**found: float) -> dict[str, Any]:
        base = {"base_bits_per_byte": 3.8, "documents": 2600}
        return {
            name: {"bits_per_byte": bits + more, **base, "bytes": 9000 - number}
            for number, (name, more) in enumerate(found.items())
        }

    groups = {"source": values(toy=0.0), "topic": values(**{"why": 0.5, HOSTILE: 0.25, "rare": 0.75})}
    metrics = make_full_figures("causal", bits)["causal"]
    kinds = {"kind": values(even=0.5, odd=1.5)}
    texts = {name: {**found, "groups": kinds} for name, found in values(wiki=1.0, validation=2.0).items()}
    return {"causal": {**{split: {**found, "groups": groups} for split, found in metrics.items()}, "texts": texts}}


def make_accuracy(correct: int, items: int) -> dict[str, Any]:
    """Figures of items as reports/score/TASK/metrics.json has them."""
    share = {"correct": correct, "share": correct / items, "low": 0.1, "high": 0.9}
    return {
        "items": items,
        "chance": 0.5,
        "ties": 0,
        "accuracy": dict.fromkeys(("sum", "per_token", "per_byte"), share),
    }


def make_scores(task: str, correct: int, digest: str) -> dict[str, Any]:
    """Return the contents of reports/score/TASK/metrics.json."""
    groups = {"field": {HOSTILE: make_accuracy(correct, 8), "word_order": make_accuracy(1, 4)}}
    return {task: {"method": "log_likelihood", "digest": digest, **make_accuracy(correct + 1, 12), "groups": groups}}


def make_row(rev: str, name: str | None, block_size: int, bits: float | None, **more: Any) -> dict[str, Any]:
    values = {"seed": 1, "block_size": block_size, "tasks": {"causal": {"model": "tiny"}}}
    values["pairs"] = {"causal": {"name": "english", "path": "pairs.jsonl"}}
    params = {"params.yaml": {"data": values}}
    metrics = {} if bits is None else {**make_figures("causal", bits), **make_figures("mlm", 3.2)}
    stamp = None if rev == "workspace" else "2025-05-01T10:00:00"
    return {"rev": rev, "name": name, "data": {"timestamp": stamp, "params": params, "metrics": metrics}, **more}


def make_experiment(state: str | None, *rows: dict[str, Any]) -> dict[str, Any]:
    return {"revs": list(rows), "executor": None if state is None else {"state": state}, "name": rows[0]["name"]}


def make_revisions() -> list[dict[str, Any]]:
    """The workspace, a commit, and experiments: done twice, failed, queued, running, and one that cannot be read."""
    failed = make_row("e" * 40, "broken", 64, 2.5, error={"msg": "Experiment run failed", "type": ""})
    unread = {"rev": "d" * 40, "name": None, "data": None, "error": {"msg": "no <such> commit", "type": "SCMError"}}
    commit = make_row("a" * 40, "main", 128, 2.5)
    commit["experiments"] = [
        make_experiment(None, make_row("b" * 40, "wide", 256, 2.25)),
        make_experiment("success", make_row("c" * 40, HOSTILE, 1024, 2.75)),
        make_experiment("failed", failed),
        make_experiment("queued", make_row("f" * 40, None, 512, 2.5)),
        make_experiment("running", make_row("workspace", "under way", 32, 2.5)),
        make_experiment(None, unread),
    ]
    return [make_row("workspace", None, 128, 2.5), commit]


def make_ledgers(task: str, block_size: int) -> dict[str, Any]:
    counts = {"train": 199, "validation": 26, "test": 25}
    raw = {
        "records_in": 260,
        "records_out": counts,
        "records_skipped": {"malformed": 0, "without_answers": 10},
        "answers_in": 564,
        "answers_dropped": 15,
        "answers_of_duplicates": 0,
    }
    files: dict[str, Any] = {"data/raw/stats.json": raw}
    for split, count in counts.items():
        tokens = {"documents": count, "tokens": 500 * count + 1, "text_tokens": 499 * count, "bytes": 1500 * count}
        blocks, dropped = divmod(tokens["tokens"], block_size)
        files[f"data/tokens/{task}/{split}/stats.json"] = tokens
        files[f"data/blocks/{task}/{split}/stats.json"] = {
            "block_size": block_size,
            "blocks": blocks,
            "dropped": dropped,
        }
    return files


def read_texts(rev: str, paths: list[str]) -> Iterator[str | None]:
    """Texts of each revision; the hostile experiment's mlm curves are in no cache."""
    size, bits = {"b": (256, 2.25), "c": (1024, 2.75)}.get(rev[0], (128, 2.5))
    files = {path: json.dumps(value) for task in ("causal", "mlm") for path, value in make_ledgers(task, size).items()}
    for task in ("causal", "mlm"):
        full = make_full_figures(task, bits if task == "causal" else 3.2)
        files[f"reports/evaluate/{task}/metrics.json"] = json.dumps(full)
        found = make_scores(task, size // 128, "other" if size == 1024 else "same")  # mlm's is left from an earlier run
        files[f"reports/score/{task}/metrics.json"] = json.dumps(found)
        files[f"reports/samples/{task}.md"] = SAMPLES_PAGE.replace("Why", "Why" if size == 128 else f"Why {size}")
        if (rev[0], task) != ("c", "mlm"):
            for split, every in (("train", 1), ("validation", 10)):
                lines = [f"{step}\t{6 - size / 1000 - step / 20}" for step in range(0, 31, every)]
                files[f"reports/train/{task}/plots/metrics/{split}/loss.tsv"] = "\n".join(["step\tloss", *lines, ""])
    yield from map(files.get, paths)


def read_grouped_texts(rev: str, paths: list[str]) -> Iterator[str | None]:
    """The same, with figures by group."""
    bits = {"b": 2.25, "c": 2.75}.get(rev[0], 2.5)
    for path, text in zip(paths, read_texts(rev, paths), strict=True):
        yield json.dumps(make_grouped_figures(bits)) if path == "reports/evaluate/causal/metrics.json" else text


def make_compared_tasks() -> list[ComparedTask]:
    """Comparisons of the causal task: one that is better, one of another seed, and one that does not compare."""

    def line(name: str, difference: Difference | None, reason: str = "", is_seed: bool = False) -> BaselineComparison:
        item = Evaluation(name, name, "1", "", pa.table({}), Scores(*[np.zeros(0)] * 3), 128, 0, False)
        return BaselineComparison([item], [item], difference, reason, is_seed)

    difference = Difference(-0.05, 0.01, 0.0, 20.0, 0, 0.75, 26, (1, 1))
    pieces = [Segment("Why ", 0.1), Segment(HOSTILE, -1.5), Segment(" </script>\u202e\x1b[31m", 3.0)]
    documents = [
        MovedDocument(3, "q7", HOSTILE, 900, -21.0, Excerpt(pieces, True, True)),
        MovedDocument(7, "", "toy", 90, 5.0, None),
    ]
    moved = Moved(documents[:1], documents[1:], [MovedGroup("topic", HOSTILE, -20.0, difference)])
    single = Difference(0.02, float("inf"), 0.0, 1.0, 0, 0.0, 1, (1, 1))
    lines = [
        Compared(line("wide", difference), "better", "", moved),
        Compared(line("other", single, is_seed=True), "not decided", "more documents", Moved([], [], [])),
        Compared(line(HOSTILE, None, "other documents"), "not comparable", "", None),
    ]
    return [ComparedTask("causal", "causal: difference from main in bits per byte", ["A note."], lines)]


def make_runs() -> list[ReportRun]:
    return read_runs(make_revisions(), read_texts)


def make_grouped_runs() -> list[ReportRun]:
    return read_runs(make_revisions(), read_grouped_texts)
