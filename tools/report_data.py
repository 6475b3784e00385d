"""Data of the report, read from DVC: params, metrics, curves, samples and ledgers of each revision."""

import contextlib
import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from stages.core.config import flatten_values as flatten
from stages.figures.names import SHORT_NAMES, SHORT_SPLITS, TOKENS_DIRECTORY, expand_metric_names
from tools.compare import flatten_params, get_revision_name, list_revisions

SPLITS = ("train", "validation", "test")


class ReportRun(NamedTuple):
    """Revision shown in the report: the workspace, a commit or an experiment."""

    name: str
    kind: str
    """workspace, commit or experiment; live for a training that has not written its outs yet."""
    state: str
    """Reason for missing results, for example "queued" or DVC's error message; empty if there are results."""
    created: str
    """Commit time in ISO 8601, to the minute; empty for the workspace."""
    params: dict[str, str]
    """Values as JSON, by the names that `-S` uses."""
    metrics: dict[str, float]
    """Values by dotted name, for example causal.validation.bits_per_byte."""
    groups: dict[str, dict[str, Any]]
    """Full metrics.json of evaluate, including the metrics by group, for each task with a readable file."""
    files: dict[str, str]
    """Text of each small out that could be read, by path."""
    missing: list[str]
    """Outs that could not be read, because no cache has them."""


def read_runs(
    exp_show: list[dict[str, Any]], read_texts: Callable[[str, list[str]], Iterator[str | None]]
) -> list[ReportRun]:
    """Read one run per row of `dvc exp show --json`.

    `read_texts(rev, paths)` returns the text of each path at a revision, None if it cannot be read.
    """
    runs = []
    for row in list_revisions(exp_show):
        data = row.get("data") or {}
        # A queued or failed experiment has the metrics of the commit it is based on, which are not its own.
        files = {} if describe_failure(row) else data.get("metrics") or {}
        params = dict(flatten_params(data.get("params") or {}))
        paths = list(dict.fromkeys([*list_small_outs(files), *list_score_files(files, params)]))
        texts = dict(zip(paths, read_texts(row["rev"], paths), strict=True)) if paths else {}
        groups = dict(read_all_metrics(files, texts))
        figures = dict(list_metrics(files, groups))
        runs.append(
            ReportRun(
                name=get_revision_name(row),
                kind=classify_row(row),
                state=describe_failure(row) or ("" if figures else "no metrics"),
                created=(data.get("timestamp") or "")[:16],
                params=params,
                metrics=figures,
                groups=groups,
                files={path: text for path, text in texts.items() if text is not None},
                missing=sorted({get_out_path(path) for path, text in texts.items() if text is None}),
            )
        )
    return runs


def classify_row(row: dict[str, Any]) -> str:
    if "executor" in row:  # an experiment that runs in the workspace has the revision "workspace"
        return "experiment"
    return "workspace" if row["rev"] == "workspace" else "commit"


