"""The schema of conf/hardware."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from stages.core.config import Positive, whole
from stages.core.errors import StageError


@whole
class Launch:
    """Several processes, each with the weights and a share of every batch; train and evaluate run in them."""

    processes_per_machine: Positive | None
    """Processes on each machine; null: one a GPU."""
    machines: Positive
    """Machines, on each of which the stage's command is started."""
    rendezvous: str | None
    """HOST:PORT of one of the machines, where they find each other; null: this one, where started_by starts them."""
    started_by: list[str] | None = None
    """Words before a command that start it on every machine (srun's); null: it is started by hand on each."""

    @field_validator("rendezvous")
    @classmethod
    def _is_a_place(cls, rendezvous: str | None) -> str | None:
        if rendezvous is not None:
            host, _, port = rendezvous.rpartition(":")
            if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
                raise ValueError(f"launch.rendezvous={rendezvous} should be HOST:PORT")
        return rendezvous

    @model_validator(mode="after")
    def _meets_somewhere(self) -> "Launch":
        if self.machines > 1 and self.rendezvous is None and not self.started_by:
            raise ValueError(
                f"launch.machines={self.machines} needs launch.rendezvous, HOST:PORT of one of them, or started_by"
            )
        return self


@whole
class RayTrain:
    """Several processes of a Ray cluster, each with the weights and a share of every batch."""

    workers: Positive
    """Processes, each with num_threads CPUs, and a GPU where device is cuda."""
    max_failures: Annotated[int, Field(ge=0)]
    """Times that they start anew from the last checkpoint when one is lost."""
    storage: str | None
    """Where checkpoints are kept, on a disk that the machines share or at any fsspec URL; null: the cache directory."""


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
    """Processes by torch's own launcher; null: one."""
    ray: RayTrain | None = None
    """Processes by Ray Train."""

    @model_validator(mode="after")
    def _has_one_launcher(self) -> "Hardware":
        if self.launch is not None and self.ray is not None:
            raise ValueError("hardware.launch and hardware.ray both start processes: give one")
        return self

    @property
    def backend(self) -> str:
        """What several processes talk by, as torch.distributed names it."""
        return "cpu:gloo,cuda:nccl" if self.device == "cuda" else "gloo"

    @property
    def processes(self) -> int | None:
        """How many work together; None: as many as there are GPUs."""
        if self.ray is not None:
            return self.ray.workers
        if self.launch is None:
            return 1
        here = self.launch.processes_per_machine
        return None if here is None else here * self.launch.machines


def find_device(hardware: Hardware) -> None:
    """Raise StageError if torch finds no hardware.device here."""
    import torch

    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available[hardware.device]:
        raise StageError(f"hardware.device={hardware.device}: torch finds no such device here; use hardware=cpu")
