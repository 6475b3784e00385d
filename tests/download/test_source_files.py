"""Which files a path names, of which format, and of which split."""

from pathlib import Path

import pytest

from stages.core.errors import StageError
from stages.download.files import find_files, format_of, own_split


@pytest.mark.parametrize("name", ["absent.jsonl", "absent", "empty"])
def test_find_files_where_there_are_none_names_the_path(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/picture.png").write_bytes(b"")
    with pytest.raises(StageError, match=f"data.path={tmp_path / name}: no such file"):
        find_files(str(tmp_path / name))


@pytest.mark.parametrize("name", ["a.docx", "a", "a.jsonl.zip", "a.gz"])
def test_find_files_of_an_unknown_suffix_names_the_file_and_the_known(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(StageError, match=rf"data.path={tmp_path / name}: unknown format.*\.jsonl.*\.parquet"):
        find_files(str(tmp_path / name))


def test_find_files_of_an_unknown_protocol_names_it() -> None:
    with pytest.raises(StageError, match=r"data\.path=nope://a\.jsonl: .*nope"):
        find_files("nope://a.jsonl")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jsonl", "jsonl"),
        ("a.b.jsonl.zst", "jsonl"),
        ("x/A.CSV", "csv"),
        ("http://h/a.json.gz?v=1.txt", "json"),
        ("a.md", "text"),
        ("a.gz", None),
        ("a.zip", None),
        ("a.jsonl.gz.zst", None),
        ("jsonl", None),
    ],
)
def test_format_of_a_name_is_its_suffix_below_a_compression(name: str, expected: str | None) -> None:
    assert format_of(name) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("train", "train"),
        ("d/train-00000-of-00002.parquet", "train"),
        ("TEST.jsonl", "test"),
        ("d/valid.csv", "validation"),
        ("val.json", "validation"),
        ("dev_1.txt", "validation"),
        ("validation.parquet", "validation"),
        ("test/part-0.jsonl", "test"),
        ("train/validation.jsonl", "validation"),
        ("training.jsonl", None),
        ("testimony.txt", None),
        ("my_train.jsonl", None),
        ("latest/a.jsonl", None),
        ("a.jsonl", None),
    ],
)
def test_own_split_of_a_name_is_the_word_that_it_begins_with(name: str, expected: str | None) -> None:
    assert own_split(name) == expected
