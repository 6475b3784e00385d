"""Exact and near duplicates: detection, removal by data.deduplicate, and counts in the ledger."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from configs import make_config
from data_helpers import no_deadline
from hypothesis import given
from hypothesis import strategies as st

from stages.download.duplicates import ExactDuplicates, NearDuplicates, Signatures, sign_documents
from stages.download.records import digest_documents, normalize_text
from stages.download.shingles import hash_shingles
from stages.download.stage import DownloadConfig, main

WORDS = [f"word{number}" for number in range(400)]
LONG = " ".join(WORDS[:200])


def sign_texts(texts: list[str]) -> Signatures:
    return sign_documents(pa.array([[text] for text in texts], pa.list_(pa.string())))


def test_exact_duplicates_finds_the_second_copy() -> None:
    seen = ExactDuplicates()
    assert seen.add(digest_documents([b"a", b"b", b"a"])).tolist() == [True, True, False]
    assert seen.add(digest_documents([])).tolist() == []
    assert seen.add(digest_documents([b"A", b"b"])).tolist() == [True, False]


@no_deadline
@given(st.lists(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), max_size=40), max_size=30))
def test_exact_duplicates_agree_with_a_set(batches: list[list[tuple[int, int]]]) -> None:
    seen, known = ExactDuplicates(), set[tuple[int, int]]()
    for batch in batches:  # many hashes have the same first half
        expected = []
        for digest in batch:
            expected.append(digest not in known)
            known.add(digest)
        assert seen.add(np.array(batch, np.uint64).reshape(-1, 2)).tolist() == expected


def make_shingles(text: str) -> list[str]:
    """Return the word 5-grams of the normalized text in order; a shorter text is a single shingle."""
    words = normalize_text(text).split()
    return [" ".join(words[start : start + 5]) for start in range(max(1, len(words) - 4))]


def test_shingles_are_word_5_grams_of_the_normalized_text() -> None:
    assert [make_shingles(text) for text in ("", "One, two!")] == [[""], ["one two"]]
    assert make_shingles("A b c, d e -- f") == ["a b c d e", "b c d e f"]


_TEXT = st.text("aAbZ09 _.-<=\u0338\n\x1f\u00e9É\u0130ßﬁ…\u2019\u0301½京🙂\u2028", max_size=60) | st.sampled_from(
    ["x" * 7, "x" * 8, "x" * 9, "x" * 16, "x" * 17, "x" * 256 + " y", "x" * 257 + " y", "x" * 256 + "z y", "?! ++ é"]
)


@no_deadline
@given(st.lists(st.lists(_TEXT, min_size=1, max_size=9).map(" ".join), min_size=1, max_size=9))
def test_hash_shingles_are_equal_if_and_only_if_the_5_grams_are(texts: list[str]) -> None:
    hashes, offsets = hash_shingles(pa.array(texts, pa.string()))
    found = [hashes[start:end].tolist() for start, end in itertools.pairwise(offsets.tolist())]
    pairs = {
        pair for text, own in zip(texts, found, strict=True) for pair in zip(make_shingles(text), own, strict=True)
    }
    assert len(pairs) == len({text for text, _ in pairs}) == len({own for _, own in pairs})


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        (LONG, True),
        (LONG.upper() + "!", True),  # trivial differences
        (" ".join([*WORDS[:199], "other"]), True),  # 195 of 197 distinct 5-grams shared
        (" ".join([*WORDS[:100], *WORDS[200:300]]), False),  # half of the text differs
        (" ".join(WORDS[200:]), False),
    ],
)
def test_near_duplicates_are_found_by_shared_5_grams(changed: str, found: bool) -> None:
    index = NearDuplicates([sign_texts(["unrelated words are here"]), sign_texts([LONG])])
    leaking, leaked = index.find(sign_texts(["nothing to see in this one", changed]))
    assert (set(leaked.tolist()), set(leaking.tolist())) == (({1}, {1}) if found else (set(), set()))


def test_near_duplicates_without_held_out_documents_are_none() -> None:
    assert [len(side) for side in NearDuplicates([]).find(sign_texts([LONG]))] == [0, 0]


def make_near_copies(number: int) -> tuple[list[str], list[str], npt.NDArray[np.float64]]:
    """Make texts, near copies of them, and the Jaccard similarity of each pair, between 0.5 and 1.

    Returns:
        `number` texts, `number` copies, and similarities, [number], float64.
    """
    chance = random.Random(0)
    texts, copies, similarities = list[str](), list[str](), list[float]()
    for _ in range(number):
        words = [f"w{chance.randrange(5000)}" for _ in range(chance.choice([60, 150, 400]))]
        asked = chance.uniform(0.5, 1.0)  # replacing a word changes five 5-grams
        replaced = chance.sample(range(len(words)), round(len(words) * (1 - asked) / (1 + asked) / 5))
        copy = [f"x{chance.randrange(10**6)}" if place in replaced else word for place, word in enumerate(words)]
        texts.append(" ".join(words))
        copies.append(" ".join(copy))
        one, other = set(make_shingles(texts[-1])), set(make_shingles(copies[-1]))
        similarities.append(len(one & other) / len(one | other))
    return texts, copies, np.array(similarities)


def test_near_duplicates_of_planted_copies_are_found_with_few_others() -> None:
    texts, copies, similarities = make_near_copies(2000)
    numbers, held_out = NearDuplicates([sign_texts(texts)]).find(sign_texts(copies))
    assert (numbers == held_out).all()  # only planted pairs
    found, near = np.zeros(len(texts), np.bool_), similarities >= 0.8
    found[numbers] = True
    # At least as good as datasketch, which was used before, on the same pairs: recall 0.775, precision 0.966.
    assert (found & near).sum() / near.sum() > 0.9
    assert (found & near).sum() / found.sum() >= 0.966
    assert found[similarities >= 0.9].all()
    assert not found[similarities < 0.7].any()


def run_download(tmp_path: Path, records: list[tuple[str, str]], *overrides: str) -> tuple[dict[str, Any], list[str]]:
    """Run download on (split, text) records; return the ledger and the texts of train."""
    source = tmp_path / "source"
    source.mkdir()
    for split in ("train", "validation", "test"):
        lines = [
            json.dumps({"title": text[:20], "answers.text": [text]}) + "\n" for name, text in records if name == split
        ]
        (source / f"{split}.jsonl").write_text("".join(lines))
    places = [f"data.path={source}", f"out={tmp_path / 'raw'}", "data.split.by=source"]
    downloading: DownloadConfig = make_config("download", *places, *overrides, data="files")
    main(downloading)
    ledger = json.loads((tmp_path / "raw/stats.json").read_text())
    train = pq.read_table(tmp_path / "raw/train.parquet").column("answers").to_pylist()
    return ledger, [answers["text"][0] for answers in train]


RECORDS = [
    ("train", "first text of all"),
    ("train", LONG + " with an end"),
    ("train", "first text of all"),
    ("train", "another text altogether"),
    ("validation", "held out for validation"),
    ("test", LONG),
    ("test", "held out for the test"),
]


@pytest.mark.parametrize(
    ("deduplicate", "train", "skipped"),
    [
        ("none", 4, {"exact_duplicate": 0, "near_duplicate": 0}),
        ("exact", 3, {"exact_duplicate": 1, "near_duplicate": 0}),
        ("near", 2, {"exact_duplicate": 1, "near_duplicate": 1}),
    ],
)
def test_download_deduplicate_drops_and_counts(
    tmp_path: Path, deduplicate: str, train: int, skipped: dict[str, int]
) -> None:
    ledger, texts = run_download(tmp_path, RECORDS, f"data.deduplicate={deduplicate}")
    assert len(texts) == train == ledger["records_out"]["train"]
    assert {key: ledger["records_skipped"][key] for key in skipped} == skipped
    assert ledger["exact_duplicates"] == 1
    assert ledger["held_out_with_near_duplicate_in_train"] == {"validation": 0, "test": 1, "looked_for": 3}
    assert ledger["records_in"] == sum(ledger["records_out"].values()) + sum(ledger["records_skipped"].values())
    assert ledger["answers_in"] == sum(ledger[f"answers_{part}"] for part in ("out", "dropped", "of_duplicates"))


def test_download_without_counting_near_duplicates_has_no_count(tmp_path: Path) -> None:
    ledger, _ = run_download(tmp_path, RECORDS, "data.count_near_duplicates=false")
    assert ledger["held_out_with_near_duplicate_in_train"] is None


@pytest.mark.parametrize("pairs", [1, 7, 2**16])
def test_near_duplicates_of_many_copies_gives_all_pairs(monkeypatch: pytest.MonkeyPatch, pairs: int) -> None:
    monkeypatch.setattr("stages.download.duplicates._PAIRS_PER_STEP", pairs)
    held_out = ["some other text", *[f"{LONG} {number}" for number in range(6)], "one more"]
    numbers, owners = NearDuplicates([sign_texts(held_out)]).find(sign_texts(["a text of its own", LONG, f"x {LONG}"]))
    assert set(zip(numbers.tolist(), owners.tolist(), strict=True)) == {(n, o) for n in (1, 2) for o in range(1, 7)}
