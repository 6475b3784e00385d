"""Detection of duplicate documents: exact duplicates by hash, near duplicates between splits by MinHash."""

import struct
from collections.abc import Iterator, Sequence
from tempfile import TemporaryFile
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stages.download.arrays import Bools, Ints, concatenate_ranges, to_scalar
from stages.download.records import Digests
from stages.download.shingles import hash_shingles

# Near duplicates have a Jaccard similarity of at least 0.8 of their word 5-grams, estimated from 128 permutations. See
# Lee et al. 2022, "Deduplicating training data makes language models better", appendix A.
NUM_PERMUTATIONS = 128
# Minimum number of equal values in the signatures of near duplicates. 103 of 128 is the smallest number with an
# estimate of 0.8; 104 finds fewer pairs below 0.8: precision 0.970 instead of 0.959, recall 0.915 instead of 0.937, on
# planted pairs with a similarity of 0.5 to 1 (tests/download/test_duplicates.py).
_MIN_EQUAL = 104
_SEED = 1

# Two documents are compared if one of the 16 bands of their signatures, with 8 values each, is equal. This compares
# 95 % of the pairs with similarity 0.8, and 6 % of those with 0.5.
_NUM_BANDS = 16
_PREFIX_BITS = 22
_PAIRS_PER_STEP = 2**16  # approximate number of pairs per comparison
_DOCUMENTS_PER_READ = 2**14
_ROW = struct.Struct(f"={NUM_PERMUTATIONS}I")

Signatures = npt.NDArray[np.uint32]


class ExactDuplicates:
    """Set of the hashes of documents. It is stored in unnamed files on disk, so that memory does not grow with it."""

    def __init__(self) -> None:
        # Each run is [2, num_digests], sorted by its first row, and at least twice as long as the next one: there are
        # few runs to search, and each hash is merged into a longer run only a few times.
        self._runs: list[Digests] = []

    def add(self, digests: Digests) -> Bools:
        """Add hashes of documents, [num_documents, 2], uint64, and return which are new, [num_documents], bool."""
        order = np.lexsort(digests.T[::-1])  # stable: the first of equal hashes stays first
        first, second = digests[order].T  # [num_documents] each
        # Within the batch, a hash is new if it differs from the one before it in the sorted order.
        is_new = np.ones(len(digests), np.bool_)
        is_new[1:] = (first[1:] != first[:-1]) | (second[1:] != second[:-1])
        for run in self._runs:
            is_new &= ~_contains(run, first, second)
        self._insert(np.stack([first[is_new], second[is_new]]))
        is_new[order] = is_new.copy()  # back to the order of `digests`
        return is_new

    def _insert(self, run: Digests) -> None:
        while self._runs and self._runs[-1].shape[1] < 2 * run.shape[1]:
            both = np.concatenate([self._runs.pop(), run], axis=1)
            run = both[:, np.argsort(both[0], kind="stable")]  # numpy's stable sort merges sorted runs
        if run.size:
            with TemporaryFile() as file:
                file.write(run.tobytes())
                file.flush()
                self._runs.append(np.memmap(file, np.uint64, "r", shape=run.shape))


def _contains(run: Digests, first: Digests, second: Digests) -> Bools:
    """Return which hashes, given as first and second halves, [num_hashes] each, are in `run`, [num_hashes], bool."""
    # The range of equal first halves in `run`, which is usually empty or of length 1; then compare the second halves.
    starts, ends = (np.searchsorted(run[0], first, side=side) for side in ("left", "right"))
    found = np.zeros(len(first), np.bool_)
    for offset in range(int((ends - starts).max(initial=0))):
        found |= (starts + offset < ends) & (run[1].take(starts + offset, mode="clip") == second)
    return found


def sign_documents(answers: pa.ListArray) -> Signatures:
    """Compute MinHash signatures of the word 5-grams of documents.

    Args:
        answers: list of the texts of each document, [num_documents].

    Returns:
        [num_documents, NUM_PERMUTATIONS], uint32.
    """
    from rensa import RMinHash

    hashes, offsets = hash_shingles(pc.binary_join(answers, to_scalar(" ")))
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(hashes, offsets, NUM_PERMUTATIONS, _SEED)
    packed = b"".join([_ROW.pack(*row) for row in matrix.to_rows()])  # takes half the time of numpy.array
    return np.frombuffer(packed, np.uint32).reshape(-1, NUM_PERMUTATIONS)


