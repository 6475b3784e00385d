"""Which experiments are better: differences on the same documents, with intervals, as `make compare` shows them."""

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
from stages.figures.scores import Scores, scores_in
from tools.compare import Row, draw, full_split, width_of
from tools.outs import Outs
from tools.paired import Difference, compare_models, correct_p_values, judge, say_what_would_decide
from tools.report_data import scores_file, split_ledger

SEED_ONLY = " ="


class Evaluation(NamedTuple):
    """A task's model of a revision on the documents of a split."""

    name: str
    """Of the revision."""
    rev: str
    seed: str
    family: str
    """All parameters of the task but the seed, as JSON."""
    table: pa.Table
    """Of the documents' scores, as evaluate wrote it."""
    scores: Scores
    context: Any
    """evaluate.context."""
    num_lossy: int
    """Documents that the tokenizer does not give back."""
    is_masked: bool


class Line(NamedTuple):
    """A comparison of an experiment, trained with one seed or several, with the baseline."""

    evaluations: list[Evaluation]
    """Of the experiment, one for each seed."""
    others: list[Evaluation]
    """What they are compared with, one for each seed."""
    difference: Difference | None
    reason: str
    """Why there is no difference; empty where there is one."""
    is_seed: bool
    """Whether only the seed is another."""

    @property
    def names(self) -> list[str]:
        return [evaluation.name for evaluation in self.evaluations]


def read_evaluation(row: Row, task: str, split: str, outs: Outs) -> Evaluation | None:
    """The evaluation of a revision; None where its scores are in no cache or were never written."""
    full = full_split(split)
    content, ledger = (outs.read(row.rev, path) for path in (scores_file(task, full), split_ledger(task, full)))
    if content is None or ledger is None:
        return None
    table = pq.read_table(BytesIO(content))
    others = set(map(task_of, row.metrics)) - {task}
    params = {
        heading: param.value
        for heading, param in row.params.items()
        if heading.replace(":", ".").partition(".")[0] not in others
    }
    seed = params.pop("seed", "")
    return Evaluation(
        name=row.name,
        rev=row.rev,
        seed=seed,
        family=json.dumps(params, sort_keys=True),
        table=table,
        scores=scores_in(table, "bits_after"),
        context=params.get(f"{task}: evaluate.context"),
        num_lossy=int(json.loads(ledger).get("documents_lossy", 0)),
        is_masked=any(name == f"{task} pseudo_bpb" for name in row.metrics),
    )


def find_obstacle(ours: Evaluation, other: Evaluation) -> str:
    """Why the figures of two evaluations do not compare; empty where they do."""
    columns = (evaluation.table.select(["record", "bytes"]) for evaluation in (ours, other))
    if not next(columns).equals(next(columns)):
        return "other documents"
    if ours.context != other.context:
        return f"evaluate.context {ours.context}, not {other.context}"
    if not np.array_equal(ours.scores.num_tokens, other.scores.num_tokens):  # another tokenizer
        if ours.is_masked:
            return "another tokenizer"
        if ours.num_lossy or other.num_lossy:
            return "another tokenizer, of which one is lossy"
    return ""


def compare_with(baseline: Evaluation, evaluations: list[Evaluation]) -> list[Line]:
    """A line for each experiment but the baseline; several that differ only in the seed are one."""
    families: dict[str, dict[str, Evaluation]] = defaultdict(dict)
    families[baseline.family][baseline.seed] = baseline
    lines = []
    for evaluation in evaluations:
        if reason := find_obstacle(evaluation, baseline):
            lines.append(Line([evaluation], [baseline], None, reason, False))
        else:
            families[evaluation.family].setdefault(evaluation.seed, evaluation)
    own = families.pop(baseline.family)
    others = [_compare(family, own, is_seed=False) for family in families.values()]
    seeds = [
        _compare({seed: evaluation}, {baseline.seed: baseline}, is_seed=True)
        for seed, evaluation in own.items()
        if evaluation is not baseline
    ]
    return [*others, *seeds, *lines]


def _compare(ours: Mapping[str, Evaluation], others: Mapping[str, Evaluation], is_seed: bool) -> Line:
    num_bytes = next(iter(ours.values())).scores.num_bytes
    difference = compare_models(_bits_by_seed(ours), _bits_by_seed(others), num_bytes)
    return Line(list(ours.values()), list(others.values()), difference, "", is_seed)


def _bits_by_seed(model: Mapping[str, Evaluation]) -> dict[str, npt.NDArray[np.float64]]:
    return {seed: evaluation.scores.bits for seed, evaluation in model.items()}


def judge_all(lines: Sequence[Line]) -> list[tuple[str, str]]:
    """The verdict of each comparison, corrected for their number, and what would decide one that is not decided."""
    tested = [line.difference for line in lines if line.difference is not None and not line.difference.is_none]
    corrected = iter(correct_p_values([difference.p_value for difference in tested]))
    verdicts = []
    for line in lines:
        difference = line.difference
        if difference is None:
            verdicts.append(("not comparable", ""))
            continue
        verdict = judge(difference, 1.0 if difference.is_none else next(corrected))
        undecided = verdict == "not decided"
        verdicts.append((verdict, say_what_would_decide(difference, len(tested)) if undecided else ""))
    return verdicts


