"""download: splits and ledger of various sources, identical bytes on a second run, and no partial outputs."""

import functools
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import make_questions, make_source_data, make_split, read_contents, read_stats, write_jsonl

from stages.core.artifacts import SPLITS
from stages.core.compose import compose_config, load_config
from stages.core.errors import StageError
from stages.download import hub_data, sources, writer
from stages.download import stage as download
from stages.download.records import Row, record_schema
from stages.download.schema import SAMPLE, Columns, HubData, SourceData, Split
from stages.download.stage import DownloadConfig, main
from stages.shell import tasks

MALFORMED = {"title": "no text"}
EVEN = make_split(train=0.4, validation=0.3, test=0.3)


def make_even_split(key: Any) -> Split:
    """Make a split by the columns `key` with shares that give every split some of a few records."""
    return make_split(train=0.4, validation=0.3, test=0.3, key=key)


def run_download(data: SourceData, out: Path) -> Any:
    """Run download on `data`, and return its ledger."""
    main(DownloadConfig(data=data, source="files", out=str(out)))
    return read_stats(out)


def read_records(out: Path) -> dict[str, list[Any]]:
    return {name: pq.read_table(out / f"{name}.parquet").to_pylist() for name in SPLITS}


def read_titles(out: Path) -> dict[str, list[str]]:
    return {name: [record["title"] for record in records] for name, records in read_records(out).items()}


def test_download_of_the_embedded_sample_keeps_every_record_in_eli5_schema(tmp_path: Path) -> None:
    choices = ["data=sample", f"data.path={SAMPLE}", "data.count_near_duplicates=false", f"out={tmp_path / 'raw'}"]
    config = load_config(DownloadConfig, compose_config("download", choices))
    main(config)
    ledger = read_stats(tmp_path / "raw")
    assert ledger["records_in"] == sum(ledger["records_out"].values()) == 250
    assert set(read_contents(tmp_path / "raw")) == {*(f"{name}.parquet" for name in SPLITS), "stats.json"}
    assert all(pq.read_schema(tmp_path / f"raw/{name}.parquet").equals(record_schema([])) for name in SPLITS)


def test_download_with_bad_records_skipped_accounts_for_every_record_and_answer(tmp_path: Path) -> None:
    lines = [
        *make_questions(40),
        MALFORMED,
        ["not", "an", "object"],
        {"title": "gone", "answers.text": ["[deleted]", ""]},
        {"title": "none", "answers.text": []},
        {"title": "half", "answers.text": ["[removed]", "kept", "also"]},
    ]
    file = write_jsonl(tmp_path / "a.jsonl", lines)
    with file.open("ab") as stream:
        stream.write(b"{not json\n")
    ledger = run_download(make_source_data(file, on_bad_record="skip", split=EVEN), tmp_path / "raw")
    kept = read_records(tmp_path / "raw")
    assert ledger["records_in"] == 46
    skipped = {reason: count for reason, count in ledger["records_skipped"].items() if count}
    assert skipped == {"malformed": 3, "without_answers": 2}
    assert ledger["records_out"] == {name: len(records) for name, records in kept.items()}
    assert sum(ledger["records_out"].values()) == 41
    assert (ledger["answers_in"], ledger["answers_dropped"], ledger["answers_out"]) == (45, 3, 42)
    assert sum(len(record["answers"]["text"]) for records in kept.values() for record in records) == 42


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (MALFORMED, r"no column 'answers\.text'.*title"),
        ({"title": 3, "answers.text": "x"}, "'title' contains int"),
        ({"title": "t", "answers.text": "\ud800"}, r"'answers\.text'.*surrogate"),
        ("text", "not an object"),
    ],
)
def test_download_of_a_malformed_record_names_file_line_and_remedy(tmp_path: Path, bad: Any, message: str) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [*make_questions(40), bad, *make_questions(2, 40)])
    with pytest.raises(StageError, match=rf"^{file}:41: .*{message}.*on_bad_record: skip"):
        run_download(make_source_data(file), tmp_path / "raw")


def test_download_of_parquet_with_another_schema_lists_the_existing_columns(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([{"question": "q", "reply": "r"}]), file)
    with pytest.raises(StageError, match=rf"^{file}:1: no column 'title'.*question, reply"):
        run_download(make_source_data(file), tmp_path / "raw")


