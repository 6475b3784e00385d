"""Results of a search: its best trials, their paired differences from the best one, and the importance of each key."""

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

from dvc.repo import Repo
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from stages.core.errors import StageError, printable
from stages.train.plan import format_seconds
from tools.compare import break_heading, measure_width, read_rows
from tools.compare_pairs import compare_rows, explain_verdicts, format_table_title, make_pairs_table
from tools.experiments import parse_key
from tools.lock_history import resolve_revision
from tools.outs import Outs
from tools.search.runs import read_revision
from tools.search.space import Space, format_epochs
from tools.search.study import decode_values, list_runs, sum_seconds

if TYPE_CHECKING:
    import optuna

SHOWN_TRIALS = 10
MIN_TRIALS_FOR_IMPORTANCE = 30
"""PED-ANOVA compares the best tenth of the trials with all of them: with fewer, the tenth is one or two trials."""


def print_results(space: Space, study: "optuna.Study") -> None:
    """Print the best trials of a search, the comparisons, the importance of each key, and how to use the best trial."""
    from optuna.trial import TrialState

    trials = study.get_trials(deepcopy=False)
    console = Console(highlight=False)
    print(f"\n{describe_progress(space, trials)}")
    for trial in [trial for trial in trials if trial.state == TrialState.FAIL][-3:]:
        run = trial.user_attrs.get("runs", [{}])[-1]
        print(f"  failed: {run.get('name')}: {printable(run.get('error'), 1000)}")
    complete = sorted(
        (trial for trial in trials if trial.state == TrialState.COMPLETE), key=lambda trial: (trial.value, trial.number)
    )
    best = complete[:SHOWN_TRIALS]
    if not best:
        print(f"No trial has been trained for {format_epochs(space.halving.epochs[-1])} yet.")
        return
    print_table(make_trials_table(space, best), console)
    if len(complete) > len(best):
        print(f"{len(complete) - len(best)} more trials at {format_epochs(space.halving.epochs[-1])} are not shown.")
    print_comparisons(space, best, console)
    print_importance(space, trials, console)
    name = best[0].user_attrs["runs"][-1]["name"]
    print(
        "\nThe best of several trials looks better on the validation split than it is: report its test split. Next:"
        f"\n  {f'dvc exp apply {name}':42}  # its values to params.yaml and conf/, its model to models/"
        f"\n  {'python -m tools.compare --split test':42}  # all experiments on the test split"
    )


def print_table(table: Table, console: Console) -> None:
    """Print a table; one that is wider than the console is better than cells that rich cuts with an ellipsis."""
    Console(highlight=False, width=max(console.width, measure_width(table, console))).print(table)


def describe_progress(space: Space, trials: "list[optuna.trial.FrozenTrial]") -> str:
    """Return the numbers of trials, by their ends, and the time of all runs."""
    from optuna.trial import TrialState

    count = Counter(trial.state for trial in trials)
    parts = [
        f"{count[state]} {text}"
        for state, text in (
            (TrialState.COMPLETE, f"at {format_epochs(space.halving.epochs[-1])}"),
            (TrialState.PRUNED, "stopped earlier"),
            (TrialState.FAIL, "failed"),
            (TrialState.RUNNING, "to be continued"),
        )
        if count[state]
    ]
    runs = list_runs(trials)
    number = sum(count.values()) - count[TrialState.WAITING]
    together = f"{len(runs)} run{'' if len(runs) == 1 else 's'}, {format_seconds(sum_seconds(trials))}"
    return f"{number} trial{'' if number == 1 else 's'} ({', '.join(parts) or 'none'}): {together}"


def make_trials_table(space: Space, trials: "list[optuna.trial.FrozenTrial]") -> Table:
    """Return a table with one row per trial: its experiment, metric and values."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("experiment", no_wrap=True)
    table.add_column(f"{space.metric or 'bits per byte'}\n(validation)", no_wrap=True, justify="right")
    for key in space.keys:
        table.add_column(Text(break_heading(parse_key(key).name)), no_wrap=True, justify="right")
    for trial in trials:
        values = decode_values(space, trial.params).values()
        cells = (Text(printable(json.dumps(value, ensure_ascii=False).strip('"'))) for value in values)
        table.add_row(trial.user_attrs["runs"][-1]["name"], f"{trial.value:.4f}", *cells)
    return table


def print_comparisons(space: Space, trials: "list[optuna.trial.FrozenTrial]", console: Console) -> None:
    """Print the differences of the last commit and of other trials from the best trial, document by document."""
    runs = [trial.user_attrs["runs"][-1] for trial in trials]
    with Repo() as repo:
        revisions = [(run["name"], run["rev"]) for run in runs] + [("HEAD", resolve_revision(repo, "HEAD"))]
        found = [read_revision(name, rev, space.task) for name, rev in revisions]
        try:
            comparison = compare_rows(read_rows(found, "val"), found, "val", runs[0]["name"], Outs(repo))
        except StageError as error:  # for example, the best experiment was removed
            print(f"Not compared: {printable(error, 1000)}")
            return
    lines = comparison.comparisons.get(space.task, [])
    if lines:
        print(f"\n{format_table_title(space.task, lines, runs[0]['name'], 'val')}")
        print_table(make_pairs_table(lines), console)
        for note in explain_verdicts(lines):
            print(note)
    if comparison.unread:
        print(
            f"Not compared, because their document scores are not in the cache (`dvc pull`):"
            f" {', '.join(comparison.unread)}"
        )


def print_importance(space: Space, trials: "list[optuna.trial.FrozenTrial]", console: Console) -> None:
    """Print the importance of each key, from the results of the first rung, which all trials have."""
    values = {trial.number: trial.intermediate_values[0] for trial in trials if 0 in trial.intermediate_values}
    if len(space.keys) < 2 or len(values) < 3:
        return
    importance = compute_importance([(trial, values[trial.number]) for trial in trials if trial.number in values])
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("key", no_wrap=True)
    table.add_column("importance", no_wrap=True, justify="right")
    for key, share in importance.items():
        table.add_row(Text(key), f"{share:.0%}")
    print(f"\nImportance of each key in {len(values)} trials ({format_epochs(space.halving.epochs[0])}, PED-ANOVA):")
    print_table(table, console)
    if len(values) < MIN_TRIALS_FOR_IMPORTANCE:
        print(f"With fewer than {MIN_TRIALS_FOR_IMPORTANCE} trials, the importance is mostly chance.")


def compute_importance(results: "list[tuple[optuna.trial.FrozenTrial, float]]") -> dict[str, float]:
    """Return key to its share of the importance (PED-ANOVA, Watanabe et al. 2023), the largest first."""
    import optuna

    study = optuna.create_study()
    for trial, value in results:
        study.add_trial(optuna.trial.create_trial(params=trial.params, distributions=trial.distributions, value=value))
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    found: dict[str, Any] = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {key: float(share) for key, share in found.items()}
