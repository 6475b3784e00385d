"""Isolation of the documents in a block, with every attention implementation."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from toys import (
    CLS,
    EAGER,
    END,
    MODEL_TASKS,
    VOCABULARIES,
    add_control_tokens,
    draw_text_ids,
    make_objective_config,
    make_toy_model,
    make_toy_objective,
)
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from stages.model.isolation import compute_segment_positions, isolate_segments
from stages.model.objectives import make_objective
from stages.model.precision import full_precision
from stages.model.schema import ISOLATION_PROVEN

TEXTS = [draw_text_ids(length, seed).tolist() for seed, length in [(1, 9), (2, 11), (3, 6)]]
PROVEN = [name for names in ISOLATION_PROVEN.values() for name in names]
VARLEN = "flash_reference"
CASES = [
    (name, attention)
    for name in PROVEN
    for attention in ("eager", "sdpa", VARLEN)
    if attention == "eager" or name not in EAGER
]


@pytest.mark.parametrize(
    ("segment_ids", "expected"),
    [
        ([1, 1, 1, 2, 2], [0, 1, 2, 0, 1]),
        ([0, 0, 1, 1, 1], [0, 1, 0, 1, 2]),
        ([0, 0, 0, 0, 0], [0, 1, 2, 3, 4]),
        ([1, 2, 3, 3, 4], [0, 0, 0, 1, 0]),
    ],
)
def test_segment_positions_restart_with_each_segment(segment_ids, expected):
    assert compute_segment_positions(torch.tensor([segment_ids], dtype=torch.int32)).tolist() == [expected]


def varlen_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    dropout=0.0,
    scaling=None,
    is_causal=None,
    sliding_window=None,
    **lengths,
):
    """Emulate FlashAttention's variable-length attention on a CPU: all rows form one row of segments."""
    assert attention_mask is None
    bounds = lengths["cu_seq_lens_q"].tolist()
    assert bounds == lengths["cu_seq_lens_k"].tolist()
    assert lengths["max_length_q"] == lengths["max_length_k"] >= max(np.diff(bounds))
    # [batch, heads, length, size] -> [heads, batch * length, size]
    flat = [tensor.transpose(0, 1).flatten(1, 2) for tensor in (query, key, value)]
    causal = module.is_causal if is_causal is None else is_causal
    outputs = []
    for start, end in itertools.pairwise(bounds):
        index = torch.arange(end - start)
        distance = index[:, None] - index
        seen = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
        if sliding_window is not None:
            seen &= distance.abs() < sliding_window
        part = (tensor[:, start:end] for tensor in flat)
        outputs.append(F.scaled_dot_product_attention(*part, attn_mask=seen, scale=scaling))
    output = torch.cat(outputs, dim=1).unflatten(1, (len(query), -1))  # [heads, batch, length, size]
    return output.permute(1, 2, 0, 3), None


@pytest.fixture(autouse=True)
def varlen(monkeypatch):
    monkeypatch.setitem(AttentionInterface._global_mapping, VARLEN, varlen_attention)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, VARLEN, flash_attention_mask)


def model_with(model_type, attention):
    model = make_toy_model(model_type, attention="sdpa" if attention == VARLEN else attention, use_cache=False)
    model.config._attn_implementation = attention
    return model


def logits_over_b(model, isolate_documents):
    """Logits of document B in a block that begins inside a document and packs A, B and C; and of B in its own block."""
    task = MODEL_TASKS[model.config.model_type]
    config = make_objective_config(task, isolate_documents, **({"mlm_probability": 0.4} if task == "mlm" else {}))
    objective = make_objective(task, VOCABULARIES[task], config, model)
    blocks = np.array([add_control_tokens(task, *texts)[3:] for texts in (TEXTS, TEXTS[::-1])], np.uint16)
    # B begins with the control token before its text: the end of A, or its own.
    end = {"causal": END, "mlm": CLS}[task]
    first = int(np.flatnonzero(blocks[0] == end)[0])
    last = first + 1 + len(TEXTS[1]) + (task == "mlm")
    batch = objective.build_batch(blocks, [0, 1], 0, 0)
    assert blocks[0, first + 1 : first + 1 + len(TEXTS[1])].tolist() == TEXTS[1]
    alone = {"input_ids": batch["input_ids"][:1, first:last]}
    if isolate_documents:
        alone["segment_ids"] = torch.ones_like(alone["input_ids"])
    del batch["labels"]
    with torch.inference_mode():
        packed, alone = (model(**isolate_segments(inputs, model)).logits for inputs in (batch, alone))
    return packed[:1, first:last], alone


