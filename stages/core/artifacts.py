"""Artifacts on disk: directories written atomically, Arrow shards of token ids, and the `stats.json` ledgers."""

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
import stat
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
TokenIds = npt.NDArray[Any]  # uint16 or uint32: see choose_token_dtype
Marks = npt.NDArray[np.uint8]
"""Flags of each token: a sum of COUNTED, SEGMENT_START and TEMPLATE."""

COUNTED = 1
"""The token counts: it is predicted in training and, unless it is a control token, in evaluation."""
SEGMENT_START = 2
"""First token of a segment: with isolated documents, attention and positions restart here."""
TEMPLATE = 4
"""A control token that a chat template puts into a document."""

# Approximate size of a shard. Only the data decide where a shard ends, so that the same text gives the same files with
# any number of processes. Small enough for many workers of a cluster, large enough that DVC tracks few files.
SHARD_BYTES = 256 * 2**20
_CHECKSUMS = "shards.json"  # in the directory of the shards: file name to checksum

_REMAKE = "delete {} and run `dvc repro` to create it again"


@contextlib.contextmanager
def write_directory(path: str | Path, expected: Sequence[str]) -> Iterator[Path]:
    """Yield a temporary directory to fill, which replaces `path` if the block succeeds and is deleted if it fails.

    Until then the previous artifact stays at `path`.

    Args:
        expected: files that every artifact of this kind has. A directory at `path` without them is something else
            and is not replaced.

    Raises:
        StageError: if `path` cannot be written (see `check_output_path`), or if an expected file is missing when the
            block ends.
    """
    final = Path(path)
    check_output_path(path, expected)
    final.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned_directories(final)
    aside, handle = _make_locked_directory(final)
    try:
        yield aside
        # Compare inodes: another process may have removed the directory, and later writes may have created it again.
        lost = not aside.is_dir() or aside.stat().st_ino != os.fstat(handle).st_ino
        missing = [name for name in expected if not (aside / name).exists()]
        if lost or missing:
            raise StageError(f"{aside} was changed by another process while {final} was written: run the stage again")
        _replace_directory(aside, final)
    finally:
        os.close(handle)
        shutil.rmtree(aside, ignore_errors=True)


def check_output_path(path: str | Path, expected: Sequence[str] = ()) -> None:
    """Check that an artifact may be written to `path`.

    Args:
        expected: files that an existing directory at `path` must have; empty: the artifact is a file.

    Raises:
        StageError: if `path` contains the workspace, is a symbolic link, or is not an artifact of this kind.
    """
    final, refused = Path(path), f"out={str(path)!r} cannot be written"
    workspace = {Path.cwd(), CONF.parent}
    if (
        not str(path).strip()
        or final.name in ("", "..")
        or any(directory.is_relative_to(final.resolve()) for directory in workspace)
    ):
        raise StageError(f"{refused}: it contains the workspace; name a new directory or file")
    if final.is_symlink() and expected:
        raise StageError(f"{refused}: it is a symbolic link; name its target instead")
    while True:
        try:
            found = final.stat()
            is_directory = stat.S_ISDIR(found.st_mode)
            names = {entry.name for entry in final.iterdir()} if is_directory and expected else set()
            complete = all((final / name).exists() for name in expected)
        except (FileNotFoundError, NotADirectoryError):
            return  # there is none, or another process is replacing it
        if is_directory != bool(expected):
            raise StageError(f"{refused}: a {'directory' if is_directory else 'file'} of that name exists")
        if not names or (complete and not any(name.startswith(".") for name in names)):
            return
        with contextlib.suppress(FileNotFoundError):
            if final.stat().st_ino == found.st_ino:  # otherwise another process replaced it while it was read
                raise StageError(
                    f"{refused}: the directory exists and was not written by this stage; name another or remove it"
                )


def _make_temporary_path(final: Path) -> Path:
    """Return a unique path in the directory of `final` for the artifact that will replace it."""
    return final.with_name(f".tmp-{final.name}-{uuid.uuid4().hex[:12]}")