def make_pairs_table(lines: Sequence[Line]) -> Table:
    """A row for each comparison."""
    with_seeds = any(line.difference is not None and line.difference.num_seeds != (1, 1) for line in lines)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("experiment", no_wrap=True)
    for heading in ("difference", "95 % interval", "documents\nbetter", *(["seeds"] if with_seeds else [])):
        table.add_column(heading, no_wrap=True, justify="right")
    for heading in ("verdict", "to decide: more"):
        table.add_column(heading, no_wrap=True)
    for line, (verdict, to_decide) in zip(lines, judge_all(lines), strict=True):
        name, difference = Text("\n".join(line.names) + (SEED_ONLY if line.is_seed else "")), line.difference
        if difference is None:
            table.add_row(name, *["-"] * (4 if with_seeds else 3), Text(printable(line.reason)), "")
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


def describe_table(task: str, lines: list[Line], baseline: str, split: str) -> str:
    """The table's title."""
    documents = [line.difference.num_documents for line in lines if line.difference is not None]
    on = f", on the same {documents[0]:,} documents ({split})" if documents else ""
    return f"{task}: difference from {printable(baseline)} in bits per byte{on}"


def describe_verdicts(lines: list[Line]) -> Iterator[str]:
    """What one has to know to read the verdicts."""
    differences = [line.difference for line in lines if line.difference is not None]
    if len(differences) > 1:
        yield "Verdicts hold for all comparisons of a table at once (Holm), an interval only for its own."
    if any(line.is_seed for line in lines):
        yield f"{SEED_ONLY.strip()}: only the seed differs"
    if any(difference.num_seeds == (1, 1) for difference in differences):
        yield "With one seed each, what another seed would change is not in the interval (dvc exp run -S seed=43)."


def find_baseline(rows: list[Row], against: str | None) -> Row | None:
    """The row that the others are compared with: the one called `against`, or else that of the last commit."""
    if against is not None:
        return next((row for row in rows if row.name == against or row.rev.startswith(against)), None)
    return next((row for row in rows if row.is_commit), rows[0])


def leave_out_stale_metrics(rows: list[Row], found: list[dict[str, Any]], outs: Outs) -> list[Row]:
    """The rows without the metrics of tasks that they have from another: an experiment may have run only one task."""
    params = {revision["rev"]: (revision.get("data") or {}).get("params") or {} for revision in found}
    kept = []
    for row in rows:
        stale = outs.stale_stages(row.rev, params[row.rev])
        kept.append(
            row._replace(
                metrics={name: value for name, value in row.metrics.items() if f"evaluate@{task_of(name)}" not in stale}
            )
        )
    return [row for row in kept if row.metrics]


def stale_metrics(before: list[Row], after: list[Row]) -> Iterator[tuple[Row, str]]:
    """Rows and tasks of which the metrics are left out."""
    kept = {(row.rev, row.name): set(map(task_of, row.metrics)) for row in after}
    for row in before:
        for task in dict.fromkeys(map(task_of, row.metrics)):
            if task not in kept.get((row.rev, row.name), ()):
                yield row, task


def task_of(column: str) -> str:
    """The task of a column of metrics."""
    return column.partition(" ")[0]


class Comparison(NamedTuple):
    """How the experiments compare with a baseline."""

    rows: list[Row]
    """Those with figures of their own."""
    baseline: str
    """Its name."""
    lines: dict[str, list[Line]]
    """By task."""
    unread: list[str]
    """Experiments and tasks of which the scores of documents are in no cache."""


def compare_rows(
    rows: list[Row], found: list[dict[str, Any]], split: str, against: str | None, outs: Outs
) -> Comparison:
    """Compare the experiments of `rows` with the baseline, each task of its own.

    Raises:
        StageError: if no figures are of their own parameters, or if there is no baseline.
    """
    rows = leave_out_stale_metrics(rows, found, outs)
    if not rows:
        raise StageError("all figures are of other parameters than the present ones: run `dvc repro`")
    baseline = find_baseline(rows, against)
    if baseline is None:
        names = printable(", ".join(row.name for row in rows), 2000)
        raise StageError(f"--against {printable(against)}: no experiment and no commit shown; there are {names}")
    lines: dict[str, list[Line]] = {}
    unread: list[str] = []
    for task in dict.fromkeys(task_of(column) for row in rows for column in row.metrics):
        own = [row for row in rows if any(task_of(column) == task for column in row.metrics)]
        evaluations = {row.name: read_evaluation(row, task, split, outs) for row in own}
        unread += [f"{name} ({task})" for name, evaluation in evaluations.items() if evaluation is None]
        if (of_baseline := evaluations.get(baseline.name)) is not None:
            lines[task] = compare_with(of_baseline, [item for item in evaluations.values() if item is not None])
    return Comparison(rows, baseline.name, lines, unread)


def compare_pairs(
    rows: list[Row], found: list[dict[str, Any]], split: str, against: str | None, console: Console
) -> list[Row]:
    """Print the table of metrics and, below it, how the experiments compare with the baseline; the rows shown."""
    try:
        with Repo() as repo:
            comparison = compare_rows(rows, found, split, against, Outs(repo))
    except StageError as error:
        sys.exit(f"compare: {error}")
    shown, (rows, baseline, lines, unread) = rows, comparison
    draw(rows, console, {(name, task) for task in lines for line in lines[task] if line.reason for name in line.names})
    for task, of_task in lines.items():
        if of_task:
            table = make_pairs_table(of_task)
            print(f"\n{describe_table(task, of_task, baseline, split)}")
            Console(highlight=False, width=max(console.width, width_of(table, console))).print(table)
    for said in describe_verdicts([line for of_task in lines.values() for line in of_task]):
        print(said)
    if left_out := [f"{row.name} ({task})" for row, task in stale_metrics(shown, rows)]:
        print(f"\nNot shown, since they are of other parameters (`dvc repro` computes them): {', '.join(left_out)}")
    if unread:
        print(f"\nNot compared, since the scores of their documents are in no cache (`dvc pull`): {', '.join(unread)}")
    return rows
