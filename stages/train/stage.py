"""Stage `train@TASK`: blocks -> a trained model, through transformers' Trainer or Keras.

Reads   data/blocks/TASK/{train,validation}/, data/tokens/TASK/tokenizer/, the model's pinned checkpoint if it has one
Writes  models/TASK/ (save_pretrained: config, safetensors, tokenizer), reports/train/TASK/ (curves, a ledger)
Command python -m stages.train task=causal
"""

import contextlib
import importlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, TypeAdapter, ValidationInfo, field_validator

from stages.core.artifacts import Blocks, check_out, staged, versions, write_json
from stages.core.config import Positive, Seed, part
from stages.core.environment import settings_of_collectives
from stages.core.errors import StageError
from stages.core.pins import pinned_origin
from stages.core.source_code import hash_code
from stages.launch.torchrun import run_in_processes
from stages.model.hardware import Hardware
from stages.model.lean_import import import_lean
from stages.model.schema import Adapter, Model, ObjectiveConfig, check_isolation, check_task
from stages.shell.interruption import signals_as_request
from stages.tokens.vocabulary import Vocabulary, export_tokenizer
from stages.train.batches import batches
from stages.train.checkpoints import LIBRARIES, checkpoint_directory, fingerprint
from stages.train.framework import Framework, keras_refusals
from stages.train.plan import log_against_plan
from stages.train.saving import add_adapter, probe_loss, save_model, saved_files, verify_saved
from stages.train.schema import CheckpointSettings, EarlyStopping
from stages.train.trainer_arguments import problems
from stages.train.watchers import chosen_trackers

if TYPE_CHECKING:
    from transformers import TrainerState

    from stages.model.objectives import Objective

log = logging.getLogger(__name__)


