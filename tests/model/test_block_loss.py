"""Loss over blocks: token-weighted, and independent of batch size and autocast."""

import copy

import numpy as np
import pytest
import torch
from toys import (
    MODEL_TASKS,
    VOCABULARIES,
    draw_text_ids,
    make_toy_blocks,
    make_toy_model,
    make_toy_objective,
    save_blocks,
)

from stages.core.errors import StageError
from stages.model.block_loss import check_predictions, compute_block_loss
from stages.model.isolation import isolate_segments
from stages.model.masking import IGNORED
from stages.model.objectives import build_evaluation_batch

MODELS = ["gpt2", "llama", "roberta", "bert", "modernbert"]


@pytest.mark.parametrize("model_type", MODELS)
def test_block_loss_of_uneven_blocks_is_the_mean_over_tokens(tmp_path, model_type):
    model = make_toy_model(model_type)
    blocks = make_toy_blocks(tmp_path, MODEL_TASKS[model_type], 11, 24)
    objective = make_toy_objective(model)
    total, counts = 0.0, []
    for index in range(len(blocks)):
        batch = build_evaluation_batch(objective, blocks, [index])
        labels = batch.pop("labels")
        if MODEL_TASKS[model_type] == "causal":
            labels = torch.cat([labels[:, 1:], torch.full((1, 1), IGNORED)], dim=1)
        with torch.no_grad():
            exact = copy.deepcopy(model).double()
            shares = exact(**isolate_segments(batch, exact), use_cache=False).logits[0].log_softmax(-1)
        kept = labels[0] != IGNORED
        total -= float(shares[kept].gather(-1, labels[0, kept][:, None]).sum())
        counts.append(int(kept.sum()))
    assert MODEL_TASKS[model_type] == "causal" or len(set(counts)) > 2
    assert compute_block_loss(model, objective, blocks, 4096) == pytest.approx(total / sum(counts), rel=1e-6)


@pytest.mark.parametrize("batch_tokens", [1, 50, 100, 4096])
@pytest.mark.parametrize("model_type", MODELS)
def test_block_loss_at_any_batch_size_is_equal(tmp_path, model_type, batch_tokens):
    model = make_toy_model(model_type)
    blocks = make_toy_blocks(tmp_path, MODEL_TASKS[model_type], 11, 24)
    loss = compute_block_loss(model, make_toy_objective(model), blocks, batch_tokens)
    assert loss == pytest.approx(compute_block_loss(model, make_toy_objective(model), blocks, 240), rel=1e-6)


@pytest.mark.parametrize("model_type", MODELS)
def test_block_loss_of_two_runs_has_the_same_digits(tmp_path, model_type):
    model = make_toy_model(model_type)
    blocks = make_toy_blocks(tmp_path, MODEL_TASKS[model_type], 11, 24)
    losses = {compute_block_loss(model, make_toy_objective(model), blocks, 100) for _ in range(2)}
    assert len(losses) == 1


def test_block_loss_inside_bf16_autocast_is_that_of_fp32(tmp_path):
    model = make_toy_model("bert")
    blocks = make_toy_blocks(tmp_path, "mlm", 4, 24)
    outside = compute_block_loss(model, make_toy_objective(model), blocks, 4096)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compute_block_loss(model, make_toy_objective(model), blocks, 4096) == outside


def test_block_loss_of_a_causal_model_equals_transformers_own_loss(tmp_path):
    model = make_toy_model("gpt2")
    ids = np.stack([draw_text_ids(16, seed) for seed in range(4)])
    blocks = save_blocks(tmp_path, ids)
    input_ids = torch.from_numpy(ids.astype(np.int64))
    with torch.no_grad():
        stock = float(model(input_ids, labels=input_ids).loss)
    assert compute_block_loss(model, make_toy_objective(model, False), blocks, 4096) == pytest.approx(stock, rel=1e-6)


@pytest.mark.parametrize(("task", "block_size"), [("causal", 1), ("mlm", 4)])
def test_block_loss_of_blocks_in_which_nothing_is_predicted_says_so(tmp_path, task, block_size):
    model = make_toy_model("gpt2" if task == "causal" else "roberta")
    vocabulary = VOCABULARIES[task]
    ids = np.full((3, block_size), vocabulary.special["eos_token" if task == "causal" else "sep_token"])
    blocks = save_blocks(tmp_path / "blocks", ids)  # a control token is never masked
    with pytest.raises(StageError, match=r"blocks: no token is predicted in its 3 blocks of \d tokens"):
        compute_block_loss(model, make_toy_objective(model, False), blocks, 64)


def test_check_predictions_looks_on_until_a_block_has_one(tmp_path):
    model = make_toy_model("roberta")
    ids = np.full((40, 16), VOCABULARIES["mlm"].special["sep_token"])
    ids[-1] = 7
    check_predictions(make_toy_objective(model, False), save_blocks(tmp_path / "blocks", ids))
