"""The schema of conf/framework, and what the other sections may hold under each."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import model_validator

from stages.config import whole
from stages.trainer_arguments import default_of

KERAS_ARCHITECTURES = ("bert", "gpt2", "roberta")
# Arguments of `trainer` that Keras honours; any other may have its default alone.
KERAS_ARGUMENTS = {
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "eval_delay",
    "eval_steps",
    "eval_strategy",
    "logging_first_step",
    "logging_steps",
    "logging_strategy",
    "max_grad_norm",
    "save_steps",
    "save_strategy",
    "warmup_ratio",
    "warmup_steps",
    "weight_decay",
}
# Values that are no defaults, and yet ask for what Keras does.
KERAS_VALUES = {"optim": ("adamw_torch", "adamw_torch_fused"), "save_strategy": ("no", "steps", "epoch")}


@whole
class Framework:
    name: Literal["trainer", "keras"]
    """trainer: transformers' Trainer, on torch; keras: `fit` of a model of KerasHub's layers."""
    backend: Literal["jax", "tensorflow"] | None
    """What Keras computes with; null for the Trainer."""

    @model_validator(mode="after")
    def _has_its_backend(self) -> "Framework":
        if (self.backend is None) == (self.name == "keras"):
            verb = "is missing" if self.name == "keras" else "has no meaning"
            raise ValueError(f"framework.backend {verb} for framework={self.name}")
        return self


def keras_refusals(values: Mapping[str, Any]) -> Iterator[str]:
    """What Keras cannot do of a train config, whose valid fields are `values`, a line each."""
    if values.get("adapter") is not None:
        yield "it trains all weights: set adapter: none"
    if values.get("early_stopping") is not None:
        yield "it keeps no best model to stop at: set early_stopping: null"
    hardware = values.get("hardware")
    if hardware is not None and (hardware.launch is not None or hardware.ray is not None):
        yield "it works in one process: choose a hardware without hardware.launch and hardware.ray"
    if hardware is not None and hardware.device != "cpu":
        yield f"hardware.device={hardware.device}: it trains on the CPU: choose hardware: cpu"
    at_once = None if hardware is None else hardware.per_device_batch_size
    if at_once not in (None, values.get("batch_size", at_once)):
        yield f"hardware.per_device_batch_size={at_once}: it takes a batch at once and adds up no gradients: set null"
    model = values.get("model")
    name = None if model is None else model.config.get("model_type")
    if name not in (None, *KERAS_ARCHITECTURES):
        yield unknown_architecture(name)
    for name, value in values.get("trainer", {}).items():
        known = KERAS_VALUES.get(name, () if name in KERAS_ARGUMENTS else (default_of(name),))
        if known and value not in known:
            fits = f"leave it at {' or '.join(map(str, known))}"
            yield f"trainer.{name}={value}: it does not do that: {fits}"


def unknown_architecture(name: str) -> str:
    """Why a model of that architecture cannot be trained, and those that can."""
    return f"{name} is not mapped to KerasHub's layers; there are {', '.join(KERAS_ARCHITECTURES)}"
