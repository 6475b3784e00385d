"""Pieces of preprocessing: one after the other here, or as tasks of a Ray cluster.

Where they are done changes no byte, so it is no part of a configuration: LM_REPRO_PREPROCESSING=ray says it.
"""

import contextlib
import functools
import gc
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, TypeVar

from stages.core.errors import StageError

_Job = TypeVar("_Job")
_Result = TypeVar("_Result")

_PLACE = "LM_REPRO_PREPROCESSING"


def are_spread() -> bool:
    """Whether pieces are tasks of a cluster."""
    place = os.environ.get(_PLACE, "")
    if place not in ("", "ray"):
        raise StageError(f"{_PLACE}={place}: it should be ray, or not be set")
    return bool(place)


def connect_workers() -> None:
    """Find the cluster where pieces are to be its tasks.

    Raises:
        StageError: if there is none, or LM_REPRO_PREPROCESSING says neither.
    """
    if are_spread():
        from stages.shell.ray_cluster import connected

        connected()


def run_pieces(function: Callable[[_Job], _Result], jobs: Sequence[_Job]) -> Iterator[_Result]:
    """`function` of each job, in order.

    On a cluster, function and jobs are pickled, so that they are of modules, and files are on a disk that its machines
    share, at the same path. A task whose machine is lost is done again on another.

    Raises:
        StageError: what a piece raises.
    """
    if not are_spread():
        yield from map(function, jobs)
        return
    from stages.shell.ray_cluster import connected

    ray = connected()
    remote, held, here = ray.remote(_run_piece), ray.put(function), str(Path.cwd())
    tasks = [remote.remote(held, job, here) for job in jobs]
    yield from (_get(ray, task) for task in tasks)


def _get(ray: Any, task: Any) -> Any:
    """The result of a task of a cluster."""
    try:
        return ray.get(task)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None


def _run_piece(function: Callable[[Any], Any], job: Any, directory: str) -> Any:
    """What a task does: `function` of `job`, whose paths are relative to `directory`."""
    os.chdir(directory)
    return function(job)


_NUM_JOBS_ALONE = 4  # that this process does by itself before it starts others, which takes as long
_JOBS_AHEAD = 2  # for each process, so that none waits for the next, and no more are in memory


class Workers:
    """Processes for the pieces of a stage: those of a cluster, or as many of this machine as it has cores.

    While there are few pieces, and until the processes are there, this process does them.
    """

    def __init__(self, num_processes: int | None = None) -> None:
        """
        Args:
            num_processes: None: as many as this process may use cores.
        """
        self._num_processes = num_processes or len(os.sched_getaffinity(0))
        self._num_jobs = 0
        self._pool: ProcessPoolExecutor | None = None
        self._first: Future[None] | None = None
        self._ray: Any = None
        if are_spread():
            from stages.shell.ray_cluster import connected

            self._ray = connected()
            self._num_processes = max(1, int(self._ray.cluster_resources().get("CPU", 1)))

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def map(self, function: Callable[[_Job], _Result], jobs: Iterable[_Job]) -> Iterator[_Result]:
        """`function` of each job, in order; function, jobs and results are pickled.

        Raises:
            Exception: what `function` raises, or what comes in place of a job, when all that comes before it is done.
        """
        remaining, waiting, failure = iter(jobs), deque[Callable[[], _Result]](), None
        more = True
        while more or waiting:
            if not more or len(waiting) >= self._num_ahead():
                with _explained():
                    result = waiting.popleft()()
                yield result
                continue
            try:
                job = next(remaining)
            except StopIteration:
                more = False
            except Exception as error:
                more, failure = False, error
            else:
                with _explained():
                    waiting.append(self._start(function, job))
        if failure is not None:
            raise failure

    def _num_ahead(self) -> int:
        """Jobs that wait for their results to be taken, at most."""
        return _JOBS_AHEAD * self._num_processes if self._ray is not None or self._are_ready() else 1

    def _are_ready(self) -> bool:
        """Whether another process waits for jobs."""
        return self._first is not None and self._first.done()

    def _start(self, function: Callable[[_Job], _Result], job: _Job) -> Callable[[], _Result]:
        """What waits for the result of a job."""
        self._num_jobs += 1
        if self._ray is not None:
            task = self._ray.remote(_run_piece).remote(function, job, str(Path.cwd()))
            return functools.partial(_get, self._ray, task)
        if self._num_processes > 1 and self._num_jobs > _NUM_JOBS_ALONE and self._pool is None:
            # Not forked: Arrow has threads.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._num_processes, context, _begin_worker, (function,))
            self._first, *_ = [self._pool.submit(_do_nothing) for _ in range(self._num_processes)]  # a process each
        if self._pool is None or not self._are_ready():
            return functools.partial(function, job)
        return self._pool.submit(function, job).result


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Raise StageError where a process was killed."""
    try:
        yield
    except BrokenProcessPool:
        raise StageError(
            "a process that this stage started was killed, for want of memory perhaps: run it on a machine with more"
        ) from None


def _do_nothing() -> None:
    """A job that shows that there is a process."""


def _begin_worker(_: Callable[..., Any]) -> None:
    """Leave Ctrl-C to the process that started this one, and end with it.

    Given the function of the first job, so that what it needs is imported before the process counts as ready.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.set_threshold(100_000, 20, 20)  # as in the process that started it
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=[parent.sentinel], daemon=True).start()


def _end_after(sentinel: int) -> None:
    with contextlib.suppress(OSError):
        wait([sentinel])
    os._exit(1)
