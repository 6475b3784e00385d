"""Records as files of five formats hold them."""

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
    compression_of,
    describe_web,
    find_files,
    format_of,
    is_local,
    is_web,
    own_split,
)
from stages.download.records import BadRecordError, RepeatedKeys, Row, columns_read
from stages.download.schema import SourceData

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


PART_BYTES = 4 * 2**20  # of a part, about
_PART_ROWS = 1000
_PIECE_BYTES = 2**18  # read at once


class FileRange(NamedTuple):
    """Bytes of a local file, for a process that reads them itself."""

    path: str
    start: int
    end: int

    def read(self) -> bytes:
        """The bytes."""
        with Path(self.path).open("rb") as stream:
            stream.seek(self.start)
            return stream.read(self.end - self.start)


class Part(NamedTuple):
    """Consecutive records of a file, as yet unread: what a process is given."""

    where: str
    """The file."""
    split: str | None
    """The source's own split, where it has one."""
    first: int
    """Number of the first line or row."""
    content: bytes | FileRange | pa.RecordBatch | list[Row]
    """Lines of JSON, where in a file such lines are, columns, or rows."""
    names: list[str]
    """All columns of the file, of which `content` may have only those that are used."""


def read(data: SourceData) -> Iterator[Row]:
    """The rows of the files that `data` describes, in order (files by name)."""
    for file_system, file in find_files(data.path):
        yield from read_rows(file_system, file, data.text_record, columns_read(data))


def read_rows(
    file_system: Any, file: str, text_record: str = "file", columns: Collection[str] | None = None
) -> Iterator[Row]:
    """The rows of `file`.

    Args:
        columns: those that are used (dotted names go into nested fields), where the format can leave out others; None:
            all.
    """
    split, where = own_split(file), printable(file, PATH_LIMIT)
    with _reading(file_system, file) as stream:
        if format_of(file) == "parquet":
            places = _parquet(stream, columns)
        else:
            places = _places(stream, str(format_of(file)), text_record)
        for place, value in places:
            yield Row(f"{where}:{place}", split, value)


def read_parts(data: SourceData) -> Iterator[Part]:
    """The records of the files that `data` describes in parts, in order (files by name)."""
    for file_system, file in find_files(data.path):
        split, where, kind = own_split(file), printable(file, PATH_LIMIT), format_of(file)
        with _reading(file_system, file) as stream:
            if kind == "parquet":
                yield from _table_parts(stream, where, split, columns_read(data))
            elif kind == "jsonl" and is_local(file_system) and compression_of(file) is None:
                yield from _range_parts(stream, file, where, split)
            elif kind == "jsonl":
                yield from _line_parts(stream, where, split)
            else:
                places = _places(stream, str(kind), data.text_record)
                yield from row_parts(Row(f"{where}:{place}", split, value) for place, value in places)


def row_parts(rows: Iterable[Row]) -> Iterator[Part]:
    """The rows in parts, each of one split; those before an error come first."""
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
        if found and (len(found) == _PART_ROWS or size >= PART_BYTES or row.split != found[0].split):
            yield Part("", found[0].split, 0, found, [])
            found, size = [], 0
        found.append(row)
        values = row.value.values() if isinstance(row.value, dict) else []
        size += sum(len(value) for value in values if isinstance(value, str))
    if found:
        yield Part("", found[0].split, 0, found, [])
    if failure is not None:
        raise failure


def _line_parts(stream: Any, where: str, split: str | None) -> Iterator[Part]:
    """Parts that end at line ends; those before an error come first."""
    number, waiting, size, failure = 1, list[bytes](), 0, None
    ended = False
    while not ended:
        try:
            piece = stream.read1(_PIECE_BYTES)
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
            yield Part(where, split, number, content, [])
            number += _count_lines(content)
    if failure is not None:
        raise failure


def _range_parts(stream: Any, file: str, where: str, split: str | None) -> Iterator[Part]:
    """The same of a file that other processes can read: it is read here as well, but for its line ends alone."""
    number, start = 1, 0
    while content := stream.read(PART_BYTES):
        rest = b"" if content.endswith(b"\n") else stream.readline()
        end = start + len(content) + len(rest)
        yield Part(where, split, number, FileRange(file, start, end), [])
        number, start = number + _count_lines(content) + _count_lines(rest), end