def test_download_with_configured_columns_uses_them_as_title_and_text(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"question": f"q {i}", "reply": f"r {i}"} for i in range(40)])
    data = make_source_data(file, columns=Columns(title="question", texts=["reply"]), split=EVEN)
    run_download(data, tmp_path / "raw")
    found = {r["title"]: r["answers"]["text"] for records in read_records(tmp_path / "raw").values() for r in records}
    assert found == {f"q {i}": [f"r {i}"] for i in range(40)}


def test_download_of_nul_and_odd_characters_keeps_them(tmp_path: Path) -> None:
    text = "a\x00b \u2028 \ufeff \u200b 🙂 \r\n e\u0301"
    file = write_jsonl(tmp_path / "a.jsonl", [*make_questions(40), {"title": "odd", "answers.text": text}])
    run_download(make_source_data(file, split=EVEN), tmp_path / "raw")
    found = [r for records in read_records(tmp_path / "raw").values() for r in records if r["title"] == "odd"]
    assert [record["answers"]["text"] for record in found] == [[text]]


@pytest.mark.parametrize(("max_records", "expected"), [(30, 30), (39, 39), (40, 40), (41, 40), (None, 40)])
def test_download_with_max_records_takes_the_first(tmp_path: Path, max_records: int | None, expected: int) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", make_questions(40))
    ledger = run_download(make_source_data(file, max_records=max_records, split=EVEN), tmp_path / "raw")
    titles = [title for names in read_titles(tmp_path / "raw").values() for title in names]
    assert ledger["records_in"] == expected
    assert set(titles) == {record["title"] for record in make_questions(expected)}


def test_download_with_max_records_ignores_malformed_records_after_them(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [*make_questions(40), MALFORMED])
    assert run_download(make_source_data(file, max_records=40, split=EVEN), tmp_path / "raw")["records_in"] == 40


def test_download_of_more_records_moves_none_to_another_split(tmp_path: Path) -> None:
    for number in (40, 80):
        file = write_jsonl(tmp_path / f"{number}.jsonl", make_questions(number))
        run_download(make_source_data(file, split=EVEN), tmp_path / str(number))
    few, many = read_titles(tmp_path / "40"), read_titles(tmp_path / "80")
    assert all(set(few[name]) <= set(many[name]) for name in SPLITS)


@pytest.mark.parametrize(
    "names", [("train.jsonl", "valid.jsonl", "test.jsonl"), ("train/0.jsonl", "dev/0.jsonl", "test/0.jsonl")]
)
def test_download_with_the_sources_own_splits_keeps_them(tmp_path: Path, names: tuple[str, str, str]) -> None:
    for first, name in enumerate(names):
        write_jsonl(tmp_path / "in" / name, make_questions(first + 1, 10 * first))
    ledger = run_download(make_source_data(tmp_path / "in", split=make_split(by="source")), tmp_path / "raw")
    assert ledger["records_out"] == {"train": 1, "validation": 2, "test": 3}
    assert read_titles(tmp_path / "raw")["validation"] == ["Question 10?", "Question 11?"]


def test_download_with_own_splits_of_a_file_without_a_split_names_the_file(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", make_questions(3))
    with pytest.raises(StageError, match=rf"^{file}:1: split\.by: source .*train, validation and test"):
        run_download(make_source_data(file, split=make_split(by="source")), tmp_path / "raw")


@pytest.mark.parametrize("missing", SPLITS)
def test_download_that_leaves_a_split_empty_names_it(tmp_path: Path, missing: str) -> None:
    for name in set(SPLITS) - {missing}:
        write_jsonl(tmp_path / f"in/{name}.jsonl", make_questions(2))
    with pytest.raises(StageError, match=f"no record for {missing} .*{missing} 0"):
        run_download(make_source_data(tmp_path / "in", split=make_split(by="source")), tmp_path / "raw")


@pytest.mark.parametrize(
    ("titles", "values"), [(["One"], "1 value"), (["One!", "ONE", " one?"], "1 value"), (["One", "Two"], "2 values")]
)
def test_download_of_few_titles_names_the_column_that_decides_the_split(
    tmp_path: Path, titles: list[str], values: str
) -> None:
    records = [{"head": titles[i % len(titles)], "answers.text": f"Answer {i}."} for i in range(1000)]
    file = write_jsonl(tmp_path / "a.jsonl", records)
    decides = rf"column 'head' decides the split and has only {values} in 1,000 records .*set split\.key"
    with pytest.raises(StageError, match=rf"no record for .* 0\): {decides}"):
        run_download(make_source_data(file, title="head"), tmp_path / "raw")
    ledger = run_download(make_source_data(file, title="head", split=make_split(key=None)), tmp_path / "raw")
    assert min(ledger["records_out"].values()) > 0  # the remedy of the message works


def test_download_of_identical_texts_reports_a_single_split_key(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"answers.text": "The same."}] * 100)
    with pytest.raises(StageError, match=r"the text decides .* only 1 value in 100 records .*other texts"):
        run_download(make_source_data(file, title=None), tmp_path / "raw")


