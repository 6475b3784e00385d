"""Log-likelihoods against straightforward code by their definitions, on untrained toys with large weights."""

import numpy as np
import pytest
import torch
from data_helpers import CAUSAL_TOKENS, MLM_TOKENS, write_bpe, write_unigram, write_word_piece
from toys import MASK, TASK, VOCABULARY, as_texts, text_ids, toy_model

from stages.core.errors import StageError
from stages.figures.metrics import document_nats
from stages.model.objectives import make_objective
from stages.score.items import Item
from stages.score.likelihoods import EncodedChoice, encode_choices, score_choices
from stages.tokens.vocabulary import load_tokenizer, vocabulary_of

CAUSAL = [name for name, task in TASK.items() if task == "causal"]
MASKED = [name for name, task in TASK.items() if task == "mlm"]
WIDE = 40  # a window in which every text has room


def choice(length, start=0, seed=0, words=None):
    """A choice of random tokens, in words of one to three tokens."""
    sizes = np.random.default_rng(seed + 1).integers(1, 4, length)
    numbers = np.repeat(np.arange(length), sizes)[:length] if words is None else np.array(words)
    return EncodedChoice(text_ids(length, seed).astype(np.int64), numbers, start)


CHOICES = [choice(1), choice(2, 1, 1), choice(9, 0, 2), choice(9, 4, 3), choice(20, 19, 4), choice(30, 5, 5)]


def score(model, choices, context=WIDE, batch_tokens=4096):
    task = TASK[model.config.model_type]
    return score_choices(model, task, choices, VOCABULARY[task], context, batch_tokens)


# -- causal ------------------------------------------------------------------------------------------------------------


def lm_eval_loglikelihood(model, ids, start, end_of_sequence):
    """As lm_eval defines it (Instance loglikelihood, HFLM): the continuation's log-softmax at the positions before it.

    lm_eval feeds (context + continuation)[:-1] and takes the last len(continuation) outputs; an empty context is the
    prefix token. Here the prefix token also stands before a context, as in training.
    """
    context, continuation = [end_of_sequence, *ids[:start]], ids[start:]
    inputs = torch.tensor([[*context, *continuation][:-1]])
    with torch.no_grad():
        logits = torch.log_softmax(model(inputs).logits.double(), dim=-1)[0, -len(continuation) :]
    return float(logits.gather(1, torch.tensor(continuation)[:, None]).sum())


@pytest.mark.parametrize("model_type", CAUSAL)
def test_causal_scores_are_those_that_lm_eval_defines(model_type):
    model = toy_model(model_type)
    nats, num_tokens = score(model, CHOICES)
    end = VOCABULARY["causal"].special["eos_token"]
    expected = [lm_eval_loglikelihood(model, item.ids.tolist(), item.start, end) for item in CHOICES]
    np.testing.assert_allclose(nats, expected, rtol=1e-6)
    assert num_tokens.tolist() == [len(item.ids) - item.start for item in CHOICES]


def test_causal_scores_of_a_text_longer_than_a_window_are_those_of_bits_per_byte():
    model, vocabulary = toy_model("gpt2"), VOCABULARY["causal"]
    texts = [choice(length, 0, length) for length in (7, 8, 9, 30)]
    windows = make_objective("causal", vocabulary).windows(as_texts(item.ids for item in texts), 8)
    expected, _ = document_nats(model, windows, len(texts), 4096)
    np.testing.assert_array_equal(score(model, texts, context=8)[0], -expected)


def test_causal_scores_of_choices_in_long_texts_add_up_to_the_text():
    """The tokens of a choice have the same scores whatever of the text before it is a prompt."""
    model, text = toy_model("gpt2"), choice(30, 0, 6)
    nats, num_tokens = score(model, [text._replace(start=start) for start in range(30)], context=8)
    each = nats - np.append(nats[1:], 0.0)  # of each token
    assert (each < 0).all() and num_tokens.tolist() == list(range(30, 0, -1))
    assert each.sum() == pytest.approx(nats[0], rel=1e-6)


