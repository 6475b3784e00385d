"""Progress of a long loop: a bar on a terminal, or a plain line every few seconds if the output is piped."""

import logging
import time
from typing import Any

from stages.shell.terminal import is_plain

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Progress toward a total, with the remaining time.

    A loop shorter than _SECONDS_BETWEEN_LINES prints nothing when piped.
    """

    def __init__(self, label: str, total: int, unit: str) -> None:
        """
        Args:
            label: name of the work, such as `training`.
            unit: name of the items that are counted, such as `steps`.
        """
        self._label, self._total, self._unit = label, total, unit
        self._started = self._last_line = time.monotonic()
        self._first: int | None = None
        self._bar: Any = None
        if not is_plain():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), "to go", TimeRemainingColumn())
            description = TextColumn("{task.description}")
            self._bar = Bar(
                description, *columns, TextColumn("{task.fields[detail]}"), console=Console(stderr=True), transient=True
            )
            self._bar.start()
            self._task = self._bar.add_task(label, total=total, detail="")

    def update(self, done: int, detail: str = "") -> None:
        """Show that `done` items of the total are done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, detail=detail)
            return
        now = time.monotonic()
        self._first = done if self._first is None else self._first
        if now - self._last_line >= _SECONDS_BETWEEN_LINES and done > self._first:
            self._last_line = now
            to_go = (self._total - done) * (now - self._started) / (done - self._first)
            log.info(
                "%s: %d/%d %s, %.0f s to go%s",
                self._label,
                done,
                self._total,
                self._unit,
                to_go,
                detail and f", {detail}",
            )

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