def _count_lines(content: bytes) -> int:
    # In a third of the time of bytes.count.
    return int(np.count_nonzero(np.frombuffer(content, np.uint8) == ord("\n")))


def _table_parts(stream: Any, where: str, split: str | None, columns: Collection[str]) -> Iterator[Part]:
    number = 1
    for names, batch in _parquet_batches(stream, columns):
        yield Part(where, split, number, batch, names)
        number += batch.num_rows


@contextlib.contextmanager
def _reading(file_system: Any, file: str) -> Iterator[Any]:
    """The decompressed bytes of `file`; within, errors of reading it are those that say what is wrong with it."""
    where, kind = printable(file, PATH_LIMIT), format_of(file)
    try:
        with _open(file_system, file, whole=kind != "parquet") as stream:
            if kind == "parquet":
                yield stream
            else:
                lines = io.BufferedReader(stream)
                _refuse_other_content(lines.peek(8), where)
                yield lines
    except _UnreadableError as error:
        raise StageError(f"{where}:{error}") from None
    except Exception as error:
        if reason := describe_web(error):
            raise StageError(f"{where}: {reason}") from None
        if isinstance(error, FileNotFoundError):  # over HTTP without a number
            raise StageError(f"{where}: no such file") from None
        if isinstance(error, OSError) and error.errno is not None:  # the system's; decompressors' have no number
            raise OSError(error.errno, error.strerror or str(error), error.filename or file) from None
        if isinstance(error, EOFError | OSError | zlib.error | lzma.LZMAError | pa.ArrowInvalid):
            raise StageError(f"{where} is damaged or cut short: {printable(error)}") from None
        raise


def _places(stream: Any, kind: str, text_record: str) -> Iterator[tuple[int, Any]]:
    """Line and value of each record of a file that is no Parquet file."""
    return _text(stream, text_record) if kind == "text" else {"jsonl": _jsonl, "json": _json, "csv": _csv}[kind](stream)


def _refuse_other_content(beginning: bytes, file: str) -> None:
    """Raise StageError if a file of text begins as none does."""
    for signature, content in _SIGNATURES.items():
        if beginning.startswith(signature):
            raise StageError(f"{file} holds {content}, not what its name says: rename or convert it")


def _open(file_system: Any, file: str, whole: bool) -> Any:
    """The decompressed bytes of `file`.

    Args:
        whole: read from beginning to end: over HTTP in one answer, since not every server sends parts.
    """
    options = {"block_size": 0} if whole and is_web(file) else {}
    compression = compression_of(file)
    if compression != "zstd":
        return file_system.open(file, "rb", compression=compression, **options)
    # fsspec's reader gives no lines, ends at the first of several frames, and takes a truncated file for a whole one.
    stream = pa.PythonFile(file_system.open(file, "rb", **options), mode="r")
    return io.BufferedReader(pa.CompressedInputStream(stream, compression))


class _UnreadableError(Exception):
    """A file of which no one can say what its records are, so that none can be left out; says where, and why."""


