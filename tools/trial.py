"""Run a stage on part of its work in this process, and time it for `make plan`.

Command python -m tools.trial STAGE REPORT KEY=VALUE...

REPORT is the JSON file to write (see TrialReport). A training ends when it has made at least TRIAL_STEPS steps and has
run for at least TRIAL_SECONDS.
"""

import contextlib
import dataclasses
import functools
import importlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from stages.core.artifacts import write_json
from stages.core.compose import compose_config, identify_stage, load_config
from stages.figures.scores import Scores
from stages.shell.app import run

TRIAL_STEPS = 10
TRIAL_SECONDS = 3.0


@dataclasses.dataclass
class TimedCall:
    """Timed call of a function that scores documents or blocks."""

    unit: str
    """Unit of work: documents or blocks."""
    done: int
    """Number of scored tokens, or of blocks."""
    documents: int
    """Number of scored documents; 0 for blocks."""
    available: int
    """Number of documents from which the scored ones were chosen; 0 for blocks."""
    seconds: float


@dataclasses.dataclass
class TrialReport:
    """Times of a stage, in seconds."""

    calls: list[TimedCall]
    """Calls of a baseline or an evaluation, in order."""
    marks: dict[str, list[float]]
    """Durations in a training by event: `step`, `evaluate`, `save`, each measured from the end of the last event."""
    fingerprint: str | None
    """Fingerprint under which the plan of the full training is stored."""


def main() -> None:
    stage, file = sys.argv[1:3]
    sys.argv[1:3] = []
    module = importlib.import_module(f"stages.{stage}.stage")
    schema = getattr(module, f"{stage.title()}Config")
    run(stage, schema, functools.partial(time_stage, stage, module.main, file))


def time_stage(stage: str, work: Callable[[Any], None], file: str, config: Any) -> None:
    """Call `work`, the main function of a stage, with `config` and write the TrialReport to `file`."""
    report = TrialReport(calls=[], marks={}, fingerprint=None)
    with time_steps(report.marks) if stage == "train" else time_calls(report.calls):
        work(config)
    if stage == "train":
        report.fingerprint = compute_full_fingerprint()
    write_json(file, dataclasses.asdict(report))


def compute_full_fingerprint() -> str | None:
    """Return the fingerprint of the full training, which is that of params.yaml without overrides.

    Returns None if the training starts from a model that is not trained yet.
    """
    from stages.train.fingerprints import compute_run_fingerprint
    from stages.train.stage import TrainConfig

    name, item = identify_stage("train", os.environ.get("DVC_STAGE", ""), [])
    config = load_config(TrainConfig, compose_config(name, [], item))
    return compute_run_fingerprint(config) if config.start is None or Path(config.start).is_dir() else None


@contextlib.contextmanager
def time_calls(calls: list[TimedCall]) -> Iterator[None]:
    """Record each call of the functions that score documents and blocks in `calls`."""
    from stages.figures import metrics
    from stages.model import block_loss

    def count_documents(arguments: tuple[Any, ...], scored: tuple[Scores, Any]) -> tuple[str, int, int, int]:
        return "documents", int(scored[0].num_tokens.sum()), len(arguments[3]), len(arguments[2])

    def count_blocks(arguments: tuple[Any, ...], _: float) -> tuple[str, int, int, int]:
        return "blocks", len(arguments[2]), 0, 0

    with (
        _time_function(metrics, "score_documents", count_documents, calls),
        _time_function(block_loss, "compute_block_loss", count_blocks, calls),
    ):
        yield


@contextlib.contextmanager
def _time_function(
    module: Any, name: str, count_work: Callable[..., tuple[str, int, int, int]], calls: list[TimedCall]
) -> Iterator[None]:
    """Replace a function of `module` by a version that records a TimedCall in `calls`."""
    function = getattr(module, name)

    def timed(*arguments: Any) -> Any:
        started = time.perf_counter()
        result = function(*arguments)
        calls.append(TimedCall(*count_work(arguments, result), seconds=time.perf_counter() - started))
        return result

    setattr(module, name, timed)
    try:
        yield
    finally:
        setattr(module, name, function)


@contextlib.contextmanager
def time_steps(marks: dict[str, list[float]]) -> Iterator[None]:
    """Record the durations of a training's steps, evaluations and checkpoints in `marks`, and end it early.

    Both frameworks report these events to the callbacks of a CallbackHandler.
    """
    from transformers import TrainerCallback
    from transformers.trainer_callback import CallbackHandler

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self._last = self._began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self._mark("step")
            late = self._last - self._began >= TRIAL_SECONDS
            control.should_training_stop |= late and len(marks["step"]) >= TRIAL_STEPS

        def on_evaluate(self, *_: Any, **__: Any) -> None:
            self._mark("evaluate")

        def on_save(self, *_: Any, **__: Any) -> None:
            self._mark("save")

        def _mark(self, event: str) -> None:
            now = time.perf_counter()
            marks.setdefault(event, []).append(now - self._last)
            self._last = now

    initialize = CallbackHandler.__init__

    def with_clock(self: Any, callbacks: list[Any], *arguments: Any) -> None:
        initialize(self, [*callbacks, Clock()], *arguments)

    CallbackHandler.__init__ = with_clock
    try:
        yield
    finally:
        CallbackHandler.__init__ = initialize


if __name__ == "__main__":
    main()
