"""Artifacts: written atomically, with equal bytes for equal rows, readable across shards, with errors for damage."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from data_helpers import REPOSITORY, make_record_batch, no_deadline, read_contents, write_shards
from hypothesis import given
from hypothesis import strategies as st

from stages.core.artifacts import (
    Blocks,
    Documents,
    choose_token_dtype,
    copy_files,
    get_versions,
    list_shards,
    read_batches,
    read_json,
    to_arrow,
    to_numpy,
    write_directory,
    write_json,
    write_shard,
    write_text,
)  # fmt: skip
from stages.core.errors import StageError

DOCUMENT = pa.schema([("input_ids", pa.large_list(pa.uint16())), ("num_bytes", pa.int32())])
BLOCK = pa.schema([("input_ids", pa.list_(pa.uint16(), 3))])
ROWS = [[1, 2], [], [3], [4, 5, 6, 7], [], [8], [9, 10]]


def write_documents(directory: Path, rows: Sequence[Sequence[int]], at_once: int, per_shard: int | None = None) -> Path:
    arrays = [np.array(row, np.uint16) for row in rows]
    cut = [arrays[start : start + at_once] for start in range(0, len(rows), at_once)]
    batches = [make_record_batch(batch, [10 * len(row) for row in batch], DOCUMENT) for batch in cut]
    return write_shards(directory, DOCUMENT, batches, per_shard)


def write_blocks(directory: Path, num_blocks: int, at_once: int, per_shard: int | None = None) -> Path:
    batches = []
    for start in range(0, num_blocks, at_once):
        ids = np.arange(3 * start, 3 * min(start + at_once, num_blocks), dtype=np.uint16)
        batches.append(pa.record_batch([pa.FixedSizeListArray.from_arrays(to_arrow(ids), 3)], schema=BLOCK))
    return write_shards(directory, BLOCK, batches, per_shard)


# -- atomic writes -----------------------------------------------------------------------------------------------------


def write_artifact(out: Path, text: str = "new") -> None:
    with write_directory(out, ["stats.json"]) as directory:
        (directory / "stats.json").write_text(text)


def test_staged_block_that_ends_well_takes_the_name(tmp_path: Path) -> None:
    with write_directory(tmp_path / "deep/out", ["a"]) as directory:
        (directory / "a").write_text("new")
        assert not (tmp_path / "deep/out").exists()
    assert read_contents(tmp_path) == {"deep/out/a": b"new"}


def test_staged_block_that_ends_well_replaces_an_artifact(tmp_path: Path) -> None:
    write_artifact(tmp_path / "out", "old")
    (tmp_path / "out/more").write_text("")
    with write_directory(tmp_path / "out", ["stats.json"]) as directory:
        (directory / "stats.json").write_text("new")
        assert read_contents(tmp_path / "out") == {"stats.json": b"old", "more": b""}
    assert read_contents(tmp_path) == {"out/stats.json": b"new"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("before", [False, True])
def test_staged_block_that_fails_leaves_what_was_there(
    tmp_path: Path, error: type[BaseException], before: bool
) -> None:
    if before:
        write_artifact(tmp_path / "out", "old")
    with pytest.raises(error), write_directory(tmp_path / "out", ["stats.json"]) as directory:
        (directory / "stats.json").write_text("half")
        raise error
    assert read_contents(tmp_path) == ({"out/stats.json": b"old"} if before else {})
    assert [path.name for path in tmp_path.iterdir()] == ["out"] * before


def test_staged_after_a_killed_run_removes_what_it_left(tmp_path: Path) -> None:
    program = (
        "import os, sys\nfrom stages.core.artifacts import write_directory\n"
        "with write_directory(sys.argv[1], ['a']) as directory:\n    (directory / 'b').write_text('')\n"
        "    os._exit(1)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "out")], cwd=REPOSITORY, check=False)
    assert len(list(tmp_path.iterdir())) == 1
    write_artifact(tmp_path / "out")
    assert read_contents(tmp_path) == {"out/stats.json": b"new"}


def test_staged_leaves_what_a_running_process_fills(tmp_path: Path) -> None:
    with write_directory(tmp_path / "out", ["stats.json"]) as slow:
        (slow / "stats.json").write_text("slow")
        write_artifact(tmp_path / "out", "fast")
        assert read_contents(tmp_path / "out") == {"stats.json": b"fast"}
    assert read_contents(tmp_path) == {"out/stats.json": b"slow"}


@pytest.mark.parametrize("again", [False, True], ids=["lost", "lost and made again"])
def test_staged_directory_that_was_lost_is_an_error_and_no_half_artifact(tmp_path: Path, again: bool) -> None:
    write_artifact(tmp_path / "out", "old")
    with (
        pytest.raises(StageError, match="changed by another process"),
        write_directory(tmp_path / "out", ["stats.json"]) as directory,
    ):
        shutil.rmtree(directory)
        if again:
            write_text(directory / "stats.json", "half")
    assert read_contents(tmp_path) == {"out/stats.json": b"old"}


def test_staged_directory_without_an_expected_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StageError), write_directory(tmp_path / "out", ["stats.json", "a"]) as directory:
        (directory / "a").write_text("")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("out", ["", " ", ".", "./", "..", "../..", "sub/..", "/", "sub/../.."])
def test_out_that_holds_the_workspace_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str) -> None:
    place = tmp_path / "a/b"
    (place / "sub").mkdir(parents=True)
    monkeypatch.chdir(place)
    (place / "kept").write_text("")
    for write in (lambda: write_artifact(out), lambda: write_text(out, "x")):  # type: ignore[arg-type]
        with pytest.raises(StageError, match="it contains the workspace"):
            write()
    assert read_contents(tmp_path) == {"a/b/kept": b""}


@pytest.mark.parametrize(
    "names", [["kept"], ["stats.json", ".git/HEAD"], ["sub/stats.json"], [".hidden", "stats.json"]]
)
def test_out_that_is_a_directory_of_another_kind_is_refused(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(StageError, match="the directory exists and was not written by this stage"):
        write_artifact(tmp_path / "out")
    with pytest.raises(StageError, match="a directory of that name exists"):
        write_text(tmp_path / "out", "x")
    assert read_contents(tmp_path) == {f"out/{name}": b"mine" for name in names}


def test_out_that_is_a_file_is_refused_for_a_directory(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(StageError, match="a file of that name exists"):
        write_artifact(tmp_path / "out")
    assert read_contents(tmp_path) == {"out": b"mine"}


def test_out_that_is_a_link_to_a_directory_is_refused(tmp_path: Path) -> None:
    write_artifact(tmp_path / "far", "mine")
    (tmp_path / "out").symlink_to(tmp_path / "far")
    with pytest.raises(StageError, match="symbolic link"):
        write_artifact(tmp_path / "out")
    assert read_contents(tmp_path / "far") == {"stats.json": b"mine"}


def test_out_that_is_an_empty_directory_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write_artifact(tmp_path / "out")
    assert read_contents(tmp_path) == {"out/stats.json": b"new"}


WRITER = """
import sys, time
from pathlib import Path
from stages.core.artifacts import write_directory
out, name = sys.argv[1:]
for number in range(300):
    with write_directory(out, ["a", "b"]) as directory:
        (directory / "a").write_text(f"{name}{number}")
        (directory / "b").write_text(f"{name}{number}")