def _decode(line: bytes) -> str | BadRecordError:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        return BadRecordError(f"not UTF-8 (byte {error.start} of the line)")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, of which `json` would take the last of two equal keys."""
    found = dict(pairs)
    return found if len(found) == len(pairs) else RepeatedKeys(pairs)


def _repeated(names: Iterable[str]) -> str:
    """The first of `names` that is there more than once, for a message."""
    return printable(repr(next(name for name, count in Counter(names).items() if count > 1)))


BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # of UTF-8, at the beginning of a file
_DECODER = json.JSONDecoder(object_pairs_hook=_object)
_SPACE = re.compile(r"[ \t\n\r]*")


def _not_json(error: Exception) -> BadRecordError:
    return BadRecordError(f"not JSON: {printable(error)}")


def parse_line(line: bytes) -> Any:
    """The JSON value that a line holds, or a BadRecordError."""
    text = _decode(line)
    if isinstance(text, BadRecordError):
        return text
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        return _not_json(error)


def _jsonl(stream: Any) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(stream, 1):
        line = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
        if line.strip():
            yield number, parse_line(line)


def _json(stream: Any) -> Iterator[tuple[int, Any]]:
    """Records of an array, of lines as in .jsonl, or of values over several lines each, one after the other.

    All but lines are read whole, and counted by value instead of by line.
    """
    head = [b""]
    while not (beginning := b"".join(head).removeprefix(BYTE_ORDER_MARK).strip()) and (line := stream.readline()):
        head.append(line)
    is_array = beginning.startswith(b"[")
    if not is_array and not _goes_on(beginning):
        yield from _jsonl(itertools.chain(head[1:], stream))
        return
    text = _decode(b"".join([*head, stream.read()]).removeprefix(BYTE_ORDER_MARK))
    if isinstance(text, BadRecordError):
        raise _UnreadableError(f"1: {text}")
    number = 0
    try:
        for value in _array(text) if is_array else _sequence(text):
            number += 1
            yield number, value
    except (ValueError, RecursionError) as error:
        raise _UnreadableError(f"{number + 1}: {_not_json(error)}") from None


def _goes_on(line: bytes) -> bool:
    """Whether the JSON value that begins in `line` does not end there."""
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        return error.pos >= len(error.doc)
    except (ValueError, RecursionError):
        pass
    return False


def _array(text: str) -> Iterator[Any]:
    """The values of the JSON array that `text` is."""
    position = _after_space(text, text.index("[") + 1)
    ended = text.startswith("]", position)
    while not ended:
        value, position = _DECODER.raw_decode(text, position)
        yield value
        position = _after_space(text, position)
        ended = text.startswith("]", position)
        if not ended and not text.startswith(",", position):
            raise json.JSONDecodeError("Expecting ',' delimiter", text, position)
        if not ended:
            position = _after_space(text, position + 1)
    if (position := _after_space(text, position + 1)) < len(text):
        raise json.JSONDecodeError("Extra data", text, position)


def _sequence(text: str) -> Iterator[Any]:
    """The JSON values in `text`, one after the other."""
    position = _after_space(text, 0)
    while position < len(text):
        value, position = _DECODER.raw_decode(text, position)
        yield value
        position = _after_space(text, position)


def _after_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None
    return match.end()


def _parquet(stream: Any, columns: Collection[str] | None) -> Iterator[tuple[int, Any]]:
    number = 0
    for names, batch in _parquet_batches(stream, columns):
        for value in _rows(batch):
            number += 1
            yield number, with_unread(value, names)


def with_unread(value: Any, names: Sequence[str]) -> Any:
    """A row of Parquet with all columns of its file, so that messages can name those that are not read."""
    return value if isinstance(value, BadRecordError) else dict.fromkeys(names, ...) | value


def _parquet_batches(stream: Any, columns: Collection[str] | None) -> Iterator[tuple[list[str], pa.RecordBatch]]:
    """The names of all columns of a file, and a batch of those that are used."""
    file = pq.ParquetFile(stream)
    try:
        schema = file.schema_arrow
        _refuse_repeated(schema)
        leaves = [leaf for field in schema for leaf in _leaves(field.name, field.type)]
    except UnicodeDecodeError:
        raise _UnreadableError("1: the name of a column is not UTF-8: rename it") from None
    used = None
    if columns is not None and len(leaves) == len(file.schema):
        # The leaves of both schemas are in the same order, but paths in Parquet's have steps for the items of lists.
        paths = [file.schema.column(number).path for number in range(len(leaves))]
        used = [path for path, leaf in zip(paths, leaves, strict=True) if _is_used(leaf, columns)]
    for batch in iterate_batches(file, used, _PART_ROWS):
        yield schema.names, batch


def iterate_batches(
    file: pq.ParquetFile, columns: Sequence[str] | None = None, size: int = 1024
) -> Iterator[pa.RecordBatch]:
    """Batches of at most `size` rows, of which none is of two row groups."""
    # Asked for all row groups at once, Arrow keeps what it has read of a file until its end.
    for group in range(file.num_row_groups):
        yield from file.iter_batches(size, row_groups=[group], columns=columns)


def _refuse_repeated(fields: Iterable[pa.Field], within: str = "") -> None:
    """Raise _UnreadableError if two of `fields`, or two fields nested in one of them, have one name."""
    fields = list(fields)
    names = [f"{within}{field.name}" for field in fields]
    if len(set(names)) < len(names):
        raise _UnreadableError(f"1: the file has two columns {_repeated(names)}: rename one")
    for name, field in zip(names, fields, strict=True):
        _refuse_repeated(_nested(field.type), f"{name}.")


def _nested(kind: pa.DataType) -> list[pa.Field]:
    """The fields of a struct, or of the structs in a list."""
    while _is_list(kind):
        kind = kind.value_type
    return [kind.field(number) for number in range(kind.num_fields)] if pa.types.is_struct(kind) else []


def _leaves(name: str, kind: pa.DataType) -> Iterator[str]:
    """The dotted names of the values that a column consists of; lists add no step to them."""
    if isinstance(kind, pa.BaseExtensionType):
        yield from _leaves(name, kind.storage_type)
    elif pa.types.is_map(kind):
        yield from _leaves(name, kind.key_type)
        yield from _leaves(name, kind.item_type)
    elif _is_list(kind):
        yield from _leaves(name, kind.value_type)
    elif pa.types.is_struct(kind):
        for field in _nested(kind):
            yield from _leaves(f"{name}.{field.name}", field.type)
    else:
        yield name


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_used(leaf: str, columns: Collection[str]) -> bool:
    return any(leaf == column or leaf.startswith(f"{column}.") for column in columns)


_VALUE_ERRORS = (ArithmeticError, LookupError, NotImplementedError, TypeError, ValueError)


def _rows(batch: pa.RecordBatch) -> list[Any]:
    """The rows of `batch`, with a BadRecordError in place of one that holds a value that Python has not."""
    try:
        return list(batch.to_pylist())
    except _VALUE_ERRORS:
        return [read_row(batch, number) for number in range(batch.num_rows)]


def read_row(batch: pa.RecordBatch, number: int) -> dict[str, Any] | BadRecordError:
    """A row of `batch`, or a BadRecordError where it holds a value that Python has not."""
    row = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[name] = column[number].as_py()
        except _VALUE_ERRORS as error:
            return BadRecordError(
                f"column {printable(repr(name))} holds a value that cannot be read: {printable(error)}"
            )
    return row


def _csv(stream: Any) -> Iterator[tuple[int, Any]]:
    """The rows below the header, each at its first line.

    Columns at the end without a name, as spreadsheets write them, are left out while they are empty.
    """
    csv.field_size_limit(2**31 - 1)
    lines = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    header: list[str] = []
    num_columns = 0
    for number, cells in _cells(csv.reader(lines, strict=True)):
        if not num_columns:
            header = _header(number, cells)
            num_columns = _without_empty_end(header)
        elif isinstance(cells, BadRecordError):
            yield number, cells
        elif not num_columns <= len(cells) <= len(header):
            yield number, BadRecordError(f"{len(cells)} columns, not as many as the header's {len(header)}")
        elif (end := _without_empty_end(cells)) > num_columns:
            yield number, BadRecordError(f"column {end} holds {printable(repr(cells[end - 1]))}, but has no name")
        else:
            yield number, dict(zip(header[:num_columns], cells, strict=False))


def _without_empty_end(cells: Sequence[str]) -> int:
    """How many of `cells` there are up to the last that is not blank."""
    return next((number for number in range(len(cells), 0, -1) if cells[number - 1].strip()), 0)


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
    """The names of the columns; empty ones at the end are none."""
    if isinstance(cells, BadRecordError):
        raise _UnreadableError(f"{number}: the header is {cells}")
    names = cells[: _without_empty_end(cells)]
    if not names:
        raise _UnreadableError(f"{number}: the header has no names: write one above each column")
    if names.count("") > 1:
        first, second = itertools.islice((place for place, name in enumerate(names, 1) if not name), 2)
        raise _UnreadableError(f"{number}: the header has no name for columns {first} and {second}: write them")
    if len(set(names)) < len(names):
        raise _UnreadableError(f"{number}: the header has two columns {_repeated(names)}: rename one")
    return cells


def _text(stream: Any, text_record: str) -> Iterator[tuple[int, Any]]:
    """Records of plain text, {"title": "", "answers.text": text}; a paragraph ends at an empty line."""
    start, lines = 1, list[str]()
    for number, line in enumerate(_lines(stream), 1):
        text = _decode(line.encode("utf-8", "surrogateescape"))
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


def _lines(stream: Any) -> Iterator[str]:
    """The lines of a text, each but the last with \\n at its end, for which \\r\\n, \\r and \\r\\r\\n may stand."""
    last = ""
    for line in io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline=""):
        if line != "\r\n" or not last.endswith("\r"):  # else the end of a line that was converted twice
            yield re.sub("\r\n?$", "\n", line)
        last = line
