"""GPT-2, BERT and RoBERTa built from KerasHub's layers, and conversion of weights from and to transformers' models.

KerasHub's backbones fix values that a transformers config can set (the activation, the epsilon of layer norms), ignore
documents when they number positions, and only mask padding. Their layers are free of these limits.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import keras
import keras_hub
import numpy as np
import torch
from keras import layers, ops

from stages.core.errors import StageError
from stages.frameworks.keras.rules import ACTIVATION, DROPOUTS, find_model_problems

_tanh_gelu = functools.partial(keras.activations.gelu, approximate=True)
_ACTIVATIONS: dict[str, Callable[[Any], Any]] = {  # those of ACTIVATIONS in rules.py
    "gelu": functools.partial(keras.activations.gelu, approximate=False),
    "gelu_new": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "relu": keras.activations.relu,
    "silu": keras.activations.silu,
    "swish": keras.activations.silu,
}


class _BlockModel(keras.Model):  # type: ignore[misc]
    """Functional model that also logs the loss of the last step: Keras's `loss` is the mean over the epoch."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.step_loss = _StepLoss(name="step_loss")

    def compute_loss(self, *arguments: Any, **named: Any) -> Any:
        loss = super().compute_loss(*arguments, **named)
        self.step_loss.update_state(loss)
        return loss


