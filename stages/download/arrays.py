"""Arrow arrays from numpy's and back, without copies where there need be none.

Arrow's own ways (`pyarrow.array`, `scalar`, `to_numpy`) import pandas where it is installed: half a second of every
process.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stages.core.artifacts import to_arrow, to_numpy

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]


def from_bools(values: Bools) -> pa.BooleanArray:
    """An Arrow array of truth values, [len(values)]."""
    return pa.Array.from_buffers(pa.bool_(), len(values), [None, _pack(values)])


def to_bools(array: pa.BooleanArray) -> Bools:
    """The values of an Arrow array without nulls, [len(array)]."""
    bits = np.frombuffer(array.buffers()[1] or b"", np.uint8)
    return np.unpackbits(bits, count=array.offset + len(array), bitorder="little")[array.offset :].astype(np.bool_)


def _pack(values: Bools) -> pa.Buffer:
    return pa.py_buffer(np.packbits(values, bitorder="little"))


def take(array: pa.Array, positions: Ints, is_null: Bools | None = None) -> pa.Array:
    """The values at `positions`, [num_positions]; null where `is_null`."""
    validity = None if is_null is None else _pack(~is_null)
    buffers = [validity, pa.py_buffer(np.ascontiguousarray(positions))]
    return array.take(pa.Array.from_buffers(pa.int64(), len(positions), buffers))


def repeat(text: str, number: int) -> pa.StringArray:
    """`text` in each of `number` places."""
    return pa.repeat(to_scalar(text), number)


def fill_null(array: pa.Array, filler: str | int) -> pa.Array:
    """`array` with `filler` in the place of nulls."""
    return pc.fill_null(array, to_scalar(filler).cast(array.type)) if array.null_count else array


def to_scalar(value: str | int) -> pa.Scalar:
    """`value` as a string or a 64-bit integer of Arrow."""
    if isinstance(value, int):
        return to_arrow(np.array([value]))[0]
    content = value.encode()
    offsets = pa.py_buffer(np.array([0, len(content)], np.int32))
    return pa.Array.from_buffers(pa.string(), 1, [None, offsets, pa.py_buffer(content)])[0]


def make_lists(offsets: Ints, values: pa.Array, is_null: Bools | None = None) -> pa.ListArray:
    """Lists of `values`, of which those of each list begin at `offsets`, [num_lists + 1]."""
    starts = to_arrow(offsets.astype(np.int32))
    return pa.ListArray.from_arrays(starts, values, mask=None if is_null is None else from_bools(is_null))


def combine(column: pa.ChunkedArray) -> pa.Array:
    """The values of a column in one piece."""
    if column.num_chunks == 1:  # of which combine_chunks makes a copy
        return column.chunk(0)
    whole = column.combine_chunks()
    return whole.chunk(0) if isinstance(whole, pa.ChunkedArray) else whole


def text_offsets(texts: pa.StringArray) -> Ints:
    """Where each text begins in the buffer of their bytes, and where the last ends, [len(texts) + 1]."""
    offsets = np.frombuffer(texts.buffers()[1] or bytes(4), np.int32).astype(np.int64)
    return offsets[texts.offset : texts.offset + len(texts) + 1]


def list_offsets(lists: pa.ListArray) -> Ints:
    """Where the items of each list begin among those of all (`flatten`), and where the last end, [len(lists) + 1]."""
    lengths = to_numpy(fill_null(pc.list_value_length(lists), 0))
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def sum_by(offsets: Ints, values: npt.NDArray[Any]) -> Ints:
    """Sums of the values of each record, which begin at `offsets`, [num_records + 1]."""
    sums: Ints = np.diff(np.concatenate([[0], np.cumsum(values, dtype=np.int64)])[offsets])
    return sums


def ranges(starts: Ints, lengths: Ints) -> Ints:
    """start, start + 1, ... for each start, as many as its length, [sum of lengths]."""
    behind = np.cumsum(lengths) - lengths
    places: Ints = np.arange(lengths.sum()) + np.repeat(starts - behind, lengths)
    return places
