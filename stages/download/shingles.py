"""Hashes of the word 5-grams of documents, made in batches from their bytes, without a string for any of them."""

import hashlib
import itertools

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stages.download.arrays import Ints, text_offsets, to_bools
from stages.download.records import NORMALISED_ASCII, fold, normalise

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
    content, offsets = _normalise_all(documents)
    bounds, first_words = _find_words(content, offsets)
    without_words = np.flatnonzero(np.diff(first_words) == 0)
    if len(without_words):  # texts of symbols alone, which are themselves
        others = [normalise(documents[int(number)].as_py()).encode() for number in without_words]
        content, offsets = _replace(content, offsets, without_words, others)
        bounds, first_words = _find_words(content, offsets)
    return _hash_5_grams(_hash_words(content, bounds[::2], bounds[1::2]), first_words)


def _normalise_all(documents: pa.StringArray) -> tuple[Bytes, Ints]:
    """The UTF-8 bytes of documents, with spaces for all but letters and digits, and where each begins.

    Returns:
        [num_bytes], of which the last of each document is a space, and [num_documents + 1].
    """
    spaced = pc.binary_join_element_wise(documents, "", " ")
    offsets = text_offsets(spaced)
    content = np.frombuffer(spaced.buffers()[2] or b"", np.uint8)[: offsets[-1]]
    wide = np.flatnonzero(~to_bools(pc.string_is_ascii(documents)))
    if len(wide):
        others = [fold(documents[int(number)].as_py()).encode() for number in wide]
        content, offsets = _replace(content, offsets, wide, others)
    content = np.frombuffer(content.tobytes().translate(NORMALISED_ASCII), np.uint8)
    return (_without_wide_symbols(content) if len(wide) else content), offsets


def _without_wide_symbols(content: Bytes) -> Bytes:
    """UTF-8 with spaces for the bytes of characters beyond ASCII that are neither letters nor digits."""
    first = np.flatnonzero(content >= 0xC0)  # of each such character
    lead = content[first].astype(np.int64)
    lengths = 2 + (lead >= 0xE0) + (lead >= 0xF0)
    codes = lead & (0xFF >> (lengths + 1))
    for place in (1, 2, 3):
        following = content[np.minimum(first + place, len(content) - 1)] & 0x3F
        codes = np.where(place < lengths, codes << 6 | following, codes)
    distinct, kinds = np.unique(codes, return_inverse=True)
    is_symbol = np.array([not chr(code).isalnum() for code in distinct.tolist()], np.bool_)[kinds]
    content = content.copy()
    for place in range(4):
        content[first[is_symbol & (place < lengths)] + place] = _SPACE
    return content


def _find_words(content: Bytes, offsets: Ints) -> tuple[Ints, Ints]:
    """Where words begin and end in turn, [2 * num_words]; and the number of the first of each document."""
    in_word = np.concatenate([[False], content != _SPACE])
    bounds = np.flatnonzero(in_word[1:] != in_word[:-1])
    return bounds, np.searchsorted(bounds[::2], offsets)


def _replace(content: Bytes, offsets: Ints, numbers: Ints, others: list[bytes]) -> tuple[Bytes, Ints]:
    """The bytes of documents of which those with these numbers are replaced by `others`, and where each begins."""
    pieces = [content[start:end] for start, end in itertools.pairwise(offsets.tolist())]
    for number, other in zip(numbers.tolist(), others, strict=True):
        pieces[number] = np.frombuffer(other + b" ", np.uint8)
    return np.concatenate(pieces), np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])])


def _hash_words(content: Bytes, starts: Ints, ends: Ints) -> Hashes:
    """Hashes of the words from `starts` to `ends`, [num_words]: of eight bytes at a time."""
    padded = np.concatenate([content, np.zeros(8, np.uint8)])
    eights = np.ndarray(len(content) + 1, "<u8", padded, strides=(1,))  # the eight bytes from each place on
    lengths = ends - starts
    hashes = _mix(eights[starts] & _MASKS[np.minimum(lengths, 8)])
    longer = np.flatnonzero((lengths > 8) & (lengths <= _LONG_WORD))
    done = 8
    while len(longer):
        rest = np.minimum(lengths[longer] - done, 8)
        hashes[longer] = _mix(hashes[longer] * _FACTORS[0] + (eights[starts[longer] + done] & _MASKS[rest]))
        done += 8
        longer = longer[lengths[longer] > done]
    for number in np.flatnonzero(lengths > _LONG_WORD).tolist():
        digest = hashlib.blake2b(content[starts[number] : ends[number]].tobytes(), digest_size=8).digest()
        hashes[number] = int.from_bytes(digest, "little")
    return hashes


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
