"""sources: every format, compression and place gives the same records, and what is wrong is named by file and line."""

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
from data_helpers import questions, serving_files, source_data, values, write_jsonl

from stages.core.errors import StageError
from stages.download.records import BadRecordError, lookup, to_record
from stages.download.schema import Columns
from stages.download.sources import read

RECORDS = [
    {"title": "Why, exactly?", "answers.text": 'Because "it" is, so.'},
    {"title": "naïve 北京 🙂", "answers.text": "two\nlines, \u2028 and\ta tab"},
    {"title": "", "answers.text": " outer spaces "},
]
BOM = "\ufeff".encode()


def _zstd(raw: bytes) -> bytes:
    return pa.compress(raw, codec="zstd", asbytes=True)


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes, ".gz": gzip.compress, ".zst": _zstd, ".bz2": bz2.compress, ".xz": lzma.compress
}  # fmt: skip


def _lines() -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS).encode()


def _csv() -> bytes:
    rows = [list(RECORDS[0]), *(list(record.values()) for record in RECORDS)]
    return "".join(",".join('"' + cell.replace('"', '""') + '"' for cell in row) + "\n" for row in rows).encode()


def _parquet() -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(RECORDS), stream)
    return stream.getvalue()


FORMATS: dict[str, Callable[[], bytes]] = {
    "a.jsonl": _lines,
    "a.ndjson": _lines,
    "lines.json": _lines,
    "array.json": lambda: json.dumps(RECORDS, indent=2).encode(),
    "a.csv": _csv,
}


def texts(path: Path | str, text_record: str) -> list[Any]:
    return [value["answers.text"] for value in values(path, text_record=text_record)]


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("name", FORMATS)
def test_read_of_every_format_and_compression_gives_the_same_records(
    tmp_path: Path, name: str, compression: str
) -> None:
    file = tmp_path / (name + compression)
    file.write_bytes(COMPRESS[compression](FORMATS[name]()))
    assert values(file) == RECORDS