def read_all_metrics(files: dict[str, Any], texts: dict[str, str | None]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield tasks with their full metrics, if metrics.json in `texts` agrees with the metrics files."""
    for task, splits in list_task_metrics(files):
        text = texts.get(get_metrics_path(task))
        found = json.loads(text).get(task, {}) if text is not None else {}
        # After `git checkout` without `dvc checkout`, metrics.json in the workspace belongs to another commit.
        if found and list_headline_metrics(task, splits).items() <= dict(flatten_metrics(task, found)).items():
            yield task, found


def list_metrics(files: dict[str, Any], found: dict[str, dict[str, Any]]) -> Iterator[tuple[str, float]]:
    """Yield metrics by dotted name: the full metrics in `found`, otherwise those of the metrics files."""
    for task, splits in list_task_metrics(files):
        yield from (
            dict(flatten_metrics(task, found[task])) if task in found else list_headline_metrics(task, splits)
        ).items()


def list_headline_metrics(task: str, splits: dict[str, Any]) -> dict[str, float]:
    """Return the headline metrics of a task in a metrics file by full dotted name."""
    return dict(flatten_metrics(task, expand_metric_names(splits) if has_headlines_only(splits) else splits))


def list_task_metrics(files: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each task with its section in the metrics files, skipping files that could not be read."""
    for file in files.values():
        for task, splits in (file.get("data") or {}).items():
            if isinstance(splits, dict):
                yield task, splits


def has_headlines_only(splits: dict[str, Any]) -> bool:
    """Return True for headline metrics; metrics files of earlier versions of the project have all metrics."""
    return SHORT_SPLITS["validation"] in splits


def flatten_metrics(task: str, splits: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the numbers of each split, except metrics by group and those of sources that are only evaluated."""
    for split, figures in splits.items():
        if split != "texts":
            for name, value in flatten(figures if isinstance(figures, dict) else {}):
                if isinstance(value, int | float) and not isinstance(value, bool) and not name.startswith("groups."):
                    yield f"{task}.{split}.{name}", value


def describe_failure(row: dict[str, Any]) -> str:
    """Return the reason why a row has no results of its own; empty if it should have results."""
    if row.get("error"):
        return f"failed: {row['error']['msg']}"
    state = (row.get("executor") or {}).get("state", "success")
    return "" if state == "success" else str(state)


def list_tasks(metrics: list[dict[str, float]]) -> list[str]:
    """List the tasks for which any row has metrics."""
    return list(dict.fromkeys(name.split(".")[0] for figures in metrics for name in figures))


def list_small_outs(files: dict[str, Any]) -> Iterator[str]:
    """Yield the files that the report reads for the tasks in the metrics files."""
    for task, splits in list_task_metrics(files):
        yield from list_ledger_files(task)
        yield from (get_curve_path(task, split) for split in SPLITS[:2])
        yield get_samples_path(task)
        if has_headlines_only(splits):
            yield get_metrics_path(task)


def list_score_files(files: dict[str, Any], params: dict[str, str]) -> Iterator[str]:
    """Yield the accuracy files of tasks with pairs in `params`; other tasks may have stale files in the workspace."""
    yield from (get_accuracy_path(task) for task, _ in list_task_metrics(files) if f"pairs.{task}.path" in params)


def list_ledger_files(task: str) -> list[str]:
    kinds = (f"data/{kind}/{task}" for kind in ("tokens", "blocks"))
    return ["data/raw/stats.json", *(f"{kind}/{split}/stats.json" for kind in kinds for split in SPLITS)]


def get_ledger_path(task: str, split: str) -> str:
    return f"data/tokens/{task}/{split}/stats.json"


def get_scores_path(task: str, split: str) -> str:
    return f"reports/evaluate/{task}/{split}.parquet"


def get_token_bits_path(task: str, split: str) -> str:
    return f"reports/evaluate/{task}/{TOKENS_DIRECTORY}/{split}.parquet"


def get_tokenizer_path(task: str) -> str:
    return f"data/tokens/{task}/tokenizer/tokenizer.json"


def get_curve_path(task: str, split: str) -> str:
    return f"reports/train/{task}/plots/metrics/{split}/loss.tsv"


def read_live_runs(reports: Path, is_running: Callable[[Path], bool]) -> dict[str, ReportRun]:
    """Read the live curves below `reports` of trainings that are running or were interrupted, by task."""
    found = {}
    for directory in sorted(reports.glob(".live-*")):
        task, files = directory.name.removeprefix(".live-"), {}
        for split in SPLITS[:2]:
            with contextlib.suppress(OSError, ValueError):
                text = (directory / f"{split}.tsv").read_text(encoding="utf-8")
                files[get_curve_path(task, split)] = text[: text.rfind("\n") + 1]  # the last line may be incomplete
        if files:
            state = "running" if is_running(directory) else "interrupted"
            found[task] = ReportRun(f"{task} ({state})", "live", state, "", {}, {}, {}, files, [])
    return found


def find_headline_metric(figures: Mapping[str, Any]) -> str:
    """Return the full name of a task's bits per byte among the metrics of a split."""
    return next(name for name in SHORT_NAMES if name in figures)


def get_metrics_path(task: str) -> str:
    return f"reports/evaluate/{task}/metrics.json"


def get_samples_path(task: str) -> str:
    return f"reports/samples/{task}.md"


def get_accuracy_path(task: str) -> str:
    return f"reports/score/{task}/metrics.json"


def get_out_path(path: str) -> str:
    """Return the out of dvc.yaml that contains `path`."""
    return path if path.endswith(".md") else "/".join(path.split("/")[: 2 if path.startswith("data/raw/") else 3])


def parse_curve(text: str) -> list[tuple[int, float]]:
    """Parse the (step, loss) pairs of a TSV file written by dvclive."""
    return [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(io.StringIO(text), delimiter="\t")]


def group_identical_runs(runs: list[ReportRun], paths: list[str]) -> list[tuple[list[ReportRun], list[str | None]]]:
    """Group runs with identical files and return each group with the files' texts, None for a missing file.

    Runs without any of the files are left out. Identical files are common: an experiment that changes one task keeps
    the files of the other, and the workspace is often the same as the last experiment.
    """
    groups: dict[tuple[str | None, ...], list[ReportRun]] = {}
    for run in runs:
        texts = tuple(run.files.get(path) for path in paths)
        if any(text is not None for text in texts):
            groups.setdefault(texts, []).append(run)
    return [(members, list(texts)) for texts, members in groups.items()]


class FlowStep(NamedTuple):
    """Output of a stage in the data flow."""

    unit: str
    counts: tuple[tuple[str, int], ...]
    """(split, count) pairs."""
    notes: tuple[str, ...]
    """Notes on items that were dropped or added in this step."""

    @property
    def total(self) -> int:
        return sum(count for _, count in self.counts)


Ledgers = dict[str, dict[str, Any]]  # by split


def build_flow(task: str, runs: list[ReportRun]) -> list[list[tuple[list[ReportRun], FlowStep]]]:
    """Return the steps records, documents, tokens and blocks, each variant with its runs; empty without ledgers."""
    columns: list[dict[FlowStep, list[ReportRun]]] = [{}, {}, {}, {}]
    for run in runs:
        if task not in list_tasks([run.metrics]):  # its records belong to another task
            continue
        for column, step in zip(columns, build_steps(task, run.files), strict=True):
            if step is not None:
                column.setdefault(step, []).append(run)
    return [[(members, step) for step, members in column.items()] for column in columns if column]


def build_steps(task: str, files: dict[str, str]) -> tuple[FlowStep | None, ...]:
    """Return the four steps of a run; None for a step whose ledgers are missing."""

    def read_ledgers(kind: str) -> Ledgers | None:
        texts = {split: files.get(f"data/{kind}/{task}/{split}/stats.json") for split in SPLITS}
        return {split: json.loads(text) for split, text in texts.items() if text} if all(texts.values()) else None

    raw, tokens, blocks = files.get("data/raw/stats.json"), read_ledgers("tokens"), read_ledgers("blocks")
    return (
        build_record_step(json.loads(raw)) if raw else None,
        build_document_step(tokens, json.loads(raw) if raw else None) if tokens else None,
        build_token_step(tokens) if tokens else None,
        build_block_step(blocks) if blocks else None,
    )


def build_record_step(raw: dict[str, Any]) -> FlowStep:
    skipped = {name.replace("_", " "): count for name, count in raw["records_skipped"].items() if count}
    reasons = f" ({', '.join(f'{name}: {count:,}' for name, count in skipped.items())})" if skipped else ""
    num_lost = raw["answers_dropped"] + raw["answers_of_duplicates"]
    notes = (
        f"{raw['records_in']:,} read, {sum(skipped.values()):,} dropped{reasons}",
        f"{raw['answers_in']:,} answers in them, {num_lost:,} dropped (empty, deleted or a duplicate's)",
    )
    return FlowStep("records", tuple(raw["records_out"].items()), notes)


def build_document_step(tokens: Ledgers, raw: dict[str, Any] | None) -> FlowStep:
    fewer = raw is not None and count_total(tokens, "documents") < sum(raw["records_out"].values())
    note = (
        f"one of each record{' of the chosen sources' if fewer else ''}, {count_total(tokens, 'bytes'):,} bytes of text"
    )
    return FlowStep("documents", count_by_split(tokens, "documents"), (note,))


def build_token_step(tokens: Ledgers) -> FlowStep:
    special = count_total(tokens, "tokens") - count_total(tokens, "text_tokens")
    notes = (
        "none dropped: no document is cut short",
        f"{special:,} of them special: they mark where documents begin and end",
    )
    return FlowStep("tokens", count_by_split(tokens, "tokens"), notes)


def build_block_step(blocks: Ledgers) -> FlowStep:
    note = f"{count_total(blocks, 'dropped'):,} tokens dropped: less than a block was left at each split's end"
    return FlowStep(f"blocks of {blocks['train']['block_size']:,} tokens", count_by_split(blocks, "blocks"), (note,))


def count_by_split(ledgers: Ledgers, key: str) -> tuple[tuple[str, int], ...]:
    return tuple((split, ledger[key]) for split, ledger in ledgers.items())


def count_total(ledgers: Ledgers, key: str) -> int:
    return sum(count for _, count in count_by_split(ledgers, key))
