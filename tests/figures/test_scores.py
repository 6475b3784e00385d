"""Tables of scores: their columns from download's records, and their bytes."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import write_records

from stages.core.errors import StageError
from stages.figures.scores import Scores, add_scores, get_scores, read_record_columns, read_scores, write_scores

TEXTS = ["one", "two", "three", "four"]
SCORES = Scores(np.array([3, 4]), np.array([1, 2]), np.array([0.1, 1e-300]))


def test_records_have_their_number_source_and_groups(tmp_path):
    groups = {"lang": ["en", None, "de", "fr"], "a.b": ["1", "2", None, "4"]}
    file = write_records(tmp_path / "a.parquet", TEXTS, groups, ["x", "y", "y", "x"], ["", "q2", "", ""], rows=3)
    assert read_record_columns([file], np.array([1, 2])).to_pylist() == [
        {"record": 1, "q_id": "q2", "source": "y", "groups": {"lang": None, "a.b": "2"}},
        {"record": 2, "q_id": "", "source": "y", "groups": {"lang": "de", "a.b": None}},
    ]


def test_records_without_groups_and_ids_have_a_number_and_a_source(tmp_path):
    file = write_records(tmp_path / "a.parquet", TEXTS)
    assert read_record_columns([file], np.array([3])).to_pylist() == [{"record": 3, "source": "toy"}]
    assert read_record_columns([file], np.array([], np.int64)).schema.names == ["record", "source"]


def test_records_of_several_files_are_counted_through(tmp_path):
    files = [write_records(tmp_path / f"{name}.parquet", TEXTS, sources=[name] * 4) for name in "abc"]
    table = read_record_columns(files, np.array([0, 4, 11]))
    assert table.column("source").to_pylist() == ["a", "b", "c"]


@pytest.mark.parametrize("missing", [["source"], ["source", "groups"]])
def test_records_without_a_source_are_an_error_that_names_the_file(tmp_path, missing):
    file = write_records(tmp_path / "a.parquet", TEXTS, {"lang": ["en"] * 4})
    pq.write_table(pq.read_table(file).drop_columns(missing), file)
    with pytest.raises(StageError, match=f"{file} is damaged .no column source"):
        read_record_columns([file], np.array([0]))


def test_records_fewer_than_documents_are_an_error_that_names_the_file(tmp_path):
    file = write_records(tmp_path / "a.parquet", TEXTS)
    with pytest.raises(StageError, match=f"{file} is damaged .it ends before record 4"):
        read_record_columns([file], np.array([4]))


def test_scores_are_read_as_they_were_written(tmp_path):
    described = read_record_columns([write_records(tmp_path / "a.parquet", TEXTS)], np.array([1, 2]))
    table = add_scores(described, SCORES, "bits_before")
    for name in ("one", "two"):
        write_scores(tmp_path / name, table)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    again = read_scores(tmp_path / "one")
    assert again == table
    found = get_scores(again, "bits_before")
    assert all(np.array_equal(one, other) for one, other in zip(found, SCORES, strict=True))
    after = add_scores(again, SCORES._replace(bits=SCORES.bits * 2), "bits_after")
    assert after.schema.names == ["record", "source", "bytes", "tokens", "bits_before", "bits_after"]
    assert after.schema.types == [pa.int64(), pa.string(), pa.int64(), pa.int64(), pa.float64(), pa.float64()]


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no Parquet at all"])
def test_scores_that_are_damaged_are_an_error_that_names_the_file(tmp_path, content):
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(StageError, match=f"{tmp_path}/a.parquet is damaged"):
        read_scores(tmp_path / "a.parquet")


def test_scores_without_their_columns_are_an_error_that_names_the_file(tmp_path):
    file = write_records(tmp_path / "a.parquet", TEXTS)
    with pytest.raises(StageError, match=f"{file} is damaged .no column bits_before and no bytes and no record"):
        read_scores(file)