# -- masked ------------------------------------------------------------------------------------------------------------


def pseudo_log_likelihood(model, item, vocabulary, context):
    """One masked position at a time, one window at a time; each token in the window of `context` tokens around it."""
    total, ids, words = 0.0, item.ids.tolist(), item.words.tolist()
    room = context - len(vocabulary.prefix) - len(vocabulary.suffix)
    for place in range(item.start, len(ids)):
        begin = max(0, min(place - room // 2, len(ids) - room))
        shown = []
        for other in range(begin, min(begin + room, len(ids))):
            hidden = other == place or (other > place and words[other] == words[place])
            shown.append(MASK if hidden else ids[other])
        inputs = torch.tensor([[*vocabulary.prefix, *shown, *vocabulary.suffix]])
        with torch.no_grad():
            logits = model(inputs).logits[0, len(vocabulary.prefix) + place - begin].double()
        total += float(torch.log_softmax(logits, dim=-1)[ids[place]])
    return total


@pytest.mark.parametrize("model_type", MASKED)
@pytest.mark.parametrize("context", [WIDE, 10])
def test_masked_scores_are_those_of_one_masked_position_at_a_time(model_type, context):
    model = toy_model(model_type)
    nats, num_tokens = score(model, CHOICES, context)
    expected = [pseudo_log_likelihood(model, item, VOCABULARY["mlm"], context) for item in CHOICES]
    np.testing.assert_allclose(nats, expected, rtol=1e-6)
    assert num_tokens.tolist() == [len(item.ids) - item.start for item in CHOICES]


def test_masked_scores_of_a_word_of_several_tokens_hide_its_end():
    model, apart = toy_model("roberta"), choice(6, 0, 7, words=range(6))
    together = apart._replace(words=np.array([0, 1, 1, 1, 2, 3]))
    one, other = (score(model, [item])[0][0] for item in (apart, together))
    assert abs(one - other) > 1e-3
    # The last token of the word and the words of one token are predicted from the same inputs.
    for start in (3, 4, 5):
        one, other = (score(model, [item._replace(start=start)])[0][0] for item in (apart, together))
        assert one == pytest.approx(other, rel=1e-6)


# -- both --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "roberta", "bert"])
@pytest.mark.parametrize("batch_tokens", [1, 100])
def test_scores_in_other_batches_are_equal(model_type, batch_tokens):
    model = toy_model(model_type)
    np.testing.assert_allclose(score(model, CHOICES, 10, batch_tokens)[0], score(model, CHOICES, 10)[0], rtol=1e-6)


@pytest.mark.parametrize("model_type", ["gpt2", "roberta"])
def test_scores_of_the_same_tokens_are_the_same_to_the_last_digit(model_type):
    model = toy_model(model_type)
    nats, num_tokens = score(model, [*CHOICES, *reversed(CHOICES)])
    assert nats.tolist() == nats.tolist()[::-1]
    assert num_tokens.tolist() == num_tokens.tolist()[::-1]


@pytest.mark.parametrize(("model_type", "fits"), [("gpt2", 9), ("roberta", 8)])
def test_scores_of_texts_longer_than_a_window_are_announced(model_type, fits, caplog):
    for length, said in ((fits, False), (fits + 1, True)):
        caplog.clear()
        score(toy_model(model_type), [choice(length)], context=10)
        assert ("1 texts are longer than pairs.context=10" in caplog.text) == said


# -- encoding ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """Task to the tokenizer and its vocabulary."""
    found = {}
    for task, tokens, wrap in (("causal", CAUSAL_TOKENS, "end_of_sequence"), ("mlm", MLM_TOKENS, "template")):
        directory = write_bpe(tmp_path_factory.mktemp(task), tokens, 400)
        tokenizer = load_tokenizer(directory)
        found[task] = tokenizer, vocabulary_of(tokenizer, directory, wrap, [])
    return found


def encoded(bpe, prompt, *choices, joiner=" ", task="causal"):
    tokenizer, vocabulary = bpe[task]
    return encode_choices([Item("f", 1, prompt, list(choices), 0, [])], tokenizer, vocabulary, joiner)


def text_of(bpe, ids):
    return bpe["causal"][0].decode(ids.tolist(), skip_special_tokens=False)


@pytest.mark.parametrize(
    ("prompt", "joiner", "start"),
    [("Why is", " ", "Why is"), ("Why is ", "", "Why is"), ("", " ", ""), ("Why:\n\n", "", "Why:")],
)
def test_encoded_choice_begins_after_the_prompt_without_the_spaces_at_its_end(bpe, prompt, joiner, start):
    for item, choice in zip(encoded(bpe, prompt, "the sky", "a", joiner=joiner), ("the sky", "a"), strict=True):
        assert text_of(bpe, item.ids[: item.start]) == start
        assert text_of(bpe, item.ids) == prompt + (joiner if prompt else "") + choice


def test_encoded_choice_in_a_token_with_the_end_of_the_prompt_begins_with_that_token(bpe):
    tokenizer = bpe["causal"][0]
    word = " because"  # a token of the texts that the tokenizer was trained on
    whole = tokenizer.encode(f"sky{word}", add_special_tokens=False).ids
    (item, _) = encoded(bpe, "sky bec", "ause", "x", joiner="")
    assert item.ids.tolist() == whole
    assert 0 < item.start < len(item.ids)
    assert "sky bec".startswith(text_of(bpe, item.ids[: item.start]))


def test_encoded_choice_that_is_a_prefix_of_another_has_its_own_tokens_alone(bpe):
    short, long = encoded(bpe, "Why", "the sky", "the sky is blue")
    assert long.ids[: len(short.ids)].tolist() == short.ids.tolist() and len(long.ids) > len(short.ids)
    assert short.start == long.start


@pytest.mark.parametrize("task", ["causal", "mlm"])
def test_encoded_special_tokens_in_a_text_are_text(bpe, task):
    tokenizer, vocabulary = bpe[task]
    spelt = "".join(tokenizer.id_to_token(number) for number in vocabulary.special.values())
    for item in encoded(bpe, spelt, f"a{spelt}", "b", task=task):
        assert not np.isin(item.ids, [*vocabulary.special.values(), *vocabulary.control]).any()


def test_encoded_words_are_those_that_the_tokenizer_splits(bpe):
    (item, _) = encoded(bpe, "", "Unscattered light, naïvely 🙂", "x", task="mlm")
    pieces = [[] for _ in range(item.words.max() + 1)]
    for word, token in zip(item.words, item.ids, strict=True):
        pieces[word].append(token)
    spelt = [bpe["mlm"][0].decode(piece) for piece in pieces]
    assert spelt == ["Unscattered", " light", ",", " naïvely", " 🙂"]
    assert max(map(len, pieces)) > 1


def test_encoded_choice_that_would_be_a_control_token_is_an_error_that_names_the_item(tmp_path):
    directory = write_unigram(tmp_path / "unigram")
    tokenizer = load_tokenizer(directory)
    vocabulary = vocabulary_of(tokenizer, directory, "end_of_sequence", [])
    with pytest.raises(StageError, match="a text of f:2 spells a control token"):
        encode_choices([Item("f", 2, "", ["a", "</s>"], 0, [])], tokenizer, vocabulary, " ")


def test_encoded_choice_without_a_token_is_an_error_that_names_the_item(tmp_path):
    directory = write_word_piece(tmp_path / "word_piece")
    tokenizer = load_tokenizer(directory)
    vocabulary = vocabulary_of(tokenizer, directory, "template", ["mask_token"])
    with pytest.raises(StageError, match="f:2: the tokenizer has no token for one of"):
        encode_choices([Item("f", 2, "sky", ["blue", "  "], 0, [])], tokenizer, vocabulary, " ")
