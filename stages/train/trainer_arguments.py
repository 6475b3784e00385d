"""The `trainer` node: transformers' TrainingArguments by their own names, checked without importing transformers.

The names, types and enumerations are read from the installed library's source, which takes milliseconds where the
import takes seconds, so that `make check` can afford it.
"""

import ast
import functools
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from stages.core.config import nearest
from stages.core.errors import printable

_SEED = "it is params.yaml's seed"
_BATCH = (
    "it follows from batch_size and hardware.per_device_batch_size, so that batch_size means the same on all hardware"
)
_PARAMS = "it stands in params.yaml, once per task"
_BATCHES = "the pipeline makes its own batches"
_EVALUATION = "evaluation is in fp32 on every hardware, so that its figures compare"
_REPORTS = "curves go to reports/train, for `dvc plots`"
_CHECKPOINTS = "checkpoints live outside the workspace"
_RESUME = "a resumed run ends with the same bytes as one that was not interrupted"
_HUB = "a stage has no side effects"
_LOSS = "the loss is the pipeline's own: the sum over tokens divided by their number"
_LAUNCH = "hardware.launch and hardware.ray say how processes are started"
_LOG = "a stage logs in lines of its own"
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
    "use_cache": "generation alone uses it, and with it the documents of a block would reach each other",
    "use_liger_kernel": _LOSS,
    "liger_kernel_config": _LOSS,
    "average_tokens_across_devices": "the loss is divided by the number of tokens of a whole step",
    "remove_unused_columns": _BATCHES,
    "label_names": _BATCHES,
    "train_sampling_strategy": _BATCHES,
    "length_column_name": _BATCHES,
    "dataloader_drop_last": "every block is trained on: rows of which nothing is predicted fill up the last batch",
    "dataloader_persistent_workers": "it changes the draws of dropout",
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
    "deepspeed": "trainer.fsdp shards a model, and no test covers another way",
    "parallelism_config": "trainer.fsdp shards a model, and no test covers another way",
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

# Values of arguments that have others which would be ignored or do harm.
_VALUES: dict[str, tuple[tuple[Any, ...], str]] = {
    "metric_for_best_model": (("loss", "eval_loss", None), "validation during training gives the loss alone"),
    "greater_is_better": ((False, None), "less loss is better, and true would export the worst model"),
    "debug": (("", "underflow_overflow"), "the other features are for TPUs"),
}
# The least values of numbers for which transformers has no check of its own.
_LEAST = {
    "ddp_timeout": 1,
    "dataloader_num_workers": 0,
    "eval_delay": 0,
    "max_grad_norm": 0,
    "neftune_noise_alpha": 0,
    "warmup_steps": 0,
    "weight_decay": 0,
}
_ABOVE_0 = ("eval_steps", "logging_steps", "save_steps")
# Sections, of which transformers also takes the name of a file, which DVC would not track, or JSON text.
_SECTIONS = ("accelerator_config", "activation_checkpointing_kwargs", "fsdp_config", "gradient_checkpointing_kwargs",
    "lr_scheduler_kwargs")  # fmt: skip
# Arguments that do nothing unless another has one of some values (True: any but 0, none and false).
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
# Arguments that other devices ignore.
_DEVICES = {"fp16": ("cuda", "mps"), "tf32": ("cuda",), "torch_empty_cache_steps": ("cuda", "mps")}
# Defaults of the pipeline, where they are not the library's.
DEFAULTS = {"save_strategy": "no", "logging_nan_inf_filter": False, "ddp_find_unused_parameters": False}

# transformers 5 took this argument into another: a warmup_steps below 1 is a share of all steps.
MERGED = {"warmup_ratio": "warmup_steps"}


