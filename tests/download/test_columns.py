"""Records read as columns equal records read one by one, for any content."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from data_helpers import make_source_data, make_split, no_deadline
from hypothesis import given
from hypothesis import strategies as st

from stages.download import batches
from stages.download.batches import Batch, Rules
from stages.download.columns import IrregularError, read_regular
from stages.download.json_lines import parse_json_lines
from stages.download.parts import read_part
from stages.download.records import KEPT, list_required_columns, list_used_columns
from stages.download.schema import Columns
from stages.download.sources import Part, read_file_parts

DATA = make_source_data(
    "x.jsonl",
    columns=Columns(title="title", texts=["answers.text", "body"]),
    filter={"kind": ["a", 1, True]},
    groups=["lang", "meta.year"],
    split=make_split(key=["title", "lang"]),
)
NESTED: dict[str, Any] = {
    "q_id": "1",
    "title": "Why?",
    "selftext": "I wonder",
    "answers": {"text": ["One.", "[deleted]", "Two"], "a_id": ["a", "b", "c"], "score": [1, 2, 3]},
    "body": "More",
    "title_urls": {"url": ["http://x.org"]},
    "kind": "a",
    "lang": "en",
    "meta": {"year": 2001},
    "unused": [{"deep": [1, None, "x"]}],
}
LISTED = NESTED | {"answers": [{"text": "One.", "score": 5}, {"text": " \u2003", "score": 6}], "title_urls": ["x"]}
FLATTENED = {key: value for key, value in NESTED.items() if key not in ("answers", "meta")} | {
    "answers.text": "One.",
    "meta.year": True,
}
SHAPES = [NESTED, LISTED, FLATTENED]


def judge_part(part: Part, monkeypatch: pytest.MonkeyPatch | None, data: Any = DATA) -> Batch:
    """Read the batch of `part`; with `monkeypatch`, read its records one by one."""

    def refuse(*_: Any) -> Any:
        raise IrregularError("forced")

    if monkeypatch is None:
        return read_part(Rules(data, "s"), part)
    with monkeypatch.context() as patch:
        patch.setattr(batches, "read_regular", refuse)
        return read_part(Rules(data, "s"), part)


def to_comparable(batch: Batch) -> list[Any]:
    """Convert `batch` to a list that can be compared."""
    dropped = batch.num_dropped[batch.verdicts <= 1].tolist()  # of valid records that pass the filter
    arrays = [batch.verdicts.tolist(), dropped, batch.split_hashes.tolist(), batch.num_characters.tolist()]
    return [
        batch.own_split,
        *arrays,
        batch.digests.tolist(),
        batch.first_messages,
        batch.table.to_pylist(),
        batch.table.schema,
    ]


def make_part(lines: list[bytes]) -> Part:
    return Part("x.jsonl", None, 1, b"\n".join(lines), [])


def assert_same_when_read_singly(part: Part, data: Any = DATA) -> Batch:
    with pytest.MonkeyPatch.context() as monkeypatch:
        fast, careful = judge_part(part, None, data), judge_part(part, monkeypatch, data)
    assert to_comparable(fast) == to_comparable(careful)
    return fast


def find_regular_lines(lines: list[bytes], data: Any = DATA) -> list[bool]:
    """Return True for lines that are read as columns, [num_lines]."""
    parsed = parse_json_lines(b"\n".join(lines), list_used_columns(data), list_required_columns(data))
    return list(read_regular(data, "s", parsed).is_regular.tolist())


@pytest.mark.parametrize("shape", SHAPES, ids=["nested", "listed", "flattened"])
def test_read_part_of_regular_lines_reads_them_as_columns(shape: dict[str, Any]) -> None:
    lines = [json.dumps(shape | {"title": f"Title {number}"}).encode() for number in range(30)]
    assert find_regular_lines(lines) == [True] * 30
    assert (assert_same_when_read_singly(make_part(lines)).verdicts == KEPT).all()


_SCALAR = st.sampled_from(
    [
        *("", "a", "en", " \u2003\x1f", "[deleted]", "\n[removed] ", "é🙂\x00", "!?", "ﬁ ß", "Inf", "\ud800", "\udc00"),
        *(None, True, 1, 0, -1, 1.0, 2**63, 2**70, 1e300, float("inf")),
        *([], {}, [None], ["x", None], [["x"]], [1], [1.5], [True], [{"text": "y"}]),
        *({"text": None}, {"text": ["a"], "a_id": [1]}, {"text": ["a"], "score": [1.0]}, {"url": None}, {"url": "u"}),
        *({"year": 1}, {"year": None}, {"year": 1.5}, {"year": {}}),
    ]
)
_KEYS = ["title", "answers", "answers.text", "answers.a_id", "answers.score", "body", "q_id", "selftext", "subreddit"]
_KEYS += ["kind", "lang", "meta", "meta.year", "title_urls", "title_urls.url", "unused", "document"]


@st.composite
def changed_lines(draw: Callable[..., Any]) -> list[bytes]:
    """Lines of mostly regular records: some with other values, a missing column or a repeated column."""
    shape = draw(st.sampled_from(SHAPES))
    lines = []
    for number in range(draw(st.integers(1, 12))):
        record = shape | {"title": f"Title {number}"}
        for key in draw(st.lists(st.sampled_from(_KEYS), max_size=2)):
            if draw(st.booleans()):
                record = record | {key: draw(_SCALAR)}
            else:
                record = {name: value for name, value in record.items() if name != key}
        line = json.dumps(record, ensure_ascii=draw(st.booleans()))
        if draw(st.integers(0, 9)) == 0:
            line = line[:-1] + f', "{draw(st.sampled_from(_KEYS))}": {json.dumps(draw(_SCALAR))}}}'
        lines.append(line.encode("utf-8", "surrogatepass"))
    return lines


@no_deadline
@given(changed_lines())
def test_read_part_of_lines_equals_reading_record_by_record(lines: list[bytes]) -> None:
    assert_same_when_read_singly(make_part(lines))


GOOD = json.dumps(NESTED).encode()
ODD_LINES = [
    b"",
    b"  ",
    b"[]",
    b"1",
    b"null",
    b"{}",
    b"{",
    GOOD[:-1],
    GOOD + b"x",
    GOOD + b" " + GOOD,
    GOOD + b"\r",
    b" " + GOOD,
    GOOD + b"\r" + GOOD,
    GOOD + b"\x00",
    b"\xef\xbb\xbf" + GOOD,
    GOOD.replace(b"One", b"\xff"),
    GOOD.replace(b"deep", b"\xff"),
    GOOD.replace(b"deep", rb"\ud800"),
    GOOD.replace(b"deep", rb"\u00e9\/"),
    GOOD.replace(b"One", rb"\ud83d\ude42\u0000"),
    GOOD.replace(b"One", rb"\udc00"),
    GOOD.replace(b"One", b"a\tb"),
    GOOD.replace(b"One", b"a\x7fb"),
    GOOD.replace(b'"title"', rb'"t\u0069tle"'),
    *(
        GOOD.replace(b"1, null", number)
        for number in (b"NaN", b"Infinity", b"-Infinity", b"Inf", b"[Inf]", b"-Inf", b"nan")
    ),
    *(GOOD.replace(b"1, null", number) for number in (b"01", b"1.", b".5", b"+1", b"1e999", b"1" * 400, b"0x1", b"1e")),
    *(GOOD.replace(b"2001", number) for number in (b"01", b"-0", b"1e2", b"2001.0", b"1" * 30, b"Infinity", b"NaN")),
    GOOD.replace(b"1, null", b"[" * 300 + b"]" * 300),
    GOOD.replace(b"1, null", b"[" * 100_000 + b"]" * 100_000),
    GOOD.replace(b'"deep"', b'"deep": 1, "deep"'),
    GOOD.replace(b'"body"', b'"body": "x", "body"'),
    GOOD.replace(b'"year"', b'"year": 1, "year"'),
    GOOD.replace(b'"unused"', b'"unused": 1, "unused"'),
    GOOD.replace(b'{"text"', b'{"text": [], "text"'),
    GOOD.replace(b'"kind"', b'"answers.text": null, "kind"'),
    GOOD.replace(b'"kind"', b'"answers.text": "x", "kind"'),
    GOOD.replace(b'"a", "lang"', b'"b", "lang"'),
    GOOD.replace(b"\n", b""),
    b"// comment",
]


@pytest.mark.parametrize("odd", range(len(ODD_LINES)))
@pytest.mark.parametrize("place", [0, 1, 3])
def test_read_part_with_an_odd_line_equals_reading_record_by_record(odd: int, place: int) -> None:
    lines = [GOOD.replace(b"Why", b"Why %d" % number) for number in range(3)]
    lines.insert(place, ODD_LINES[odd])
    assert_same_when_read_singly(make_part(lines))


_PARQUET = st.fixed_dictionaries(
    {
        "title": st.sampled_from(["t", "", None, "é"]),
        "answers": st.none()
        | st.fixed_dictionaries(
            {
                "text": st.none() | st.lists(st.sampled_from(["a", "", None, "[deleted]", "b c"]), max_size=3),
                "score": st.none() | st.lists(st.sampled_from([1, None, -5]), max_size=3),
            }
        ),
        "body": st.sampled_from(["x", None, " "]),
        "kind": st.sampled_from(["a", "b", None]),
        "lang": st.sampled_from(["en", None]),
        "meta": st.sampled_from([None, {"year": None}, {"year": 1.5}, {"year": 2.0}]),
        "title_urls": st.sampled_from([None, [{"url": "u"}], [{"url": None}], []]),
    }
)
_PARQUET_TYPES = {
    "large": {"title": pa.large_string(), "body": pa.dictionary(pa.int32(), pa.string()), "lang": pa.string()},
    "plain": {"title": pa.string(), "body": pa.string(), "lang": pa.string()},
    "binary": {"title": pa.string(), "body": pa.string(), "lang": pa.binary()},
}


@no_deadline
@given(st.lists(_PARQUET, min_size=1, max_size=12), st.sampled_from(list(_PARQUET_TYPES)))
def test_read_part_of_columns_equals_reading_record_by_record(records: list[dict[str, Any]], types: str) -> None:
    kinds = _PARQUET_TYPES[types]
    text = pa.list_(pa.string())
    schema = pa.schema(
        [
            ("title", kinds["title"]),
            ("answers", pa.struct([("text", text), ("score", pa.list_(pa.int32()))])),
            ("body", kinds["body"]),
            ("kind", pa.string()),
            ("lang", kinds["lang"]),
            ("meta", pa.struct([("year", pa.float64())])),
            ("title_urls", pa.list_(pa.struct([("url", pa.string())]))),
        ]
    )
    if types == "binary":
        records = [record | {"lang": None if record["lang"] is None else b"en"} for record in records]
    (batch,) = pa.Table.from_pylist(records, schema).to_batches()
    assert_same_when_read_singly(Part("x.parquet", None, 1, batch, [*schema.names, "more"]))


def test_read_file_parts_of_lines_end_at_line_ends_and_contain_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.download.sources.PART_BYTES", 1000)
    lines = [GOOD.replace(b"Why", b"Why %d" % number) for number in range(20)]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    parts = list(read_file_parts(make_source_data(tmp_path)))
    contents = [part.content.read() for part in parts]  # type: ignore[union-attr]
    assert b"".join(contents) == b"\n".join(lines)
    assert all(content.endswith(b"\n") for content in contents[:-1])
    counts = [content.count(b"\n") for content in contents]
    assert [part.first_number for part in parts] == [
        1 + count for count in itertools.accumulate(counts[:-1], initial=0)
    ]
    assert len(parts) == 5


def test_read_part_of_parquet_with_bad_text_reads_the_other_records(tmp_path: Path) -> None:
    texts = pa.Array.from_buffers(pa.string(), 3, pa.array([b"a", b"\xff", b"c"]).buffers())
    batch = pa.record_batch([pa.array(["t", "u", "v"]), texts], names=["title", "answers.text"])
    data = make_source_data("x.parquet", on_bad_record="skip")
    found = assert_same_when_read_singly(Part("x.parquet", None, 1, batch, batch.schema.names), data)
    assert found.table.column("title").to_pylist() == ["t", "v"]
