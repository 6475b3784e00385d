"""Hostile and broken input of download: each named case has an expected error or expected texts."""

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import make_questions, read_contents, read_stats
from hostile import AS_UNPRIVILEGED, list_files, needs_modes, run_process_for_error, run_stage_for_error

from stages.core.artifacts import SPLITS

SKIP, OWN = "data.on_bad_record=skip", "data.split.by=source"
BOM = b"\xef\xbb\xbf"


class Case(NamedTuple):
    name: str
    """Description of the fault."""
    file: str
    content: bytes | Callable[[Path], Any]
    """Bytes of the file, or a function that creates it."""
    message: str
    """Part of the error; FILE is replaced by the file's path."""
    overrides: tuple[str, ...] = ()


def to_jsonl(*records: Any) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def make_record(text: Any = "a", **more: Any) -> dict[str, Any]:
    return {"title": "t", "answers.text": text, **more}


def to_csv(*rows: str, header: str = "title,answers.text") -> bytes:
    return "".join(f"{row}\n" for row in (header, *rows)).encode()


def write_parquet(*rows: dict[str, Any]) -> Callable[[Path], Any]:
    return lambda file: pq.write_table(pa.Table.from_pylist(list(rows)), file)


def flip_bit(make: Callable[[Path], Any], where: float) -> Callable[[Path], Any]:
    """Return a writer that calls `make` and flips a bit of its file at the fraction `where` of its length."""

    def write(file: Path) -> None:
        make(file)
        raw = bytearray(file.read_bytes())
        raw[int(len(raw) * where)] ^= 4
        file.write_bytes(raw)

    return write


def make_directory(**files: bytes | None) -> Callable[[Path], Any]:
    """Return a function that creates a directory of .jsonl files; None is a symbolic link to itself."""

    def make(path: Path) -> None:
        path.mkdir()
        for name, content in files.items():
            file = path / f"{name}.jsonl"
            file.symlink_to(file) if content is None else file.write_bytes(content)

    return make


def write_column_twice(file: Path) -> None:
    pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 2, names=["x", "x"]), file)


GOOD = to_jsonl(*make_questions(60))
ROWS = [f"t{i},a{i}" for i in range(60)]
MANY = write_parquet(*make_questions(500))
EMPTIED = "are missing, empty or [deleted] in every record"
NO_FILE = "data.path=FILE: no such file, or a directory without .jsonl, "