"""


def test_staged_by_several_writers_at_once_leaves_a_whole_artifact_of_one(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path / "out")]
    writers = [subprocess.Popen([*command, name], cwd=REPOSITORY, stderr=subprocess.PIPE) for name in "xyz"]
    codes = [writer.wait() for writer in writers]
    found = read_contents(tmp_path)
    assert codes == [0, 0, 0], [writer.stderr.read() for writer in writers if writer.stderr]
    assert found.keys() == {"out/a", "out/b"}
    assert found["out/a"] == found["out/b"]


def test_write_text_replaces_and_leaves_nothing_aside(tmp_path: Path) -> None:
    for text in ("old and longer", "naïve"):
        write_text(tmp_path / "deep/a.txt", text)
    assert read_contents(tmp_path) == {"deep/a.txt": "naïve".encode()}


@pytest.mark.parametrize("value", [{"b": 1, "a": [None, 0.1, "北京"]}, [], "x", 1e-300])
def test_write_json_gives_back_the_value_and_the_order(tmp_path: Path, value: object) -> None:
    write_json(tmp_path / "a.json", value)
    assert json.dumps(read_json(tmp_path / "a.json")) == json.dumps(value)


def test_write_json_of_a_number_that_json_lacks_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", float("nan"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("raw", [b"", b'{"a": ', b"\xff"])
def test_read_json_of_a_damaged_file_names_it(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "a.json").write_bytes(raw)
    with pytest.raises(StageError, match=f"{tmp_path / 'a.json'} is damaged"):
        read_json(tmp_path / "a.json")


def test_versions_are_those_installed_sorted_by_name() -> None:
    found = get_versions("pyarrow", "numpy")
    assert list(found.items()) == [("numpy", np.__version__), ("pyarrow", pa.__version__)]


def test_free_copy_copies_files_but_for_those_left(tmp_path: Path) -> None:
    for name in ("from/a", "from/b", "from/deep/c"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "from/a").chmod(0o444)
    (tmp_path / "to").mkdir()
    copy_files(tmp_path / "from", tmp_path / "to", exclude=["b"])
    assert read_contents(tmp_path / "to") == {"a": b"from/a"}
    (tmp_path / "to/a").open("ab").close()  # writable


# -- shards ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "dtype"), [(1, np.uint16), (65_536, np.uint16), (65_537, np.uint32)])
def test_token_dtype_is_the_narrowest(size: int, dtype: type) -> None:
    assert choose_token_dtype(size) == dtype


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.int32, np.int64])
@pytest.mark.parametrize("values", [[], [1], [5, 0, 65_535]])
def test_to_numpy_of_to_arrow_gives_back_values_and_dtype(dtype: type, values: list[int]) -> None:
    back = to_numpy(to_arrow(np.array(values, dtype)))
    assert (back.tolist(), back.dtype) == (values, dtype)


def test_to_numpy_of_a_slice_gives_the_slice() -> None:
    assert to_numpy(to_arrow(np.arange(9, dtype=np.uint16))[3:5]).tolist() == [3, 4]


@pytest.mark.parametrize("per_shard", [1, 2, None])
def test_shards_written_again_are_the_same_bytes(tmp_path: Path, per_shard: int | None) -> None:
    one, two = (read_contents(write_documents(tmp_path / name, ROWS, 2, per_shard)) for name in ("one", "two"))
    assert one == two


def test_shard_whose_batches_fail_raises_the_error_itself(tmp_path: Path) -> None:
    def batches() -> Iterator[pa.RecordBatch]:
        raise KeyError
        yield

    with pytest.raises(KeyError):
        write_shard(tmp_path / "d/shard-00000.arrow", DOCUMENT, batches())


def test_documents_of_no_batch_are_none(tmp_path: Path) -> None:
    documents = Documents(write_documents(tmp_path / "d", [], 1))
    assert (len(documents), documents.num_bytes.tolist()) == (0, [])


@pytest.mark.parametrize("per_shard", [1, 2, None])
@pytest.mark.parametrize("at_once", [1, 2, 3, 7])
def test_documents_across_batches_and_shards_are_those_written(
    tmp_path: Path, at_once: int, per_shard: int | None
) -> None:
    documents = Documents(write_documents(tmp_path / "d", ROWS, at_once, per_shard))
    assert [documents[i].tolist() for i in range(len(documents))] == ROWS
    assert documents.num_bytes.tolist() == [10 * len(row) for row in ROWS]


@no_deadline
@given(rows=st.lists(st.lists(st.integers(0, 2**16 - 1), max_size=4), max_size=12), at_once=st.integers(1, 5))
def test_documents_of_any_rows_are_those_written(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[int]], at_once: int
) -> None:
    documents = Documents(write_documents(tmp_path_factory.mktemp("any"), rows, at_once))
    assert [documents[i].tolist() for i in range(len(documents))] == rows


@pytest.mark.parametrize("per_shard", [1, 2, None])
@pytest.mark.parametrize("at_once", [1, 2, 7])
def test_blocks_across_batches_and_shards_are_those_written_in_any_order(
    tmp_path: Path, at_once: int, per_shard: int | None
) -> None:
    blocks = Blocks(write_blocks(tmp_path / "b", 7, at_once, per_shard))
    whole = np.arange(21).reshape(7, 3)
    assert (len(blocks), blocks.block_size) == (7, 3)
    assert blocks[range(7)].tolist() == whole.tolist()
    assert blocks[[6, 0, 3, 3]].tolist() == whole[[6, 0, 3, 3]].tolist()


def test_blocks_of_an_empty_split_name_the_directory(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=f"{tmp_path / 'b'} has no blocks"):
        Blocks(write_blocks(tmp_path / "b", 0, 1))


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_shard_batches_of_a_truncated_shard_names_it(tmp_path: Path, keep: int) -> None:
    file = list(list_shards(write_documents(tmp_path / "d", ROWS, 2, per_shard=1)))[1]
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(StageError, match=f"{file} is damaged.*dvc repro"):
        list(read_batches(tmp_path / "d"))


@pytest.mark.parametrize("reader", [Documents, Blocks, list_shards])
def test_reading_a_directory_without_shards_names_it(tmp_path: Path, reader: type) -> None:
    with pytest.raises(StageError, match=f"{tmp_path} has no shards"):
        reader(tmp_path)
