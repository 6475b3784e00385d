"""Metrics against brute force by their definitions, and invariance to settings that must not affect them."""

import copy
import math

import numpy as np
import pytest
import torch
from data_helpers import write_raw
from hypothesis import given
from hypothesis import strategies as st
from toys import (
    CLS,
    END,
    MASK,
    MODEL_TASKS,
    SEP,
    VOCAB_SIZE,
    VOCABULARIES,
    draw_text_ids,
    make_texts,
    make_toy_model,
    save_documents,
)

from stages.core.artifacts import Documents
from stages.figures.groups import compute_document_figures, compute_ratio_with_error
from stages.figures.metrics import (
    batch_by_length,
    choose_documents,
    compute_document_nats,
    compute_window_nats,
    full_precision,
    score_documents,
)
from stages.figures.texts import SplitTexts
from stages.model.loss import TokenLoss
from stages.model.objectives import NUM_PASSES, Window, make_objective
from stages.tokenize.stage import tokenize_split
from stages.tokens.encoding import TokenizersEngine
from stages.tokens.schema import TrainedTokenizer
from stages.tokens.texts import Flatten, TextFile
from stages.tokens.vocabulary import build_vocabulary, load_tokenizer, train_tokenizer

LENGTHS = [0, 1, 4, 7, 8, 9, 15, 30]  # shorter than, equal to and longer than the windows
NUM_BYTES = [0, 3, 9, 20, 31, 25, 44, 101]


