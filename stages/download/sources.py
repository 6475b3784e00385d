"""Where records come from: files of five formats on any file system that fsspec opens."""

import csv
import io
import json
import logging
import lzma
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import fsspec
import fsspec.core
import pyarrow as pa
import pyarrow.parquet as pq

from stages.core.errors import StageError
from stages.download.records import BadRecordError
from stages.download.schema import SourceData

log = logging.getLogger(__name__)

FORMATS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text",
    ".md": "text",
}  # fmt: skip
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
_OWN_SPLIT = re.compile(r"(train|validation|valid|val|dev|test)(?![a-z])", re.IGNORECASE)
_PARQUET_ROWS = 1000  # read at once
# How files begin that are not what the name says. None is the beginning of text.
_SIGNATURES = {
    b"\x1f\x8b": "gzip (.gz)",
    b"\x28\xb5\x2f\xfd": "zstd (.zst)",
    b"\xfd7zXZ": "xz (.xz)",
    b"PAR1\x15": "Parquet (.parquet)",
    b"PK\x03\x04": "a zip archive (none is unpacked)",
    b"\xff\xfe": "UTF-16 text (only UTF-8 is read)",
    b"\xfe\xff": "UTF-16 text (only UTF-8 is read)",
}


class Row(NamedTuple):
    """A record as its source holds it."""

    where: str
    """File and line, or data set and index, for error messages."""
    split: str | None
    """The source's own split, where it has one."""
    value: Any
    """Column to value, or a BadRecordError where nothing could be read."""


def read(data: SourceData) -> Iterator[Row]:
    """The rows of the files that `data` describes, in order (files by name)."""
    for file_system, file in find_files(data.path):
        yield from read_rows(file_system, file, data.text_record)


def find_files(path: str) -> list[tuple[Any, str]]:
    """The readable files at `path` (a file, a directory or a URL), each with its file system, sorted by name."""
    try:
        file_system, root = fsspec.core.url_to_fs(path)
        # Over HTTP, isdir reads the whole file and takes one with links in it for a directory.
        is_page = "http" in file_system.protocol and format_of(root)
        if not is_page and file_system.isdir(root):
            found = sorted(file_system.find(root))
            files = [file for file in found if format_of(file) and not _is_hidden(file.removeprefix(root))]
            if len(files) < len(found):
                log.info("%s: %d files of other formats left alone", path, len(found) - len(files))
        else:
            files = [root] if file_system.exists(root) else []
            if files and not format_of(root):
                raise StageError(
                    f"data.path={path}: unknown format; give it one of {', '.join(FORMATS)} (.gz, .zst may follow)"
                )
    except (ImportError, OSError, ValueError) as error:
        if isinstance(error, StageError):
            raise
        raise StageError(f"data.path={path}: {error}") from None
    if not files and "://" in path:
        raise StageError(f"data.path={path}: there is no such file, or its server does not answer")
    if not files:
        _refuse_unreadable(path)
        raise StageError(f"data.path={path}: no such file, or a directory without {', '.join(FORMATS)} files")
    return [(file_system, file) for file in files]


def _refuse_unreadable(path: str) -> None:
    """Raise the system's own error where `path` cannot be looked at: fsspec takes that for an absent file."""
    local = Path(path)
    if os.path.lexists(local):
        local.stat()
        if local.is_dir():
            next(local.iterdir(), None)


def format_of(file: str) -> str | None:
    """The format that the name of `file` says, compression aside."""
    name = _without_query(file)
    return FORMATS.get(PurePosixPath(name.stem).suffix if name.suffix in _COMPRESSIONS else name.suffix)


def _is_hidden(file: str) -> bool:
    """Whether the name of `file`, or of a directory that it is in, begins with a dot."""
    return any(step.startswith(".") for step in PurePosixPath(file).parts)


def _without_query(file: str) -> PurePosixPath:
    return PurePosixPath(file.lower().split("?")[0])


def own_split(name: str) -> str | None:
    """The split that a file or split called `name` is by its own account."""
    match = _OWN_SPLIT.match(PurePosixPath(name).name) or _OWN_SPLIT.fullmatch(PurePosixPath(name).parent.name)
    if match is None:
        return None
    word = match[1].lower()
    return word if word in ("train", "test") else "validation"


def read_rows(file_system: Any, file: str, text_record: str = "file") -> Iterator[Row]:
    split, kind = own_split(file), format_of(file)
    try:
        with _open(file_system, file) as stream:
            readers = {"jsonl": _jsonl, "json": _json, "csv": _csv}
            if kind == "parquet":
                rows = _parquet(stream)
            else:
                lines = io.BufferedReader(stream)
                _refuse_other_content(lines.peek(8), file)
                rows = _text(lines, text_record) if kind == "text" else readers[str(kind)](lines)
            for place, value in rows:
                yield Row(f"{file}:{place}", split, value)
    except (EOFError, OSError, zlib.error, lzma.LZMAError, pa.ArrowInvalid) as error:
        if isinstance(error, FileNotFoundError):  # over HTTP without a number
            raise StageError(f"{file}: no such file") from None
        if isinstance(error, OSError) and error.errno is not None:  # the system's; decompressors' have no number
            raise OSError(error.errno, error.strerror or str(error), error.filename or file) from None
        raise StageError(f"{file} is damaged or cut short: {error}") from None
    except _UnreadableError as error:
        raise StageError(f"{file}:{error}") from None


