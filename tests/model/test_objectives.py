"""Objectives: windows that predict every text token once, labels, and isolation of documents."""

import dataclasses
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toys import (
    CAUSAL,
    CLS,
    END,
    MASK,
    MASKED,
    SEP,
    VOCABULARIES,
    add_control_tokens,
    draw_text_ids,
    make_objective_config,
    make_texts,
    make_toy_model,
    save_blocks,
)

from stages.core.errors import StageError
from stages.model.masking import IGNORED
from stages.model.objectives import NUM_PASSES, build_evaluation_batch, make_objective

LENGTHS = st.lists(st.one_of(st.integers(0, 3), st.integers(0, 150)), min_size=1, max_size=5)
CONTEXTS = st.integers(4, 70)
TEXTS = [draw_text_ids(length, seed).tolist() for seed, length in [(1, 9), (2, 11), (3, 6)]]


def documents(lengths):
    return [draw_text_ids(length, seed) for seed, length in enumerate(lengths)]


# -- windows -----------------------------------------------------------------------------------------------------------


@given(lengths=LENGTHS, context=CONTEXTS)
def test_causal_windows_of_any_documents_predict_each_token_once_in_order(lengths, context):
    texts = documents(lengths)
    predicted = defaultdict(list)
    for window in make_objective("causal", CAUSAL).build_windows(make_texts(texts), context):
        predicted[window.document_index] += window.targets.tolist()
    assert [predicted[index] for index in range(len(texts))] == [text.tolist() for text in texts]


