"""Log-likelihoods match simple implementations of their definitions, on untrained toys with large weights."""

import numpy as np
import pytest
import torch
from data_helpers import CAUSAL_TOKENS, MLM_TOKENS, write_bpe, write_unigram, write_word_piece
from toys import MASK, MODEL_TASKS, VOCABULARIES, draw_text_ids, make_texts, make_toy_model

from stages.core.errors import StageError
from stages.figures.metrics import compute_document_nats
from stages.model.objectives import make_objective
from stages.score.items import Item
from stages.score.likelihoods import EncodedChoice, encode_choices, score_choices
from stages.tokens.vocabulary import build_vocabulary, load_tokenizer

CAUSAL = [name for name, task in MODEL_TASKS.items() if task == "causal"]
MASKED = [name for name, task in MODEL_TASKS.items() if task == "mlm"]
WIDE = 40  # a window that is long enough for every text


def make_choice(length, start=0, seed=0, words=None):
    """Make a choice of random tokens, in words of one to three tokens."""
    sizes = np.random.default_rng(seed + 1).integers(1, 4, length)
    numbers = np.repeat(np.arange(length), sizes)[:length] if words is None else np.array(words)
    return EncodedChoice(draw_text_ids(length, seed).astype(np.int64), numbers, start)


CHOICES = [
    make_choice(1),
    make_choice(2, 1, 1),
    make_choice(9, 0, 2),
    make_choice(9, 4, 3),
    make_choice(20, 19, 4),
    make_choice(30, 5, 5),
]


def compute_scores(model, choices, context=WIDE, batch_tokens=4096):
    task = MODEL_TASKS[model.config.model_type]
    return score_choices(model, task, choices, VOCABULARIES[task], context, batch_tokens)


# -- causal ------------------------------------------------------------------------------------------------------------


def lm_eval_loglikelihood(model, ids, start, end_of_sequence):
    """Compute the log-likelihood as lm_eval defines it (Instance loglikelihood, HFLM).

    lm_eval feeds (context + continuation)[:-1] and takes the log-softmax of the last len(continuation) outputs; an
    empty context is replaced by the prefix token. Here the prefix token also comes before a context, as in training.
    """
    context, continuation = [end_of_sequence, *ids[:start]], ids[start:]
    inputs = torch.tensor([[*context, *continuation][:-1]])
    with torch.no_grad():
        logits = torch.log_softmax(model(inputs).logits.double(), dim=-1)[0, -len(continuation) :]
    return float(logits.gather(1, torch.tensor(continuation)[:, None]).sum())


@pytest.mark.parametrize("model_type", CAUSAL)
def test_causal_scores_match_the_definition_of_lm_eval(model_type):
    model = make_toy_model(model_type)
    nats, num_tokens = compute_scores(model, CHOICES)
    end = VOCABULARIES["causal"].special["eos_token"]
    expected = [lm_eval_loglikelihood(model, item.ids.tolist(), item.start, end) for item in CHOICES]
    np.testing.assert_allclose(nats, expected, rtol=1e-6)
    assert num_tokens.tolist() == [len(item.ids) - item.start for item in CHOICES]


def test_causal_scores_of_a_text_longer_than_a_window_are_those_of_bits_per_byte():
    model, vocabulary = make_toy_model("gpt2"), VOCABULARIES["causal"]
    texts = [make_choice(length, 0, length) for length in (7, 8, 9, 30)]
    windows = make_objective("causal", vocabulary).build_windows(make_texts(item.ids for item in texts), 8)
    expected, _ = compute_document_nats(model, windows, len(texts), 4096)
    np.testing.assert_array_equal(compute_scores(model, texts, context=8)[0], -expected)


def test_causal_scores_of_choices_in_long_texts_add_up_to_the_text():
    """The score of a token does not depend on where the prompt ends and the choice begins."""
    model, text = make_toy_model("gpt2"), make_choice(30, 0, 6)
    nats, num_tokens = compute_scores(model, [text._replace(start=start) for start in range(30)], context=8)
    token_nats = nats - np.append(nats[1:], 0.0)  # [num_tokens]
    assert (token_nats < 0).all() and num_tokens.tolist() == list(range(30, 0, -1))
    assert token_nats.sum() == pytest.approx(nats[0], rel=1e-6)


