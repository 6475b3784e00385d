"""Callbacks that show a running training: its live curves, and the trackers listed in LM_REPRO_TRACK.

They do not change the result, so they are not part of the configuration.
"""

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.core.artifacts import lock_handle
from stages.core.errors import StageError, printable

if TYPE_CHECKING:
    from stages.train.stage import TrainConfig

TRACKERS = ("trackio", "tensorboard", "wandb", "mlflow")


def read_tracker_names() -> list[str]:
    """Read the names of the trackers from LM_REPRO_TRACK, separated by commas.

    Raises:
        StageError: if one is unknown or not installed.
    """
    names = list(
        dict.fromkeys(name.strip() for name in os.environ.get("LM_REPRO_TRACK", "").split(",") if name.strip())
    )
    for name in names:
        if name not in TRACKERS:
            raise StageError(f"LM_REPRO_TRACK={printable(name)}: choose one or more of {', '.join(TRACKERS)}")
        if importlib.util.find_spec(name) is None:
            raise StageError(f"LM_REPRO_TRACK={name}: the package {name} is not installed: run `uv pip install {name}`")
    return names


def create_watchers(config: "TrainConfig", directory: str) -> list[Any]:
    """Create the callbacks for the live curves and each chosen tracker; an empty list except in process 0.

    Args:
        directory: directory of the run's checkpoints; its name is the fingerprint of the run.

    Raises:
        StageError: if a tracker cannot be used.
    """
    from stages.model.processes import get_rank

    if get_rank():
        return []
    from stages.train.live import LiveCurves

    callbacks: list[Any] = [LiveCurves(config.report)]
    if names := read_tracker_names():
        from stages.train.tracking import Tracker

        callbacks += [Tracker(name, get_run_name(config), Path(directory).name) for name in names]
    return callbacks


def get_run_name(config: "TrainConfig") -> str:
    """Return the name of a run in a tracker: its task, followed by the name of its DVC experiment, if any."""
    return "-".join([Path(config.tokens).name, *filter(None, [os.environ.get("DVC_EXP_NAME")])])


def is_running(directory: Path) -> bool:
    """Return True if the training that writes the live curves in `directory` is running on this machine."""
    try:
        handle = os.open(directory, os.O_RDONLY)
    except OSError:
        return False
    try:
        lock_handle(handle)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False
