"""What the report shows, read from DVC: each revision's params, metrics, curves, samples and ledgers."""

import contextlib
import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from stages.core.config import flat as flatten
from stages.figures.names import SHORT_SPLITS, TOKENS, full_names
from tools.compare import flat, name_of, revisions

SPLITS = ("train", "validation", "test")


class Run(NamedTuple):
    """A revision: the workspace, a commit or an experiment."""

    name: str
    kind: str
    """workspace, commit, experiment, or live of a training whose curves are not in its out yet."""
    state: str
    """Why there are no results: "queued", say, or DVC's words on what failed; empty where there are."""
    created: str
    """When it was committed, in ISO 8601 to the minute; empty for the workspace."""
    params: dict[str, str]
    """Each under the name that `-S` knows it by, its value as JSON."""
    metrics: dict[str, float]
    """Such as causal.validation.bits_per_byte."""
    groups: dict[str, dict[str, Any]]
    """Task to all that evaluate wrote of it into metrics.json, by group as well, where that could be read."""
    files: dict[str, str]
    """Path to text of the small outs that could be read."""
    missing: list[str]
    """The outs that could not: in no cache."""


def read_runs(shown: list[dict[str, Any]], read: Callable[[str, list[str]], Iterator[str | None]]) -> list[Run]:
    """A run for each row of `dvc exp show --json`.

    `read(rev, paths)` gives the text of each path at a revision, None where there is none.
    """
    runs = []
    for row in revisions(shown):
        data = row.get("data") or {}
        # What is queued or failed holds the figures of the commit it starts from: they are not its own.
        files = {} if failure(row) else data.get("metrics") or {}
        params = dict(flat(data.get("params") or {}))
        paths = list(dict.fromkeys([*small_outs(files), *score_files(files, params)]))
        texts = dict(zip(paths, read(row["rev"], paths), strict=True)) if paths else {}
        groups = dict(all_metrics(files, texts))
        figures = dict(numbers(files, groups))
        runs.append(
            Run(
                name=name_of(row),
                kind=kind(row),
                state=failure(row) or ("" if figures else "no metrics"),
                created=(data.get("timestamp") or "")[:16],
                params=params,
                metrics=figures,
                groups=groups,
                files={path: text for path, text in texts.items() if text is not None},
                missing=sorted({out_of(path) for path, text in texts.items() if text is None}),
            )
        )
    return runs


def kind(row: dict[str, Any]) -> str:
    if "executor" in row:  # one that runs in the workspace has its revision
        return "experiment"
    return "workspace" if row["rev"] == "workspace" else "commit"


