"""The schema of conf/hardware."""

from typing import Annotated, Literal

from pydantic import Field

from stages.config import Positive, whole


@whole
class Hardware:
    device: Literal["cpu", "cuda", "mps"]
    """Where the model is trained and evaluated, as torch names it."""
    num_threads: Positive
    """Threads of a process on the CPU."""
    per_device_batch_size: Positive | None
    """Sequences at once on a device; null: the whole batch_size. Less means gradient accumulation."""
    evaluate_batch_tokens: Positive
    """Tokens at once in evaluation; changes no figure."""


@whole
class CheckpointSettings:
    """What a killed training goes on from; changes no result."""

    minutes: Annotated[float, Field(gt=0.0)]
    """Between two checkpoints."""
    keep: Positive
    """Checkpoints kept of a run that is not finished; the best one stays as well where it is asked for."""