def _make_locked_directory(final: Path) -> tuple[Path, int]:
    """Create a temporary directory for `final` and lock it; return it and its file descriptor."""
    while True:
        aside = _make_temporary_path(final)
        aside.mkdir()
        # Before it is locked, another process may take it for abandoned, lock it and remove it.
        with contextlib.suppress(FileNotFoundError):
            handle = os.open(aside, os.O_RDONLY)
            with contextlib.suppress(BlockingIOError):
                lock_handle(handle)
                if aside.is_dir():
                    return aside, handle
            os.close(handle)


def _remove_abandoned_directories(final: Path) -> None:
    """Remove temporary directories that killed runs left for `final`. A running process has locked its own."""
    for abandoned in final.parent.glob(f".tmp-{glob.escape(final.name)}-*"):
        with contextlib.suppress(OSError):
            handle = os.open(abandoned, os.O_RDONLY)
            try:
                lock_handle(handle)
                shutil.rmtree(abandoned)
            finally:
                os.close(handle)


def lock_handle(handle: int) -> None:
    """Lock an open file or directory until it is closed or this process ends.

    Raises:
        OSError: if another process has locked it.
    """
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _replace_directory(new: Path, final: Path) -> None:
    """Rename `new` to `final`. The previous directory is moved aside and removed afterwards."""
    old = _make_temporary_path(final)
    for _ in range(10):  # another process may write `final` between the two renames
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
        raise StageError(f"other processes keep replacing {final}: run the stage again when they are done")


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` atomically, in UTF-8."""
    check_output_path(path)
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    aside = _make_temporary_path(final)
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(final)
    finally:
        aside.unlink(missing_ok=True)  # exists only if writing failed


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` to `path` as indented JSON; equal values give equal bytes."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read the JSON value in a file that a stage wrote.

    Raises:
        StageError: if the file is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise make_damage_error(path, printable(error)) from None


def read_json_object(file: Path) -> dict[str, Any]:
    """Read the JSON object in a file that the user or the Hub provided.

    Raises:
        StageError: if the file is not JSON, or its value is not an object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # RecursionError: lists or objects nested too deep
        raise StageError(f"{printable(file)} is not JSON: {printable(error)}") from None
    if not isinstance(value, dict):
        raise StageError(f"{printable(file)} is not a JSON object")
    return value


def get_versions(*libraries: str) -> dict[str, str]:
    """Return the installed versions of `libraries`, for a ledger."""
    return {name: version(name) for name in sorted(libraries)}


def choose_token_dtype(vocab_size: int) -> npt.DTypeLike:
    """Return uint16 if all ids below `vocab_size` fit, otherwise uint32."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def to_numpy(array: pa.Array) -> npt.NDArray[Any]:
    """Return an Arrow array of integers without nulls as a numpy view, [len(array)] of the same dtype.

    Arrow's own `to_numpy` imports pandas, which takes a second.
    """
    _, values = array.buffers()
    view = (
        np.frombuffer(values, dtype=array.type.to_pandas_dtype())
        if values
        else np.empty(0, array.type.to_pandas_dtype())
    )
    return view[array.offset : array.offset + len(array)]


def to_arrow(values: npt.NDArray[Any]) -> pa.Array:
    """Return the numbers `values` [num_values] as an Arrow array that shares their memory."""
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(values)])


def get_shard_name(number: int) -> str:
    """Return the file name of shard `number` of a split; numbers start at 0."""
    return f"shard-{number:05d}.arrow"


