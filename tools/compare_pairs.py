"""Judge which experiments are better from their differences on the same documents, for `make compare`."""

import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from dvc.repo import Repo
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from stages.core.errors import StageError, printable
from stages.figures.scores import Scores, get_scores
from tools.compare import ExperimentRow, get_full_split, measure_width, print_metrics_table
from tools.outs import Outs
from tools.paired import Difference, compare_models, correct_p_values, describe_needed_data, judge_difference
from tools.report_data import get_ledger_path, get_scores_path

SEED_ONLY_MARK = " ="


class Evaluation(NamedTuple):
    """Scores of one model (a task of a revision) on the documents of a split."""

    name: str
    """Name of the revision."""
    rev: str
    seed: str
    seedless_params: str
    """All parameters of the task except the seed, as JSON."""
    table: pa.Table
    """Scores table that evaluate wrote, one row per document."""
    scores: Scores
    context: Any
    """Value of evaluate.context as JSON; None if unknown."""
    num_lossy: int
    """Documents that the tokenizer does not decode to the original text."""
    is_masked: bool


class BaselineComparison(NamedTuple):
    """Comparison of an experiment with the baseline, each trained with one or more seeds."""

    evaluations: list[Evaluation]
    """Evaluations of the experiment, one per seed."""
    baselines: list[Evaluation]
    """Evaluations of the baseline, one per seed."""
    difference: Difference | None
    """None if the two are not comparable."""
    reason: str
    """Reason why the two are not comparable; the empty string if they are."""
    is_seed_only: bool
    """True if the experiment differs from the baseline only in the seed."""

    @property
    def names(self) -> list[str]:
        return [evaluation.name for evaluation in self.evaluations]


def read_evaluation(row: ExperimentRow, task: str, split: str, outs: Outs) -> Evaluation | None:
    """Read the scores of a task of a revision; None if they are not in the cache or were never written."""
    full = get_full_split(split)
    content, ledger = (
        outs.read_out(row.rev, path) for path in (get_scores_path(task, full), get_ledger_path(task, full))
    )
    if content is None or ledger is None:
        return None
    table = pq.read_table(BytesIO(content))
    other_tasks = set(map(get_column_task, row.metrics)) - {task}
    params = {
        heading: param.value
        for heading, param in row.params.items()
        if heading.replace(":", ".").partition(".")[0] not in other_tasks
    }
    seed = params.pop("seed", "")
    return Evaluation(
        name=row.name,
        rev=row.rev,
        seed=seed,
        seedless_params=json.dumps(params, sort_keys=True),
        table=table,
        scores=get_scores(table, "bits_after"),
        context=params.get(f"{task}: evaluate.context"),
        num_lossy=int(json.loads(ledger).get("documents_lossy", 0)),
        is_masked=any(name == f"{task} pseudo_bpb" for name in row.metrics),
    )


def find_obstacle(ours: Evaluation, other: Evaluation) -> str:
    """Return the reason why two evaluations are not comparable; the empty string if they are."""
    columns = (evaluation.table.select(["record", "bytes"]) for evaluation in (ours, other))
    if not next(columns).equals(next(columns)):
        return "other documents"
    if ours.context != other.context:
        return f"evaluate.context {ours.context}, not {other.context}"
    # num_tokens: [num_documents]. Other counts on the same documents mean another tokenizer.
    if not np.array_equal(ours.scores.num_tokens, other.scores.num_tokens):
        if ours.is_masked:
            return "another tokenizer"
        if ours.num_lossy or other.num_lossy:
            return "another tokenizer, and one of the two is lossy"
    return ""


def compare_with_baseline(baseline: Evaluation, evaluations: list[Evaluation]) -> list[BaselineComparison]:
    """Compare evaluations with the baseline.

    Evaluations that differ only in the seed form one comparison. Other seeds of the baseline are each compared with it.
    """
    families: dict[str, dict[str, Evaluation]] = defaultdict(dict)
    families[baseline.seedless_params][baseline.seed] = baseline
    incomparable = []
    for evaluation in evaluations:
        if reason := find_obstacle(evaluation, baseline):
            incomparable.append(BaselineComparison([evaluation], [baseline], None, reason, False))
        else:
            families[evaluation.seedless_params].setdefault(evaluation.seed, evaluation)
    baseline_family = families.pop(baseline.seedless_params)
    comparable = [_compare_seeds(family, baseline_family, is_seed_only=False) for family in families.values()]
    other_seeds = [
        _compare_seeds({seed: evaluation}, {baseline.seed: baseline}, is_seed_only=True)
        for seed, evaluation in baseline_family.items()
        if evaluation is not baseline
    ]
    return [*comparable, *other_seeds, *incomparable]


