"""Training with transformers' Trainer."""

import copy
import importlib.metadata
import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transformers import EarlyStoppingCallback, TrainerState, TrainingArguments

from stages.core.artifacts import Blocks
from stages.core.errors import StageError
from stages.frameworks.trainer.arguments import make_arguments
from stages.model.precision import check_bf16
from stages.model.processes import get_rank, get_world_size
from stages.shell.cache import get_cache_directory
from stages.shell.interruption import StopRequest
from stages.train.batches import count_schedule_steps, count_steps, split_batch
from stages.train.branches import Branches, open_branches
from stages.train.trainer_arguments import resolve_merged
from stages.train.training import BlockTrainer, TrainingProgress
from stages.train.watchers import create_watchers

if TYPE_CHECKING:
    from stages.train.stage import TrainConfig


_OPTIONAL_LIBRARIES = {
    "apollo-torch": r"apollo_",
    "bitsandbytes": r"(?!adamw_torch).*(8bit|32bit|bnb|ademamix)",
    "flash-attn": r"flash_attention",
    "galore-torch": r"galore_",
    "grokadamw": r"grokadamw",
    "lomo-optim": r"(ada)?lomo",
    "schedulefree": r"schedule_free_",
    "torch-optimi": r"stable_adamw",
    "torchao": r"adamw_torch_[48]bit",
    "torchdistx": r"adamw_anyprecision",
}
"""Library that transformers imports for some values of trainer.optim or model.attention, to the beginning of these."""


def prepare_framework(config: "TrainConfig") -> None:
    """Check bf16 support, and set the cache directory of torch.compile, before a model is built.

    Raises:
        StageError: if the processor does not support bf16 and `config` uses it.
    """
    check_bf16(config.hardware.device, config.trainer.get("bf16") is True)
    _set_compile_cache()


def list_libraries(config: "TrainConfig") -> tuple[str, ...]:
    """Return the libraries that determine the result of some configs only; without those that are not installed."""
    chosen = (str(config.trainer.get("optim")), str(config.model.attention))
    return tuple(
        library
        for library, pattern in _OPTIONAL_LIBRARIES.items()
        if any(re.match(pattern, value) for value in chosen) and any(importlib.metadata.distributions(name=library))
    )


def fit(
    config: "TrainConfig",
    model: Any,
    objective: Any,
    train: Blocks,
    validation: Blocks,
    directory: str,
    request: StopRequest,
) -> tuple[Any, TrainerState, list[str]]:
    """Train `model`, from the newest checkpoint in `directory` if there is one.

    Returns:
        The trained model, the state and history of its training, and its state chain. Of a sharded model, only process
        0 gets the trained weights.

    Raises:
        Interrupted: if a stop was requested; a checkpoint has then been written.
    """
    sharded = bool(config.trainer.get("fsdp"))
    unsharded = copy.deepcopy(model) if sharded and not get_rank() else None
    watchers = create_watchers(config, directory)
    trainer = make_trainer(config, model, objective, train, validation, directory, watchers)
    trainer.train_or_resume(request)
    model = trainer.model
    if sharded:
        from stages.train.sharding import gather_weights

        model = gather_weights(model, unsharded)
    return model, trainer.state, trainer.state_chain.links


def _set_compile_cache() -> None:
    """Make torch.compile cache its output on disk, which saves the next run half a minute for a small model."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(get_cache_directory() / "inductor"))


def find_branches(config: "TrainConfig", num_blocks: int) -> Branches | None:
    """Return the kept checkpoints that a run of `config` may continue from, without a model or data.

    Args:
        num_blocks: number of training blocks.

    Returns:
        None if `config` keeps no checkpoints.

    Raises:
        StageError: if an argument is invalid on this machine.
    """
    num_processes = config.hardware.num_processes or get_world_size()
    arguments = _make_split_arguments(config, resolve_merged(config.trainer), "unused", num_processes)
    return open_branches(config, arguments, num_blocks)


def _make_split_arguments(
    config: "TrainConfig", given: Mapping[str, Any], directory: str, num_processes: int
) -> TrainingArguments:
    """Split the batch over `num_processes`, and create the TrainingArguments as `make_arguments` does."""
    try:
        micro_batch_size, accumulation_steps = split_batch(config.batch_size, config.hardware, num_processes)
    except ValueError as error:
        raise StageError(str(error)) from None
    return make_arguments(config, given, directory, micro_batch_size, accumulation_steps)


def make_trainer(
    config: "TrainConfig",
    model: Any,
    objective: Any,
    train: Blocks,
    validation: Blocks,
    directory: str,
    watchers: Sequence[Any] = (),
) -> BlockTrainer:
    """Create the Trainer that `config` describes, with its checkpoints in `directory`.

    Args:
        watchers: callbacks that show the training.
    """
    callbacks: list[Any] = [TrainingProgress(config.batch_size * config.block_size), *watchers]
    if config.early_stopping is not None:
        callbacks.append(EarlyStoppingCallback(config.early_stopping.patience, config.early_stopping.threshold))
    given = resolve_merged(config.trainer)
    if given.get("fsdp"):
        from stages.train.sharding import ShardingCheck, find_layers_to_shard, remove_duplicate_bias

        callbacks.append(ShardingCheck())
        model = remove_duplicate_bias(model)
        given["fsdp_config"] = {
            "transformer_layer_cls_to_wrap": find_layers_to_shard(model),
            **(given.get("fsdp_config") or {}),
        }
    if config.hardware.ray is not None:
        from stages.launch.ray import create_report_callback

        callbacks.append(create_report_callback())
    arguments = _make_split_arguments(config, given, directory, get_world_size())
    if config.num_train_epochs is not None and arguments.max_steps != -1:
        arguments.max_steps = count_steps(config, len(train))
    return BlockTrainer(
        model,
        arguments,
        objective,
        train,
        validation,
        config.hardware.evaluate_batch_tokens,
        config.checkpoints,
        callbacks,
        saves_per_process=config.hardware.ray is not None,
        branches=open_branches(config, arguments, len(train)),
        schedule_steps=count_schedule_steps(config, len(train)),
    )
