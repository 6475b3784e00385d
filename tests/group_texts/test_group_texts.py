"""group_texts: a whole split is packed into blocks, and the ledger accounts for every token."""

from collections import Counter
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import no_deadline, read_contents, read_stats, write_shards, write_tokens
from hypothesis import given
from hypothesis import strategies as st

from stages.core.artifacts import (
    SEGMENT_START,
    SPLITS,
    Blocks,
    Documents,
    list_shards,
    read_shard,
    to_arrow,
    write_checksums,
    write_shard,
)
from stages.core.errors import StageError
from stages.group_texts import block_shards
from stages.group_texts.schema import WeightedData
from stages.group_texts.stage import GroupTextsConfig, group_split, main, plan_split
from stages.group_texts.weights import repeat_documents, summarize_sources

DOCUMENTS = {
    "train": [[0, 1, 2, 3, 0], [0], [4, 5, 6, 7, 8, 9, 10, 11, 12, 0], [13, 0]],
    "validation": [[0, 1, 2, 0]],
    "test": [[0, 1], [2, 3], [4, 5], [6]],
}
STREAMS = {split: [token for document in documents for token in document] for split, documents in DOCUMENTS.items()}


def run_group_texts(
    tokens: Path, out: Path, block_size: int = 4, weights: dict[str, float] | None = None, seed: int = 0
) -> Path:
    """Run the stage on `tokens` and return `out`. The directory `raw` next to `tokens` has the documents' sources."""
    raw = tokens.parent / "raw"
    if not raw.exists():
        write_sources(raw, ["one"] * len(Documents(tokens / "train")))
    data = WeightedData(weights=weights)
    main(GroupTextsConfig(block_size=block_size, seed=seed, data=data, tokens=str(tokens), raw=str(raw), out=str(out)))
    return out


def write_sources(raw: Path, sources: list[str]) -> None:
    """Write a file of download with the source of each training document."""
    raw.mkdir()
    pq.write_table(pa.table({"source": pa.array(sources, pa.string())}), raw / "train.parquet")


def read_blocks(directory: Path) -> list[list[int]]:
    blocks = Blocks(directory)
    return blocks[range(len(blocks))].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("block_size", [2, 3, 4])
def test_group_texts_cuts_the_concatenated_split(tmp_path: Path, block_size: int, split: str) -> None:
    out = run_group_texts(write_tokens(tmp_path / "tokens", DOCUMENTS), tmp_path / "blocks", block_size)
    stream = STREAMS[split]
    whole = len(stream) // block_size * block_size
    assert list(chain(*read_blocks(out / split))) == stream[:whole]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("block_size", [2, 3, 4])
def test_group_texts_ledger_accounts_for_every_token(tmp_path: Path, block_size: int, split: str) -> None:
    out = run_group_texts(write_tokens(tmp_path / "tokens", DOCUMENTS), tmp_path / "blocks", block_size)
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
    expected = read_contents(run_group_texts(write_tokens(tmp_path / "tokens", DOCUMENTS), tmp_path / "blocks"))
    tokens = write_tokens(tmp_path / "cut", DOCUMENTS, rows=rows, per_shard=per_shard)
    assert read_contents(run_group_texts(tokens, tmp_path / "again")) == expected


@pytest.mark.parametrize("at_once", [1, 7, 8])
@pytest.mark.parametrize("rows", [1, 2, 100])
def test_group_texts_across_batches_and_shards_keeps_the_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int, rows: int
) -> None:
    monkeypatch.setattr(block_shards, "TOKENS_PER_BATCH", at_once)
    monkeypatch.setattr(block_shards, "SHARD_BYTES", 10)
    out = run_group_texts(write_tokens(tmp_path / "tokens", DOCUMENTS, rows=rows, per_shard=1), tmp_path / "blocks")
    assert len(list_shards(out / "train")) == 2  # of two blocks of 8 bytes
    assert list(chain(*read_blocks(out / "train"))) == STREAMS["train"][:16]


