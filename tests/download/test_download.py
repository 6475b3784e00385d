"""download: records in, three splits and a ledger out; the same bytes again; nothing half-written."""

import functools
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import contents, questions, read_stats, source_data, split, write_jsonl

from stages.core.artifacts import SPLITS
from stages.core.compose import compose, load
from stages.core.errors import StageError
from stages.download import hub_data, sources, writer
from stages.download import stage as download
from stages.download.records import Row, record_schema
from stages.download.schema import SAMPLE, Columns, HubData, SourceData, Split
from stages.download.stage import DownloadConfig, main
from stages.shell import tasks

MALFORMED = {"title": "no text"}
EVEN = split(train=0.4, validation=0.3, test=0.3)


def even_by(key: Any) -> Split:
    """A split by the columns `key` that gives every split its part of a few records."""
    return split(train=0.4, validation=0.3, test=0.3, key=key)


def run(data: SourceData, out: Path) -> Any:
    """The ledger of download on `data`."""
    main(DownloadConfig(data=data, source="files", out=str(out)))
    return read_stats(out)


def records_of(out: Path) -> dict[str, list[Any]]:
    return {name: pq.read_table(out / f"{name}.parquet").to_pylist() for name in SPLITS}


def titles_of(out: Path) -> dict[str, list[str]]:
    return {name: [record["title"] for record in records] for name, records in records_of(out).items()}


def test_download_of_the_embedded_sample_keeps_every_record_in_eli5_schema(tmp_path: Path) -> None:
    choices = ["data=sample", f"data.path={SAMPLE}", "data.count_near_duplicates=false", f"out={tmp_path / 'raw'}"]
    config = load(DownloadConfig, compose("download", choices))
    main(config)
    ledger = read_stats(tmp_path / "raw")
    assert ledger["records_in"] == sum(ledger["records_out"].values()) == 250
    assert set(contents(tmp_path / "raw")) == {*(f"{name}.parquet" for name in SPLITS), "stats.json"}
    assert all(pq.read_schema(tmp_path / f"raw/{name}.parquet").equals(record_schema([])) for name in SPLITS)


def test_download_with_bad_records_skipped_accounts_for_every_record_and_answer(tmp_path: Path) -> None:
    lines = [
        *questions(40),
        MALFORMED,
        ["not", "an", "object"],
        {"title": "gone", "answers.text": ["[deleted]", ""]},
        {"title": "none", "answers.text": []},
        {"title": "half", "answers.text": ["[removed]", "kept", "also"]},
    ]
    file = write_jsonl(tmp_path / "a.jsonl", lines)
    with file.open("ab") as stream:
        stream.write(b"{not json\n")
    ledger = run(source_data(file, on_bad_record="skip", split=EVEN), tmp_path / "raw")
    kept = records_of(tmp_path / "raw")
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
        ({"title": 3, "answers.text": "x"}, "'title' holds int"),
        ({"title": "t", "answers.text": "\ud800"}, r"'answers\.text'.*surrogate"),
        ("text", "not an object"),
    ],
)
def test_download_of_a_malformed_record_names_file_line_and_remedy(tmp_path: Path, bad: Any, message: str) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [*questions(40), bad, *questions(2, 40)])
    with pytest.raises(StageError, match=rf"^{file}:41: .*{message}.*on_bad_record: skip"):
        run(source_data(file), tmp_path / "raw")


def test_download_of_parquet_with_another_schema_names_the_columns_that_there_are(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([{"question": "q", "reply": "r"}]), file)
    with pytest.raises(StageError, match=rf"^{file}:1: no column 'title'.*question, reply"):
        run(source_data(file), tmp_path / "raw")


def test_download_of_own_columns_takes_them_as_title_and_text(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"question": f"q {i}", "reply": f"r {i}"} for i in range(40)])
    data = source_data(file, columns=Columns(title="question", texts=["reply"]), split=EVEN)
    run(data, tmp_path / "raw")
    found = {r["title"]: r["answers"]["text"] for records in records_of(tmp_path / "raw").values() for r in records}
    assert found == {f"q {i}": [f"r {i}"] for i in range(40)}


def test_download_of_nul_and_odd_characters_keeps_them(tmp_path: Path) -> None:
    text = "a\x00b \u2028 \ufeff \u200b 🙂 \r\n e\u0301"
    file = write_jsonl(tmp_path / "a.jsonl", [*questions(40), {"title": "odd", "answers.text": text}])
    run(source_data(file, split=EVEN), tmp_path / "raw")
    found = [r for records in records_of(tmp_path / "raw").values() for r in records if r["title"] == "odd"]
    assert [record["answers"]["text"] for record in found] == [[text]]


