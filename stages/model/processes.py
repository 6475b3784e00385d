"""What the processes that do one stage's work agree on; with one process, everything here does nothing.

Each learns who it is from torch's distributed environment contract (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR,
MASTER_PORT), which stages/launch/torchrun.py or another launcher sets.
"""

from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

_Value = TypeVar("_Value")


def rank() -> int:
    """Of this process, 0 for the one that writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Processes that do this work together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def wait_for_all() -> None:
    """Go on when every process has come here."""
    if dist.is_initialized():
        dist.barrier()


def of_the_first(value: _Value) -> _Value:
    """The value that the first process gives."""
    if not dist.is_initialized():
        return value
    held = [value]
    dist.broadcast_object_list(held, src=0, device=torch.device("cpu"))
    return held[0]


def of_all(value: _Value) -> list[_Value]:
    """The values that the processes give, the first one's first."""
    if not dist.is_initialized():
        return [value]
    held: list[Any] = [None] * world_size()
    dist.all_gather_object(held, value)
    return held


def summed(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The sums of the processes' float64 arrays of one shape, element by element."""
    if not dist.is_initialized():
        return values
    total = torch.from_numpy(values.copy())
    dist.all_reduce(total)
    return total.numpy()


def largest(values: list[int]) -> list[int]:
    """The largest of the processes' values, place by place."""
    if not dist.is_initialized():
        return values
    most = torch.tensor(values)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return [int(value) for value in most]
