"""Progress of a long loop: a bar on a terminal, a plain line now and then where the output is piped."""

import logging
import time
from typing import Any

from stages.shell.terminal import is_plain

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """What is done of a total, with time to go. A loop shorter than SECONDS_BETWEEN_LINES says nothing when piped."""

    def __init__(self, what: str, total: int, unit: str) -> None:
        self._what, self._total, self._unit = what, total, unit
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
            self._task = self._bar.add_task(what, total=total, detail="")

    def update(self, done: int, detail: str = "") -> None:
        """Show that `done` of the total is done."""
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
                self._what,
                done,
                self._total,
                self._unit,
                to_go,
                detail and f", {detail}",
            )

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