@pytest.mark.parametrize(("model_type", "attention"), CASES)
def test_isolated_documents_have_the_logits_of_a_document_alone(model_type, attention):
    packed, alone = logits_over_b(model_with(model_type, attention), isolate_documents=True)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("model_type", "attention"), [case for case in CASES if VARLEN not in case])
def test_documents_without_isolation_have_logits_that_other_documents_change(model_type, attention):
    packed, alone = logits_over_b(model_with(model_type, attention), isolate_documents=False)
    assert float((packed - alone).abs().max()) > 0.01


@pytest.mark.parametrize("attention", ["eager", "sdpa", VARLEN])
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "roberta", "bert", "modernbert"])
def test_isolated_documents_have_the_same_logits_in_every_form_of_attention(model_type, attention):
    batch = packed_batch(make_toy_model(model_type))
    found = []
    for model in (model_with(model_type, "sdpa"), model_with(model_type, attention)):
        with torch.inference_mode():
            found.append(model(**isolate_segments(batch, model)).logits)
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)


@pytest.mark.slow  # FlexAttention compiles the mask and the attention; transformers does not support it for GPT-2
@pytest.mark.parametrize("model_type", ["llama", "roberta", "modernbert"])
def test_isolated_documents_in_flex_attention_have_the_logits_of_sdpa(model_type):
    test_isolated_documents_have_the_same_logits_in_every_form_of_attention(model_type, "flex_attention")


@pytest.mark.parametrize("model_type", PROVEN)
def test_isolated_documents_under_bf16_autocast_have_finite_logits_near_those_of_fp32(model_type):
    model = make_toy_model(model_type)
    batch = packed_batch(model)
    with full_precision(model):
        exact = model(**isolate_segments(batch, model)).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = model(**isolate_segments(batch, model)).logits.float()
    assert float((exact - rough).norm() / exact.norm()) < 0.05


@pytest.mark.parametrize("model_type", ["roberta", "bert", "modernbert"])
def test_mask_for_sdpa_takes_a_byte_for_each_pair_of_tokens(model_type):
    model = make_toy_model(model_type)
    batch = packed_batch(model)
    mask = isolate_segments(batch, model)["attention_mask"]
    rows, length = batch["input_ids"].shape
    for of_layers in mask.values() if isinstance(mask, dict) else [mask]:
        assert (of_layers.dtype, of_layers.shape) == (torch.bool, (rows, 1, length, length))


@pytest.mark.parametrize("model_type", ["gpt2", "roberta"])
def test_figures_of_a_model_with_flash_attention_are_those_of_sdpa(monkeypatch, model_type):
    monkeypatch.setitem(AttentionInterface._global_mapping, VARLEN, None)  # FlashAttention does not support fp32
    model, batch = model_with(model_type, VARLEN), packed_batch(make_toy_model(model_type))
    with full_precision(model):
        found = model(**isolate_segments(batch, model)).logits
    with torch.inference_mode():
        expected = model_with(model_type, "sdpa")
        assert (found == expected(**isolate_segments(batch, expected)).logits).all()
    assert model.config._attn_implementation == VARLEN


def test_batch_without_segments_is_left_as_it_is():
    batch = {"input_ids": torch.zeros(2, 3, dtype=torch.int64)}
    assert isolate_segments(batch, make_toy_model("roberta")) is batch


def packed_batch(model):
    """Two rows of packed documents, without labels."""
    task = MODEL_TASKS[model.config.model_type]
    blocks = np.array([add_control_tokens(task, *texts)[3:] for texts in (TEXTS, TEXTS[::-1])], np.uint16)
    batch = make_toy_objective(model).build_batch(blocks, [0, 1], 0, 0)
    del batch["labels"]
    return batch