def _compare_seeds(
    ours: Mapping[str, Evaluation], others: Mapping[str, Evaluation], is_seed_only: bool
) -> BaselineComparison:
    num_bytes = next(iter(ours.values())).scores.num_bytes
    difference = compare_models(_get_bits_by_seed(ours), _get_bits_by_seed(others), num_bytes)
    return BaselineComparison(list(ours.values()), list(others.values()), difference, "", is_seed_only)


def _get_bits_by_seed(model: Mapping[str, Evaluation]) -> dict[str, npt.NDArray[np.float64]]:
    return {seed: evaluation.scores.bits for seed, evaluation in model.items()}


def judge_comparisons(comparisons: Sequence[BaselineComparison]) -> list[tuple[str, str]]:
    """Judge comparisons, with p-values corrected for their number.

    Returns:
        Per comparison: the verdict; and a description of the data that would decide it, empty unless it is undecided.
    """
    tested = [
        comparison.difference
        for comparison in comparisons
        if comparison.difference is not None and not comparison.difference.is_zero
    ]
    corrected = iter(correct_p_values([difference.p_value for difference in tested]))
    verdicts = []
    for comparison in comparisons:
        difference = comparison.difference
        if difference is None:
            verdicts.append(("not comparable", ""))
            continue
        verdict = judge_difference(difference, 1.0 if difference.is_zero else next(corrected))
        undecided = verdict == "not decided"
        verdicts.append((verdict, describe_needed_data(difference, len(tested)) if undecided else ""))
    return verdicts


