"""Pieces of preprocessing: one after the other here, or as tasks of a Ray cluster.

Where they are done changes no byte, so it is no part of a configuration: LM_REPRO_PREPROCESSING=ray says it.
"""

import os
from collections.abc import Callable, Iterator, Sequence
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
    for task in tasks:
        try:
            yield ray.get(task)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None


def _run_piece(function: Callable[[Any], Any], job: Any, directory: str) -> Any:
    """What a task does: `function` of `job`, whose paths are relative to `directory`."""
    os.chdir(directory)
    return function(job)