class _StepLoss(keras.metrics.Metric):  # type: ignore[misc]
    """Metric with the value of the last update."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name)
        self._value = self.add_weight(shape=(), initializer="zeros", name="value")

    def update_state(self, value: Any) -> None:
        self._value.assign(value)

    def result(self) -> Any:
        return ops.convert_to_tensor(self._value)


def build_keras_model(model: Any) -> _BlockModel:
    """Build the Keras model that computes the same function as a torch model of transformers, with its weights.

    Inputs of the Keras model, all int32:

    - input_ids, position_ids: [batch, length].
    - segments: [batch, length]; tokens only attend to tokens of the same segment.
    - mask_positions: [batch, num_predicted], only for masked models; the positions for which to compute logits.

    Its output is fp32 logits [batch, length, vocab_size], or [batch, num_predicted, vocab_size] for masked models.

    Raises:
        StageError: if the layers do not support the architecture or its configuration.
    """
    config = model.config
    check_config(config)
    inputs = {
        name: keras.Input((None,), dtype="int32", name=name) for name in ("input_ids", "position_ids", "segments")
    }
    segments = inputs["segments"]
    # [batch, length, 1] == [batch, 1, length] -> [batch, length, length] bool
    is_same_segment = ops.equal(ops.expand_dims(segments, 2), ops.expand_dims(segments, 1))
    embedding = keras_hub.layers.ReversibleEmbedding(config.vocab_size, config.hidden_size, name="token_embedding")
    dropout = layers.Dropout(getattr(config, DROPOUTS[config.model_type][0]), name="embeddings_dropout")
    embedded = embedding(inputs["input_ids"])
    position = keras_hub.layers.PositionEmbedding(config.max_position_embeddings, name="position_embedding")
    summands = [embedded, position(embedded, positions=inputs["position_ids"])]
    if config.model_type == "gpt2":
        hidden = dropout(layers.Add(name="embeddings_add")(summands))
        for index in range(config.num_hidden_layers):
            hidden = keras_hub.layers.TransformerDecoder(
                **build_layer_arguments(
                    config, config.n_inner or 4 * config.hidden_size, config.layer_norm_epsilon, index
                ),
                normalize_first=True,
            )(hidden, decoder_attention_mask=is_same_segment)
        hidden = layers.LayerNormalization(epsilon=config.layer_norm_epsilon, name="layer_norm")(hidden)
        logits = embedding(hidden, reverse=True)
    else:
        inputs["mask_positions"] = keras.Input((None,), dtype="int32", name="mask_positions")
        types = layers.Embedding(config.type_vocab_size, config.hidden_size, name="segment_embedding")
        summands.append(types(ops.zeros_like(segments)))
        hidden = layers.Add(name="embeddings_add")(summands)
        epsilon = config.layer_norm_eps
        hidden = dropout(layers.LayerNormalization(epsilon=epsilon, name="embeddings_layer_norm")(hidden))
        for index in range(config.num_hidden_layers):
            hidden = keras_hub.layers.TransformerEncoder(
                **build_layer_arguments(config, config.intermediate_size, epsilon, index)
            )(hidden, attention_mask=is_same_segment)
        # RoBERTa's head always uses GELU, also if its layers use another activation.
        activation = _ACTIVATIONS[config.hidden_act if config.model_type == "bert" else "gelu"]
        logits = keras_hub.layers.MaskedLMHead(
            token_embedding=embedding,
            intermediate_activation=activation,
            layer_norm_epsilon=epsilon,
            name="mlm_head",
        )(hidden, inputs["mask_positions"])
    # TensorFlow uses the name as a scope, which must begin with a letter.
    built = _BlockModel(inputs=inputs, outputs=logits, name="block_model")
    _copy_to_keras(model, built)
    return built


def check_config(config: Any) -> None:
    """Raise StageError if the layers do not support `config`."""
    for reason in find_model_problems(config.to_dict()):
        raise StageError(f"framework=keras: {reason}")


def build_layer_arguments(config: Any, intermediate: int, epsilon: float, index: int) -> dict[str, Any]:
    """Build the arguments of transformer layer `index`."""
    return {
        "intermediate_dim": intermediate,
        "num_heads": config.num_attention_heads,
        "dropout": getattr(config, DROPOUTS[config.model_type][0]),
        "activation": _ACTIVATIONS[getattr(config, ACTIVATION[config.model_type])],
        "layer_norm_epsilon": epsilon,
        "name": f"transformer_layer_{index}",
    }


# -- weights -----------------------------------------------------------------------------------------------------------

# Keras layer to torch module. `:0` to `:2` are the thirds of a module with query, key and value in one weight.
_LAYERS = {
    "gpt2": {
        "token_embedding": "transformer.wte",
        "position_embedding": "transformer.wpe",
        "layer_norm": "transformer.ln_f",
    },
    "bert": {
        "mlm_head/intermediate_dense": "cls.predictions.transform.dense",
        "mlm_head/intermediate_layer_norm": "cls.predictions.transform.LayerNorm",
    },
    "roberta": {
        "mlm_head/intermediate_dense": "lm_head.dense",
        "mlm_head/intermediate_layer_norm": "lm_head.layer_norm",
    },
}
_EMBEDDINGS = {
    "token_embedding": "word_embeddings",
    "position_embedding": "position_embeddings",
    "segment_embedding": "token_type_embeddings",
    "embeddings_layer_norm": "LayerNorm",
}
_DECODER = {
    "self_attention/query": "attn.c_attn:0",
    "self_attention/key": "attn.c_attn:1",
    "self_attention/value": "attn.c_attn:2",
    "self_attention/attention_output": "attn.c_proj",
    "self_attention_layer_norm": "ln_1",
    "feedforward_layer_norm": "ln_2",
    "feedforward_intermediate_dense": "mlp.c_fc",
    "feedforward_output_dense": "mlp.c_proj",
}
_ENCODER = {
    "self_attention_layer/query": "attention.self.query",
    "self_attention_layer/key": "attention.self.key",
    "self_attention_layer/value": "attention.self.value",
    "self_attention_layer/attention_output": "attention.output.dense",
    "self_attention_layer_norm": "attention.output.LayerNorm",
    "feedforward_layer_norm": "output.LayerNorm",
    "feedforward_intermediate_dense": "intermediate.dense",
    "feedforward_output_dense": "output.dense",
}


def list_layer_modules(config: Any) -> Iterator[tuple[str, str]]:
    """Yield the name of each Keras layer with weights, and of the torch module with the same weights."""
    name = config.model_type
    yield from _LAYERS[name].items()
    if name != "gpt2":
        yield from ((layer, f"{name}.embeddings.{module}") for layer, module in _EMBEDDINGS.items())
    parent, inner = ("transformer.h", _DECODER) if name == "gpt2" else (f"{name}.encoder.layer", _ENCODER)
    for index in range(config.num_hidden_layers):
        for layer, module in inner.items():
            yield f"transformer_layer_{index}/{layer}", f"{parent}.{index}.{module}"


def map_weight_views(model: Any) -> dict[str, torch.Tensor]:
    """Map the path of each Keras variable to a view of the torch weights with the same elements in the same order.

    A view may have another shape than its variable: Keras splits heads, so that the kernel of a query layer is
    [in, heads, head_size]. torch's Linear stores weights [out, in], GPT-2's Conv1D and Keras [in, out].
    """
    found = {}
    for layer, name in list_layer_modules(model.config):
        name, _, part = name.partition(":")
        module = model.get_submodule(name)
        weight = module.weight.detach()
        if isinstance(module, torch.nn.Embedding):
            found[f"{layer}/embeddings"] = weight
            continue
        bias = module.bias.detach()
        if isinstance(module, torch.nn.LayerNorm):
            found |= {f"{layer}/gamma": weight, f"{layer}/beta": bias}
            continue
        if isinstance(module, torch.nn.Linear):
            weight = weight.T
        if part:
            # [in, 3 * out] -> [in, out] and [3 * out] -> [out]
            weight, bias = weight.chunk(3, dim=-1)[int(part)], bias.chunk(3, dim=-1)[int(part)]
        found |= {f"{layer}/kernel": weight, f"{layer}/bias": bias}
    if model.config.model_type != "gpt2":
        found["mlm_head/output_bias"] = model.get_output_embeddings().bias.detach()
    return found


def has_weight_decay(path: str) -> bool:
    """Return True if weight decay applies: as in transformers, to all but biases and the weights of layer norms."""
    return path.rpartition("/")[2] in ("kernel", "embeddings")


def _copy_to_keras(model: Any, built: keras.Model) -> None:
    """Copy the weights of the torch model `model` to the Keras model."""
    views = map_weight_views(model)
    for variable in built.trainable_variables:
        variable.assign(views.pop(variable.path).reshape(tuple(variable.shape)).numpy())
    assert not views  # every view has a variable


def copy_to_torch(built: keras.Model, model: Any) -> None:
    """Copy the weights of the Keras model to the torch model `model`."""
    views = map_weight_views(model)
    for variable in built.trainable_variables:
        view = views[variable.path]
        view.copy_(torch.from_numpy(np.array(variable.value)).reshape(view.shape))
