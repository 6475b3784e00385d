"""packing: the documents of a split are one stream, however it was cut, and only its end is left out."""

from collections.abc import Iterator
from itertools import pairwise
from random import Random

import numpy as np
import pytest
from data_helpers import steady
from hypothesis import example, given
from hypothesis import strategies as st

from stages.core.artifacts import TokenIds
from stages.group_texts.packing import pack


def documents_of(lengths: list[int]) -> list[TokenIds]:
    """Documents of these lengths whose tokens are all different."""
    ends = np.cumsum([0, *lengths])
    return [np.arange(start, end, dtype=np.uint32) for start, end in pairwise(ends)]


def packed(documents: list[TokenIds], block_size: int, blocks_at_once: int) -> list[list[int]]:
    return [block.tolist() for blocks in pack(documents, block_size, blocks_at_once) for block in blocks]


@st.composite
def splits(draw: st.DrawFn) -> tuple[list[int], int, int]:
    """Document lengths around the block size, a block size, and blocks at once."""
    block_size = draw(st.integers(1, 9))
    near = st.sampled_from([0, 1, block_size - 1, block_size, block_size + 1, 20 * block_size + 3])
    return draw(st.lists(near, max_size=15)), block_size, draw(st.integers(1, 6))


@steady
@given(splits())
@example(([], 4, 1))
@example(([0, 0], 4, 2))
@example(([3], 4, 1))
@example(([4], 4, 1))
@example(([8, 8], 4, 2))
def test_pack_of_any_split_is_concatenation_and_cut(split: tuple[list[int], int, int]) -> None:
    lengths, block_size, blocks_at_once = split
    num_blocks = sum(lengths) // block_size
    expected = np.arange(num_blocks * block_size).reshape(-1, block_size).tolist()
    assert packed(documents_of(lengths), block_size, blocks_at_once) == expected


@steady
@given(splits(), st.randoms(use_true_random=False))
def test_pack_of_a_stream_cut_elsewhere_gives_the_same_arrays(
    split: tuple[list[int], int, int], random: Random
) -> None:
    lengths, block_size, blocks_at_once = split
    documents = documents_of(lengths)
    stream = np.concatenate([np.empty(0, np.uint32), *documents])
    cuts = sorted(random.randint(0, len(stream)) for _ in range(5))
    recut = np.split(stream, cuts)
    arrays, others = (list(pack(pieces, block_size, blocks_at_once)) for pieces in (documents, recut))
    assert [array.tolist() for array in arrays] == [array.tolist() for array in others]


@steady
@given(splits())
def test_pack_of_any_split_yields_full_arrays_but_for_the_last(split: tuple[list[int], int, int]) -> None:
    lengths, block_size, blocks_at_once = split
    arrays = list(pack(documents_of(lengths), block_size, blocks_at_once))
    assert all(array.shape == (blocks_at_once, block_size) for array in arrays[:-1])
    assert all(1 <= len(array) <= blocks_at_once and array.dtype == np.uint32 for array in arrays)


@pytest.mark.parametrize(("tokens", "num_blocks"), [(0, 0), (3, 0), (4, 1), (5, 1), (7, 1), (8, 2)])
def test_pack_near_a_block_boundary_drops_less_than_a_block(tokens: int, num_blocks: int) -> None:
    assert len(packed(documents_of([tokens]), 4, 1)) == num_blocks


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_pack_keeps_the_dtype(dtype: type) -> None:
    (blocks,) = pack([np.array([], dtype), np.array([65_535, 1, 2], dtype)], 2, 3)
    assert blocks.dtype == dtype
    assert blocks.tolist() == [[65_535, 1]]


def test_pack_reads_no_more_documents_than_it_yields_blocks_of() -> None:
    read = []

    def stream() -> Iterator[TokenIds]:
        for number, document in enumerate(documents_of([4] * 10)):
            read.append(number)
            yield document

    next(iter(pack(stream(), 4, 2)))
    assert read == [0, 1]
