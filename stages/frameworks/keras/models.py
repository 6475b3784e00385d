"""GPT-2, BERT and RoBERTa of KerasHub's layers, and their weights as those of transformers' models.

KerasHub's own backbones fix what a transformers config may choose (the activation, layer norm's epsilon), number
positions without regard to documents and mask padding alone; their layers leave all of that open.
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
from stages.train.framework import ACTIVATION, DROPOUTS, keras_model_refusals

_tanh_gelu = functools.partial(keras.activations.gelu, approximate=True)
_ACTIVATIONS: dict[str, Callable[[Any], Any]] = {  # those of framework_config
    "gelu": functools.partial(keras.activations.gelu, approximate=False),
    "gelu_new": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "relu": keras.activations.relu,
    "silu": keras.activations.silu,
    "swish": keras.activations.silu,
}


class _BlockModel(keras.Model):  # type: ignore[misc]
    """A functional model whose logs hold the loss of the step alone: Keras's own `loss` is the mean of the epoch."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.step_loss = _StepLoss(name="step_loss")

    def compute_loss(self, *arguments: Any, **named: Any) -> Any:
        loss = super().compute_loss(*arguments, **named)
        self.step_loss.update_state(loss)
        return loss


class _StepLoss(keras.metrics.Metric):  # type: ignore[misc]
    """The last value that it was given."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name)
        self._value = self.add_weight(shape=(), initializer="zeros", name="value")

    def update_state(self, value: Any) -> None:
        self._value.assign(value)

    def result(self) -> Any:
        return ops.convert_to_tensor(self._value)


def build(model: Any) -> _BlockModel:
    """The Keras model that computes what `model`, transformers' on torch, computes, with its weights.

    Its inputs are int32: input_ids, position_ids and segments [batch, length], tokens of other segments not being
    attended to; of a masked model also mask_positions [batch, num_predicted], the positions whose logits are wanted.
    Its output are logits [batch, length or num_predicted, vocab_size].

    Raises:
        StageError: if its architecture or its configuration asks for what the layers do not do.
    """
    config = model.config
    check(config)
    inputs = {
        name: keras.Input((None,), dtype="int32", name=name) for name in ("input_ids", "position_ids", "segments")
    }
    segments = inputs["segments"]
    together = ops.equal(ops.expand_dims(segments, 2), ops.expand_dims(segments, 1))
    embedding = keras_hub.layers.ReversibleEmbedding(config.vocab_size, config.hidden_size, name="token_embedding")
    dropout = layers.Dropout(getattr(config, DROPOUTS[config.model_type][0]), name="embeddings_dropout")
    embedded = embedding(inputs["input_ids"])
    position = keras_hub.layers.PositionEmbedding(config.max_position_embeddings, name="position_embedding")
    summands = [embedded, position(embedded, positions=inputs["position_ids"])]
    if config.model_type == "gpt2":
        hidden = dropout(layers.Add(name="embeddings_add")(summands))
        for index in range(config.num_hidden_layers):
            hidden = keras_hub.layers.TransformerDecoder(
                **block(config, config.n_inner or 4 * config.hidden_size, config.layer_norm_epsilon, index),
                normalize_first=True,
            )(hidden, decoder_attention_mask=together)
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
            hidden = keras_hub.layers.TransformerEncoder(**block(config, config.intermediate_size, epsilon, index))(
                hidden, attention_mask=together
            )
        # RoBERTa's head has its own activation, whatever the layers have.
        activation = _ACTIVATIONS[config.hidden_act if config.model_type == "bert" else "gelu"]
        logits = keras_hub.layers.MaskedLMHead(
            token_embedding=embedding,
            intermediate_activation=activation,
            layer_norm_epsilon=epsilon,
            name="mlm_head",
        )(hidden, inputs["mask_positions"])
    # TensorFlow takes the name for a scope, whose names begin with a letter.
    built = _BlockModel(inputs=inputs, outputs=logits, name="block_model")
    _to_keras(model, built)
    return built


def check(config: Any) -> None:
    """Raise StageError unless the layers can do what `config` asks for."""
    for reason in keras_model_refusals(config.to_dict()):
        raise StageError(f"framework=keras: {reason}")


def block(config: Any, intermediate: int, epsilon: float, index: int) -> dict[str, Any]:
    """The arguments of the transformer layer number `index`."""
    return {
        "intermediate_dim": intermediate,
        "num_heads": config.num_attention_heads,
        "dropout": getattr(config, DROPOUTS[config.model_type][0]),
        "activation": _ACTIVATIONS[getattr(config, ACTIVATION[config.model_type])],
        "layer_norm_epsilon": epsilon,
        "name": f"transformer_layer_{index}",
    }


# -- weights -----------------------------------------------------------------------------------------------------------

# Keras layer to torch module; `:0` to `:2` are the thirds of one that holds query, key and value.
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


def modules(config: Any) -> Iterator[tuple[str, str]]:
    """Each Keras layer with weights and the torch module that has the same."""
    name = config.model_type
    yield from _LAYERS[name].items()
    if name != "gpt2":
        yield from ((layer, f"{name}.embeddings.{module}") for layer, module in _EMBEDDINGS.items())
    place, inner = ("transformer.h", _DECODER) if name == "gpt2" else (f"{name}.encoder.layer", _ENCODER)
    for index in range(config.num_hidden_layers):
        for layer, module in inner.items():
            yield f"transformer_layer_{index}/{layer}", f"{place}.{index}.{module}"


def views(model: Any) -> dict[str, torch.Tensor]:
    """Path of each Keras variable to the view of `model`'s weights that is the same numbers in the same order.

    A view may have another shape. (torch's Linear holds weights [out, in], Keras and GPT-2's Conv1D [in, out]; Keras
    takes the heads apart.)
    """
    found = {}
    for layer, name in modules(model.config):
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
            weight, bias = weight.chunk(3, dim=-1)[int(part)], bias.chunk(3, dim=-1)[int(part)]
        found |= {f"{layer}/kernel": weight, f"{layer}/bias": bias}
    if model.config.model_type != "gpt2":
        found["mlm_head/output_bias"] = model.get_output_embeddings().bias.detach()
    return found


def decays(path: str) -> bool:
    """Whether a Keras variable decays: as transformers has it, all but biases and the weights of layer norms."""
    return path.rpartition("/")[2] in ("kernel", "embeddings")


def _to_keras(model: Any, built: keras.Model) -> None:
    """Give the Keras model the weights of `model`."""
    known = views(model)
    for variable in built.trainable_variables:
        variable.assign(known.pop(variable.path).reshape(tuple(variable.shape)).numpy())
    assert not known  # each has its variable


def to_torch(built: keras.Model, model: Any) -> None:
    """Give `model` the weights of the Keras model."""
    known = views(model)
    for variable in built.trainable_variables:
        view = known[variable.path]
        view.copy_(torch.from_numpy(np.array(variable.value)).reshape(view.shape))
