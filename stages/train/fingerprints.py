"""Fingerprints of a training run: hashes of its inputs, config, code, libraries and environment."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from stages.core.artifacts import compute_sha256, get_versions
from stages.core.environment import read_collective_settings
from stages.core.source_code import hash_code
from stages.train.checkpoints import compute_fingerprint

if TYPE_CHECKING:
    from stages.train.stage import TrainConfig

# Arguments that determine the steps of a run only through the learning rates and the numbers of steps between events.
_SCHEDULE_ARGUMENTS = {
    *("lr_scheduler_kwargs", "lr_scheduler_type", "max_steps", "warmup_ratio", "warmup_steps"),
    *("eval_steps", "logging_steps", "save_steps"),
}


def compute_run_fingerprint(config: "TrainConfig") -> str:
    """Compute the fingerprint of a run.

    Output paths and the frequency of checkpoints do not count, since they do not change the result.
    """
    return _compute_fingerprint(config, _collect_values(config))


def compute_branch_fingerprint(config: "TrainConfig", resolved: Mapping[str, int]) -> str:
    """Compute a hash of everything that determines a step of a run, except the schedule of the learning rate.

    Args:
        resolved: numbers of steps that may depend on the length of the run, such as the interval of evaluations.
    """
    from stages.model.precision import describe_processor, read_cpu_model

    values = _collect_values(config)
    del values["num_train_epochs"]
    values["trainer"] = {name: value for name, value in config.trainer.items() if name not in _SCHEDULE_ARGUMENTS}
    values["resolved"] = dict(resolved)
    # Libraries choose their kernels by more properties of a CPU than the description in ledgers has.
    values["processor"] = [describe_processor(config.hardware.device), read_cpu_model()]
    return _compute_fingerprint(config, values)


def _collect_values(config: "TrainConfig") -> dict[str, Any]:
    """Return the values of `config` and of the environment that determine the result."""
    from stages.model.processes import get_world_size

    values: dict[str, Any] = TypeAdapter(type(config)).dump_python(config)
    for key in ("checkpoints", "tokens", "blocks", "out", "report"):
        del values[key]
    for launcher in (values["hardware"]["launch"], values["hardware"]["ray"]):
        for key in ("rendezvous", "started_by", "max_failures", "storage"):
            (launcher or {}).pop(key, None)
    values["processes"] = config.hardware.num_processes or get_world_size()  # None: one per GPU
    values["libraries"] = get_versions(*import_framework(config).list_libraries(config))
    values["start"] = hash_start_model(config)
    values["environment"] = read_collective_settings()
    return values


def _compute_fingerprint(config: "TrainConfig", values: dict[str, Any]) -> str:
    # The ledgers contain the checksums of the blocks, which are verified when the blocks are read.
    ledgers = [Path(config.tokens) / "stats.json", *sorted(Path(config.blocks).rglob("*.json"))]
    return compute_fingerprint(values, ledgers, hash_code(f"train-{config.framework.name}"))


def hash_start_model(config: "TrainConfig") -> dict[str, str]:
    """Map each file of the start model to its SHA-256; empty if config.start is None."""
    return (
        {}
        if config.start is None
        else {file.name: compute_sha256(file) for file in sorted(Path(config.start).iterdir())}
    )


def import_framework(config: "TrainConfig") -> Any:
    """Import the package of the chosen framework. The libraries of the other frameworks need not be installed."""
    return importlib.import_module(f"stages.frameworks.{config.framework.name}")