REFUSED_SOURCES = [
    # no records
    Case("empty file", "a.jsonl", b"", "FILE contains no records"),
    Case("empty gzip", "a.jsonl.gz", gzip.compress(b""), "FILE contains no records"),
    Case("byte order mark alone", "a.jsonl", BOM, "FILE contains no records"),
    Case("blank lines alone", "a.jsonl", b"\n \r\n\n", "FILE contains no records"),
    Case("empty array", "a.json", b"[]", "FILE contains no records"),
    Case("csv header alone", "a.csv", to_csv(), "FILE contains no records"),
    Case("empty parquet file", "a.parquet", b"", "FILE is damaged or cut short: Parquet file size is 0"),
    Case("parquet without rows", "a.parquet", lambda file: pq.write_table(pa.table({"title": []}), file), "no records"),
    Case("all answers deleted", "a.jsonl", to_jsonl(make_record(["[deleted]"]), make_record(["[removed]"])), EMPTIED),
    Case("all answers empty", "a.jsonl", to_jsonl(make_record(["", " \n"]), make_record([]), make_record("")), EMPTIED),
    Case(
        "all answers null",
        "a.jsonl",
        to_jsonl(make_record(None), make_record([None])),
        "without_answers 2): the texts that",
    ),
    Case("all records malformed", "a.jsonl", to_jsonl({"title": 1}), "; malformed: FILE:1: column 'title'", (SKIP,)),
    # other columns and types
    Case("missing column", "a.jsonl", to_jsonl({"title": "t"}), "FILE:1: no column 'answers.text'; there are: title; "),
    Case("renamed column", "a.jsonl", to_jsonl({"headline": "t", "body": "a"}), "there are: headline, body; "),
    Case("column lost on the way", "a.jsonl", GOOD + to_jsonl({"title": "t"}), "FILE:61: no column 'answers.text'"),
    Case(
        "number for a title", "a.jsonl", to_jsonl(make_record(title=5)), "FILE:1: column 'title' contains int, not text"
    ),
    Case(
        "number for a text",
        "a.jsonl",
        to_jsonl(make_record([5])),
        "FILE:1: column 'answers.text' contains int, not text",
    ),
    Case("not a number for a text", "a.jsonl", b'{"title": "", "answers.text": NaN}', "contains float, not text"),
    Case(
        "object for a text",
        "a.jsonl",
        to_jsonl(make_record({"a": 1})),
        "FILE:1: column 'answers.text' contains dict, not text",
    ),
    Case(
        "list of lists",
        "a.jsonl",
        to_jsonl(make_record([["a"]])),
        "FILE:1: column 'answers.text' contains list, not text",
    ),
    Case("text for a struct", "a.jsonl", to_jsonl({"title": "t", "answers": "a"}), "FILE:1: no column 'answers.text'"),
    Case(
        "score of text",
        "a.jsonl",
        to_jsonl(make_record(["a"], **{"answers.score": ["x"]})),
        "'answers.score' contains some",
    ),
    Case("array for a record", "a.jsonl", to_jsonl(["t", "a"]), "FILE:1: not an object with columns, but list"),
    Case("null for a record", "a.json", b"null", "FILE:1: not an object with columns, but NoneType"),
    Case("records below a key", "a.json", to_jsonl({"rows": make_questions(9)}), "no column 'title'; there are: rows"),
    Case("parquet of other columns", "a.parquet", write_parquet({"x": 1}), "FILE:1: no column 'title'; there are: x"),
    Case(
        "parquet of numbers",
        "a.parquet",
        write_parquet(make_record(5)),
        "FILE:1: column 'answers.text' contains int, not text",
    ),
    Case(
        "parquet of bytes",
        "a.parquet",
        write_parquet(make_record(b"\xff")),
        "FILE:1: column 'answers.text' contains bytes",
    ),
    Case("csv of semicolons", "a.csv", to_csv("a;b", header="title;text"), "no column 'title'; there are: title;text"),
    Case("csv with a column twice", "a.csv", to_csv("a,b,c", header="title,x,x"), "FILE:1: the header has two columns"),
    Case("csv with a cell too many", "a.csv", to_csv(*ROWS, "a,b,c"), "FILE:62: 3 columns, but the header has 2"),
    Case("json with a key twice", "a.jsonl", GOOD + b'{"title": "", "title": ""}', "FILE:61: an object has two keys"),
    Case(
        "parquet with a column twice", "a.parquet", write_column_twice, "FILE:1: the file has two columns 'x'", (SKIP,)
    ),
    Case("a million keys", "a.jsonl", to_jsonl(dict.fromkeys(map(str, range(10**6)))), "18, 19 and 999,980 more; "),
    Case("a million columns", "a.csv", to_csv(header=",".join(map(str, range(10**6)))) + b"1\n", "header has 1000000"),
    Case(
        "one title",
        "a.jsonl",
        to_jsonl(*(make_record(f"{i}") for i in range(99))),
        "column 'title' decides the split and",
    ),
    # bytes that are not text
    Case("invalid UTF-8", "a.jsonl", GOOD + b'{"title": "\xff"}', "FILE:61: not UTF-8 (byte 11 of the line)"),
    Case("invalid UTF-8 in csv", "a.csv", to_csv(*ROWS) + b"\xe9,b\n", "FILE:62: not UTF-8"),
    Case("invalid UTF-8 in a csv header", "a.csv", b"\xff" + to_csv(*ROWS), "FILE:1: the header is not UTF-8", (SKIP,)),
    Case("invalid UTF-8 in plain text", "a.txt", b"one\n\xfftwo", "FILE:2: not UTF-8 (byte 0 of the line)"),
    Case("UTF-16", "a.jsonl", GOOD.decode().encode("utf-16"), "FILE contains UTF-16 text (only UTF-8 is read)"),
    Case("lone surrogate", "a.jsonl", rb'{"title": "\ud800", "answers.text": "a"}', "'title' contains half of a"),
    Case("raw NUL in JSON", "a.jsonl", GOOD.replace(b"Answer 3.", b"a\0b"), "FILE:4: not JSON: Invalid control char"),
    Case("NUL bytes alone", "a.jsonl", bytes(1000), "FILE:1: not JSON: Expecting value"),
    Case("deep nesting", "a.json", b"[" * 100_000, "FILE:1: not JSON: maximum recursion depth exceeded"),
    Case("huge integer", "a.jsonl", b'{"title": 1' + b"0" * 5000 + b"}", "FILE:1: not JSON: Exceeds the limit"),
    Case("old Mac line ends", "a.jsonl", GOOD.replace(b"\n", b"\r"), "FILE:1: not JSON: Extra data"),
    # damaged and misnamed files
    Case("truncated gzip", "a.jsonl.gz", gzip.compress(GOOD)[:-20], "FILE is damaged or cut short", (SKIP,)),
    Case(
        "bit-flipped gzip", "a.jsonl.gz", flip_bit(lambda f: f.write_bytes(gzip.compress(GOOD)), 0.5), "is damaged or"
    ),
    Case("truncated line", "a.jsonl", GOOD[:-9], "FILE:60: not JSON: Unterminated string"),
    Case("truncated parquet", "a.parquet", lambda f: (MANY(f), f.write_bytes(f.read_bytes()[:-9])), "FILE is damaged"),
    Case("bit-flipped parquet", "a.parquet", flip_bit(MANY, 0.3), "FILE is damaged or cut short"),
    Case("unclosed csv quote", "a.csv", to_csv("a,b", 'c,"d', *ROWS), "FILE:3: not CSV: a quote that opens", (SKIP,)),
    Case("csv quote closed far below", "a.csv", to_csv('c,"d', *ROWS, 'x,"y"'), "as it should up to line 63", (SKIP,)),
    Case("gzip without its suffix", "a.jsonl", gzip.compress(GOOD), "FILE contains gzip (.gz), but its name", (SKIP,)),
    Case("parquet called csv", "a.csv", MANY, "FILE contains Parquet (.parquet), but its name says otherwise", (SKIP,)),
    Case("zip called text", "a.txt", b"PK\x03\x04...", "FILE contains a zip archive (archives are not supported), but"),
    Case("text called gzip", "a.jsonl.gz", GOOD, "FILE is damaged or cut short: Not a gzipped file"),
    Case("text called parquet", "a.parquet", GOOD, "FILE is damaged or cut short: Parquet magic bytes not found"),
    Case("unknown suffix", "a.docx", GOOD, "data.path=FILE: unknown format; its name must end in .jsonl,"),
    Case("pickled records", "a.pkl", GOOD, "data.path=FILE: unknown format"),
    # paths
    Case("absent file", "a.jsonl", lambda file: None, NO_FILE),
    Case("directory for a file", "a.jsonl", Path.mkdir, NO_FILE),
    Case("directory in a directory", "a", lambda path: (path / "b.jsonl").mkdir(parents=True), NO_FILE),
    Case("symlink loop", "a.jsonl", lambda f: f.symlink_to(f), "Too many levels of symbolic links: FILE: a sym"),
    Case("symlink to nowhere", "a.jsonl", lambda f: f.symlink_to(f / "gone"), ": FILE"),
    Case("directory within itself", "a", lambda p: (p.mkdir(), (p / "b").symlink_to(p)), "FILE/b is a link to a dir"),
    Case("FIFO", "a.jsonl", os.mkfifo, "FILE is a FIFO, a socket or a device: replace it by"),
    Case("FIFO in a directory", "a", lambda p: (p.mkdir(), os.mkfifo(p / "b")), "FILE/b is a FIFO, a socket or a dev"),
    Case("symlink loop in a directory", "a", make_directory(a=GOOD, b=None), "of symbolic links: FILE/b.jsonl"),
    # splits
    Case("too few records", "a.jsonl", to_jsonl(*make_questions(2)), "no record for validation and test (train 2, val"),
    Case(
        "split left empty by its share",
        "a.jsonl",
        GOOD,
        "no record for test (train 5",
        ("data.split.train=0.9", "data.split.validation=0.0999999", "data.split.test=0.0000001"),
    ),
    Case("own splits without names", "a.jsonl", GOOD, "FILE:1: split.by: source needs files", (OWN,)),
    Case("own splits, one alone", "test.jsonl", GOOD, "no record for train and validation (", (OWN,)),
]  # fmt: skip


