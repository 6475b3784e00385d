"""download of several sources: their splits, names and groups are kept, and duplicates are found across them."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from data_helpers import contents, read_stats, source_data, split, write_jsonl

from stages.core.artifacts import SPLITS
from stages.core.errors import StageError
from stages.download.records import record_schema
from stages.download.schema import SourceData
from stages.download.stage import DownloadConfig, main

WORDS = " ".join(f"word{number}" for number in range(60))


def records(first: int, number: int = 60, **columns: Any) -> list[dict[str, Any]]:
    return [
        {"title": f"Question {i}?", "answers.text": [f"Answer {i}."], "q_id": f"q{i}", **columns}
        for i in range(first, first + number)
    ]


def read_source(root: Path, name: str, lines: list[dict[str, Any]], **changes: Any) -> None:
    """Run the stage source@NAME."""
    file = write_jsonl(root / f"{name}.jsonl", lines)
    data = source_data(file, **({"split": split(train=0.4, validation=0.3, test=0.3)} | changes))
    main(DownloadConfig(data=data, source=name, out=str(root / "sources" / name)))


def mix(root: Path, *names: str, **changes: Any) -> SourceData:
    values = {"source": "sources", "sources": list(names), "split": split(by="source")}
    found: SourceData = source_data(root / "sources", **(values | changes))
    return found


def run(data: SourceData, out: Path) -> Any:
    main(DownloadConfig(data=data, source="mix", out=str(out)))
    return read_stats(out)


def rows(directory: Path, name: str) -> list[Any]:
    found: list[Any] = pq.read_table(directory / f"{name}.parquet").to_pylist()
    return found


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """Sources `a`, which keeps `lang` and `year`, and `b`, which keeps `lang`."""
    read_source(tmp_path, "a", records(0, lang="en", year=2001), groups=["lang", "year"])
    read_source(tmp_path, "b", records(60, lang="de"), groups=["lang"])
    return tmp_path


def test_download_of_several_sources_puts_each_split_together_in_their_order(two: Path) -> None:
    ledger = run(mix(two, "b", "a"), two / "raw")
    for name in SPLITS:
        expected = [row for source in ("b", "a") for row in rows(two / "sources" / source, name)]
        assert rows(two / "raw", name) == [{key: row[key] for key in row if key != "groups"} for row in expected]
    assert ledger["records_in"] == sum(ledger["records_out"].values()) == 120
    assert ledger["source"] == {"sources": ["b", "a"]}
    assert pq.read_schema(two / "raw/train.parquet").equals(record_schema([]))


def test_download_of_several_sources_keeps_groups_and_leaves_those_null_that_a_source_lacks(two: Path) -> None:
    run(mix(two, "a", "b", groups=["year", "lang", "source"]), two / "raw")
    assert pq.read_schema(two / "raw/test.parquet").equals(record_schema(["year", "lang"]))
    found = {(row["source"], row["groups"]["year"], row["groups"]["lang"]) for row in rows(two / "raw", "train")}
    assert found == {("a", "2001", "en"), ("b", None, "de")}


def test_download_of_several_sources_with_a_group_that_none_keeps_names_those_there_are(two: Path) -> None:
    with pytest.raises(StageError, match=r"no source has kept 'flair'; there are: lang, year .*its own groups"):
        run(mix(two, "a", "b", groups=["lang", "flair"]), two / "raw")


@pytest.mark.parametrize(("deduplicate", "kept"), [("none", 121), ("exact", 120)])
def test_download_of_several_sources_finds_exact_duplicates_across_them(two: Path, deduplicate: str, kept: int) -> None:
    read_source(two, "c", records(0, 1) + records(120, 59))
    ledger = run(mix(two, "b", "c", deduplicate="none"), two / "raw")
    assert ledger["exact_duplicates"] == 0
    ledger = run(mix(two, "a", "c", deduplicate=deduplicate), two / "raw")
    assert (ledger["exact_duplicates"], sum(ledger["records_out"].values())) == (1, kept - 1)


def test_download_of_several_sources_finds_near_duplicates_across_them(tmp_path: Path) -> None:
    by_source = {"split": split(by="source")}
    for name, held_out, train in (("a", f"{WORDS} end", "a one"), ("b", "b two", WORDS)):
        for part, text in (("train", train), ("validation", f"{name} v"), ("test", held_out)):
            write_jsonl(tmp_path / name / f"{part}.jsonl", [{"title": "t", "answers.text": text}])
        data = source_data(tmp_path / name, **by_source)
        main(DownloadConfig(data=data, source=name, out=str(tmp_path / "sources" / name)))
    ledger = run(mix(tmp_path, "a", "b", deduplicate="near"), tmp_path / "raw")
    assert ledger["held_out_with_near_duplicate_in_train"] == {"validation": 0, "test": 1, "looked_for": 4}
    assert [row["answers"]["text"] for row in rows(tmp_path / "raw", "train")] == [["a one"]]
    assert ledger["records_out"] == {"train": 1, "validation": 2, "test": 2}


def test_download_of_several_sources_with_filter_and_max_records_takes_the_first_that_pass(two: Path) -> None:
    ledger = run(mix(two, "a", "b", filter={"source": ["b"]}, split=split(by="source")), two / "raw")
    assert (ledger["records_skipped"]["filtered"], sum(ledger["records_out"].values())) == (60, 60)
    ledger = run(mix(two, "a", "b", max_records=100), two / "raw")
    assert ledger["records_in"] == 100
    assert len(rows(two / "raw", "train")) > len(rows(two / "sources/a", "train"))


def test_download_of_a_source_that_is_not_there_names_it_and_params_yaml(two: Path) -> None:
    with pytest.raises(StageError, match=rf"no source c in {two}/sources: name it under sources in params\.yaml"):
        run(mix(two, "a", "c"), two / "raw")


def test_download_of_a_source_that_is_only_evaluated_refuses_it(two: Path) -> None:
    read_source(two, "c", records(0), split=None)
    with pytest.raises(StageError, match="the source c is only evaluated, since the split of its conf"):
        run(mix(two, "a", "c"), two / "raw")


@pytest.mark.parametrize("name", ["../a", "a/b", "", ".a", "a\n"])
def test_sources_with_a_name_that_is_a_path_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="sources"):
        mix(tmp_path, name)


def test_sources_with_a_split_of_their_own_are_refused(tmp_path: Path) -> None:
    for by in (split(), None):
        with pytest.raises(ValueError, match=r"data\.source=sources keeps the splits of its sources"):
            mix(tmp_path, "a", split=by)


def test_download_of_several_sources_again_writes_the_same_bytes(two: Path) -> None:
    for out in ("one", "other"):
        run(mix(two, "a", "b", groups=["lang"]), two / out)
    assert contents(two / "one") == contents(two / "other")
