"""Readers of records from files in five formats: Parquet, JSON Lines, JSON, CSV and plain text."""

import contextlib
import csv
import io
import itertools
import json
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stages.core.errors import StageError, printable
from stages.download.files import (
    PATH_LIMIT,
    explain_web_error,
    find_files,
    get_compression,
    get_format,
    infer_split,
    is_local,
    is_web,
)
from stages.download.records import BadRecordError, RepeatedKeys, Row, list_used_columns
from stages.download.schema import SourceData

# First bytes of files with a misleading name. Text begins with none of them.
_SIGNATURES = {
    b"\x1f\x8b": "gzip (.gz)",
    b"\x28\xb5\x2f\xfd": "zstd (.zst)",
    b"\xfd7zXZ": "xz (.xz)",
    b"PAR1\x15": "Parquet (.parquet)",
    b"PK\x03\x04": "a zip archive (archives are not supported)",
    b"\xff\xfe": "UTF-16 text (only UTF-8 is read)",
    b"\xfe\xff": "UTF-16 text (only UTF-8 is read)",
}


PART_BYTES = 4 * 2**20  # approximate size of a part
_PART_ROWS = 1000
_READ_BYTES = 2**18  # bytes per read


class FileRange(NamedTuple):
    """Range of bytes of a local file, which a worker process reads itself."""

    path: str
    start: int
    end: int

    def read(self) -> bytes:
        """Return the bytes."""
        with Path(self.path).open("rb") as stream:
            stream.seek(self.start)
            return stream.read(self.end - self.start)


class Part(NamedTuple):
    """Consecutive, unparsed records of a file: the unit of work of a process."""

    location: str
    """Path of the file, for messages."""
    split: str | None
    """The source's own split, if it has one."""
    first_number: int
    """Number of the first line or row."""
    content: bytes | FileRange | pa.RecordBatch | list[Row]
    """Lines of JSON, the range of a file with lines of JSON, columns, or rows."""
    names: list[str]
    """Names of all columns of the file; `content` may only have those in use."""


def read_rows(data: SourceData) -> Iterator[Row]:
    """Yield the rows of the files that `data` describes, in the order of the file names."""
    for file_system, file in find_files(data.path):
        yield from read_file_rows(file_system, file, data.text_record, list_used_columns(data))


def read_file_rows(
    file_system: Any, file: str, text_record: str = "file", columns: Collection[str] | None = None
) -> Iterator[Row]:
    """Yield the rows of `file`.

    Args:
        columns: names of the columns in use (dotted names select nested fields); formats that can skip the others do.
            None: all columns.

    Raises:
        StageError: if the file cannot be read.
    """
    split, location = infer_split(file), printable(file, PATH_LIMIT)
    with _open_content(file_system, file) as stream:
        if get_format(file) == "parquet":
            records = _read_parquet(stream, columns)
        else:
            records = _read_numbered_records(stream, str(get_format(file)), text_record)
        for number, value in records:
            yield Row(f"{location}:{number}", split, value)


def read_file_parts(data: SourceData) -> Iterator[Part]:
    """Yield the records of the files that `data` describes in parts, in the order of the file names."""
    for file_system, file in find_files(data.path):
        split, location, kind = infer_split(file), printable(file, PATH_LIMIT), get_format(file)
        with _open_content(file_system, file) as stream:
            if kind == "parquet":
                yield from _read_table_parts(stream, location, split, list_used_columns(data))
            elif kind == "jsonl" and is_local(file_system) and get_compression(file) is None:
                yield from _read_range_parts(stream, file, location, split)
            elif kind == "jsonl":
                yield from _read_line_parts(stream, location, split)
            else:
                records = _read_numbered_records(stream, str(kind), data.text_record)
                yield from group_into_parts(Row(f"{location}:{number}", split, value) for number, value in records)


