"""Trains with transformers' Trainer."""

import copy
import os
from typing import TYPE_CHECKING, Any

from transformers import EarlyStoppingCallback, TrainerState

from stages.core.artifacts import Blocks
from stages.core.errors import StageError
from stages.frameworks.trainer.arguments import make_arguments
from stages.model.precision import check_bf16
from stages.model.processes import rank, world_size
from stages.shell.cache import cache_directory
from stages.shell.interruption import Request
from stages.train.batches import batches
from stages.train.trainer_arguments import resolve
from stages.train.training import BlockTrainer, TrainingProgress
from stages.train.watchers import watchers

if TYPE_CHECKING:
    from stages.train.stage import TrainConfig


def prepare(config: "TrainConfig") -> None:
    """Set what has to be set before a model is built.

    Raises:
        StageError: if this processor cannot do what `config` asks for.
    """
    check_bf16(config.hardware.device, config.trainer.get("bf16") is True)
    _keep_compiled()


def libraries(_: "TrainConfig") -> tuple[str, ...]:
    """The libraries that decide the result, beside those that decide it under every framework."""
    return ()


def fit(
    config: "TrainConfig",
    model: Any,
    objective: Any,
    train: Blocks,
    validation: Blocks,
    directory: str,
    request: Request,
) -> tuple[Any, TrainerState]:
    """The trained `model` and the record of its training, from the newest checkpoint in `directory` if there is one.

    Of a sharded model, the first process alone has it.

    Raises:
        Interrupted: when `request` asked for the end; a checkpoint has then been written.
    """
    sharded = bool(config.trainer.get("fsdp"))
    whole = copy.deepcopy(model) if sharded and not rank() else None
    trainer = make_trainer(config, model, objective, train, validation, directory)
    trainer.train_on(request)
    if not sharded:
        return trainer.model, trainer.state
    from stages.train.sharding import gathered

    return gathered(trainer.model, whole), trainer.state


def _keep_compiled() -> None:
    """Have torch.compile keep its work for the next run: half a minute for a small model."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_directory() / "inductor"))


def make_trainer(
    config: "TrainConfig", model: Any, objective: Any, train: Blocks, validation: Blocks, directory: str
) -> BlockTrainer:
    """The Trainer that `config` describes; its checkpoints stand in `directory`."""
    try:
        at_once, accumulation = batches(config.batch_size, config.hardware, world_size())
    except ValueError as error:
        raise StageError(str(error)) from None
    callbacks: list[Any] = [TrainingProgress(config.batch_size * config.block_size), *watchers(config, directory)]
    if config.early_stopping is not None:
        callbacks.append(EarlyStoppingCallback(config.early_stopping.patience, config.early_stopping.threshold))
    given = resolve(config.trainer)
    if given.get("fsdp"):
        from stages.train.sharding import Sharded, layers_of, without_twins

        callbacks.append(Sharded())
        model = without_twins(model)
        given["fsdp_config"] = {"transformer_layer_cls_to_wrap": layers_of(model), **(given.get("fsdp_config") or {})}
    if config.hardware.ray is not None:
        from stages.launch.ray import reporting

        callbacks.append(reporting())
    arguments = make_arguments(config, given, directory, at_once, accumulation)
    return BlockTrainer(
        model,
        arguments,
        objective,
        train,
        validation,
        config.hardware.evaluate_batch_tokens,
        config.checkpoints,
        callbacks,
        each_saves=config.hardware.ray is not None,
    )
