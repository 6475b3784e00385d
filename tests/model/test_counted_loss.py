"""Training and evaluation on the tokens that count: labels, gradients and windows."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from toys import (
    END,
    MASK,
    MODEL_TASKS,
    VOCABULARIES,
    draw_text_ids,
    make_objective_config,
    make_toy_model,
    make_toy_objective,
    save_blocks,
)

from stages.core.artifacts import COUNTED, SEGMENT_START
from stages.figures.metrics import compute_document_nats
from stages.model.block_loss import compute_block_loss
from stages.model.loss import TokenLoss
from stages.model.masking import IGNORED
from stages.model.objectives import make_objective
from stages.tokens.encoding import DocumentText

MODELS = ["gpt2", "llama", "roberta", "bert"]


def marked_blocks(seed=0, num_blocks=4, block_size=24):
    """Blocks of text in which a random half of the tokens counts, and their marks."""
    random = np.random.default_rng(seed)
    ids = np.stack([draw_text_ids(block_size, seed * 100 + number) for number in range(num_blocks)])
    return ids, (random.random(ids.shape) < 0.5).astype(np.uint8) * COUNTED


@pytest.mark.parametrize("task", ["causal", "mlm"])
def test_labels_of_tokens_that_do_not_count_are_ignored_and_others_unchanged(task):
    ids, marks = marked_blocks()
    objective = make_objective(task, VOCABULARIES[task], make_objective_config(task))
    whole, part = objective.build_batch(ids, range(4), 3, 0), objective.build_batch(ids, range(4), 3, 0, marks)
    counts = torch.from_numpy(marks == COUNTED)
    assert (part["labels"][~counts] == IGNORED).all()
    assert (part["labels"][counts] == whole["labels"][counts]).all()
    assert (part["labels"] != IGNORED).any()
    # Tokens that do not count are context and never masked.
    assert (part["input_ids"][~counts] == torch.from_numpy(ids.astype(np.int64))[~counts]).all()
    assert (part["input_ids"][counts] == whole["input_ids"][counts]).all()


@pytest.mark.parametrize("model_type", MODELS)
def test_gradients_of_the_loss_are_those_of_the_counted_tokens_alone(model_type):
    model, task = make_toy_model(model_type).double(), MODEL_TASKS[model_type]
    ids, marks = marked_blocks()
    objective = make_objective(task, VOCABULARIES[task], make_objective_config(task))
    batch = objective.build_batch(ids, range(4), 3, 0, marks)
    labels = batch.pop("labels")
    logits = model(**batch).logits
    # By the definition, position by position.
    shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORED) if task == "causal" else labels
    places = (shifted != IGNORED).nonzero().tolist()
    wanted = -sum(logits[row, place].log_softmax(-1)[shifted[row, place]] for row, place in places)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(wanted, parameters, allow_unused=True)
    loss = TokenLoss(model)
    with loss.hidden_outputs():
        hidden = model(**batch).logits
        hidden.retain_grad()
        found = loss.sum_nats(hidden, objective.get_targets(labels))
    found.backward()
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
    for parameter, gradient in zip(parameters, expected, strict=True):
        zeros = torch.zeros_like(parameter)
        ours, theirs = (zeros if values is None else values for values in (parameter.grad, gradient))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)  # Llama's norms compute in fp32
    assert (hidden.grad[shifted == IGNORED] == 0).all()
    assert (hidden.grad[shifted != IGNORED] != 0).any(-1).all()


@pytest.mark.parametrize("model_type", ["gpt2", "roberta"])
def test_block_loss_is_the_mean_over_the_counted_tokens(tmp_path, model_type):
    model, task = make_toy_model(model_type), MODEL_TASKS[model_type]
    ids, marks = marked_blocks()
    objective = make_objective(task, VOCABULARIES[task], make_objective_config(task))
    blocks = save_blocks(tmp_path, ids, marks)
    batch = objective.build_batch(ids, range(4), 0, 2**32 - 1, marks)
    labels = objective.get_targets(batch.pop("labels"))
    with torch.no_grad():
        expected = F.cross_entropy(model(**batch).logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    assert compute_block_loss(model, objective, blocks, 4096) == pytest.approx(float(expected), rel=1e-5)


def test_segments_begin_where_marks_say_so_and_not_at_each_end_of_a_message():
    model = make_toy_model("gpt2")
    objective = make_toy_objective(model, isolate_documents=True)
    ids = np.array([[5, END, 7, 8, END, 9]], np.uint16)
    marks = np.array([[0, 0, 0, SEGMENT_START, 0, 0]], np.uint8)
    assert objective.build_batch(ids, [0], 0, 0, marks)["segment_ids"].tolist() == [[0, 0, 0, 1, 1, 1]]
    assert objective.build_batch(ids, [0], 0, 0)["segment_ids"].tolist() == [[0, 1, 1, 1, 2, 2]]


def some_texts(lengths, seed):
    random = np.random.default_rng(seed)
    return [
        DocumentText(draw_text_ids(length, number), 0, random.random(length) < 0.4)
        for number, length in enumerate(lengths)
    ]


@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=5),
    context=st.integers(4, 40),
    seed=st.integers(0, 99),
    task=st.sampled_from(["causal", "mlm"]),
)
def test_windows_predict_each_token_that_counts_once_and_no_other(lengths, context, seed, task):
    texts = some_texts(lengths, seed)
    found = [[] for _ in texts]
    for window in make_objective(task, VOCABULARIES[task]).build_windows(iter(texts), context):
        assert len(window.targets)
        assert (texts[window.document_index].ids[window.document_positions] == window.targets).all()
        if task == "mlm":
            assert (window.input_ids == MASK).sum() == len(window.targets)
        found[window.document_index] += window.document_positions.tolist()
    assert [sorted(places) for places in found] == [np.flatnonzero(text.is_predicted).tolist() for text in texts]


@pytest.mark.parametrize("model_type", ["gpt2", "roberta"])
def test_nats_of_the_counted_tokens_are_a_part_of_those_of_all(model_type):
    """Causal: the bits of a token do not depend on the other predicted tokens. Masked: fewer others are masked."""
    model, task = make_toy_model(model_type), MODEL_TASKS[model_type]
    texts = some_texts([30, 9, 0, 17], 1)
    objective, kept = make_objective(task, VOCABULARIES[task]), {}

    def keep(window, nats):
        kept.update(
            {
                (window.document_index, place): value
                for place, value in zip(window.document_positions.tolist(), nats, strict=True)
            }
        )

    every = [text._replace(is_predicted=None) for text in texts]
    compute_document_nats(model, objective.build_windows(every, 12), 4, 512, keep)
    nats, num_tokens = compute_document_nats(model, objective.build_windows(texts, 12), 4, 512)
    assert num_tokens.tolist() == [int(text.is_predicted.sum()) for text in texts]
    if task == "causal":
        for number, text in enumerate(texts):
            places = np.flatnonzero(text.is_predicted).tolist()
            assert nats[number] == pytest.approx(math.fsum(kept[number, place] for place in places), rel=1e-6)