def group_into_parts(rows: Iterable[Row], max_rows: int | None = None) -> Iterator[Part]:
    """Group rows into parts of a single split and at most `max_rows` rows, without reading beyond a full part.

    Rows before an error are yielded before it is raised.
    """
    max_rows = min(max_rows or _PART_ROWS, _PART_ROWS)
    found: list[Row] = []
    size, failure = 0, None
    iterator = iter(rows)
    while True:
        try:
            row = next(iterator)
        except StopIteration:
            break
        except Exception as error:
            failure = error
            break
        if found and row.split != found[0].split:
            yield Part("", found[0].split, 0, found, [])
            found, size = [], 0
        found.append(row)
        values = row.value.values() if isinstance(row.value, dict) else []
        size += sum(len(value) for value in values if isinstance(value, str))
        if len(found) >= max_rows or size >= PART_BYTES:
            yield Part("", found[0].split, 0, found, [])
            found, size = [], 0
    if found:
        yield Part("", found[0].split, 0, found, [])
    if failure is not None:
        raise failure


def _read_line_parts(stream: Any, location: str, split: str | None) -> Iterator[Part]:
    """Yield parts that end at line ends. Lines before an error are yielded before it is raised."""
    number, waiting, size, failure = 1, list[bytes](), 0, None
    ended = False
    while not ended:
        try:
            piece = stream.read1(_READ_BYTES)
        except Exception as error:
            piece, failure = b"", error
        ended = not piece
        end = piece.rfind(b"\n") + 1
        if not ended and (not end or size + end < PART_BYTES):
            waiting.append(piece)
            size += len(piece)
            continue
        content = b"".join([*waiting, piece[:end]])
        waiting, size = [piece[end:]], len(piece) - end
        if failure is not None:  # in the middle of a line
            content = content[: content.rfind(b"\n") + 1]
        if content:
            yield Part(location, split, number, content, [])
            number += _count_lines(content)
    if failure is not None:
        raise failure


def _read_range_parts(stream: Any, file: str, location: str, split: str | None) -> Iterator[Part]:
    """Yield parts of a file that the workers read themselves. Here it is only read to find and count line ends."""
    number, start = 1, 0
    while content := stream.read(PART_BYTES):
        rest = b"" if content.endswith(b"\n") else stream.readline()
        end = start + len(content) + len(rest)
        yield Part(location, split, number, FileRange(file, start, end), [])
        number, start = number + _count_lines(content) + _count_lines(rest), end


def _count_lines(content: bytes) -> int:
    # Takes a third of the time of bytes.count.
    return int(np.count_nonzero(np.frombuffer(content, np.uint8) == ord("\n")))


def _read_table_parts(stream: Any, location: str, split: str | None, columns: Collection[str]) -> Iterator[Part]:
    number = 1
    for names, batch in _read_parquet_batches(stream, columns):
        yield Part(location, split, number, batch, names)
        number += batch.num_rows


@contextlib.contextmanager
def _open_content(file_system: Any, file: str) -> Iterator[Any]:
    """Open the decompressed bytes of `file`, and translate errors of reading it to messages with its path."""
    location, kind = printable(file, PATH_LIMIT), get_format(file)
    try:
        with _open_decompressed(file_system, file, whole=kind != "parquet") as stream:
            if kind == "parquet":
                yield stream
            else:
                lines = io.BufferedReader(stream)
                _check_signature(lines.peek(8), location)
                yield lines
    except _UnreadableFileError as error:
        raise StageError(f"{location}:{error}") from None
    except Exception as error:
        if reason := explain_web_error(error):
            raise StageError(f"{location}: {reason}") from None
        if isinstance(error, FileNotFoundError):  # over HTTP, without an errno
            raise StageError(f"{location}: no such file") from None
        # Errors of the operating system have an errno; those of decompressors do not.
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror or str(error), error.filename or file) from None
        if isinstance(error, EOFError | OSError | zlib.error | lzma.LZMAError | pa.ArrowInvalid):
            raise StageError(f"{location} is damaged or cut short: {printable(error)}") from None
        raise


def _read_numbered_records(stream: Any, kind: str, text_record: str) -> Iterator[tuple[int, Any]]:
    """Yield the line number and value of each record of a file, of any format except Parquet."""
    return (
        _read_text(stream, text_record)
        if kind == "text"
        else {"jsonl": _read_jsonl, "json": _read_json, "csv": _read_csv}[kind](stream)
    )