def test_read_of_parquet_gives_the_same_records(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(_parquet())
    assert values(tmp_path / "a.parquet") == RECORDS


@pytest.mark.parametrize("name", FORMATS)
def test_read_of_a_byte_order_mark_ignores_it(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(BOM + FORMATS[name]())
    assert values(tmp_path / name) == RECORDS


@pytest.mark.parametrize("name", ["a.jsonl", "lines.json", "array.json", "a.csv"])
def test_read_of_crlf_and_empty_lines_gives_the_same_records(tmp_path: Path, name: str) -> None:
    # The line break inside a CSV cell is text and stays as it is.
    raw = FORMATS[name]().replace(b"\n", b"\r\n\r\n").replace(b"two\r\n\r\nlines", b"two\nlines")
    (tmp_path / name).write_bytes(raw)
    assert values(tmp_path / name) == RECORDS


@pytest.mark.parametrize("compression", [".gz", ".zst", ".bz2", ".xz"])
def test_read_of_concatenated_compressed_parts_gives_all(tmp_path: Path, compression: str) -> None:
    file, compress = tmp_path / f"a.jsonl{compression}", COMPRESS[compression]
    file.write_bytes(compress(b'{"a": 1}\n') + compress(b'{"a": 2}\n'))
    assert values(file) == [{"a": 1}, {"a": 2}]


def test_read_of_upper_case_names_finds_format_and_compression(tmp_path: Path) -> None:
    (tmp_path / "A.JSONL.GZ").write_bytes(gzip.compress(_lines()))
    assert values(tmp_path / "A.JSONL.GZ") == RECORDS


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt", "a.jsonl.gz", "a.jsonl.zst", "a.json.zst"])
def test_read_of_an_empty_file_gives_no_records(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    assert values(tmp_path / name) == []


def test_read_of_a_csv_header_alone_gives_no_records(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("title,answers.text\n")
    assert values(tmp_path / "a.csv") == []


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
    assert texts(tmp_path / name, text_record) == expected


@pytest.mark.parametrize(("text_record", "lines"), [("file", [1]), ("paragraph", [1, 5, 8]), ("line", [1, 2, 5, 8])])
def test_read_of_plain_text_says_where_each_record_begins(tmp_path: Path, text_record: str, lines: list[int]) -> None:
    file = tmp_path / "a.txt"
    file.write_text(PLAIN)
    assert [row.where for row in read(source_data(file, text_record=text_record))] == [f"{file}:{n}" for n in lines]


@pytest.mark.parametrize("end", ["", "\n", "\n\n\n"])
def test_read_of_the_last_paragraph_is_the_same_however_the_file_ends(tmp_path: Path, end: str) -> None:
    (tmp_path / "a.txt").write_text(f"One.\n\nTwo.{end}")
    assert texts(tmp_path / "a.txt", "paragraph") == ["One.", "Two."]


@pytest.mark.parametrize("text_record", ["file", "paragraph", "line"])
def test_read_of_text_with_byte_order_mark_and_nul_keeps_the_text_alone(tmp_path: Path, text_record: str) -> None:
    (tmp_path / "a.txt").write_bytes(BOM + b"a\x00b")
    assert texts(tmp_path / "a.txt", text_record) == ["a\x00b"]


def test_read_of_lines_that_end_in_several_ways_gives_each(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\rtwo\nthree\r\nfour\r\r\nfive\x0b\xe2\x80\xa8six\r\r\rseven")
    rows = list(read(source_data(tmp_path / "a.txt", text_record="line")))
    assert [row.value["answers.text"] for row in rows] == ["one", "two", "three", "four", "five\x0b\u2028six", "seven"]
    assert [row.where.rpartition(":")[2] for row in rows] == ["1", "2", "3", "4", "5", "8"]


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
def test_read_of_json_laid_out_otherwise_gives_the_record(tmp_path: Path, raw: str, mark: bytes) -> None:
    (tmp_path / "a.json").write_bytes(mark + raw.encode())
    assert values(tmp_path / "a.json") == RECORDS[:1]


def test_read_of_json_objects_over_several_lines_gives_each_and_counts_them(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("\n".join(json.dumps(record, indent=2) for record in RECORDS))
    rows = list(read(source_data(tmp_path / "a.json")))
    assert [row.value for row in rows] == RECORDS
    assert [row.where.rpartition(":")[2] for row in rows] == ["1", "2", "3"]


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
def test_read_of_json_that_breaks_off_within_a_value_is_refused_whole(
    tmp_path: Path, raw: bytes, number: int, message: str
) -> None:
    (tmp_path / "a.json").write_bytes(raw)
    with pytest.raises(StageError, match=f"a.json:{number}: {message}"):
        values(tmp_path / "a.json", on_bad_record="skip")


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
    assert values(tmp_path / "a.csv") == expected


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b",,\na,b,c\n", "1: the header has no names"),
        (b",title,,text\n", "1: the header has no name for columns 1 and 3"),
        (b"title,text,,\na,b,,note\n", "2: column 4 holds 'note', but has no name"),
        (b"title,text,\na,b,,\n", "2: 4 columns, not as many as the header's 3"),
        (b"title,text\na,b,\n", "2: 3 columns, not as many as the header's 2"),
        (b"title,text,\na\n", "2: 1 columns, not as many as the header's 3"),
    ],
)
def test_read_of_csv_with_columns_without_a_name_says_which(tmp_path: Path, raw: bytes, message: str) -> None:
    (tmp_path / "a.csv").write_bytes(raw)
    with pytest.raises((StageError, BadRecordError), match=message):
        for row in read(source_data(tmp_path / "a.csv")):
            raise BadRecordError(f"{row.where}: {row.value}")


# -- two of one name ---------------------------------------------------------------------------------------------------


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
def test_read_of_json_that_repeats_a_key_is_a_bad_record_where_it_is_looked_up(
    tmp_path: Path, layout: bytes, value: bytes, name: str, key: str
) -> None:
    (tmp_path / "a.json").write_bytes(layout % value)
    found = values(tmp_path / "a.json")
    (bad,) = [value for value in found if value]
    with pytest.raises(BadRecordError, match=f"an object has two keys {re.escape(key)}: "):
        lookup(pickle.loads(pickle.dumps(bad)), name)
    assert [value for value in found if value is not bad] == [{}] * layout.count(b"{")


@pytest.mark.parametrize("column", ["q_id", "title", "selftext_urls"])
def test_to_record_of_json_that_repeats_a_key_is_bad_where_it_is_used(tmp_path: Path, column: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(
        b'{"title": "t", "answers.text": "x", "more": [[{"x": 1, "x": 2}]], "y": 1, "y": 2}\n'
        b'{"title": "t", "answers.text": "x", "%s": null, "%s": null}\n' % (column.encode(), column.encode())
    )
    good, bad = values(tmp_path / "a.jsonl")
    assert to_record(good, Columns(title="title", texts=["answers.text"]))[0]["answers"]["text"] == ["x"]
    with pytest.raises(BadRecordError, match=f"two keys '{column}'"):
        to_record(bad, Columns(title="title", texts=["answers.text"]))


# -- places ------------------------------------------------------------------------------------------------------------


def test_read_of_a_directory_takes_its_files_by_name_without_hidden_and_unknown(tmp_path: Path) -> None:
    kept = ["a.jsonl", "b/c.jsonl", "b/d.csv", "e.jsonl.gz"]
    for number, name in enumerate(reversed(kept)):
        raw = f'{{"n": {number}}}\n' if "jsonl" in name else f"n\n{number}\n"
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(gzip.compress(raw.encode()) if name.endswith(".gz") else raw.encode())
    for name in (".hidden.jsonl", ".cache/x.jsonl", "b/.x/y.jsonl", "picture.png", "no_suffix", "a.jsonl.zip"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"n": "not to be read"}\n')
    rows = list(read(source_data(tmp_path)))
    assert [row.where.rsplit(":", 1)[0] for row in rows] == [str(tmp_path / name) for name in kept]
    assert [int(row.value["n"]) for row in rows] == [3, 2, 1, 0]


def test_read_below_a_hidden_directory_that_the_path_names_is_done(tmp_path: Path) -> None:
    write_jsonl(tmp_path / ".data/a.jsonl", [1])
    assert values(tmp_path / ".data") == [1]


def test_read_of_a_directory_named_like_a_file_reads_it(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "corpus.json/a.jsonl", [1])
    assert values(tmp_path / "corpus.json") == [1]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.csv", "array.json", "a.parquet"])
@pytest.mark.parametrize("query", ["", "?download=true"])
def test_read_over_http_gives_the_same_records(tmp_path: Path, name: str, query: str) -> None:
    stem, compression = (name.rsplit(".", 1)[0], Path(name).suffix) if name.count(".") == 2 else (name, "")
    raw = _parquet() if name.endswith("parquet") else COMPRESS[compression](FORMATS[stem]())
    (tmp_path / name).write_bytes(raw)
    with serving_files(tmp_path) as url:
        assert values(f"{url}/{name}{query}") == RECORDS


def test_read_over_http_of_text_with_links_reads_the_text(tmp_path: Path) -> None:
    with serving_files(tmp_path) as url:
        text = f"see <a href='other.txt'>this</a> or {url}/page.txt/part.txt"
        (tmp_path / "page.txt").write_text(text)
        assert texts(f"{url}/page.txt", "file") == [text]


def test_read_of_an_http_directory_reads_the_files_that_it_lists(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", ".c.jsonl", "d.png"):
        write_jsonl(tmp_path / name, [name])
    with serving_files(tmp_path) as url:
        assert values(url + "/") == ["a.jsonl", "b.jsonl"]


def test_read_over_http_of_an_absent_file_names_the_url(tmp_path: Path) -> None:
    with (
        serving_files(tmp_path) as url,
        pytest.raises(StageError, match=f"data.path={url}/a.jsonl: there is no such file"),
    ):
        values(f"{url}/a.jsonl")


def test_read_of_a_server_that_is_gone_names_the_url(tmp_path: Path) -> None:
    with serving_files(tmp_path) as url:
        pass
    with pytest.raises(StageError, match=f"data.path={url}/a.jsonl"):
        values(f"{url}/a.jsonl")


# -- what is wrong -----------------------------------------------------------------------------------------------------

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
def test_read_of_a_malformed_record_says_where_and_what(
    tmp_path: Path, name: str, raw: bytes, line: int, message: str
) -> None:
    file = tmp_path / name
    file.write_bytes(raw)
    rows = list(read(source_data(file, text_record="line")))
    (bad,) = [row for row in rows if isinstance(row.value, BadRecordError)]
    assert bad.where == f"{file}:{line}"
    with pytest.raises(BadRecordError, match=message):
        raise bad.value


@pytest.mark.parametrize("bad", [b'"a"b,c', b"a", b"a,\xff"])
def test_read_of_a_malformed_csv_record_goes_on_with_the_next(tmp_path: Path, bad: bytes) -> None:
    (tmp_path / "a.csv").write_bytes(b"title,text\n" + bad + b"\nd,e\nf,g\n")
    good = [value for value in values(tmp_path / "a.csv") if not isinstance(value, BadRecordError)]
    assert good == [{"title": "d", "text": "e"}, {"title": "f", "text": "g"}]


def test_read_of_every_format_says_where_a_record_stands(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [1, 2])
    (tmp_path / "b.json").write_text("[1, 2]")
    (tmp_path / "c.csv").write_text('t\n"1\n1"\n2\n')
    (tmp_path / "d.parquet").write_bytes(_parquet())
    where = [row.where.removeprefix(f"{tmp_path}/") for row in read(source_data(tmp_path))]
    assert where == [
        *("a.jsonl:1", "a.jsonl:2", "b.json:1", "b.json:2"),
        *("c.csv:2", "c.csv:4", "d.parquet:1", "d.parquet:2", "d.parquet:3"),
    ]


@pytest.mark.parametrize("compression", [".gz", ".zst", ".bz2", ".xz"])
@pytest.mark.parametrize("damage", ["truncated", "nonsense"])
def test_read_of_a_damaged_compressed_file_names_it(tmp_path: Path, compression: str, damage: str) -> None:
    raw = "".join(json.dumps(record) + "\n" for record in questions(500)).encode()
    file = tmp_path / f"a.jsonl{compression}"
    file.write_bytes(COMPRESS[compression](raw)[:-20] if damage == "truncated" else b"nonsense" * 10)
    with pytest.raises(StageError, match=f"{file} is damaged or cut short"):
        values(file)


@pytest.mark.parametrize("raw", [b"", b"PAR1", b"nonsense" * 10, _parquet()[:-5]])
def test_read_of_a_damaged_parquet_file_names_it(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "a.parquet").write_bytes(raw)
    with pytest.raises(StageError, match=f"{tmp_path / 'a.parquet'} is damaged or cut short"):
        values(tmp_path / "a.parquet")
