"""The schema of conf/hardware."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from stages.core.config import Positive, config_section
from stages.core.errors import StageError


@config_section
class Launch:
    """Several processes for train and evaluate, started by torch's launcher.

    Each process has a copy of the weights and computes its share of every batch.
    """

    processes_per_machine: Positive | None
    """Number of processes per machine; null: one per GPU."""
    machines: Positive
    """Number of machines; the command of the stage is started on each."""
    rendezvous: str | None
    """HOST:PORT of the machine at which all of them meet; null: this machine, which requires started_by."""
    started_by: list[str] | None = None
    """Words that, put before a command, run it on every machine (such as srun); null: the user runs it on each."""

    @field_validator("rendezvous")
    @classmethod
    def _check_rendezvous(cls, rendezvous: str | None) -> str | None:
        if rendezvous is not None:
            host, _, port = rendezvous.rpartition(":")
            if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
                raise ValueError(f"launch.rendezvous={rendezvous} should be HOST:PORT")
        return rendezvous

    @model_validator(mode="after")
    def _check_machines_can_meet(self) -> "Launch":
        if self.machines > 1 and self.rendezvous is None and not self.started_by:
            raise ValueError(
                f"launch.machines={self.machines} needs launch.rendezvous, the HOST:PORT of one of them, or started_by"
            )
        return self


@config_section
class RayTrain:
    """Several processes on a Ray cluster, started by Ray Train.

    Each process has a copy of the weights and computes its share of every batch.
    """

    workers: Positive
    """Number of processes; each gets num_threads CPUs, and one GPU if device is cuda."""
    max_failures: Annotated[int, Field(ge=0)]
    """Maximum number of restarts from the last checkpoint after a process is lost."""
    storage: str | None
    """Directory on a disk that the machines share, or an fsspec URL, for checkpoints; null: the cache directory."""


@config_section
class Hardware:
    device: Literal["cpu", "cuda", "mps"]
    """Device for training and evaluation, by its name in torch."""
    num_threads: Positive
    """Number of CPU threads per process."""
    per_device_batch_size: Positive | None
    """Sequences per forward pass on a device; null: its share of batch_size. Fewer means gradient accumulation."""
    evaluate_batch_tokens: Positive
    """Tokens per forward pass in evaluation, per device; changes no figure."""
    launch: Launch | None = None
    """Settings of torch's launcher; null: the stage runs in one process."""
    ray: RayTrain | None = None
    """Settings of Ray Train; null: the stage does not use Ray."""

    @model_validator(mode="after")
    def _check_single_launcher(self) -> "Hardware":
        if self.launch is not None and self.ray is not None:
            raise ValueError("hardware.launch and hardware.ray both start processes: set only one of them")
        return self

    @property
    def backend(self) -> str:
        """Communication backend of several processes, by its name in torch.distributed."""
        return "cpu:gloo,cuda:nccl" if self.device == "cuda" else "gloo"

    @property
    def num_processes(self) -> int | None:
        """Number of processes that work together; None: one per GPU."""
        if self.ray is not None:
            return self.ray.workers
        if self.launch is None:
            return 1
        per_machine = self.launch.processes_per_machine
        return None if per_machine is None else per_machine * self.launch.machines


def check_device(hardware: Hardware) -> None:
    """Raise StageError if torch finds no hardware.device on this machine."""
    import torch

    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available[hardware.device]:
        raise StageError(
            f"hardware.device={hardware.device}: torch finds no such device on this machine; use hardware=cpu"
        )