def write_shard(file: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> str:
    """Write record batches to a shard, and return its checksum.

    Without batches, the shard has one empty batch. The same sequence of batches gives the same bytes.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    writer = pa.ipc.new_file(str(file), schema)
    try:
        for batch in batches:
            writer.write_batch(batch)
        if not writer.stats.num_record_batches:
            writer.write_batch(pa.RecordBatch.from_pylist([], schema=schema))
    except BaseException:
        with contextlib.suppress(OSError):  # the disk may be full: report the first error
            writer.close()
        raise
    writer.close()
    return compute_checksum(file)


def write_checksums(directory: Path, checksums: Sequence[str]) -> None:
    """Write the checksums of the shards in `directory`, in order, to a file in it.

    Arrow files have no checksums, and a flipped bit in an id gives another token.
    """
    write_json(directory / _CHECKSUMS, {get_shard_name(number): value for number, value in enumerate(checksums)})


def compute_sha256(file: Path) -> str:
    """Return `sha256:` and the hexadecimal digest of the file's bytes."""
    with file.open("rb") as stream:
        return "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest()


def compute_checksum(file: Path) -> str:
    """Return `crc32:` and the hexadecimal CRC-32 of the file's bytes.

    It runs at 2.5 GB/s and detects damage, but not forgery.
    """
    value = 0
    with file.open("rb") as stream:
        while chunk := stream.read(2**20):
            value = zlib.crc32(chunk, value)
    return f"crc32:{value:08x}"


def read_batches(directory: str | Path) -> Iterator[pa.RecordBatch]:
    """Yield the memory-mapped record batches of all shards in `directory`, in order.

    Raises:
        StageError: if a shard is missing or damaged.
    """
    for file, expected in list_shards(directory).items():
        check_shard(file, expected)
        yield from read_shard(file)


def read_shard(file: Path) -> Iterator[pa.RecordBatch]:
    """Yield the memory-mapped record batches of a shard, without checking its checksum."""
    try:
        with pa.memory_map(str(file)) as source, pa.ipc.open_file(source) as reader:
            for index in range(reader.num_record_batches):
                yield reader.get_batch(index)
    except pa.ArrowInvalid as error:
        raise make_damage_error(file, error) from None


def list_shards(directory: str | Path) -> dict[Path, str]:
    """Return the shards in `directory`, in order, with their expected checksums.

    Raises:
        StageError: if there are none, or if they are not the files of the checksums.
    """
    files = sorted(Path(directory).glob("shard-*.arrow"))
    if not files:
        raise StageError(f"{directory} has no shards: run `dvc repro`")
    written = read_json(Path(directory) / _CHECKSUMS)
    if not isinstance(written, dict) or [file.name for file in files] != list(written):
        raise StageError(f"{directory}: the shards do not match {_CHECKSUMS}: {_REMAKE.format(directory)}")
    return {file: written[file.name] for file in files}


def check_shard(file: Path, expected: str) -> None:
    """Raise StageError if the checksum of a shard is not `expected`."""
    if not file.is_file() or compute_checksum(file) != expected:
        raise make_damage_error(file, "its checksum does not match")


def make_damage_error(path: str | Path, reason: object) -> StageError:
    """Return the error for an artifact that was changed after a stage wrote it."""
    return StageError(f"{path} is damaged ({reason}): {_REMAKE.format(path)}")


def read_record_column(batches: Iterable[pa.RecordBatch]) -> npt.NDArray[np.int64] | None:
    """Return the column `record` of a split of tokens, [num_documents] int64.

    None if the split has no such column: tokenize left out no source, and document i is record i.
    """
    columns = [to_numpy(batch.column("record")) for batch in batches if "record" in batch.schema.names]
    return np.concatenate(columns) if columns else None


class Documents:
    """A memory-mapped split of tokens.

    `documents[i]` is the token ids of document i as stored, [num_tokens] uint16 or uint32, control tokens included.
    """

    def __init__(self, directory: str | Path) -> None:
        batches = list(read_batches(directory))
        columns = [batch.column("input_ids") for batch in batches]
        # Per batch: all token ids [num_tokens], and the boundaries of its documents in them [num_documents + 1].
        self._values = [to_numpy(column.values) for column in columns]
        self._offsets = [to_numpy(column.offsets) for column in columns]
        self._first = np.cumsum([0, *(len(column) for column in columns)])  # [num_batches + 1] first document
        self._marks = [to_numpy(batch.column("marks").values) for batch in batches] if has_marks(batches) else None
        self.num_bytes = _concatenate_column(batches, "num_bytes")
        """Bytes of the whole text in UTF-8, [num_documents] int64."""
        self.num_counted_bytes = (
            self.num_bytes if self._marks is None else _concatenate_column(batches, "num_counted_bytes")
        )
        """Bytes of the text that counts, [num_documents] int64."""
        records = read_record_column(batches)
        self.records: npt.NDArray[np.int64] = np.arange(len(self)) if records is None else records
        """Number of the record of download that each document comes from, [num_documents] int64."""

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, index: int) -> TokenIds:
        batch, tokens = self._locate(index)
        ids: TokenIds = self._values[batch][tokens]
        return ids

    def get_marks(self, index: int) -> Marks | None:
        """Return the marks of document `index`, [num_tokens] uint8; None if there are none: all tokens count."""
        batch, tokens = self._locate(index)
        return None if self._marks is None else self._marks[batch][tokens]

    def _locate(self, index: int) -> tuple[int, slice]:
        """Return the batch of document `index`, and the slice of its tokens in the batch."""
        batch = int(np.searchsorted(self._first, index, side="right")) - 1
        row = index - int(self._first[batch])
        start, end = self._offsets[batch][row : row + 2].tolist()
        return batch, slice(start, end)


