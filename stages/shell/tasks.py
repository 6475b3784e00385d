"""Jobs of preprocessing: run in processes of this machine, or as tasks of a Ray cluster.

The place changes no byte of the result, so it is not part of the configuration: LM_REPRO_PREPROCESSING=ray chooses Ray.
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

_VARIABLE = "LM_REPRO_PREPROCESSING"


def uses_ray() -> bool:
    """Return True if jobs are tasks of a Ray cluster."""
    place = os.environ.get(_VARIABLE, "")
    if place not in ("", "ray"):
        raise StageError(f"{_VARIABLE}={place}: set it to ray, or unset it")
    return bool(place)


def connect_workers() -> None:
    """Connect to the Ray cluster if LM_REPRO_PREPROCESSING=ray.

    Raises:
        StageError: if there is no cluster, or the variable has another value.
    """
    if uses_ray():
        from stages.shell.ray_cluster import connect_to_cluster

        connect_to_cluster()


def run_jobs(function: Callable[[_Job], _Result], jobs: Sequence[_Job]) -> Iterator[_Result]:
    """Yield `function(job)` for each job, in order.

    On a cluster, function and jobs are pickled, so they must be defined in modules, and files must be on a disk that
    all machines share under the same path. If a machine is lost, another one repeats its task.

    Raises:
        StageError: if a job raises it.
    """
    if not uses_ray():
        yield from map(function, jobs)
        return
    from stages.shell.ray_cluster import connect_to_cluster

    ray = connect_to_cluster()
    remote, shared, directory = ray.remote(_run_job), ray.put(function), str(Path.cwd())
    tasks = [remote.remote(shared, job, directory) for job in jobs]
    yield from (_get_result(ray, task) for task in tasks)


def _get_result(ray: Any, task: Any) -> Any:
    """Return the result of a Ray task, or raise its error."""
    try:
        return ray.get(task)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None


def _run_job(function: Callable[[Any], Any], job: Any, directory: str) -> Any:
    """Return `function(job)`, run in `directory`, to which the paths of `job` are relative."""
    os.chdir(directory)
    return function(job)


_NUM_LOCAL_JOBS = 4  # run in this process before others are started; starting them takes as long
_JOBS_PER_PROCESS = 2  # submitted ahead, so that no process is idle; more would take memory


class Workers:
    """Worker processes for the jobs of a stage: of a Ray cluster, or one per core of this machine.

    A few jobs, and all jobs until the workers have started, run in this process.
    """

    def __init__(self, num_processes: int | None = None) -> None:
        """
        Args:
            num_processes: None: one per core that this process may use.
        """
        self._num_processes = num_processes or len(os.sched_getaffinity(0))
        self._num_jobs = 0
        self._pool: ProcessPoolExecutor | None = None
        self._first: Future[None] | None = None
        self._ray: Any = None
        if uses_ray():
            from stages.shell.ray_cluster import connect_to_cluster

            self._ray = connect_to_cluster()
            self._num_processes = max(1, int(self._ray.cluster_resources().get("CPU", 1)))

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def map(self, function: Callable[[_Job], _Result], jobs: Iterable[_Job]) -> Iterator[_Result]:
        """Yield `function(job)` for each job, in order. Function, jobs and results are pickled.

        Raises:
            Exception: an error of `function` or of the iterator `jobs`, after the results of all earlier jobs.
        """
        remaining, pending, failure = iter(jobs), deque[Callable[[], _Result]](), None
        has_more = True
        while has_more or pending:
            if not has_more or len(pending) >= self._count_allowed_pending():
                with _explain_broken_pool():
                    result = pending.popleft()()
                yield result
                continue
            try:
                job = next(remaining)
            except StopIteration:
                has_more = False
            except Exception as error:
                has_more, failure = False, error
            else:
                with _explain_broken_pool():
                    pending.append(self._submit(function, job))
        if failure is not None:
            raise failure

    def _count_allowed_pending(self) -> int:
        """Return the largest number of jobs whose results are not consumed yet."""
        return _JOBS_PER_PROCESS * self._num_processes if self._ray is not None or self._has_ready_process() else 1

    def _has_ready_process(self) -> bool:
        """Return True if another process is ready for jobs."""
        return self._first is not None and self._first.done()

    def _submit(self, function: Callable[[_Job], _Result], job: _Job) -> Callable[[], _Result]:
        """Submit a job and return a function that waits for its result."""
        self._num_jobs += 1
        if self._ray is not None:
            task = self._ray.remote(_run_job).remote(function, job, str(Path.cwd()))
            return functools.partial(_get_result, self._ray, task)
        if self._num_processes > 1 and self._num_jobs > _NUM_LOCAL_JOBS and self._pool is None:
            # Spawned, since a fork is unsafe with the threads of Arrow.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._num_processes, context, _init_worker, (function,))
            self._first, *_ = [self._pool.submit(_do_nothing) for _ in range(self._num_processes)]  # one per process
        if self._pool is None or not self._has_ready_process():
            return functools.partial(function, job)
        return self._pool.submit(function, job).result


@contextlib.contextmanager
def _explain_broken_pool() -> Iterator[None]:
    """Raise StageError if a process of the pool was killed."""
    try:
        yield
    except BrokenProcessPool:
        raise StageError(
            "a process of this stage was killed, perhaps for lack of memory: run it on a machine with more memory"
        ) from None


def _do_nothing() -> None:
    """Do nothing: a job that completes once its process is ready."""


def _init_worker(_: Callable[..., Any]) -> None:
    """Ignore Ctrl-C, which the parent process handles, and end with the parent.

    The argument is the function of the first job: unpickling it imports its module before the process counts as ready.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.set_threshold(100_000, 20, 20)  # as in the parent process
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_with_parent, args=[parent.sentinel], daemon=True).start()


def _exit_with_parent(sentinel: int) -> None:
    with contextlib.suppress(OSError):
        wait([sentinel])
    os._exit(1)