@no_deadline
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
    root = tmp_path_factory.mktemp("any")
    ends = np.cumsum([0, *lengths])
    documents = [list(range(start, end)) for start, end in pairwise(ends.tolist())]
    tokens = write_tokens(root / "tokens", DOCUMENTS | {"train": documents}, rows=1, per_shard=per_shard)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_shards, "SHARD_BYTES", sizes["shard_bytes"])
        patch.setattr(block_shards, "TOKENS_PER_BATCH", sizes["at_once"])
        runs, number = plan_split(tokens / "train")
        ledger = group_split(runs, number, block_size, pa.uint16(), root / "blocks")
    assert (ledger["documents"], ledger["tokens_in"]) == (len(lengths), sum(lengths))
    assert ledger["blocks"] == sum(lengths) // block_size
    if ledger["blocks"]:
        assert list(chain(*read_blocks(root / "blocks"))) == list(range(ledger["blocks"] * block_size))


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, np.uint16), (65_537, np.uint32)])
def test_group_texts_keeps_the_dtype_of_the_tokens(tmp_path: Path, vocab_size: int, dtype: type) -> None:
    documents = DOCUMENTS | {"train": [[vocab_size - 1] * 4]}
    out = run_group_texts(write_tokens(tmp_path / "tokens", documents, vocab_size), tmp_path / "blocks")
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
        run_group_texts(source, tmp_path / "out/blocks")
    assert list((tmp_path / "out").iterdir()) == []


def test_group_texts_of_exactly_a_block_drops_nothing(tmp_path: Path) -> None:
    out = run_group_texts(write_tokens(tmp_path / "tokens", DOCUMENTS), tmp_path / "blocks")
    assert read_blocks(out / "validation") == DOCUMENTS["validation"]
    assert read_stats(out / "validation")["dropped"] == 0


def test_group_texts_of_a_damaged_shard_names_it_and_leaves_nothing(tmp_path: Path) -> None:
    tokens = write_tokens(tmp_path / "tokens", DOCUMENTS)
    shard = tokens / "test/shard-00000.arrow"
    shard.write_bytes(shard.read_bytes()[:-30])
    with pytest.raises(StageError, match=f"{shard} is damaged.*dvc repro"):
        run_group_texts(tokens, tmp_path / "out/blocks")
    assert list((tmp_path / "out").iterdir()) == []


def test_group_texts_of_a_split_without_shards_names_the_directory(tmp_path: Path) -> None:
    tokens = write_tokens(tmp_path / "tokens", DOCUMENTS)
    (tokens / "train/shard-00000.arrow").unlink()
    with pytest.raises(StageError, match=f"{tokens / 'train'} has no shards"):
        run_group_texts(tokens, tmp_path / "blocks")


# -- weighted sources --------------------------------------------------------------------------------------------------

