"""The `trainer` node: transformers' TrainingArguments under their own names, checked without importing transformers.

Importing transformers' arguments takes seconds; `argument_table` has their names, types and defaults.
"""

import functools
from collections.abc import Iterator
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from stages.core.config import suggest_name
from stages.core.errors import printable
from stages.train.argument_table import ARGUMENTS

_SEED = "it is params.yaml's seed"
_BATCH = (
    "it follows from batch_size and hardware.per_device_batch_size, so that batch_size means the same on all hardware"
)
_PARAMS = "it is set in params.yaml, once per task"
_BATCHES = "the pipeline makes its own batches"
_EVALUATION = "evaluation is in fp32 on all hardware, so that metrics are comparable"
_REPORTS = "curves go to reports/train, for `dvc plots`"
_CHECKPOINTS = "checkpoints live outside the workspace"
_RESUME = "a resumed run ends with the same bytes as one that was not interrupted"
_HUB = "a stage has no side effects"
_LOSS = "the loss is the pipeline's own: the sum over tokens divided by their number"
_LAUNCH = "hardware.launch and hardware.ray say how processes are started"
_LOG = "the stage has its own log lines"
_STAGES = "dvc.yaml says what is trained and evaluated"

# Arguments that the pipeline sets itself, and why.
OWNED = {
    "output_dir": _CHECKPOINTS,
    "resume_from_checkpoint": _CHECKPOINTS,
    "save_total_limit": "it is checkpoints.keep",
    "save_only_model": _RESUME,
    "ignore_data_skip": _RESUME,
    "restore_callback_states_from_checkpoint": _RESUME,
    "enable_jit_checkpoint": "SIGTERM writes a checkpoint anyway",
    "seed": _SEED,
    "data_seed": _SEED,
    "learning_rate": _PARAMS,
    "num_train_epochs": _PARAMS,
    "per_device_train_batch_size": _BATCH,
    "gradient_accumulation_steps": _BATCH,
    "per_device_eval_batch_size": "it is hardware.evaluate_batch_tokens",
    "auto_find_batch_size": "a result must not depend on the machine's memory",
    "label_smoothing_factor": "the loss is the metric that runs are compared by",
    "use_cache": "only generation uses it, and with a cache the documents of a block would attend to each other",
    "use_liger_kernel": _LOSS,
    "liger_kernel_config": _LOSS,
    "average_tokens_across_devices": "the loss is divided by the number of tokens of a whole step",
    "remove_unused_columns": _BATCHES,
    "label_names": _BATCHES,
    "train_sampling_strategy": _BATCHES,
    "length_column_name": _BATCHES,
    "dataloader_drop_last": "training uses every block: the last batch is filled up with rows without predicted tokens",
    "dataloader_persistent_workers": "it changes the random numbers of dropout",
    "prediction_loss_only": _EVALUATION,
    "bf16_full_eval": _EVALUATION,
    "fp16_full_eval": _EVALUATION,
    "batch_eval_metrics": _EVALUATION,
    "eval_accumulation_steps": _EVALUATION,
    "eval_do_concat_batches": _EVALUATION,
    "eval_use_gather_object": _EVALUATION,
    "include_for_metrics": _EVALUATION,
    "do_train": _STAGES,
    "do_eval": _STAGES,
    "do_predict": _STAGES,
    "report_to": _REPORTS,
    "run_name": _REPORTS,
    "project": _REPORTS,
    "trackio_space_id": _REPORTS,
    "trackio_bucket_id": _REPORTS,
    "trackio_static_space_id": _REPORTS,
    "include_num_input_tokens_seen": _REPORTS,
    "skip_memory_metrics": _REPORTS,
    "log_level": _LOG,
    "log_level_replica": _LOG,
    "log_on_each_node": _LOG,
    "save_on_each_node": _CHECKPOINTS,
    "local_rank": _LAUNCH,
    "deepspeed": "only trainer.fsdp is tested for sharding a model",
    "parallelism_config": "only trainer.fsdp is tested for sharding a model",
    "disable_tqdm": "progress is a bar on a terminal, lines elsewhere",
    "use_cpu": "it is hardware.device",
    "push_to_hub": _HUB,
    "hub_token": _HUB,
    "hub_model_id": _HUB,
    "hub_strategy": _HUB,
    "hub_private_repo": _HUB,
    "hub_always_push": _HUB,
    "hub_revision": _HUB,
}

# Arguments whose other values would be ignored or cause harm: the allowed values, and why.
_VALUES: dict[str, tuple[tuple[Any, ...], str]] = {
    "metric_for_best_model": (("loss", "eval_loss", None), "validation during training only computes the loss"),
    "greater_is_better": ((False, None), "a lower loss is better, and true would export the worst model"),
    "debug": (("", "underflow_overflow"), "the other features are for TPUs"),
}
# Minimum values of numbers that transformers does not check.
_MINIMUM = {
    "ddp_timeout": 1,
    "dataloader_num_workers": 0,
    "eval_delay": 0,
    "max_grad_norm": 0,
    "neftune_noise_alpha": 0,
    "warmup_steps": 0,
    "weight_decay": 0,
}
_POSITIVE = ("eval_steps", "logging_steps", "save_steps")
# Sections. transformers also accepts JSON text, or the name of a file, which DVC would not track.
_SECTIONS = ("accelerator_config", "activation_checkpointing_kwargs", "fsdp_config", "gradient_checkpointing_kwargs",
    "lr_scheduler_kwargs")  # fmt: skip