def run_download(tmp_path: Path, file: str, content: bytes | Callable[[Path], Any], *overrides: str) -> str:
    """Create the source, run download with output in tmp_path/out/raw, and return its error."""
    source = tmp_path / file
    source.write_bytes(content) if isinstance(content, bytes) else content(source)
    (tmp_path / "out").mkdir()
    out = [f"out={tmp_path}/out/raw", "data.count_near_duplicates=false"]
    return run_stage_for_error("download", "data=files", f"data.path={source}", *out, *overrides)


def read_texts(raw: Path) -> set[str]:
    rows = [row for name in SPLITS for row in pq.read_table(raw / f"{name}.parquet").to_pylist()]
    return {text for row in rows for text in row["answers"]["text"]}


@pytest.mark.parametrize("case", REFUSED_SOURCES, ids=[case.name for case in REFUSED_SOURCES])
def test_hostile_source_is_refused_with_its_place_and_nothing_is_written(tmp_path: Path, case: Case) -> None:
    error = run_download(tmp_path, case.file, case.content, *case.overrides)
    assert case.message.replace("FILE", str(tmp_path / case.file)) in error
    assert list_files(tmp_path / "out") == []


def write_odd_parquet(file: Path) -> None:
    """Write records with invalid UTF-8 and dates beyond the year 9999 in unused columns."""
    table = pa.Table.from_pylist(make_questions(60))
    text = pa.Array.from_buffers(pa.string(), 60, pa.array([b"\xff"] * 60).buffers())
    dates = pa.array([2**31 - 1] * 60, pa.int32()).cast(pa.date32())
    pq.write_table(table.append_column("body", text).append_column("date", dates), file)


