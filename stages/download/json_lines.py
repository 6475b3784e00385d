"""JSON Lines, read as columns: pyarrow's parser where every line is one regular object, as of nearly all files."""

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

_SAMPLE = 20  # lines whose values say of which types the columns are
_NESTED = 200  # brackets in a line, with more of which it may be nested too deeply for Python's parser

_Tree = dict[str, Any]  # name of a field to the tree of those in it that are used; an empty one: its own value is


def parse_lines(content: bytes, names: Sequence[str], required: Iterable[str]) -> SourceColumns:
    """The columns `names` of JSON objects, one a line.

    Args:
        content: the lines.
        required: those of the columns that every record must have.

    Raises:
        IrregularError: if a line holds anything but one object, or something that is wrong or may be; or if the values
            of a column are of several types.
    """
    starts, ends = _find_lines(content)
    tree = _tree_of(names)
    sample = [_load(content[start:end]) for start, end in zip(starts[:_SAMPLE], ends[:_SAMPLE], strict=True)]
    fields = [pa.field(name, _infer(_values(sample, name), below)) for name, below in tree.items()]
    options = pa.json.ParseOptions(
        explicit_schema=pa.schema(fields), newlines_in_values=False, unexpected_field_behavior="ignore"
    )
    reading = pa.json.ReadOptions(use_threads=False, block_size=len(content) + 1)
    try:
        table = pa.json.read_json(pa.BufferReader(content), reading, options)
    except pa.ArrowInvalid:  # a repeated key, a value of another type, no JSON
        raise IrregularError("not of these types") from None
    if table.num_rows != len(starts):
        raise IrregularError("not an object a line")
    (batch,) = table.combine_chunks().to_batches()
    nested = _without_variants(batch, tree)
    if any("." in name and name not in nested.schema.names and f'"{name}"'.encode() in content for name in required):
        raise IrregularError("nested and flattened")  # flattened, but null
    return SourceColumns(nested, _count_brackets(content, starts) <= _NESTED, null_may_be_absent=True)


def _find_lines(content: bytes) -> tuple[Ints, Ints]:
    """Where the lines begin and where they end, [num_lines] each.

    Raises:
        IrregularError: unless the content is UTF-8, and each line begins and ends as an object does, so that none goes
            on in the next.
    """
    # As a string, without a copy.
    offsets = to_arrow(np.array([0, len(content)])).buffers()[1]
    try:
        pa.Array.from_buffers(pa.large_string(), 1, [None, offsets, pa.py_buffer(content)]).validate(full=True)
    except pa.ArrowInvalid:
        raise IrregularError("not UTF-8") from None
    characters = np.frombuffer(content, np.uint8)
    ends = np.flatnonzero(characters == ord("\n"))
    if not content.endswith(b"\n"):
        ends = np.append(ends, len(content))
    starts = np.concatenate([[0], ends[:-1] + 1])
    if (ends == starts).any():
        raise IrregularError("blank lines")
    if (characters[starts] != ord("{")).any() or (characters[ends - 1] != ord("}")).any():
        raise IrregularError("not an object a line")
    if _holds_inf(characters):
        raise IrregularError("Inf")
    return starts, ends


def _count_brackets(content: bytes, starts: Ints) -> Ints:
    """Opening brackets in each line, [num_lines], as many as it is nested at most."""
    characters = np.frombuffer(content, np.uint8)
    brackets = np.flatnonzero((characters == ord("{")) | (characters == ord("[")))
    return np.diff(np.searchsorted(brackets, np.append(starts, len(content))))


def _holds_inf(characters: npt.NDArray[np.uint8]) -> bool:
    """Whether `Inf` is a word of these: pyarrow takes it for the number for which JSON in Python has Infinity alone."""
    found = np.flatnonzero(characters[:-3] == ord("I"))
    for place, letter in ((1, "n"), (2, "f")):
        found = found[characters[found + place] == ord(letter)]
    return not all(chr(code).isalnum() for code in characters[found + 3].tolist())


def _load(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        raise IrregularError("not JSON") from None


def _tree_of(names: Iterable[str]) -> _Tree:
    """The columns `names` as fields within fields, and each by its whole name as well, as flattened records have it.

    Raises:
        IrregularError: if a column is used of which a field is used, too.
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


def _values(objects: Iterable[Any], name: str) -> list[Any]:
    return [item[name] for item in objects if isinstance(item, Mapping) and item.get(name) is not None]


def _infer(values: Sequence[Any], tree: _Tree) -> pa.DataType:
    """The type of a field of which these are some values that are not null, and `tree` the fields in it that are used.

    Raises:
        IrregularError: if they are of several types, or of floats, of which pyarrow takes whole numbers for some.
    """
    if values and all(isinstance(value, list) for value in values):
        items = [item for item in itertools.chain.from_iterable(values) if item is not None]
        return pa.list_(_infer(items, tree))
    kinds = {type(value) for value in values}
    if tree and kinds <= {dict}:
        return pa.struct([pa.field(name, _infer(_values(values, name), below)) for name, below in tree.items()])
    types = {str: pa.string(), bool: pa.bool_(), int: pa.int64()}
    if len(kinds) > 1 or not kinds <= types.keys():
        raise IrregularError("several types")
    return types[kinds.pop()] if kinds else pa.string()


def _without_variants(batch: pa.RecordBatch, tree: _Tree) -> pa.RecordBatch:
    """`batch` without the columns of flattened records where records are nested.

    Raises:
        IrregularError: if some are nested and some flattened.
    """
    for name in tree:
        first, dot, _ = name.partition(".")
        if dot and first in batch.schema.names:
            flattened = batch.column(name).null_count < batch.num_rows
            if flattened and batch.column(first).null_count < batch.num_rows:
                raise IrregularError("nested and flattened")
            batch = batch.drop_columns([first if flattened else name])
    return batch