@given(lengths=LENGTHS, context=CONTEXTS)
def test_causal_windows_of_any_documents_are_pieces_of_at_most_context_tokens_half_a_window_apart(lengths, context):
    texts = documents(lengths)
    starts = defaultdict(list)
    for window in make_objective("causal", CAUSAL).build_windows(make_texts(texts), context):
        stream = np.array([END, *texts[window.document_index]])
        start = len(starts[window.document_index]) * (context // 2)
        starts[window.document_index].append(start)
        # The tokens of a window are its inputs and its last target.
        assert len(window.input_ids) + 1 <= context
        assert (window.input_ids == stream[start : start + len(window.input_ids)]).all()
        assert (window.targets == stream[start + window.positions + 1]).all()
        # A window predicts the tokens after the previous one; all but the first have at least half a window of context.
        before = start - context // 2 + context if start else 1
        assert start + int(window.positions[0]) + 1 == before


def test_causal_windows_of_a_document_of_exactly_the_context_are_one():
    # With the end-of-sequence token before it, a document of 7 tokens fills a window of 8 tokens.
    windows = list(make_objective("causal", CAUSAL).build_windows(make_texts(documents([7])), 8))
    assert [len(window.targets) for window in windows] == [7]


def test_causal_windows_of_one_token_more_than_the_context_are_two():
    windows = list(make_objective("causal", CAUSAL).build_windows(make_texts(documents([8])), 8))
    assert [len(window.targets) for window in windows] == [7, 1]
    assert len(windows[1].input_ids) == 4


@given(lengths=LENGTHS, context=CONTEXTS)
def test_masked_windows_of_any_documents_predict_each_text_token_once(lengths, context):
    texts = documents(lengths)
    tokens = [[] for _ in texts]
    num_pieces = 0
    for window in make_objective("mlm", MASKED).build_windows(make_texts(texts), context):
        assert len(window.input_ids) <= context
        assert (window.input_ids[[0, -1]] == [CLS, SEP]).all()
        assert (window.input_ids[window.positions] == MASK).all()
        assert (window.input_ids == MASK).sum() == len(window.positions)
        assert (np.diff(window.positions) == NUM_PASSES).all()
        tokens[window.document_index] += window.targets.tolist()
        num_pieces += len(window.targets)
    assert [sorted(found) for found in tokens] == [sorted(text.tolist()) for text in texts]
    assert num_pieces == sum(lengths)


@given(length=st.integers(1, 100), context=CONTEXTS)
def test_masked_windows_unmasked_by_their_targets_are_the_consecutive_pieces_of_the_document(length, context):
    text = np.arange(5, 5 + length).astype(np.uint16)  # each token is its position
    passes = defaultdict(int)
    for window in make_objective("mlm", MASKED).build_windows(make_texts([text]), context):
        unmasked = window.input_ids.copy()
        unmasked[window.positions] = window.targets
        passes[tuple(unmasked.tolist())] += len(window.targets)
    size = context - 2
    pieces = [(CLS, *text[start : start + size].tolist(), SEP) for start in range(0, length, size)]
    assert dict(passes) == {piece: len(piece) - 2 for piece in pieces}


# -- batches -----------------------------------------------------------------------------------------------------------


def test_causal_batch_of_packed_documents_labels_every_document_end_with_itself():
    blocks = np.array([add_control_tokens("causal", [7, 8, 9], [10], [11, 12])], np.uint16)
    batch = make_objective("causal", CAUSAL, make_objective_config("causal")).build_batch(blocks, [0], 0, 0)
    ends = np.flatnonzero(blocks[0] == END)
    assert len(ends) == 4
    # The first one is at the start of the block, where no output predicts it.
    assert batch["labels"][0, ends].tolist() == [IGNORED, END, END, END]
    assert batch["labels"][0, 1:].tolist() == blocks[0, 1:].tolist()


def test_causal_targets_are_the_next_tokens_and_as_many_as_the_labels():
    blocks = np.stack([draw_text_ids(16, seed) for seed in range(3)])
    objective = make_objective("causal", CAUSAL, make_objective_config("causal"))
    labels = objective.build_batch(blocks, range(3), 0, 0)["labels"]
    targets = objective.get_targets(labels)
    assert targets.tolist() == [[*row[1:].tolist(), IGNORED] for row in blocks]
    assert int((labels != IGNORED).sum()) == int((targets != IGNORED).sum()) == 3 * 15


def test_masked_targets_are_the_labels():
    labels = torch.tensor([[IGNORED, 7, IGNORED, 9]])
    assert make_objective("mlm", MASKED, make_objective_config("mlm")).get_targets(labels).tolist() == labels.tolist()


@pytest.mark.parametrize("task", ["causal", "mlm"])
def test_batch_of_a_uint16_block_is_int64_and_leaves_the_block(task):
    blocks = np.array([add_control_tokens(task, *(draw_text_ids(6, seed).tolist() for seed in range(8)))], np.uint16)
    before = blocks.copy()
    batch = make_objective(task, VOCABULARIES[task], make_objective_config(task)).build_batch(blocks, [0], 0, 0)
    assert {batch["input_ids"].dtype, batch["labels"].dtype} == {torch.int64}
    assert (blocks == before).all()


def test_evaluation_batch_of_masked_blocks_in_any_company_is_the_same(tmp_path):
    blocks = save_blocks(tmp_path, np.stack([draw_text_ids(40, seed) for seed in range(6)]))
    objective = make_objective("mlm", MASKED, make_objective_config("mlm"))
    whole, part = build_evaluation_batch(objective, blocks, range(6)), build_evaluation_batch(objective, blocks, [4, 5])
    assert (whole["labels"] != IGNORED).any()
    assert (whole["labels"][4:] == part["labels"]).all()
    assert (whole["input_ids"][4:] == part["input_ids"]).all()


@pytest.mark.parametrize("task", ["causal", "mlm"])
def test_batch_with_isolated_documents_numbers_their_tokens_in_int32_and_holds_nothing_longer(task):
    blocks = np.array([add_control_tokens(task, *TEXTS)[3:], add_control_tokens(task, *reversed(TEXTS))[3:]], np.uint16)
    batch = make_objective(task, VOCABULARIES[task], make_objective_config(task, True)).build_batch(
        blocks, [0, 1], 0, 0
    )
    first = {"causal": END, "mlm": CLS}[task]
    expected = [[int((row[: place + 1] == first).sum()) for place in range(len(row))] for row in blocks]
    assert batch["segment_ids"].tolist() == expected
    assert batch["segment_ids"].dtype == torch.int32
    assert {value.shape for value in batch.values()} == {blocks.shape}


BLOOM = SimpleNamespace(config=SimpleNamespace(model_type="bloom"))


def test_make_objective_with_isolation_for_an_unproven_architecture_is_an_error_that_names_it():
    with pytest.raises(StageError, match=r"bloom.*isolate_documents: false"):
        make_objective("causal", CAUSAL, make_objective_config("causal", True), BLOOM)


def test_make_objective_without_isolation_takes_any_architecture():
    objective = make_objective("causal", CAUSAL, make_objective_config("causal", False), BLOOM)
    batch = objective.build_batch(np.array([add_control_tokens("causal", *TEXTS)], np.uint16), [0], 0, 0)
    assert batch.keys() == {"input_ids", "labels"}


def test_make_objective_with_isolation_but_no_token_before_documents_is_an_error():
    bare = dataclasses.replace(MASKED, prefix=[], suffix=[])
    with pytest.raises(StageError, match="isolate_documents"):
        make_objective("mlm", bare, make_objective_config("mlm", True), make_toy_model("roberta"))
