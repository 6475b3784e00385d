"""TrainingArguments of a train config, and what they, the optimizer and the schedule refuse or would ignore."""

import copy
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainingArguments
from transformers.optimization import GreedyLR, get_scheduler

from stages.core.errors import StageError, printable
from stages.train.trainer_arguments import DEFAULTS, MERGED, resolve

if TYPE_CHECKING:
    from stages.train.stage import TrainConfig

_STEPS = 100  # of the schedule that is tried
# Arguments that some optimizers or schedules do not take.
_OF_OPTIMIZER = ("adam_beta1", "adam_beta2", "adam_epsilon", "optim_args", "optim_target_modules", "weight_decay")
_OF_SCHEDULE = ("lr_scheduler_kwargs", "warmup_steps")
# What this machine need not be able to do for a config to be right.
_OF_DEVICE = ("bf16", "fp16", "fsdp", "fsdp_config", "tf32")


def make_arguments(
    config: "TrainConfig", given: Mapping[str, Any], directory: str, at_once: int, accumulation: int
) -> TrainingArguments:
    """The arguments that `config` describes, with `given` for its `trainer` section, checked by `check_arguments`.

    Args:
        directory: where checkpoints go.
        at_once: sequences at once in a process.
        accumulation: such batches in an optimizer step.
    """
    owned = {
        "output_dir": directory,
        "restore_callback_states_from_checkpoint": True,  # early stopping goes on counting
        "seed": config.seed,
        "learning_rate": config.learning_rate,
        "per_device_train_batch_size": at_once,
        "gradient_accumulation_steps": accumulation,
        "remove_unused_columns": False,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": config.hardware.device == "cpu",
    }
    if config.num_train_epochs is not None:  # where trainer.max_steps does not say how long training is
        owned["num_train_epochs"] = config.num_train_epochs
    pinned = {"dataloader_pin_memory": config.hardware.device == "cuda"}
    try:
        arguments = TrainingArguments(**{**DEFAULTS, **pinned, **given, **owned})
    except Exception as error:  # each rule of transformers' raises what it likes
        raise StageError(f"trainer: {_words(error)}") from None
    check_arguments(arguments, given)
    return arguments


def try_arguments(config: "TrainConfig") -> None:
    """Raise StageError if training by `config` would be refused for its `trainer` section, wherever it is to run."""
    given = {name: value for name, value in resolve(config.trainer).items() if name not in _OF_DEVICE}
    here = copy.copy(config)
    here.hardware = copy.copy(config.hardware)
    here.hardware.device = "cpu"
    make_arguments(here, given, "unused", at_once=1, accumulation=1)


def check_arguments(arguments: TrainingArguments, given: Mapping[str, Any]) -> None:
    """Raise StageError if the optimizer or the schedule refuses one of `arguments`, or would ignore one of `given`."""
    outcome = _try(arguments)
    for name in (*_OF_OPTIMIZER, *_OF_SCHEDULE):
        default = TrainingArguments.__dataclass_fields__[name].default
        if given.get(name, default) in (default, None):
            continue
        without = copy.copy(arguments)
        setattr(without, name, default)
        try:
            ignored = _try(without) == outcome
        except StageError:
            continue  # not taken without it
        if ignored:
            by = "lr_scheduler_type" if name in _OF_SCHEDULE else "optim"
            value = getattr(arguments, by).value
            merged = "".join(f" (or {old})" for old, new in MERGED.items() if new == name)
            raise StageError(
                f"trainer.{name}={printable(repr(given[name]))}{merged}: trainer.{by}={value} makes no use of it:"
                " take it out"
            )


def _try(arguments: TrainingArguments) -> list[Any]:
    """What an optimizer of one weight is made with, and its learning rates: equal where nothing else differs."""
    toy = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False))
    name = arguments.optim.value
    try:
        make, options = Trainer.get_optimizer_cls_and_kwargs(arguments, toy)
    except Exception as error:  # a library that is not installed, a wrong optim_args
        if "target modules" in str(error) and arguments.optim_target_modules:
            return [arguments.optim_target_modules]  # of the model's own layers, which the toy has not
        raise StageError(f"trainer.optim={name}: {_words(error)}") from None
    if not isinstance(make, type) or options.keys() & {"model", "optimizer_dict", "params"}:
        return [str(options)]  # made of the model's layers
    groups = [{"params": list(toy.parameters()), "weight_decay": arguments.weight_decay}]
    try:
        optimizer = make(groups, **options)
    except Exception as error:
        raise StageError(f"trainer.optim={name}: {_words(error)}") from None
    settings = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    return [settings, *_rates(arguments, optimizer)]


def _rates(arguments: TrainingArguments, optimizer: Any) -> Iterator[float]:
    """The learning rates of the first steps."""
    kind = arguments.lr_scheduler_type
    try:
        schedule: Any = get_scheduler(
            kind, optimizer, arguments.get_warmup_steps(_STEPS), _STEPS, arguments.lr_scheduler_kwargs
        )
        measured = isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau | GreedyLR)
        for _ in range(_STEPS):
            yield optimizer.param_groups[0]["lr"]
            optimizer.step()  # of a weight without a gradient: a schedule warns where none came before it
            schedule.step(1.0) if measured else schedule.step()
    except Exception as error:
        raise StageError(f"trainer.lr_scheduler_type={kind.value}: {_words(error)}") from None


def _words(error: Exception) -> str:
    return printable(" ".join(str(error).split()), 400) or type(error).__name__
