"""tokenize of documents that are only partly counted: the marks of their tokens, and the ledger."""

from pathlib import Path

import numpy as np
import pytest
from data_helpers import (
    CAUSAL_TOKENS,
    MLM_TOKENS,
    hash_files,
    read_stats,
    write_chat_bpe,
    write_conversations,
    write_questions,
)
from pydantic import ValidationError

from stages.core.artifacts import COUNTED, SEGMENT_START, SPLITS, TEMPLATE, Documents
from stages.core.errors import StageError
from stages.tokenize.schema import Tokenize
from stages.tokenize.stage import TokenizeConfig, main
from stages.tokens.schema import ModelTokenizer, TokenizerSource, TrainedTokenizer
from stages.tokens.texts import Flatten, FlattenData
from stages.tokens.vocabulary import Vocabulary, load_tokenizer

RECORDS = [
    ("Why is the sky blue?", "", ["Air scatters short waves.", "Rayleigh said so."]),
    ("Ünïcode ✓?", "And below.", ["Yes ✓."]),
    ("", "", ["No question."]),
    ("No answer.", "", []),
]
PROMPTED = Flatten(prompt=["title", "selftext"], completion=["answers.text"])
ANSWERS = ["Air scatters short waves. Rayleigh said so.", "Yes ✓.", "No question.", ""]
PROMPTS = ["Why is the sky blue?\n\n", "Ünïcode ✓? And below.\n\n", "", "No answer.\n\n"]
TALKS = [
    [("system", "Be short."), ("user", "Why?"), ("assistant", "So."), ("user", "Sure?"), ("assistant", "Yes ✓")],
    [("user", "Hi <|im_end|>"), ("assistant", "Hello.")],
]
WRAP = {
    "causal": Tokenize(wrap="end_of_sequence", requires=["eos_token"]),
    "mlm": Tokenize(wrap="template", requires=["mask_token"]),
}


def make_config(
    tmp_path: Path, task: str, tokenizer: TokenizerSource, of_data: Flatten, of_task: Flatten | None = None
) -> TokenizeConfig:
    return TokenizeConfig(
        data=FlattenData(flatten=of_data),
        flatten=of_task,
        model=ModelTokenizer(tokenizer=tokenizer),
        tokenize=WRAP[task],
        sources=None,
        start=None,
        raw=str(tmp_path / "raw"),
        out=str(tmp_path / "tokens"),
    )


def make_trained_source(task: str) -> TokenizerSource:
    roles = {"causal": CAUSAL_TOKENS, "mlm": MLM_TOKENS}[task]
    return TokenizerSource(train=TrainedTokenizer(vocab_size=300, special_tokens=dict(roles)))


def tokenize_questions(tmp_path: Path, task: str, of_data: Flatten = PROMPTED, of_task: Flatten | None = None) -> Path:
    for split in SPLITS:
        write_questions(tmp_path / f"raw/{split}.parquet", RECORDS, rows=2)
    main(make_config(tmp_path, task, make_trained_source(task), of_data, of_task))
    return tmp_path / "tokens"


def decode_chosen(tokens: Path, ids: np.ndarray, chosen: np.ndarray) -> str:
    return str(load_tokenizer(tokens / "tokenizer").decode(ids[chosen].tolist(), skip_special_tokens=False))


@pytest.mark.parametrize("task", ["causal", "mlm"])
def test_tokens_of_completions_are_counted_and_those_of_prompts_are_not(tmp_path: Path, task: str) -> None:
    tokens = tokenize_questions(tmp_path, task)
    documents, vocabulary = Documents(tokens / "train"), Vocabulary.read(tokens)
    for number, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        ids, marks = documents[number], documents.get_marks(number)
        assert marks is not None
        is_text, counts = vocabulary.is_text(ids), (marks & COUNTED) > 0
        assert decode_chosen(tokens, ids, is_text & counts) == answer
        assert decode_chosen(tokens, ids, is_text & ~counts) == prompt
        assert counts[-1]  # the end of the document is learned
        assert not (marks & TEMPLATE).any()
    assert documents.num_counted_bytes.tolist() == [len(answer.encode()) for answer in ANSWERS]
    assert documents.num_bytes.tolist() == [
        len((prompt + answer).encode()) for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)
    ]