@pytest.mark.parametrize(("max_records", "expected"), [(30, 30), (39, 39), (40, 40), (41, 40), (None, 40)])
def test_download_with_max_records_takes_the_first(tmp_path: Path, max_records: int | None, expected: int) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", questions(40))
    ledger = run(source_data(file, max_records=max_records, split=EVEN), tmp_path / "raw")
    titles = [title for names in titles_of(tmp_path / "raw").values() for title in names]
    assert ledger["records_in"] == expected
    assert set(titles) == {record["title"] for record in questions(expected)}


def test_download_with_max_records_does_not_judge_those_behind(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [*questions(40), MALFORMED])
    assert run(source_data(file, max_records=40, split=EVEN), tmp_path / "raw")["records_in"] == 40


def test_download_of_more_records_leaves_the_first_where_they_were(tmp_path: Path) -> None:
    for number in (40, 80):
        file = write_jsonl(tmp_path / f"{number}.jsonl", questions(number))
        run(source_data(file, split=EVEN), tmp_path / str(number))
    few, many = titles_of(tmp_path / "40"), titles_of(tmp_path / "80")
    assert all(set(few[name]) <= set(many[name]) for name in SPLITS)


@pytest.mark.parametrize(
    "names", [("train.jsonl", "valid.jsonl", "test.jsonl"), ("train/0.jsonl", "dev/0.jsonl", "test/0.jsonl")]
)
def test_download_with_the_sources_own_splits_keeps_them(tmp_path: Path, names: tuple[str, str, str]) -> None:
    for first, name in enumerate(names):
        write_jsonl(tmp_path / "in" / name, questions(first + 1, 10 * first))
    ledger = run(source_data(tmp_path / "in", split=split(by="source")), tmp_path / "raw")
    assert ledger["records_out"] == {"train": 1, "validation": 2, "test": 3}
    assert titles_of(tmp_path / "raw")["validation"] == ["Question 10?", "Question 11?"]


def test_download_with_own_splits_of_a_file_without_names_it(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", questions(3))
    with pytest.raises(StageError, match=rf"^{file}:1: split\.by: source .*train, validation and test"):
        run(source_data(file, split=split(by="source")), tmp_path / "raw")


@pytest.mark.parametrize("missing", SPLITS)
def test_download_that_leaves_a_split_empty_names_it(tmp_path: Path, missing: str) -> None:
    for name in set(SPLITS) - {missing}:
        write_jsonl(tmp_path / f"in/{name}.jsonl", questions(2))
    with pytest.raises(StageError, match=f"no record for {missing} .*{missing} 0"):
        run(source_data(tmp_path / "in", split=split(by="source")), tmp_path / "raw")


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
        run(source_data(file, title="head"), tmp_path / "raw")
    ledger = run(source_data(file, title="head", split=split(key=None)), tmp_path / "raw")
    assert min(ledger["records_out"].values()) > 0  # as the message says


def test_download_of_one_text_again_and_again_says_so(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"answers.text": "The same."}] * 100)
    with pytest.raises(StageError, match=r"the text decides .* only 1 value in 100 records .*other texts"):
        run(source_data(file, title=None), tmp_path / "raw")


@pytest.mark.parametrize("number", [2, 20, 60])
def test_download_of_few_records_with_a_title_each_asks_for_more(tmp_path: Path, number: int) -> None:
    shares = split(train=0.999998, validation=0.000001, test=0.000001)
    with pytest.raises(StageError, match="give more records, or raise its share"):
        run(source_data(write_jsonl(tmp_path / "a.jsonl", questions(number)), split=shares), tmp_path / "raw")


def test_download_of_bad_parquet_values_counts_those_alone(tmp_path: Path) -> None:
    texts = pa.array([f"Answer {i}.".encode() if i % 10 else b"\xff" for i in range(100)])
    texts = pa.Array.from_buffers(pa.string(), 100, texts.buffers())
    dates = pa.array([2**31 - 1] * 100, pa.int32()).cast(pa.date32())
    table = pa.table({"title": [f"Question {i}?" for i in range(100)], "answers.text": texts, "date": dates})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(
        StageError, match=rf"^{tmp_path}/a\.parquet:1: column 'answers\.text' holds a value that cannot"
    ):
        run(source_data(tmp_path / "a.parquet"), tmp_path / "raw")
    ledger = run(source_data(tmp_path / "a.parquet", on_bad_record="skip", split=EVEN), tmp_path / "raw")
    assert (ledger["records_in"], ledger["records_skipped"]["malformed"]) == (100, 10)