def _check_signature(beginning: bytes, file: str) -> None:
    """Raise StageError if a file begins with the signature of another format."""
    for signature, content in _SIGNATURES.items():
        if beginning.startswith(signature):
            raise StageError(f"{file} contains {content}, but its name says otherwise: rename or convert it")


def _open_decompressed(file_system: Any, file: str, whole: bool) -> Any:
    """Open the decompressed bytes of `file`.

    Args:
        whole: if True, the file is read from beginning to end: over HTTP in a single response, since not every server
            supports range requests.
    """
    options = {"block_size": 0} if whole and is_web(file) else {}
    compression = get_compression(file)
    if compression != "zstd":
        return file_system.open(file, "rb", compression=compression, **options)
    # fsspec's zstd reader has no lines, stops after the first of several frames, and does not detect truncation.
    stream = pa.PythonFile(file_system.open(file, "rb", **options), mode="r")
    return io.BufferedReader(pa.CompressedInputStream(stream, compression))


class _UnreadableFileError(Exception):
    """A file that cannot be divided into records, so that none can be skipped; the message is `LINE: REASON`."""


def _decode_utf8(line: bytes) -> str | BadRecordError:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        return BadRecordError(f"not UTF-8 (byte {error.start} of the line)")


def _build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object that remembers repeated keys, of which `json` silently takes the last."""
    found = dict(pairs)
    return found if len(found) == len(pairs) else RepeatedKeys(pairs)


def _find_repeated_name(names: Iterable[str]) -> str:
    """Return the first of `names` that is repeated, for a message."""
    return printable(repr(next(name for name, count in Counter(names).items() if count > 1)))


BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # UTF-8, at the beginning of a file
_DECODER = json.JSONDecoder(object_pairs_hook=_build_object)
_SPACE = re.compile(r"[ \t\n\r]*")


def _build_json_error(error: Exception) -> BadRecordError:
    return BadRecordError(f"not JSON: {printable(error)}")


def parse_json_line(line: bytes) -> Any:
    """Parse a line of JSON; return its value, or a BadRecordError."""
    text = _decode_utf8(line)
    if isinstance(text, BadRecordError):
        return text
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        return _build_json_error(error)


def _read_jsonl(stream: Any) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(stream, 1):
        line = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
        if line.strip():
            yield number, parse_json_line(line)


def _read_json(stream: Any) -> Iterator[tuple[int, Any]]:
    """Yield the records of a JSON array, of JSON Lines, or of concatenated JSON values that span several lines.

    Only JSON Lines are streamed and numbered by line; otherwise the file is read into memory, and values are numbered.
    """
    head = [b""]
    while not (beginning := b"".join(head).removeprefix(BYTE_ORDER_MARK).strip()) and (line := stream.readline()):
        head.append(line)
    is_array = beginning.startswith(b"[")
    if not is_array and not _is_incomplete_json(beginning):
        yield from _read_jsonl(itertools.chain(head[1:], stream))
        return
    text = _decode_utf8(b"".join([*head, stream.read()]).removeprefix(BYTE_ORDER_MARK))
    if isinstance(text, BadRecordError):
        raise _UnreadableFileError(f"1: {text}")
    number = 0
    try:
        for value in _parse_array(text) if is_array else _parse_sequence(text):
            number += 1
            yield number, value
    except (ValueError, RecursionError) as error:
        raise _UnreadableFileError(f"{number + 1}: {_build_json_error(error)}") from None


def _is_incomplete_json(line: bytes) -> bool:
    """Return True if the JSON value that begins in `line` does not end in it."""
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        return error.pos >= len(error.doc)
    except (ValueError, RecursionError):
        pass
    return False


def _parse_array(text: str) -> Iterator[Any]:
    """Yield the values of a JSON array."""
    position = _skip_space(text, text.index("[") + 1)
    ended = text.startswith("]", position)
    while not ended:
        value, position = _DECODER.raw_decode(text, position)
        yield value
        position = _skip_space(text, position)
        ended = text.startswith("]", position)
        if not ended and not text.startswith(",", position):
            raise json.JSONDecodeError("Expecting ',' delimiter", text, position)
        if not ended:
            position = _skip_space(text, position + 1)
    if (position := _skip_space(text, position + 1)) < len(text):
        raise json.JSONDecodeError("Extra data", text, position)


def _parse_sequence(text: str) -> Iterator[Any]:
    """Yield concatenated JSON values."""
    position = _skip_space(text, 0)
    while position < len(text):
        value, position = _DECODER.raw_decode(text, position)
        yield value
        position = _skip_space(text, position)


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None
    return match.end()


def _read_parquet(stream: Any, columns: Collection[str] | None) -> Iterator[tuple[int, Any]]:
    number = 0
    for names, batch in _read_parquet_batches(stream, columns):
        for value in _convert_rows(batch):
            number += 1
            yield number, add_unread_columns(value, names)


def add_unread_columns(value: Any, names: Sequence[str]) -> Any:
    """Add the unread columns of a Parquet file to a row, so that error messages can list them."""
    return value if isinstance(value, BadRecordError) else dict.fromkeys(names, ...) | value


def _read_parquet_batches(stream: Any, columns: Collection[str] | None) -> Iterator[tuple[list[str], pa.RecordBatch]]:
    """Yield the names of all columns of a file with each batch of the columns in use."""
    file = pq.ParquetFile(stream)
    try:
        schema = file.schema_arrow
        _refuse_repeated_names(schema)
        leaves = [leaf for field in schema for leaf in _list_leaves(field.name, field.type)]
    except UnicodeDecodeError:
        raise _UnreadableFileError("1: the name of a column is not UTF-8: rename it") from None
    used = None
    if columns is not None and len(leaves) == len(file.schema):
        # Both schemas list the leaves in the same order, but paths in the Parquet schema have steps for list items.
        paths = [file.schema.column(number).path for number in range(len(leaves))]
        used = [path for path, leaf in zip(paths, leaves, strict=True) if _is_used(leaf, columns)]
    for batch in iterate_batches(file, used, _PART_ROWS):
        yield schema.names, batch


def iterate_batches(
    file: pq.ParquetFile, columns: Sequence[str] | None = None, size: int = 1024
) -> Iterator[pa.RecordBatch]:
    """Yield batches of at most `size` rows, none of which spans two row groups."""
    # If asked for all row groups in one call, Arrow keeps everything it has read in memory until the end.
    for group in range(file.num_row_groups):
        yield from file.iter_batches(size, row_groups=[group], columns=columns)


def _refuse_repeated_names(fields: Iterable[pa.Field], within: str = "") -> None:
    """Raise _UnreadableFileError if two of `fields`, or two fields nested in one of them, have the same name."""
    fields = list(fields)
    names = [f"{within}{field.name}" for field in fields]
    if len(set(names)) < len(names):
        raise _UnreadableFileError(f"1: the file has two columns {_find_repeated_name(names)}: rename one")
    for name, field in zip(names, fields, strict=True):
        _refuse_repeated_names(_get_nested_fields(field.type), f"{name}.")


def _get_nested_fields(kind: pa.DataType) -> list[pa.Field]:
    """Return the fields of a struct type, or of the structs in a list type."""
    while _is_list(kind):
        kind = kind.value_type
    return [kind.field(number) for number in range(kind.num_fields)] if pa.types.is_struct(kind) else []


def _list_leaves(name: str, kind: pa.DataType) -> Iterator[str]:
    """Yield the dotted names of the leaf values of a column, without steps for lists."""
    if isinstance(kind, pa.BaseExtensionType):
        yield from _list_leaves(name, kind.storage_type)
    elif pa.types.is_map(kind):
        yield from _list_leaves(name, kind.key_type)
        yield from _list_leaves(name, kind.item_type)
    elif _is_list(kind):
        yield from _list_leaves(name, kind.value_type)
    elif pa.types.is_struct(kind):
        for field in _get_nested_fields(kind):
            yield from _list_leaves(f"{name}.{field.name}", field.type)
    else:
        yield name


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_used(leaf: str, columns: Collection[str]) -> bool:
    return any(leaf == column or leaf.startswith(f"{column}.") for column in columns)


_VALUE_ERRORS = (ArithmeticError, LookupError, NotImplementedError, TypeError, ValueError)


def _convert_rows(batch: pa.RecordBatch) -> list[Any]:
    """Convert the rows of `batch` to dicts; a row with a value that Python cannot represent is a BadRecordError."""
    try:
        return list(batch.to_pylist())
    except _VALUE_ERRORS:
        return [convert_row(batch, number) for number in range(batch.num_rows)]


def convert_row(batch: pa.RecordBatch, number: int) -> dict[str, Any] | BadRecordError:
    """Convert a row of `batch` to a dict; return a BadRecordError if Python cannot represent one of its values."""
    row = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[name] = column[number].as_py()
        except _VALUE_ERRORS as error:
            return BadRecordError(
                f"column {printable(repr(name))} contains a value that cannot be read: {printable(error)}"
            )
    return row


def _read_csv(stream: Any) -> Iterator[tuple[int, Any]]:
    """Yield the rows below the header with the number of their first line.

    Trailing columns without a name, which spreadsheets write, are left out if they are empty.
    """
    csv.field_size_limit(2**31 - 1)
    lines = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    header: list[str] = []
    num_columns = 0
    for number, cells in _read_csv_rows(csv.reader(lines, strict=True)):
        if not num_columns:
            header = _parse_header(number, cells)
            num_columns = _count_cells(header)
        elif isinstance(cells, BadRecordError):
            yield number, cells
        elif not num_columns <= len(cells) <= len(header):
            yield number, BadRecordError(f"{len(cells)} columns, but the header has {len(header)}")
        elif (end := _count_cells(cells)) > num_columns:
            yield number, BadRecordError(f"column {end} contains {printable(repr(cells[end - 1]))}, but has no name")
        else:
            yield number, dict(zip(header[:num_columns], cells, strict=False))


def _count_cells(cells: Sequence[str]) -> int:
    """Count the cells up to the last one that is not blank."""
    return next((number for number in range(len(cells), 0, -1) if cells[number - 1].strip()), 0)


def _read_csv_rows(reader: Any) -> Iterator[tuple[int, list[str] | BadRecordError]]:
    """Yield the rows that are not empty with the number of their first line."""
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader)
            "".join(cells).encode()
        except StopIteration:
            return
        except csv.Error as error:
            if reader.line_num > number:  # the quoted text may span many records
                raise _UnreadableFileError(
                    f"{number}: not CSV: a quote that opens there does not close as it should up to line"
                    f" {reader.line_num} ({error}): close it, or double it if it is text"
                ) from None
            yield number, BadRecordError(f"not CSV: {error}")
        except UnicodeEncodeError:
            yield number, BadRecordError("not UTF-8")
        else:
            if cells:
                yield number, cells


def _parse_header(number: int, cells: list[str] | BadRecordError) -> list[str]:
    """Check the names of the columns and return the cells of the header, including empty ones at the end.

    Raises:
        _UnreadableFileError: if names are missing or repeated.
    """
    if isinstance(cells, BadRecordError):
        raise _UnreadableFileError(f"{number}: the header is {cells}")
    names = cells[: _count_cells(cells)]
    if not names:
        raise _UnreadableFileError(f"{number}: the header has no names: write one above each column")
    if names.count("") > 1:
        first, second = itertools.islice((column for column, name in enumerate(names, 1) if not name), 2)
        raise _UnreadableFileError(f"{number}: the header has no name for columns {first} and {second}: write them")
    if len(set(names)) < len(names):
        raise _UnreadableFileError(f"{number}: the header has two columns {_find_repeated_name(names)}: rename one")
    return cells


def _read_text(stream: Any, text_record: str) -> Iterator[tuple[int, Any]]:
    """Yield the records of plain text, {"title": "", "answers.text": text}; an empty line ends a paragraph."""
    start, lines = 1, list[str]()
    for number, line in enumerate(_read_lines(stream), 1):
        text = _decode_utf8(line.encode("utf-8", "surrogateescape"))
        if isinstance(text, BadRecordError):
            yield number, text
            continue
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


def _read_lines(stream: Any) -> Iterator[str]:
    """Yield the lines of a text with line ends \\r\\n, \\r and \\r\\r\\n replaced by \\n."""
    last = ""
    for line in io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline=""):
        if line != "\r\n" or not last.endswith("\r"):  # otherwise \r\r\n: a line end that was converted twice
            yield re.sub("\r\n?$", "\n", line)
        last = line
