"""texts: documents are built from records, one row group at a time, and errors name a damaged file."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.core.errors import StageError
from stages.tokens.texts import Flatten, TextFile

ANSWERS = Flatten(columns=["answers.text"], joiner=" ")
ROWS = [
    {"title": "T", "selftext": "S", "answers": {"text": ["one", "two"]}},
    {"title": "U", "selftext": "", "answers": {"text": []}},
    {"title": "", "selftext": "", "answers": {"text": ["", "three", ""]}},
    {"title": "", "selftext": "W", "answers": {"text": ["", ""]}},
]


def read_texts(file: TextFile) -> list[str]:
    return [text for group in file for text in group.texts.to_pylist()]


def write_parquet(file: Path, rows: list[dict[str, Any]], row_group_size: int = 1000) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=row_group_size)
    return file


@pytest.mark.parametrize("rows", [1, 2, 3, 1000])
@pytest.mark.parametrize(
    ("columns", "joiner", "expected"),
    [
        (["answers.text"], " ", ["one two", "", "three", ""]),
        (["title", "selftext", "answers.text"], "\n\n", ["T\n\nS\n\none\n\ntwo", "U", "three", "W"]),
        (["selftext", "title"], "", ["ST", "U", "", "W"]),
        (["title"], " ", ["T", "U", "", ""]),
    ],
)
def test_texts_of_chosen_columns_join_non_empty_values(
    tmp_path: Path, rows: int, columns: list[Any], joiner: str, expected: list[str]
) -> None:
    file = TextFile(write_parquet(tmp_path / "a.parquet", ROWS, rows), Flatten(columns=columns, joiner=joiner))
    assert (read_texts(file), file.num_documents) == (expected, 4)
    assert read_texts(file) == expected  # a second iteration gives the same texts


def test_texts_of_chosen_row_groups_are_in_the_given_order(tmp_path: Path) -> None:
    file = TextFile(write_parquet(tmp_path / "a.parquet", ROWS, 1), ANSWERS)
    assert [group.texts.to_pylist() for group in file.read_groups([2, 0])] == [["three"], ["one two"]]
    assert list(file.read_groups([])) == []


@pytest.mark.parametrize("keep", [0, 100, -20])
def test_truncated_file_is_an_error_that_names_it(tmp_path: Path, keep: int) -> None:
    file = write_parquet(tmp_path / "a.parquet", ROWS)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(StageError, match=f"{file} is damaged"):
        TextFile(file, ANSWERS)


def test_file_with_damaged_pages_is_an_error_that_names_it(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", ROWS * 100)
    data = bytearray(file.read_bytes())
    data[4:60] = b"x" * 56
    file.write_bytes(data)
    with pytest.raises(StageError, match=f"{file} is damaged"):
        read_texts(TextFile(file, Flatten(columns=["title"], joiner=" ")))


@pytest.mark.parametrize("rows", [1, 2, 3, 1000])
@pytest.mark.parametrize(
    ("sources", "records"),
    [(["a"], [0, 3]), (["b"], [1]), (["c", "a"], [0, 2, 3]), (["a", "b", "c"], [0, 1, 2, 3]), (["d"], [])],
)
def test_texts_of_chosen_sources_are_those_of_their_records(
    tmp_path: Path, rows: int, sources: list[str], records: list[int]
) -> None:
    named = [{**row, "source": source} for row, source in zip(ROWS, "abca", strict=True)]
    path = write_parquet(tmp_path / "a.parquet", named, rows)
    file, whole = TextFile(path, ANSWERS, sources), read_texts(TextFile(path, ANSWERS))
    assert file.records is not None and file.records.tolist() == records
    assert (read_texts(file), file.num_documents) == ([whole[record] for record in records], len(records))
    assert all(len(group) for group in file) and file.group_starts[-1] == len(records)
    starts = [shard.first_document for shard in file.plan_shards(1)]
    assert starts == file.group_starts[:-1].tolist() or (starts, records) == ([0], [])