def test_download_of_one_long_text_file_says_how_to_cut_it(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One.\n\nTwo.\n")
    with pytest.raises(StageError, match="text_record: paragraph"):
        run(source_data(tmp_path / "a.txt", title=None), tmp_path / "raw")


def test_download_of_paragraphs_splits_them_by_their_text(tmp_path: Path) -> None:
    paragraphs = [f"Paragraph {i}.\n  Its second line." for i in range(40)]
    (tmp_path / "a.txt").write_text("\n\n".join([*paragraphs, paragraphs[0].upper()]))
    run(source_data(tmp_path / "a.txt", title=None, text_record="paragraph", split=EVEN), tmp_path / "raw")
    sides = {
        name: {text for record in records for text in record["answers"]["text"]}
        for name, records in records_of(tmp_path / "raw").items()
    }
    assert set.union(*sides.values()) == {*paragraphs, paragraphs[0].upper()}
    assert [paragraphs[0] in side for side in sides.values()] == [
        paragraphs[0].upper() in side for side in sides.values()
    ]


def tagged(number: int) -> list[dict[str, Any]]:
    """Records of which every second is of r/askscience, and every third of Physics."""
    return [
        {**record, "subreddit": ("askscience", "other")[i % 2], "category": None if i % 3 else "Physics"}
        for i, record in enumerate(questions(number))
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
    file = write_jsonl(tmp_path / "a.jsonl", tagged(120))
    ledger = run(source_data(file, filter=allowed, split=EVEN), tmp_path / "raw")
    assert (sum(ledger["records_out"].values()), ledger["records_skipped"]["filtered"]) == (kept, 120 - kept)


def test_download_with_a_filter_takes_the_first_records_that_pass_it(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", tagged(120))
    data = source_data(file, filter={"subreddit": ["other"]}, max_records=40, split=EVEN)
    ledger = run(data, tmp_path / "raw")
    titles = {title for split_titles in titles_of(tmp_path / "raw").values() for title in split_titles}
    assert titles == {f"Question {i}?" for i in range(1, 80, 2)}
    assert (ledger["records_in"], ledger["records_skipped"]["filtered"]) == (80, 40)


def test_download_with_a_filter_on_an_absent_column_names_those_there_are(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", tagged(9))
    with pytest.raises(
        StageError, match=r"no column 'flair'; there are: title, answers\.text, subreddit, category; .*add_data.*filter"
    ):
        run(source_data(file, filter={"flair": ["x"]}), tmp_path / "raw")


def test_download_with_a_filter_that_nothing_passes_says_what_the_first_record_holds(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", tagged(9))
    with pytest.raises(
        StageError, match=r"no record that passes filter .*subreddit is 'askscience', none of Askscience"
    ):
        run(source_data(file, filter={"subreddit": ["Askscience"]}), tmp_path / "raw")


@pytest.mark.parametrize("raw", [b"", b"\n \n"])
def test_download_of_no_records_names_the_source(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(raw)
    with pytest.raises(StageError, match=f"{tmp_path / 'a.jsonl'} holds no records"):
        run(source_data(tmp_path / "a.jsonl"), tmp_path / "raw")


@pytest.mark.parametrize("row_group", [7, 8, 1024])
def test_download_again_writes_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row_group: int) -> None:
    monkeypatch.setattr(writer, "ROW_GROUP", row_group)
    data = source_data(write_jsonl(tmp_path / "a.jsonl", questions(40)), split=EVEN)
    run(data, tmp_path / "one")
    run(data, tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert sum(len(titles) for titles in titles_of(tmp_path / "one").values()) == 40


def test_download_ledger_does_not_depend_on_where_the_source_stands(tmp_path: Path) -> None:
    for place in ("here", "there"):
        file = write_jsonl(tmp_path / place / "a.jsonl", questions(40))
        run(source_data(file, split=EVEN), tmp_path / f"raw-{place}")
    assert contents(tmp_path / "raw-here") == contents(tmp_path / "raw-there")


@pytest.mark.parametrize("failure", ["malformed", "truncated", "empty split", "absent"])
def test_download_that_fails_leaves_what_was_there(tmp_path: Path, failure: str) -> None:
    out = tmp_path / "out/raw"
    run(source_data(write_jsonl(tmp_path / "good.jsonl", questions(40)), split=EVEN), out)
    before = contents(tmp_path / "out")
    file = tmp_path / "bad.jsonl.gz"
    lines = [*questions(3000), MALFORMED] if failure == "malformed" else questions(1 if "split" in failure else 3000)
    raw = gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode())
    if failure != "absent":
        file.write_bytes(raw[:-10] if failure == "truncated" else raw)
    with pytest.raises(StageError):
        run(source_data(file), out)
    assert contents(tmp_path / "out") == before


def test_download_that_fails_first_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(StageError):
        run(source_data(write_jsonl(tmp_path / "a.jsonl", [*questions(30), MALFORMED])), tmp_path / "out/raw")
    assert list((tmp_path / "out").iterdir()) == []


def test_download_again_replaces_what_was_there(tmp_path: Path) -> None:
    for number in (40, 50):
        file = write_jsonl(tmp_path / "a.jsonl", questions(number))
        assert run(source_data(file, split=EVEN), tmp_path / "raw")["records_in"] == number


def test_download_of_the_hub_records_its_revision_in_the_ledger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [Row(f"o/n[train]:{i}", "train", value) for i, value in enumerate(questions(40))]
    monkeypatch.setattr(hub_data, "read_hub", lambda hub, commit, whole: iter(rows) if commit == "0f" else iter([]))
    monkeypatch.setattr(hub_data, "resolve_commit", lambda hub: {"abc": "0f"}[hub.revision])
    hub = HubData(id="o/n", config=None, revision="abc", splits=["train"])
    ledger = run(source_data("-", source="hub", hub=hub, split=EVEN), tmp_path / "raw")
    assert ledger["source"] == {"hub": "o/n", "revision": "abc", "commit": "0f"}


# -- where records come from, groups and keys --------------------------------------------------------------------------


def test_download_files_every_record_under_the_name_of_its_source(tmp_path: Path) -> None:
    run(source_data(write_jsonl(tmp_path / "a.jsonl", questions(40)), split=EVEN), tmp_path / "raw")
    assert {r["source"] for records in records_of(tmp_path / "raw").values() for r in records} == {"files"}
    assert all("groups" not in record for record in records_of(tmp_path / "raw")["train"])


def test_download_with_groups_keeps_the_columns_in_their_order(tmp_path: Path) -> None:
    records = [
        {**record, "meta": {"lang": ("en", None)[i % 2]}, "year": 2000 + i} for i, record in enumerate(questions(40))
    ]
    data = source_data(write_jsonl(tmp_path / "a.jsonl", records), groups=["year", "source", "meta.lang"], split=EVEN)
    run(data, tmp_path / "raw")
    schema = pq.read_schema(tmp_path / "raw/train.parquet")
    assert schema.equals(record_schema(["year", "meta.lang"]))
    assert schema.names[-2:] == ["source", "groups"]
    found = {r["title"]: r["groups"] for records in records_of(tmp_path / "raw").values() for r in records}
    assert found == {f"Question {i}?": {"year": str(2000 + i), "meta.lang": ("en", None)[i % 2]} for i in range(40)}


@pytest.mark.parametrize(
    "changes", [{"groups": ["flair"]}, {"split": split(key="flair")}, {"split": split(key=["title", "flair"])}]
)
def test_download_with_a_group_or_key_that_is_absent_names_the_columns_there_are(tmp_path: Path, changes: Any) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", tagged(9))
    with pytest.raises(StageError, match=rf"^{file}:1: no column 'flair'; there are: title, answers\.text, subreddit"):
        run(source_data(file, **changes), tmp_path / "raw")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("key", ["customer", ["customer"], ["customer", "subreddit"], "meta.id"])
def test_download_with_a_key_keeps_its_records_together(tmp_path: Path, kind: str, key: Any) -> None:
    records = [
        {**record, "customer": i % 30, "subreddit": f"s{i % 30}", "meta": {"id": f"no. {i % 30}"}}
        for i, record in enumerate(questions(300))
    ]
    file = write_jsonl(tmp_path / "a.jsonl", records)
    if kind == "parquet":
        file = tmp_path / "a.parquet"
        pq.write_table(pa.Table.from_pylist(records), file)
    run(source_data(file, split=even_by(key)), tmp_path / "raw")
    sides = {name: {int(title[9:-1]) % 30 for title in titles} for name, titles in titles_of(tmp_path / "raw").items()}
    assert sum(map(len, sides.values())) == 30 == len(set.union(*sides.values()))


def test_download_with_an_empty_key_goes_by_the_text(tmp_path: Path) -> None:
    records = [{"title": f"t{i}", "answers.text": f"Text {i // 2}", "customer": None} for i in range(200)]
    run(source_data(write_jsonl(tmp_path / "a.jsonl", records), split=even_by("customer")), tmp_path / "raw")
    sides = {name: {int(title[1:]) // 2 for title in titles} for name, titles in titles_of(tmp_path / "raw").items()}
    assert sum(map(len, sides.values())) == 100


def test_download_with_a_key_of_few_values_warns_of_shares(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    # 970 records of one customer, which go to one split, and 30 of one each.
    records = [{**record, "customer": max(0, i - 969)} for i, record in enumerate(questions(1000))]
    file = write_jsonl(tmp_path / "a.jsonl", records)
    run(source_data(file, split=split(key="customer")), tmp_path / "raw")
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    few = "column 'customer' decides the split and has only 31 values in 1,000 records"
    assert len(warned) >= 2
    assert all(few in line and "% of the records where 10.0 % were asked" in line for line in warned)


def test_download_of_records_with_a_title_each_warns_of_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(source_data(write_jsonl(tmp_path / "a.jsonl", questions(40)), split=EVEN), tmp_path / "raw")
    assert [record for record in caplog.records if record.levelname == "WARNING"] == []


def test_download_without_a_split_writes_all_records_to_one_file(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [*questions(2), {"title": "none", "answers.text": ""}])
    ledger = run(source_data(file, split=None, count_near_duplicates=True), tmp_path / "raw")
    assert set(contents(tmp_path / "raw")) == {"all.parquet", "stats.json"}
    assert pq.read_table(tmp_path / "raw/all.parquet").column("title").to_pylist() == ["Question 0?", "Question 1?"]
    assert ledger["records_out"] == {"all": 2}
    assert ledger["held_out_with_near_duplicate_in_train"] is None


def test_download_without_a_split_refuses_to_compare_splits(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"deduplicate=near compares splits, .* set deduplicate: exact"):
        source_data(tmp_path, split=None, deduplicate="near")


# -- several processes -------------------------------------------------------------------------------------------------


@pytest.fixture
def in_many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of few records, given to other processes from the third on, for which they wait."""

    def wait_until_ready(workers: tasks.Workers) -> bool:
        return workers._first is not None and workers._first.result() is None

    monkeypatch.setattr(sources, "PART_BYTES", 2000)
    monkeypatch.setattr(sources, "_PART_ROWS", 20)
    monkeypatch.setattr(tasks, "_NUM_JOBS_ALONE", 2)
    monkeypatch.setattr(tasks.Workers, "_are_ready", wait_until_ready)


def write_many(directory: Path, kind: str, number: int = 300) -> Path:
    """A file of records, some repeated, some nearly, some without answers, some malformed."""
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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_many_parts: None, kind: str, changes: dict[str, Any]
) -> None:
    file = write_many(tmp_path, kind)
    data = source_data(file, on_bad_record="skip", count_near_duplicates=True, split=EVEN, **changes)
    for number in (1, 2):
        monkeypatch.setattr(download, "Workers", functools.partial(tasks.Workers, number))
        run(data, tmp_path / f"by-{number}")
    monkeypatch.setattr(sources, "PART_BYTES", 2**20)
    run(data, tmp_path / "whole")
    assert contents(tmp_path / "by-2") == contents(tmp_path / "by-1") == contents(tmp_path / "whole")
    assert read_stats(tmp_path / "by-1")["exact_duplicates"] > 0


@pytest.mark.parametrize("number", [1, 2])
def test_download_by_several_processes_names_the_first_malformed_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_many_parts: None, number: int
) -> None:
    monkeypatch.setattr(download, "Workers", functools.partial(tasks.Workers, number))
    file = write_many(tmp_path, "jsonl")
    with file.open("ab") as stream:
        stream.write(b"{\n")
    with pytest.raises(StageError, match=rf"^{file}:102: column 'title' holds int, not text "):
        run(source_data(file, split=EVEN), tmp_path / "raw")
    assert run(source_data(file, max_records=99, split=EVEN), tmp_path / "raw")["records_in"] == 99


@pytest.mark.parametrize("number", [1, 2])
def test_download_of_what_is_cut_short_behind_max_records_takes_what_is_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_many_parts: None, number: int
) -> None:
    monkeypatch.setattr(download, "Workers", functools.partial(tasks.Workers, number))
    file = tmp_path / "a.jsonl.gz"
    raw = "".join(json.dumps(record) + "\n" for record in questions(20_000)).encode()
    file.write_bytes(gzip.compress(raw)[:-20])
    assert run(source_data(file, max_records=9000, split=EVEN), tmp_path / "raw")["records_in"] == 9000
    with pytest.raises(StageError, match="damaged or cut short"):
        run(source_data(file, split=EVEN), tmp_path / "raw")
