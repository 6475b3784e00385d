"""Communication between the processes of a stage; in a single process, these functions return their input.

stages/launch/torchrun.py or another launcher gives each process its rank through torch's environment variables (RANK,
WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT).
"""

from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

_Value = TypeVar("_Value")


def get_rank() -> int:
    """Return the rank of this process; rank 0 writes the outputs."""
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    """Return the number of processes that work together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def wait_for_all() -> None:
    """Wait until every process has called this function."""
    if dist.is_initialized():
        dist.barrier()


def broadcast_from_first(value: _Value) -> _Value:
    """Return the value of process 0 in every process; the value must be picklable."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    return values[0]


def gather_from_all(value: _Value) -> list[_Value]:
    """Return the values of all processes, by rank, in every process; the values must be picklable."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * get_world_size()
    dist.all_gather_object(values, value)
    return values


def sum_over_processes(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Add up the arrays of all processes, element by element.

    Args:
        values: float64, of the same shape in every process.

    Returns:
        float64 of that shape, in every process.
    """
    if not dist.is_initialized():
        return values
    total = torch.from_numpy(values.copy())
    dist.all_reduce(total)
    return total.numpy()


def max_over_processes(values: list[int]) -> list[int]:
    """Return the element-wise maximum of the processes' lists, which have the same length, in every process."""
    if not dist.is_initialized():
        return values
    maxima = torch.tensor(values)
    dist.all_reduce(maxima, dist.ReduceOp.MAX)
    return [int(value) for value in maxima]
