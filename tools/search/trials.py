"""The loop of a search: which run is next, when a trial ends, and when the search does."""

import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from stages.core.errors import StageError, printable_lines
from stages.train.plan import format_seconds
from tools.search.runs import RunError, Runner, RunResult
from tools.search.space import Space, format_epochs, make_settings
from tools.search.study import decode_values, list_runs, suggest_value, sum_seconds

if TYPE_CHECKING:
    import optuna

MAX_FAILURES = 3
"""Failures after which a search stops: the fourth trial would probably fail too. A success does not count in favor of a
later rung, whose runs may all fail."""
MIN_RANDOM_TRIALS = 10
"""Trials with random values before Optuna's sampler uses the results."""


class Budget(NamedTuple):
    """Limit of a whole search, over all calls. One of the two is None."""

    seconds: float | None
    """Seconds that all runs together may take."""
    trials: int | None
    """Number of trials."""


class Search:
    """Proposes trials, runs them rung by rung, and records every step in the study.

    The study has everything that a decision depends on, and every decision is made from it again. So a search can be
    killed at any point, and the proposals do not depend on interruptions.
    """

    def __init__(
        self,
        name: str,
        space: Space,
        study: "optuna.Study",
        runner: Runner,
        settings: Mapping[str, Any],
        shares_steps: bool,
    ) -> None:
        """
        Args:
            settings: key to value of settings that do not change results, for every run.
            shares_steps: True if a run continues from the checkpoint of the rung before.
        """
        self._name, self._space, self._study, self._runner, self._settings = name, space, study, runner, settings
        self._rungs, self._shares_steps = space.halving.epochs, shares_steps

    def run(self, budget: Budget) -> None:
        """Run trials until the budget is used up.

        Raises:
            StageError: after MAX_FAILURES failures, none of them followed by a success in the same or a later rung.
        """
        failures: list[int] = []  # their rungs
        while True:
            unfinished = self._find_unfinished_trial()
            rung = 0 if unfinished is None else len(unfinished.intermediate_values)
            if unfinished is not None and self._end_trial(unfinished, rung):
                continue
            if reason := self._find_end(budget, rung, is_new=unfinished is None):
                print(reason, flush=True)
                return
            error = self._run_rung(self._open_trial(unfinished), rung, budget)
            failures = [*failures, rung] if error else [failed for failed in failures if failed > rung]
            if len(failures) == MAX_FAILURES:
                raise StageError(f"{MAX_FAILURES} trials in a row failed; the last error: {error}")

    def _list_trials(self) -> "list[optuna.trial.FrozenTrial]":
        return list(self._study.get_trials(deepcopy=False))

    def _find_unfinished_trial(self) -> "optuna.trial.FrozenTrial | None":
        from optuna.trial import TrialState

        return next((trial for trial in self._list_trials() if trial.state == TrialState.RUNNING), None)

    def _open_trial(self, unfinished: "optuna.trial.FrozenTrial | None") -> "optuna.Trial":
        """Return the unfinished trial, or start another."""
        import optuna

        if unfinished is None:
            if not any(trial.state == optuna.trial.TrialState.WAITING for trial in self._list_trials()):
                # All values of a trial are written at once: a trial that is killed here has none or all of them.
                self._study.enqueue_trial(self._propose_params())
            trial = self._study.ask()
        else:
            trial = optuna.Trial(self._study, unfinished._trial_id)  # Optuna has no public name for this id
        for key, spec in self._space.keys.items():
            suggest_value(trial, key, spec)  # those of enqueue_trial
        return trial

    def _propose_params(self) -> dict[str, Any]:
        """Return the parameters that Optuna proposes for the next trial, from the results so far."""
        import optuna

        trials = self._list_trials()
        # A seed per trial: the random numbers of a trial then do not depend on the calls that the search took.
        sampler = optuna.samplers.TPESampler(n_startup_trials=MIN_RANDOM_TRIALS, multivariate=True, seed=len(trials))
        study = optuna.create_study(sampler=sampler)
        study.add_trials(trials)
        trial = study.ask()
        for key, spec in self._space.keys.items():
            suggest_value(trial, key, spec)
        return dict(trial.params)

    def _end_trial(self, trial: "optuna.trial.FrozenTrial", rung: int) -> bool:
        """Record the end of a trial that has run every rung, or is not promoted; return False if it goes on."""
        from optuna.trial import TrialState

        if rung == len(self._rungs):
            self._study.tell(trial.number, trial.intermediate_values[rung - 1])
        elif rung and not self._is_promoted(trial, rung - 1):
            self._study.tell(trial.number, state=TrialState.PRUNED)
        else:
            return False
        return True

    def _is_promoted(self, trial: "optuna.trial.FrozenTrial", rung: int) -> bool:
        """Return True if a trial is among the best 1/factor of those that have a result in this rung, or the best."""
        values = [other.intermediate_values[rung] for other in self._list_trials() if rung in other.intermediate_values]
        rank = sum(value < trial.intermediate_values[rung] for value in values)
        return bool(rank < max(1, len(values) // self._space.halving.factor))

    def _find_end(self, budget: Budget, rung: int, is_new: bool) -> str:
        """Return the reason why the next run does not fit into the budget; the empty string if it does."""
        trials = self._list_trials()
        used, needed = sum_seconds(trials), self._predict_seconds(self._rungs[rung])
        if budget.trials is not None:
            finished = sum(trial.state.is_finished() for trial in trials)
            return f"The budget of {budget.trials} trials is used up." if is_new and finished >= budget.trials else ""
        assert budget.seconds is not None
        left = budget.seconds - used
        if left > 0 and needed <= left:
            return ""
        return (
            f"The budget of {format_seconds(budget.seconds)} is used up: {format_seconds(max(left, 0))} are left, and"
            f" the next run, of {format_epochs(self._rungs[rung])}, takes about {format_seconds(needed)}."
        )

    def _predict_seconds(self, epochs: float) -> float:
        """Predict the seconds of a run from the finished ones; 0 if there are none."""
        seconds: dict[float, list[float]] = {}
        for run in list_runs(self._list_trials()):
            if run["seconds"] is not None and "error" not in run:
                seconds.setdefault(run["epochs"], []).append(run["seconds"])
        if not seconds:
            return 0.0
        nearest = max((known for known in seconds if known <= epochs), default=min(seconds))
        # Without a run of this length, scale the longest shorter one by the epochs that the two train.
        trained = max(1.0, self._count_trained_epochs(epochs) / self._count_trained_epochs(nearest))
        return sum(seconds[nearest]) / len(seconds[nearest]) * trained

    def _count_trained_epochs(self, epochs: float) -> float:
        """Return the epochs that the run of a rung trains itself."""
        rung = self._rungs.index(epochs)
        return epochs - self._rungs[rung - 1] if rung and self._shares_steps else epochs

    def _run_rung(self, trial: "optuna.Trial", rung: int, budget: Budget) -> str:
        """Run a trial for the epochs of a rung, and record the result; return the error of a failed run."""
        from optuna.trial import TrialState

        epochs = self._rungs[rung]
        name = format_run_name(self._name, trial.number, epochs)
        settings = make_settings(self._space, decode_values(self._space, trial.params), epochs)
        started, error, found = time.monotonic(), "", self._runner.find(name, settings)
        try:
            result = self._run(name, settings) if found is None else found
            if math.isnan(result.value):
                raise RunError("the metric is not a finite number: the training diverged")
        except RunError as failure:
            error = str(failure)
        seconds = time.monotonic() - started if found is None else None
        run = {"name": name, "epochs": epochs, "seconds": seconds, **({"error": error} if error else {})}
        if not error:
            self._check_documents(name, result.documents)
            run["rev"] = result.rev
        trial.set_user_attr("runs", [*trial.user_attrs.get("runs", []), run])
        if error:
            print(printable_lines(f"{name} failed: {error}"), flush=True)
            self._study.tell(trial, state=TrialState.FAIL)
            return error
        trial.report(result.value, rung)
        self._print_run(run, result.value, budget)
        return ""

    def _run(self, name: str, settings: Mapping[str, Any]) -> RunResult:
        """Run an experiment and return its result.

        Raises:
            RunError: if it fails.
        """
        self._runner.run(name, {**settings, **self._settings})
        result = self._runner.find(name, settings)
        if result is None:
            raise RunError("dvc exp run succeeded, but saved no experiment")
        return result

    def _check_documents(self, name: str, documents: str) -> None:
        """Record the documents on which the models are evaluated.

        Raises:
            StageError: if they are not those of the earlier trials.
        """
        if "documents" not in self._study.user_attrs:
            self._study.set_user_attr("documents", documents)
        elif self._study.user_attrs["documents"] != documents:
            raise StageError(
                f"{name} was evaluated on other validation documents than the trials before it, so that they cannot be"
                " compared: remove the key that changes them from the space, and start a new search (--name)"
            )

    def _print_run(self, run: Mapping[str, Any], value: float, budget: Budget) -> None:
        trials, last = self._list_trials(), len(self._rungs) - 1
        notes = ["found" if run["seconds"] is None else format_seconds(run["seconds"])]
        if complete := [trial.intermediate_values[last] for trial in trials if last in trial.intermediate_values]:
            notes.append(f"best {min(complete):.4f}")
        if budget.seconds is not None:
            notes.append(f"{format_seconds(max(0.0, budget.seconds - sum_seconds(trials)))} left")
        print(f"{run['name']}  {value:.4f}  ({', '.join(notes)})", flush=True)


def format_run_name(search: str, trial: int, epochs: float) -> str:
    """Return the name of the experiment of a trial with this number of epochs."""
    return f"{search}-{trial:03}-e{epochs:g}"
