"""Hashes of the word 5-grams of documents, made in batches from their bytes, without a string for any of them."""

import hashlib

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stages.download.arrays import Ints, ranges, text_offsets, to_scalar
from stages.download.records import NORMALISED_ASCII, SYMBOLS, fold, normalise

Hashes = npt.NDArray[np.uint64]
Bytes = npt.NDArray[np.uint8]

WORDS = 5  # of a shingle

_SPACE = ord(" ")
# Odd numbers without a pattern, by which hashes are multiplied.
_FACTORS = np.array(
    [0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93, 0xA0761D6478BD642F], np.uint64
)
_LONG_WORD = 256  # bytes, above which a word is hashed by itself
# Of the eight bytes that begin a word, those that are of it, by its length.
_MASKS = np.array([2 ** (8 * length) - 1 for length in range(9)], np.uint64)


def hash_shingles(documents: pa.StringArray) -> tuple[Hashes, Ints]:
    """Hashes of the word 5-grams of each normalised document, and where those of each begin.

    A document of fewer words is one shingle. Equal shingles have equal hashes.

    Returns:
        [num_shingles], and [num_documents + 1]: each document has at least one, some more than once.
    """
    spaced = pc.binary_join_element_wise(documents, to_scalar(""), to_scalar(" "))
    offsets = text_offsets(spaced)
    content = memoryview(spaced.buffers()[2] or b"")[: offsets[-1]].tobytes()
    hashes, first_words = _hash_all_words(content, offsets)
    without_words = np.flatnonzero(np.diff(first_words) == 0)
    if len(without_words):  # texts of symbols alone, which are themselves: one word each
        others = [_hash_bytes(normalise(documents[int(number)].as_py()).encode()) for number in without_words]
        hashes = np.insert(hashes, first_words[without_words], others)
        first_words = first_words + np.searchsorted(without_words, np.arange(len(first_words)))
    return _hash_5_grams(hashes, first_words)


def _hash_all_words(content: bytes, offsets: Ints) -> tuple[Hashes, Ints]:
    """Hashes of the words of normalised documents, [num_words], and the number of the first of each.

    Args:
        content: the documents, of which each ends with a space.
        offsets: where each begins, [num_documents + 1].
    """
    lowered = np.frombuffer(content.translate(NORMALISED_ASCII), np.uint8)
    starts, ends, first_words = _find_words(lowered, offsets)
    hashes = _hash_words(lowered, starts, ends)
    wide = np.unique(np.searchsorted(starts, np.flatnonzero(lowered >= 0x80), side="right") - 1)
    if not len(wide):
        return hashes, first_words
    # What is beyond ASCII in a word may fold into other characters, or part it into several words or none: the
    # distinct ones are few, and no form of folding looks beyond a space.
    _, examples, kinds = np.unique(hashes[wide], return_index=True, return_inverse=True)
    folded = [
        SYMBOLS.sub(" ", fold(content[start:end].decode())).encode() + b" "
        for start, end in zip(starts[wide[examples]].tolist(), ends[wide[examples]].tolist(), strict=True)
    ]
    pieces = np.frombuffer(b"".join(folded), np.uint8)
    piece_starts, piece_ends, first_pieces = _find_words(pieces, np.cumsum([0, *map(len, folded)]))
    piece_hashes = _hash_words(pieces, piece_starts, piece_ends)
    num_pieces = np.diff(first_pieces)[kinds]  # of each wide word, [num_wide]
    moved = np.concatenate([[0], np.cumsum(num_pieces - 1)])  # places by which the words behind each move
    counts = np.ones(len(hashes), np.int64)
    counts[wide] = num_pieces
    hashes = np.repeat(hashes, counts)
    hashes[ranges(wide + moved[:-1], num_pieces)] = piece_hashes[ranges(first_pieces[kinds], num_pieces)]
    return hashes, first_words + moved[np.searchsorted(wide, first_words)]


def _find_words(content: Bytes, offsets: Ints) -> tuple[Ints, Ints, Ints]:
    """Where words begin and where they end, [num_words] each; and the number of the first of each document."""
    in_word = np.concatenate([[False], content != _SPACE])
    bounds = np.flatnonzero(in_word[1:] != in_word[:-1])
    starts, ends = bounds[::2], bounds[1::2]
    return starts, ends, np.searchsorted(starts, offsets)


def _hash_words(content: Bytes, starts: Ints, ends: Ints) -> Hashes:
    """Hashes of the words from `starts` to `ends`, [num_words]: their bytes, of longer ones eight at a time."""
    padded = np.concatenate([content, np.zeros(8, np.uint8)])
    eights = np.ndarray(len(content) + 1, "<u8", padded, strides=(1,))  # the eight bytes from each place on
    lengths = ends - starts
    hashes: Hashes = eights[starts] & _MASKS[np.minimum(lengths, 8)]
    longer = np.flatnonzero((lengths > 8) & (lengths <= _LONG_WORD))
    done = 8
    while len(longer):
        rest = np.minimum(lengths[longer] - done, 8)
        hashes[longer] = _mix(hashes[longer] * _FACTORS[0] + (eights[starts[longer] + done] & _MASKS[rest]))
        done += 8
        longer = longer[lengths[longer] > done]
    for number in np.flatnonzero(lengths > _LONG_WORD).tolist():
        hashes[number] = _hash_bytes(content[starts[number] : ends[number]].tobytes())
    return hashes


def _hash_bytes(word: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(word, digest_size=8).digest(), "little")


def _hash_5_grams(words: Hashes, first_words: Ints) -> tuple[Hashes, Ints]:
    """Hashes of five words in a row, or of all of a document that has fewer.

    Args:
        words: hashes of the words of all documents, [num_words].
        first_words: where those of each begin, [num_documents + 1].

    Returns:
        [num_shingles], and [num_documents + 1].
    """
    firsts, lasts = first_words[:-1], first_words[1:]
    padded = np.concatenate([words, np.zeros(WORDS, np.uint64)])
    begins_one = np.ones(len(words), np.bool_)  # whether five words from this one on are of one document
    sums = np.zeros(len(words), np.uint64)
    in_short = np.zeros(len(firsts), np.uint64)
    for place in range(WORDS):
        sums += padded[place : place + len(words)] * _FACTORS[place]
        in_short += np.where(firsts + place < lasts, padded[firsts + place] * _FACTORS[place], np.uint64(0))
        if place:
            ending = lasts - place
            begins_one[ending[ending >= firsts]] = False
    is_short = lasts - firsts < WORDS
    offsets = np.concatenate([[0], np.cumsum(np.maximum(lasts - firsts - WORDS + 1, 1))])
    hashes = np.empty(offsets[-1], np.uint64)
    of_short = np.zeros(len(hashes), np.bool_)
    of_short[offsets[:-1][is_short]] = True
    hashes[of_short], hashes[~of_short] = in_short[is_short], sums[begins_one]
    return _mix(hashes), offsets


def _mix(hashes: Hashes) -> Hashes:
    """Hashes of which every bit depends on all bits of the given ones (the end of splitmix64)."""
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hashes ^ (hashes >> np.uint64(31))
