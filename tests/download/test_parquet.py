"""Parquet: only columns in use are read, and errors name the row and column."""

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import make_source_data, read_values

from stages.core.errors import StageError
from stages.download.records import BadRecordError, build_record
from stages.download.schema import Columns
from stages.download.sources import iterate_batches, read_rows


def make_table(*columns: tuple[str, Any]) -> pa.Table:
    return pa.Table.from_arrays([pa.array(items) for _, items in columns], names=[name for name, _ in columns])


def make_struct(*fields: str) -> Any:
    return pa.StructArray.from_arrays([pa.array(["x"]) for _ in fields], list(fields))


@pytest.mark.parametrize(
    ("column", "name"),
    [
        (("title", ["x"]), "'title'"),
        (("answers", make_struct("text", "score", "text")), "'answers.text'"),
        (("answers", pa.ListArray.from_arrays([0, 1], make_struct("text", "text"))), "'answers.text'"),
        (("a", pa.StructArray.from_arrays([make_struct("x\x1b", "x\x1b")], ["b"])), r"'a\.b\.x\\x1b'"),
    ],
)
def test_read_of_parquet_with_two_columns_of_the_same_name_is_refused(
    tmp_path: Path, column: tuple[str, Any], name: str
) -> None:
    pq.write_table(make_table(("title", ["t"]), column), tmp_path / "a.parquet")
    with pytest.raises(StageError, match=rf"a\.parquet:1: the file has two columns {name}: rename one"):
        read_values(tmp_path / "a.parquet", on_bad_record="skip")


BAD_VALUES = {
    "invalid UTF-8": pa.Array.from_buffers(pa.string(), 3, pa.array([b"a", b"\xff", b"c"]).buffers()),
    "date beyond 9999": pa.array([0, 2**31 - 1, 0], pa.int32()).cast(pa.date32()),
    "time beyond 9999": pa.array([0, 2**62, 0], pa.int64()).cast(pa.timestamp("us")),
    "duration": pa.array([0, 2**62, 0], pa.int64()).cast(pa.duration("s")),
}


@pytest.mark.parametrize("kind", BAD_VALUES)
@pytest.mark.parametrize("nested", [False, True])
def test_read_of_a_parquet_value_that_python_cannot_represent_is_a_bad_record(
    tmp_path: Path, kind: str, nested: bool
) -> None:
    bad = pa.StructArray.from_arrays([BAD_VALUES[kind]], ["x"]) if nested else BAD_VALUES[kind]
    name = "bad.x" if nested else "bad"
    pq.write_table(make_table(("title", ["t", "u", "v"]), ("bad", bad)), tmp_path / "a.parquet")
    rows = list(read_rows(make_source_data(tmp_path / "a.parquet", texts=name)))
    assert [isinstance(row.value, BadRecordError) for row in rows] == [False, True, False]
    assert rows[1].location.endswith("a.parquet:2")
    assert str(rows[1].value).startswith("column 'bad' contains a value that cannot be read: ")
    assert [rows[0].value["title"], rows[2].value["title"]] == ["t", "v"]


@pytest.mark.parametrize("name", ["other", "meta"])
@pytest.mark.parametrize("kind", [*BAD_VALUES, "unknown zone"])
def test_read_of_parquet_with_bad_values_in_unused_columns_ignores_them(tmp_path: Path, kind: str, name: str) -> None:
    zone = pa.array([1, 2, 3], pa.int64()).cast(pa.timestamp("us", tz="No/Where"))
    bad, body = BAD_VALUES.get(kind, zone), pa.array(["x", "y", "z"])
    meta = pa.StructArray.from_arrays(
        [body, bad] if name == "meta" else [body], ["body", "bad"][: 1 + (name == "meta")]
    )
    columns = [("meta", meta), *([("other", bad)] if name == "other" else [])]
    pq.write_table(make_table(("title", ["t", "u", "v"]), *columns), tmp_path / "a.parquet")
    found = read_values(tmp_path / "a.parquet", texts="meta.body")
    assert [(value["title"], value["meta"]) for value in found] == [(t, {"body": b}) for t, b in ("tx", "uy", "vz")]


def test_read_of_parquet_only_reads_the_columns_in_use(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    columns = {
        "title": ["t"] * 9,
        "answers.text": ["x"] * 9,
        "q_id": ["q"] * 9,
        "kind": ["k"] * 9,
        "blob": ["b" * 9] * 9,
    }
    pq.write_table(pa.table(columns), file, write_page_checksum=True)
    chunk = pq.ParquetFile(file).metadata.row_group(0).column(4)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    raw = bytearray(file.read_bytes())
    raw[start : start + chunk.total_compressed_size] = bytes(chunk.total_compressed_size)
    file.write_bytes(raw)
    found = read_values(file, filter={"kind": ["k"]})
    assert [(row["title"], row["answers.text"], row["q_id"], row["kind"]) for row in found] == [
        ("t", "x", "q", "k")
    ] * 9
    with pytest.raises(StageError, match="damaged"):
        read_values(file, texts="blob")


@pytest.mark.parametrize(
    "answers",
    [
        [{"text": ["x"], "score": [1], "a_id": ["a"]}],
        [[{"text": "x", "score": 1, "a_id": "a", "more": {"deep": [1]}}]],
        [[{"text": "x", "score": 1, "a_id": "a"}]],
    ],
    ids=["struct", "list of structs with more", "list of structs"],
)
def test_read_of_parquet_nested_as_eli5_gives_texts_with_ids_and_scores(tmp_path: Path, answers: Any) -> None:
    pairs = pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64()))
    pq.write_table(make_table(("m", pairs), ("title", ["t"]), ("answers", answers)), tmp_path / "a.parquet")
    (row,) = read_values(tmp_path / "a.parquet")
    record, _ = build_record(row, Columns(title="title", texts=["answers.text"]))
    assert record["answers"] == {"a_id": ["a"], "text": ["x"], "score": [1]}


@pytest.mark.parametrize("name", ["absent", "meta.absent", "title.absent", "answers.absent"])
def test_read_of_parquet_without_a_column_lists_the_existing_columns(tmp_path: Path, name: str) -> None:
    columns = [("z", [1]), ("title", ["t"]), ("meta", [{"a": 1}]), ("answers", [[{"text": "x"}]])]
    pq.write_table(make_table(*columns), tmp_path / "a.parquet")
    (row,) = read_values(tmp_path / "a.parquet", texts=name)
    with pytest.raises(BadRecordError, match=f"no column '{name}'; there are: z, title, meta, answers"):
        build_record(row, Columns(title="title", texts=[name]))


def test_iterate_batches_of_many_row_groups_keeps_few_in_memory(tmp_path: Path) -> None:
    texts = [os.urandom(5000).hex() for _ in range(400)]  # 4 MB that cannot be compressed
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=10, use_dictionary=False)
    before, most, found = pa.total_allocated_bytes(), 0, []
    for batch in iterate_batches(pq.ParquetFile(tmp_path / "a.parquet"), ["text"]):
        most = max(most, pa.total_allocated_bytes() - before)
        found += batch.column(0).to_pylist()
    assert found == texts
    assert most < 10**6