# -- masked ------------------------------------------------------------------------------------------------------------


def pseudo_log_likelihood(model, item, vocabulary, context):
    """Score one masked position at a time, each in the window of `context` tokens around it."""
    total, ids, words = 0.0, item.ids.tolist(), item.words.tolist()
    room = context - len(vocabulary.prefix) - len(vocabulary.suffix)
    for index in range(item.start, len(ids)):
        begin = max(0, min(index - room // 2, len(ids) - room))
        shown = []
        for other in range(begin, min(begin + room, len(ids))):
            hidden = other == index or (other > index and words[other] == words[index])
            shown.append(MASK if hidden else ids[other])
        inputs = torch.tensor([[*vocabulary.prefix, *shown, *vocabulary.suffix]])
        with torch.no_grad():
            logits = model(inputs).logits[0, len(vocabulary.prefix) + index - begin].double()
        total += float(torch.log_softmax(logits, dim=-1)[ids[index]])
    return total


@pytest.mark.parametrize("model_type", MASKED)
@pytest.mark.parametrize("context", [WIDE, 10])
def test_masked_scores_are_those_of_one_masked_position_at_a_time(model_type, context):
    model = make_toy_model(model_type)
    nats, num_tokens = compute_scores(model, CHOICES, context)
    expected = [pseudo_log_likelihood(model, item, VOCABULARIES["mlm"], context) for item in CHOICES]
    np.testing.assert_allclose(nats, expected, rtol=1e-6)
    assert num_tokens.tolist() == [len(item.ids) - item.start for item in CHOICES]


def test_masked_scores_of_a_word_of_several_tokens_mask_its_end():
    model, apart = make_toy_model("roberta"), make_choice(6, 0, 7, words=range(6))
    together = apart._replace(words=np.array([0, 1, 1, 1, 2, 3]))
    one, other = (compute_scores(model, [item])[0][0] for item in (apart, together))
    assert abs(one - other) > 1e-3
    # The last token of the word and the words of one token are predicted from the same inputs.
    for start in (3, 4, 5):
        one, other = (compute_scores(model, [item._replace(start=start)])[0][0] for item in (apart, together))
        assert one == pytest.approx(other, rel=1e-6)


# -- both --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "roberta", "bert"])
@pytest.mark.parametrize("batch_tokens", [1, 100])
def test_scores_in_other_batches_are_equal(model_type, batch_tokens):
    model = make_toy_model(model_type)
    np.testing.assert_allclose(
        compute_scores(model, CHOICES, 10, batch_tokens)[0], compute_scores(model, CHOICES, 10)[0], rtol=1e-6
    )


@pytest.mark.parametrize("model_type", ["gpt2", "roberta"])
def test_scores_of_the_same_tokens_are_the_same_to_the_last_digit(model_type):
    model = make_toy_model(model_type)
    nats, num_tokens = compute_scores(model, [*CHOICES, *reversed(CHOICES)])
    assert nats.tolist() == nats.tolist()[::-1]
    assert num_tokens.tolist() == num_tokens.tolist()[::-1]


@pytest.mark.parametrize(("model_type", "fits"), [("gpt2", 9), ("roberta", 8)])
def test_scores_of_texts_longer_than_a_window_log_a_warning(model_type, fits, caplog):
    for length, is_logged in ((fits, False), (fits + 1, True)):
        caplog.clear()
        compute_scores(make_toy_model(model_type), [make_choice(length)], context=10)
        assert ("1 texts are longer than pairs.context=10" in caplog.text) == is_logged


# -- encoding ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """Maps each task to its tokenizer and vocabulary."""
    found = {}
    for task, tokens, wrap in (("causal", CAUSAL_TOKENS, "end_of_sequence"), ("mlm", MLM_TOKENS, "template")):
        directory = write_bpe(tmp_path_factory.mktemp(task), tokens, 400)
        tokenizer = load_tokenizer(directory)
        found[task] = tokenizer, build_vocabulary(tokenizer, directory, wrap, [])
    return found


def encode_item(bpe, prompt, *choices, joiner=" ", task="causal"):
    tokenizer, vocabulary = bpe[task]
    return encode_choices([Item("f", 1, prompt, list(choices), 0, [])], tokenizer, vocabulary, joiner)


def decode_ids(bpe, ids):
    return bpe["causal"][0].decode(ids.tolist(), skip_special_tokens=False)


@pytest.mark.parametrize(
    ("prompt", "joiner", "start"),
    [("Why is", " ", "Why is"), ("Why is ", "", "Why is"), ("", " ", ""), ("Why:\n\n", "", "Why:")],
)
def test_encoded_choice_begins_after_the_prompt_without_the_spaces_at_its_end(bpe, prompt, joiner, start):
    for item, choice in zip(encode_item(bpe, prompt, "the sky", "a", joiner=joiner), ("the sky", "a"), strict=True):
        assert decode_ids(bpe, item.ids[: item.start]) == start
        assert decode_ids(bpe, item.ids) == prompt + (joiner if prompt else "") + choice


def test_encoded_choice_in_a_token_with_the_end_of_the_prompt_begins_with_that_token(bpe):
    tokenizer = bpe["causal"][0]
    word = " because"  # a token of the texts that the tokenizer was trained on
    whole = tokenizer.encode(f"sky{word}", add_special_tokens=False).ids
    (item, _) = encode_item(bpe, "sky bec", "ause", "x", joiner="")
    assert item.ids.tolist() == whole
    assert 0 < item.start < len(item.ids)
    assert "sky bec".startswith(decode_ids(bpe, item.ids[: item.start]))


def test_encoded_choice_that_is_a_prefix_of_another_has_only_its_own_tokens(bpe):
    short, long = encode_item(bpe, "Why", "the sky", "the sky is blue")
    assert long.ids[: len(short.ids)].tolist() == short.ids.tolist() and len(long.ids) > len(short.ids)
    assert short.start == long.start


@pytest.mark.parametrize("task", ["causal", "mlm"])
def test_encoded_special_tokens_in_a_text_are_text(bpe, task):
    tokenizer, vocabulary = bpe[task]
    spelled = "".join(tokenizer.id_to_token(number) for number in vocabulary.special.values())
    for item in encode_item(bpe, spelled, f"a{spelled}", "b", task=task):
        assert not np.isin(item.ids, [*vocabulary.special.values(), *vocabulary.control_ids]).any()


def test_encoded_words_match_the_splits_of_the_tokenizer(bpe):
    (item, _) = encode_item(bpe, "", "Unscattered light, naïvely 🙂", "x", task="mlm")
    pieces = [[] for _ in range(item.words.max() + 1)]
    for word, token in zip(item.words, item.ids, strict=True):
        pieces[word].append(token)
    spelled = [bpe["mlm"][0].decode(piece) for piece in pieces]
    assert spelled == ["Unscattered", " light", ",", " naïvely", " 🙂"]
    assert max(map(len, pieces)) > 1


def test_encoded_choice_that_becomes_a_control_token_is_an_error_that_names_the_item(tmp_path):
    directory = write_unigram(tmp_path / "unigram")
    tokenizer = load_tokenizer(directory)
    vocabulary = build_vocabulary(tokenizer, directory, "end_of_sequence", [])
    with pytest.raises(StageError, match="a text of f:2 spells a control token"):
        encode_choices([Item("f", 2, "", ["a", "</s>"], 0, [])], tokenizer, vocabulary, " ")


def test_encoded_choice_without_a_token_is_an_error_that_names_the_item(tmp_path):
    directory = write_word_piece(tmp_path / "word_piece")
    tokenizer = load_tokenizer(directory)
    vocabulary = build_vocabulary(tokenizer, directory, "template", ["mask_token"])
    with pytest.raises(StageError, match="f:2: the tokenizer has no token for one of"):
        encode_choices([Item("f", 2, "sky", ["blue", "  "], 0, [])], tokenizer, vocabulary, " ")
