"""packing: the documents of a split are one stream, and only its end is dropped."""

from collections.abc import Iterator
from itertools import pairwise
from random import Random

import numpy as np
import pytest
from data_helpers import no_deadline
from hypothesis import example, given
from hypothesis import strategies as st

from stages.core.artifacts import TokenIds
from stages.group_texts.packing import pack_documents


def make_documents(lengths: list[int]) -> list[TokenIds]:
    """Make documents of the given lengths, with all tokens different: arrays [length], uint32."""
    ends = np.cumsum([0, *lengths])
    return [np.arange(start, end, dtype=np.uint32) for start, end in pairwise(ends)]


def pack_to_lists(documents: list[TokenIds], block_size: int, blocks_per_batch: int) -> list[list[int]]:
    return [block.tolist() for blocks in pack_documents(documents, block_size, blocks_per_batch) for block in blocks]


@st.composite
def splits(draw: st.DrawFn) -> tuple[list[int], int, int]:
    """Draw document lengths near the block size, the block size, and the blocks per batch."""
    block_size = draw(st.integers(1, 9))
    near = st.sampled_from([0, 1, block_size - 1, block_size, block_size + 1, 20 * block_size + 3])
    return draw(st.lists(near, max_size=15)), block_size, draw(st.integers(1, 6))


@no_deadline
@given(splits())
@example(([], 4, 1))
@example(([0, 0], 4, 2))
@example(([3], 4, 1))
@example(([4], 4, 1))
@example(([8, 8], 4, 2))
def test_pack_documents_of_any_split_concatenates_and_cuts(split: tuple[list[int], int, int]) -> None:
    lengths, block_size, blocks_per_batch = split
    num_blocks = sum(lengths) // block_size
    expected = np.arange(num_blocks * block_size).reshape(-1, block_size).tolist()
    assert pack_to_lists(make_documents(lengths), block_size, blocks_per_batch) == expected


@no_deadline
@given(splits(), st.randoms(use_true_random=False))
def test_pack_documents_of_a_stream_cut_elsewhere_gives_the_same_batches(
    split: tuple[list[int], int, int], random: Random
) -> None:
    lengths, block_size, blocks_per_batch = split
    documents = make_documents(lengths)
    stream = np.concatenate([np.empty(0, np.uint32), *documents])
    cuts = sorted(random.randint(0, len(stream)) for _ in range(5))
    recut = np.split(stream, cuts)
    arrays, others = (list(pack_documents(pieces, block_size, blocks_per_batch)) for pieces in (documents, recut))
    assert [array.tolist() for array in arrays] == [array.tolist() for array in others]


@no_deadline
@given(splits())
def test_pack_documents_of_any_split_yields_full_batches_except_the_last(split: tuple[list[int], int, int]) -> None:
    lengths, block_size, blocks_per_batch = split
    arrays = list(pack_documents(make_documents(lengths), block_size, blocks_per_batch))
    assert all(array.shape == (blocks_per_batch, block_size) for array in arrays[:-1])
    assert all(1 <= len(array) <= blocks_per_batch and array.dtype == np.uint32 for array in arrays)


@pytest.mark.parametrize(("tokens", "num_blocks"), [(0, 0), (3, 0), (4, 1), (5, 1), (7, 1), (8, 2)])
def test_pack_documents_near_a_block_boundary_drops_less_than_a_block(tokens: int, num_blocks: int) -> None:
    assert len(pack_to_lists(make_documents([tokens]), 4, 1)) == num_blocks


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_pack_documents_keeps_the_dtype(dtype: type) -> None:
    (blocks,) = pack_documents([np.array([], dtype), np.array([65_535, 1, 2], dtype)], 2, 3)
    assert blocks.dtype == dtype
    assert blocks.tolist() == [[65_535, 1]]


def test_pack_documents_reads_only_the_documents_of_a_batch() -> None:
    read = []

    def read_documents() -> Iterator[TokenIds]:
        for number, document in enumerate(make_documents([4] * 10)):
            read.append(number)
            yield document

    next(iter(pack_documents(read_documents(), 4, 2)))
    assert read == [0, 1]
