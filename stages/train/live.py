"""Curves of a training that runs, for `dvc plots show` and the report.

An out of DVC appears when it is complete, so that no curve is in `reports/train/TASK` before training ends. Until then
`reports/train/.live-TASK` has them, which is neither an out nor in git: DVC never takes it for a result. A run that is
resumed begins it again from the history in its checkpoint.
"""

import contextlib
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from stages.core.artifacts import lock
from stages.core.errors import printable

log = logging.getLogger(__name__)

_COLUMNS = {"train": {"loss": "loss", "learning_rate": "learning_rate"}, "validation": {"eval_loss": "loss"}}
"""File to the columns after `step`: name in the log history to heading."""


_handles: dict[Path, int] = {}
"""Of the locked directories: a training that ended by an error has not released its own."""


def live_directory(report: str | Path) -> Path:
    """The directory of the live curves of a training that writes its report to `report`."""
    return Path(report).with_name(f".live-{Path(report).name}")


class LiveCurves(TrainerCallback):  # type: ignore[misc]
    """Writes the curves while they grow, a line for each entry of the log history.

    The directory is locked while this process lives, by which readers tell a running training from one that was killed.
    An error ends the curves and not the training.
    """

    def __init__(self, report: str | Path) -> None:
        self._directory = live_directory(report)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._release()
            _handles[self._directory] = os.open(self._directory, os.O_RDONLY)
            lock(_handles[self._directory])
            for name, columns in _COLUMNS.items():
                heading = "\t".join(["step", *columns.values()]) + "\n"
                aside = self._directory / f".tmp-{name}"
                aside.write_text(heading + _lines(name, state.log_history), encoding="utf-8")
                aside.replace(self._directory / f"{name}.tsv")
        except OSError as error:
            self._give_up(error)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._directory not in _handles:
            return
        try:
            for name in _COLUMNS:
                if lines := _lines(name, state.log_history[-1:]):
                    with (self._directory / f"{name}.tsv").open("a", encoding="utf-8") as file:
                        file.write(lines)
        except OSError as error:
            self._give_up(error)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._release()

    def _give_up(self, error: OSError) -> None:
        log.warning("no live curves in %s: %s; training goes on", self._directory, printable(error))
        self._release()

    def _release(self) -> None:
        if (handle := _handles.pop(self._directory, None)) is not None:
            os.close(handle)


def _lines(name: str, history: Iterable[dict[str, Any]]) -> str:
    """The lines of a file for the entries of `history` that belong there."""
    found = (entry for entry in history if next(iter(_COLUMNS[name])) in entry)
    rows = ([int(entry["step"]), *(entry.get(key, "") for key in _COLUMNS[name])] for entry in found)
    return "".join("\t".join(map(str, row)) + "\n" for row in rows)


def remove_live_curves(report: str | Path) -> None:
    """Remove the live curves of a training whose report is written."""
    directory = live_directory(report)
    with contextlib.suppress(OSError):
        for name in _COLUMNS:
            (directory / f"{name}.tsv").unlink(missing_ok=True)
            (directory / f".tmp-{name}").unlink(missing_ok=True)
        directory.rmdir()
