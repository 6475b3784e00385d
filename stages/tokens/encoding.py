"""Encode text as token ids, with fastokens if it gives the exact ids, otherwise with Hugging Face tokenizers.

fastokens is many times faster. With both, text stays text: a control token that is spelled out in a text is encoded as
ordinary characters.
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
from stages.tokens.vocabulary import Vocabulary, convert_rust_errors

log = logging.getLogger(__name__)

# Roles of tokens that text must not become. (It can become unk_token.)
_CONTROL_ROLES = {"eos_token", "mask_token", "cls_token", "sep_token", "pad_token", "bos_token"}


class EncodedTexts(NamedTuple):
    """Concatenated token ids of a sequence of texts, without control tokens."""

    ids: npt.NDArray[np.uint32]
    """[num_tokens] uint32."""
    offsets: npt.NDArray[np.int64]
    """[num_texts + 1] int64: text i is `ids[offsets[i]:offsets[i + 1]]`."""


Engine = Callable[[list[str]], EncodedTexts]
"""Encodes texts as token ids."""


class EncodedDocuments(NamedTuple):
    """Concatenated token ids of a sequence of documents."""

    ids: TokenIds
    """[num_tokens] uint16 or uint32."""
    offsets: npt.NDArray[np.int64]
    """[num_documents + 1] int64: document i is `ids[offsets[i]:offsets[i + 1]]`."""
    marks: Marks | None
    """[num_tokens] uint8; None if all tokens are counted."""
    num_bytes: npt.NDArray[np.int64]
    """[num_documents] int64: UTF-8 bytes of all text of each document."""
    num_counted_bytes: npt.NDArray[np.int64]
    """[num_documents] int64: UTF-8 bytes of the counted text of each document."""


class DocumentText(NamedTuple):
    """Tokens of a document to score."""

    ids: TokenIds
    """[num_tokens] token ids, without the special tokens that wrap a document."""
    num_bytes: int
    """Size in UTF-8 of the predicted tokens."""
    is_predicted: npt.NDArray[np.bool_] | None = None
    """[num_tokens] true for the tokens to predict; None: all of them."""


def join_segments(
    encoded: EncodedTexts, segments: Segments, vocabulary: Vocabulary, counts_all: bool
) -> EncodedDocuments:
    """Join encoded segments into documents, without the control tokens that wrap a document.

    Args:
        encoded: token ids of `segments.texts`, one text per segment.
        counts_all: True if all text is counted; the documents then have no marks.
    """
    offsets, ids = encoded.offsets, encoded.ids.astype(vocabulary.dtype)  # [num_segments + 1], [num_tokens]
    lengths = to_numpy(pc.binary_length(segments.texts))  # [num_segments] UTF-8 bytes
    num_bytes = segments.sum_by_document(lengths)
    if counts_all:
        # offsets[segments.offsets]: the token offset of each document's first segment, [num_documents + 1].
        return EncodedDocuments(ids, offsets[segments.offsets], None, num_bytes, num_bytes)
    counted = segments.is_counted * np.uint8(COUNTED)  # [num_segments] COUNTED or 0
    marks = np.repeat(counted, np.diff(offsets))  # [num_tokens] the mark of each token's segment
    if segments.control_ids is not None:
        is_control = segments.control_ids >= 0
        # The segment of a control token has no text and so no ids yet: its id goes to the segment's offset. Later
        # offsets move by the number of control tokens before them.
        ids = np.insert(ids, offsets[:-1][is_control], segments.control_ids[is_control])
        marks = np.insert(marks, offsets[:-1][is_control], counted[is_control] + np.uint8(TEMPLATE))
        offsets = offsets + np.concatenate([[0], np.cumsum(is_control)])
    offsets = offsets[segments.offsets]
    if not vocabulary.control_ids.size:
        # No control tokens wrap the documents: the first token of each non-empty document begins a segment.
        marks[offsets[:-1][np.diff(offsets) > 0]] |= np.uint8(SEGMENT_START)
    return EncodedDocuments(ids, offsets, marks, num_bytes, segments.sum_by_document(lengths * segments.is_counted))


def choose_engine(tokenizer: Tokenizer, sample: list[str]) -> tuple[str, Engine]:
    """Choose the fastest engine that encodes exactly as `tokenizer` does.

    Args:
        sample: texts that fastokens must encode to the same ids as `tokenizer` to be chosen.

    Returns:
        The name of the engine, `fastokens` or `tokenizers`, and the engine.
    """
    reference = TokenizersEngine(tokenizer)
    fast = build_fastokens_engine(tokenizer)
    if fast is None:
        return "tokenizers", reference
    try:
        differing = find_first_difference(fast(sample), reference(sample))
    except Exception as error:  # fastokens raises bare exceptions
        log.warning("fastokens fails on this text (%s): using tokenizers, which is exact but slower", error)
        return "tokenizers", reference
    if differing is not None:
        log.warning(
            "fastokens encodes %r ... differently from tokenizers: using tokenizers, which is exact but slower",
            sample[differing][:40],
        )
        return "tokenizers", reference
    return "fastokens", fast


def find_first_difference(one: EncodedTexts, other: EncodedTexts) -> int | None:
    """Return the index of the first text whose ids differ between `one` and `other`; None if all are equal."""
    for number in range(len(one.offsets) - 1):
        ours, theirs = (row.ids[row.offsets[number] : row.offsets[number + 1]] for row in (one, other))
        if not np.array_equal(ours, theirs):
            return number
    return None


class TokenizersEngine:
    """Engine that uses Hugging Face tokenizers; it supports every tokenizer and is the reference for fastokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        tokenizer.encode_special_tokens = True  # encode spelled-out control tokens as text; pickling loses this setting
        self._tokenizer = tokenizer

    def __reduce__(self) -> tuple[type["TokenizersEngine"], tuple[Tokenizer]]:
        return TokenizersEngine, (self._tokenizer,)

    def __call__(self, texts: list[str]) -> EncodedTexts:
        with convert_rust_errors("the tokenizer cannot encode these texts"):
            rows = [item.ids for item in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
        return EncodedTexts(np.fromiter(itertools.chain.from_iterable(rows), np.uint32, int(offsets[-1])), offsets)


class _FastokensEngine:
    """Engine that uses fastokens; raises an error if fastokens does not support the tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        from fastokens import Tokenizer as FastTokenizer

        content = tokenizer.to_str()
        if not isinstance(tokenizer.post_processor, processors.ByteLevel | None):
            # fastokens rejects unknown post-processors. They are not needed: `tokenize` adds the control tokens.
            content = json.dumps(json.loads(content) | {"post_processor": None})
        with convert_rust_errors("its Rust code fails"):
            self._tokenizer, self._fast = tokenizer, FastTokenizer.from_json_str(content)

    def __reduce__(self) -> tuple[type["_FastokensEngine"], tuple[Tokenizer]]:
        return _FastokensEngine, (self._tokenizer,)  # a fastokens tokenizer cannot be pickled

    def __call__(self, texts: list[str]) -> EncodedTexts:
        with convert_rust_errors("fastokens cannot encode these texts"):
            ids, offsets = self._fast.encode_batch_flat(texts, split_special_tokens=True)
        return EncodedTexts(np.frombuffer(ids, np.uint32), np.frombuffer(offsets, np.uint64).astype(np.int64))


def build_fastokens_engine(tokenizer: Tokenizer) -> Engine | None:
    """Return a fastokens engine for `tokenizer`; None if fastokens does not support it."""
    if not isinstance(tokenizer.model, models.BPE) or not _is_byte_level(tokenizer):
        return None
    try:
        return _FastokensEngine(tokenizer)
    except Exception as error:  # fastokens raises bare exceptions
        log.info("fastokens does not support this tokenizer (%s): using tokenizers", error)
        return None


def refuse_control_tokens(
    encoded: EncodedTexts, vocabulary: Vocabulary, noun: str, text_names: Sequence[object]
) -> None:
    """Raise StageError if a text was encoded to a control token or another token with a special role.

    Byte-level BPE encodes a spelled-out control token as ordinary tokens. A tokenizer cannot do so if its vocabulary
    contains the control token as a piece (Unigram) or as a plain word.

    Args:
        noun: noun for a text in the error message, which calls text i `{noun} {text_names[i]}`.
        text_names: [num_texts] number or place of each text.
    """
    roles = [vocabulary.special[role] for role in _CONTROL_ROLES & set(vocabulary.special)]
    special = np.array([*vocabulary.control_ids.tolist(), *roles], np.uint32)
    # [num_tokens] bool. kind="sort" compares with each of the few special ids, which is faster than a lookup table.
    found = np.isin(encoded.ids, special, kind="sort")
    if found.any():
        # argmax: the first such token. Its text is the last one with an offset at or before that token.
        number = int(np.searchsorted(encoded.offsets, found.argmax(), side="right")) - 1
        raise StageError(
            f"{noun} {text_names[number]} spells a control token, which this tokenizer cannot encode as text: remove it"
            " from the text, or choose another tokenizer"
        )


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    """Return True if the tokens of `tokenizer` are byte sequences."""
    return isinstance(tokenizer.decoder, decoders.ByteLevel)


class Decoder:
    """Decodes token ids to find the texts that encoding changed."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._spellings = build_token_bytes(tokenizer) if _is_byte_level(tokenizer) else None

    def count_lossy_documents(self, segments: Segments, encoded: EncodedTexts) -> int:
        """Count the documents that differ from their decoded ids."""
        # Lossy segments per document, [num_documents]: a document is lossy if it has any.
        return int((segments.sum_by_document(self.find_lossy_texts(segments.texts, encoded)) > 0).sum())

    def find_lossy_texts(self, texts: pa.Array, encoded: EncodedTexts) -> npt.NDArray[np.bool_]:
        """Return a mask of the texts that differ from their decoded ids.

        Args:
            texts: [num_texts] string.
            encoded: token ids of the texts.

        Returns:
            [num_texts] bool.
        """
        if self._spellings is None:
            rows = [ids.tolist() for ids in np.split(encoded.ids, encoded.offsets[1:-1])]
            with convert_rust_errors("the tokenizer cannot decode its own tokens"):
                decoded = self._tokenizer.decode_batch(rows, skip_special_tokens=False)
            return np.array([text != back for text, back in zip(texts.to_pylist(), decoded, strict=True)], np.bool_)
        # `take` gives the bytes of each token, [num_tokens] large_binary, in one contiguous buffer `data`. Its offsets
        # `ends` are [num_tokens + 1]; selecting them at the text offsets gives the decoded texts, [num_texts].
        _, ends, data = self._spellings.take(to_arrow(encoded.ids)).buffers()
        ends = np.frombuffer(ends, np.int64)[encoded.offsets] if len(encoded.ids) else encoded.offsets
        decoded = pa.Array.from_buffers(pa.large_binary(), len(texts), [None, pa.py_buffer(ends), data])
        differ = pc.not_equal(texts.cast(pa.large_binary()), decoded)
        return to_numpy(differ.cast(pa.uint8())).astype(np.bool_)


def build_token_bytes(tokenizer: Tokenizer) -> pa.Array:
    """Return the bytes of each token id of a byte-level tokenizer, [num_ids] large_binary.

    The alphabet of byte-level BPE is the one of GPT-2 (Radford et al. 2019): a printable byte is represented by its own
    character; the other bytes, in order, by the characters from 256 on.
    """
    alphabet = set(ByteLevel.alphabet())
    own = {character for character in alphabet if ord(character) < 256}
    hidden = sorted(set(map(chr, range(256))) - own)
    to_bytes = str.maketrans(dict(zip(sorted(alphabet - own), hidden, strict=True)))
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    spellings = [b""] * (max(vocabulary.values()) + 1)
    for token, number in vocabulary.items():
        # An added token can contain characters outside the alphabet; its bytes are then its UTF-8.
        known = alphabet.issuperset(token)
        spellings[number] = token.translate(to_bytes).encode("latin-1") if known else token.encode()
    ends = np.cumsum([0, *map(len, spellings)], dtype=np.int64)
    buffers = [None, pa.py_buffer(ends), pa.py_buffer(b"".join(spellings))]
    return pa.Array.from_buffers(pa.large_binary(), len(spellings), buffers)