@pytest.mark.parametrize("number", [2, 20, 60])
def test_download_of_few_records_with_distinct_titles_asks_for_more(tmp_path: Path, number: int) -> None:
    shares = make_split(train=0.999998, validation=0.000001, test=0.000001)
    with pytest.raises(StageError, match="add records, or raise its share"):
        run_download(
            make_source_data(write_jsonl(tmp_path / "a.jsonl", make_questions(number)), split=shares), tmp_path / "raw"
        )


def test_download_of_bad_parquet_values_counts_only_the_affected_records(tmp_path: Path) -> None:
    texts = pa.array([f"Answer {i}.".encode() if i % 10 else b"\xff" for i in range(100)])
    texts = pa.Array.from_buffers(pa.string(), 100, texts.buffers())
    dates = pa.array([2**31 - 1] * 100, pa.int32()).cast(pa.date32())
    table = pa.table({"title": [f"Question {i}?" for i in range(100)], "answers.text": texts, "date": dates})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(
        StageError, match=rf"^{tmp_path}/a\.parquet:1: column 'answers\.text' contains a value that cannot"
    ):
        run_download(make_source_data(tmp_path / "a.parquet"), tmp_path / "raw")
    ledger = run_download(make_source_data(tmp_path / "a.parquet", on_bad_record="skip", split=EVEN), tmp_path / "raw")
    assert (ledger["records_in"], ledger["records_skipped"]["malformed"]) == (100, 10)


