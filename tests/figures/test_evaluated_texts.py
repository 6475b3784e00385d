"""Texts of sources that are only evaluated: any documents of several files are encoded as if separate."""

import re

import numpy as np
import pytest
from data_helpers import CAUSAL_TOKENS, TEXTS, write_bpe, write_json, write_records, write_unigram, write_word_piece
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.core.errors import StageError
from stages.figures.texts import SourceTexts, find_source_files
from stages.tokens.texts import Flatten
from stages.tokens.vocabulary import build_vocabulary, load_tokenizer

MANY = [f"{text} {number}" for number in range(4) for text in [*TEXTS, ""]]
FLATTEN = Flatten(columns=["answers.text"], joiner=" ")


def save_vocabulary(tokens, wrap="end_of_sequence", requires=("eos_token",)):
    vocabulary = build_vocabulary(load_tokenizer(tokens / "tokenizer"), tokens / "tokenizer", wrap, requires)
    write_json(tokens / "stats.json", {"vocabulary": vars(vocabulary)})


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """20 documents in three files with row groups of three, and the ids of each document encoded separately."""
    root = tmp_path_factory.mktemp("source")
    write_bpe(root / "tokens/tokenizer", CAUSAL_TOKENS)
    save_vocabulary(root / "tokens")
    parts = [MANY[:7], [], MANY[7:]]
    files = [write_records(root / f"{number}.parquet", part, rows=3) for number, part in enumerate(parts)]
    tokenizer = load_tokenizer(root / "tokens/tokenizer")
    alone = [tokenizer.encode(text, add_special_tokens=False).ids for text in MANY]
    return SourceTexts("extra", files, FLATTEN, root / "tokens"), alone


@settings(deadline=None)
@given(chosen=st.sets(st.integers(0, len(MANY) - 1)))
def test_source_gives_any_of_its_documents(source, chosen):
    texts, alone = source
    numbers = sorted(chosen)
    found = list(texts.read_texts(np.array(numbers, np.int64)))
    assert len(texts) == len(MANY)
    assert [text.ids.tolist() for text in found] == [alone[number] for number in numbers]
    assert [text.num_bytes for text in found] == [len(MANY[number].encode()) for number in numbers]


def test_source_text_that_spells_a_control_token_is_an_error_that_names_the_record(tmp_path):
    write_unigram(tmp_path / "tokens/tokenizer")
    save_vocabulary(tmp_path / "tokens")
    parts = [["abc", "a", "b"], ["abc", "c", "a</s>b"]]
    files = [write_records(tmp_path / f"{number}.parquet", part, rows=2) for number, part in enumerate(parts)]
    texts = SourceTexts("extra", files, FLATTEN, tmp_path / "tokens")
    with pytest.raises(StageError, match=r"extra record 5 spells a control token"):
        list(texts.read_texts(np.array([0, 3, 5])))


def test_source_texts_that_the_tokenizer_does_not_give_back_are_counted_in_a_warning(tmp_path, caplog):
    write_word_piece(tmp_path / "tokens/tokenizer")
    save_vocabulary(tmp_path / "tokens", "template", ["mask_token"])
    file = write_records(tmp_path / "a.parquet", ["sky", "SKY", "Blue"])
    list(SourceTexts("extra", [file], FLATTEN, tmp_path / "tokens").read_texts(np.arange(3)))
    assert "extra: the tokenizer cannot reproduce 2 documents exactly" in caplog.text


def test_source_files_are_the_whole_or_the_splits_in_order(tmp_path):
    for name in ("validation", "test", "train"):
        write_records(tmp_path / f"split/{name}.parquet", TEXTS)
    write_records(tmp_path / "whole/all.parquet", TEXTS)
    names = [[file.name for file in find_source_files(tmp_path, name)] for name in ("split", "whole")]
    assert names == [["train.parquet", "validation.parquet", "test.parquet"], ["all.parquet"]]


@pytest.mark.parametrize(
    ("params", "said"),
    [
        (
            "sources:\n  one: {name: files, path: a}\n  two: {name: hub, path: b}\n",
            "sources of params.yaml: one, two: add",
        ),
        ("sources: {}\n", "sources of params.yaml: none: add"),
        ("seed: 1\n", "sources of params.yaml: none: add"),
    ],
)
def test_source_files_that_are_not_there_name_the_sources_of_params(tmp_path, monkeypatch, params, said):
    (tmp_path / "params.yaml").write_text(params)
    monkeypatch.setattr("stages.figures.texts.PARAMS", tmp_path / "params.yaml")
    with pytest.raises(
        StageError, match=re.escape(f"names wiki, but {tmp_path}/wiki has no records; {said} wiki there")
    ):
        find_source_files(tmp_path, "wiki")
