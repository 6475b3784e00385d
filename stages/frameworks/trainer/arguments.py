"""TrainingArguments of a train config, and checks for values that the optimizer or schedule refuses or ignores."""

import copy
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainingArguments
from transformers.optimization import GreedyLR, get_scheduler

from stages.core.errors import StageError, format_cause, printable
from stages.train.trainer_arguments import DEFAULTS, MERGED, resolve_merged

if TYPE_CHECKING:
    from stages.train.stage import TrainConfig

_NUM_TRIED_STEPS = 100  # length of the schedule in checks
# Arguments that some optimizers or schedules ignore.
_OPTIMIZER_ARGUMENTS = (
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "optim_args",
    "optim_target_modules",
    "weight_decay",
)
_SCHEDULE_ARGUMENTS = ("lr_scheduler_kwargs", "warmup_steps")
# Arguments that a valid config may use even if this machine does not support them.
_DEVICE_ARGUMENTS = ("bf16", "fp16", "fsdp", "fsdp_config", "tf32")


def make_arguments(
    config: "TrainConfig", given: Mapping[str, Any], directory: str, micro_batch_size: int, accumulation_steps: int
) -> TrainingArguments:
    """Create the TrainingArguments of `config`, checked by `check_arguments`.

    Args:
        given: the arguments to use in place of the `trainer` section.
        directory: directory for checkpoints.
        micro_batch_size: sequences per forward pass and process.
        accumulation_steps: forward passes per optimizer step.

    Raises:
        StageError: if an argument is invalid, or would be ignored.
    """
    owned = {
        "output_dir": directory,
        "restore_callback_states_from_checkpoint": True,  # so that early stopping continues to count
        "seed": config.seed,
        "learning_rate": config.learning_rate,
        "per_device_train_batch_size": micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps,
        "remove_unused_columns": False,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": config.hardware.device == "cpu",
    }
    if config.num_train_epochs is not None:  # otherwise trainer.max_steps sets the length of training
        owned["num_train_epochs"] = config.num_train_epochs
    pinned = {"dataloader_pin_memory": config.hardware.device == "cuda"}
    try:
        arguments = TrainingArguments(**{**DEFAULTS, **pinned, **given, **owned})
    except Exception as error:  # transformers' checks raise different exceptions
        raise StageError(f"trainer: {format_cause(error)}") from None
    # With several GPUs, the Trainer would otherwise train on all of them in this process, with a batch for each.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    check_arguments(arguments, given)
    return arguments


def try_arguments(config: "TrainConfig") -> None:
    """Raise StageError if the `trainer` section of `config` is invalid on any machine; try it for a CPU."""
    given = {name: value for name, value in resolve_merged(config.trainer).items() if name not in _DEVICE_ARGUMENTS}
    on_cpu = copy.copy(config)
    on_cpu.hardware = copy.copy(config.hardware)
    on_cpu.hardware.device = "cpu"
    make_arguments(on_cpu, given, "unused", micro_batch_size=1, accumulation_steps=1)


def check_arguments(arguments: TrainingArguments, given: Mapping[str, Any]) -> None:
    """Raise StageError if the optimizer or schedule refuses one of `arguments`, or ignores one of `given`."""
    outcome = _try_optimizer(arguments)
    for name in (*_OPTIMIZER_ARGUMENTS, *_SCHEDULE_ARGUMENTS):
        default = TrainingArguments.__dataclass_fields__[name].default
        if given.get(name, default) in (default, None):
            continue
        without = copy.copy(arguments)
        setattr(without, name, default)
        try:
            ignored = _try_optimizer(without) == outcome
        except StageError:
            continue  # the optimizer or schedule requires it
        if ignored:
            by = "lr_scheduler_type" if name in _SCHEDULE_ARGUMENTS else "optim"
            value = getattr(arguments, by).value
            merged = "".join(f" (or {old})" for old, new in MERGED.items() if new == name)
            raise StageError(
                f"trainer.{name}={printable(repr(given[name]))}{merged}: trainer.{by}={value} ignores it: remove it"
            )


def _try_optimizer(arguments: TrainingArguments) -> list[Any]:
    """Create the optimizer and schedule for a model of one weight.

    Returns:
        The optimizer's settings and the learning rates of the first steps. They are equal for two sets of arguments
        that differ only in ignored ones.

    Raises:
        StageError: if the optimizer or schedule refuses the arguments.
    """
    toy = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False))
    name = arguments.optim.value
    try:
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(arguments, toy)
    except Exception as error:  # a missing library, invalid optim_args
        if "target modules" in str(error) and arguments.optim_target_modules:
            return [arguments.optim_target_modules]  # names of the model's layers, which the toy model lacks
        raise StageError(f"trainer.optim={name}: {format_cause(error)}") from None
    if not isinstance(optimizer_class, type) or options.keys() & {"model", "optimizer_dict", "params"}:
        return [str(options)]  # built from the model's layers
    groups = [{"params": list(toy.parameters()), "weight_decay": arguments.weight_decay}]
    try:
        optimizer = optimizer_class(groups, **options)
    except Exception as error:
        raise StageError(f"trainer.optim={name}: {format_cause(error)}") from None
    settings = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    return [settings, *_compute_learning_rates(arguments, optimizer)]


def _compute_learning_rates(arguments: TrainingArguments, optimizer: Any) -> Iterator[float]:
    """Yield the learning rates of the first steps.

    Raises:
        StageError: if the schedule refuses the arguments.
    """
    kind = arguments.lr_scheduler_type
    try:
        schedule: Any = get_scheduler(
            kind,
            optimizer,
            arguments.get_warmup_steps(_NUM_TRIED_STEPS),
            _NUM_TRIED_STEPS,
            arguments.lr_scheduler_kwargs,
        )
        needs_metric = isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau | GreedyLR)
        for _ in range(_NUM_TRIED_STEPS):
            yield optimizer.param_groups[0]["lr"]
            optimizer.step()  # no gradient: changes nothing, but without it the schedule would warn
            schedule.step(1.0) if needs_metric else schedule.step()
    except Exception as error:
        raise StageError(f"trainer.lr_scheduler_type={kind.value}: {format_cause(error)}") from None