def make_pairs_table(comparisons: Sequence[BaselineComparison]) -> Table:
    """Return a table with one row per comparison."""
    with_seeds = any(
        comparison.difference is not None and comparison.difference.num_seeds != (1, 1) for comparison in comparisons
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("experiment", no_wrap=True)
    for heading in ("difference", "95 % interval", "documents\nbetter", *(["seeds"] if with_seeds else [])):
        table.add_column(heading, no_wrap=True, justify="right")
    for heading in ("verdict", "to decide: more"):
        table.add_column(heading, no_wrap=True)
    for comparison, (verdict, to_decide) in zip(comparisons, judge_comparisons(comparisons), strict=True):
        name, difference = (
            Text("\n".join(comparison.names) + (SEED_ONLY_MARK if comparison.is_seed_only else "")),
            comparison.difference,
        )
        if difference is None:
            table.add_row(name, *["-"] * (4 if with_seeds else 3), Text(printable(comparison.reason)), "")
            continue
        table.add_row(
            name,
            f"{difference.value:+.4f}",
            " to ".join(f"{bound:+.4f}" for bound in difference.interval),
            f"{difference.share_better:.0%}",
            *([" and ".join(map(str, difference.num_seeds))] if with_seeds else []),
            verdict,
            to_decide,
        )
    return table


def format_table_title(task: str, comparisons: list[BaselineComparison], baseline: str, split: str) -> str:
    """Return the title of a task's table of comparisons."""
    documents = [comparison.difference.num_documents for comparison in comparisons if comparison.difference is not None]
    on = f", on the same {documents[0]:,} documents ({split})" if documents else ""
    return f"{task}: difference from {printable(baseline)} in bits per byte{on}"


def explain_verdicts(comparisons: list[BaselineComparison]) -> Iterator[str]:
    """Yield notes on how to read the verdicts."""
    differences = [comparison.difference for comparison in comparisons if comparison.difference is not None]
    if len(differences) > 1:
        yield "Verdicts are corrected for all comparisons of a table (Holm); each interval is for its row only."
    if any(comparison.is_seed_only for comparison in comparisons):
        yield f"{SEED_ONLY_MARK.strip()}: only the seed differs"
    if any(difference.num_seeds == (1, 1) for difference in differences):
        yield "With one seed each, the interval does not include variation between seeds (dvc exp run -S seed=43)."


def find_baseline(rows: list[ExperimentRow], against: str | None) -> ExperimentRow | None:
    """Return the row named `against`, or by default that of the last commit (without a commit: the first row)."""
    if against is not None:
        return next((row for row in rows if row.name == against or row.rev.startswith(against)), None)
    return next((row for row in rows if row.is_commit), rows[0])


def drop_stale_metrics(rows: list[ExperimentRow], found: list[dict[str, Any]], outs: Outs) -> list[ExperimentRow]:
    """Remove metrics that were computed with other parameters than the row's, and rows that then have none.

    An experiment that ran only one task has the other tasks' metrics from an earlier run.
    """
    params = {revision["rev"]: (revision.get("data") or {}).get("params") or {} for revision in found}
    updated = []
    for row in rows:
        stale = outs.find_stale_stages(row.rev, params[row.rev])
        updated.append(
            row._replace(
                metrics={
                    name: value
                    for name, value in row.metrics.items()
                    if f"evaluate@{get_column_task(name)}" not in stale
                }
            )
        )
    return [row for row in updated if row.metrics]


def list_stale_metrics(before: list[ExperimentRow], after: list[ExperimentRow]) -> Iterator[tuple[ExperimentRow, str]]:
    """Yield each row and task with metrics in `before` but not in `after`."""
    remaining = {(row.rev, row.name): set(map(get_column_task, row.metrics)) for row in after}
    for row in before:
        for task in dict.fromkeys(map(get_column_task, row.metrics)):
            if task not in remaining.get((row.rev, row.name), ()):
                yield row, task


def get_column_task(column: str) -> str:
    """Return the task of a metric's column heading."""
    return column.partition(" ")[0]


class ComparisonResult(NamedTuple):
    """Comparisons of all experiments with a baseline."""

    rows: list[ExperimentRow]
    """Rows with metrics that match their parameters."""
    baseline_name: str
    comparisons: dict[str, list[BaselineComparison]]
    """Task to its comparisons."""
    unread: list[str]
    """Experiments, as `NAME (TASK)`, without document scores in the cache."""


def compare_rows(
    rows: list[ExperimentRow], found: list[dict[str, Any]], split: str, against: str | None, outs: Outs
) -> ComparisonResult:
    """Compare the experiments of `rows` with the baseline, separately for each task.

    Raises:
        StageError: if no row has metrics that match its parameters, or if `against` is not among the rows.
    """
    rows = drop_stale_metrics(rows, found, outs)
    if not rows:
        raise StageError("all metrics were computed with other parameters than the current ones: run `dvc repro`")
    baseline = find_baseline(rows, against)
    if baseline is None:
        names = printable(", ".join(row.name for row in rows), 2000)
        raise StageError(f"--against {printable(against)}: no such experiment or commit is shown; there are {names}")
    comparisons: dict[str, list[BaselineComparison]] = {}
    unread: list[str] = []
    for task in dict.fromkeys(get_column_task(column) for row in rows for column in row.metrics):
        task_rows = [row for row in rows if any(get_column_task(column) == task for column in row.metrics)]
        evaluations = {row.name: read_evaluation(row, task, split, outs) for row in task_rows}
        unread += [f"{name} ({task})" for name, evaluation in evaluations.items() if evaluation is None]
        if (baseline_evaluation := evaluations.get(baseline.name)) is not None:
            comparisons[task] = compare_with_baseline(
                baseline_evaluation, [item for item in evaluations.values() if item is not None]
            )
    return ComparisonResult(rows, baseline.name, comparisons, unread)


def compare_pairs(
    rows: list[ExperimentRow], found: list[dict[str, Any]], split: str, against: str | None, console: Console
) -> list[ExperimentRow]:
    """Print the table of metrics and the comparisons with the baseline; return the rows shown."""
    try:
        with Repo() as repo:
            comparison = compare_rows(rows, found, split, against, Outs(repo))
    except StageError as error:
        sys.exit(f"compare: {error}")
    shown, (rows, baseline, comparisons, unread) = rows, comparison
    print_metrics_table(
        rows,
        console,
        {(name, task) for task in comparisons for line in comparisons[task] if line.reason for name in line.names},
    )
    for task, task_comparisons in comparisons.items():
        if task_comparisons:
            table = make_pairs_table(task_comparisons)
            print(f"\n{format_table_title(task, task_comparisons, baseline, split)}")
            Console(highlight=False, width=max(console.width, measure_width(table, console))).print(table)
    for note in explain_verdicts([line for task_comparisons in comparisons.values() for line in task_comparisons]):
        print(note)
    if left_out := [f"{row.name} ({task})" for row, task in list_stale_metrics(shown, rows)]:
        print(f"\nNot shown because they were computed with other parameters (run `dvc repro`): {', '.join(left_out)}")
    if unread:
        print(f"\nNot compared because their document scores are not in the cache (`dvc pull`): {', '.join(unread)}")
    return rows
