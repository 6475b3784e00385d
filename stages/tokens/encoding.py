"""Text to token ids: by fastokens, which is many times faster, where it is exact; by Hugging Face tokenizers elsewhere.

In both, text stays text: a control token that is spelt out in it is encoded as any other characters.
"""

import itertools
import json
import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from tokenizers import Tokenizer, decoders, models, processors
from tokenizers.pre_tokenizers import ByteLevel

from stages.core.artifacts import COUNTED, SEGMENT_START, TEMPLATE, Marks, TokenIds, to_arrow, to_numpy
from stages.core.errors import StageError
from stages.tokens.texts import Segments
from stages.tokens.vocabulary import Vocabulary, rust_errors

log = logging.getLogger(__name__)

_CONTROL_ROLES = {"eos_token", "mask_token", "cls_token", "sep_token", "pad_token", "bos_token"}  # unk stands for text


class Encoded(NamedTuple):
    """The token ids of some texts, one text after the other; control tokens left out."""

    ids: npt.NDArray[np.uint32]
    """[num_tokens]"""
    offsets: npt.NDArray[np.int64]
    """[num_texts + 1] where each text begins in `ids`, and their end."""


Engine = Callable[[list[str]], Encoded]


class EncodedDocuments(NamedTuple):
    """The token ids of some documents, one after the other."""

    ids: TokenIds
    """[num_tokens]"""
    offsets: npt.NDArray[np.int64]
    """[num_documents + 1] where each document begins in `ids`, and their end."""
    marks: Marks | None
    """[num_tokens]; None: all tokens count."""
    num_bytes: npt.NDArray[np.int64]
    """[num_documents] of all text in UTF-8."""
    num_counted_bytes: npt.NDArray[np.int64]
    """[num_documents] of the text that counts."""


def join_segments(encoded: Encoded, segments: Segments, vocabulary: Vocabulary, counts_all: bool) -> EncodedDocuments:
    """The documents of `segments`, whose texts were encoded to `encoded`, without the tokens that wrap them."""
    offsets, ids = encoded.offsets, encoded.ids.astype(vocabulary.dtype)
    lengths = to_numpy(pc.binary_length(segments.texts))
    num_bytes = segments.sum_by_document(lengths)
    if counts_all:
        return EncodedDocuments(ids, offsets[segments.offsets], None, num_bytes, num_bytes)
    counted = segments.is_counted * np.uint8(COUNTED)
    marks = np.repeat(counted, np.diff(offsets))
    if segments.control is not None:
        is_control = segments.control >= 0
        # A control token goes to where its segment, which has no text, begins and ends.
        ids = np.insert(ids, offsets[:-1][is_control], segments.control[is_control])
        marks = np.insert(marks, offsets[:-1][is_control], counted[is_control] + np.uint8(TEMPLATE))
        offsets = offsets + np.concatenate([[0], np.cumsum(is_control)])
    offsets = offsets[segments.offsets]
    if not vocabulary.control.size:  # nothing wraps documents, so that their own first tokens begin segments
        marks[offsets[:-1][np.diff(offsets) > 0]] |= np.uint8(SEGMENT_START)
    return EncodedDocuments(ids, offsets, marks, num_bytes, segments.sum_by_document(lengths * segments.is_counted))


def choose_engine(tokenizer: Tokenizer, sample: list[str]) -> tuple[str, Engine]:
    """The name of the fastest engine that encodes as `tokenizer` does, and the engine.

    Args:
        sample: texts that a faster engine must encode to the very same ids to be chosen.
    """
    reference = Tokenizers(tokenizer)
    fast = fastokens_engine(tokenizer)
    if fast is None:
        return "tokenizers", reference
    try:
        differing = first_difference(fast(sample), reference(sample))
    except Exception as error:  # as below
        log.warning("fastokens fails on this text (%s): tokenizers takes its place, exact but slower", error)
        return "tokenizers", reference
    if differing is not None:
        log.warning(
            "fastokens encodes %r ... unlike tokenizers, which takes its place: exact but slower",
            sample[differing][:40],
        )
        return "tokenizers", reference
    return "fastokens", fast


def first_difference(one: Encoded, other: Encoded) -> int | None:
    """The number of the first text that `one` and `other` encode differently."""
    for number in range(len(one.offsets) - 1):
        ours, theirs = (row.ids[row.offsets[number] : row.offsets[number + 1]] for row in (one, other))
        if not np.array_equal(ours, theirs):
            return number
    return None