def _refuse_other_content(beginning: bytes, file: str) -> None:
    """Raise StageError if a file of text begins as none does."""
    for signature, content in _SIGNATURES.items():
        if beginning.startswith(signature):
            raise StageError(f"{file} holds {content}, not what its name says: rename or convert it")


def _open(file_system: Any, file: str) -> Any:
    """The decompressed bytes of `file`."""
    compression = _COMPRESSIONS.get(_without_query(file).suffix)
    if compression != "zstd":
        return file_system.open(file, "rb", compression=compression)
    # fsspec's reader gives no lines, ends at the first of several frames, and takes a truncated file for a whole one.
    stream = pa.PythonFile(file_system.open(file, "rb"), mode="r")
    return io.BufferedReader(pa.CompressedInputStream(stream, compression))


def _decode(line: bytes) -> str | BadRecordError:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        return BadRecordError(f"not UTF-8 (byte {error.start} of the line)")


def _parse(line: bytes) -> Any:
    text = _decode(line)
    if isinstance(text, BadRecordError):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return BadRecordError(f"not JSON: {error}")


def _jsonl(stream: Any) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(stream, 1):
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if line.strip():
            yield number, _parse(line)


def _json(stream: Any) -> Iterator[tuple[int, Any]]:
    """An array of records, read whole; a .json file of lines is read as lines."""
    if not stream.peek(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        yield from _jsonl(stream)
        return
    value = _parse(stream.read().removeprefix(b"\xef\xbb\xbf"))
    if isinstance(value, BadRecordError):
        yield 1, value
    else:
        yield from enumerate(value, 1)


def _parquet(stream: Any) -> Iterator[tuple[int, Any]]:
    number = 0
    for batch in pq.ParquetFile(stream).iter_batches(batch_size=_PARQUET_ROWS):
        for value in batch.to_pylist():
            number += 1
            yield number, value


class _UnreadableError(Exception):
    """A CSV file of which no one can say what its records are, so that none can be left out."""


def _csv(stream: Any) -> Iterator[tuple[int, Any]]:
    """The rows below the header, each at its first line."""
    csv.field_size_limit(2**31 - 1)
    lines = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    header: list[str] = []
    for number, cells in _cells(csv.reader(lines, strict=True)):
        if not header:
            header = _header(number, cells)
        elif isinstance(cells, BadRecordError):
            yield number, cells
        elif len(cells) != len(header):
            yield number, BadRecordError(f"{len(cells)} columns, not as many as the header's {len(header)}")
        else:
            yield number, dict(zip(header, cells, strict=True))


def _cells(reader: Any) -> Iterator[tuple[int, list[str] | BadRecordError]]:
    """The rows that are not empty, each at its first line."""
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader)
            "".join(cells).encode()
        except StopIteration:
            return
        except csv.Error as error:
            if reader.line_num > number:  # there may be many records in it
                raise _UnreadableError(
                    f"{number}: not CSV: a quote that opens there does not close as it should up to line"
                    f" {reader.line_num} ({error}): close it, or double it if it is text"
                ) from None
            yield number, BadRecordError(f"not CSV: {error}")
        except UnicodeEncodeError:
            yield number, BadRecordError("not UTF-8")
        else:
            if cells:
                yield number, cells


def _header(number: int, cells: list[str] | BadRecordError) -> list[str]:
    """The names of the columns."""
    if isinstance(cells, BadRecordError):
        raise _UnreadableError(f"{number}: the header is {cells}")
    if twice := [name for name in cells if cells.count(name) > 1]:
        raise _UnreadableError(f"{number}: the header has two columns {twice[0]!r}: rename one")
    return cells


def _text(stream: Any, text_record: str) -> Iterator[tuple[int, Any]]:
    """Records of plain text, {"title": "", "answers.text": text}; a paragraph ends at an empty line."""
    start, lines = 1, list[str]()
    for number, line in enumerate(stream, 1):
        text = _decode(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
        if isinstance(text, BadRecordError):
            yield number, text
            continue
        text = text.replace("\r\n", "\n")
        if text_record == "file" or (text_record == "paragraph" and text.strip()):
            start = start if lines else number
            lines.append(text)
        elif text_record == "line" and text.strip():
            yield number, {"title": "", "answers.text": text.rstrip("\n")}
        elif lines:
            yield start, {"title": "", "answers.text": "".join(lines).rstrip("\n")}
            lines = []
    if lines:
        text = "".join(lines)
        yield start, {"title": "", "answers.text": text if text_record == "file" else text.rstrip("\n")}
