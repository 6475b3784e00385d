"""Stage `train@TASK`: blocks -> a trained model, through transformers' Trainer or Keras.

Reads   data/blocks/TASK/{train,validation}/, data/tokens/TASK/tokenizer/, the model's pinned checkpoint if it has one,
        models/START/ if the task starts from the model of another task
Writes  models/TASK/ (save_pretrained: config, safetensors, tokenizer), reports/train/TASK/ (curves, a ledger)
Command python -m stages.train task=causal
"""

import contextlib
import importlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import Field, ValidationInfo, field_validator

from stages.core.artifacts import (
    Blocks,
    check_output_path,
    get_versions,
    read_json,
    write_directory,
    write_json,
)
from stages.core.config import Positive, Seed, config_view
from stages.core.errors import StageError
from stages.core.pins import get_pin
from stages.launch.torchrun import run_in_processes
from stages.model.hardware import Hardware
from stages.model.lean_import import import_lean
from stages.model.schema import Adapter, Model, ObjectiveConfig, check_isolation, check_task, check_within_positions
from stages.shell.interruption import defer_signals
from stages.tokens.vocabulary import Vocabulary, export_tokenizer
from stages.train.batches import split_batch
from stages.train.checkpoints import LIBRARIES, lock_checkpoint_directory
from stages.train.fingerprints import compute_run_fingerprint, hash_start_model, import_framework
from stages.train.plan import log_against_plan
from stages.train.saving import add_adapter, compute_probe_loss, list_saved_files, save_model, verify_saved_model
from stages.train.schema import CheckpointSettings, EarlyStopping, Framework
from stages.train.trainer_arguments import find_argument_problems
from stages.train.watchers import read_tracker_names

if TYPE_CHECKING:
    from transformers import TrainerState

    from stages.model.objectives import Objective

log = logging.getLogger(__name__)


