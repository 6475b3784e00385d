"""Curves of a running training, for `dvc plots show` and the report.

An out of DVC appears when it is complete, so `reports/train/TASK` has no curves before training ends. Until then they
are in `reports/train/.live-TASK`, which is neither an out nor in git, so DVC never treats it as a result. A resumed run
writes it again from the history in its checkpoint.
"""

import contextlib
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from stages.core.artifacts import lock_handle
from stages.core.errors import printable

log = logging.getLogger(__name__)

_COLUMNS = {"train": {"loss": "loss", "learning_rate": "learning_rate"}, "validation": {"eval_loss": "loss"}}
"""Name of each file to its columns after `step`: key in the log history to heading."""


_lock_handles: dict[Path, int] = {}
"""File descriptors of the locked directories. A training that ended with an error has not closed its descriptor."""


def get_live_directory(report: str | Path) -> Path:
    """Return the directory of the live curves of a training that writes its report to `report`."""
    return Path(report).with_name(f".live-{Path(report).name}")


class LiveCurves(TrainerCallback):  # type: ignore[misc]
    """Writes the curves during training, one line per entry of the log history.

    The directory is locked until this process ends, so that readers can distinguish a running training from a killed
    one. If a file cannot be written, the curves end, but training continues.
    """

    def __init__(self, report: str | Path) -> None:
        self._directory = get_live_directory(report)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._release_lock()
            _lock_handles[self._directory] = os.open(self._directory, os.O_RDONLY)
            lock_handle(_lock_handles[self._directory])
            for name, columns in _COLUMNS.items():
                heading = "\t".join(["step", *columns.values()]) + "\n"
                aside = self._directory / f".tmp-{name}"
                aside.write_text(heading + _format_rows(name, state.log_history), encoding="utf-8")
                aside.replace(self._directory / f"{name}.tsv")
        except OSError as error:
            self._stop_writing(error)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._directory not in _lock_handles:
            return
        try:
            for name in _COLUMNS:
                if lines := _format_rows(name, state.log_history[-1:]):
                    with (self._directory / f"{name}.tsv").open("a", encoding="utf-8") as file:
                        file.write(lines)
        except OSError as error:
            self._stop_writing(error)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._release_lock()

    def _stop_writing(self, error: OSError) -> None:
        log.warning("no live curves in %s: %s; training continues", self._directory, printable(error))
        self._release_lock()

    def _release_lock(self) -> None:
        if (handle := _lock_handles.pop(self._directory, None)) is not None:
            os.close(handle)


def _format_rows(name: str, history: Iterable[dict[str, Any]]) -> str:
    """Format the entries of `history` that belong into the file `name`, one line each."""
    entries = (entry for entry in history if next(iter(_COLUMNS[name])) in entry)
    rows = ([int(entry["step"]), *(entry.get(key, "") for key in _COLUMNS[name])] for entry in entries)
    return "".join("\t".join(map(str, row)) + "\n" for row in rows)


def remove_live_curves(report: str | Path) -> None:
    """Remove the live curves of a training after its report has been written."""
    directory = get_live_directory(report)
    with contextlib.suppress(OSError):
        for name in _COLUMNS:
            (directory / f"{name}.tsv").unlink(missing_ok=True)
            (directory / f".tmp-{name}").unlink(missing_ok=True)
        directory.rmdir()
