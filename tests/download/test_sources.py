"""sources: the same records from every format, compression and location, and errors with file and line."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import make_questions, make_source_data, read_values, serve_files, write_jsonl

from stages.core.errors import StageError
from stages.download.records import BadRecordError, Row, build_record, find_column_value
from stages.download.schema import Columns
from stages.download.sources import group_into_parts, read_rows

RECORDS = [
    {"title": "Why, exactly?", "answers.text": 'Because "it" is, so.'},
    {"title": "naïve 北京 🙂", "answers.text": "two\nlines, \u2028 and\ta tab"},
    {"title": "", "answers.text": " outer spaces "},
]
BOM = "\ufeff".encode()


def _compress_zstd(raw: bytes) -> bytes:
    return pa.compress(raw, codec="zstd", asbytes=True)


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes, ".gz": gzip.compress, ".zst": _compress_zstd, ".bz2": bz2.compress, ".xz": lzma.compress
}  # fmt: skip


def _encode_jsonl() -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS).encode()


def _encode_csv() -> bytes:
    rows = [list(RECORDS[0]), *(list(record.values()) for record in RECORDS)]
    return "".join(",".join('"' + cell.replace('"', '""') + '"' for cell in row) + "\n" for row in rows).encode()


def _encode_parquet() -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(RECORDS), stream)
    return stream.getvalue()


FORMATS: dict[str, Callable[[], bytes]] = {
    "a.jsonl": _encode_jsonl,
    "a.ndjson": _encode_jsonl,
    "lines.json": _encode_jsonl,
    "array.json": lambda: json.dumps(RECORDS, indent=2).encode(),
    "a.csv": _encode_csv,
}


def read_texts(path: Path | str, text_record: str) -> list[Any]:
    return [value["answers.text"] for value in read_values(path, text_record=text_record)]


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("name", FORMATS)
def test_read_of_every_format_and_compression_gives_the_same_records(
    tmp_path: Path, name: str, compression: str
) -> None:
    file = tmp_path / (name + compression)
    file.write_bytes(COMPRESS[compression](FORMATS[name]()))
    assert read_values(file) == RECORDS


def test_read_of_parquet_gives_the_same_records(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(_encode_parquet())
    assert read_values(tmp_path / "a.parquet") == RECORDS


@pytest.mark.parametrize("name", FORMATS)
def test_read_of_a_byte_order_mark_ignores_it(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(BOM + FORMATS[name]())
    assert read_values(tmp_path / name) == RECORDS


@pytest.mark.parametrize("name", ["a.jsonl", "lines.json", "array.json", "a.csv"])
def test_read_of_crlf_and_empty_lines_gives_the_same_records(tmp_path: Path, name: str) -> None:
    # The line break inside a CSV cell is text and stays unchanged.
    raw = FORMATS[name]().replace(b"\n", b"\r\n\r\n").replace(b"two\r\n\r\nlines", b"two\nlines")
    (tmp_path / name).write_bytes(raw)
    assert read_values(tmp_path / name) == RECORDS


@pytest.mark.parametrize("compression", [".gz", ".zst", ".bz2", ".xz"])
def test_read_of_concatenated_compressed_parts_gives_all(tmp_path: Path, compression: str) -> None:
    file, compress = tmp_path / f"a.jsonl{compression}", COMPRESS[compression]
    file.write_bytes(compress(b'{"a": 1}\n') + compress(b'{"a": 2}\n'))
    assert read_values(file) == [{"a": 1}, {"a": 2}]


def test_read_of_upper_case_names_finds_format_and_compression(tmp_path: Path) -> None:
    (tmp_path / "A.JSONL.GZ").write_bytes(gzip.compress(_encode_jsonl()))
    assert read_values(tmp_path / "A.JSONL.GZ") == RECORDS


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt", "a.jsonl.gz", "a.jsonl.zst", "a.json.zst"])
def test_read_of_an_empty_file_gives_no_records(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    assert read_values(tmp_path / name) == []


def test_read_of_a_csv_header_without_rows_gives_no_records(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("title,answers.text\n")
    assert read_values(tmp_path / "a.csv") == []


# -- plain text --------------------------------------------------------------------------------------------------------

PLAIN = "One\ntwo.\n\n \t\nThree\n\n\nFour.\n"


@pytest.mark.parametrize(
    ("text_record", "expected"),
    [
        ("file", [PLAIN]),
        ("paragraph", ["One\ntwo.", "Three", "Four."]),
        ("line", ["One", "two.", "Three", "Four."]),
    ],
)
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r", "\r\r\n"])
@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.txt.gz", "a.txt.zst"])
def test_read_of_plain_text_gives_files_paragraphs_or_lines(
    tmp_path: Path, name: str, newline: str, text_record: str, expected: list[str]
) -> None:
    compress = COMPRESS[Path(name).suffix] if name.count(".") == 2 else bytes
    (tmp_path / name).write_bytes(compress(PLAIN.replace("\n", newline).encode()))
    assert read_texts(tmp_path / name, text_record) == expected


@pytest.mark.parametrize(("text_record", "lines"), [("file", [1]), ("paragraph", [1, 5, 8]), ("line", [1, 2, 5, 8])])
def test_read_of_plain_text_gives_the_first_line_of_each_record(
    tmp_path: Path, text_record: str, lines: list[int]
) -> None:
    file = tmp_path / "a.txt"
    file.write_text(PLAIN)
    assert [row.location for row in read_rows(make_source_data(file, text_record=text_record))] == [
        f"{file}:{n}" for n in lines
    ]


@pytest.mark.parametrize("end", ["", "\n", "\n\n\n"])
def test_read_of_the_last_paragraph_does_not_depend_on_trailing_newlines(tmp_path: Path, end: str) -> None:
    (tmp_path / "a.txt").write_text(f"One.\n\nTwo.{end}")
    assert read_texts(tmp_path / "a.txt", "paragraph") == ["One.", "Two."]


@pytest.mark.parametrize("text_record", ["file", "paragraph", "line"])
def test_read_of_text_with_byte_order_mark_and_nul_only_drops_the_mark(tmp_path: Path, text_record: str) -> None:
    (tmp_path / "a.txt").write_bytes(BOM + b"a\x00b")
    assert read_texts(tmp_path / "a.txt", text_record) == ["a\x00b"]


def test_read_of_lines_with_mixed_line_ends_gives_each_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\rtwo\nthree\r\nfour\r\r\nfive\x0b\xe2\x80\xa8six\r\r\rseven")
    rows = list(read_rows(make_source_data(tmp_path / "a.txt", text_record="line")))
    assert [row.value["answers.text"] for row in rows] == ["one", "two", "three", "four", "five\x0b\u2028six", "seven"]
    assert [row.location.rpartition(":")[2] for row in rows] == ["1", "2", "3", "4", "5", "8"]


# -- JSON and CSV as other programs write them -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raw",
    [
        json.dumps(RECORDS[0], indent=2),
        json.dumps(RECORDS[0], indent="\t").replace("\n", "\r\n"),
        "\n\n" + json.dumps(RECORDS[0], indent=0) + "\n\n",
        json.dumps(RECORDS[0]).replace('", "', '",\n"'),
        json.dumps(RECORDS[0]),
        json.dumps([RECORDS[0]]),
        "\n [\n" + json.dumps(RECORDS[0]) + "\n]\n",
    ],
)
@pytest.mark.parametrize("mark", [b"", BOM])
def test_read_of_json_in_other_layouts_gives_the_record(tmp_path: Path, raw: str, mark: bytes) -> None:
    (tmp_path / "a.json").write_bytes(mark + raw.encode())
    assert read_values(tmp_path / "a.json") == RECORDS[:1]


def test_read_of_json_objects_over_several_lines_gives_and_numbers_each(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("\n".join(json.dumps(record, indent=2) for record in RECORDS))
    rows = list(read_rows(make_source_data(tmp_path / "a.json")))
    assert [row.value for row in rows] == RECORDS
    assert [row.location.rpartition(":")[2] for row in rows] == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("raw", "number", "message"),
    [
        (b'[{"a": 1}, {"a"]', 2, "not JSON"),
        (b'[{"a": 1} {"a": 2}]', 2, "not JSON: Expecting ',' delimiter"),
        (b'[{"a": 1}, ]', 2, "not JSON"),
        (b'[{"a": 1}', 2, "not JSON"),
        (b'[{"a": 1}] [2]', 2, "not JSON: Extra data"),
        (b"[", 1, "not JSON"),
        (b'[{"a": "\xe9"}]', 1, "not UTF-8"),
        (b'{\n"a": 1\n}\n{\n"a": \n}', 2, "not JSON"),
        (b'{\n"a": "\xe9"\n}', 1, "not UTF-8"),
    ],
)
def test_read_of_invalid_json_that_cannot_be_divided_is_refused(
    tmp_path: Path, raw: bytes, number: int, message: str
) -> None:
    (tmp_path / "a.json").write_bytes(raw)
    with pytest.raises(StageError, match=f"a.json:{number}: {message}"):
        read_values(tmp_path / "a.json", on_bad_record="skip")


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"title,text,,\na,b,,\nc,d,,\n", [{"title": "a", "text": "b"}, {"title": "c", "text": "d"}]),
        (b"title,text, ,\na,b, ,\n", [{"title": "a", "text": "b"}]),
        (b"title,text,,\na,b\nc,d,\n", [{"title": "a", "text": "b"}, {"title": "c", "text": "d"}]),
        (b"title,text\na,\n", [{"title": "a", "text": ""}]),
        (b",title,text\n0,a,b\n", [{"": "0", "title": "a", "text": "b"}]),
    ],
)
def test_read_of_csv_with_empty_columns_at_the_end_leaves_them_out(
    tmp_path: Path, raw: bytes, expected: list[Any]
) -> None:
    (tmp_path / "a.csv").write_bytes(raw)
    assert read_values(tmp_path / "a.csv") == expected


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b",,\na,b,c\n", "1: the header has no names"),
        (b",title,,text\n", "1: the header has no name for columns 1 and 3"),
        (b"title,text,,\na,b,,note\n", "2: column 4 contains 'note', but has no name"),
        (b"title,text,\na,b,,\n", "2: 4 columns, but the header has 3"),
        (b"title,text\na,b,\n", "2: 3 columns, but the header has 2"),
        (b"title,text,\na\n", "2: 1 columns, but the header has 3"),
    ],
)
def test_read_of_csv_with_unnamed_columns_names_their_numbers(tmp_path: Path, raw: bytes, message: str) -> None:
    (tmp_path / "a.csv").write_bytes(raw)
    with pytest.raises((StageError, BadRecordError), match=message):
        for row in read_rows(make_source_data(tmp_path / "a.csv")):
            raise BadRecordError(f"{row.location}: {row.value}")


# -- repeated keys -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "name", "key"),
    [
        (b'{"title": "a", "title": "b"}', "title", "'title'"),
        (b'{"title": "a", "answers": {"text": "b", "text": "c"}}', "answers.text", "'text'"),
        (b'{"answers": [{"text": "b"}, {"text": "b", "text": "c"}]}', "answers.text", "'text'"),
        (b'{"title": "a", "answers": {}, "answers": {"text": "c"}}', "answers.text", "'answers'"),
        (b'{"answers.text": "b", "answers.text": "c"}', "answers.text", "'answers.text'"),
        (rb'{"a": 1, "\u0061": 2}', "a", "'a'"),
        (rb'{"a\u001b": 1, "a\u001b": 2}', "a\x1b", r"'a\x1b'"),
    ],
)
@pytest.mark.parametrize(
    "layout",
    [b"%s\n{}", b"{}\n%s", b"[{}, %s, {}]", b"[%s]", b"{\n}\n%s\n{}"],
    ids=["1", "2", "array", "one", "values"],
)
def test_read_of_json_with_a_repeated_key_is_a_bad_record_if_the_key_is_used(
    tmp_path: Path, layout: bytes, value: bytes, name: str, key: str
) -> None:
    (tmp_path / "a.json").write_bytes(layout % value)
    found = read_values(tmp_path / "a.json")
    (bad,) = [value for value in found if value]
    with pytest.raises(BadRecordError, match=f"an object has two keys {re.escape(key)}: "):
        find_column_value(pickle.loads(pickle.dumps(bad)), name)
    assert [value for value in found if value is not bad] == [{}] * layout.count(b"{")


@pytest.mark.parametrize("column", ["q_id", "title", "selftext_urls"])
def test_build_record_of_json_with_a_repeated_key_fails_if_the_key_is_used(tmp_path: Path, column: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(
        b'{"title": "t", "answers.text": "x", "more": [[{"x": 1, "x": 2}]], "y": 1, "y": 2}\n'
        b'{"title": "t", "answers.text": "x", "%s": null, "%s": null}\n' % (column.encode(), column.encode())
    )
    good, bad = read_values(tmp_path / "a.jsonl")
    assert build_record(good, Columns(title="title", texts=["answers.text"]))[0]["answers"]["text"] == ["x"]
    with pytest.raises(BadRecordError, match=f"two keys '{column}'"):
        build_record(bad, Columns(title="title", texts=["answers.text"]))


# -- locations ---------------------------------------------------------------------------------------------------------


def test_read_of_a_directory_reads_files_by_name_except_hidden_and_unknown_ones(tmp_path: Path) -> None:
    kept = ["a.jsonl", "b/c.jsonl", "b/d.csv", "e.jsonl.gz"]
    for number, name in enumerate(reversed(kept)):
        raw = f'{{"n": {number}}}\n' if "jsonl" in name else f"n\n{number}\n"
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(gzip.compress(raw.encode()) if name.endswith(".gz") else raw.encode())
    for name in (".hidden.jsonl", ".cache/x.jsonl", "b/.x/y.jsonl", "picture.png", "no_suffix", "a.jsonl.zip"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"n": "not to be read"}\n')
    rows = list(read_rows(make_source_data(tmp_path)))
    assert [row.location.rsplit(":", 1)[0] for row in rows] == [str(tmp_path / name) for name in kept]
    assert [int(row.value["n"]) for row in rows] == [3, 2, 1, 0]


def test_read_of_a_hidden_directory_that_is_the_path_reads_it(tmp_path: Path) -> None:
    write_jsonl(tmp_path / ".data/a.jsonl", [1])
    assert read_values(tmp_path / ".data") == [1]


def test_read_of_a_directory_named_like_a_file_reads_it(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "corpus.json/a.jsonl", [1])
    assert read_values(tmp_path / "corpus.json") == [1]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.csv", "array.json", "a.parquet"])
@pytest.mark.parametrize("query", ["", "?download=true"])
def test_read_over_http_gives_the_same_records(tmp_path: Path, name: str, query: str) -> None:
    stem, compression = (name.rsplit(".", 1)[0], Path(name).suffix) if name.count(".") == 2 else (name, "")
    raw = _encode_parquet() if name.endswith("parquet") else COMPRESS[compression](FORMATS[stem]())
    (tmp_path / name).write_bytes(raw)
    with serve_files(tmp_path) as url:
        assert read_values(f"{url}/{name}{query}") == RECORDS


def test_read_over_http_of_text_with_links_does_not_follow_them(tmp_path: Path) -> None:
    with serve_files(tmp_path) as url:
        text = f"see <a href='other.txt'>this</a> or {url}/page.txt/part.txt"
        (tmp_path / "page.txt").write_text(text)
        assert read_texts(f"{url}/page.txt", "file") == [text]


def test_read_of_an_http_directory_reads_the_files_that_it_lists(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", ".c.jsonl", "d.png"):
        write_jsonl(tmp_path / name, [name])
    with serve_files(tmp_path) as url:
        assert read_values(url + "/") == ["a.jsonl", "b.jsonl"]


def test_read_over_http_of_an_absent_file_names_the_url(tmp_path: Path) -> None:
    with (
        serve_files(tmp_path) as url,
        pytest.raises(StageError, match=f"data.path={url}/a.jsonl: there is no such file"),
    ):
        read_values(f"{url}/a.jsonl")


def test_read_of_a_server_that_is_gone_names_the_url(tmp_path: Path) -> None:
    with serve_files(tmp_path) as url:
        pass
    with pytest.raises(StageError, match=f"data.path={url}/a.jsonl"):
        read_values(f"{url}/a.jsonl")


# -- malformed files ---------------------------------------------------------------------------------------------------

_FILLER = b'{"title": "t", "answers.text": "x"}\n'


@pytest.mark.parametrize(
    ("name", "raw", "line", "message"),
    [
        ("a.jsonl", _FILLER * 2 + b"\xff\n" + _FILLER, 3, "not UTF-8"),
        ("a.jsonl", b"\xffa", 1, "not UTF-8"),
        ("a.jsonl", _FILLER + b"\n\n{'a': 1}\n" + _FILLER, 4, "not JSON"),
        ("a.jsonl", _FILLER + b'{"a": "x\x00y"}\n', 2, "not JSON"),
        ("a.jsonl", _FILLER + b'{"a": "cut sho', 2, "not JSON"),
        ("a.jsonl", _FILLER + b"[" * 100_000 + b"\n", 2, "not JSON"),
        ("a.json", b'{"a": 1}\n{"a": 1,,}\n{"a": 1}', 2, "not JSON"),
        ("a.json", b'{"a": "cut sho', 1, "not JSON"),
        ("a.csv", b"title,text\na,b\nc\nd,e\n", 3, "1 columns.* 2"),
        ("a.csv", b"title,text\na,b\nc,d,e\n", 3, "3 columns.* 2"),
        ("a.csv", b'title,text\na,"two\nlines"\nc\n', 4, "1 columns.* 2"),
        ("a.csv", b'title,text\n"a"b,c\nd,e\n', 2, "not CSV"),
        ("a.csv", b'title,text\na,b\nc,"never closed\n', 3, "not CSV"),
        ("a.csv", b"title,text\na,b\nc,\xff\nd,e\n", 3, "not UTF-8"),
        ("a.txt", b"one\n\xfftwo\nthree", 2, "not UTF-8"),
    ],
)
def test_read_of_a_malformed_record_gives_its_location_and_the_reason(
    tmp_path: Path, name: str, raw: bytes, line: int, message: str
) -> None:
    file = tmp_path / name
    file.write_bytes(raw)
    rows = list(read_rows(make_source_data(file, text_record="line")))
    (bad,) = [row for row in rows if isinstance(row.value, BadRecordError)]
    assert bad.location == f"{file}:{line}"
    with pytest.raises(BadRecordError, match=message):
        raise bad.value


@pytest.mark.parametrize("bad", [b'"a"b,c', b"a", b"a,\xff"])
def test_read_of_a_malformed_csv_record_continues_with_the_next(tmp_path: Path, bad: bytes) -> None:
    (tmp_path / "a.csv").write_bytes(b"title,text\n" + bad + b"\nd,e\nf,g\n")
    good = [value for value in read_values(tmp_path / "a.csv") if not isinstance(value, BadRecordError)]
    assert good == [{"title": "d", "text": "e"}, {"title": "f", "text": "g"}]


def test_read_of_every_format_gives_the_location_of_each_record(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [1, 2])
    (tmp_path / "b.json").write_text("[1, 2]")
    (tmp_path / "c.csv").write_text('t\n"1\n1"\n2\n')
    (tmp_path / "d.parquet").write_bytes(_encode_parquet())
    locations = [row.location.removeprefix(f"{tmp_path}/") for row in read_rows(make_source_data(tmp_path))]
    assert locations == [
        *("a.jsonl:1", "a.jsonl:2", "b.json:1", "b.json:2"),
        *("c.csv:2", "c.csv:4", "d.parquet:1", "d.parquet:2", "d.parquet:3"),
    ]


@pytest.mark.parametrize("compression", [".gz", ".zst", ".bz2", ".xz"])
@pytest.mark.parametrize("damage", ["truncated", "nonsense"])
def test_read_of_a_damaged_compressed_file_names_it(tmp_path: Path, compression: str, damage: str) -> None:
    raw = "".join(json.dumps(record) + "\n" for record in make_questions(500)).encode()
    file = tmp_path / f"a.jsonl{compression}"
    file.write_bytes(COMPRESS[compression](raw)[:-20] if damage == "truncated" else b"nonsense" * 10)
    with pytest.raises(StageError, match=f"{file} is damaged or cut short"):
        read_values(file)


@pytest.mark.parametrize("raw", [b"", b"PAR1", b"nonsense" * 10, _encode_parquet()[:-5]])
def test_read_of_a_damaged_parquet_file_names_it(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "a.parquet").write_bytes(raw)
    with pytest.raises(StageError, match=f"{tmp_path / 'a.parquet'} is damaged or cut short"):
        read_values(tmp_path / "a.parquet")


def test_group_into_parts_reads_no_row_beyond_a_full_part() -> None:
    rows = (Row(f"o/n[train]:{index}", "train", {"title": str(index)}) for index in range(10))
    parts = group_into_parts(rows, 4)
    assert len(next(parts).content) == 4
    assert next(rows).location == "o/n[train]:4"  # still to be read
    assert [len(part.content) for part in parts] == [4, 1]
