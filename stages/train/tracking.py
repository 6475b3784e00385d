"""Experiment trackers for training, through transformers' callbacks.

They do not change the result: an error of a tracker ends the tracking, but not the training, and a tracker does not
advance the random generators of the training.
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
from stages.shell.cache import get_cache_directory

log = logging.getLogger(__name__)

_PROJECT = "lm-repro"
# Variables that make a tracker upload weights, or register hooks in the model.
_IGNORED_VARIABLES = ("WANDB_LOG_MODEL", "WANDB_WATCH")
_SECRET_NAME = re.compile(r"KEY|TOKEN|PASSWORD|SECRET|CREDENTIAL")


class Tracker(TrainerCallback):  # type: ignore[misc]
    """Forwards the start, the logs and the end of a training to the callback of a tracker, until it fails."""

    def __init__(self, tracker: str, run: str, fingerprint: str) -> None:
        """
        Args:
            tracker: its name in transformers, one of TRACKERS.
            run: name of the run in the tracker.
            fingerprint: fingerprint of the run, to distinguish runs of the same name; unchanged after a resumption.
        """
        self._tracker, self._run = tracker, run
        place: Any = get_cache_directory() / "tracking" / tracker
        place.mkdir(parents=True, exist_ok=True)
        _set_defaults(tracker, place)
        from transformers.integrations import get_reporting_integration_callbacks

        try:
            with preserve_random_state():
                (make,) = get_reporting_integration_callbacks(tracker)
                self._callback: Any = make()
        except Exception as error:  # any error while a library is imported
            raise StageError(f"LM_REPRO_TRACK={tracker}: it cannot be used: {format_without_secrets(error)}") from None
        if tracker == "tensorboard":
            if self._callback.logging_dir is None:  # TENSORBOARD_LOGGING_DIR
                directory = f"{re.sub(r'[^A-Za-z0-9._-]', '_', run)}-{fingerprint[:8]}"
                self._callback.logging_dir = str(place / directory)
            place = self._callback.logging_dir
        log.info("tracking with %s as %s (local files: %s)", tracker, printable(run), place)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        self._forward_event("on_train_begin", args, state, more)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        self._forward_event("on_log", args, state, more)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        self._forward_event("on_train_end", args, state, more)

    def _forward_event(self, event: str, args: TrainingArguments, state: TrainerState, more: dict[str, Any]) -> None:
        if self._callback is None:
            return
        shown = copy.copy(args)  # checkpoints contain the original arguments
        shown.run_name, shown.project = self._run, _PROJECT
        more = {**more, "logs": dict(more["logs"])} if more.get("logs") else more
        try:
            with preserve_random_state():
                getattr(self._callback, event)(shown, copy.copy(state), TrainerControl(), **more)
        except Exception as error:  # no network, no login, a full disk
            log.warning("%s failed (%s): training continues without it", self._tracker, format_without_secrets(error))
            self._callback = None


def _set_defaults(tracker: str, directory: Path) -> None:
    """Make a tracker store its files in `directory` and send no telemetry, except where the user set the variable."""
    defaults = {
        "trackio": {"TRACKIO_DIR": str(directory)},
        "tensorboard": {},
        "wandb": {"WANDB_DIR": str(directory), "WANDB_PROJECT": _PROJECT, "WANDB_SILENT": "true"},
        "mlflow": {
            "MLFLOW_TRACKING_URI": f"sqlite:///{(directory / 'mlflow.db').absolute()}",
            "MLFLOW_EXPERIMENT_NAME": _PROJECT,
            "MLFLOW_DISABLE_TELEMETRY": "true",
        },
    }
    for name, value in defaults[tracker].items():
        os.environ.setdefault(name, value)
    for name in _IGNORED_VARIABLES:
        if os.environ.pop(name, None) is not None:
            log.warning("%s is ignored: trackers only get figures", name)


@contextmanager
def preserve_random_state() -> Iterator[None]:
    """Restore the state of the random generators of Python, numpy and torch at the end of the block."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def format_without_secrets(error: Exception) -> str:
    """Format an error without passwords in URLs and without the values of environment variables with secret names."""
    text = re.sub(r"//[^/\s@]*@", "//***@", f"{type(error).__name__}: {' '.join(str(error).split())}")
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name.upper()) and len(value) >= 8:
            text = text.replace(value, "***")
    return printable(text)