def has_marks(batches: Sequence[pa.RecordBatch]) -> bool:
    """Return True if the batches of tokens or blocks have a column of marks."""
    return "marks" in batches[0].schema.names


def _concatenate_column(batches: Sequence[pa.RecordBatch], name: str) -> npt.NDArray[np.int64]:
    """Return a column of integers over all batches, [num_rows] int64."""
    return np.concatenate([to_numpy(batch.column(name)).astype(np.int64) for batch in batches])


class Blocks:
    """A memory-mapped split of blocks: `blocks[[3, 1]]` is an array [2, block_size] of token ids."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = directory
        batches = [batch for batch in read_batches(directory) if len(batch)]
        columns = [batch.column("input_ids") for batch in batches]
        if not columns:
            raise StageError(f"{directory} has no blocks: the split has fewer tokens than block_size")
        self.block_size = int(columns[0].type.list_size)
        # Per batch: [num_blocks, block_size].
        self._values = [to_numpy(column.values).reshape(-1, self.block_size) for column in columns]
        self._marks: list[Marks] | None = None
        if has_marks(batches):
            self._marks = [to_numpy(batch.column("marks").values).reshape(-1, self.block_size) for batch in batches]
        self._first = np.cumsum([0, *(len(column) for column in columns)])  # [num_batches + 1] first block

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, indices: Sequence[int]) -> TokenIds:
        return self._gather_rows(self._values, indices)

    def get_marks(self, indices: Sequence[int]) -> Marks | None:
        """Return the marks of blocks, [len(indices), block_size] uint8; None if there are none: all tokens count."""
        return None if self._marks is None else self._gather_rows(self._marks, indices)

    def _gather_rows(self, batches: Sequence[npt.NDArray[Any]], indices: Sequence[int]) -> npt.NDArray[Any]:
        rows = []
        for index in indices:
            batch = int(np.searchsorted(self._first, index, side="right")) - 1
            rows.append(batches[batch][index - self._first[batch]])
        return np.stack(rows)


def copy_files(source: Path, target: Path, exclude: Sequence[str] = ()) -> None:
    """Copy the files of the directory `source` into `target`, except those named in `exclude`.

    Modes and times are not copied, so the copies are writable.
    """
    for file in sorted(source.iterdir()):
        if file.is_file() and file.name not in exclude:
            (target / file.name).write_bytes(file.read_bytes())
