"""The schema of conf/hardware."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from stages.config import Positive, whole


@whole
class Launch:
    """Several processes, each with the weights and a share of every batch; train and evaluate run in them."""

    processes_per_machine: Positive | None
    """Processes on each machine; null: one a GPU."""
    machines: Positive
    """Machines, on each of which the stage's command is started."""
    rendezvous: str | None
    """HOST:PORT of one of the machines, where they find each other; null for one machine."""

    @model_validator(mode="after")
    def _meets_somewhere(self) -> "Launch":
        if self.machines > 1 and self.rendezvous is None:
            raise ValueError(f"launch.machines={self.machines} needs launch.rendezvous, HOST:PORT of one of them")
        return self


@whole
class Hardware:
    device: Literal["cpu", "cuda", "mps"]
    """Where the model is trained and evaluated, as torch names it."""
    num_threads: Positive
    """Threads of a process on the CPU."""
    per_device_batch_size: Positive | None
    """Sequences at once on a device; null: its share of batch_size. Less means gradient accumulation."""
    evaluate_batch_tokens: Positive
    """Tokens at once in evaluation, on a device; changes no figure."""
    launch: Launch | None = None
    """Null: one process."""


@whole
class CheckpointSettings:
    """What a killed training goes on from; changes no result."""

    minutes: Annotated[float, Field(gt=0.0)]
    """Between two checkpoints."""
    keep: Positive
    """Checkpoints kept of a run that is not finished; the best one stays as well where it is asked for."""
