"""Numbers of optimizer steps, and the distribution of a step's sequences over processes and forward passes."""

import math
from typing import TYPE_CHECKING

from stages.model.hardware import Hardware

if TYPE_CHECKING:
    from stages.train.stage import TrainConfig


def split_batch(batch_size: int, hardware: Hardware, num_processes: int) -> tuple[int, int]:
    """Return the micro-batch size of each process and the number of gradient accumulation steps.

    Args:
        batch_size: sequences per optimizer step.
        num_processes: number of processes that share a batch.

    Raises:
        ValueError: if batch_size is not a multiple of the sequences that all processes take per forward pass.
    """
    micro_batch_size = hardware.per_device_batch_size
    divisor = num_processes * (micro_batch_size or 1)
    if batch_size % divisor:
        names = (
            [f"{num_processes} processes (hardware.{'ray' if hardware.ray else 'launch'})"] if num_processes > 1 else []
        )
        names += [f"{micro_batch_size} sequences (hardware.per_device_batch_size)"] if micro_batch_size else []
        valid_sizes = [divisor * (batch_size // divisor + extra) for extra in (0, 1)]
        raise ValueError(
            f"batch_size={batch_size} is not a multiple of {divisor}, for {' of '.join(names)}; set it to"
            f" {' or '.join(str(size) for size in valid_sizes if size)}"
        )
    share = batch_size // num_processes
    return micro_batch_size or share, share // (micro_batch_size or share)


def count_steps_per_epoch(config: "TrainConfig", num_blocks: int) -> int:
    """Return the number of optimizer steps in a pass over `num_blocks` training blocks."""
    return max(1, math.ceil(num_blocks / config.batch_size))


def count_steps(config: "TrainConfig", num_blocks: int) -> int:
    """Return the number of optimizer steps of a training; an upper bound with early stopping."""
    steps = [int(config.trainer["max_steps"])] if config.trainer.get("max_steps", -1) != -1 else []
    if config.num_train_epochs is not None:
        steps.append(math.ceil(config.num_train_epochs * count_steps_per_epoch(config, num_blocks)))
    return min(steps)


def count_schedule_steps(config: "TrainConfig", num_blocks: int) -> int:
    """Return the number of steps that the schedule of the learning rate spans; training may end earlier."""
    max_steps = int(config.trainer.get("max_steps", -1))
    return count_steps(config, num_blocks) if max_steps == -1 else max_steps
