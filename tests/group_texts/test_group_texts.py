"""group_texts: blocks of a whole split, by a ledger that accounts for every token."""

from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from data_helpers import contents, read_stats, steady, write_tokens
from hypothesis import given
from hypothesis import strategies as st

from stages.core.artifacts import SPLITS, Blocks, shard_files
from stages.core.errors import StageError
from stages.group_texts import block_shards
from stages.group_texts.stage import GroupTextsConfig, group_split, main

DOCUMENTS = {
    "train": [[0, 1, 2, 3, 0], [0], [4, 5, 6, 7, 8, 9, 10, 11, 12, 0], [13, 0]],
    "validation": [[0, 1, 2, 0]],
    "test": [[0, 1], [2, 3], [4, 5], [6]],
}
STREAMS = {split: [token for document in documents for token in document] for split, documents in DOCUMENTS.items()}


def run(tokens: Path, out: Path, block_size: int = 4) -> Path:
    main(GroupTextsConfig(block_size=block_size, tokens=str(tokens), out=str(out)))
    return out


def blocks_of(directory: Path) -> list[list[int]]:
    blocks = Blocks(directory)
    return blocks[range(len(blocks))].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("block_size", [2, 3, 4])
def test_group_texts_cuts_the_concatenated_split(tmp_path: Path, block_size: int, split: str) -> None:
    out = run(write_tokens(tmp_path / "tokens", DOCUMENTS), tmp_path / "blocks", block_size)
    stream = STREAMS[split]
    whole = len(stream) // block_size * block_size
    assert list(chain(*blocks_of(out / split))) == stream[:whole]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("block_size", [2, 3, 4])
def test_group_texts_ledger_accounts_for_every_token(tmp_path: Path, block_size: int, split: str) -> None:
    out = run(write_tokens(tmp_path / "tokens", DOCUMENTS), tmp_path / "blocks", block_size)
    ledger = read_stats(out / split)
    assert ledger["block_size"] == block_size
    assert ledger["documents"] == len(DOCUMENTS[split])
    assert ledger["tokens_in"] == len(STREAMS[split]) == ledger["blocks"] * block_size + ledger["dropped"]
    assert 0 <= ledger["dropped"] < block_size
    assert ledger["blocks"] == len(Blocks(out / split))


@pytest.mark.parametrize("rows", [1, 2, 100])
@pytest.mark.parametrize("per_shard", [1, None])
def test_group_texts_of_tokens_in_other_batches_and_shards_writes_the_same_bytes(
    tmp_path: Path, rows: int, per_shard: int | None
) -> None:
    expected = contents(run(write_tokens(tmp_path / "tokens", DOCUMENTS), tmp_path / "blocks"))
    tokens = write_tokens(tmp_path / "cut", DOCUMENTS, rows=rows, per_shard=per_shard)
    assert contents(run(tokens, tmp_path / "again")) == expected


@pytest.mark.parametrize("at_once", [1, 7, 8])
@pytest.mark.parametrize("rows", [1, 2, 100])
def test_group_texts_across_batches_and_shards_keeps_the_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int, rows: int
) -> None:
    monkeypatch.setattr(block_shards, "TOKENS_AT_ONCE", at_once)
    monkeypatch.setattr(block_shards, "SHARD_BYTES", 10)
    out = run(write_tokens(tmp_path / "tokens", DOCUMENTS, rows=rows, per_shard=1), tmp_path / "blocks")
    assert len(shard_files(out / "train")) == 2  # of two blocks of 8 bytes
    assert list(chain(*blocks_of(out / "train"))) == STREAMS["train"][:16]


@steady
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    per_shard=st.integers(1, 4),
    block_size=st.integers(2, 5),
    shard_bytes=st.integers(1, 60),
    at_once=st.integers(1, 12),
)
def test_group_texts_of_any_shards_to_any_shards_keeps_the_stream(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], per_shard: int, block_size: int, **sizes: int
) -> None:
    place = tmp_path_factory.mktemp("any")
    ends = np.cumsum([0, *lengths])
    documents = [list(range(start, end)) for start, end in pairwise(ends.tolist())]
    tokens = write_tokens(place / "tokens", DOCUMENTS | {"train": documents}, rows=1, per_shard=per_shard)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_shards, "SHARD_BYTES", sizes["shard_bytes"])
        patch.setattr(block_shards, "TOKENS_AT_ONCE", sizes["at_once"])
        ledger = group_split(tokens / "train", block_size, pa.uint16(), place / "blocks")
    assert (ledger["documents"], ledger["tokens_in"]) == (len(lengths), sum(lengths))
    assert ledger["blocks"] == sum(lengths) // block_size
    if ledger["blocks"]:
        assert list(chain(*blocks_of(place / "blocks"))) == list(range(ledger["blocks"] * block_size))


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, np.uint16), (65_537, np.uint32)])
def test_group_texts_keeps_the_dtype_of_the_tokens(tmp_path: Path, vocab_size: int, dtype: type) -> None:
    documents = DOCUMENTS | {"train": [[vocab_size - 1] * 4]}
    out = run(write_tokens(tmp_path / "tokens", documents, vocab_size), tmp_path / "blocks")
    ids = Blocks(out / "train")[[0]]
    assert ids.dtype == dtype
    assert ids.tolist() == [[vocab_size - 1] * 4]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_group_texts_of_less_than_a_block_names_block_size_split_and_count(
    tmp_path: Path, split: str, tokens: int
) -> None:
    source = write_tokens(tmp_path / "tokens", DOCUMENTS | {split: [[1]] * tokens})
    with pytest.raises(StageError, match=f"block_size=4.*{split} split has only {tokens} tokens"):
        run(source, tmp_path / "out/blocks")
    assert list((tmp_path / "out").iterdir()) == []


def test_group_texts_of_exactly_a_block_drops_nothing(tmp_path: Path) -> None:
    out = run(write_tokens(tmp_path / "tokens", DOCUMENTS), tmp_path / "blocks")
    assert blocks_of(out / "validation") == DOCUMENTS["validation"]
    assert read_stats(out / "validation")["dropped"] == 0


def test_group_texts_of_a_damaged_shard_names_it_and_leaves_nothing(tmp_path: Path) -> None:
    tokens = write_tokens(tmp_path / "tokens", DOCUMENTS)
    shard = tokens / "test/shard-00000.arrow"
    shard.write_bytes(shard.read_bytes()[:-30])
    with pytest.raises(StageError, match=f"{shard} is damaged.*dvc repro"):
        run(tokens, tmp_path / "out/blocks")
    assert list((tmp_path / "out").iterdir()) == []


def test_group_texts_of_a_split_without_shards_names_the_directory(tmp_path: Path) -> None:
    tokens = write_tokens(tmp_path / "tokens", DOCUMENTS)
    (tokens / "train/shard-00000.arrow").unlink()
    with pytest.raises(StageError, match=f"{tokens / 'train'} holds no shards"):
        run(tokens, tmp_path / "blocks")
