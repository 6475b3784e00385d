"""Exact and near duplicates: counted, dropped where told so, and accounted for in the ledger."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from configs import config

from stages.download.duplicates import ExactDuplicates, near_duplicates, shingles
from stages.download.stage import DownloadConfig, main

WORDS = [f"word{number}" for number in range(400)]
LONG = " ".join(WORDS[:200])


def test_exact_duplicates_second_copy_is_known() -> None:
    seen = ExactDuplicates()
    assert [seen.add(text) for text in ("a", "b", "a", "A")] == [False, False, True, False]


@pytest.mark.parametrize(
    ("text", "expected"), [("", {""}), ("One, two!", {"one two"}), ("a b c d e f", {"a b c d e", "b c d e f"})]
)
def test_shingles_are_word_5_grams_of_the_normalised_text(text: str, expected: set[str]) -> None:
    assert shingles(text) == expected


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        (LONG, True),
        (LONG.upper() + "!", True),  # trivial differences
        (" ".join([*WORDS[:199], "other"]), True),  # 195 of 197 distinct 5-grams shared
        (" ".join([*WORDS[:100], *WORDS[200:300]]), False),  # half of it is another text
        (" ".join(WORDS[200:]), False),
    ],
)
def test_near_duplicates_are_found_by_shared_5_grams(changed: str, found: bool) -> None:
    leaked, leaking = near_duplicates(["unrelated words stand here", LONG], ["nothing to see in this one", changed])
    assert (leaked, leaking) == (({1}, {1}) if found else (set(), set()))


def downloaded(tmp_path: Path, records: list[tuple[str, str]], *overrides: str) -> tuple[dict[str, Any], list[str]]:
    """The ledger and the train texts of a download of (split, text) records."""
    source = tmp_path / "source"
    source.mkdir()
    for split in ("train", "validation", "test"):
        lines = [
            json.dumps({"title": text[:20], "answers.text": [text]}) + "\n" for name, text in records if name == split
        ]
        (source / f"{split}.jsonl").write_text("".join(lines))
    places = [f"data.path={source}", f"out={tmp_path / 'raw'}", "data.split.by=source"]
    downloading: DownloadConfig = config("download", *places, *overrides, data="files")
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
    ledger, texts = downloaded(tmp_path, RECORDS, f"data.deduplicate={deduplicate}")
    assert len(texts) == train == ledger["records_out"]["train"]
    assert {key: ledger["records_skipped"][key] for key in skipped} == skipped
    assert ledger["exact_duplicates"] == 1
    assert ledger["held_out_with_near_duplicate_in_train"] == {"validation": 0, "test": 1, "looked_for": 3}
    assert ledger["records_in"] == sum(ledger["records_out"].values()) + sum(ledger["records_skipped"].values())
    assert ledger["answers_in"] == sum(ledger[f"answers_{part}"] for part in ("out", "dropped", "of_duplicates"))


def test_download_without_counting_near_duplicates_says_nothing_of_them(tmp_path: Path) -> None:
    ledger, _ = downloaded(tmp_path, RECORDS, "data.count_near_duplicates=false")
    assert ledger["held_out_with_near_duplicate_in_train"] is None
