"""download of several sources: splits, names and groups are kept, and duplicates are found across sources."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from data_helpers import make_source_data, make_split, read_contents, read_stats, write_jsonl

from stages.core.artifacts import SPLITS
from stages.core.errors import StageError
from stages.download.records import record_schema
from stages.download.schema import SourceData
from stages.download.stage import DownloadConfig, main

WORDS = " ".join(f"word{number}" for number in range(60))


def make_records(first: int, number: int = 60, **columns: Any) -> list[dict[str, Any]]:
    return [
        {"title": f"Question {i}?", "answers.text": [f"Answer {i}."], "q_id": f"q{i}", **columns}
        for i in range(first, first + number)
    ]


def run_source_stage(root: Path, name: str, lines: list[dict[str, Any]], **changes: Any) -> None:
    """Run the stage source@NAME."""
    file = write_jsonl(root / f"{name}.jsonl", lines)
    data = make_source_data(file, **({"split": make_split(train=0.4, validation=0.3, test=0.3)} | changes))
    main(DownloadConfig(data=data, source=name, out=str(root / "sources" / name)))


def make_mix(root: Path, *names: str, **changes: Any) -> SourceData:
    values = {"source": "sources", "sources": list(names), "split": make_split(by="source")}
    found: SourceData = make_source_data(root / "sources", **(values | changes))
    return found


def run_download(data: SourceData, out: Path) -> Any:
    main(DownloadConfig(data=data, source="mix", out=str(out)))
    return read_stats(out)


def read_split(directory: Path, name: str) -> list[Any]:
    found: list[Any] = pq.read_table(directory / f"{name}.parquet").to_pylist()
    return found


@pytest.fixture
def two_sources(tmp_path: Path) -> Path:
    """Directory with source `a` with the groups `lang` and `year`, and source `b` with the group `lang`."""
    run_source_stage(tmp_path, "a", make_records(0, lang="en", year=2001), groups=["lang", "year"])
    run_source_stage(tmp_path, "b", make_records(60, lang="de"), groups=["lang"])
    return tmp_path


def test_download_of_several_sources_concatenates_each_split_in_order(two_sources: Path) -> None:
    ledger = run_download(make_mix(two_sources, "b", "a"), two_sources / "raw")
    for name in SPLITS:
        expected = [row for source in ("b", "a") for row in read_split(two_sources / "sources" / source, name)]
        assert read_split(two_sources / "raw", name) == [
            {key: row[key] for key in row if key != "groups"} for row in expected
        ]
    assert ledger["records_in"] == sum(ledger["records_out"].values()) == 120
    assert ledger["source"] == {"sources": ["b", "a"]}
    assert pq.read_schema(two_sources / "raw/train.parquet").equals(record_schema([]))


def test_download_of_several_sources_keeps_groups_with_nulls_for_missing_ones(two_sources: Path) -> None:
    run_download(make_mix(two_sources, "a", "b", groups=["year", "lang", "source"]), two_sources / "raw")
    assert pq.read_schema(two_sources / "raw/test.parquet").equals(record_schema(["year", "lang"]))
    found = {
        (row["source"], row["groups"]["year"], row["groups"]["lang"])
        for row in read_split(two_sources / "raw", "train")
    }
    assert found == {("a", "2001", "en"), ("b", None, "de")}


def test_download_of_several_sources_with_an_absent_group_lists_the_existing_groups(two_sources: Path) -> None:
    with pytest.raises(StageError, match=r"no source has the group 'flair'; there are: lang, year .*set groups in"):
        run_download(make_mix(two_sources, "a", "b", groups=["lang", "flair"]), two_sources / "raw")


@pytest.mark.parametrize(("deduplicate", "kept"), [("none", 121), ("exact", 120)])
def test_download_of_several_sources_finds_exact_duplicates_across_them(
    two_sources: Path, deduplicate: str, kept: int
) -> None:
    run_source_stage(two_sources, "c", make_records(0, 1) + make_records(120, 59))
    ledger = run_download(make_mix(two_sources, "b", "c", deduplicate="none"), two_sources / "raw")
    assert ledger["exact_duplicates"] == 0
    ledger = run_download(make_mix(two_sources, "a", "c", deduplicate=deduplicate), two_sources / "raw")
    assert (ledger["exact_duplicates"], sum(ledger["records_out"].values())) == (1, kept - 1)


def test_download_of_several_sources_finds_near_duplicates_across_them(tmp_path: Path) -> None:
    by_source = {"split": make_split(by="source")}
    for name, held_out, train in (("a", f"{WORDS} end", "a one"), ("b", "b two", WORDS)):
        for part, text in (("train", train), ("validation", f"{name} v"), ("test", held_out)):
            write_jsonl(tmp_path / name / f"{part}.jsonl", [{"title": "t", "answers.text": text}])
        data = make_source_data(tmp_path / name, **by_source)
        main(DownloadConfig(data=data, source=name, out=str(tmp_path / "sources" / name)))
    ledger = run_download(make_mix(tmp_path, "a", "b", deduplicate="near"), tmp_path / "raw")
    assert ledger["held_out_with_near_duplicate_in_train"] == {"validation": 0, "test": 1, "looked_for": 4}
    assert [row["answers"]["text"] for row in read_split(tmp_path / "raw", "train")] == [["a one"]]
    assert ledger["records_out"] == {"train": 1, "validation": 2, "test": 2}


def test_download_of_several_sources_with_filter_and_max_records_takes_the_first_that_pass(two_sources: Path) -> None:
    ledger = run_download(
        make_mix(two_sources, "a", "b", filter={"source": ["b"]}, split=make_split(by="source")), two_sources / "raw"
    )
    assert (ledger["records_skipped"]["filtered"], sum(ledger["records_out"].values())) == (60, 60)
    ledger = run_download(make_mix(two_sources, "a", "b", max_records=100), two_sources / "raw")
    assert ledger["records_in"] == 100
    assert len(read_split(two_sources / "raw", "train")) > len(read_split(two_sources / "sources/a", "train"))


def test_download_of_a_missing_source_names_it_and_params_yaml(two_sources: Path) -> None:
    with pytest.raises(StageError, match=rf"no source c in {two_sources}/sources: add it to sources in params\.yaml"):
        run_download(make_mix(two_sources, "a", "c"), two_sources / "raw")


def test_download_of_a_source_that_is_only_evaluated_is_refused(two_sources: Path) -> None:
    run_source_stage(two_sources, "c", make_records(0), split=None)
    with pytest.raises(StageError, match="the source c is only evaluated, since the split in its conf"):
        run_download(make_mix(two_sources, "a", "c"), two_sources / "raw")


@pytest.mark.parametrize("name", ["../a", "a/b", "", ".a", "a\n"])
def test_sources_with_a_name_that_is_a_path_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="sources"):
        make_mix(tmp_path, name)


def test_sources_with_another_split_are_refused(tmp_path: Path) -> None:
    for by in (make_split(), None):
        with pytest.raises(ValueError, match=r"data\.source=sources uses the splits of its sources"):
            make_mix(tmp_path, "a", split=by)


def test_download_of_several_sources_again_writes_the_same_bytes(two_sources: Path) -> None:
    for out in ("one", "other"):
        run_download(make_mix(two_sources, "a", "b", groups=["lang"]), two_sources / out)
    assert read_contents(two_sources / "one") == read_contents(two_sources / "other")
