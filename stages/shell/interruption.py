"""Ctrl-C, SIGTERM and SIGHUP: a stage exits with the code of the signal; training writes a checkpoint first."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

GRACE_SECONDS = 60.0
"""Time between SIGTERM and SIGKILL, for the current training step and its checkpoint."""

SIGNAL_EXIT_CODES = tuple(128 + number for number in (1, 2, 15))
"""Exit codes of a process that SIGHUP, SIGINT or SIGTERM ended."""

_signal_received = threading.Event()  # set by the first signal


class Interrupted(BaseException):  # not an Exception: no `except Exception` may catch it
    """The signal `number` asked a stage to end."""

    def __init__(self, number: int, message: str = "interrupted") -> None:
        super().__init__(message)
        self.number = number

    @property
    def exit_code(self) -> int:
        return 128 + self.number


def _list_signals() -> list[signal.Signals]:
    """Return the signals that ask a process to end, without SIGHUP if it is ignored (`nohup`)."""
    hangup = getattr(signal, "SIGHUP", None)  # Windows has no SIGHUP
    hangups = [] if hangup is None or signal.getsignal(hangup) is signal.SIG_IGN else [hangup]
    return [signal.SIGINT, signal.SIGTERM, *hangups]


def end_on_signals() -> None:
    """Make SIGINT, SIGTERM and SIGHUP raise Interrupted, so that temporary files and locks are released.

    After the first signal, only Ctrl-C raises again: a closed terminal or a stopped service sends several signals, and
    the later ones must not interrupt the clean-up.
    """
    for number in _list_signals():
        signal.signal(number, _raise_interrupted)


def _raise_interrupted(number: int, _: FrameType | None) -> None:
    if number == signal.SIGINT or not _signal_received.is_set():
        _signal_received.set()
        raise Interrupted(number)


def end_this_process() -> None:
    """Send SIGTERM to this process unless a signal has already asked it to end, and SIGKILL after GRACE_SECONDS."""
    if not _signal_received.is_set():
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


class StopRequest:
    """A request to stop a loop at the next suitable point."""

    number: int | None = None
    """Number of the signal; None if none has arrived."""
    received_at = 0.0
    """Time of its arrival, in seconds of time.monotonic."""


@contextmanager
def defer_signals() -> Iterator[StopRequest]:
    """Record the first signal in the yielded request instead of raising; Ctrl-C a second later or more raises.

    The delay is needed because each of several processes gets Ctrl-C twice: from the terminal and from its parent.

    Raises:
        Interrupted: on the second Ctrl-C.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():  # a Ray worker, which Ray ends
        yield request
        return

    def record_signal(number: int, _: FrameType | None) -> None:
        if request.number is None:
            _signal_received.set()
            request.number, request.received_at = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - request.received_at >= 1.0:
            raise Interrupted(number)

    previous = {number: signal.signal(number, record_signal) for number in _list_signals()}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
