"""The exported model equals the trained one: adapters of shared weights, and the check of every export."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from toys import MODEL_TASKS, make_toy_blocks, make_toy_model, make_toy_objective, save_blocks

from stages.core.errors import StageError
from stages.model.schema import Adapter, Model
from stages.train.saving import add_adapter, compute_probe_loss, save_model, verify_saved_model


def lora(targets, merge=True):
    return Adapter(rank=2, alpha=4.0, dropout=0.0, targets=targets, merge=merge)


def source(task):
    config = {"model_type": "gpt2"}
    return Model(task=task, path=None, revision=None, files=None, from_scratch=True, max_positions=64, config=config)


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize(
    ("model_type", "targets", "layers"),
    [
        ("gpt2", ["lm_head", "c_attn"], ("transformer.wte", "lm_head")),
        ("gpt2", ["wte"], ("transformer.wte", "lm_head")),
        ("gpt_neo", ["lm_head"], ("transformer.wte", "lm_head")),
        ("bert", ["decoder"], ("bert.embeddings.word_embeddings", "cls.predictions.decoder")),
        ("bert", ["word_embeddings", "query"], ("bert.embeddings.word_embeddings", "cls.predictions.decoder")),
        ("roberta", ["decoder"], ("roberta.embeddings.word_embeddings", "lm_head.decoder")),
        ("modernbert", ["decoder", "Wqkv"], ("model.embeddings.tok_embeddings", "decoder")),
    ],
)
def test_adapter_of_a_weight_that_two_layers_share_is_refused_by_their_names(model_type, targets, layers, merge):
    task = MODEL_TASKS[model_type]
    with pytest.raises(StageError) as caught:
        add_adapter(make_toy_model(model_type), lora(targets, merge), source(task), seed=0)
    assert str(caught.value).startswith(f"adapter.targets={targets}: ")
    assert all(layer in str(caught.value) for layer in layers)


@pytest.mark.parametrize(
    ("model_type", "targets", "settings"),
    [
        ("gpt2", ["lm_head", "wte", "c_attn"], {"tie_word_embeddings": False}),
        ("gptj", ["lm_head", "wte"], {}),
        ("llama", ["lm_head", "embed_tokens"], {}),
        ("bert", None, {}),
        ("gpt2", None, {}),
    ],
)
def test_adapter_of_weights_of_one_layer_each_is_exported_as_it_was_trained(tmp_path, model_type, targets, settings):
    task = MODEL_TASKS[model_type]
    model = add_adapter(make_toy_model(model_type, **settings), lora(targets), source(task), seed=0)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.3)  # like trained weights: a new adapter has no effect
    objective, blocks = make_toy_objective(model, False), make_toy_blocks(tmp_path / "blocks", task, 6, 16)
    loss = compute_probe_loss(model, objective, blocks)
    with model.disable_adapter():
        assert abs(compute_probe_loss(model, objective, blocks) - loss) > 0.01
    save_model(model, lora(targets), source(task), tmp_path / "model")
    verify_saved_model(tmp_path / "model", task, loss, objective, blocks)


@pytest.mark.parametrize("model_type", ["gpt2", "roberta"])
def test_verify_saved_refuses_a_model_with_one_weight_changed(tmp_path, model_type):
    task, model = MODEL_TASKS[model_type], make_toy_model(model_type)
    objective, blocks = make_toy_objective(model, False), make_toy_blocks(tmp_path / "blocks", task, 6, 16)
    loss = compute_probe_loss(model, objective, blocks)
    save_model(model, None, source(task), tmp_path / "model")
    verify_saved_model(tmp_path / "model", task, loss, objective, blocks)
    file = tmp_path / "model/model.safetensors"
    weights = load_file(file)
    name = max(weights, key=lambda name: weights[name].numel())  # the embeddings, tied to the output embedding
    save_file({**weights, name: torch.zeros_like(weights[name])}, file, metadata={"format": "pt"})
    with pytest.raises(StageError, match="the exported model differs from the trained one: its loss on"):
        verify_saved_model(tmp_path / "model", task, loss, objective, blocks)


def test_probe_loss_is_the_mean_over_the_predicted_tokens_of_the_first_blocks(tmp_path):
    model = make_toy_model("gpt2")
    blocks = make_toy_blocks(tmp_path / "blocks", "causal", 6, 16)
    ids = torch.from_numpy(blocks[range(4)].astype("int64"))
    with torch.no_grad():
        expected = model(ids, labels=ids).loss.item()
    assert compute_probe_loss(model, make_toy_objective(model, False), blocks) == pytest.approx(expected, rel=1e-5)
    alone = save_blocks(tmp_path / "one", blocks[[2]])
    assert math.isfinite(compute_probe_loss(model, make_toy_objective(model, False), alone))
