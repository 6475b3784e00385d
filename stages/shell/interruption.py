"""Ctrl-C, SIGTERM and SIGHUP: a stage ends with the exit code that these have; training writes a checkpoint first."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

GRACE_SECONDS = 60.0
"""Time between SIGTERM and SIGKILL, in which a training step ends and its checkpoint is written."""

ENDED_BY_SIGNAL = tuple(128 + number for number in (1, 2, 15))
"""Exit codes of a process that SIGHUP, SIGINT or SIGTERM ended."""

_asked = threading.Event()  # set by the first signal


class Interrupted(BaseException):  # not an error: nothing on the way may take it for one
    """A stage was told to end by the signal `number`."""

    def __init__(self, number: int, message: str = "interrupted") -> None:
        super().__init__(message)
        self.number = number

    @property
    def exit_code(self) -> int:
        return 128 + self.number


def _signals() -> list[signal.Signals]:
    """The signals that ask a process to end. SIGHUP is left out where it is ignored, as `nohup` has it."""
    hangup = getattr(signal, "SIGHUP", None)  # Windows has none
    kept = [] if hangup is None or signal.getsignal(hangup) is signal.SIG_IGN else [hangup]
    return [signal.SIGINT, signal.SIGTERM, *kept]


def end_on_signals() -> None:
    """Have SIGINT, SIGTERM and SIGHUP raise Interrupted, so that temporary files and locks are released.

    Only Ctrl-C does so again: a closed terminal or a stopped service sends several signals, and those after the first
    must not end the clean-up.
    """
    for number in _signals():
        signal.signal(number, _raise)


def _raise(number: int, _: FrameType | None) -> None:
    if number == signal.SIGINT or not _asked.is_set():
        _asked.set()
        raise Interrupted(number)


def end_this_process() -> None:
    """Send this process SIGTERM unless a signal has asked it to end already, and SIGKILL after GRACE_SECONDS."""
    if not _asked.is_set():
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


class Request:
    """The signal that asked a loop to end at its next good moment; none as yet."""

    number: int | None = None
    since = 0.0
    """When it came, in seconds of time.monotonic."""


@contextmanager
def signals_as_request() -> Iterator[Request]:
    """Within, the first signal becomes a request; Ctrl-C a second later or more ends at once.

    Ctrl-C reaches each of several processes twice: from the terminal and from the one that started them.
    """
    request = Request()
    if threading.current_thread() is not threading.main_thread():  # as Ray has it, and ends it by itself
        yield request
        return

    def note(number: int, _: FrameType | None) -> None:
        if request.number is None:
            _asked.set()
            request.number, request.since = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - request.since >= 1.0:
            raise Interrupted(number)

    before = {number: signal.signal(number, note) for number in _signals()}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
