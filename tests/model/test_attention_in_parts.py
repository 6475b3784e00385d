"""SDPA of long rows in parts on a CPU: the same function in less memory."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from toys import draw_text_ids, make_toy_model, make_toy_objective, save_blocks
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from stages.model import attention
from stages.model.attention import attend_in_parts, use_attention_in_parts
from stages.model.block_loss import compute_block_loss

MODULE = SimpleNamespace(is_causal=False)
LENGTH, PART = 50, 16


@pytest.fixture(autouse=True)
def short_parts(monkeypatch):
    monkeypatch.setattr(attention, "QUERIES_PER_PART", PART)


@pytest.fixture
def seen(monkeypatch):
    """Numbers of queries and keys of each call of torch's kernel."""
    sizes = []
    kernel = F.scaled_dot_product_attention

    def recorded(query, key, *others, **named):
        sizes.append((query.shape[2], key.shape[2]))
        return kernel(query, key, *others, **named)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    return sizes


def inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, LENGTH, 4, generator=generator, requires_grad=True) for _ in range(3)]


def packed_mask(causal=False):
    """Mask [2, 1, length, length] bool of segments of 7 and of 11 tokens."""
    index = torch.arange(LENGTH)
    segments = torch.stack([index // 7, index // 11])
    mask = segments[:, None, :, None] == segments[:, None, None, :]
    return mask & (index[:, None] >= index) if causal else mask


@pytest.mark.parametrize("causal", [False, True])
def test_attention_in_parts_has_the_values_and_gradients_of_the_whole(causal):
    found = []
    for attend in (sdpa_attention_forward, attend_in_parts):
        tensors = inputs()
        output = attend(MODULE, *tensors, packed_mask(causal), dropout=0.0, scaling=0.7)[0]
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
        found.append([output.detach(), *(tensor.grad for tensor in tensors)])
    for whole, parts in zip(*found, strict=True):
        assert whole.abs().max() > 0.01
        torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-5)


def test_attention_in_parts_takes_no_more_queries_at_once_and_only_the_keys_that_they_see(seen):
    attend_in_parts(MODULE, *inputs(), packed_mask())
    assert [queries for queries, _ in seen] == [PART, PART, PART, LENGTH - 3 * PART]
    assert max(keys for _, keys in seen) <= PART + 2 * 10  # a segment of 11 tokens extends beyond either end


@pytest.mark.parametrize(
    ("mask", "others"),
    [
        (None, {}),
        (torch.zeros(2, 1, LENGTH, LENGTH), {}),  # added to the scores
        (packed_mask(), {"dropout": 0.5}),
    ],
    ids=["none", "additive", "dropout"],
)
def test_attention_of_other_kinds_is_torchs_own(seen, mask, others):
    attend_in_parts(MODULE, *inputs(), mask, **others)
    assert seen == [(LENGTH, LENGTH)]


def test_attention_of_a_short_row_is_torchs_own(seen, monkeypatch):
    monkeypatch.setattr(attention, "QUERIES_PER_PART", LENGTH)
    attend_in_parts(MODULE, *inputs(), packed_mask())
    assert seen == [(LENGTH, LENGTH)]


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "roberta", "modernbert"])
def test_models_on_a_cpu_take_long_rows_in_parts_and_have_the_same_loss(tmp_path, monkeypatch, seen, model_type):
    model = make_toy_model(model_type)
    ids = draw_text_ids(3 * LENGTH).reshape(3, LENGTH)
    ids[:, ::9] = 0  # start of a document
    blocks, objective = save_blocks(tmp_path, ids), make_toy_objective(model)
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", sdpa_attention_forward)
    whole = compute_block_loss(model, objective, blocks, 4096)
    assert max(queries for queries, _ in seen) == LENGTH
    seen.clear()
    use_attention_in_parts()
    assert compute_block_loss(model, objective, blocks, 4096) == pytest.approx(whole, rel=1e-6)
    assert max(queries for queries, _ in seen) == PART
