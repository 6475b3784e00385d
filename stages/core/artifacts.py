"""Artifacts on disk: directories that appear whole, Arrow shards of token ids, and the `stats.json` ledgers."""

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
import uuid
import zlib
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stages.core.config import CONF
from stages.core.errors import StageError, printable

SPLITS = ("train", "validation", "test")
TokenIds = npt.NDArray[Any]  # uint16 or uint32, as token_dtype says
Marks = npt.NDArray[np.uint8]
"""What is known of each token beside its id, as a sum of COUNTED, SEGMENT_START and TEMPLATE."""

COUNTED = 1
"""The token counts: it is predicted in training and, unless it is a control token, in evaluation."""
SEGMENT_START = 2
"""A segment begins here: with isolated documents, attention and positions restart."""
TEMPLATE = 4
"""A control token that a chat template puts into a document."""

# Of a shard, about: where it ends is decided by the data alone, so that the same text gives the same files whatever
# wrote them. Small enough that a cluster has work for many, large enough that DVC sees few files.
SHARD_BYTES = 256 * 2**20
_CHECKSUMS = "shards.json"  # beside the shards: name to checksum

_REMAKE = "delete {} and run `dvc repro`, which makes it anew"


@contextlib.contextmanager
def staged(path: str | Path, expected: Sequence[str]) -> Iterator[Path]:
    """A directory to fill. It takes the place of `path` when the block ends well, and vanishes when it does not.

    What was at `path` stays there until then.

    Args:
        expected: files that the artifact has; a directory at `path` without them is not one, and is left alone.

    Raises:
        StageError: if `path` is not a place for an artifact, or if files are missing when the block ends.
    """
    final = Path(path)
    check_out(path, expected)
    final.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(final)
    aside = _aside_of(final)
    aside.mkdir()
    handle = os.open(aside, os.O_RDONLY)
    try:
        lock(handle)
        yield aside
        # Not only its name: another process may have removed it, and what was written since have made it again.
        lost = not aside.is_dir() or aside.stat().st_ino != os.fstat(handle).st_ino
        missing = [name for name in expected if not (aside / name).exists()]
        if lost or missing:
            raise StageError(f"{aside} was changed by another process while {final} was written: run the stage again")
        _replace_directory(aside, final)
    finally:
        os.close(handle)
        shutil.rmtree(aside, ignore_errors=True)


def check_out(path: str | Path, expected: Sequence[str] = ()) -> None:
    """Raise StageError unless an artifact may take the place of what is at `path`, if anything is.

    Args:
        expected: files that a directory there must have; none: only a file may be there.
    """
    final, refused = Path(path), f"out={str(path)!r} cannot be written"
    workspace = {Path.cwd(), CONF.parent}
    if (
        not str(path).strip()
        or final.name in ("", "..")
        or any(place.is_relative_to(final.resolve()) for place in workspace)
    ):
        raise StageError(f"{refused}: it holds the workspace; name a new directory or file")
    if final.is_symlink() and expected:
        raise StageError(f"{refused}: it is a symbolic link; name the place that it leads to")
    if not final.exists():
        return
    if final.is_dir() != bool(expected):
        raise StageError(f"{refused}: there is a {'directory' if final.is_dir() else 'file'} of that name")
    names = {entry.name for entry in final.iterdir()} if expected else set()
    hidden = any(name.startswith(".") for name in names)
    if names and (hidden or not all((final / name).exists() for name in expected)):
        raise StageError(f"{refused}: this stage did not make the directory that is there; name another, or remove it")


def _aside_of(final: Path) -> Path:
    """A name beside `final` that no other process has, of what is to take its place."""
    return final.with_name(f".tmp-{final.name}-{uuid.uuid4().hex[:12]}")


def _remove_abandoned(final: Path) -> None:
    """Remove what killed runs left beside `final`; what a running process fills is locked by it, and stays."""
    for left in final.parent.glob(f".tmp-{glob.escape(final.name)}-*"):
        with contextlib.suppress(OSError):
            handle = os.open(left, os.O_RDONLY)
            try:
                lock(handle)
                shutil.rmtree(left)
            finally:
                os.close(handle)