class Tokenizers:
    """Hugging Face tokenizers: any kind of tokenizer, and what the others are measured by."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        tokenizer.encode_special_tokens = True  # text stays text; lost where a tokenizer is pickled
        self._tokenizer = tokenizer

    def __reduce__(self) -> tuple[type["Tokenizers"], tuple[Tokenizer]]:
        return Tokenizers, (self._tokenizer,)

    def __call__(self, texts: list[str]) -> Encoded:
        with rust_errors("the tokenizer cannot encode these texts"):
            rows = [item.ids for item in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
        return Encoded(np.fromiter(itertools.chain.from_iterable(rows), np.uint32, int(offsets[-1])), offsets)


class _Fastokens:
    """fastokens, for the byte-level BPE that it takes: others, and those with rules that it lacks, are an error."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        from fastokens import Tokenizer as FastTokenizer

        content = tokenizer.to_str()
        if not isinstance(tokenizer.post_processor, processors.ByteLevel | None):
            # It refuses those that it does not know; control tokens are tokenize's to add.
            content = json.dumps(json.loads(content) | {"post_processor": None})
        with rust_errors("its Rust code fails"):
            self._tokenizer, self._fast = tokenizer, FastTokenizer.from_json_str(content)

    def __reduce__(self) -> tuple[type["_Fastokens"], tuple[Tokenizer]]:
        return _Fastokens, (self._tokenizer,)  # its own does not pickle

    def __call__(self, texts: list[str]) -> Encoded:
        with rust_errors("fastokens cannot encode these texts"):
            ids, offsets = self._fast.encode_batch_flat(texts, split_special_tokens=True)
        return Encoded(np.frombuffer(ids, np.uint32), np.frombuffer(offsets, np.uint64).astype(np.int64))


def fastokens_engine(tokenizer: Tokenizer) -> Engine | None:
    """fastokens, where it takes `tokenizer`."""
    if not isinstance(tokenizer.model, models.BPE) or not _is_byte_level(tokenizer):
        return None
    try:
        return _Fastokens(tokenizer)
    except Exception as error:  # it raises what its Rust code meets
        log.info("fastokens does not take this tokenizer (%s): tokenizers encodes", error)
        return None


def refuse_control_tokens(encoded: Encoded, vocabulary: Vocabulary, what: str, numbers: Sequence[object]) -> None:
    """Raise StageError if a text became a token with a special role; it is named as `what` and its entry in `numbers`.

    Byte-level BPE spells such a text in ordinary tokens; a tokenizer whose own vocabulary holds the control tokens as
    pieces (Unigram) or as plain words cannot.
    """
    roles = [vocabulary.special[role] for role in _CONTROL_ROLES & set(vocabulary.special)]
    special = np.array([*vocabulary.control.tolist(), *roles], np.uint32)
    found = np.isin(encoded.ids, special, kind="sort")  # a comparison for each of these few, faster than a table
    if found.any():
        number = int(np.searchsorted(encoded.offsets, found.argmax(), side="right")) - 1
        raise StageError(
            f"{what} {numbers[number]} spells a control token, which this tokenizer cannot keep as text: take it out of"
            " the text, or choose another tokenizer"
        )


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    """Whether the tokens of `tokenizer` are spelt in bytes."""
    return isinstance(tokenizer.decoder, decoders.ByteLevel)


class Decoder:
    """Finds the texts that their ids do not give back."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._spellings = token_bytes(tokenizer) if _is_byte_level(tokenizer) else None

    def count_lossy(self, segments: Segments, encoded: Encoded) -> int:
        """How many documents are not what decoding their ids gives."""
        return int((segments.sum_by_document(self.find_lossy(segments.texts, encoded)) > 0).sum())

    def find_lossy(self, texts: pa.Array, encoded: Encoded) -> npt.NDArray[np.bool_]:
        """Which of `texts`, an array of strings, are not what decoding their ids gives: [num_texts]."""
        if self._spellings is None:
            rows = [ids.tolist() for ids in np.split(encoded.ids, encoded.offsets[1:-1])]
            with rust_errors("the tokenizer cannot decode its own tokens"):
                decoded = self._tokenizer.decode_batch(rows, skip_special_tokens=False)
            return np.array([text != back for text, back in zip(texts.to_pylist(), decoded, strict=True)], np.bool_)
        # The tokens' bytes lie one after the other: cut anew at the texts' ends, they are the texts decoded.
        _, ends, data = self._spellings.take(to_arrow(encoded.ids)).buffers()
        ends = np.frombuffer(ends, np.int64)[encoded.offsets] if len(encoded.ids) else encoded.offsets
        decoded = pa.Array.from_buffers(pa.large_binary(), len(texts), [None, pa.py_buffer(ends), data])
        differ = pc.not_equal(texts.cast(pa.large_binary()), decoded)
        return to_numpy(differ.cast(pa.uint8())).astype(np.bool_)


def token_bytes(tokenizer: Tokenizer) -> pa.Array:
    """What each id of a byte-level tokenizer stands for, [num_ids] large_binary.

    The alphabet of byte-level BPE is that of GPT-2 (Radford et al. 2019): bytes that print stand for themselves, the
    others, in order, for the characters from 256 on.
    """
    alphabet = set(ByteLevel.alphabet())
    own = {character for character in alphabet if ord(character) < 256}
    hidden = sorted(set(map(chr, range(256))) - own)
    to_bytes = str.maketrans(dict(zip(sorted(alphabet - own), hidden, strict=True)))
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    spellings = [b""] * (max(vocabulary.values()) + 1)
    for token, number in vocabulary.items():
        # A token added with other characters is spelt in them.
        known = alphabet.issuperset(token)
        spellings[number] = token.translate(to_bytes).encode("latin-1") if known else token.encode()
    ends = np.cumsum([0, *map(len, spellings)], dtype=np.int64)
    buffers = [None, pa.py_buffer(ends), pa.py_buffer(b"".join(spellings))]
    return pa.Array.from_buffers(pa.large_binary(), len(spellings), buffers)