@config_view
class TrainConfig:
    model: Model
    adapter: Adapter | None
    """Settings of low-rank adapters; null: all weights are trained."""
    objective: ObjectiveConfig
    hardware: Hardware
    checkpoints: CheckpointSettings
    trainer: dict[str, Any]
    """Arguments of transformers.TrainingArguments, by name."""
    early_stopping: EarlyStopping | None
    """When to stop if the validation metric does not improve; null: never."""
    seed: Seed
    """Seed of the initial weights, the order of the blocks, dropout and masks."""
    block_size: Positive
    """Tokens per training sequence."""
    learning_rate: Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
    """Peak learning rate; trainer.lr_scheduler_type sets how it changes."""
    num_train_epochs: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None
    """Passes over the training blocks, may be fractional; null: trainer.max_steps sets the length of training. If both
    are set, training ends at the earlier one, and the schedule of the learning rate spans trainer.max_steps."""
    batch_size: Positive
    """Sequences per optimizer step, on any hardware."""
    start: str | None
    """Directory of a trained model to continue from; null: training begins with `model`."""
    tokens: str
    """Output directory of tokenize, for its tokenizer."""
    blocks: str
    """Output directory of group_texts."""
    out: str
    """Directory for the trained model."""
    report: str
    """Directory for the training curves."""
    framework: Framework

    # Each rule validates the last field that it needs: pydantic then reports all problems, and none hides another.

    @field_validator("adapter")
    @classmethod
    def _check_adapter(cls, adapter: Adapter | None, info: ValidationInfo) -> Adapter | None:
        model = info.data.get("model")
        if adapter is not None and not adapter.merge and model is not None and model.from_scratch:
            raise ValueError(
                "adapter.merge=false needs a pretrained base model: set adapter.merge: true for a model from scratch"
            )
        return adapter

    @field_validator("objective")
    @classmethod
    def _check_objective(cls, objective: ObjectiveConfig, info: ValidationInfo) -> ObjectiveConfig:
        model = info.data.get("model")
        if model is not None:
            check_task(model, objective.name)
            check_isolation(objective, model.config.get("model_type"))
        return objective

    @field_validator("checkpoints")
    @classmethod
    def _check_checkpoints(cls, checkpoints: CheckpointSettings, info: ValidationInfo) -> CheckpointSettings:
        hardware = info.data.get("hardware")
        if checkpoints.keep_for_branches is not None and hardware is not None and hardware.ray is not None:
            raise ValueError(
                "checkpoints.keep_for_branches is not supported with hardware.ray, which has its own storage: set null"
            )
        return checkpoints

    @field_validator("trainer")
    @classmethod
    def _check_trainer(cls, trainer: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        hardware = info.data.get("hardware")
        found = find_argument_problems(trainer, hardware and hardware.device)
        found += _find_sharding_problems(trainer, hardware, info.data.get("adapter"))
        evaluating, saving = trainer.get("eval_strategy", "no"), trainer.get("save_strategy", "no")
        if trainer.get("load_best_model_at_end") is True and (evaluating != saving or evaluating == "no"):
            found.append(
                "trainer.load_best_model_at_end needs the same save_strategy and eval_strategy (epoch or steps)"
            )
        if found:
            raise ValueError("\n".join(found))
        return trainer

    @field_validator("early_stopping")
    @classmethod
    def _check_early_stopping(cls, early_stopping: EarlyStopping | None, info: ValidationInfo) -> EarlyStopping | None:
        if early_stopping is not None and info.data.get("trainer", {}).get("load_best_model_at_end") is not True:
            raise ValueError("early_stopping needs trainer.load_best_model_at_end: true")
        return early_stopping

    @field_validator("num_train_epochs")
    @classmethod
    def _check_num_train_epochs(cls, num_train_epochs: float | None, info: ValidationInfo) -> float | None:
        max_steps = info.data.get("trainer", {}).get("max_steps", -1)
        if num_train_epochs is None and max_steps == -1:
            raise ValueError("num_train_epochs=null: set a number, or set trainer.max_steps (conf/task)")
        return num_train_epochs

    @field_validator("block_size")
    @classmethod
    def _check_block_size(cls, block_size: int, info: ValidationInfo) -> int:
        model, objective = info.data.get("model"), info.data.get("objective")
        if objective is not None and objective.name == "causal" and block_size < 2:
            raise ValueError("block_size=1: a causal model predicts a token from those before it: set 2 or more")
        if model is not None:
            check_within_positions("block_size", block_size, model.max_positions)
        return block_size

    @field_validator("batch_size")
    @classmethod
    def _check_batch_size(cls, batch_size: int, info: ValidationInfo) -> int:
        hardware = info.data.get("hardware")
        if hardware is not None and hardware.num_processes is not None:
            split_batch(batch_size, hardware, hardware.num_processes)
        return batch_size

    @field_validator("start")
    @classmethod
    def _check_start(cls, start: str | None, info: ValidationInfo) -> str | None:
        adapter = info.data.get("adapter")
        if start is not None and adapter is not None and not adapter.merge:
            raise ValueError(
                f"adapter.merge=false needs a pinned base model, but {start} changes with its task: set"
                " adapter.merge: true, or pin that model (python -m tools.pin_model)"
            )
        return start

    @field_validator("framework")
    @classmethod
    def _check_framework(cls, framework: Framework, info: ValidationInfo) -> Framework:
        if framework.name == "keras":
            # Imported by name, so that these rules are part of the code of train under Keras only.
            rules = importlib.import_module(f"stages.frameworks.{framework.name}.rules")
            if found := list(rules.find_config_problems(info.data)):
                raise ValueError("\n".join(f"framework=keras: {reason}" for reason in found))
        return framework


def _find_sharding_problems(
    trainer: dict[str, Any], hardware: Hardware | None, adapter: Adapter | None
) -> Iterator[str]:
    """Yield a message for each setting that prevents trainer.fsdp."""
    if not trainer.get("fsdp") or hardware is None:
        return
    if hardware.device != "cuda":
        yield (
            f"trainer.fsdp needs GPUs, but hardware.device is {hardware.device}, where Accelerate silently trains whole"
            " copies: set hardware=multi_cpu to train whole copies"
        )
    if hardware.launch is None and hardware.ray is None:
        yield "trainer.fsdp needs several processes: set hardware.launch or hardware.ray"
    if adapter is not None:
        yield "trainer.fsdp shards all weights, but an adapter trains few: set adapter=none or hardware=multi_gpu"


def main(config: TrainConfig) -> None:
    check_output_path(config.out, list_saved_files(config.adapter))  # before training, which may take hours
    check_output_path(config.report, ["stats.json"])
    read_tracker_names()
    run_in_processes("train", train, config, _reserve_checkpoint_name)


class PreparedTraining(NamedTuple):
    """Everything that a framework needs to train."""

    framework: Any
    """Package of the framework."""
    model: Any
    objective: "Objective"
    training: Blocks
    validation: Blocks
    use_cache: bool | None
    """Value that the model's configuration had before training; None: it has no such setting."""


def prepare_training(config: TrainConfig) -> PreparedTraining:
    """Build the initial model and open the blocks, as each process of the stage does before training.

    Raises:
        StageError: if the blocks or the model do not fit the config.
    """
    if config.trainer.get("torch_compile") is not True:
        import_lean(config.hardware, config.model.attention, trainer=True, adapter=config.adapter is not None)
    from stages.model.block_loss import check_predictions
    from stages.model.models import prepare_torch
    from stages.model.objectives import make_objective
    from stages.model.start import build_start_model

    framework = import_framework(config)
    framework.prepare_framework(config)
    prepare_torch(config.hardware)
    tokens, blocks = Path(config.tokens), Path(config.blocks)
    vocabulary = Vocabulary.read(tokens)
    model = build_start_model(config.model, config.start, tokens, config.seed)
    use_cache = getattr(model.config, "use_cache", None)
    if config.adapter is not None:
        model = add_adapter(model, config.adapter, config.model, config.seed)
    objective = make_objective(config.objective.name, vocabulary, config.objective, model)
    training, validation = Blocks(blocks / "train"), Blocks(blocks / "validation")
    if training.block_size != config.block_size:
        raise StageError(
            f"block_size={config.block_size}: the blocks in {blocks} have {training.block_size} tokens each"
        )
    check_predictions(objective, validation)
    log.info("%d blocks of %d tokens, %d per step", len(training), training.block_size, config.batch_size)
    return PreparedTraining(framework, model, objective, training, validation, use_cache)


def train(config: TrainConfig) -> None:
    """Do the work of one process of the stage."""
    framework, model, objective, training, validation, use_cache = prepare_training(config)
    from stages.model.processes import get_rank, wait_for_all
    from stages.train.live import remove_live_curves

    with _open_checkpoints(config) as directory:
        resumes = Path(directory).exists()
        with defer_signals() as request:
            model, state, state_chain = framework.fit(
                config, model, objective, training, validation, directory, request
            )
        if not get_rank():
            write_outputs(config, model, state, state_chain, len(training), use_cache, objective, validation)
            remove_live_curves(config.report)
        wait_for_all()
    log.info("%d steps -> %s", state.global_step, config.out)
    if not get_rank() and not resumes:
        log_against_plan(Path(directory).name)


@contextlib.contextmanager
def _open_checkpoints(config: TrainConfig) -> Iterator[str]:
    """Yield the directory of the run's checkpoints.

    All processes share it, except with Ray: each process then has its own directory, and Ray combines their parts.
    """
    from stages.model.processes import broadcast_from_first, get_rank

    if config.hardware.ray is not None:
        from stages.launch.ray import copy_reported_checkpoints

        with copy_reported_checkpoints() as directory:
            yield directory
    else:
        is_first = get_rank() == 0
        locked = lock_checkpoint_directory(compute_run_fingerprint(config)) if is_first else contextlib.nullcontext()
        with locked as directory:
            yield broadcast_from_first(str(directory))


@contextlib.contextmanager
def _reserve_checkpoint_name(config: TrainConfig) -> Iterator[str]:
    """Yield a name for the run that is stable across restarts; no other process can use it until the block ends."""
    with lock_checkpoint_directory(compute_run_fingerprint(config)) as directory:
        yield directory.name


def write_outputs(
    config: TrainConfig,
    model: Any,
    state: "TrainerState",
    state_chain: list[str],
    num_blocks: int,
    use_cache: bool | None,
    objective: "Objective",
    validation: Blocks,
) -> None:
    """Write the model and the curves; verify the written model on blocks of `validation`.

    Args:
        state_chain: link of each step; empty if the framework does not compute them.
        num_blocks: number of training blocks.
        use_cache: the value that the model's configuration had before training; None: it has no such setting.
    """
    from stages.train.state_chain import write_state_chain

    loss = compute_probe_loss(model, objective, validation)  # before the adapter is merged into the weights
    with write_directory(config.out, list_saved_files(config.adapter)) as directory:
        write_model(config, model, use_cache, directory)
        verify_saved_model(directory, config.model.task, loss, objective, validation)
    with write_directory(config.report, ["stats.json"]) as directory:
        write_curves(state.log_history, directory)
        if state_chain:
            write_state_chain(directory, state_chain)
        write_json(directory / "stats.json", build_ledger(config, state, num_blocks))


def write_model(config: TrainConfig, model: Any, use_cache: bool | None, directory: Path) -> None:
    """Write a trained model and its tokenizer into `directory`.

    Args:
        use_cache: the value that the model's configuration had before training; None: it has no such setting.
    """
    if use_cache is not None:
        model.config.use_cache = use_cache  # the Trainer disables it, which would make generation slow
    save_model(model, config.adapter, config.model, directory)
    tokens, special = Path(config.tokens), Vocabulary.read(config.tokens).special
    chat_template = read_json(tokens / "stats.json").get("chat_template")  # only for documents with prompts
    export_tokenizer(tokens / "tokenizer", directory, special, config.model.max_positions, chat_template)


def write_curves(history: list[dict[str, float]], directory: Path) -> None:
    """Write the curves of the Trainer's log history for `dvc plots`, through DVCLive."""
    from dvclive import Live

    with Live(dir=str(directory), dvcyaml=None, save_dvc_exp=False, report=None, monitor_system=False) as live:
        for entry in history:
            live.step = int(entry["step"])
            for name in ("loss", "learning_rate", "grad_norm"):
                if name in entry:
                    live.log_metric(f"train/{name}", float(entry[name]))
            if "eval_loss" in entry:
                live.log_metric("validation/loss", float(entry["eval_loss"]))


def build_ledger(config: TrainConfig, state: "TrainerState", num_blocks: int) -> dict[str, Any]:
    """Build the ledger: inputs and progress of the training, and nothing that differs between two equal runs."""
    from stages.model.precision import describe_processor

    return {
        "model": get_pin(config.model),  # null: built from its config
        "from_scratch": config.model.from_scratch and config.start is None,
        "start": config.start and {"task": Path(config.start).name, "files": hash_start_model(config)},
        "blocks": num_blocks,
        "steps": state.global_step,
        "epochs": state.epoch,
        "best_step": state.best_global_step,
        "best_validation_loss": state.best_metric,
        "processor": describe_processor(config.hardware.device),  # another one may give other last digits
        "versions": get_versions(*LIBRARIES, *import_framework(config).list_libraries(config)),
    }
