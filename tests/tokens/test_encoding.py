"""encoding: both engines give the same ids for any text, text stays text, and an inexact engine is not used."""

import json
import logging
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pytest
from data_helpers import CAUSAL_TOKENS, MLM_TOKENS, TEXTS, no_deadline, write_bpe, write_word_piece
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers, processors

from stages.tokens import encoding
from stages.tokens.encoding import (
    Decoder,
    EncodedTexts,
    Engine,
    TokenizersEngine,
    build_fastokens_engine,
    build_token_bytes,
    choose_engine,
    find_first_difference,
)
from stages.tokens.vocabulary import load_tokenizer

SPELT_OUT = ["<|endoftext|>", "<s>", "</s>", "<pad>", "<unk>", "<mask>", "[CLS]", "[SEP]", "[MASK]"]

# Directories of more tokenizers to compare both engines on, for example of distilgpt2 and distilroberta.
MORE = [Path(name) for name in os.environ.get("LM_REPRO_TOKENIZERS", "").split(os.pathsep) if name]


def write_roberta(directory: Path) -> Path:
    """Write a tokenizer with RoBERTa's post-processor, which fastokens does not support, and an added word."""
    tokenizer = Tokenizer.from_file(str(write_bpe(directory, MLM_TOKENS, 330) / "tokenizer.json"))
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    tokenizer.add_tokens(["wholeword"])
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def write_normalizing(directory: Path) -> Path:
    """Write a byte-level BPE that first composes characters (NFC), as the one of ModernBERT does."""
    tokenizer = Tokenizer.from_file(str(write_bpe(directory, CAUSAL_TOKENS, 330) / "tokenizer.json"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


WRITERS = {
    "causal": lambda directory: write_bpe(directory, CAUSAL_TOKENS),
    "mlm": lambda directory: write_bpe(directory, MLM_TOKENS),
    "roberta": write_roberta,
    "nfc": write_normalizing,
}


class ByteLevel(NamedTuple):
    """A byte-level tokenizer with its engines and decoder, which are slow to build."""

    tokenizer: Tokenizer
    fast: Engine
    exact: Engine
    decoder: Decoder


@pytest.fixture(scope="module", params=[*WRITERS, *MORE], ids=str)
def byte_level(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ByteLevel:
    is_directory = isinstance(request.param, Path)
    directory = request.param if is_directory else WRITERS[request.param](tmp_path_factory.mktemp("t") / "tokenizer")
    tokenizer = load_tokenizer(directory)
    fast = build_fastokens_engine(tokenizer)
    assert fast is not None
    return ByteLevel(tokenizer, fast, TokenizersEngine(tokenizer), Decoder(tokenizer))


def split_rows(encoded: EncodedTexts) -> list[list[int]]:
    return [ids.tolist() for ids in np.split(encoded.ids, encoded.offsets[1:-1])]


# Difficult input for tokenizers: control tokens in text, contractions, all kinds of space, combining marks, letters of
# many scripts, parts of emoji, digits of several scripts, long runs, and code points that are not characters.
# fmt: off
_PIECES = st.sampled_from([
    *SPELT_OUT, "wholeword", "'s", "'LL", "\u2019re", " ", "  ", "\t", "\r\n", "\n\n", "\u00a0", "\u3000", "\u2028",
    "\u200b", "\u200d", "\ufeff", "\x00", "\x1f", "\x7f", "\u0085", "e\u0301", "\u0301", "\u1100\u1161", "\ufb01",
    "\u017f", "\u0130", "👩\u200d👩\u200d👧", "🇨🇭", "🏽", "北京", "สวัสดี", "नमस्ते", "שָׁלוֹם", "مرحبا", "\u0663", "\u0be7",
    "½", "²", "a" * 300, " " * 70, "\uffff", "\U0010ffff",
])
# fmt: on
_TEXT = st.lists(_PIECES | st.text(st.characters(exclude_categories=["Cs"]), max_size=12), max_size=12).map("".join)


@no_deadline
@given(texts=st.lists(_TEXT, max_size=4))
def test_engines_give_the_same_ids_for_any_text(byte_level: ByteLevel, texts: list[str]) -> None:
    one, other = byte_level.fast(texts), byte_level.exact(texts)
    assert split_rows(one) == split_rows(other)
    assert (one.ids.dtype, one.offsets.dtype) == (other.ids.dtype, other.offsets.dtype) == (np.uint32, np.int64)


@no_deadline
@given(texts=st.lists(_TEXT, max_size=4))
def test_engines_never_encode_text_to_control_tokens(byte_level: ByteLevel, texts: list[str]) -> None:
    control = {number for number, token in byte_level.tokenizer.get_added_tokens_decoder().items() if token.special}
    for engine in (byte_level.fast, byte_level.exact):
        assert not control & set(engine(texts).ids.tolist())


@no_deadline
@given(texts=st.lists(_TEXT, min_size=1, max_size=4))
def test_find_lossy_texts_agrees_with_decoding(byte_level: ByteLevel, texts: list[str]) -> None:
    encoded = byte_level.exact(texts)
    decoded = byte_level.tokenizer.decode_batch(split_rows(encoded), skip_special_tokens=False)
    expected = sum(text != back for text, back in zip(texts, decoded, strict=True))
    assert byte_level.decoder.find_lossy_texts(pa.array(texts, pa.string()), encoded).sum() == expected


def test_find_lossy_texts_of_a_byte_level_tokenizer_finds_changed_texts(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_normalizing(tmp_path / "t"))
    texts = ["e\u0301", "é", "", "plain"]  # the first is composed into the second
    assert Decoder(tokenizer).find_lossy_texts(pa.array(texts), TokenizersEngine(tokenizer)(texts)).sum() == 1
    part = pa.array(["x", *texts, "y"]).slice(1, 4)  # an array that begins inside its buffers
    assert Decoder(tokenizer).find_lossy_texts(part, TokenizersEngine(tokenizer)(texts)).sum() == 1
    assert Decoder(tokenizer).find_lossy_texts(pa.array([], pa.string()), TokenizersEngine(tokenizer)([])).sum() == 0


def test_build_token_bytes_has_a_token_for_every_byte(tmp_path: Path) -> None:
    token_bytes = build_token_bytes(load_tokenizer(write_bpe(tmp_path / "t", CAUSAL_TOKENS))).to_pylist()
    assert sorted(token for token in token_bytes if len(token) == 1) == [bytes([value]) for value in range(256)]


def test_choose_engine_for_word_piece_is_tokenizers(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_word_piece(tmp_path / "t"))
    name, engine = choose_engine(tokenizer, ["sky"])
    assert (name, split_rows(engine(["sky", ""]))) == ("tokenizers", [[tokenizer.token_to_id("sky")], []])


@pytest.mark.parametrize("literal", SPELT_OUT)
def test_choose_engine_for_word_piece_encodes_spelled_control_tokens_as_text(tmp_path: Path, literal: str) -> None:
    tokenizer = load_tokenizer(write_word_piece(tmp_path / "t"))
    _, engine = choose_engine(tokenizer, TEXTS)
    ids = engine([f"sky {literal}{literal} blue"]).ids
    assert not {tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]", "[MASK]", "[PAD]")} & set(ids.tolist())


def encode_wrongly(texts: list[str]) -> EncodedTexts:
    return EncodedTexts(np.zeros(len(texts), np.uint32), np.arange(len(texts) + 1))


def fail_to_encode(texts: list[str]) -> EncodedTexts:
    raise ValueError("cannot")


@pytest.mark.parametrize(
    ("engine", "message"), [(encode_wrongly, "encodes 'Why is the sky blue?'"), (fail_to_encode, "fails on this text")]
)
def test_choose_engine_with_inexact_fastokens_falls_back_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, engine: object, message: str
) -> None:
    tokenizer = load_tokenizer(write_bpe(tmp_path / "t", CAUSAL_TOKENS))
    monkeypatch.setattr(encoding, "build_fastokens_engine", lambda tokenizer: engine)
    with caplog.at_level(logging.WARNING):
        name, chosen = choose_engine(tokenizer, TEXTS)
    assert name == "tokenizers"
    assert split_rows(chosen(TEXTS)) == [tokenizer.encode(text).ids for text in TEXTS]
    assert len(caplog.records) == 1 and message in caplog.text


def test_choose_engine_for_a_bpe_unsupported_by_fastokens_is_tokenizers(tmp_path: Path) -> None:
    file = write_bpe(tmp_path / "t", CAUSAL_TOKENS) / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"]["extra"] = 5000  # ids with a gap
    content["pre_tokenizer"] = {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": True}
    file.write_text(json.dumps(content))
    tokenizer = load_tokenizer(file.parent)
    _, engine = choose_engine(tokenizer, TEXTS)
    assert split_rows(engine(TEXTS)) == [tokenizer.encode(text).ids for text in TEXTS]


def test_find_first_difference_returns_the_first_text_that_differs() -> None:
    one = EncodedTexts(np.array([1, 2, 3], np.uint32), np.array([0, 2, 2, 3]))
    other = EncodedTexts(np.array([1, 2, 4], np.uint32), np.array([0, 2, 2, 3]))
    longer = EncodedTexts(np.array([1, 2, 9, 3], np.uint32), np.array([0, 2, 3, 4]))
    assert [find_first_difference(one, two) for two in (one, other, longer)] == [None, 2, 1]
