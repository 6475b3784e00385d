"""Tasks: results in order, in this process unless a cluster is requested, and errors without a cluster."""

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest
from data_helpers import REPOSITORY

from stages.core.errors import StageError
from stages.shell import tasks
from stages.shell.tasks import Workers, run_jobs, uses_ray


def test_run_pieces_gives_the_results_in_order() -> None:
    assert list(run_jobs(str, [3, 1, 2])) == ["3", "1", "2"]


def test_run_pieces_raises_the_error_of_a_piece() -> None:
    with pytest.raises(ZeroDivisionError):
        list(run_jobs(lambda number: 1 // number, [1, 0]))


@pytest.mark.parametrize(("place", "spread"), [("", False), ("ray", True)])
def test_pieces_are_spread_where_the_environment_says_so(
    monkeypatch: pytest.MonkeyPatch, place: str, spread: bool
) -> None:
    monkeypatch.setenv("LM_REPRO_PREPROCESSING", place)
    assert uses_ray() is spread


def test_pieces_anywhere_else_are_an_error_that_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LM_REPRO_PREPROCESSING", "dask")
    with pytest.raises(StageError, match="LM_REPRO_PREPROCESSING=dask: set it to ray"):
        uses_ray()


def test_pieces_on_ray_without_it_are_an_error_that_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LM_REPRO_PREPROCESSING", "ray")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(StageError, match="Ray is not installed: `make ray`"):
        list(run_jobs(str, [1]))


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start other processes after few jobs."""
    monkeypatch.setattr(tasks, "_NUM_LOCAL_JOBS", 10)


def invert(number: int) -> tuple[float, int]:
    """The inverse of `number`, and the process that computed it."""
    return 1 / number, os.getpid()


def start(workers: Workers) -> list[tuple[float, int]]:
    """The results of jobs until another process has done one."""
    results = []
    for result in workers.map(invert, itertools.count(1)):
        results.append(result)
        if result[1] != os.getpid():
            return results
    raise AssertionError


def test_workers_give_the_results_in_order_and_start_processes_only_for_many_jobs() -> None:
    with Workers(2) as workers:
        few = list(workers.map(invert, range(1, 5)))
        many = start(workers)
        more = list(workers.map(invert, range(1, 41)))
    for results in (few, many, more):
        assert [inverse for inverse, _ in results] == [1 / number for number in range(1, len(results) + 1)]
    assert {process for _, process in few} == {os.getpid()}
    assert os.getpid() not in {process for _, process in more}


def test_workers_of_one_process_are_this_one() -> None:
    with Workers(1) as workers:
        assert {process for _, process in workers.map(invert, range(1, 41))} == {os.getpid()}


@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize("place", [0, 3, 30])
def test_workers_raise_the_first_error_behind_the_results_before_it(num_processes: int, place: int) -> None:
    jobs = [*range(1, place + 1), 0, *range(1, 30)]
    found = []
    with Workers(num_processes) as workers, pytest.raises(ZeroDivisionError):
        if num_processes > 1:
            start(workers)
        for inverse, _ in workers.map(invert, jobs):
            found.append(inverse)
    assert found == [1 / number for number in range(1, place + 1)]


@pytest.mark.parametrize("num_processes", [1, 2])
def test_workers_give_all_results_of_jobs_that_come_before_an_error(num_processes: int) -> None:
    def jobs() -> Iterator[int]:
        yield from range(1, 31)
        raise StageError("cut short")

    found = []
    with Workers(num_processes) as workers, pytest.raises(StageError, match="cut short"):
        if num_processes > 1:
            start(workers)
        for inverse, _ in workers.map(invert, jobs()):
            found.append(inverse)
    assert found == [1 / number for number in range(1, 31)]


def test_workers_take_jobs_only_as_far_as_needed() -> None:
    taken = []
    with Workers(2) as workers:
        start(workers)
        results = workers.map(invert, (taken.append(number) or number for number in range(1, 10**6)))
        for _ in range(60):
            next(results)
    assert 60 <= len(taken) < 70


def kill_this_process(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_workers_that_are_killed_are_an_error_that_says_so() -> None:
    with Workers(2) as workers, pytest.raises(StageError, match="a process of this stage was killed"):
        start(workers)
        list(workers.map(kill_this_process, range(9)))


def test_workers_end_with_the_process_that_started_them() -> None:
    code = (
        "import os, time\n"
        "from stages.shell.tasks import Workers\n"
        "if __name__ == '__main__':\n"
        "    workers = Workers(2)\n"
        "    list(workers.map(time.sleep, 60 * [0.1]))\n"
        "    print('started', flush=True)\n"
        "    time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "started\n"
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    process.kill()
    process.wait()
    gone, alive = psutil.wait_procs(children, timeout=30)
    assert not alive and len(gone) == len(children)
    process.stdout.close()
