"""JSON Lines read as columns by pyarrow's parser, for the usual case that every line is one regular object."""

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.json

from stages.core.artifacts import to_arrow
from stages.download.arrays import Ints
from stages.download.columns import IrregularError, SourceColumns

_SAMPLE_LINES = 20  # number of lines from which the types of the columns are inferred
_MAX_BRACKETS = 200  # per line; with more, it may be nested too deeply for Python's parser

_Tree = dict[str, Any]  # field name to the tree of its fields in use; an empty tree: the value itself is used


def parse_json_lines(content: bytes, names: Sequence[str], required: Iterable[str]) -> SourceColumns:
    """Parse lines that have one JSON object each to columns.

    Args:
        content: the lines.
        names: the columns to read.
        required: the columns that every record must have.

    Returns:
        The columns `names`, [num_lines]; unknown fields are ignored.

    Raises:
        IrregularError: if a line is not a single object, if it is invalid or could be, or if the values of a column
            have several types.
    """
    starts, ends = _find_lines(content)
    tree = _build_tree(names)
    sample = [
        _parse_json(content[start:end]) for start, end in zip(starts[:_SAMPLE_LINES], ends[:_SAMPLE_LINES], strict=True)
    ]
    fields = [pa.field(name, _infer_type(_collect_values(sample, name), below)) for name, below in tree.items()]
    options = pa.json.ParseOptions(
        explicit_schema=pa.schema(fields), newlines_in_values=False, unexpected_field_behavior="ignore"
    )
    reading = pa.json.ReadOptions(use_threads=False, block_size=len(content) + 1)
    try:
        table = pa.json.read_json(pa.BufferReader(content), reading, options)
    except pa.ArrowInvalid:  # a repeated key, a value of another type, invalid JSON
        raise IrregularError("not of the inferred types") from None
    if table.num_rows != len(starts):
        raise IrregularError("not one object per line")
    (batch,) = table.combine_chunks().to_batches()
    nested = _drop_unused_variants(batch, tree)
    if any("." in name and name not in nested.schema.names and f'"{name}"'.encode() in content for name in required):
        raise IrregularError("nested and flattened")  # the flattened values are null
    return SourceColumns(nested, _count_brackets(content, starts) <= _MAX_BRACKETS, null_may_be_absent=True)


def _find_lines(content: bytes) -> tuple[Ints, Ints]:
    """Return the byte offsets of the starts and ends of the lines, [num_lines] each, int64.

    Raises:
        IrregularError: if the content is not UTF-8, or if a line does not begin with `{` and end with `}`; no object
            may span several lines.
    """
    # Validate the content as an Arrow string of 1 element, without a copy. offsets: [2], int64.
    offsets = to_arrow(np.array([0, len(content)])).buffers()[1]
    try:
        pa.Array.from_buffers(pa.large_string(), 1, [None, offsets, pa.py_buffer(content)]).validate(full=True)
    except pa.ArrowInvalid:
        raise IrregularError("not UTF-8") from None
    characters = np.frombuffer(content, np.uint8)  # [num_bytes]
    ends = np.flatnonzero(characters == ord("\n"))
    if not content.endswith(b"\n"):
        ends = np.append(ends, len(content))
    starts = np.concatenate([[0], ends[:-1] + 1])
    if (ends == starts).any():
        raise IrregularError("blank lines")
    if (characters[starts] != ord("{")).any() or (characters[ends - 1] != ord("}")).any():
        raise IrregularError("not one object per line")
    if _has_inf(characters):
        raise IrregularError("Inf")
    return starts, ends


def _count_brackets(content: bytes, starts: Ints) -> Ints:
    """Count the opening brackets in each line, [num_lines], int64: an upper bound of its nesting depth."""
    characters = np.frombuffer(content, np.uint8)
    # Byte offsets of all brackets, [num_brackets]; then the number of brackets before each line.
    brackets = np.flatnonzero((characters == ord("{")) | (characters == ord("[")))
    return np.diff(np.searchsorted(brackets, np.append(starts, len(content))))


def _has_inf(characters: npt.NDArray[np.uint8]) -> bool:
    """Return True if `characters`, [num_bytes], contain the word `Inf`.

    Pyarrow parses it as a number; Python's parser only accepts `Infinity`.
    """
    found = np.flatnonzero(characters[:-3] == ord("I"))
    for offset, letter in ((1, "n"), (2, "f")):
        found = found[characters[found + offset] == ord(letter)]
    return not all(chr(code).isalnum() for code in characters[found + 3].tolist())


def _parse_json(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        raise IrregularError("not JSON") from None


def _build_tree(names: Iterable[str]) -> _Tree:
    """Build the tree of the columns `names`, each both as nested fields and under its dotted name (flattened records).

    Raises:
        IrregularError: if both a column and one of its fields are used.
    """
    tree: _Tree = {}
    leaves, inner = set(), set()
    for name in names:
        steps = name.split(".")
        below = tree
        for step in steps:
            below = below.setdefault(step, {})
        tree.setdefault(name, {})
        leaves |= {name}
        inner |= {".".join(steps[:length]) for length in range(1, len(steps))}
    if leaves & inner:
        raise IrregularError("a column and a field of it")
    return tree


def _collect_values(objects: Iterable[Any], name: str) -> list[Any]:
    return [item[name] for item in objects if isinstance(item, Mapping) and item.get(name) is not None]


def _infer_type(values: Sequence[Any], tree: _Tree) -> pa.DataType:
    """Infer the type of a field from a sample of its values.

    Args:
        values: values other than null.
        tree: the fields in use within this field.

    Raises:
        IrregularError: if the values have several types, or are floats, some of which pyarrow reads as integers.
    """
    if values and all(isinstance(value, list) for value in values):
        items = [item for item in itertools.chain.from_iterable(values) if item is not None]
        return pa.list_(_infer_type(items, tree))
    kinds = {type(value) for value in values}
    if tree and kinds <= {dict}:
        return pa.struct(
            [pa.field(name, _infer_type(_collect_values(values, name), below)) for name, below in tree.items()]
        )
    types = {str: pa.string(), bool: pa.bool_(), int: pa.int64()}
    if len(kinds) > 1 or not kinds <= types.keys():
        raise IrregularError("several types")
    return types[kinds.pop()] if kinds else pa.string()


def _drop_unused_variants(batch: pa.RecordBatch, tree: _Tree) -> pa.RecordBatch:
    """Drop the columns of flattened records if the records are nested, and the nested ones if they are flattened.

    Raises:
        IrregularError: if some records are nested and others are flattened.
    """
    for name in tree:
        first, dot, _ = name.partition(".")
        if dot and first in batch.schema.names:
            flattened = batch.column(name).null_count < batch.num_rows
            if flattened and batch.column(first).null_count < batch.num_rows:
                raise IrregularError("nested and flattened")
            batch = batch.drop_columns([first if flattened else name])
    return batch