@part
class TrainConfig:
    model: Model
    adapter: Adapter | None
    """Null: all weights are trained."""
    objective: ObjectiveConfig
    hardware: Hardware
    checkpoints: CheckpointSettings
    trainer: dict[str, Any]
    """transformers.TrainingArguments by their own names."""
    early_stopping: EarlyStopping | None
    """Stop when validation stops improving; null: never."""
    seed: Seed
    """Of initial weights, order, dropout and masks."""
    block_size: Positive
    """Tokens in a training sequence."""
    learning_rate: Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
    """Of AdamW at its highest; trainer.lr_scheduler_type says how it falls."""
    num_train_epochs: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None
    """Passes over the training blocks; may be a fraction; null: trainer.max_steps says how long training is."""
    batch_size: Positive
    """Sequences in an optimizer step, whatever the hardware."""
    tokens: str
    """Directory of tokenize, for its tokenizer."""
    blocks: str
    """Directory of group_texts."""
    out: str
    """Directory of the model to write."""
    report: str
    """Directory of the curves to write."""
    framework: Framework

    # Each rule belongs to the last field that it needs, so that one mistake does not hide another.

    @field_validator("adapter")
    @classmethod
    def _has_a_model(cls, adapter: Adapter | None, info: ValidationInfo) -> Adapter | None:
        model = info.data.get("model")
        if adapter is not None and not adapter.merge and model is not None and model.from_scratch:
            raise ValueError("adapter.merge=false needs a pretrained model, which can be had again, to be added to")
        return adapter

    @field_validator("objective")
    @classmethod
    def _is_the_models(cls, objective: ObjectiveConfig, info: ValidationInfo) -> ObjectiveConfig:
        model = info.data.get("model")
        if model is not None:
            check_task(model, objective.name)
            check_isolation(objective, model.config.get("model_type"))
        return objective

    @field_validator("trainer")
    @classmethod
    def _are_arguments(cls, trainer: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        hardware = info.data.get("hardware")
        found = problems(trainer, hardware and hardware.device)
        found += _sharding_problems(trainer, hardware, info.data.get("adapter"))
        evaluating, saving = trainer.get("eval_strategy", "no"), trainer.get("save_strategy", "no")
        if trainer.get("load_best_model_at_end") is True and (evaluating != saving or evaluating == "no"):
            found.append("trainer.load_best_model_at_end needs save_strategy and eval_strategy alike (epoch or steps)")
        if found:
            raise ValueError("\n".join(found))
        return trainer

    @field_validator("early_stopping")
    @classmethod
    def _knows_the_best(cls, early_stopping: EarlyStopping | None, info: ValidationInfo) -> EarlyStopping | None:
        if early_stopping is not None and info.data.get("trainer", {}).get("load_best_model_at_end") is not True:
            raise ValueError("early_stopping needs trainer.load_best_model_at_end: true")
        return early_stopping

    @field_validator("num_train_epochs")
    @classmethod
    def _is_the_only_length(cls, num_train_epochs: float | None, info: ValidationInfo) -> float | None:
        max_steps = info.data.get("trainer", {}).get("max_steps", -1)
        if num_train_epochs is None and max_steps == -1:
            raise ValueError("num_train_epochs=null: give a number, or set trainer.max_steps (conf/task)")
        if num_train_epochs is not None and max_steps != -1:
            raise ValueError(
                f"num_train_epochs={num_train_epochs:g} has no effect beside trainer.max_steps={max_steps}: set it to"
                " null, or take that out"
            )
        return num_train_epochs

    @field_validator("block_size")
    @classmethod
    def _fits_the_model(cls, block_size: int, info: ValidationInfo) -> int:
        model, objective = info.data.get("model"), info.data.get("objective")
        if objective is not None and objective.name == "causal" and block_size < 2:
            raise ValueError("block_size=1: a causal model predicts a token from those before it: set 2 or more")
        if model is not None and block_size > model.max_positions:
            raise ValueError(f"block_size={block_size} is above the model's positions, {model.max_positions}")
        return block_size

    @field_validator("batch_size")
    @classmethod
    def _divides(cls, batch_size: int, info: ValidationInfo) -> int:
        hardware = info.data.get("hardware")
        if hardware is not None and hardware.processes is not None:
            batches(batch_size, hardware, hardware.processes)
        return batch_size

    @field_validator("framework")
    @classmethod
    def _can_do_it(cls, framework: Framework, info: ValidationInfo) -> Framework:
        if framework.name == "keras" and (found := list(keras_refusals(info.data))):
            raise ValueError("\n".join(f"framework=keras: {reason}" for reason in found))
        return framework


def _sharding_problems(trainer: dict[str, Any], hardware: Hardware | None, adapter: Adapter | None) -> Iterator[str]:
    """Why a model cannot be sharded where trainer.fsdp asks for it."""
    if not trainer.get("fsdp") or hardware is None:
        return
    if hardware.device != "cuda":
        yield (
            f"trainer.fsdp needs GPUs, and hardware.device is {hardware.device}: there Accelerate trains whole copies"
            " without a word; hardware=multi_cpu does so openly"
        )
    if hardware.launch is None and hardware.ray is None:
        yield "trainer.fsdp needs several processes: hardware.launch or hardware.ray"
    if adapter is not None:
        yield "trainer.fsdp shards all weights, and an adapter trains a few: adapter=none, or hardware=multi_gpu"


def main(config: TrainConfig) -> None:
    check_out(config.out, saved_files(config.adapter))  # now rather than after hours
    check_out(config.report, ["stats.json"])
    chosen_trackers()
    run_in_processes("train", train, config, _checkpoint_name)


def train(config: TrainConfig) -> None:
    """The work of the stage, as one of the processes that do it does it."""
    if config.trainer.get("torch_compile") is not True:
        import_lean(config.hardware, config.model.attention, trainer=True, adapter=config.adapter is not None)
    from stages.model.block_loss import check_predictions
    from stages.model.models import build_model, prepare_torch
    from stages.model.objectives import make_objective
    from stages.model.processes import rank, wait_for_all
    from stages.train.live import remove_live_curves

    framework = _framework_of(config)
    framework.prepare(config)
    prepare_torch(config.hardware)
    tokens, blocks = Path(config.tokens), Path(config.blocks)
    vocabulary = Vocabulary.read(tokens)
    model = build_model(config.model, vocabulary, config.seed)
    use_cache = getattr(model.config, "use_cache", None)
    if config.adapter is not None:
        model = add_adapter(model, config.adapter, config.model, config.seed)
    objective = make_objective(config.objective.name, vocabulary, config.objective, model)
    training, validation = Blocks(blocks / "train"), Blocks(blocks / "validation")
    if training.block_size != config.block_size:
        raise StageError(
            f"block_size={config.block_size}: the blocks in {blocks} hold {training.block_size} tokens each"
        )
    check_predictions(objective, validation)
    log.info("%d blocks of %d tokens, %d per step", len(training), training.block_size, config.batch_size)
    with _checkpoints_of(config) as directory:
        resumes = Path(directory).exists()
        with signals_as_request() as request:
            model, state = framework.fit(config, model, objective, training, validation, directory, request)
        if not rank():
            write(config, model, state, len(training), use_cache, objective, validation)
            remove_live_curves(config.report)
        wait_for_all()
    log.info("%d steps -> %s", state.global_step, config.out)
    if not rank() and not resumes:
        log_against_plan(Path(directory).name)


def _framework_of(config: TrainConfig) -> Any:
    """The package that trains, the chosen one alone: another's libraries may not be there."""
    return importlib.import_module(f"stages.frameworks.{config.framework.name}")


@contextlib.contextmanager
def _checkpoints_of(config: TrainConfig) -> Iterator[str]:
    """The directory of the run's checkpoints: of all its processes, or with Ray, which puts them together, of this."""
    from stages.model.processes import of_the_first, rank

    if config.hardware.ray is not None:
        from stages.launch.ray import own_checkpoints

        with own_checkpoints() as own:
            yield own
    else:
        with contextlib.nullcontext() if rank() else checkpoint_directory(name_of(config)) as mine:
            yield of_the_first(str(mine))


@contextlib.contextmanager
def _checkpoint_name(config: TrainConfig) -> Iterator[str]:
    """A name for the run that none other has meanwhile, and by which it is found again."""
    with checkpoint_directory(name_of(config)) as place:
        yield place.name


def name_of(config: TrainConfig) -> str:
    """The fingerprint of a run: what it reads and how, but not where it writes or how often it is saved."""
    from stages.model.processes import world_size

    values = TypeAdapter(TrainConfig).dump_python(config)
    for key in ("checkpoints", "tokens", "blocks", "out", "report"):
        del values[key]
    for started in (values["hardware"]["launch"], values["hardware"]["ray"]):
        for key in ("rendezvous", "started_by", "max_failures", "storage"):
            (started or {}).pop(key, None)
    values["processes"] = config.hardware.processes or world_size()  # where the config leaves it to the GPUs
    values["libraries"] = versions(*_framework_of(config).libraries(config))
    values["environment"] = settings_of_collectives()
    # The blocks by the checksums beside them, which are verified when they are read.
    ledgers = [Path(config.tokens) / "stats.json", *sorted(Path(config.blocks).rglob("*.json"))]
    return fingerprint(values, ledgers, hash_code(f"train-{config.framework.name}"))


def write(
    config: TrainConfig,
    model: Any,
    state: "TrainerState",
    num_blocks: int,
    use_cache: bool | None,
    objective: "Objective",
    validation: Blocks,
) -> None:
    """Write the model, verified on blocks of `validation`, and the curves."""
    if use_cache is not None:
        model.config.use_cache = use_cache  # the Trainer switches it off, which saved would make generation slow
    loss = probe_loss(model, objective, validation)  # before additions are merged into the weights
    with staged(config.out, saved_files(config.adapter)) as directory:
        save_model(model, config.adapter, config.model, directory)
        verify_saved(directory, config.model.task, loss, objective, validation)
        special = Vocabulary.read(config.tokens).special
        export_tokenizer(Path(config.tokens) / "tokenizer", directory, special, config.model.max_positions)
    with staged(config.report, ["stats.json"]) as directory:
        _write_curves(state.log_history, directory)
        write_json(directory / "stats.json", ledger(config, state, num_blocks))


def _write_curves(history: list[dict[str, float]], directory: Path) -> None:
    """Curves over steps of a log history as the Trainer keeps it, as `dvc plots` reads them, through DVCLive."""
    from dvclive import Live

    with Live(dir=str(directory), dvcyaml=None, save_dvc_exp=False, report=None, monitor_system=False) as live:
        for entry in history:
            live.step = int(entry["step"])
            for name in ("loss", "learning_rate", "grad_norm"):
                if name in entry:
                    live.log_metric(f"train/{name}", float(entry[name]))
            if "eval_loss" in entry:
                live.log_metric("validation/loss", float(entry["eval_loss"]))


def ledger(config: TrainConfig, state: "TrainerState", num_blocks: int) -> dict[str, Any]:
    """What training began with and saw; nothing that varies between two equal runs."""
    return {
        "model": pinned_origin(config.model),  # null: from its config alone
        "from_scratch": config.model.from_scratch,
        "blocks": num_blocks,
        "steps": state.global_step,
        "epochs": state.epoch,
        "best_step": state.best_global_step,
        "best_validation_loss": state.best_metric,
        "versions": versions(*LIBRARIES, *_framework_of(config).libraries(config)),
    }
