"""Attention on a CPU: the values and gradients of torch, with and without dropout, masks and grouped heads."""

import pytest
import torch
import torch.nn.functional as F
from toys import CAUSAL, MODEL_TASKS, VOCABULARIES, make_toy_model
from transformers.activations import NewGELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from stages.train import attention
from stages.train.attention import Dropout, DropoutAttention, attend_in_fp32, draw_dropout_mask, use_fast_kernels

BATCH, HEADS, LENGTH, SIZE = 3, 4, 7, 8
CAUSAL_MASK = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
SEGMENTS = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0]])
APART = SEGMENTS[:, None, :, None] != SEGMENTS[:, None, None, :]
MASKS = {
    "none": None,
    "bool": CAUSAL_MASK & ~APART,
    "bool of all rows": CAUSAL_MASK,
    "additive": torch.zeros(APART.shape).masked_fill_(APART, torch.finfo(torch.float32).min),
}


def inputs(heads=HEADS, key_heads=HEADS, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(BATCH, number, LENGTH, SIZE, generator=generator).to(dtype).requires_grad_()
        for number in (heads, key_heads, key_heads)
    ]


def with_gradients(function, tensors):
    """Output of `function` and its gradients with respect to `tensors`, for a fixed gradient of the output."""
    output = function(*tensors)
    generator = torch.Generator().manual_seed(1)
    gradients = torch.autograd.grad(output, tensors, torch.randn(output.shape, generator=generator).to(output.dtype))
    return output, *gradients


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_dropped_attention_has_the_value_and_gradients_of_its_definition(mask):
    def defined(query, key, value):
        torch.manual_seed(5)
        keep, share = draw_dropout_mask((BATCH, HEADS, LENGTH, LENGTH), 0.3)
        scores = query @ key.mT * 0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        return (scores.softmax(-1) * keep / share) @ value

    def ours(query, key, value):
        torch.manual_seed(5)
        return DropoutAttention.apply(query, key, value, mask, 0.3, 0.5)

    for one, other in zip(with_gradients(ours, inputs()), with_gradients(defined, inputs()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("key_heads", [HEADS, 2])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_attend_whose_dropout_keeps_all_is_torchs_own(monkeypatch, mask, key_heads, causal):
    module = torch.nn.Module()
    module.is_causal, module.num_key_value_groups = causal, HEADS // key_heads
    monkeypatch.setattr(
        attention, "draw_dropout_mask", lambda shape, dropout: (torch.ones(shape, dtype=torch.bool), 1.0)
    )

    def ours(*tensors):
        return attend_in_fp32(module, *tensors, mask, dropout=0.1)[0]

    def torchs(*tensors):
        return sdpa_attention_forward(module, *tensors, mask)[0]

    tensors = inputs(key_heads=key_heads)
    for one, other in zip(with_gradients(ours, tensors), with_gradients(torchs, tensors), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_attend_under_bf16_autocast_is_that_of_fp32_to_the_precision_of_its_inputs(dropout):
    module = torch.nn.Module()
    module.is_causal, module.num_key_value_groups = True, 1

    def ours(*tensors):
        torch.manual_seed(2)
        return attend_in_fp32(module, *tensors, None, dropout=dropout)[0]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = with_gradients(ours, inputs(dtype=torch.bfloat16))
    exact = with_gradients(ours, [tensor.detach().float().requires_grad_() for tensor in inputs(dtype=torch.bfloat16)])
    for one, other in zip(found, exact, strict=True):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one, other.bfloat16(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.9])
def test_dropout_mask_is_as_often_as_it_says_and_independent_between_neighbours(dropout):
    torch.manual_seed(0)
    keep, share = draw_dropout_mask((1000, 1000), dropout)
    assert share == pytest.approx(1.0 - dropout, abs=2**-16)
    assert keep.float().mean().item() == pytest.approx(share, abs=0.002)
    flat = keep.flatten().float()
    for apart in (1, 2, 3, 4, 1000):  # four draws come from one number
        both = (flat[apart:] * flat[:-apart]).mean().item()
        assert both == pytest.approx(share**2, abs=0.002)


def test_dropout_mask_follows_the_seed_and_differs_from_call_to_call():
    torch.manual_seed(3)
    first, second = draw_dropout_mask((11,), 0.5)[0], draw_dropout_mask((11,), 0.5)[0]
    torch.manual_seed(3)
    assert torch.equal(draw_dropout_mask((11,), 0.5)[0], first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gpt_neo", "gptj", "roberta", "bert", "modernbert"])
def test_use_fast_kernels_changes_neither_logits_nor_gradients_nor_what_is_saved(model_type):
    vocabulary = VOCABULARIES[MODEL_TASKS[model_type]]
    tokens = torch.randint(5, vocabulary.size, (2, 20), generator=torch.Generator().manual_seed(0))
    found = []
    for fast in (False, True):
        model = make_toy_model(model_type)
        if fast:
            use_fast_kernels(model, "cpu")
        logits = model.train()(tokens).logits
        F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
        found.append(
            (logits.detach(), {name: p.grad for name, p in model.named_parameters()}, model.config.to_json_string())
        )
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=1e-5)
    assert found[0][2] == found[1][2]


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_use_fast_kernels_for_another_device_leaves_its_attention(device):
    model = make_toy_model("gpt2")  # still on the CPU, as before the Trainer moves the model
    use_fast_kernels(model, device)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_has_the_value_and_gradient_of_its_definition(dtype):
    def defined(tensor):
        torch.manual_seed(5)
        keep, share = draw_dropout_mask(tuple(tensor.shape), 0.3)
        return torch.where(keep, tensor / share, 0.0)

    def ours(tensor):
        torch.manual_seed(5)
        return Dropout(0.3)(tensor)

    for one, other in zip(
        with_gradients(ours, inputs(dtype=dtype)[:1]), with_gradients(defined, inputs(dtype=dtype)[:1]), strict=True
    ):
        torch.testing.assert_close(one, other)
        assert 0.2 < (one == 0.0).float().mean() < 0.4


@pytest.mark.parametrize(("rate", "training"), [(0.0, True), (1.0, True), (0.3, False)])
def test_dropout_that_draws_nothing_is_torchs_own(rate, training):
    tensor = torch.ones(2, 3)
    assert torch.equal(Dropout(rate).train(training)(tensor), torch.nn.Dropout(rate).train(training)(tensor))


@pytest.mark.parametrize(("device", "expected"), [("cpu", Dropout), ("cuda", torch.nn.Dropout)])
def test_use_fast_kernels_exchanges_dropout_on_a_cpu_alone(device, expected):
    model = make_toy_model("gpt2", resid_pdrop=0.1, embd_pdrop=0.2)
    use_fast_kernels(model, device)
    found = [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    assert {type(module) for module in found} == {expected}
    assert {module.p for module in found} >= {0.1, 0.2}


def test_use_fast_kernels_leaves_no_activation_of_many_passes():
    model = make_toy_model("gpt2", activation_function="gelu_new")
    assert any(isinstance(module, NewGELUActivation) for module in model.modules())
    use_fast_kernels(model, "cpu")
    assert not any(isinstance(module, NewGELUActivation) for module in model.modules())
    assert model.config.activation_function == "gelu_new"


def test_attention_with_dropout_keeps_no_scores_for_the_backward_pass():
    model = make_toy_model("gpt2", attn_pdrop=0.1)
    use_fast_kernels(model.train(), "cpu")
    sizes = []

    def pack(tensor):
        sizes.append((tensor.dtype, tensor.numel()))
        return tensor

    length, heads = 60, 2
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.full((1, length), CAUSAL.size - 1)).logits.sum()
    assert sizes and not [size for dtype, size in sizes if dtype.is_floating_point and size >= heads * length * length]
