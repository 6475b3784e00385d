"""Metrics of documents with prompts that do not count, against brute force."""

import numpy as np
import pyarrow as pa
import pytest
from data_helpers import write_bpe, write_chat_bpe, write_conversations, write_questions, write_shards
from test_metrics import brute_force_causal, brute_force_masked
from toys import VOCABULARIES, add_control_tokens, draw_text_ids, make_toy_model

from stages.core.artifacts import COUNTED, TEMPLATE, Documents, to_arrow, write_json
from stages.figures.metrics import score_documents
from stages.figures.texts import SourceTexts, SplitTexts
from stages.model.objectives import make_objective
from stages.tokenize.stage import tokenize_split
from stages.tokens.chat import read_chat_template
from stages.tokens.encoding import TokenizersEngine
from stages.tokens.texts import Flatten, TextFile
from stages.tokens.vocabulary import build_vocabulary, load_tokenizer

LENGTHS = [12, 0, 30, 7]


def save_marked(directory, task):
    """Write documents in which only the second half of the text counts; return them and their texts."""
    vocabulary = VOCABULARIES[task]
    texts = [draw_text_ids(length, seed).tolist() for seed, length in enumerate(LENGTHS)]
    ids = [add_control_tokens(task, text)[len(vocabulary.lead) :] for text in texts]
    marks = []
    for text, row in zip(texts, ids, strict=True):
        own = [0] * len(vocabulary.prefix) + [COUNTED * (place >= len(text) // 2) for place in range(len(text))]
        marks.append(own + [COUNTED] * (len(row) - len(own)))
    offsets = np.cumsum([0, *map(len, ids)])
    lists = [
        pa.LargeListArray.from_arrays(to_arrow(offsets), to_arrow(np.concatenate(rows).astype(dtype)))
        for rows, dtype in ((ids, np.uint16), (marks, np.uint8))
    ]
    num_bytes = [pa.array([number * length for length in LENGTHS], pa.int32()) for number in (3, 1)]
    names = ["input_ids", "marks", "num_bytes", "num_counted_bytes"]
    batch = pa.record_batch([*lists, *num_bytes], names=names)
    return Documents(write_shards(directory, batch.schema, [batch])), texts


@pytest.mark.parametrize("context", [6, 13, 64])
@pytest.mark.parametrize("include_prompts", [False, True])
def test_bits_of_documents_with_prompts_are_those_of_what_counts(tmp_path, context, include_prompts):
    documents, texts = save_marked(tmp_path, "causal")
    model, records = make_toy_model("gpt2"), np.arange(len(texts))
    split = SplitTexts(documents, VOCABULARIES["causal"], include_prompts)
    scores, tokens = score_documents(
        model, make_objective("causal", VOCABULARIES["causal"]), split, records, context, 64
    )
    expected = brute_force_causal(model, texts, context)
    if not include_prompts:
        expected = [[0.0] * (len(row) // 2) + row[len(row) // 2 :] for row in expected]
    np.testing.assert_allclose(scores.bits, [sum(row) for row in expected], rtol=1e-5)
    for own, row in zip(tokens, expected, strict=True):
        np.testing.assert_allclose(own.bits, row, rtol=1e-5)
    number = 3 if include_prompts else 1
    assert scores.num_bytes.tolist() == [number * length for length in LENGTHS]
    assert scores.num_tokens.tolist() == [length if include_prompts else length - length // 2 for length in LENGTHS]


def test_pseudo_bits_of_documents_with_prompts_mask_what_counts_and_see_the_rest(tmp_path):
    documents, texts = save_marked(tmp_path, "mlm")
    model, objective = make_toy_model("roberta"), make_objective("mlm", VOCABULARIES["mlm"])
    score = lambda split: score_documents(model, objective, split, np.arange(len(texts)), 64, 64)[0]  # noqa: E731
    whole = score(SplitTexts(documents, VOCABULARIES["mlm"], include_prompts=True))
    np.testing.assert_allclose(whole.bits, [sum(row) for row in brute_force_masked(model, texts, 64)], rtol=1e-5)
    part = score(SplitTexts(documents, VOCABULARIES["mlm"]))
    assert part.num_tokens.tolist() == [length - length // 2 for length in LENGTHS]
    assert (part.bits[[0, 2, 3]] < whole.bits[[0, 2, 3]]).all()


def write_split(root, file, flatten, wrap, template=None):
    """Tokenize a file of records, and return the split."""
    tokenizer = load_tokenizer(root / "tokenizer")
    vocabulary = build_vocabulary(tokenizer, root / "tokenizer", wrap, ["eos_token"])
    write_json(root / "stats.json", {"vocabulary": vars(vocabulary)})
    tokenize_split(
        TextFile(file, flatten, template=template),
        TokenizersEngine(tokenizer),
        vocabulary,
        root / "split",
        decoder=None,
    )
    return SplitTexts(Documents(root / "split"), vocabulary)


def equal_texts(one, other):
    pairs = zip(one.read_texts(np.arange(len(one))), other.read_texts(np.arange(len(other))), strict=True)
    for ours, theirs in pairs:
        assert ours.ids.tolist() == theirs.ids.tolist()
        assert ours.num_bytes == theirs.num_bytes
        assert ours.is_predicted.tolist() == theirs.is_predicted.tolist()
    return len(one)


def test_source_of_questions_is_encoded_as_tokenize_does(tmp_path):
    records = [("Why?", "", ["So.", "Yes."]), ("", "", ["Alone"]), ("Title", "text", [])]
    file = write_questions(tmp_path / "a.parquet", records, rows=2)
    flatten = Flatten(prompt=["title", "selftext"], completion=["answers.text"])
    write_bpe(tmp_path / "tokenizer", {"eos_token": "<|endoftext|>"})
    split = write_split(tmp_path, file, flatten, "end_of_sequence")
    assert equal_texts(SourceTexts("extra", [file], flatten, tmp_path), split) == 3


def test_source_of_conversations_is_encoded_as_tokenize_does_and_predicts_no_control_token(tmp_path):
    talks = [[("user", "Why?"), ("assistant", "So.")], [("user", "A"), ("assistant", "B"), ("assistant", "C")]]
    file = write_conversations(tmp_path / "a.parquet", talks, rows=1)
    directory = write_chat_bpe(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(directory)
    vocabulary = build_vocabulary(tokenizer, directory, "none", ["eos_token"])
    template = read_chat_template(directory, tokenizer, vocabulary.special)
    flatten = Flatten(messages=True)
    split = write_split(tmp_path, file, flatten, "none", template)
    assert equal_texts(SourceTexts("extra", [file], flatten, tmp_path), split) == 2
    documents = Documents(tmp_path / "split")
    for number, text in enumerate(split.read_texts(np.arange(2))):
        assert (documents.get_marks(number)[text.is_predicted] & (TEMPLATE | COUNTED) == COUNTED).all()
        assert tokenizer.decode(text.ids[text.is_predicted].tolist()) == ["So.", "BC"][number]


def test_scores_of_models_that_take_conversations_predict_the_first_counted_token(tmp_path):
    """No control token precedes a conversation, so its windows begin with its first token."""
    vocabulary = VOCABULARIES["causal"].__class__(
        size=VOCABULARIES["causal"].size, special=VOCABULARIES["causal"].special, prefix=[], suffix=[], lead=[]
    )
    documents, texts = save_marked(tmp_path, "causal")
    model = make_toy_model("gpt2")
    found = SplitTexts(documents, vocabulary)
    scores, _ = score_documents(model, make_objective("causal", vocabulary), found, np.arange(len(texts)), 64, 64)
    # Each document separately, including the end-of-sequence token after it.
    expected = []
    for text in texts:
        stream = add_control_tokens("causal", text)[1:]
        row = brute_force_causal(model, [stream[1:]], 64, end=stream[0])[0]
        expected.append(sum(row[max(0, len(text) // 2 - 1) :]))
    np.testing.assert_allclose(scores.bits, expected, rtol=1e-5)