def lock(handle: int) -> None:
    """Lock an open file or directory until it is closed, by this process's end at the latest.

    Raises:
        OSError: if another process has locked it.
    """
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _replace_directory(new: Path, final: Path) -> None:
    """Rename `new` to `final`. What was there is moved aside, and removed when `new` is in place."""
    old = _aside_of(final)
    for _ in range(10):  # another process may put its own there between the two renames
        with contextlib.suppress(FileNotFoundError):
            final.rename(old)
        try:
            new.rename(final)
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                if old.exists():
                    old.rename(final)
                raise
        finally:
            shutil.rmtree(old, ignore_errors=True)
    else:
        raise StageError(f"{final} is written by other processes over and over: run the stage again when they are done")


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path`, which appears whole."""
    check_out(path)
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    aside = _aside_of(final)
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(final)
    finally:
        aside.unlink(missing_ok=True)  # there only if writing failed


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` to `path` as JSON that reads well and is the same for the same value."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """The JSON value in the file `path`, which a stage wrote."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise damaged(path, printable(error)) from None


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in `file`, which came from outside.

    Raises:
        StageError: if there is none in it.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # RecursionError: lists or objects nested too deep
        raise StageError(f"{printable(file)} is not JSON: {printable(error)}") from None
    if not isinstance(value, dict):
        raise StageError(f"{printable(file)} is not a JSON object")
    return value


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


def shard_name(number: int) -> str:
    """The file of a split's shard `number`, from 0."""
    return f"shard-{number:05d}.arrow"


def write_shard(file: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> str:
    """Write record batches, an empty one where there are none, to a shard and return its checksum.

    The bytes are a function of the sequence of batches.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    writer = pa.ipc.new_file(str(file), schema)
    try:
        for batch in batches:
            writer.write_batch(batch)
        if not writer.stats.num_record_batches:
            writer.write_batch(pa.RecordBatch.from_pylist([], schema=schema))
    except BaseException:
        with contextlib.suppress(OSError):  # the disk may be full: what failed first is what counts
            writer.close()
        raise
    writer.close()
    return checksum(file)


def write_checksums(directory: Path, checksums: Sequence[str]) -> None:
    """Write those of the shards in `directory` beside them, in order.

    Arrow has none, and a flipped bit of an id would be another token.
    """
    write_json(directory / _CHECKSUMS, {shard_name(number): value for number, value in enumerate(checksums)})


def sha256(file: Path) -> str:
    """`sha256:` and the hex digest of the file's bytes."""
    with file.open("rb") as stream:
        return "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest()


def checksum(file: Path) -> str:
    """`crc32:` and the hexadecimal CRC-32 of the file's bytes: against damage, at 2.5 GB/s; not against forgery."""
    value = 0
    with file.open("rb") as stream:
        while chunk := stream.read(2**20):
            value = zlib.crc32(chunk, value)
    return f"crc32:{value:08x}"


def shard_batches(directory: str | Path) -> Iterator[pa.RecordBatch]:
    """The record batches of all shards in `directory`, in order, memory-mapped."""
    for file, written in shard_files(directory).items():
        check_shard(file, written)
        yield from read_shard(file)


def read_shard(file: Path) -> Iterator[pa.RecordBatch]:
    """The record batches of a shard, memory-mapped."""
    try:
        with pa.memory_map(str(file)) as source, pa.ipc.open_file(source) as reader:
            for index in range(reader.num_record_batches):
                yield reader.get_batch(index)
    except pa.ArrowInvalid as error:
        raise damaged(file, error) from None


def shard_files(directory: str | Path) -> dict[Path, str]:
    """The shards in `directory`, in order, with the checksums that they were written with."""
    files = sorted(Path(directory).glob("shard-*.arrow"))
    if not files:
        raise StageError(f"{directory} holds no shards: run `dvc repro`")
    written = read_json(Path(directory) / _CHECKSUMS)
    if not isinstance(written, dict) or [file.name for file in files] != list(written):
        raise StageError(f"{directory}: the shards are not those that {_CHECKSUMS} names: {_REMAKE.format(directory)}")
    return {file: written[file.name] for file in files}


def check_shard(file: Path, written: str) -> None:
    """Raise StageError if a shard is not what was written with the checksum `written`."""
    if not file.is_file() or checksum(file) != written:
        raise damaged(file, "not the bytes that were written")


def damaged(path: str | Path, how: object) -> StageError:
    """The error of an artifact that is not what a stage wrote."""
    return StageError(f"{path} is damaged ({how}): {_REMAKE.format(path)}")


def record_column(batches: Iterable[pa.RecordBatch]) -> npt.NDArray[np.int64] | None:
    """[num_documents] the column `record` of a split of tokens.

    None where tokenize has left out no source: document i is record i then.
    """
    columns = [to_numpy(batch.column("record")) for batch in batches if "record" in batch.schema.names]
    return np.concatenate(columns) if columns else None


class Documents:
    """A split of tokens, memory-mapped: `documents[i]` is the ids of document i as stored, control tokens included."""

    def __init__(self, directory: str | Path) -> None:
        batches = list(shard_batches(directory))
        columns = [batch.column("input_ids") for batch in batches]
        # The ids of a batch as one array, and where its documents end in it.
        self._values = [to_numpy(column.values) for column in columns]
        self._offsets = [to_numpy(column.offsets) for column in columns]
        self._first = np.cumsum([0, *(len(column) for column in columns)])
        self._marks = [to_numpy(batch.column("marks").values) for batch in batches] if has_marks(batches) else None
        self.num_bytes = _concatenate(batches, "num_bytes")
        """[num_documents] int64, of all text in UTF-8."""
        self.num_counted_bytes = self.num_bytes if self._marks is None else _concatenate(batches, "num_counted_bytes")
        """[num_documents] int64, of the text that counts."""
        records = record_column(batches)
        self.records: npt.NDArray[np.int64] = np.arange(len(self)) if records is None else records
        """[num_documents] number of the record of download that each document was made of."""

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, index: int) -> TokenIds:
        batch, tokens = self._find(index)
        ids: TokenIds = self._values[batch][tokens]
        return ids

    def marks(self, index: int) -> Marks | None:
        """The marks of the tokens of document `index`; None where all of its tokens count."""
        batch, tokens = self._find(index)
        return None if self._marks is None else self._marks[batch][tokens]

    def _find(self, index: int) -> tuple[int, slice]:
        """The batch that holds document `index`, and its tokens there."""
        batch = int(np.searchsorted(self._first, index, side="right")) - 1
        row = index - int(self._first[batch])
        start, end = self._offsets[batch][row : row + 2].tolist()
        return batch, slice(start, end)