def problems(arguments: dict[str, Any], device: str | None = None) -> list[str]:
    """What is wrong with the `trainer` node, a line each: unknown and owned names, wrong types, values without effect.

    Args:
        device: hardware.device; None: not known.
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
                found.append(f"trainer.{name} and trainer.{MERGED[name]} say the same thing: give one (the other null)")
            elif not isinstance(value, int | float) or not 0 <= value < 1:
                found.append(f"trainer.{name}={value!r}: it should be a share of all steps, from 0 to below 1")
        elif name not in known:
            found.append(
                f"trainer.{name} is not an argument of transformers.TrainingArguments; {nearest(name, list(known))}"
            )
        else:
            try:
                known[name].validate_python(value)
            except ValidationError as error:
                message = error.errors()[0]["msg"]
                message += (
                    " (in quotes: YAML takes a bare no for false)" if value is False and "'no'" in message else ""
                )
                found.append(
                    f"trainer.{name}={value!r}: {message[0].lower()}{message[1:].replace('nput should', 't should')}"
                )
            else:
                found += [f"trainer.{name}={printable(repr(value))}: {problem}" for problem in _misuse(name, arguments)]
    if arguments.get("fp16") and arguments.get("bf16"):
        found.append("trainer.fp16 and trainer.bf16 are both true: set one to false")
    for name, devices in _DEVICES.items():
        if arguments.get(name) and device not in (None, *devices):
            found.append(
                f"trainer.{name}={arguments[name]!r}: hardware.device={device} would ignore it"
                f" ({' and '.join(devices)} would not): take it out"
            )
    return found


def _misuse(name: str, arguments: dict[str, Any]) -> Iterator[str]:
    """Why the value of an argument, which is of the right type, cannot be or would have no effect."""
    value = arguments[name]
    if name in _VALUES and value not in _VALUES[name][0]:
        yield f"{_VALUES[name][1]}: take it out"
    if value is not None and name in _LEAST and not value >= _LEAST[name]:
        yield f"it should be {_LEAST[name]} or above"
    if value is not None and name in _ABOVE_0 and not value > 0:
        yield "it should be above 0"
    if name == "max_steps" and value < 1 and value != -1:
        yield "it should be 1 or above, or -1 where num_train_epochs says how long training is"
    if name in _SECTIONS and isinstance(value, str):
        yield "it should be a section with keys and values"
    elif name == "accelerator_config" and value and value.keys() - {"non_blocking"}:
        yield f"{', '.join(sorted(value.keys() - {'non_blocking'}))} cannot be set: {_BATCHES}"
    if name == "gradient_checkpointing" and arguments.get("activation_checkpointing") is not None:
        yield "it is the old name of trainer.activation_checkpointing, which is set: take it out"
    if name in _NEEDS and value not in (None, default_of(name)):
        other, allowed = _NEEDS[name]
        given = arguments.get(other, DEFAULTS.get(other, default_of(other)))
        if not (given if allowed == (True,) else given in allowed):
            wanted = "" if allowed == (True,) else f" {' or '.join(map(str, allowed))}"
            yield f"it has no effect without trainer.{other}{wanted}: set that, or take this out"


def resolve(arguments: dict[str, Any]) -> dict[str, Any]:
    """`arguments` with merged names replaced, as TrainingArguments takes them."""
    merged = {MERGED[name]: value for name, value in arguments.items() if name in MERGED}
    return {name: value for name, value in arguments.items() if name not in MERGED} | merged


@functools.cache
def known_arguments() -> dict[str, TypeAdapter[Any]]:
    """Name to type of every field of the installed transformers.TrainingArguments."""
    classes = _classes()
    types: dict[str, Any] = {"Any": Any, "Literal": Literal, "dict": dict, "list": list, "str": str, "int": int}
    types |= {"float": float, "bool": bool, "None": None}
    for name, node in classes.items():
        values = list(_constants(node))
        if values and any(isinstance(base, ast.Name) and base.id.endswith("Enum") for base in node.bases):
            types[name] = Literal[tuple(values)]
    found = {name: _adapter(field.annotation, types) for name, field in _fields().items()}
    return found | {"fsdp": TypeAdapter(bool | str | None, config=ConfigDict(strict=True))}  # as its help has it


def default_of(name: str) -> Any:
    """The default of an argument; None as well where it is not written as a literal, or there is no such argument."""
    field = _fields().get(name)
    value = None if field is None else field.value
    if isinstance(value, ast.Call):  # dataclasses.field
        value = next((keyword.value for keyword in value.keywords if keyword.arg == "default"), None)
    try:
        return ast.literal_eval(value) if value is not None else None
    except ValueError:
        return None


@functools.cache
def _classes() -> dict[str, ast.ClassDef]:
    """The classes of the installed transformers' modules of arguments."""
    spec = find_spec("transformers")
    assert spec is not None and spec.submodule_search_locations is not None
    directory = Path(spec.submodule_search_locations[0])
    trees = [
        ast.parse((directory / name).read_text(encoding="utf-8")) for name in ("trainer_utils.py", "training_args.py")
    ]
    return {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}


def _fields() -> dict[str, ast.AnnAssign]:
    """The arguments, as they are declared."""
    declared = [node for node in _classes()["TrainingArguments"].body if isinstance(node, ast.AnnAssign)]
    return {node.target.id: node for node in declared if isinstance(node.target, ast.Name)}


def _constants(node: ast.ClassDef) -> Iterator[str]:
    for item in node.body:
        if isinstance(item, ast.Assign) and isinstance(item.value, ast.Constant) and isinstance(item.value.value, str):
            yield item.value.value


def _adapter(annotation: ast.expr, types: dict[str, Any]) -> TypeAdapter[Any]:
    names = {node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)}
    options = _options(annotation)
    # "IntervalStrategy | str" means one of the enumeration's values, spelt out.
    if any(isinstance(option, ast.Name) and _is_enumeration(types.get(option.id)) for option in options):
        options = [option for option in options if not (isinstance(option, ast.Name) and option.id == "str")]
    if not names <= types.keys():
        return TypeAdapter(Any)
    union: Any = None
    for option in options:
        one = eval(compile(ast.Expression(option), "<annotation>", "eval"), {"__builtins__": {}}, types)
        union = one if union is None else union | one
    return TypeAdapter(union, config=ConfigDict(strict=True))


def _options(annotation: ast.expr) -> list[ast.expr]:
    if isinstance(annotation, ast.BinOp):
        return _options(annotation.left) + _options(annotation.right)
    return [annotation]


def _is_enumeration(candidate: Any) -> bool:
    return getattr(candidate, "__origin__", None) is Literal
