"""Replay of some steps of a training, for `python -m tools.verify --segments`."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from stages.core.artifacts import Blocks
from stages.core.errors import StageError
from stages.train.fingerprints import import_framework

if TYPE_CHECKING:
    from stages.train.stage import TrainConfig
    from stages.train.training import BlockTrainer


def list_kept_steps(config: "TrainConfig") -> list[int]:
    """Return the steps of a training whose checkpoints were kept, in ascending order.

    Raises:
        StageError: if the training cannot be replayed in parts.
    """
    _check_replayable(config)
    branches = import_framework(config).find_branches(config, len(Blocks(Path(config.blocks) / "train")))
    return [] if branches is None else branches.list_steps()


def replay_steps(config: "TrainConfig", first: int, last: int) -> list[str]:
    """Train from step `first` to step `last` again, and return the links of the state chain for these steps.

    Args:
        first: 0, or one of `list_kept_steps(config)`.

    Raises:
        StageError: if the training cannot be replayed in parts, or the kept checkpoint is damaged.
    """
    _check_replayable(config)
    from stages.train.stage import prepare_training

    prepared = prepare_training(config)
    with tempfile.TemporaryDirectory() as directory:
        trainer: BlockTrainer = prepared.framework.make_trainer(
            config, prepared.model, prepared.objective, prepared.training, prepared.validation, directory
        )
        return trainer.replay_steps(first, last)


def _check_replayable(config: "TrainConfig") -> None:
    if config.framework.name != "trainer":
        raise StageError(f"framework={config.framework.name} writes no state chain: verify the whole training (--all)")
    if config.hardware.launch is not None or config.hardware.ray is not None:
        raise StageError("a training in several processes cannot be replayed in parts: verify all of it (--all)")
