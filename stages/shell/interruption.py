"""Ctrl-C and SIGTERM: a stage ends with the exit code that these have, and training writes a checkpoint before."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):  # not an error: nothing on the way may take it for one
    """A stage was told to end by the signal `number`."""

    def __init__(self, number: int, message: str = "interrupted") -> None:
        super().__init__(message)
        self.number = number

    @property
    def exit_code(self) -> int:
        return 128 + self.number


def end_on_signals() -> None:
    """Have SIGINT and SIGTERM raise Interrupted, so that what a stage holds is put away."""
    for number in _SIGNALS:
        signal.signal(number, _raise)


def _raise(number: int, _: FrameType | None) -> None:
    raise Interrupted(number)


class Request:
    """The signal that asked a loop to end at its next good moment; none as yet."""

    number: int | None = None
    since = 0.0
    """When it came, in seconds of time.monotonic."""


@contextmanager
def signals_as_request() -> Iterator[Request]:
    """Within, the first SIGINT or SIGTERM becomes a request; another one a second later or more ends at once.

    Ctrl-C reaches each of several processes twice: from the terminal and from the one that started them.
    """
    request = Request()
    if threading.current_thread() is not threading.main_thread():  # as Ray has it, and ends it by itself
        yield request
        return

    def note(number: int, _: FrameType | None) -> None:
        if request.number is None:
            request.number, request.since = number, time.monotonic()
        elif time.monotonic() - request.since >= 1.0:
            raise Interrupted(number)

    before = {number: signal.signal(number, note) for number in _SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