def test_download_of_one_long_text_file_suggests_paragraphs(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One.\n\nTwo.\n")
    with pytest.raises(StageError, match="text_record: paragraph"):
        run_download(make_source_data(tmp_path / "a.txt", title=None), tmp_path / "raw")


def test_download_of_paragraphs_splits_them_by_their_text(tmp_path: Path) -> None:
    paragraphs = [f"Paragraph {i}.\n  Its second line." for i in range(40)]
    (tmp_path / "a.txt").write_text("\n\n".join([*paragraphs, paragraphs[0].upper()]))
    run_download(
        make_source_data(tmp_path / "a.txt", title=None, text_record="paragraph", split=EVEN), tmp_path / "raw"
    )
    sides = {
        name: {text for record in records for text in record["answers"]["text"]}
        for name, records in read_records(tmp_path / "raw").items()
    }
    assert set.union(*sides.values()) == {*paragraphs, paragraphs[0].upper()}
    assert [paragraphs[0] in side for side in sides.values()] == [
        paragraphs[0].upper() in side for side in sides.values()
    ]


def make_tagged_records(number: int) -> list[dict[str, Any]]:
    """Make records, every second one from r/askscience and every third one about Physics."""
    return [
        {**record, "subreddit": ("askscience", "other")[i % 2], "category": None if i % 3 else "Physics"}
        for i, record in enumerate(make_questions(number))
    ]


@pytest.mark.parametrize(
    ("allowed", "kept"),
    [
        (None, 120),
        ({}, 120),
        ({"subreddit": ["askscience"]}, 60),
        ({"subreddit": ["other", "askscience"]}, 120),
        ({"subreddit": ["askscience"], "category": ["Physics"]}, 20),
    ],
)
def test_download_with_a_filter_keeps_the_records_that_match_all_and_counts_the_others(
    tmp_path: Path, allowed: Any, kept: int
) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", make_tagged_records(120))
    ledger = run_download(make_source_data(file, filter=allowed, split=EVEN), tmp_path / "raw")
    assert (sum(ledger["records_out"].values()), ledger["records_skipped"]["filtered"]) == (kept, 120 - kept)


def test_download_with_a_filter_takes_the_first_records_that_pass_it(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", make_tagged_records(120))
    data = make_source_data(file, filter={"subreddit": ["other"]}, max_records=40, split=EVEN)
    ledger = run_download(data, tmp_path / "raw")
    titles = {title for split_titles in read_titles(tmp_path / "raw").values() for title in split_titles}
    assert titles == {f"Question {i}?" for i in range(1, 80, 2)}
    assert (ledger["records_in"], ledger["records_skipped"]["filtered"]) == (80, 40)


def test_download_with_a_filter_on_an_absent_column_lists_the_existing_columns(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", make_tagged_records(9))
    with pytest.raises(
        StageError, match=r"no column 'flair'; there are: title, answers\.text, subreddit, category; .*add_data.*filter"
    ):
        run_download(make_source_data(file, filter={"flair": ["x"]}), tmp_path / "raw")


def test_download_with_a_filter_that_nothing_passes_shows_the_value_of_the_first_record(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", make_tagged_records(9))
    with pytest.raises(
        StageError, match=r"no record that passes the filter .*subreddit is 'askscience', not one of Askscience"
    ):
        run_download(make_source_data(file, filter={"subreddit": ["Askscience"]}), tmp_path / "raw")


@pytest.mark.parametrize("raw", [b"", b"\n \n"])
def test_download_of_no_records_names_the_source(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(raw)
    with pytest.raises(StageError, match=f"{tmp_path / 'a.jsonl'} contains no records"):
        run_download(make_source_data(tmp_path / "a.jsonl"), tmp_path / "raw")


@pytest.mark.parametrize("row_group", [7, 8, 1024])
def test_download_again_writes_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row_group: int) -> None:
    monkeypatch.setattr(writer, "ROW_GROUP", row_group)
    data = make_source_data(write_jsonl(tmp_path / "a.jsonl", make_questions(40)), split=EVEN)
    run_download(data, tmp_path / "one")
    run_download(data, tmp_path / "two")
    assert read_contents(tmp_path / "one") == read_contents(tmp_path / "two")
    assert sum(len(titles) for titles in read_titles(tmp_path / "one").values()) == 40


def test_download_ledger_does_not_depend_on_the_directory_of_the_source(tmp_path: Path) -> None:
    for place in ("here", "there"):
        file = write_jsonl(tmp_path / place / "a.jsonl", make_questions(40))
        run_download(make_source_data(file, split=EVEN), tmp_path / f"raw-{place}")
    assert read_contents(tmp_path / "raw-here") == read_contents(tmp_path / "raw-there")


@pytest.mark.parametrize("failure", ["malformed", "truncated", "empty split", "absent"])
def test_download_that_fails_keeps_the_previous_outputs(tmp_path: Path, failure: str) -> None:
    out = tmp_path / "out/raw"
    run_download(make_source_data(write_jsonl(tmp_path / "good.jsonl", make_questions(40)), split=EVEN), out)
    before = read_contents(tmp_path / "out")
    file = tmp_path / "bad.jsonl.gz"
    lines = (
        [*make_questions(3000), MALFORMED]
        if failure == "malformed"
        else make_questions(1 if "split" in failure else 3000)
    )
    raw = gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode())
    if failure != "absent":
        file.write_bytes(raw[:-10] if failure == "truncated" else raw)
    with pytest.raises(StageError):
        run_download(make_source_data(file), out)
    assert read_contents(tmp_path / "out") == before


def test_download_that_fails_on_its_first_run_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(StageError):
        run_download(
            make_source_data(write_jsonl(tmp_path / "a.jsonl", [*make_questions(30), MALFORMED])), tmp_path / "out/raw"
        )
    assert list((tmp_path / "out").iterdir()) == []


def test_download_again_replaces_the_previous_outputs(tmp_path: Path) -> None:
    for number in (40, 50):
        file = write_jsonl(tmp_path / "a.jsonl", make_questions(number))
        assert run_download(make_source_data(file, split=EVEN), tmp_path / "raw")["records_in"] == number


def test_download_of_the_hub_records_its_revision_in_the_ledger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [Row(f"o/n[train]:{i}", "train", value) for i, value in enumerate(make_questions(40))]
    monkeypatch.setattr(hub_data, "read_hub", lambda hub, commit, whole: iter(rows) if commit == "0f" else iter([]))
    monkeypatch.setattr(hub_data, "resolve_commit", lambda hub: {"abc": "0f"}[hub.revision])
    hub = HubData(id="o/n", config=None, revision="abc", splits=["train"])
    ledger = run_download(make_source_data("-", source="hub", hub=hub, split=EVEN), tmp_path / "raw")
    assert ledger["source"] == {"hub": "o/n", "revision": "abc", "commit": "0f"}


# -- source, groups and split keys of records --------------------------------------------------------------------------


def test_download_writes_the_name_of_the_source_to_every_record(tmp_path: Path) -> None:
    run_download(make_source_data(write_jsonl(tmp_path / "a.jsonl", make_questions(40)), split=EVEN), tmp_path / "raw")
    assert {r["source"] for records in read_records(tmp_path / "raw").values() for r in records} == {"files"}
    assert all("groups" not in record for record in read_records(tmp_path / "raw")["train"])


def test_download_with_groups_keeps_the_columns_in_their_order(tmp_path: Path) -> None:
    records = [
        {**record, "meta": {"lang": ("en", None)[i % 2]}, "year": 2000 + i}
        for i, record in enumerate(make_questions(40))
    ]
    data = make_source_data(
        write_jsonl(tmp_path / "a.jsonl", records), groups=["year", "source", "meta.lang"], split=EVEN
    )
    run_download(data, tmp_path / "raw")
    schema = pq.read_schema(tmp_path / "raw/train.parquet")
    assert schema.equals(record_schema(["year", "meta.lang"]))
    assert schema.names[-2:] == ["source", "groups"]
    found = {r["title"]: r["groups"] for records in read_records(tmp_path / "raw").values() for r in records}
    assert found == {f"Question {i}?": {"year": str(2000 + i), "meta.lang": ("en", None)[i % 2]} for i in range(40)}


@pytest.mark.parametrize(
    "changes",
    [{"groups": ["flair"]}, {"split": make_split(key="flair")}, {"split": make_split(key=["title", "flair"])}],
)
def test_download_with_an_absent_group_or_key_lists_the_existing_columns(tmp_path: Path, changes: Any) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", make_tagged_records(9))
    with pytest.raises(StageError, match=rf"^{file}:1: no column 'flair'; there are: title, answers\.text, subreddit"):
        run_download(make_source_data(file, **changes), tmp_path / "raw")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("key", ["customer", ["customer"], ["customer", "subreddit"], "meta.id"])
def test_download_with_a_key_keeps_its_records_together(tmp_path: Path, kind: str, key: Any) -> None:
    records = [
        {**record, "customer": i % 30, "subreddit": f"s{i % 30}", "meta": {"id": f"no. {i % 30}"}}
        for i, record in enumerate(make_questions(300))
    ]
    file = write_jsonl(tmp_path / "a.jsonl", records)
    if kind == "parquet":
        file = tmp_path / "a.parquet"
        pq.write_table(pa.Table.from_pylist(records), file)
    run_download(make_source_data(file, split=make_even_split(key)), tmp_path / "raw")
    sides = {
        name: {int(title[9:-1]) % 30 for title in titles} for name, titles in read_titles(tmp_path / "raw").items()
    }
    assert sum(map(len, sides.values())) == 30 == len(set.union(*sides.values()))


def test_download_with_an_empty_key_splits_by_the_text(tmp_path: Path) -> None:
    records = [{"title": f"t{i}", "answers.text": f"Text {i // 2}", "customer": None} for i in range(200)]
    run_download(
        make_source_data(write_jsonl(tmp_path / "a.jsonl", records), split=make_even_split("customer")),
        tmp_path / "raw",
    )
    sides = {name: {int(title[1:]) // 2 for title in titles} for name, titles in read_titles(tmp_path / "raw").items()}
    assert sum(map(len, sides.values())) == 100


def test_download_with_a_key_of_few_values_warns_about_shares(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    # 970 records of one customer, which go to the same split, and 30 customers with one record each.
    records = [{**record, "customer": max(0, i - 969)} for i, record in enumerate(make_questions(1000))]
    file = write_jsonl(tmp_path / "a.jsonl", records)
    run_download(make_source_data(file, split=make_split(key="customer")), tmp_path / "raw")
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    few = "column 'customer' decides the split and has only 31 values in 1,000 records"
    assert len(warned) >= 2
    assert all(few in line and "% of the records where 10.0 % were asked" in line for line in warned)


def test_download_of_records_with_distinct_titles_warns_of_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_download(make_source_data(write_jsonl(tmp_path / "a.jsonl", make_questions(40)), split=EVEN), tmp_path / "raw")
    assert [record for record in caplog.records if record.levelname == "WARNING"] == []


def test_download_without_a_split_writes_all_records_to_one_file(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [*make_questions(2), {"title": "none", "answers.text": ""}])
    ledger = run_download(make_source_data(file, split=None, count_near_duplicates=True), tmp_path / "raw")
    assert set(read_contents(tmp_path / "raw")) == {"all.parquet", "stats.json"}
    assert pq.read_table(tmp_path / "raw/all.parquet").column("title").to_pylist() == ["Question 0?", "Question 1?"]
    assert ledger["records_out"] == {"all": 2}
    assert ledger["held_out_with_near_duplicate_in_train"] is None


def test_download_without_a_split_refuses_to_compare_splits(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"deduplicate=near compares splits, .* set deduplicate: exact"):
        make_source_data(tmp_path, split=None, deduplicate="near")


# -- several processes -------------------------------------------------------------------------------------------------


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of few records, which workers read from the third part on, once they are ready."""

    def wait_until_ready(workers: tasks.Workers) -> bool:
        return workers._first is not None and workers._first.result() is None

    monkeypatch.setattr(sources, "PART_BYTES", 2000)
    monkeypatch.setattr(sources, "_PART_ROWS", 20)
    monkeypatch.setattr(tasks, "_NUM_LOCAL_JOBS", 2)
    monkeypatch.setattr(tasks.Workers, "_has_ready_process", wait_until_ready)


def write_mixed_records(directory: Path, kind: str, number: int = 300) -> Path:
    """Write a file of records with exact and near duplicates, missing answers and malformed records."""
    text = " ".join(f"word{i}" for i in range(80))
    records = [
        {"title": f"Question {i}?", "answers.text": [f"Answer {i % 150}.", "" if i % 7 else f"{text} {i}"]}
        for i in range(number)
    ]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(records), directory / "a.parquet")
        return directory / "a.parquet"
    lines = [json.dumps(record) for record in records]
    lines[100:101] = ["", '{"title": 1}', '{"title": "Gone", "answers.text": "[deleted]"}']
    raw = ("\n".join(lines) + "\n").encode()
    if kind == "csv":
        rows = [f'"Question {i}?","Answer {i % 150}."\n' for i in range(number)]
        (directory / "a.csv").write_text("".join(["title,answers.text\n", *rows]))
        return directory / "a.csv"
    file = directory / f"a.{kind}"
    file.write_bytes(gzip.compress(raw) if kind.endswith("gz") else raw)
    return file


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("jsonl", {"deduplicate": "near"}),
        ("jsonl.gz", {"max_records": 230, "deduplicate": "exact"}),
        ("parquet", {}),
        ("csv", {"max_records": 230}),
    ],
)
def test_download_by_several_processes_writes_the_bytes_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_parts: None, kind: str, changes: dict[str, Any]
) -> None:
    file = write_mixed_records(tmp_path, kind)
    data = make_source_data(file, on_bad_record="skip", count_near_duplicates=True, split=EVEN, **changes)
    for number in (1, 2):
        monkeypatch.setattr(download, "Workers", functools.partial(tasks.Workers, number))
        run_download(data, tmp_path / f"by-{number}")
    monkeypatch.setattr(sources, "PART_BYTES", 2**20)
    run_download(data, tmp_path / "whole")
    assert read_contents(tmp_path / "by-2") == read_contents(tmp_path / "by-1") == read_contents(tmp_path / "whole")
    assert read_stats(tmp_path / "by-1")["exact_duplicates"] > 0


@pytest.mark.parametrize("number", [1, 2])
def test_download_by_several_processes_names_the_first_malformed_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_parts: None, number: int
) -> None:
    monkeypatch.setattr(download, "Workers", functools.partial(tasks.Workers, number))
    file = write_mixed_records(tmp_path, "jsonl")
    with file.open("ab") as stream:
        stream.write(b"{\n")
    with pytest.raises(StageError, match=rf"^{file}:102: column 'title' contains int, not text "):
        run_download(make_source_data(file, split=EVEN), tmp_path / "raw")
    assert run_download(make_source_data(file, max_records=99, split=EVEN), tmp_path / "raw")["records_in"] == 99


@pytest.mark.parametrize("number", [1, 2])
def test_download_of_a_truncated_file_reads_the_max_records_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_parts: None, number: int
) -> None:
    monkeypatch.setattr(download, "Workers", functools.partial(tasks.Workers, number))
    file = tmp_path / "a.jsonl.gz"
    raw = "".join(json.dumps(record) + "\n" for record in make_questions(20_000)).encode()
    file.write_bytes(gzip.compress(raw)[:-20])
    assert run_download(make_source_data(file, max_records=9000, split=EVEN), tmp_path / "raw")["records_in"] == 9000
    with pytest.raises(StageError, match="damaged or cut short"):
        run_download(make_source_data(file, split=EVEN), tmp_path / "raw")