def has_marks(batches: Sequence[pa.RecordBatch]) -> bool:
    """Whether tokens or blocks carry marks."""
    return "marks" in batches[0].schema.names


def _concatenate(batches: Sequence[pa.RecordBatch], name: str) -> npt.NDArray[np.int64]:
    """A column of integers over all batches."""
    return np.concatenate([to_numpy(batch.column(name)).astype(np.int64) for batch in batches])


class Blocks:
    """A split of blocks, memory-mapped: `blocks[[3, 1]]` is an array [2, block_size] of token ids."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = directory
        batches = [batch for batch in shard_batches(directory) if len(batch)]
        columns = [batch.column("input_ids") for batch in batches]
        if not columns:
            raise StageError(f"{directory} holds no blocks: fewer tokens than block_size")
        self.block_size = int(columns[0].type.list_size)
        self._values = [to_numpy(column.values).reshape(-1, self.block_size) for column in columns]
        self._marks: list[Marks] | None = None
        if has_marks(batches):
            self._marks = [to_numpy(batch.column("marks").values).reshape(-1, self.block_size) for batch in batches]
        self._first = np.cumsum([0, *(len(column) for column in columns)])

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, indices: Sequence[int]) -> TokenIds:
        return self._rows(self._values, indices)

    def marks(self, indices: Sequence[int]) -> Marks | None:
        """The marks of the tokens of some blocks, [num_blocks, block_size]; None where all tokens count."""
        return None if self._marks is None else self._rows(self._marks, indices)

    def _rows(self, batches: Sequence[npt.NDArray[Any]], indices: Sequence[int]) -> npt.NDArray[Any]:
        rows = []
        for index in indices:
            batch = int(np.searchsorted(self._first, index, side="right")) - 1
            rows.append(batches[batch][index - self._first[batch]])
        return np.stack(rows)


def free_copy(source: Path, target: Path, leave: Sequence[str] = ()) -> None:
    """Copy the files of the directory `source` into `target`, without their modes and times, but for `leave`."""
    for file in sorted(source.iterdir()):
        if file.is_file() and file.name not in leave:
            (target / file.name).write_bytes(file.read_bytes())