@pytest.fixture(scope="module")
def texts():
    return [draw_text_ids(length, seed).tolist() for seed, length in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def documents(texts, tmp_path_factory):
    """Task to the documents as its tokenize stage stores them."""
    return {task: save_documents(tmp_path_factory.mktemp(task), task, texts, NUM_BYTES) for task in ("causal", "mlm")}


def compute_toy_metrics(model, task, documents, context=8, batch_tokens=4096, max_documents=None):
    objective, texts = make_objective(task, VOCABULARIES[task]), SplitTexts(documents, VOCABULARIES[task])
    return compute_figures(model, objective, texts, context, batch_tokens, max_documents)


def compute_figures(model, objective, texts, context, batch_tokens=4096, max_documents=None):
    records = choose_documents(len(texts), max_documents)
    scores, _ = score_documents(model, objective, texts, records, context, batch_tokens)
    return compute_document_figures(objective.document_metric, scores)


# -- by brute force ----------------------------------------------------------------------------------------------------


def brute_force_causal(model, texts, context, end=END):
    """Return the bits of each token, in the first window with it, feeding the prefix token by token."""
    exact = copy.deepcopy(model).double()
    bits = []
    for text in texts:
        stream, tokens = [end, *text], []
        for position in range(1, len(stream)):
            start = 0
            while position >= start + context:
                start += context // 2
            past = None
            with torch.no_grad():
                for token in stream[start:position]:
                    outputs = exact(torch.tensor([[token]]), past_key_values=past, use_cache=True)
                    past = outputs.past_key_values
            tokens.append(-float(outputs.logits[0, -1].log_softmax(-1)[stream[position]]) / math.log(2))
        bits.append(tokens)
    return bits


def brute_force_masked(model, texts, context):
    """Return the bits of each token: seven passes over each piece, one forward pass at a time."""
    exact = copy.deepcopy(model).double()
    size, bits = context - 2, []
    for text in texts:
        tokens, num_masked = [0.0] * len(text), [0] * len(text)
        for number in range(7):
            for start in range(0, len(text), size):
                chosen = [index for index in range(start, min(start + size, len(text))) if index % 7 == number]
                piece = [
                    MASK if index in chosen else text[index] for index in range(start, min(start + size, len(text)))
                ]
                with torch.no_grad():
                    shares = exact(torch.tensor([[CLS, *piece, SEP]])).logits[0].log_softmax(-1)
                for index in chosen:
                    num_masked[index] += 1
                    tokens[index] = -float(shares[1 + index - start, text[index]]) / math.log(2)
        assert num_masked == [1] * len(text)
        bits.append(tokens)
    return bits


def sum_bits(bits):
    """Sum the bits of the tokens of each document."""
    return np.array([sum(tokens) for tokens in bits])


@pytest.mark.parametrize("context", [4, 8, 13, 64])
@pytest.mark.parametrize("model_type", ["gpt2", "roberta"])
def test_bits_of_tokens_are_those_of_each_token_in_the_order_of_the_text(texts, documents, model_type, context):
    model, task = make_toy_model(model_type), MODEL_TASKS[model_type]
    split, records = SplitTexts(documents[task], VOCABULARIES[task]), np.array([1, 5, 7])
    _, found = score_documents(model, make_objective(task, VOCABULARIES[task]), split, records, context, 64)
    brute_force = {"causal": brute_force_causal, "mlm": brute_force_masked}[task]
    expected = brute_force(model, [texts[record] for record in records], context)
    assert [tokens.bits.dtype for tokens in found] == [np.float32] * 3
    assert [tokens.ids.tolist() for tokens in found] == [list(texts[record]) for record in records]
    for tokens, bits in zip(found, expected, strict=True):
        np.testing.assert_allclose(tokens.bits, bits, rtol=1e-5)


@pytest.mark.parametrize("context", [4, 7, 8, 13, 64])
def test_bits_per_byte_equals_feeding_every_prefix_token_by_token(texts, documents, context):
    model = make_toy_model("gpt2")
    found = compute_toy_metrics(model, "causal", documents["causal"], context)
    bits = sum_bits(brute_force_causal(model, texts, context))
    assert found["bits_per_byte"] == pytest.approx(bits.sum() / sum(NUM_BYTES), rel=1e-6)
    assert found["bits_per_byte_se"] == pytest.approx(compute_ratio_with_error(bits, np.array(NUM_BYTES))[1], rel=1e-5)
    assert {key: found[key] for key in ("documents", "tokens", "bytes")} == {
        "documents": len(LENGTHS),
        "tokens": sum(LENGTHS),
        "bytes": sum(NUM_BYTES),
    }


@pytest.mark.parametrize("context", [4, 9, 12, 64])
@pytest.mark.parametrize("model_type", ["roberta", "bert"])
def test_pseudo_bits_per_byte_equals_masking_piece_by_piece(texts, documents, model_type, context):
    model = make_toy_model(model_type)
    found = compute_toy_metrics(model, "mlm", documents["mlm"], context)
    bits = sum_bits(brute_force_masked(model, texts, context))
    assert found["pseudo_bits_per_byte"] == pytest.approx(bits.sum() / sum(NUM_BYTES), rel=1e-6)
    assert found["tokens"] == sum(LENGTHS)


def test_bits_per_byte_of_real_text_divides_by_its_utf8_bytes(tmp_path):
    texts = ["naïve café", "", "日本語のテキスト 🙂", "a", "plain words, many plain words " * 3, "<|endoftext|>"]
    roles = TrainedTokenizer(vocab_size=300, special_tokens={"eos_token": "<|endoftext|>"})
    train_tokenizer(roles, iter([texts]), tmp_path / "tokenizer")
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    vocabulary = build_vocabulary(tokenizer, tmp_path / "tokenizer", "end_of_sequence", ["eos_token"])
    raw = write_raw(tmp_path / "raw", {"train": texts, "validation": [], "test": []})
    file = TextFile(raw / "train.parquet", Flatten(columns=["answers.text"], joiner=" "))
    tokenize_split(file, TokenizersEngine(tokenizer), vocabulary, tmp_path / "split", decoder=None)
    model = make_toy_model("gpt2", vocab_size=vocabulary.size)
    objective = make_objective("causal", vocabulary)
    found = compute_figures(model, objective, SplitTexts(Documents(tmp_path / "split"), vocabulary), 16)
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    bits = sum_bits(brute_force_causal(model, ids, 16, vocabulary.special["eos_token"]))
    num_bytes = sum(len(text.encode("utf-8")) for text in texts)
    assert num_bytes > sum(map(len, texts))
    assert found["bytes"] == num_bytes
    assert found["tokens"] == sum(map(len, ids))
    assert found["bits_per_byte"] == pytest.approx(bits.sum() / num_bytes, rel=1e-6)


@pytest.mark.parametrize(
    ("model_type", "zero"), [("gpt2", "transformer.wte.weight"), ("roberta", "lm_head.decoder.weight")]
)
def test_document_metric_of_a_uniform_model_is_tokens_times_log2_of_the_vocabulary_per_byte(
    documents, model_type, zero
):
    model, task = make_toy_model(model_type), MODEL_TASKS[model_type]
    with torch.no_grad():
        model.get_parameter(zero).zero_()
    found = compute_toy_metrics(model, task, documents[task])
    expected = sum(LENGTHS) * math.log2(VOCAB_SIZE) / sum(NUM_BYTES)
    assert found[make_objective(task, VOCABULARIES[task]).document_metric] == pytest.approx(expected, rel=1e-6)


# -- invariance of the figures -----------------------------------------------------------------------------------------

MODELS = ["gpt2", "llama", "roberta", "bert"]


def figure(found):
    return next(iter(found.values()))


@pytest.mark.parametrize("batch_tokens", [1, 24, 100, 10**6])
@pytest.mark.parametrize("model_type", MODELS)
def test_document_metric_at_any_batch_size_is_equal(documents, model_type, batch_tokens):
    model, task = make_toy_model(model_type), MODEL_TASKS[model_type]
    one, other = (compute_toy_metrics(model, task, documents[task], 12, size) for size in (64, batch_tokens))
    assert other == pytest.approx(one, rel=1e-6)


@pytest.mark.parametrize("model_type", MODELS)
def test_document_metric_of_two_runs_has_the_same_digits(documents, model_type):
    model, task = make_toy_model(model_type), MODEL_TASKS[model_type]
    assert compute_toy_metrics(model, task, documents[task]) == compute_toy_metrics(model, task, documents[task])


@pytest.mark.parametrize("model_type", MODELS)
def test_document_metric_inside_bf16_autocast_is_that_of_fp32(documents, model_type):
    model, task = make_toy_model(model_type), MODEL_TASKS[model_type]
    outside = compute_toy_metrics(model, task, documents[task])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = compute_toy_metrics(model, task, documents[task])
        ids = torch.from_numpy(draw_text_ids(8).astype(np.int64))[None]
        assert (model(ids).logits.float() - _plain_logits(model, ids)).abs().max() > 1e-4  # bf16 would show
    assert inside == outside


def _plain_logits(model, ids):
    with full_precision(model):
        return model(ids).logits


def test_document_metric_of_a_model_in_training_mode_draws_no_dropout_and_leaves_the_mode(documents):
    model = make_toy_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5)
    expected = compute_toy_metrics(model, "causal", documents["causal"])
    model.train()
    assert compute_toy_metrics(model, "causal", documents["causal"]) == expected
    assert model.training


