"""The schema of conf/framework, and what the other sections may hold under each."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import model_validator

from stages.core.config import whole
from stages.train.trainer_arguments import default_of

KERAS_ARCHITECTURES = ("bert", "gpt2", "roberta")
# The values of a model's config that KerasHub's layers have, each under the names that an architecture gives it.
DROPOUTS = {
    "gpt2": ("embd_pdrop", "resid_pdrop", "attn_pdrop"),
    **dict.fromkeys(("bert", "roberta"), ("hidden_dropout_prob", "attention_probs_dropout_prob")),
}
ACTIVATION = {"gpt2": "activation_function", "bert": "hidden_act", "roberta": "hidden_act"}
ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish")
_FIXED = {
    "add_cross_attention": False,
    "is_decoder": False,
    "reorder_and_upcast_attn": False,
    "scale_attn_by_inverse_layer_idx": False,
    "scale_attn_weights": True,
    "tie_word_embeddings": True,
}
# Arguments of `trainer` that Keras honours; any other may have its default alone.
_KERAS_ARGUMENTS = {
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
_KERAS_VALUES = {
    "logging_nan_inf_filter": (False,),
    "optim": ("adamw_torch", "adamw_torch_fused"),
    "save_strategy": ("no", "steps", "epoch"),
}


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
        return  # what else that file says is for such a device
    at_once = None if hardware is None else hardware.per_device_batch_size
    if at_once not in (None, values.get("batch_size", at_once)):
        yield f"hardware.per_device_batch_size={at_once}: it takes a batch at once and adds up no gradients: set null"
    model = values.get("model")
    if model is not None and "model_type" in model.config:
        yield from keras_model_refusals(model.config)
    for name, value in values.get("trainer", {}).items():
        known = _KERAS_VALUES.get(name, () if name in _KERAS_ARGUMENTS else (default_of(name),))
        if known and value not in known:
            fits = f"leave it at {' or '.join(map(str, known))}"
            yield f"trainer.{name}={value}: it does not do that: {fits}"


def keras_model_refusals(config: Mapping[str, Any]) -> Iterator[str]:
    """What KerasHub's layers do not do of a model's config, or of those of its values that are known."""
    name = config["model_type"]
    if name not in KERAS_ARCHITECTURES:
        yield f"{name} is not mapped to KerasHub's layers; there are {', '.join(KERAS_ARCHITECTURES)}"
        return
    rates = {key: config[key] for key in DROPOUTS[name] if key in config}
    if len(set(rates.values())) > 1:
        yield f"model.config: one rate of dropout for all, not {rates}"
    activation = config.get(ACTIVATION[name], ACTIVATIONS[0])
    if activation not in ACTIVATIONS:
        yield f"model.config.{ACTIVATION[name]}={activation}: there are {', '.join(ACTIVATIONS)}"
    for key, value in _FIXED.items():
        if config.get(key, value) != value:
            yield f"model.config.{key}={config[key]}: it should be {value}"
