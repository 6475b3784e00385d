"""Artifacts on disk: directories that appear whole, Arrow shards of token ids, and the `stats.json` ledgers."""

import contextlib
import json
import shutil
import zlib
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stages.errors import StageError

SPLITS = ("train", "validation", "test")
TokenIds = npt.NDArray[Any]  # uint16 or uint32, as token_dtype says

# A shard ends after the row that takes it past this size: decided by the data alone, so that the same tokens give the
# same files whatever wrote them.
SHARD_BYTES = 256 * 2**20
CHECKSUMS = "shards.json"  # beside the shards: name to checksum

REMAKE = "delete {} and run `dvc repro`, which makes it anew"


@contextlib.contextmanager
def staged(path: str | Path) -> Iterator[Path]:
    """A directory to fill; it takes the name `path` when the block ends well, and vanishes when it does not."""
    final = Path(path)
    aside = final.parent / f".tmp-{final.name}"
    final.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed
    aside.mkdir()
    try:
        yield aside
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path`, which appears whole."""
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    aside = final.parent / f".tmp-{final.name}"
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(final)
    finally:
        aside.unlink(missing_ok=True)  # there only if writing failed


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` to `path` as JSON that reads well and is the same for the same value."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """The JSON value in the file `path`."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise damaged(path, error) from None


def versions(*libraries: str) -> dict[str, str]:
    """The installed versions of `libraries`, for a ledger."""
    return {name: version(name) for name in sorted(libraries)}


def token_dtype(vocab_size: int) -> npt.DTypeLike:
    """uint16 where ids below `vocab_size` fit, else uint32."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def to_numpy(array: pa.Array) -> npt.NDArray[Any]:
    """A view of an Arrow array of integers without nulls. (Arrow's own `to_numpy` imports pandas, a second's work.)"""
    _, values = array.buffers()
    view = (
        np.frombuffer(values, dtype=array.type.to_pandas_dtype())
        if values
        else np.empty(0, array.type.to_pandas_dtype())
    )
    return view[array.offset : array.offset + len(array)]


def to_arrow(values: npt.NDArray[Any]) -> pa.Array:
    """An Arrow array of integers on the memory of the one-dimensional `values`."""
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(values)])


class ShardWriter:
    """Writes record batches of one schema to `shard-00000.arrow`, `shard-00001.arrow`, ... in `directory`.

    The bytes are a function of the sequence of batches: callers cut their rows into batches by data alone.
    `shards.json` beside them holds their checksums: Arrow has none, and a flipped bit of an id would be another token.
    """

    def __init__(self, directory: Path, schema: pa.Schema) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory, self._schema = directory, schema
        self._checksums: dict[str, str] = {}
        self._file, self._bytes = directory, 0
        self._writer: Any = None

    def write(self, batch: pa.RecordBatch) -> None:
        if self._writer is None:
            self._file = self._directory / f"shard-{len(self._checksums):05d}.arrow"
            self._writer = pa.ipc.new_file(str(self._file), self._schema)
            self._bytes = 0
        self._writer.write_batch(batch)
        self._bytes += batch.nbytes
        if self._bytes >= SHARD_BYTES:
            self._close_shard()

    def _close_shard(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
            self._checksums[self._file.name] = checksum(self._file)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            if self._writer is not None:
                with contextlib.suppress(OSError):  # the disk may be full: what failed first is what counts
                    self._writer.close()
            return
        if self._writer is None and not self._checksums:  # an empty split is one empty shard
            self.write(pa.RecordBatch.from_pylist([], schema=self._schema))
        self._close_shard()
        write_json(self._directory / CHECKSUMS, self._checksums)


def checksum(file: Path) -> str:
    """`crc32:` and the hexadecimal CRC-32 of the file's bytes: against damage, at 2.5 GB/s; not against forgery."""
    value = 0
    with file.open("rb") as stream:
        while chunk := stream.read(2**20):
            value = zlib.crc32(chunk, value)
    return f"crc32:{value:08x}"


def shard_batches(directory: str | Path) -> Iterator[pa.RecordBatch]:
    """The record batches of all shards in `directory`, in order, memory-mapped."""
    for file in shard_files(directory):
        try:
            with pa.memory_map(str(file)) as source, pa.ipc.open_file(source) as reader:
                for index in range(reader.num_record_batches):
                    yield reader.get_batch(index)
        except pa.ArrowInvalid as error:
            raise damaged(file, error) from None


def shard_files(directory: str | Path) -> list[Path]:
    """The shards in `directory`, in order, found to be what was written."""
    files = sorted(Path(directory).glob("shard-*.arrow"))
    if not files:
        raise StageError(f"{directory} holds no shards: run `dvc repro`")
    written = read_json(Path(directory) / CHECKSUMS)
    if not isinstance(written, dict) or [file.name for file in files] != list(written):
        raise StageError(f"{directory}: the shards are not those that {CHECKSUMS} names: {REMAKE.format(directory)}")
    for file in files:
        if not file.is_file() or checksum(file) != written[file.name]:
            raise damaged(file, "not the bytes that were written")
    return files


def damaged(path: str | Path, how: object) -> StageError:
    """The error of an artifact that is not what a stage wrote."""
    return StageError(f"{path} is damaged ({how}): {REMAKE.format(path)}")


class Documents:
    """A split of tokens, memory-mapped: `documents[i]` is the ids of document i as stored, control tokens included."""

    def __init__(self, directory: str | Path) -> None:
        batches = list(shard_batches(directory))
        columns = [batch.column("input_ids") for batch in batches]
        # The ids of a batch as one array, and where its documents end in it.
        self._values = [to_numpy(column.values) for column in columns]
        self._offsets = [to_numpy(column.offsets) for column in columns]
        self._first = np.cumsum([0, *(len(column) for column in columns)])
        self.num_bytes: npt.NDArray[np.int64] = np.concatenate(
            [to_numpy(batch.column("num_bytes")).astype(np.int64) for batch in batches]
        )

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, index: int) -> TokenIds:
        batch = int(np.searchsorted(self._first, index, side="right")) - 1
        row = index - int(self._first[batch])
        start, end = self._offsets[batch][row : row + 2]
        ids: TokenIds = self._values[batch][start:end]
        return ids


class Blocks:
    """A split of blocks, memory-mapped: `blocks[[3, 1]]` is an array [2, block_size] of token ids."""

    def __init__(self, directory: str | Path) -> None:
        batches = [batch for batch in shard_batches(directory) if len(batch)]
        columns = [batch.column("input_ids") for batch in batches]
        if not columns:
            raise StageError(f"{directory} holds no blocks: fewer tokens than block_size")
        self.block_size = int(columns[0].type.list_size)
        self._values = [to_numpy(column.values).reshape(-1, self.block_size) for column in columns]
        self._first = np.cumsum([0, *(len(column) for column in columns)])

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, indices: list[int] | range) -> TokenIds:
        rows: list[Any] = []
        for index in indices:
            batch = int(np.searchsorted(self._first, index, side="right")) - 1
            rows.append(self._values[batch][index - self._first[batch]])
        stacked: TokenIds = np.stack(rows)
        return stacked


def free_copy(source: Path, target: Path, leave: Sequence[str] = ()) -> None:
    """Copy the files of the directory `source` into `target`, without their modes and times, but for `leave`."""
    for file in sorted(source.iterdir()):
        if file.is_file() and file.name not in leave:
            (target / file.name).write_bytes(file.read_bytes())