ANSWERS, ROW_TEXTS = {f"Answer {i}." for i in range(60)}, {f"a{i}" for i in range(60)}
END, LINE = ["\r", "\n", "\r\n", "\r\r\n"], "data.text_record=line"
ACCEPTED_SOURCES: list[tuple[Any, ...]] = [
    ("byte order mark", "a.jsonl", BOM + GOOD, ANSWERS),
    ("byte order mark in csv", "a.csv", BOM + to_csv(*ROWS), ROW_TEXTS),
    ("CRLF", "a.jsonl", GOOD.replace(b"\n", b"\r\n"), ANSWERS),
    ("CRLF in csv", "a.csv", to_csv(*ROWS).replace(b"\n", b"\r\n"), ROW_TEXTS),
    ("old Mac line ends in csv", "a.csv", to_csv(*ROWS).replace(b"\n", b"\r"), ROW_TEXTS),
    ("text where a list is due", "a.jsonl", GOOD.replace(b"[", b"").replace(b"]", b""), ANSWERS),
    (
        "nulls beside texts",
        "a.jsonl",
        GOOD + to_jsonl(make_record([None, "x"], q_id=None, title=None)),
        ANSWERS | {"x"},
    ),
    ("escaped NUL", "a.jsonl", GOOD.replace(b"Answer 3.", rb"a\u0000b"), ANSWERS - {"Answer 3."} | {"a\0b"}),
    ("control tokens", "a.jsonl", GOOD + to_jsonl(make_record("<|endoftext|></s>")), ANSWERS | {"<|endoftext|></s>"}),
    ("surrogate pair", "a.jsonl", GOOD + rb'{"title": "t", "answers.text": "\ud83d\ude00"}', ANSWERS | {"😀"}),
    ("no line end at the end", "a.jsonl", GOOD.rstrip(), ANSWERS),
    ("duplicate records", "a.jsonl", GOOD * 2, ANSWERS),
    (
        "directory within itself, hidden",
        "a",
        lambda p: (make_directory(a=GOOD)(p), (p / ".loop").symlink_to(p)),
        ANSWERS,
    ),
    ("README beside data", "a", lambda p: (make_directory(a=GOOD)(p), (p / "README.md").write_text("# A")), ANSWERS),
    ("empty columns at the end", "a.csv", to_csv(*(f"{r},," for r in ROWS), header="title,answers.text,,"), ROW_TEXTS),
    ("pretty objects", "a.json", b"".join(json.dumps(q, indent=1).encode() for q in make_questions(60)), ANSWERS),
    ("old Mac line ends in text", "a.txt", b"".join(f"a{i}\r".encode() for i in range(60)), ROW_TEXTS, LINE),
    ("mixed line ends in text", "a.txt", b"".join(f"a{i}{END[i % 4]}".encode() for i in range(60)), ROW_TEXTS, LINE),
    ("bad values in unused columns", "a.parquet", write_odd_parquet, ANSWERS),
    ("suffix in capitals", "A.JSONL", GOOD, ANSWERS),
]


