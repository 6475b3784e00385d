"""Run a stage for `make plan` and time what it does: the stage itself, on a part of its work, in this process.

Command python -m tools.trial STAGE REPORT KEY=VALUE...

REPORT is the JSON file to write: see Report. A training ends after TRIAL_STEPS steps that took TRIAL_SECONDS.
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
from stages.core.compose import compose, load, stage_of
from stages.figures.scores import Scores
from stages.shell.app import run

TRIAL_STEPS = 10
TRIAL_SECONDS = 3.0


@dataclasses.dataclass
class Call:
    """A call of a function that works through documents or blocks."""

    what: str
    """documents or blocks"""
    done: int
    """Number of tokens of these documents, or of blocks."""
    documents: int
    """Number of documents; 0 for blocks."""
    available: int
    """Number of documents from which they were chosen; 0 for blocks."""
    seconds: float


@dataclasses.dataclass
class Report:
    """What a stage did, in seconds."""

    calls: list[Call]
    """Of a baseline or an evaluation, in order."""
    marks: dict[str, list[float]]
    """Of a training: `step`, `evaluate`, `save`: each from the end of what came before it."""
    fingerprint: str | None
    """By which a training that runs to its end remembers its plan."""


def main() -> None:
    stage, file = sys.argv[1:3]
    sys.argv[1:3] = []
    module = importlib.import_module(f"stages.{stage}.stage")
    schema = getattr(module, f"{stage.title()}Config")
    run(stage, schema, functools.partial(observe, stage, module.main, file))


def observe(stage: str, work: Callable[[Any], None], file: str, config: Any) -> None:
    """Do the `work` of a stage on `config` and write the Report."""
    report = Report(calls=[], marks={}, fingerprint=None)
    with time_steps(report.marks) if stage == "train" else time_calls(report.calls):
        work(config)
    if stage == "train":
        report.fingerprint = fingerprint()
    write_json(file, dataclasses.asdict(report))


def fingerprint() -> str | None:
    """The name of the training of which this one is a trial: that of params.yaml, without overrides.

    None where the model that it will go on from is not trained yet.
    """
    from stages.train.stage import TrainConfig, name_of

    name, item = stage_of("train", os.environ.get("DVC_STAGE", ""), [])
    config = load(TrainConfig, compose(name, [], item))
    return name_of(config) if config.start is None or Path(config.start).is_dir() else None


@contextlib.contextmanager
def time_calls(calls: list[Call]) -> Iterator[None]:
    """Add to `calls` each call of the functions that score documents and blocks."""
    from stages.figures import metrics
    from stages.model import block_loss

    def documents(arguments: tuple[Any, ...], scored: tuple[Scores, Any]) -> tuple[str, int, int, int]:
        return "documents", int(scored[0].num_tokens.sum()), len(arguments[3]), len(arguments[2])

    def blocks(arguments: tuple[Any, ...], _: float) -> tuple[str, int, int, int]:
        return "blocks", len(arguments[2]), 0, 0

    with _timed(metrics, "score_documents", documents, calls), _timed(block_loss, "block_loss", blocks, calls):
        yield


@contextlib.contextmanager
def _timed(
    module: Any, name: str, measure: Callable[..., tuple[str, int, int, int]], calls: list[Call]
) -> Iterator[None]:
    """Have a function of `module` add a Call to `calls` each time."""
    function = getattr(module, name)

    def timed(*arguments: Any) -> Any:
        started = time.perf_counter()
        result = function(*arguments)
        calls.append(Call(*measure(arguments, result), seconds=time.perf_counter() - started))
        return result

    setattr(module, name, timed)
    try:
        yield
    finally:
        setattr(module, name, function)


@contextlib.contextmanager
def time_steps(marks: dict[str, list[float]]) -> Iterator[None]:
    """Add to `marks` what the steps of a training, its evaluations and its checkpoints take, and end it early.

    Both frameworks tell the callbacks of a CallbackHandler what they do.
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

        def _mark(self, what: str) -> None:
            now = time.perf_counter()
            marks.setdefault(what, []).append(now - self._last)
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