def all_metrics(files: dict[str, Any], texts: dict[str, str | None]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each task, and all of its metrics, of those whose metrics.json in `texts` fits what the metrics files have."""
    for task, splits in metrics_of(files):
        text = texts.get(metrics_file(task))
        found = json.loads(text).get(task, {}) if text is not None else {}
        # In a workspace after `git checkout` without `dvc checkout`, they are those of another commit.
        if found and headlines(task, splits).items() <= dict(leaves(task, found)).items():
            yield task, found


def numbers(files: dict[str, Any], found: dict[str, dict[str, Any]]) -> Iterator[tuple[str, float]]:
    """Each metric of a split under its dotted name: all that were `found`, else those of the metrics files."""
    for task, splits in metrics_of(files):
        yield from (dict(leaves(task, found[task])) if task in found else headlines(task, splits)).items()


def headlines(task: str, splits: dict[str, Any]) -> dict[str, float]:
    """The headline metrics of a task in a metrics file, each under its full dotted name."""
    return dict(leaves(task, full_names(splits) if is_short(splits) else splits))


def metrics_of(files: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each task and what the metrics files have of it; a file that could not be read has none."""
    for file in files.values():
        for task, splits in (file.get("data") or {}).items():
            if isinstance(splits, dict):
                yield task, splits


def is_short(splits: dict[str, Any]) -> bool:
    """Whether a metrics file holds the headline metrics; in an earlier version of the project it holds all metrics."""
    return SHORT_SPLITS["validation"] in splits


def leaves(task: str, splits: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of each split, without those by group and those of sources that are only evaluated."""
    for split, figures in splits.items():
        if split != "texts":
            for name, value in flatten(figures if isinstance(figures, dict) else {}):
                if isinstance(value, int | float) and not isinstance(value, bool) and not name.startswith("groups."):
                    yield f"{task}.{split}.{name}", value


def failure(row: dict[str, Any]) -> str:
    """Why a row has no results of its own; empty where it should have."""
    if row.get("error"):
        return f"failed: {row['error']['msg']}"
    state = (row.get("executor") or {}).get("state", "success")
    return "" if state == "success" else str(state)


def tasks(metrics: list[dict[str, float]]) -> list[str]:
    """The tasks that any row has figures of."""
    return list(dict.fromkeys(name.split(".")[0] for figures in metrics for name in figures))


def small_outs(files: dict[str, Any]) -> Iterator[str]:
    """The files that the report reads of the tasks in metrics files."""
    for task, splits in metrics_of(files):
        yield from ledger_files(task)
        yield from (curve_file(task, split) for split in SPLITS[:2])
        yield samples_file(task)
        if is_short(splits):
            yield metrics_file(task)


def score_files(files: dict[str, Any], params: dict[str, str]) -> Iterator[str]:
    """The accuracies of the tasks in metrics files that `params` has pairs for; others may be left in the workspace."""
    yield from (score_file(task) for task, _ in metrics_of(files) if f"pairs.{task}.path" in params)


def ledger_files(task: str) -> list[str]:
    kinds = (f"data/{kind}/{task}" for kind in ("tokens", "blocks"))
    return ["data/raw/stats.json", *(f"{kind}/{split}/stats.json" for kind in kinds for split in SPLITS)]


def split_ledger(task: str, split: str) -> str:
    return f"data/tokens/{task}/{split}/stats.json"


def scores_file(task: str, split: str) -> str:
    return f"reports/evaluate/{task}/{split}.parquet"


def token_bits_file(task: str, split: str) -> str:
    return f"reports/evaluate/{task}/{TOKENS}/{split}.parquet"


def tokenizer_file(task: str) -> str:
    return f"data/tokens/{task}/tokenizer/tokenizer.json"


def curve_file(task: str, split: str) -> str:
    return f"reports/train/{task}/plots/metrics/{split}/loss.tsv"


def live_runs(reports: Path, is_running: Callable[[Path], bool]) -> dict[str, Run]:
    """Task to a run with the live curves of its training below `reports`, which runs or was interrupted."""
    found = {}
    for directory in sorted(reports.glob(".live-*")):
        task, files = directory.name.removeprefix(".live-"), {}
        for split in SPLITS[:2]:
            with contextlib.suppress(OSError, ValueError):
                text = (directory / f"{split}.tsv").read_text(encoding="utf-8")
                files[curve_file(task, split)] = text[: text.rfind("\n") + 1]  # the last line may be half written
        if files:
            state = "running" if is_running(directory) else "interrupted"
            found[task] = Run(f"{task} ({state})", "live", state, "", {}, {}, {}, files, [])
    return found


def metrics_file(task: str) -> str:
    return f"reports/evaluate/{task}/metrics.json"


def samples_file(task: str) -> str:
    return f"reports/samples/{task}.md"


def score_file(task: str) -> str:
    return f"reports/score/{task}/metrics.json"


def out_of(path: str) -> str:
    """The out of dvc.yaml that holds `path`."""
    return path if path.endswith(".md") else "/".join(path.split("/")[: 2 if path.startswith("data/raw/") else 3])


def curve(text: str) -> list[tuple[int, float]]:
    """(step, loss) pairs of a file that dvclive wrote."""
    return [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(io.StringIO(text), delimiter="\t")]


def alike(runs: list[Run], paths: list[str]) -> list[tuple[list[Run], list[str | None]]]:
    """Runs whose files are the same, and the files' texts, None for one that is missing; none for runs without any.

    An experiment that changes one task leaves the other's as they were, and the workspace is often the last experiment.
    """
    groups: dict[tuple[str | None, ...], list[Run]] = {}
    for run in runs:
        texts = tuple(run.files.get(path) for path in paths)
        if any(text is not None for text in texts):
            groups.setdefault(texts, []).append(run)
    return [(members, list(texts)) for texts, members in groups.items()]


class Step(NamedTuple):
    """What a stage handed on."""

    unit: str
    counts: tuple[tuple[str, int], ...]
    """By split."""
    notes: tuple[str, ...]
    """What was dropped or added on the way here."""

    @property
    def total(self) -> int:
        return sum(count for _, count in self.counts)


Ledgers = dict[str, dict[str, Any]]  # by split


def flow(task: str, runs: list[Run]) -> list[list[tuple[list[Run], Step]]]:
    """Records, documents, tokens and blocks: what each came to, and in which runs. Empty where there are no ledgers."""
    columns: list[dict[Step, list[Run]]] = [{}, {}, {}, {}]
    for run in runs:
        if task not in tasks([run.metrics]):  # its records are another task's
            continue
        for column, step in zip(columns, steps(task, run.files), strict=True):
            if step is not None:
                column.setdefault(step, []).append(run)
    return [[(members, step) for step, members in column.items()] for column in columns if column]


def steps(task: str, files: dict[str, str]) -> tuple[Step | None, ...]:
    """The four of a run; None for one whose ledgers are missing."""

    def ledgers(kind: str) -> Ledgers | None:
        texts = {split: files.get(f"data/{kind}/{task}/{split}/stats.json") for split in SPLITS}
        return {split: json.loads(text) for split, text in texts.items() if text} if all(texts.values()) else None

    raw, tokens, blocks = files.get("data/raw/stats.json"), ledgers("tokens"), ledgers("blocks")
    return (
        record_step(json.loads(raw)) if raw else None,
        document_step(tokens, json.loads(raw) if raw else None) if tokens else None,
        token_step(tokens) if tokens else None,
        block_step(blocks) if blocks else None,
    )


def record_step(raw: dict[str, Any]) -> Step:
    skipped = {name.replace("_", " "): count for name, count in raw["records_skipped"].items() if count}
    why = f" ({', '.join(f'{name}: {count:,}' for name, count in skipped.items())})" if skipped else ""
    lost = raw["answers_dropped"] + raw["answers_of_duplicates"]
    notes = (
        f"{raw['records_in']:,} read, {sum(skipped.values()):,} dropped{why}",
        f"{raw['answers_in']:,} answers in them, {lost:,} dropped (empty, deleted or a duplicate's)",
    )
    return Step("records", tuple(raw["records_out"].items()), notes)


def document_step(tokens: Ledgers, raw: dict[str, Any] | None) -> Step:
    fewer = raw is not None and total(tokens, "documents") < sum(raw["records_out"].values())
    note = f"one of each record{' of the chosen sources' if fewer else ''}, {total(tokens, 'bytes'):,} bytes of text"
    return Step("documents", by_split(tokens, "documents"), (note,))


def token_step(tokens: Ledgers) -> Step:
    special = total(tokens, "tokens") - total(tokens, "text_tokens")
    notes = (
        "none dropped: no document is cut short",
        f"{special:,} of them special: they say where documents begin and end",
    )
    return Step("tokens", by_split(tokens, "tokens"), notes)


def block_step(blocks: Ledgers) -> Step:
    note = f"{total(blocks, 'dropped'):,} tokens dropped: less than a block was left at each split's end"
    return Step(f"blocks of {blocks['train']['block_size']:,} tokens", by_split(blocks, "blocks"), (note,))


def by_split(ledgers: Ledgers, key: str) -> tuple[tuple[str, int], ...]:
    return tuple((split, ledger[key]) for split, ledger in ledgers.items())


def total(ledgers: Ledgers, key: str) -> int:
    return sum(count for _, count in by_split(ledgers, key))