@pytest.mark.parametrize("model_type", MODELS)
def test_window_nats_of_padded_windows_equal_those_of_each_window_without_padding(texts, model_type):
    model, task = make_toy_model(model_type).double(), MODEL_TASKS[model_type]  # fp32 rounds differently per shape
    windows = list(make_objective(task, VOCABULARIES[task]).build_windows(make_texts(texts), 20))
    assert len({len(window.input_ids) for window in windows}) > 3
    loss = TokenLoss(model)
    with full_precision(model), loss.hidden_outputs():
        together = compute_window_nats(model, loss, windows)
        alone = np.concatenate([compute_window_nats(model, loss, [window]) for window in windows])
    np.testing.assert_allclose(together, alone, rtol=1e-12)


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60),
    batch_tokens=st.integers(1, 200),
)
def test_length_batches_hold_each_window_once_within_the_bound(lengths, batch_tokens):
    none = np.zeros(0, np.int64)
    windows = [Window(index, np.zeros(length, np.int64), none, none, none) for index, length in enumerate(lengths)]
    batches = list(batch_by_length(iter(windows), batch_tokens))
    assert sorted(window.document_index for batch in batches for window in batch) == list(range(len(lengths)))
    padded = [len(batch) * max(len(window.input_ids) for window in batch) for batch in batches]
    assert all(size <= batch_tokens or len(batch) == 1 for size, batch in zip(padded, batches, strict=True))


