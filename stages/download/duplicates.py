"""Duplicate documents: exact ones by their hash, near ones across the split by MinHash."""

import hashlib
import sqlite3
from collections.abc import Iterable, Iterator
from typing import Any

from stages.download.records import normalise

# Near duplicates share at least this part of their word 5-grams (Jaccard similarity), estimated from 128 permutations:
# the setting of Lee et al. 2022, "Deduplicating training data makes language models better", appendix A.
SIMILARITY, WORDS, NUM_PERMUTATIONS = 0.8, 5, 128


class ExactDuplicates:
    """Tells whether a text was seen before. On disk, in a file without a name: memory does not grow with the texts."""

    def __init__(self) -> None:
        self._seen = sqlite3.connect("", isolation_level=None)
        self._seen.execute("PRAGMA journal_mode = OFF")
        self._seen.execute("CREATE TABLE seen (digest BLOB PRIMARY KEY) WITHOUT ROWID")
        self._seen.execute("BEGIN")

    def add(self, text: str) -> bool:
        """Enter `text`; true if it was there already."""
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        return self._seen.execute("INSERT OR IGNORE INTO seen VALUES (?)", (digest,)).rowcount == 0


def near_duplicates(held_out: Iterable[str], train: Iterable[str]) -> tuple[set[int], set[int]]:
    """Indices of the held-out texts that have a near duplicate in `train`, and of these train texts.

    Memory grows with `held_out` alone; `train` streams.
    """
    from datasketch import MinHashLSH  # 1.5 s of imports that only this look-up pays

    index = MinHashLSH(threshold=SIMILARITY, num_perm=NUM_PERMUTATIONS)
    signatures = dict(enumerate(_signatures(held_out)))
    for number, signature in signatures.items():
        index.insert(number, signature)
    leaked, leaking = set(), set()
    for number, signature in enumerate(_signatures(train)):
        # The index proposes candidates; their signatures decide.
        matches = [found for found in index.query(signature) if signatures[found].jaccard(signature) >= SIMILARITY]
        leaked.update(matches)
        if matches:
            leaking.add(number)
    return leaked, leaking


def _signatures(texts: Iterable[str]) -> Iterator[Any]:
    from datasketch import MinHash

    for text in texts:
        signature = MinHash(num_perm=NUM_PERMUTATIONS, seed=1)
        signature.update_batch([shingle.encode() for shingle in shingles(text)])
        yield signature


def shingles(text: str) -> set[str]:
    """The word 5-grams of the normalised text; a shorter text is one."""
    words = normalise(text).split()
    return {" ".join(words[start : start + WORDS]) for start in range(max(1, len(words) - WORDS + 1))}
