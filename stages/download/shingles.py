"""Hashes of the word 5-grams of documents, computed in batches from bytes, without building strings."""

import hashlib

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stages.download.arrays import Ints, concatenate_ranges, get_text_offsets, to_scalar
from stages.download.records import NORMALIZED_ASCII, SYMBOLS, fold_text, normalize_text

Hashes = npt.NDArray[np.uint64]
Bytes = npt.NDArray[np.uint8]

SHINGLE_WORDS = 5  # words per shingle

_SPACE = ord(" ")
# Irregular odd multipliers for hashes.
_FACTORS = np.array(
    [0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93, 0xA0761D6478BD642F], np.uint64
)
_LONG_WORD = 256  # bytes; longer words are hashed one by one
# Mask of the bytes that belong to a word, by its length, for the eight bytes at its start.
_MASKS = np.array([2 ** (8 * length) - 1 for length in range(9)], np.uint64)


def hash_shingles(documents: pa.StringArray) -> tuple[Hashes, Ints]:
    """Hash the word 5-grams of normalized documents. A document with fewer words is one shingle.

    Args:
        documents: texts, [num_documents].

    Returns:
        Hashes, [num_shingles], uint64, equal for equal shingles, and the index of each document's first shingle,
        [num_documents + 1], int64. Each document has at least one shingle; shingles can be repeated.
    """
    # Append a space to each document. content: the bytes of all documents, at `offsets`, [num_documents + 1].
    spaced = pc.binary_join_element_wise(documents, to_scalar(""), to_scalar(" "))
    offsets = get_text_offsets(spaced)
    content = memoryview(spaced.buffers()[2] or b"")[: offsets[-1]].tobytes()
    hashes, first_words = _hash_all_words(content, offsets)
    without_words = np.flatnonzero(np.diff(first_words) == 0)
    if len(without_words):  # they consist of symbols: each counts as one word
        others = [_hash_bytes(normalize_text(documents[int(number)].as_py()).encode()) for number in without_words]
        hashes = np.insert(hashes, first_words[without_words], others)
        first_words = first_words + np.searchsorted(without_words, np.arange(len(first_words)))
    return _hash_5_grams(hashes, first_words)


def _hash_all_words(content: bytes, offsets: Ints) -> tuple[Hashes, Ints]:
    """Hash the words of normalized documents.

    Args:
        content: bytes of the documents, each of which ends with a space.
        offsets: byte offset of each document, [num_documents + 1], int64.

    Returns:
        Hashes, [num_words], uint64, and the index of each document's first word, [num_documents + 1], int64.
    """
    lowered = np.frombuffer(content.translate(NORMALIZED_ASCII), np.uint8)
    starts, ends, first_words = _find_words(lowered, offsets)
    hashes = _hash_words(lowered, starts, ends)
    # Indices of the words with bytes beyond ASCII, [num_wide].
    wide = np.unique(np.searchsorted(starts, np.flatnonzero(lowered >= 0x80), side="right") - 1)
    if not len(wide):
        return hashes, first_words
    # Normalizing can change their characters, or divide them into several words or none. Only the distinct words, which
    # are few, are normalized; no rule of folding extends across a space.
    # examples: index in `wide` of each distinct word; kinds: index of the distinct word of each wide word, [num_wide].
    _, examples, kinds = np.unique(hashes[wide], return_index=True, return_inverse=True)
    folded = [
        SYMBOLS.sub(" ", fold_text(content[start:end].decode())).encode() + b" "
        for start, end in zip(starts[wide[examples]].tolist(), ends[wide[examples]].tolist(), strict=True)
    ]
    pieces = np.frombuffer(b"".join(folded), np.uint8)
    piece_starts, piece_ends, first_pieces = _find_words(pieces, np.cumsum([0, *map(len, folded)]))
    piece_hashes = _hash_words(pieces, piece_starts, piece_ends)
    num_pieces = np.diff(first_pieces)[kinds]  # per wide word, [num_wide]
    # Number of positions by which the words after each wide word move, [num_wide + 1].
    moved = np.concatenate([[0], np.cumsum(num_pieces - 1)])
    counts = np.ones(len(hashes), np.int64)
    counts[wide] = num_pieces
    # Make room for the pieces of each wide word, and write their hashes there: [num_words after normalizing].
    hashes = np.repeat(hashes, counts)
    hashes[concatenate_ranges(wide + moved[:-1], num_pieces)] = piece_hashes[
        concatenate_ranges(first_pieces[kinds], num_pieces)
    ]
    return hashes, first_words + moved[np.searchsorted(wide, first_words)]


