"""Duplicate documents: exact ones by their hash, near ones across the split by MinHash."""

import sqlite3
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stages.download.arrays import Bools, Ints
from stages.download.shingles import hash_shingles

# Near duplicates share at least this part of their word 5-grams (Jaccard similarity), estimated from 128 permutations:
# the setting of Lee et al. 2022, "Deduplicating training data makes language models better", appendix A.
SIMILARITY, NUM_PERMUTATIONS = 0.8, 128
_SEED = 1

# Documents are compared if one of the 16 bands of their signatures, 8 numbers each, is the same: 95 % of those that are
# similar by 0.8, and 6 % of those by 0.5.
_NUM_BANDS = 16
_PAIRS = 2**16  # compared at once

Signatures = npt.NDArray[np.uint32]


class ExactDuplicates:
    """Tells whether a document was seen before. On disk, in a file without a name: memory does not grow with them."""

    def __init__(self) -> None:
        self._seen = sqlite3.connect("", isolation_level=None)
        self._seen.execute("PRAGMA journal_mode = OFF")
        self._seen.execute("CREATE TABLE seen (digest BLOB PRIMARY KEY) WITHOUT ROWID")
        self._seen.execute("BEGIN")

    def add(self, digests: Iterable[bytes]) -> Bools:
        """Enter hashes of documents; true of those that were not there, [len(digests)]."""
        insert = self._seen.cursor().execute
        return np.array(
            [insert("INSERT OR IGNORE INTO seen VALUES (?)", (digest,)).rowcount > 0 for digest in digests], np.bool_
        )


def sign_documents(answers: pa.ListArray) -> Signatures:
    """MinHash signatures of the word 5-grams of documents, [num_documents, NUM_PERMUTATIONS].

    Args:
        answers: the texts of each document.
    """
    from rensa import RMinHash

    hashes, offsets = hash_shingles(pc.binary_join(answers, " "))
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(hashes, offsets, NUM_PERMUTATIONS, _SEED)
    return np.array(matrix.to_rows(), np.uint32).reshape(-1, NUM_PERMUTATIONS)


class NearDuplicates:
    """Finds documents that are nearly the same as one of those held out. Memory grows with these alone."""

    def __init__(self, held_out: Sequence[Signatures]) -> None:
        """
        Args:
            held_out: signatures of the documents held out, in batches.
        """
        self._held_out = np.concatenate([np.zeros((0, NUM_PERMUTATIONS), np.uint32), *held_out])
        keys = _hash_bands(self._held_out).ravel()
        order = np.argsort(keys, kind="stable")
        self._keys, self._owners = keys[order], order // _NUM_BANDS

    def find(self, signatures: Signatures) -> tuple[Ints, Ints]:
        """Pairs of near duplicates: numbers of documents of these, and of those held out, [num_pairs] each."""
        found = [(numbers[same], owners[same]) for numbers, owners, same in self._compare(signatures)]
        empty = np.zeros(0, np.int64)
        pairs = [np.concatenate([empty, *(pair[side] for pair in found)]) for side in (0, 1)]
        return pairs[0], pairs[1]

    def _compare(self, signatures: Signatures) -> Iterator[tuple[Ints, Ints, Bools]]:
        """Pairs that have a band in common, and whether they are near duplicates; some pairs more than once."""
        keys = _hash_bands(signatures).ravel()
        starts = np.searchsorted(self._keys, keys)
        ends = np.searchsorted(self._keys, keys, side="right")
        hits = np.flatnonzero(ends > starts)
        for hit in hits.tolist():
            for start in range(starts[hit], ends[hit], _PAIRS):
                owners = self._owners[start : min(start + _PAIRS, ends[hit])]
                same = (self._held_out[owners] == signatures[hit // _NUM_BANDS]).mean(axis=1) >= SIMILARITY
                yield np.full(len(owners), hit // _NUM_BANDS), owners, same


def _hash_bands(signatures: Signatures) -> npt.NDArray[np.uint64]:
    """A hash of each band of signatures, [num_documents, NUM_BANDS]."""
    factors = np.random.default_rng(_SEED).integers(0, 2**63, NUM_PERMUTATIONS, dtype=np.uint64) * 2 + 1
    products = (signatures.astype(np.uint64) + 1) * factors
    hashes: npt.NDArray[np.uint64] = products.reshape(len(signatures), _NUM_BANDS, NUM_PERMUTATIONS // _NUM_BANDS).sum(
        axis=2
    )
    return hashes