# Documents of 3 to 9 tokens; each has one unique token before its end.
MANY = {
    name: [[*([1] * (index % 7 + 1)), 2 + (start + index), 0] for index in range(number)]
    for name, number, start in (("a", 300, 0), ("b", 60, 300), ("c", 20, 360))
}


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Tokens of the sources a, b and c, interleaved."""
    left = {name: iter(documents) for name, documents in MANY.items()}
    documents, sources = [], []
    for name in "aaaaabc" * 300:
        if (ids := next(left[name], None)) is not None:
            documents.append(ids)
            sources.append(name)
    assert len(documents) == sum(map(len, MANY.values()))
    documents[0] = [0, *documents[0]]  # add the split's lead
    write_sources(tmp_path / "raw", sources)
    return write_tokens(
        tmp_path / "tokens",
        {name: [[1] * 9] for name in SPLITS} | {"train": documents},
        vocab_size=1000,
        rows=7,
        per_shard=11,
    )


def read_packed_documents(directory: Path) -> list[tuple[int, ...]]:
    """Read the documents from the training blocks, in the order of packing, without the one that is cut at the end."""
    stream = list(chain(*read_blocks(directory / "train")))
    assert stream[0] == 0  # the lead occurs once, at the start
    ends = [index for index, token in enumerate(stream) if token == 0]
    return [tuple(stream[start + 1 : end + 1]) for start, end in pairwise(ends)]


@no_deadline
@given(
    asked=st.lists(st.integers(0, 20), min_size=3, max_size=3).filter(any),
    seed=st.integers(0, 2**32 - 1),
)
def test_group_texts_gives_each_source_its_share_of_the_tokens(asked: list[int], seed: int) -> None:
    names, sources = list(MANY), np.repeat([0, 1, 2], [len(documents) for documents in MANY.values()])
    lengths = np.array([len(ids) for documents in MANY.values() for ids in documents])
    shares = [number / sum(asked) for number in asked]
    copies = repeat_documents(lengths, sources, shares, seed)
    described = summarize_sources(names, sources, lengths, copies, shares)
    for share, source in zip(shares, described.values(), strict=True):
        # Documents of every length from 3 to 9 remain, so any number of tokens can be reached.
        assert abs(source["tokens"] - share * lengths.sum()) <= 2
    for source in range(3):
        assert np.ptp(copies[sources == source]) <= 1  # no document is repeated before all others are used


def test_group_texts_with_weights_packs_whole_documents_and_its_ledger_adds_up(mixed: Path, tmp_path: Path) -> None:
    weights = {"a": 0.5, "b": 0.3, "c": 0.2}
    out = run_group_texts(mixed, tmp_path / "blocks", block_size=8, weights=weights)
    ledger = read_stats(out / "train")
    assert ledger["tokens_in"] == ledger["blocks"] * 8 + ledger["dropped"]
    assert ledger["tokens_in"] == 1 + sum(source["tokens"] for source in ledger["sources"].values())
    documents = read_packed_documents(out)
    known = {tuple(ids): name for name, texts in MANY.items() for ids in texts}
    tokens = Counter[str]()
    for ids in documents:  # each is a complete document of one of the sources
        tokens[known[ids]] += len(ids)
    available = sum(len(ids) for texts in MANY.values() for ids in texts)
    for name, source in ledger["sources"].items():
        assert abs(source["tokens"] - weights[name] * available) <= 4 == 8 // 2
        assert source["share_asked"] == weights[name]
        assert 0 <= source["tokens"] - tokens[name] < 8 + 9  # the dropped tokens, and the document that they cut
        assert source["repetitions"] == source["tokens"] / source["tokens_available"]
    for split in ("validation", "test"):
        assert list(chain(*read_blocks(out / split))) == [1] * 8
        assert "sources" not in read_stats(out / split)


def test_group_texts_repeats_documents_in_an_order_drawn_by_the_seed(mixed: Path, tmp_path: Path) -> None:
    weights = {"a": 0.1, "b": 0.1, "c": 0.8}
    first, again, other = (
        run_group_texts(mixed, tmp_path / name, block_size=8, weights=weights, seed=seed)
        for name, seed in (("first", 1), ("again", 1), ("other", 2))
    )
    assert read_contents(first) == read_contents(again)
    assert read_packed_documents(first) != read_packed_documents(other)
    order = [ids for ids in read_packed_documents(first) if ids in {tuple(ids) for ids in MANY["c"]}]
    passes = [order[start : start + len(MANY["c"])] for start in range(0, len(order) - 20, len(MANY["c"]))]
    assert len(passes) > 2 and all(len(set(documents)) == len(MANY["c"]) for documents in passes)
    assert passes[0] != passes[1]


def test_group_texts_of_several_sources_without_weights_keeps_their_order(mixed: Path, tmp_path: Path) -> None:
    out = run_group_texts(mixed, tmp_path / "blocks", block_size=8)
    stream = [token for index in range(len(Documents(mixed / "train"))) for token in Documents(mixed / "train")[index]]
    assert list(chain(*read_blocks(out / "train"))) == stream[: len(stream) // 8 * 8]
    sources = read_stats(out / "train")["sources"]
    assert {name: source["share_asked"] for name, source in sources.items()} == dict.fromkeys("abc")
    assert sum(source["share"] for source in sources.values()) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("at_once", [1, 3, 10_000])
def test_group_texts_with_weights_and_any_read_size_writes_the_same_bytes(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    weights = {"a": 0.2, "b": 0.3, "c": 0.5}
    whole = run_group_texts(mixed, tmp_path / "whole", block_size=8, weights=weights)
    monkeypatch.setattr(block_shards, "_DOCUMENTS_PER_READ", at_once)
    assert read_contents(run_group_texts(mixed, tmp_path / "parts", block_size=8, weights=weights)) == read_contents(
        whole
    )


@pytest.mark.parametrize(
    ("weights", "named"),
    [
        ({"a": 0.5, "b": 0.5}, "has no c"),
        ({"a": 0.5, "b": 0.3, "c": 0.1, "d": 0.1}, "names d, which is not a source"),
        ({"A": 0.5, "b": 0.3, "c": 0.2}, "names A, which is not a source and has no a"),
    ],
)
def test_group_texts_with_weights_of_other_sources_names_them(
    mixed: Path, tmp_path: Path, weights: dict[str, float], named: str
) -> None:
    with pytest.raises(StageError, match=f"data.weights {named}: the training split has a, b, c"):
        run_group_texts(mixed, tmp_path / "out/blocks", weights=weights)
    assert list((tmp_path / "out").iterdir()) == []


def test_group_texts_with_a_wrong_number_of_records_is_an_error(mixed: Path, tmp_path: Path) -> None:
    (tmp_path / "raw/train.parquet").unlink()
    (tmp_path / "raw").rmdir()
    write_sources(tmp_path / "raw", ["a", "b"])
    with pytest.raises(StageError, match=r"train.parquet is damaged.*2 records, but .* has 380 documents"):
        run_group_texts(mixed, tmp_path / "blocks", weights={"a": 0.5, "b": 0.5})


def write_chosen(directory: Path, records: list[int]) -> Path:
    """Write tokens whose training documents come from `records`, as tokenize does for chosen sources."""
    tokens = write_tokens(directory, DOCUMENTS | {"train": [[*DOCUMENTS["train"][record]] for record in records]})
    file = tokens / "train/shard-00000.arrow"
    (batch,) = read_shard(file)
    file.unlink()  # `batch` still maps it, so the new shard must be a new file
    batch = batch.append_column("record", pa.array(records, pa.int64()))
    write_checksums(tokens / "train", [write_shard(file, batch.schema, [batch])])
    return tokens


@pytest.mark.parametrize(
    ("sources", "shares"),
    [(["one", "two", "two", "three"], {"two": 0.6, "three": 0.4}), (["two"] * 2 + ["three"] * 2, None)],
)
def test_group_texts_of_chosen_sources_summarizes_the_sources_of_their_records(
    tmp_path: Path, sources: list[str], shares: dict[str, float] | None
) -> None:
    tokens = write_chosen(tmp_path / "tokens", [2, 3])
    write_sources(tmp_path / "raw", sources)
    weights = None if shares is None else {"one": 0.5, "two": 0.3, "three": 0.2}
    ledger = read_stats(run_group_texts(tokens, tmp_path / "blocks", 2, weights) / "train")
    described = ledger.get("sources")
    if shares is None:  # both documents are of the source three, and a single source is not summarized
        assert described is None
        return
    assert {name: source["share_asked"] for name, source in described.items()} == pytest.approx(shares)
    assert {name: source["documents"] for name, source in described.items()} == {"two": 1, "three": 1}


def test_group_texts_of_chosen_sources_without_a_share_is_an_error(tmp_path: Path) -> None:
    write_sources(tmp_path / "raw", ["one", "one", "two", "two"])
    with pytest.raises(StageError, match=r"data\.weights are 0 for all sources of the task: two"):
        run_group_texts(write_chosen(tmp_path / "tokens", [2, 3]), tmp_path / "blocks", 2, {"one": 1.0, "two": 0.0})


def test_group_texts_with_missing_records_names_the_file(tmp_path: Path) -> None:
    write_sources(tmp_path / "raw", ["one"] * 3)
    with pytest.raises(StageError, match=r"train.parquet is damaged \(3 records, but .* has record 3"):
        run_group_texts(write_chosen(tmp_path / "tokens", [2, 3]), tmp_path / "blocks", 2)


# -- marks -------------------------------------------------------------------------------------------------------------


def make_marks(ids: list[int]) -> list[int]:
    """Make a mark from each token id, so that a test can check that a mark belongs to its token."""
    return [token % 3 for token in ids]


def write_marked(directory: Path, per_shard: int | None = None) -> Path:
    """Write the tokens of DOCUMENTS with the marks of `make_marks`."""
    write_tokens(directory, DOCUMENTS, rows=1)
    for split in SPLITS:
        batches = []
        for document in DOCUMENTS[split]:
            lists = [
                pa.LargeListArray.from_arrays(to_arrow(np.array([0, len(values)])), to_arrow(np.array(values, dtype)))
                for values, dtype in ((document, np.uint16), (make_marks(document), np.uint8))
            ]
            num_bytes = pa.array([len(document)], pa.int32())
            names = ["input_ids", "marks", "num_bytes", "num_counted_bytes"]
            batches.append(pa.record_batch([*lists, num_bytes, num_bytes], names=names))
        for shard in (directory / split).glob("shard-*.arrow"):
            shard.unlink()
        write_shards(directory / split, batches[0].schema, batches, per_shard)
    return directory


@pytest.mark.parametrize("per_shard", [1, 2, None])
@pytest.mark.parametrize("block_size", [2, 3, 4])
def test_group_texts_gives_each_token_of_a_block_its_mark(
    tmp_path: Path, block_size: int, per_shard: int | None
) -> None:
    out = run_group_texts(write_marked(tmp_path / "tokens", per_shard), tmp_path / "blocks", block_size)
    for split in SPLITS:
        blocks = Blocks(out / split)
        marks = blocks.get_marks(range(len(blocks)))
        assert marks is not None
        assert marks.dtype == np.uint8
        assert read_blocks(out / split) == read_plain_blocks(tmp_path, block_size)[split]
        assert marks.tolist() == [make_marks(block) for block in read_blocks(out / split)]


def read_plain_blocks(tmp_path: Path, block_size: int) -> dict[str, list[list[int]]]:
    """Return the blocks of the same tokens without marks, by split."""
    plain = tmp_path / "plain"
    if not plain.exists():
        run_group_texts(write_tokens(plain / "tokens", DOCUMENTS), plain / "blocks", block_size)
    return {split: read_blocks(plain / "blocks" / split) for split in SPLITS}


def test_group_texts_of_weighted_sources_gives_each_token_its_mark(tmp_path: Path) -> None:
    tokens = write_marked(tmp_path / "tokens", 2)
    write_sources(tmp_path / "raw", ["one", "two", "one", "two"])
    out = run_group_texts(tokens, tmp_path / "blocks", 2, weights={"one": 0.5, "two": 0.5})
    blocks = Blocks(out / "train")
    marks, ids = blocks.get_marks(range(len(blocks))), read_blocks(out / "train")
    assert marks is not None
    # The token added before the first document begins a segment.
    assert marks[0][0] == SEGMENT_START
    assert marks.ravel().tolist()[1:] == [mark for block in ids for mark in make_marks(block)][1:]


def test_blocks_of_tokens_without_marks_have_none(tmp_path: Path) -> None:
    out = run_group_texts(write_tokens(tmp_path / "tokens", DOCUMENTS), tmp_path / "blocks")
    assert Blocks(out / "train").get_marks([0]) is None