# Arguments that have no effect unless another one has one of these values (True: any value except 0, none and false).
_NEEDS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "activation_checkpointing_kwargs": ("activation_checkpointing", (True,)),
    "dataloader_in_order": ("dataloader_num_workers", (True,)),
    "dataloader_multiprocessing_context": ("dataloader_num_workers", (True,)),
    "eval_delay": ("eval_strategy", ("epoch", "steps")),
    "eval_steps": ("eval_strategy", ("steps",)),
    "fsdp_config": ("fsdp", (True,)),
    "gradient_checkpointing_kwargs": ("gradient_checkpointing", (True,)),
    "logging_steps": ("logging_strategy", ("steps",)),
    "save_steps": ("save_strategy", ("steps",)),
    "torch_compile_backend": ("torch_compile", (True,)),
    "torch_compile_mode": ("torch_compile", (True,)),
}
# Arguments that only these devices use.
_DEVICES = {"fp16": ("cuda", "mps"), "tf32": ("cuda",), "torch_empty_cache_steps": ("cuda", "mps")}
# Defaults that differ from those of transformers.
DEFAULTS = {"save_strategy": "no", "logging_nan_inf_filter": False, "ddp_find_unused_parameters": False}

# transformers 5 merged this argument into another: warmup_steps below 1 is a fraction of all steps.
MERGED = {"warmup_ratio": "warmup_steps"}


def find_argument_problems(arguments: dict[str, Any], device: str | None = None) -> list[str]:
    """Return the problems of the `trainer` node: unknown and owned names, wrong types, values without effect.

    Args:
        device: hardware.device; None if it is not known.
    """
    known = known_arguments()
    replaced = {MERGED[name] for name in arguments if name in MERGED}
    found = []
    for name, value in arguments.items():
        if name in replaced and value is None:
            continue
        if name in OWNED:
            found.append(f"trainer.{name} cannot be set: {OWNED[name]}")
        elif name in MERGED:
            if MERGED[name] in arguments and arguments[MERGED[name]]:
                found.append(
                    f"trainer.{name} and trainer.{MERGED[name]} mean the same: set one of them, and the other to null"
                )
            elif not isinstance(value, int | float) or not 0 <= value < 1:
                found.append(f"trainer.{name}={value!r}: it should be a fraction of all steps, from 0 to below 1")
        elif name not in known:
            hint = suggest_name(name, list(known))
            found.append(f"trainer.{name} is not an argument of transformers.TrainingArguments; {hint}")
        else:
            try:
                known[name].validate_python(value)
            except ValidationError as error:
                message = error.errors()[0]["msg"]
                message += " (quote it: in YAML, a bare no means false)" if value is False and "'no'" in message else ""
                found.append(
                    f"trainer.{name}={value!r}: {message[0].lower()}{message[1:].replace('nput should', 't should')}"
                )
            else:
                found += [
                    f"trainer.{name}={printable(repr(value))}: {problem}" for problem in _find_misuse(name, arguments)
                ]
    if arguments.get("fp16") and arguments.get("bf16"):
        found.append("trainer.fp16 and trainer.bf16 are both true: set one to false")
    for name, devices in _DEVICES.items():
        if arguments.get(name) and device not in (None, *devices):
            found.append(
                f"trainer.{name}={arguments[name]!r}: hardware.device={device} ignores it"
                f" (it is for {' and '.join(devices)}): remove it"
            )
    return found


def _find_misuse(name: str, arguments: dict[str, Any]) -> Iterator[str]:
    """Yield the reasons why the value of an argument, though of the right type, is refused or would have no effect."""
    value = arguments[name]
    if name in _VALUES and value not in _VALUES[name][0]:
        yield f"{_VALUES[name][1]}: remove it"
    if value is not None and name in _MINIMUM and not value >= _MINIMUM[name]:
        yield f"it should be {_MINIMUM[name]} or above"
    if value is not None and name in _POSITIVE and not value > 0:
        yield "it should be above 0"
    if name == "max_steps" and value < 1 and value != -1:
        yield "it should be 1 or above, or -1 if num_train_epochs sets the length of training"
    if name in _SECTIONS and isinstance(value, str):
        yield "it should be a section with keys and values"
    elif name == "accelerator_config" and value and value.keys() - {"non_blocking"}:
        yield f"{', '.join(sorted(value.keys() - {'non_blocking'}))} cannot be set: {_BATCHES}"
    if name == "gradient_checkpointing" and arguments.get("activation_checkpointing") is not None:
        yield "it is the old name of trainer.activation_checkpointing, which is set: remove it"
    if name in _NEEDS and value not in (None, get_default(name)):
        other, allowed = _NEEDS[name]
        given = arguments.get(other, DEFAULTS.get(other, get_default(other)))
        if not (given if allowed == (True,) else given in allowed):
            wanted = "" if allowed == (True,) else f" {' or '.join(map(str, allowed))}"
            yield f"it has no effect without trainer.{other}{wanted}: set that, or remove this"


def resolve_merged(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return `arguments` under the names that TrainingArguments accepts: merged names are replaced."""
    merged = {MERGED[name]: value for name, value in arguments.items() if name in MERGED}
    return {name: value for name, value in arguments.items() if name not in MERGED} | merged


@functools.cache
def known_arguments() -> dict[str, TypeAdapter[Any]]:
    """Return the validator of every argument by name."""
    types = {name: kind for name, (kind, _) in ARGUMENTS.items()} | {"fsdp": bool | str | None}  # as its help says
    return {name: TypeAdapter(kind, config=ConfigDict(strict=True)) for name, kind in types.items()}


def get_default(name: str) -> Any:
    """Return the default of an argument; None as well if the default is not a literal or the argument is unknown."""
    return ARGUMENTS.get(name, (Any, None))[1]