def _find_words(content: Bytes, offsets: Ints) -> tuple[Ints, Ints, Ints]:
    """Find the words in `content`, [num_bytes], uint8, which are separated by spaces.

    Returns:
        Byte offsets of the starts and ends of words, [num_words] each, and the index of each document's first word,
        [num_documents + 1]; all int64.
    """
    # A word starts and ends where `in_word`, [num_bytes + 1], changes.
    in_word = np.concatenate([[False], content != _SPACE])
    bounds = np.flatnonzero(in_word[1:] != in_word[:-1])
    starts, ends = bounds[::2], bounds[1::2]
    return starts, ends, np.searchsorted(starts, offsets)


def _hash_words(content: Bytes, starts: Ints, ends: Ints) -> Hashes:
    """Hash words.

    Words of up to 8 bytes are their own hash. Longer words are mixed eight bytes at a time, and words of more than
    _LONG_WORD bytes are hashed with BLAKE2.

    Args:
        content: [num_bytes], uint8.
        starts: byte offset of each word, [num_words], int64.
        ends: byte offset of the end of each word, [num_words], int64.

    Returns:
        [num_words], uint64.
    """
    padded = np.concatenate([content, np.zeros(8, np.uint8)])
    eights = np.ndarray(len(content) + 1, "<u8", padded, strides=(1,))  # the eight bytes at each offset, overlapping
    lengths = ends - starts
    hashes: Hashes = eights[starts] & _MASKS[np.minimum(lengths, 8)]
    # Indices of the words that are not yet complete after the first `done` bytes.
    longer = np.flatnonzero((lengths > 8) & (lengths <= _LONG_WORD))
    done = 8
    while len(longer):
        rest = np.minimum(lengths[longer] - done, 8)
        hashes[longer] = _mix_bits(hashes[longer] * _FACTORS[0] + (eights[starts[longer] + done] & _MASKS[rest]))
        done += 8
        longer = longer[lengths[longer] > done]
    for number in np.flatnonzero(lengths > _LONG_WORD).tolist():
        hashes[number] = _hash_bytes(content[starts[number] : ends[number]].tobytes())
    return hashes


def _hash_bytes(word: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(word, digest_size=8).digest(), "little")


def _hash_5_grams(words: Hashes, first_words: Ints) -> tuple[Hashes, Ints]:
    """Hash each sequence of five words, or all words of a document that has fewer.

    Args:
        words: hashes of the words of all documents, [num_words], uint64.
        first_words: index of each document's first word, [num_documents + 1], int64.

    Returns:
        Hashes, [num_shingles], uint64, and the index of each document's first shingle, [num_documents + 1], int64.
    """
    firsts, lasts = first_words[:-1], first_words[1:]
    padded = np.concatenate([words, np.zeros(SHINGLE_WORDS, np.uint64)])
    begins_shingle = np.ones(len(words), np.bool_)  # True if the five words from here on are in the same document
    # Weighted sums of the hashes of five words, [num_words], and of the words of short documents, [num_documents].
    sums = np.zeros(len(words), np.uint64)
    short_sums = np.zeros(len(firsts), np.uint64)
    for position in range(SHINGLE_WORDS):
        sums += padded[position : position + len(words)] * _FACTORS[position]
        short_sums += np.where(firsts + position < lasts, padded[firsts + position] * _FACTORS[position], np.uint64(0))
        if position:
            ending = lasts - position
            begins_shingle[ending[ending >= firsts]] = False
    is_short = lasts - firsts < SHINGLE_WORDS
    offsets = np.concatenate([[0], np.cumsum(np.maximum(lasts - firsts - SHINGLE_WORDS + 1, 1))])
    hashes = np.empty(offsets[-1], np.uint64)
    is_short_shingle = np.zeros(len(hashes), np.bool_)
    is_short_shingle[offsets[:-1][is_short]] = True
    hashes[is_short_shingle], hashes[~is_short_shingle] = short_sums[is_short], sums[begins_shingle]
    return _mix_bits(hashes), offsets


def _mix_bits(hashes: Hashes) -> Hashes:
    """Mix the bits of each hash, so that every bit depends on all others (finalizer of splitmix64)."""
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hashes ^ (hashes >> np.uint64(31))
