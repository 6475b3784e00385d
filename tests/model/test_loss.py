"""Loss from hidden states: equal to the loss of transformers' logits, with its gradients, for every architecture."""

import copy

import pytest
import torch
import torch.nn.functional as F
from toys import VOCAB_SIZE, make_toy_model
from transformers import AutoConfig, AutoModelForCausalLM

from stages.model import loss as loss_module
from stages.model.loss import TokenLoss
from stages.model.masking import IGNORED

MODELS = ["gpt2", "llama", "gpt_neo", "gptj", "roberta", "bert", "modernbert"]


def toy(model_type, **overrides):
    return make_toy_model(model_type, attention="eager", **overrides)  # the only one that GPT-Neo supports


def batch(rows=3, length=16, seed=0, predicted=0.5):
    """Token ids [rows, length], and the targets, of which a share `predicted` is predicted."""
    generator = torch.Generator().manual_seed(seed)
    ids, targets = (torch.randint(5, VOCAB_SIZE, (rows, length), generator=generator) for _ in range(2))
    targets[torch.rand(rows, length, generator=generator) >= predicted] = IGNORED
    return ids, targets


def ours(model, ids, targets):
    """Loss and its gradient."""
    loss = TokenLoss(model)
    with loss.hidden_outputs():
        outputs = model(ids).logits
    return differentiated(model, loss.sum_nats(outputs, targets))


def stock(model, ids, targets):
    logits = model(ids).logits.float()
    return differentiated(model, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))


def differentiated(model, loss):
    model.zero_grad()
    loss.backward()
    return loss.detach(), gradient_of(model)


def gradient_of(model):
    return torch.cat([weight.grad.flatten().clone() for weight in model.parameters()])


def assert_equal(one, other, rtol):
    torch.testing.assert_close(one[0], other[0], rtol=rtol, atol=0.0)
    assert float((one[1] - other[1]).norm() / other[1].norm()) < rtol


@pytest.fixture(params=[2**26, 7 * VOCAB_SIZE, VOCAB_SIZE], ids=["one chunk", "chunks of 7", "chunks of 1"])
def chunks(request, monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", request.param)
    monkeypatch.setattr(loss_module, "CACHED_ELEMENTS", 3 * VOCAB_SIZE)
    monkeypatch.setattr(loss_module, "VOCABULARY_SLICE", 7)


@pytest.mark.parametrize("model_type", MODELS)
def test_sum_in_chunks_of_any_size_has_the_loss_and_gradients_of_the_stock_logits(model_type, chunks):
    model = toy(model_type)
    assert_equal(ours(model, *batch()), stock(model, *batch()), 1e-5)


@pytest.mark.parametrize("model_type", MODELS)
def test_each_in_chunks_of_any_size_is_the_loss_of_the_stock_logits(model_type, chunks):
    model, (ids, _) = toy(model_type), batch()
    loss, targets = TokenLoss(model), ids.flatten()
    with torch.inference_mode():
        with loss.hidden_outputs():
            outputs = model(ids).logits
        expected = F.cross_entropy(model(ids).logits.flatten(0, 1), targets, reduction="none")
        torch.testing.assert_close(loss.compute_nats(outputs.flatten(0, 1), targets), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model_type", MODELS)
def test_sum_under_bf16_autocast_is_near_the_stock_loss_in_bf16_and_in_fp32_elsewhere(model_type):
    model = toy(model_type)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half, stock_half = ours(model, *batch()), stock(model, *batch())
    assert half[0].dtype == torch.float32
    assert_equal(half, stock_half, 0.03)
    exact = ours(model, *batch())
    assert half[0] != exact[0]
    assert_equal(half, exact, 0.05)


@pytest.mark.parametrize("model_type", ["gpt2", "roberta", "gptj"])
def test_sum_of_accumulated_parts_has_the_gradients_of_the_whole(model_type):
    model, (ids, targets) = toy(model_type), batch(rows=4)
    whole = ours(model, ids, targets)
    model.zero_grad()
    loss, total = TokenLoss(model), 0.0
    for row in range(4):
        with loss.hidden_outputs():
            outputs = model(ids[row : row + 1]).logits
        part = loss.sum_nats(outputs, targets[row : row + 1])
        part.backward()
        total += part.detach()
    assert_equal((total, gradient_of(model)), whole, 1e-5)


@pytest.mark.parametrize("model_type", ["gpt2", "roberta", "gptj"])
def test_sum_scaled_has_scaled_gradients(model_type):
    model, (ids, targets) = toy(model_type), batch()
    loss = TokenLoss(model)
    with loss.hidden_outputs():
        outputs = model(ids).logits
    scaled = differentiated(model, loss.sum_nats(outputs, targets) / 7)
    assert_equal(scaled, [part / 7 for part in stock(model, ids, targets)], 1e-5)


@pytest.mark.parametrize("model_type", ["gpt2", "roberta", "gptj"])
def test_sum_over_no_token_is_zero_with_gradients_of_zero(model_type):
    total, gradient = ours(toy(model_type), *batch(predicted=0.0))
    assert total == 0.0
    assert (gradient == 0.0).all()


def test_sum_of_an_improbable_token_is_finite():
    model, (ids, targets) = toy("gpt2"), batch()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(500)
    total, gradient = ours(model, ids, targets)
    assert total > 1e4
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("model_type", MODELS)
def test_hidden_outputs_leaves_the_model_as_it_was(model_type):
    model, (ids, _) = toy(model_type), batch()
    before, attributes = model(ids).logits, set(vars(model.get_output_embeddings()))
    with TokenLoss(model).hidden_outputs():
        assert model(ids).logits.shape[-1] == 16
    assert torch.equal(model(ids).logits, before)
    assert set(vars(model.get_output_embeddings())) == attributes
    assert torch.equal(copy.deepcopy(model)(ids).logits, before)


@pytest.mark.parametrize(
    ("model_type", "cap"),
    [
        ("gemma2", {"final_logit_softcapping": 30.0}),
        ("cohere", {"logit_scale": 0.5}),
        ("granite", {"logits_scaling": 4}),
    ],
)
@pytest.mark.parametrize("initializer_range", [0.4, 0.002])
def test_loss_of_an_architecture_that_scales_or_caps_its_logits_is_that_of_its_own_logits(
    model_type, cap, initializer_range
):
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": VOCAB_SIZE, "pad_token_id": 0}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "initializer_range": initializer_range}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **small, **heads, **tokens, **cap)).eval()
    assert_equal(ours(model, *batch()), stock(model, *batch()), 1e-5)


def test_loss_of_a_model_in_training_mode_is_made_of_hidden_states_all_the_same():
    model = toy("gpt2", resid_pdrop=0.5).train()
    with TokenLoss(model).hidden_outputs():
        assert model(batch()[0]).logits.shape[-1] == 16
    assert model.training
