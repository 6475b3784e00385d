"""Checkpoints kept after training, from which later runs that share their first steps continue.

Two runs share steps 1 to k if they agree in everything that determines these steps. Their learning rates until step k
must be equal, but the schedules may differ after it: more epochs under a constant learning rate, another decay, or an
earlier end. A kept checkpoint is therefore named by three parts: the fingerprint of the run without its schedule, the
step, and a hash of the learning rates of all steps until then.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerState, TrainingArguments
from transformers.optimization import get_scheduler
from transformers.trainer import TRAINER_STATE_NAME

from stages.core.errors import printable
from stages.shell.cache import get_cache_directory
from stages.train.batches import count_schedule_steps, count_steps, count_steps_per_epoch
from stages.train.checkpoints import Checkpoints, find_damage, link_or_copy, remove_path
from stages.train.fingerprints import compute_branch_fingerprint

if TYPE_CHECKING:
    from stages.train.stage import TrainConfig

log = logging.getLogger(__name__)

_BYTES_PER_GIGABYTE = 10**9
_ENTRY_NAME = re.compile(r"[0-9a-f]{32}-([1-9][0-9]{,17})-[0-9a-f]{16}")  # fingerprint, step, learning rates


def open_branches(config: "TrainConfig", arguments: TrainingArguments, num_blocks: int) -> "Branches | None":
    """Return the kept checkpoints that a run may continue from, or None if `config` does not keep any.

    Args:
        arguments: arguments of the run.
        num_blocks: number of training blocks.
    """
    settings = config.checkpoints.keep_for_branches
    if settings is None:
        return None
    num_steps, schedule_steps = count_steps(config, num_blocks), count_schedule_steps(config, num_blocks)
    rates = compute_learning_rates(arguments, num_steps, schedule_steps)
    if rates is None:
        log.warning(
            "checkpoints.keep_for_branches has no effect: with trainer.lr_scheduler_type=%s and trainer.optim=%s, the"
            " learning rate depends on more than the step",
            arguments.lr_scheduler_type.value,
            arguments.optim.value,
        )
        return None
    intervals = TrainerState()
    intervals.compute_steps(arguments, num_steps)  # those below 1 are a fraction of num_steps
    resolved = {
        "warmup_steps": arguments.get_warmup_steps(schedule_steps),  # some optimizers read it in addition
        "logging_steps": intervals.logging_steps,
        "eval_steps": intervals.eval_steps,
        "save_steps": intervals.save_steps,
    }
    return Branches(
        Path(os.environ.get("LM_REPRO_BRANCHES") or settings.directory or get_cache_directory() / "branches"),
        compute_branch_fingerprint(config, resolved),
        rates,
        count_steps_per_epoch(config, num_blocks),
        _choose_steps(rates, settings.every_steps, arguments, intervals),
        int(settings.gigabytes * _BYTES_PER_GIGABYTE),
    )


def compute_learning_rates(
    arguments: TrainingArguments, num_steps: int, schedule_steps: int
) -> npt.NDArray[np.float64] | None:
    """Compute the learning rate of each step, [num_steps] float64; None if it depends on more than the step.

    Args:
        schedule_steps: number of steps that the schedule spans.
    """
    if "layerwise" in arguments.optim.value:
        return None
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=arguments.learning_rate)
    schedule: Any = get_scheduler(
        arguments.lr_scheduler_type,
        optimizer,
        arguments.get_warmup_steps(schedule_steps),
        schedule_steps,
        arguments.lr_scheduler_kwargs,
    )
    if not isinstance(schedule, LambdaLR):
        return None
    (base,), (compute_factor,) = schedule.base_lrs, schedule.lr_lambdas
    return np.array([base * compute_factor(step) for step in range(num_steps)], dtype=np.float64)


def _choose_steps(
    rates: npt.NDArray[np.float64], every: int | None, arguments: TrainingArguments, intervals: TrainerState
) -> frozenset[int]:
    """Choose the steps whose checkpoints are kept: every `every` steps, where the decay begins, and the last one."""
    last = len(rates)
    steps = set(range(every, last, every)) if every is not None else set()
    peaks = np.flatnonzero(rates == rates.max())
    if len(peaks) > 1 and 0 < peaks[-1] < last - 1:
        steps.add(int(peaks[-1]) + 1)
    evaluates_extra = (
        arguments.eval_strategy == "steps" and last % intervals.eval_steps and last >= (arguments.eval_delay or 0)
    )
    if not evaluates_extra:  # a longer run does not evaluate after this step
        steps.add(last)
    return frozenset(steps)


class Branches:
    """Kept checkpoints of the runs that share their first steps with a run.

    Each is a directory that contains `checkpoint-STEP` and, if the run needs it at its end, the best checkpoint until
    then. Processes that share the directory may keep, use and remove checkpoints at the same time.
    """

    def __init__(
        self,
        directory: Path,
        fingerprint: str,
        rates: npt.NDArray[np.float64],
        steps_per_epoch: int,
        keep_steps: frozenset[int],
        max_bytes: int,
    ) -> None:
        """
        Args:
            directory: directory of all kept checkpoints.
            fingerprint: hash of everything that determines a step, except the schedule of the learning rate.
            rates: learning rate of each step of the run, [num_steps] float64.
            keep_steps: steps whose checkpoints to keep.
            max_bytes: maximum size of all kept checkpoints.
        """
        self.keep_steps = keep_steps
        self._directory, self._fingerprint, self._rates = directory, fingerprint, rates
        self._steps_per_epoch, self._max_bytes = steps_per_epoch, max_bytes

    def _get_entry(self, step: int) -> Path:
        digest = hashlib.sha256(self._rates[:step].tobytes()).hexdigest()[:16]
        return self._directory / f"{self._fingerprint}-{step}-{digest}"

    def list_steps(self) -> list[int]:
        """Return the steps of the kept checkpoints that the run can continue from, in ascending order."""
        num_steps = len(self._rates)
        names = (_ENTRY_NAME.fullmatch(path.name) for path in self._directory.glob(f"{self._fingerprint}-*"))
        steps = {int(name[1]) for name in names if name is not None}
        # The Trainer would train another step after the last one of a run that ends inside an epoch, and it would not
        # evaluate after the last step, unless the checkpoint has that evaluation.
        is_last_complete = num_steps % self._steps_per_epoch == 0 and num_steps in self.keep_steps
        return sorted(
            step
            for step in steps
            if (step < num_steps or (step == num_steps and is_last_complete)) and self._get_entry(step).is_dir()
        )

    def keep_checkpoint(self, checkpoints: Checkpoints, step: int, best: int | None) -> None:
        """Keep the checkpoint of `step`, and that of the step `best`; remove the least recently used ones.

        A failure, such as a full disk, is a warning, since training does not need the kept checkpoint.
        """
        try:
            with self._lock():
                if not (entry := self._get_entry(step)).is_dir():
                    self._add_entry(entry, [checkpoints.get_path(number) for number in {step, best or step}])
        except OSError as error:
            log.warning("the checkpoint of step %d is not kept for branches: %s", step, printable(error))

    def _add_entry(self, entry: Path, sources: list[Path]) -> None:
        sizes = {path: _measure_size(path) for path in self._list_entries()}
        size = sum(map(_measure_size, sources))
        if size > self._max_bytes:
            log.warning(
                "the checkpoint of %.3g gigabytes is not kept for branches: checkpoints.keep_for_branches.gigabytes is"
                " %.3g",
                size / _BYTES_PER_GIGABYTE,
                self._max_bytes / _BYTES_PER_GIGABYTE,
            )
            return
        for old in sorted(sizes, key=lambda path: path.stat().st_mtime):
            if sum(sizes.values()) + size <= self._max_bytes:
                break
            remove_path(old)
            del sizes[old]
        aside = self._directory / ".tmp"
        remove_path(aside)  # left by a run that was killed
        aside.mkdir()
        for source in sources:
            shutil.copytree(source, aside / source.name, copy_function=link_or_copy)
        aside.rename(entry)

    def fetch_checkpoint(self, checkpoints: Checkpoints, steps: Iterable[int]) -> int | None:
        """Copy the last intact one of the kept checkpoints of `steps` into `checkpoints`; remove damaged ones.

        Args:
            steps: some of `list_steps()`.

        Returns:
            The step of the checkpoint, or None if none is intact.
        """
        try:
            with self._lock():
                for step in sorted(steps, reverse=True):
                    entry = self._get_entry(step)
                    damage = _find_entry_damage(entry, step)
                    if damage is None:
                        for source in entry.iterdir():
                            checkpoints.add_checkpoint(source)
                        os.utime(entry)
                        return step
                    log.warning("the kept checkpoint of step %d is damaged (%s) and ignored", step, damage)
                    remove_path(entry)
        except OSError as error:
            log.warning("no kept checkpoint is used: %s", printable(error))
        return None

    def _list_entries(self) -> list[Path]:
        return [path for path in self._directory.iterdir() if path.is_dir() and not path.name.startswith(".")]

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        self._directory.mkdir(parents=True, exist_ok=True)
        with FileLock(self._directory / ".lock"):
            yield


def _find_entry_damage(entry: Path, step: int) -> str | None:
    """Describe the first problem of a kept checkpoint, or return None."""
    own = entry / f"checkpoint-{step}"
    if (damage := find_damage(own)) is not None:
        return damage
    best = json.loads((own / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["best_global_step"]
    return find_damage(entry / f"checkpoint-{best}") if best else None


def _measure_size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
