"""What shows a training while it runs: its live curves, and the trackers that LM_REPRO_TRACK names.

None of it changes a byte of a result, so it is no part of a configuration.
"""

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.core.artifacts import lock
from stages.core.errors import StageError, printable

if TYPE_CHECKING:
    from stages.train.stage import TrainConfig

TRACKERS = ("trackio", "tensorboard", "wandb", "mlflow")


def chosen_trackers() -> list[str]:
    """The trackers that LM_REPRO_TRACK names, separated by commas.

    Raises:
        StageError: if one is unknown or not installed.
    """
    names = list(
        dict.fromkeys(name.strip() for name in os.environ.get("LM_REPRO_TRACK", "").split(",") if name.strip())
    )
    for name in names:
        if name not in TRACKERS:
            raise StageError(f"LM_REPRO_TRACK={printable(name)}: it should be one or more of {', '.join(TRACKERS)}")
        if importlib.util.find_spec(name) is None:
            raise StageError(f"LM_REPRO_TRACK={name}: the package {name} is not installed: run `uv pip install {name}`")
    return names


def watchers(config: "TrainConfig", directory: str) -> list[Any]:
    """Callbacks for the live curves and for each chosen tracker; none in a process that is not the first.

    Args:
        directory: of the run's checkpoints; its name is the fingerprint of the run.

    Raises:
        StageError: if a tracker cannot be used.
    """
    from stages.model.processes import rank

    if rank():
        return []
    from stages.train.live import LiveCurves

    callbacks: list[Any] = [LiveCurves(config.report)]
    if names := chosen_trackers():
        from stages.train.tracking import Tracker

        callbacks += [Tracker(name, run_name(config), Path(directory).name) for name in names]
    return callbacks


def run_name(config: "TrainConfig") -> str:
    """The name of a run in a tracker: its task, and that of DVC's experiment if it has one."""
    return "-".join([Path(config.tokens).name, *filter(None, [os.environ.get("DVC_EXP_NAME")])])


def is_running(directory: Path) -> bool:
    """Whether the training that writes the live curves in `directory` runs, on this machine."""
    try:
        handle = os.open(directory, os.O_RDONLY)
    except OSError:
        return False
    try:
        lock(handle)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False