# -- documents chosen, errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "most", "expected"),
    [
        (10, 5, [0, 2, 4, 6, 8]),
        (10, 3, [0, 3, 6]),
        (3, 3, [0, 1, 2]),
        (3, 5, [0, 1, 2]),
        (4, None, [0, 1, 2, 3]),
        (7, 1, [0]),
        (0, None, []),
    ],
)
def test_choose_documents_spaces_them_evenly(total, most, expected):
    assert choose_documents(total, most).tolist() == expected


@given(total=st.integers(1, 10**6), most=st.integers(1, 500))
def test_choose_documents_of_any_number_gives_distinct_ones_at_even_distances(total, most):
    chosen = choose_documents(total, most)
    assert len(chosen) == min(total, most)
    gaps = np.diff([*chosen, total + chosen[0]])
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1


def test_document_metrics_with_max_documents_are_those_of_the_chosen_documents(texts, documents, tmp_path):
    model, chosen = make_toy_model("gpt2"), [0, 2, 5]
    alone = save_documents(tmp_path, "causal", [texts[i] for i in chosen], [NUM_BYTES[i] for i in chosen])
    assert compute_toy_metrics(model, "causal", documents["causal"], max_documents=3) == pytest.approx(
        compute_toy_metrics(model, "causal", alone), rel=1e-6
    )


@given(st.lists(st.tuples(st.floats(0, 1000), st.integers(1, 500)), min_size=2, max_size=30))
def test_ratio_with_error_equals_the_formula_written_out(pairs):
    bits, num_bytes = (np.array(column, float) for column in zip(*pairs, strict=True))
    count, ratio = len(pairs), sum(bits) / sum(num_bytes)
    variance = sum((bit - ratio * size) ** 2 for bit, size in pairs) / (count - 1)
    expected = math.sqrt(variance / count) / (sum(num_bytes) / count)
    found = compute_ratio_with_error(bits, num_bytes.astype(np.int64))
    assert found == pytest.approx((ratio, expected), rel=1e-9, abs=1e-9)


def test_ratio_with_error_covers_the_truth_as_often_as_a_standard_error_does():
    draw = np.random.default_rng(0)
    num_bytes = draw.integers(50, 500, (2000, 40))
    rates = draw.normal(2.0, 0.3, num_bytes.shape)
    found = [compute_ratio_with_error(rate * size, size) for rate, size in zip(rates, num_bytes, strict=True)]
    covered = np.mean([abs(ratio - 2.0) < 1.96 * error for ratio, error in found])
    assert 0.92 < covered < 0.97


def test_ratio_with_error_of_one_document_has_no_error():
    assert compute_ratio_with_error(np.array([12.0]), np.array([6])) == (2.0, 0.0)


def test_ratio_with_error_of_documents_without_a_byte_is_an_error():
    with pytest.raises(ValueError, match="have no text"):
        compute_ratio_with_error(np.array([0.0]), np.array([0]))


def test_document_nats_of_empty_documents_are_zero():
    texts = make_texts([draw_text_ids(0), draw_text_ids(5), draw_text_ids(0)])
    windows = make_objective("causal", VOCABULARIES["causal"]).build_windows(texts, 8)
    nats, num_tokens = compute_document_nats(make_toy_model("gpt2"), windows, 3, 4096)
    assert nats[[0, 2]].tolist() == [0.0, 0.0]
    assert nats[1] > 1.0
    assert num_tokens.tolist() == [0, 5, 0]


def test_num_passes_is_the_definitions_constant():
    assert NUM_PASSES == 7