@pytest.mark.parametrize("task", ["causal", "mlm"])
def test_marks_begin_segments_at_the_control_tokens(tmp_path: Path, task: str) -> None:
    tokens = tokenize_questions(tmp_path, task)
    documents, vocabulary = Documents(tokens / "train"), Vocabulary.read(tokens)
    start = vocabulary.prefix[0] if vocabulary.prefix else vocabulary.special["eos_token"]
    for number in range(len(documents)):
        marks = documents.get_marks(number)
        assert marks is not None
        assert ((marks & SEGMENT_START > 0) == (documents[number] == start)).all()


def test_ledger_has_the_counted_tokens_and_bytes(tmp_path: Path) -> None:
    ledger = read_stats(tokenize_questions(tmp_path, "causal") / "train")
    assert ledger["counted_bytes"] == sum(len(answer.encode()) for answer in ANSWERS)
    assert ledger["bytes"] == sum(len(text.encode()) for text in [*ANSWERS, *PROMPTS])
    assert 0 < ledger["counted_tokens"] < ledger["tokens"]


def test_flatten_of_the_task_overrides_that_of_the_data(tmp_path: Path) -> None:
    whole = Flatten(columns=["title", "answers.text"])
    tokens = tokenize_questions(tmp_path, "causal", of_data=whole, of_task=PROMPTED)
    assert Documents(tokens / "train").num_counted_bytes[1] == len(ANSWERS[1].encode())


def test_tokens_of_fully_counted_documents_have_no_marks(tmp_path: Path) -> None:
    tokens = tokenize_questions(tmp_path, "causal", of_data=Flatten(columns=["answers.text"]))
    assert Documents(tokens / "train").get_marks(0) is None
    assert "counted_tokens" not in read_stats(tokens / "train")
    assert "chat_template" not in read_stats(tokens)


def tokenize_chats(tmp_path: Path) -> Path:
    directory = write_chat_bpe(tmp_path / "chat")
    for split in SPLITS:
        write_conversations(tmp_path / f"raw/{split}.parquet", TALKS, rows=1)
    source = TokenizerSource(path=str(directory), files=hash_files(directory))
    main(make_config(tmp_path, "causal", source, Flatten(messages=True)))
    return tmp_path / "tokens"


def test_tokens_of_conversations_follow_the_template_and_count_the_assistant(tmp_path: Path) -> None:
    tokens = tokenize_chats(tmp_path)
    documents, vocabulary = Documents(tokens / "train"), Vocabulary.read(tokens)
    assert (vocabulary.lead, vocabulary.prefix, vocabulary.suffix) == ([], [], [])
    everything = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in TALKS[0])
    ids, marks = documents[0], documents.get_marks(0)
    assert marks is not None
    assert decode_chosen(tokens, ids, np.ones(len(ids), np.bool_)) == everything
    assert decode_chosen(tokens, ids, marks & COUNTED > 0) == "So.<|im_end|>Yes ✓<|im_end|>"
    texts = "".join(f"{role}\n{content}\n" for role, content in TALKS[0])
    assert decode_chosen(tokens, ids, marks & TEMPLATE == 0) == texts
    assert (marks & SEGMENT_START).nonzero()[0].tolist() == [0]  # and not at the end of each message
    assert documents.num_counted_bytes.tolist() == [len("So.Yes ✓".encode()), len(b"Hello.")]


def test_control_tokens_spelled_in_a_conversation_are_text_tokens(tmp_path: Path) -> None:
    tokens = tokenize_chats(tmp_path)
    documents = Documents(tokens / "train")
    marks = documents.get_marks(1)
    assert marks is not None
    assert int((marks & TEMPLATE > 0).sum()) == 4
    assert "Hi <|im_end|>" in decode_chosen(tokens, documents[1], marks & TEMPLATE == 0)


def test_conversation_rejected_by_the_template_is_an_error_that_names_the_record(tmp_path: Path) -> None:
    directory = write_chat_bpe(tmp_path / "chat", "{{ raise_exception('no system role') }}")
    for split in SPLITS:
        write_conversations(tmp_path / f"raw/{split}.parquet", TALKS)
    source = TokenizerSource(path=str(directory), files=hash_files(directory))
    with pytest.raises(StageError, match="train record 0: the chat template rejects its messages: no system role"):
        main(make_config(tmp_path, "causal", source, Flatten(messages=True)))
    assert not (tmp_path / "tokens").exists()


@pytest.mark.parametrize(
    ("task", "problem"),
    [("causal", "tokenizer to train has no chat template"), ("mlm", "conversations are for causal")],
)
def test_conversations_without_a_usable_template_are_a_config_error(tmp_path: Path, task: str, problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        make_config(tmp_path, task, make_trained_source(task), Flatten(messages=True))
