"""Experiment trackers that follow a training, through transformers' own callbacks.

They change no byte of a result: an error of a tracker ends the tracking and not the training, and the random numbers
that a tracker draws are not the training's.
"""

import copy
import logging
import os
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from stages.core.errors import StageError, printable
from stages.shell.cache import cache_directory

log = logging.getLogger(__name__)

_PROJECT = "lm-repro"
# With these, a tracker uploads weights, or registers hooks in the model that is trained.
_NOT_FOLLOWED = ("WANDB_LOG_MODEL", "WANDB_WATCH")
_SECRET = re.compile(r"KEY|TOKEN|PASSWORD|SECRET|CREDENTIAL")


class Tracker(TrainerCallback):  # type: ignore[misc]
    """Hands the start, the logs and the end of a training to the callback of a tracker, until that fails."""

    def __init__(self, tracker: str, run: str, fingerprint: str) -> None:
        """
        Args:
            run: the name of the run in the tracker.
            fingerprint: by which runs of one name are told apart, the same after a resumption.
        """
        self._tracker, self._run = tracker, run
        place: Any = cache_directory() / "tracking" / tracker
        place.mkdir(parents=True, exist_ok=True)
        _set_defaults(tracker, place)
        from transformers.integrations import get_reporting_integration_callbacks

        try:
            with own_random_numbers():
                (make,) = get_reporting_integration_callbacks(tracker)
                self._callback: Any = make()
        except Exception as error:  # whatever a library raises while it is imported
            raise StageError(f"LM_REPRO_TRACK={tracker}: it cannot be used: {without_secrets(error)}") from None
        if tracker == "tensorboard":
            if self._callback.logging_dir is None:  # TENSORBOARD_LOGGING_DIR
                directory = f"{re.sub(r'[^A-Za-z0-9._-]', '_', run)}-{fingerprint[:8]}"
                self._callback.logging_dir = str(place / directory)
            place = self._callback.logging_dir
        log.info("tracking with %s as %s (own files: %s)", tracker, printable(run), place)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        self._tell("on_train_begin", args, state, more)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        self._tell("on_log", args, state, more)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        self._tell("on_train_end", args, state, more)

    def _tell(self, event: str, args: TrainingArguments, state: TrainerState, more: dict[str, Any]) -> None:
        if self._callback is None:
            return
        shown = copy.copy(args)  # checkpoints hold the arguments themselves
        shown.run_name, shown.project = self._run, _PROJECT
        more = {**more, "logs": dict(more["logs"])} if more.get("logs") else more
        try:
            with own_random_numbers():
                getattr(self._callback, event)(shown, copy.copy(state), TrainerControl(), **more)
        except Exception as error:  # no network, no login, a full disk
            log.warning("%s fails (%s): training goes on without it", self._tracker, without_secrets(error))
            self._callback = None


def _set_defaults(tracker: str, place: Path) -> None:
    """Have a tracker keep its files in `place` and send nothing about its use, where no variable says otherwise."""
    defaults = {
        "trackio": {"TRACKIO_DIR": str(place)},
        "tensorboard": {},
        "wandb": {"WANDB_DIR": str(place), "WANDB_PROJECT": _PROJECT, "WANDB_SILENT": "true"},
        "mlflow": {
            "MLFLOW_TRACKING_URI": f"sqlite:///{(place / 'mlflow.db').absolute()}",
            "MLFLOW_EXPERIMENT_NAME": _PROJECT,
            "MLFLOW_DISABLE_TELEMETRY": "true",
        },
    }
    for name, value in defaults[tracker].items():
        os.environ.setdefault(name, value)
    for name in _NOT_FOLLOWED:
        if os.environ.pop(name, None) is not None:
            log.warning("%s is ignored: trackers get figures only", name)


@contextmanager
def own_random_numbers() -> Iterator[None]:
    """Within, random numbers can be drawn without a change of those that follow."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def without_secrets(error: Exception) -> str:
    """An error as text, without passwords in URLs and values of variables whose names tell that they are secret."""
    text = re.sub(r"//[^/\s@]*@", "//***@", f"{type(error).__name__}: {' '.join(str(error).split())}")
    for name, value in os.environ.items():
        if _SECRET.search(name.upper()) and len(value) >= 8:
            text = text.replace(value, "***")
    return printable(text)