@pytest.mark.parametrize("case", ACCEPTED_SOURCES, ids=[case[0] for case in ACCEPTED_SOURCES])
def test_hostile_source_that_is_valid_gives_its_texts(tmp_path: Path, case: tuple[Any, ...]) -> None:
    _, file, content, expected, *overrides = case
    assert run_download(tmp_path, file, content, *overrides) == ""
    assert read_texts(tmp_path / "out/raw") == expected


def test_hostile_records_left_out_are_counted_and_the_first_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = b'{"title": 5}\n\xff\n'
    assert run_download(tmp_path, "a.jsonl", GOOD + bad, SKIP) == ""
    assert read_stats(tmp_path / "out/raw")["records_skipped"]["malformed"] == 2
    assert f"2 malformed records left out; the first: {tmp_path / 'a.jsonl'}:61: column 'title'" in caplog.text


def test_hostile_source_that_fails_keeps_the_previous_raw_data(tmp_path: Path) -> None:
    assert run_download(tmp_path, "a.jsonl", GOOD) == ""
    before = read_contents(tmp_path / "out")
    (tmp_path / "a.jsonl").write_bytes(GOOD[:-9])
    raw = [f"out={tmp_path}/out/raw", "data.count_near_duplicates=false"]
    assert "not JSON" in run_stage_for_error("download", "data=files", f"data.path={tmp_path / 'a.jsonl'}", *raw)
    assert read_contents(tmp_path / "out") == before


@needs_modes
@pytest.mark.parametrize("name", ["a.jsonl", "a"], ids=["file", "directory"])
def test_hostile_source_without_permission_is_named_by_the_process(tmp_path: Path, name: str) -> None:
    source = tmp_path / name
    source.write_bytes(GOOD) if source.suffix else make_directory(a=GOOD)(source)
    source.chmod(0)
    error = run_process_for_error(
        "download", "data=files", f"data.path={source}", f"out={tmp_path}/raw", prefix=AS_UNPRIVILEGED
    )
    source.chmod(0o700)
    assert error.startswith(f"Permission denied: {source}: this user may not read or write it: change its owner")
    assert not (tmp_path / "raw").exists()


def test_hostile_source_ends_the_process_with_one_line_and_exit_code_1(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD[:-9])
    error = run_process_for_error("download", "data=files", f"data.path={tmp_path / 'a.jsonl'}", f"out={tmp_path}/raw")
    assert error.startswith(f"{tmp_path / 'a.jsonl'}:60: not JSON")
    assert list_files(tmp_path) == ["a.jsonl"]
