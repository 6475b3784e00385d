"""Conversions between Arrow and numpy arrays, without copies if possible, and operations on Arrow lists and texts.

Arrow's own functions (`pyarrow.array`, `scalar`, `to_numpy`) import pandas if it is installed, which takes each process
half a second.
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
    """Convert `values`, [num_values], bool, to an Arrow array."""
    return pa.Array.from_buffers(pa.bool_(), len(values), [None, _pack_bits(values)])


def to_bools(array: pa.BooleanArray) -> Bools:
    """Convert an Arrow array without nulls to numpy, [len(array)], bool."""
    # Arrow stores 8 values per byte; a slice begins `array.offset` bits into the buffer.
    bits = np.frombuffer(array.buffers()[1] or b"", np.uint8)
    return np.unpackbits(bits, count=array.offset + len(array), bitorder="little")[array.offset :].astype(np.bool_)


def _pack_bits(values: Bools) -> pa.Buffer:
    return pa.py_buffer(np.packbits(values, bitorder="little"))


def take_values(array: pa.Array, positions: Ints, is_null: Bools | None = None) -> pa.Array:
    """Take the values at `positions`, [num_positions], int64; null where `is_null`, [num_positions], is True."""
    validity = None if is_null is None else _pack_bits(~is_null)
    buffers = [validity, pa.py_buffer(np.ascontiguousarray(positions))]
    return array.take(pa.Array.from_buffers(pa.int64(), len(positions), buffers))


def repeat_text(text: str, number: int) -> pa.StringArray:
    """Return an array of `number` copies of `text`, [number]."""
    return pa.repeat(to_scalar(text), number)


def fill_null(array: pa.Array, filler: str | int) -> pa.Array:
    """Replace the nulls of `array` by `filler`."""
    return pc.fill_null(array, to_scalar(filler).cast(array.type)) if array.null_count else array


def to_scalar(value: str | int) -> pa.Scalar:
    """Convert `value` to an Arrow scalar: a string or a 64-bit integer."""
    if isinstance(value, int):
        return to_arrow(np.array([value]))[0]
    content = value.encode()
    offsets = pa.py_buffer(np.array([0, len(content)], np.int32))
    return pa.Array.from_buffers(pa.string(), 1, [None, offsets, pa.py_buffer(content)])[0]


def make_lists(offsets: Ints, values: pa.Array, is_null: Bools | None = None) -> pa.ListArray:
    """Group `values` into lists.

    Args:
        offsets: index of each list's first value, and of the end of the last list, [num_lists + 1], int64.
        values: values of all lists, one after the other, [num_values].
        is_null: True for lists that are null, [num_lists], bool; None: no nulls.
    """
    starts = to_arrow(offsets.astype(np.int32))
    return pa.ListArray.from_arrays(starts, values, mask=None if is_null is None else from_bools(is_null))


def merge_chunks(column: pa.ChunkedArray) -> pa.Array:
    """Return the values of a column as a single array."""
    if column.num_chunks == 1:  # combine_chunks would copy it
        return column.chunk(0)
    combined = column.combine_chunks()
    return combined.chunk(0) if isinstance(combined, pa.ChunkedArray) else combined


def get_text_offsets(texts: pa.StringArray) -> Ints:
    """Return the byte offset of each text in the buffer of `texts`, and of the end, [len(texts) + 1], int64."""
    offsets = np.frombuffer(texts.buffers()[1] or bytes(4), np.int32).astype(np.int64)
    return offsets[texts.offset : texts.offset + len(texts) + 1]


def compute_list_offsets(lists: pa.ListArray) -> Ints:
    """Return the index of each list's first item in `lists.flatten()`, and of the end, [len(lists) + 1], int64."""
    lengths = to_numpy(fill_null(pc.list_value_length(lists), 0))
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def sum_per_record(offsets: Ints, values: npt.NDArray[Any]) -> Ints:
    """Sum `values`, [num_values], over each record, whose values begin at `offsets`, [num_records + 1], int64.

    Returns:
        [num_records], int64.
    """
    # Differences of the cumulative sum, [num_values + 1], at the bounds of the records. Empty records have 0.
    sums: Ints = np.diff(np.concatenate([[0], np.cumsum(values, dtype=np.int64)])[offsets])
    return sums


def concatenate_ranges(starts: Ints, lengths: Ints) -> Ints:
    """Concatenate the ranges [start, start + length).

    Args:
        starts: [num_ranges], int64.
        lengths: [num_ranges], int64.

    Returns:
        [sum of lengths], int64.
    """
    # Position of each range in the result, [num_ranges]. A running index plus (start - position) counts from start.
    positions = np.cumsum(lengths) - lengths
    indices: Ints = np.arange(lengths.sum()) + np.repeat(starts - positions, lengths)
    return indices
