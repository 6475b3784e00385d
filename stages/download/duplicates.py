"""Duplicate documents: exact ones by their hash, near ones across the split by MinHash."""

import struct
from collections.abc import Iterator, Sequence
from tempfile import TemporaryFile
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stages.download.arrays import Bools, Ints, ranges, to_scalar
from stages.download.records import Digests
from stages.download.shingles import hash_shingles

# Near duplicates share at least 0.8 of their word 5-grams (Jaccard similarity), estimated from 128 permutations: the
# setting of Lee et al. 2022, "Deduplicating training data makes language models better", appendix A.
NUM_PERMUTATIONS = 128
# Numbers of two signatures that are equal in near duplicates. The fewest that estimate 0.8 are 103; with one more,
# fewer pairs below it are found: precision 0.970 instead of 0.959, recall 0.915 instead of 0.937, on planted pairs of
# similarity 0.5 to 1 (tests/download/test_duplicates.py).
_LEAST_EQUAL = 104
_SEED = 1

# Documents are compared if one of the 16 bands of their signatures, 8 numbers each, is the same: 95 % of those that are
# similar by 0.8, and 6 % of those by 0.5.
_NUM_BANDS = 16
_PREFIX_BITS = 22
_PAIRS = 2**16  # compared at once, about
_DOCUMENTS = 2**14  # whose signatures are read at once
_ROW = struct.Struct(f"={NUM_PERMUTATIONS}I")

Signatures = npt.NDArray[np.uint32]


class ExactDuplicates:
    """Tells whether a document was seen before. On disk, in files without a name: memory does not grow with them."""

    def __init__(self) -> None:
        # Each in the order of its first row, [2, num_digests], and at least twice as long as the next: few to look at,
        # and each hash is merged into a longer one few times.
        self._runs: list[Digests] = []

    def add(self, digests: Digests) -> Bools:
        """Enter hashes of documents, [num_documents, 2]; true of those that were not there, [num_documents]."""
        order = np.lexsort(digests.T[::-1])  # equal ones stay in order
        first, second = digests[order].T
        is_new = np.ones(len(digests), np.bool_)
        is_new[1:] = (first[1:] != first[:-1]) | (second[1:] != second[:-1])
        for run in self._runs:
            is_new &= ~_holds(run, first, second)
        self._enter(np.stack([first[is_new], second[is_new]]))
        is_new[order] = is_new.copy()
        return is_new

    def _enter(self, run: Digests) -> None:
        while self._runs and self._runs[-1].shape[1] < 2 * run.shape[1]:
            both = np.concatenate([self._runs.pop(), run], axis=1)
            run = both[:, np.argsort(both[0], kind="stable")]  # which merges
        if run.size:
            with TemporaryFile() as file:
                file.write(run.tobytes())
                file.flush()
                self._runs.append(np.memmap(file, np.uint64, "r", shape=run.shape))


def _holds(run: Digests, first: Digests, second: Digests) -> Bools:
    """Whether each hash, of these first and second halves, is among those of `run`, [num_hashes]."""
    starts, ends = (np.searchsorted(run[0], first, side=side) for side in ("left", "right"))
    found = np.zeros(len(first), np.bool_)
    for place in range(int((ends - starts).max(initial=0))):
        found |= (starts + place < ends) & (run[1].take(starts + place, mode="clip") == second)
    return found


def sign_documents(answers: pa.ListArray) -> Signatures:
    """MinHash signatures of the word 5-grams of documents, [num_documents, NUM_PERMUTATIONS].

    Args:
        answers: the texts of each document.
    """
    from rensa import RMinHash

    hashes, offsets = hash_shingles(pc.binary_join(answers, to_scalar(" ")))
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(hashes, offsets, NUM_PERMUTATIONS, _SEED)
    packed = b"".join([_ROW.pack(*row) for row in matrix.to_rows()])  # half the time of numpy.array
    return np.frombuffer(packed, np.uint32).reshape(-1, NUM_PERMUTATIONS)


class SignatureFile:
    """Signatures of documents, in order. On disk, since memory is not to grow with their number."""

    def __init__(self, file: BinaryIO) -> None:
        """
        Args:
            file: an empty one, open for writing and reading.
        """
        self._file = file

    def write(self, signatures: Signatures) -> None:
        """Add `signatures`, [num_documents, NUM_PERMUTATIONS]."""
        self._file.write(signatures.tobytes())

    def read(self) -> Iterator[Signatures]:
        """All of them, in batches, [num_documents, NUM_PERMUTATIONS] each."""
        self._file.seek(0)
        while content := self._file.read(_ROW.size * _DOCUMENTS):
            yield np.frombuffer(content, np.uint32).reshape(-1, NUM_PERMUTATIONS)


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
        # Which first bits a key has: what few keys share is found in a fifth of the time by looking here first.
        self._has_prefix = np.zeros(2**_PREFIX_BITS, np.bool_)
        self._has_prefix[_prefixes(keys)] = True

    def find(self, signatures: Signatures) -> tuple[Ints, Ints]:
        """Pairs of near duplicates: numbers of documents of these, and of those held out, [num_pairs] each."""
        empty = np.zeros(0, np.int64)
        found = [(empty, empty), *self._compare(signatures)]
        return np.concatenate([pair[0] for pair in found]), np.concatenate([pair[1] for pair in found])

    def _compare(self, signatures: Signatures) -> Iterator[tuple[Ints, Ints]]:
        """Pairs that have a band in common and are near duplicates; some may come more than once."""
        keys = _hash_bands(signatures).ravel()
        hits = np.flatnonzero(self._has_prefix[_prefixes(keys)])
        starts = np.searchsorted(self._keys, keys[hits])
        counts = np.searchsorted(self._keys, keys[hits], side="right") - starts  # [num_hits]
        for some in np.split(np.arange(len(hits)), np.flatnonzero(np.diff(np.cumsum(counts) // _PAIRS)) + 1):
            numbers = np.repeat(hits[some] // _NUM_BANDS, counts[some])
            owners = self._owners[ranges(starts[some], counts[some])]
            pairs = np.unique(numbers * len(self._held_out) + owners)
            numbers, owners = np.divmod(pairs, max(1, len(self._held_out)))
            similar = (signatures[numbers] == self._held_out[owners]).sum(axis=1) >= _LEAST_EQUAL
            yield numbers[similar], owners[similar]


def _prefixes(keys: npt.NDArray[np.uint64]) -> Ints:
    return (keys >> np.uint64(64 - _PREFIX_BITS)).astype(np.int64)


def _hash_bands(signatures: Signatures) -> npt.NDArray[np.uint64]:
    """A hash of each band of signatures, [num_documents, NUM_BANDS]."""
    pairs = signatures.view(np.uint64)  # of numbers
    factors = np.random.default_rng(_SEED).integers(0, 2**63, pairs.shape[1], dtype=np.uint64) * 2 + 1
    hashes: npt.NDArray[np.uint64] = (pairs * factors).reshape(-1, _NUM_BANDS, pairs.shape[1] // _NUM_BANDS).sum(axis=2)
    return hashes