class SignatureFile:
    """Sequence of the signatures of documents. It is stored on disk, so that memory does not grow with it."""

    def __init__(self, file: BinaryIO) -> None:
        """
        Args:
            file: an empty file, open for writing and reading.
        """
        self._file = file

    def write(self, signatures: Signatures) -> None:
        """Append `signatures`, [num_documents, NUM_PERMUTATIONS], uint32."""
        self._file.write(signatures.tobytes())

    def read(self) -> Iterator[Signatures]:
        """Yield all signatures in batches, [num_documents, NUM_PERMUTATIONS], uint32."""
        self._file.seek(0)
        while content := self._file.read(_ROW.size * _DOCUMENTS_PER_READ):
            yield np.frombuffer(content, np.uint32).reshape(-1, NUM_PERMUTATIONS)


class NearDuplicates:
    """Index to find near duplicates of held-out documents. Memory only grows with the held-out documents."""

    def __init__(self, held_out: Sequence[Signatures]) -> None:
        """
        Args:
            held_out: signatures of the held-out documents, in batches of [num_documents, NUM_PERMUTATIONS], uint32.
        """
        self._held_out = np.concatenate([np.zeros((0, NUM_PERMUTATIONS), np.uint32), *held_out])
        keys = _hash_bands(self._held_out).ravel()
        order = np.argsort(keys, kind="stable")
        # Band hashes in ascending order, and the index of the document of each, [num_held_out * NUM_BANDS].
        self._keys, self._owners = keys[order], order // _NUM_BANDS
        # True for the leading bits of all keys. Testing these first takes a fifth of the time, since few keys match.
        self._has_prefix = np.zeros(2**_PREFIX_BITS, np.bool_)
        self._has_prefix[_get_prefixes(keys)] = True

    def find(self, signatures: Signatures) -> tuple[Ints, Ints]:
        """Find pairs of near duplicates.

        Args:
            signatures: [num_documents, NUM_PERMUTATIONS], uint32.

        Returns:
            Indices of these documents and of the held-out ones, [num_pairs] each, int64.
        """
        empty = np.zeros(0, np.int64)
        found = [(empty, empty), *self._find_pairs(signatures)]
        return np.concatenate([pair[0] for pair in found]), np.concatenate([pair[1] for pair in found])

    def _find_pairs(self, signatures: Signatures) -> Iterator[tuple[Ints, Ints]]:
        """Yield pairs of near duplicates that share a band; a pair can be repeated."""
        keys = _hash_bands(signatures).ravel()
        hits = np.flatnonzero(self._has_prefix[_get_prefixes(keys)])
        starts = np.searchsorted(self._keys, keys[hits])
        counts = np.searchsorted(self._keys, keys[hits], side="right") - starts  # [num_hits]
        # Split the hits into groups with about _PAIRS_PER_STEP pairs, which bounds the memory.
        for hit_group in np.split(
            np.arange(len(hits)), np.flatnonzero(np.diff(np.cumsum(counts) // _PAIRS_PER_STEP)) + 1
        ):
            # Indices of the documents on both sides, [num_pairs]; then distinct pairs only, encoded as one integer.
            numbers = np.repeat(hits[hit_group] // _NUM_BANDS, counts[hit_group])
            owners = self._owners[concatenate_ranges(starts[hit_group], counts[hit_group])]
            pairs = np.unique(numbers * len(self._held_out) + owners)
            numbers, owners = np.divmod(pairs, max(1, len(self._held_out)))
            similar = (signatures[numbers] == self._held_out[owners]).sum(axis=1) >= _MIN_EQUAL
            yield numbers[similar], owners[similar]


def _get_prefixes(keys: npt.NDArray[np.uint64]) -> Ints:
    """Return the leading _PREFIX_BITS bits of `keys`, [num_keys]."""
    return (keys >> np.uint64(64 - _PREFIX_BITS)).astype(np.int64)


def _hash_bands(signatures: Signatures) -> npt.NDArray[np.uint64]:
    """Hash the bands of signatures, [num_documents, NUM_PERMUTATIONS], uint32: [num_documents, NUM_BANDS], uint64."""
    # Two values per uint64, [num_documents, NUM_PERMUTATIONS / 2]: multiply by odd random factors, and sum per band.
    pairs = signatures.view(np.uint64)
    factors = np.random.default_rng(_SEED).integers(0, 2**63, pairs.shape[1], dtype=np.uint64) * 2 + 1
    hashes: npt.NDArray[np.uint64] = (pairs * factors).reshape(-1, _NUM_BANDS, pairs.shape[1] // _NUM_BANDS).sum(axis=2)
    return hashes
