"""Rules for a train config under Keras: what its layers and its training loop support.

Imported without Keras, which need not be installed to check a configuration.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from stages.train.trainer_arguments import get_default

ARCHITECTURES = ("bert", "gpt2", "roberta")
# Keys of each architecture's config for the dropout rate and the activation of KerasHub's layers.
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
# Arguments of `trainer` that Keras supports; all others must have their default value.
_ARGUMENTS = {
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
# Supported values of arguments, if they are not all values or only the default.
_VALUES = {
    "logging_nan_inf_filter": (False,),
    "optim": ("adamw_torch", "adamw_torch_fused"),
    "save_strategy": ("no", "steps", "epoch"),
}


def find_config_problems(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield a message for each setting of a train config that Keras does not support; `values` has its valid fields."""
    if values.get("adapter") is not None:
        yield "it trains all weights: set adapter: none"
    if values.get("early_stopping") is not None:
        yield "it does not save the best model, which early stopping needs: set early_stopping: null"
    checkpoints = values.get("checkpoints")
    if checkpoints is not None and checkpoints.keep_for_branches is not None:
        yield "runs share no steps, since the learning rate always decays: set checkpoints.keep_for_branches: null"
    hardware = values.get("hardware")
    if hardware is not None and (hardware.launch is not None or hardware.ray is not None):
        yield "it runs in one process: choose a hardware without hardware.launch and hardware.ray"
    if hardware is not None and hardware.device != "cpu":
        yield f"hardware.device={hardware.device}: it trains on the CPU: choose hardware: cpu"
        return  # the other settings of that file are for its device
    at_once = None if hardware is None else hardware.per_device_batch_size
    if at_once not in (None, values.get("batch_size", at_once)):
        yield f"hardware.per_device_batch_size={at_once}: it does not accumulate gradients: set null"
    model = values.get("model")
    if model is not None and "model_type" in model.config:
        yield from find_model_problems(model.config)
    for name, value in values.get("trainer", {}).items():
        known = _VALUES.get(name, () if name in _ARGUMENTS else (get_default(name),))
        if known and value not in known:
            fits = f"leave it at {' or '.join(map(str, known))}"
            yield f"trainer.{name}={value} is not supported: {fits}"


def find_model_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield a message for each value of a model's config that KerasHub's layers do not support; keys may be missing."""
    name = config["model_type"]
    if name not in ARCHITECTURES:
        yield f"{name} is not mapped to KerasHub's layers; supported are {', '.join(ARCHITECTURES)}"
        return
    rates = {key: config[key] for key in DROPOUTS[name] if key in config}
    if len(set(rates.values())) > 1:
        yield f"model.config: all dropout rates must be the same, not {rates}"
    activation = config.get(ACTIVATION[name], ACTIVATIONS[0])
    if activation not in ACTIVATIONS:
        yield f"model.config.{ACTIVATION[name]}={activation}: supported are {', '.join(ACTIVATIONS)}"
    for key, value in _FIXED.items():
        if config.get(key, value) != value:
            yield f"model.config.{key}={config[key]}: set it to {value}"
