"""tokenize: one row per document, wrapped as configured, without truncation, and a ledger that accounts for it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import (
    CAUSAL_TOKENS,
    MLM_TOKENS,
    REPOSITORY,
    TEXTS,
    hash_files,
    read_contents,
    read_stats,
    write_bpe,
    write_raw,
    write_records,
    write_unigram,
    write_word_piece,
)  # fmt: skip

from stages.core.artifacts import SPLITS, Documents, list_shards
from stages.core.compose import compose_config, load_config
from stages.core.errors import StageError
from stages.tokenize import stage as tokenize
from stages.tokenize.schema import Tokenize
from stages.tokenize.stage import TokenizeConfig, main
from stages.tokens import encoding
from stages.tokens.schema import ModelTokenizer, TokenizerSource, TrainedTokenizer
from stages.tokens.texts import Flatten, FlattenData
from stages.tokens.vocabulary import Vocabulary, load_tokenizer

ROLES = {"causal": CAUSAL_TOKENS, "mlm": MLM_TOKENS}
WRAP = {
    "causal": Tokenize(wrap="end_of_sequence", requires=["eos_token"]),
    "mlm": Tokenize(wrap="template", requires=["mask_token"]),
}
SPLIT_TEXTS = {
    "train": [*TEXTS, "", "<|endoftext|></s><mask>"],
    "validation": ["A document.", "<s>", ""],
    "test": ["", "long " * 2000],
}


def run_tokenize(
    tmp_path: Path,
    task: str,
    tokenizer: TokenizerSource | None = None,
    raw: Any = None,
    out: str = "t",
    sources: list[str] | None = None,
    start: Path | None = None,
) -> Path:
    """Run tokenize on SPLIT_TEXTS and return its output; train a tokenizer unless one is given."""
    trained = TrainedTokenizer(vocab_size=300, special_tokens=dict(ROLES[task]))
    config = TokenizeConfig(
        data=FlattenData(flatten=Flatten(columns=["answers.text"], joiner=" ")),
        model=ModelTokenizer(tokenizer=tokenizer or TokenizerSource(train=trained)),
        tokenize=WRAP[task],
        sources=sources,
        start=start and str(start),
        raw=str(raw or write_raw(tmp_path / "raw", SPLIT_TEXTS)),
        out=str(tmp_path / out),
    )
    main(config)
    return tmp_path / out


def pin(directory: Path) -> TokenizerSource:
    return TokenizerSource(path=str(directory), files=hash_files(directory))


@pytest.mark.parametrize("split", SPLITS)
def test_tokenize_causal_ends_every_document_and_begins_the_split(tmp_path: Path, split: str) -> None:
    out = run_tokenize(tmp_path, "causal")
    tokenizer, rows = load_tokenizer(out / "tokenizer"), Documents(out / split)
    texts = [tokenizer.decode(rows[i].tolist(), skip_special_tokens=False) for i in range(len(rows))]
    end = "<|endoftext|>"
    assert texts == [end * (i == 0) + text + end for i, text in enumerate(SPLIT_TEXTS[split])]
    assert [int((rows[i] == 0).sum()) for i in range(len(rows))] == [2, *[1] * (len(rows) - 1)]


@pytest.mark.parametrize("split", SPLITS)
def test_tokenize_mlm_wraps_every_document(tmp_path: Path, split: str) -> None:
    out = run_tokenize(tmp_path, "mlm")
    tokenizer, rows = load_tokenizer(out / "tokenizer"), Documents(out / split)
    texts = [tokenizer.decode(rows[i].tolist(), skip_special_tokens=False) for i in range(len(rows))]
    assert texts == [f"<s>{text}</s>" for text in SPLIT_TEXTS[split]]
    assert all(rows[i][1:-1].min(initial=9) > 4 for i in range(len(rows)))  # all tokens in between are text


@pytest.mark.parametrize("task", ROLES)
@pytest.mark.parametrize("split", SPLITS)
def test_tokenize_ledger_accounts_for_documents_tokens_and_bytes(tmp_path: Path, task: str, split: str) -> None:
    out = run_tokenize(tmp_path, task)
    ledger, rows, vocabulary = read_stats(out / split), Documents(out / split), Vocabulary.read(out)
    stored = np.concatenate([rows[i] for i in range(len(rows))])
    num_bytes = [len(text.encode()) for text in SPLIT_TEXTS[split]]
    assert ledger["documents"] == len(rows) == len(SPLIT_TEXTS[split])
    assert ledger["tokens"] == len(stored)
    assert ledger["text_tokens"] == len(vocabulary.select_text_tokens(stored))
    assert rows.num_bytes.tolist() == num_bytes
    assert ledger["bytes"] == sum(num_bytes)
    assert ledger.get("documents_lossy") == (None if split == "train" else 0)
    assert stored.dtype == np.uint16


@pytest.mark.parametrize("task", ROLES)
@pytest.mark.parametrize("rows", [1, 2, 5, 6])
def test_tokenize_of_row_groups_of_any_size_stores_the_same_documents(tmp_path: Path, task: str, rows: int) -> None:
    whole = run_tokenize(tmp_path, task)
    raw = write_raw(tmp_path / "cut-raw", SPLIT_TEXTS, rows)
    cut = run_tokenize(tmp_path, task, raw=raw, out="cut")
    for split in SPLITS:
        one, other = Documents(whole / split), Documents(cut / split)
        assert [other[i].tolist() for i in range(len(other))] == [one[i].tolist() for i in range(len(one))]
        assert other.num_bytes.tolist() == one.num_bytes.tolist()
        assert read_stats(cut / split) == read_stats(whole / split)


@pytest.mark.parametrize("task", ROLES)
@pytest.mark.parametrize("shard_bytes", [1, 100])
def test_tokenize_to_several_shards_stores_the_same_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, shard_bytes: int
) -> None:
    raw = write_raw(tmp_path / "cut-raw", SPLIT_TEXTS, 1)
    whole = run_tokenize(tmp_path, task, raw=raw)
    monkeypatch.setattr(tokenize, "SHARD_BYTES", shard_bytes)
    cut = run_tokenize(tmp_path, task, raw=raw, out="cut")
    assert len(list_shards(cut / "train")) > (1 if shard_bytes > 1 else len(SPLIT_TEXTS["train"]) - 1)
    for split in SPLITS:
        one, other = Documents(whole / split), Documents(cut / split)
        assert [other[i].tolist() for i in range(len(other))] == [one[i].tolist() for i in range(len(one))]
        assert read_stats(cut / split) == read_stats(whole / split)


@pytest.mark.parametrize("task", ROLES)
def test_tokenize_with_either_engine_writes_the_same_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    fast = run_tokenize(tmp_path, task, out="fast")
    monkeypatch.setattr(encoding, "build_fastokens_engine", lambda tokenizer: None)
    slow = run_tokenize(tmp_path, task, out="slow")
    assert [read_stats(out)["engine"] for out in (fast, slow)] == ["fastokens", "tokenizers"]
    for split in SPLITS:
        assert read_contents(fast / split) == read_contents(slow / split)


THREADS = """
import sys
sys.path[:0] = ["tests", "tests/tokenize"]
from pathlib import Path
from test_tokenize import run_tokenize
run_tokenize(Path(sys.argv[1]), "mlm")
"""


@pytest.mark.parametrize("threads", ["1", "3"])
def test_tokenize_with_any_number_of_threads_writes_the_same_bytes(tmp_path: Path, threads: str) -> None:
    environment = {
        **os.environ,
        "RAYON_NUM_THREADS": threads,
        "OMP_NUM_THREADS": threads,
        "PYTHONPATH": str(REPOSITORY),
    }
    (tmp_path / "there").mkdir()
    command = [sys.executable, "-c", THREADS, str(tmp_path / "there")]
    subprocess.run(command, check=True, env=environment, cwd=REPOSITORY)
    assert read_contents(tmp_path / "there/t") == read_contents(run_tokenize(tmp_path, "mlm"))


@pytest.mark.parametrize("task", ROLES)
def test_tokenize_again_writes_the_same_bytes(tmp_path: Path, task: str) -> None:
    assert read_contents(run_tokenize(tmp_path, task, out="one")) == read_contents(
        run_tokenize(tmp_path, task, out="two")
    )


def test_tokenize_trains_the_tokenizer_only_on_the_training_split(tmp_path: Path) -> None:
    one = run_tokenize(tmp_path, "causal", out="one")
    raw = write_raw(tmp_path / "other", SPLIT_TEXTS | {"validation": ["zq " * 50], "test": ["qz " * 50]})
    two = run_tokenize(tmp_path, "causal", raw=raw, out="two")
    assert read_contents(one / "tokenizer") == read_contents(two / "tokenizer")


@pytest.mark.parametrize("task", ROLES)
def test_tokenize_with_a_pinned_tokenizer_copies_its_files_verbatim(tmp_path: Path, task: str) -> None:
    directory = write_bpe(tmp_path / "pinned", ROLES[task])
    out = run_tokenize(tmp_path, task, pin(directory))
    assert read_contents(out / "tokenizer") == read_contents(directory)
    assert read_stats(out / "test")["documents_lossy"] == 0


def test_tokenize_with_a_tokenizer_changed_since_pinning_names_the_file(tmp_path: Path) -> None:
    source = pin(write_bpe(tmp_path / "pinned", CAUSAL_TOKENS))
    write_bpe(tmp_path / "pinned", CAUSAL_TOKENS, vocab_size=290)
    with pytest.raises(StageError, match=rf"{tmp_path / 'pinned/tokenizer.json'} .*pin_model"):
        run_tokenize(tmp_path, "causal", source)
    assert not (tmp_path / "t").exists()


def test_tokenize_with_a_lossy_tokenizer_counts_the_changed_documents(tmp_path: Path) -> None:
    texts = {"train": ["sky"], "validation": ["sky blue", "Sky blue", "北京", ""], "test": ["a . b", "a  b", "a.b"]}
    source = pin(write_word_piece(tmp_path / "pinned"))
    out = run_tokenize(tmp_path, "mlm", source, write_raw(tmp_path / "r", texts))
    assert [read_stats(out / split).get("documents_lossy") for split in SPLITS] == [None, 2, 2]
    assert read_stats(out / "validation")["bytes"] == 8 + 8 + 6
    rows = Documents(out / "validation")
    assert [rows[i][[0, -1]].tolist() for i in range(4)] == [[2, 3]] * 4


@pytest.mark.parametrize(("task", "roles"), [("causal", {"pad_token": "<pad>"}), ("mlm", CAUSAL_TOKENS)])
def test_tokenize_with_a_tokenizer_without_the_tasks_token_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, roles: dict[str, str]
) -> None:
    monkeypatch.setattr("stages.tokens.vocabulary._read_special_tokens_with_transformers", lambda directory: {})
    without = pin(write_bpe(tmp_path / "tokenizer", roles))
    (tmp_path / "out").mkdir()
    with pytest.raises(StageError, match=f"no {WRAP[task].requires[0]}"):
        run_tokenize(tmp_path, task, without, out="out/tokens")
    assert list((tmp_path / "out").iterdir()) == []


def test_tokenize_of_a_split_without_documents_writes_an_empty_one(tmp_path: Path) -> None:
    out = run_tokenize(tmp_path, "causal", raw=write_raw(tmp_path / "r", SPLIT_TEXTS | {"test": []}))
    assert len(Documents(out / "test")) == 0
    assert [read_stats(out / "test")[key] for key in ("documents", "tokens", "text_tokens", "bytes")] == [0, 0, 0, 0]


@pytest.mark.parametrize("task", ROLES)
def test_tokenize_of_only_empty_documents_writes_one_row_each(tmp_path: Path, task: str) -> None:
    out = run_tokenize(tmp_path, task, raw=write_raw(tmp_path / "r", SPLIT_TEXTS | {"test": ["", ""]}))
    rows, vocabulary = Documents(out / "test"), Vocabulary.read(out)
    assert len(rows) == 2
    assert rows[1].tolist() == [*vocabulary.prefix, *vocabulary.suffix]
    assert read_stats(out / "test")["text_tokens"] == 0


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("keep", [0, 100, -20])
def test_tokenize_of_a_damaged_parquet_file_names_it(tmp_path: Path, split: str, keep: int) -> None:
    raw = write_raw(tmp_path / "raw", SPLIT_TEXTS)
    file = raw / f"{split}.parquet"
    file.write_bytes(file.read_bytes()[:keep])
    source = pin(write_bpe(tmp_path / "pinned", CAUSAL_TOKENS))
    with pytest.raises(StageError, match=f"{file} is damaged"):
        run_tokenize(tmp_path, "causal", source, raw)


def test_tokenize_with_a_composed_config_matches_its_model(tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "raw", SPLIT_TEXTS)
    choices = ["data=files", "model=tiny-roberta", "task=mlm", f"raw={raw}", f"out={tmp_path / 't'}"]
    main(load_config(TokenizeConfig, compose_config("tokenize", choices)))
    vocabulary = Vocabulary.read(tmp_path / "t")
    assert (vocabulary.prefix, vocabulary.suffix, vocabulary.special["mask_token"]) == ([0], [2], 4)


def test_tokenize_of_a_text_that_spells_a_control_token_of_a_unigram_names_the_document(tmp_path: Path) -> None:
    """Unigram vocabularies contain their control tokens as pieces, so the text is encoded to a control token."""
    directory = write_unigram(tmp_path / "unigram")
    texts = {"train": ["abc", "abc"], "validation": ["abc", "a</s>b"], "test": ["abc"]}
    with pytest.raises(StageError, match="validation document 1 spells a control token"):
        run_tokenize(tmp_path, "causal", pin(directory), raw=write_raw(tmp_path / "r", texts))
    assert not (tmp_path / "t").exists()


# -- chosen sources, another task's tokenizer --------------------------------------------------------------------------


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """data/raw with records of books and web in each split, and of news only in train."""
    for split, texts in SPLIT_TEXTS.items():
        names = ["web", "books", "web", "books", "news", "news"][: len(texts)]
        write_records(tmp_path / "mixed" / f"{split}.parquet", texts, sources=names, rows=2)
    return tmp_path / "mixed"


@pytest.mark.parametrize("sources", [["web"], ["books", "web"], ["news", "web"]])
def test_tokenize_of_chosen_sources_writes_their_documents_and_record_indices(
    tmp_path: Path, mixed: Path, sources: list[str]
) -> None:
    tokenizer = pin(write_bpe(tmp_path / "bpe", CAUSAL_TOKENS))
    every, some = (run_tokenize(tmp_path, "causal", tokenizer, mixed, str(out), out) for out in (None, sources))
    for split, names in (("train", ["web", "books", "web", "books", "news", "news"]), ("test", ["web", "books"])):
        whole, chosen = Documents(every / split), Documents(some / split)
        records = [number for number, name in enumerate(names) if name in sources]
        assert chosen.records.tolist() == records and whole.records.tolist() == list(range(len(names)))
        assert chosen.num_bytes.tolist() == whole.num_bytes[records].tolist()
        first, *others = (chosen[number].tolist() for number in range(len(chosen)))
        end = first[-1]
        # The lead comes before the first document of the split, even if that is not record 0.
        assert first == [end] * (records[0] > 0) + whole[records[0]].tolist()
        assert others == [whole[record].tolist() for record in records[1:]]
        assert read_stats(some / split)["documents"] == len(records)


def test_tokenize_of_chosen_sources_trains_the_tokenizer_on_their_text(tmp_path: Path) -> None:
    for split in SPLITS:
        write_records(tmp_path / "raw" / f"{split}.parquet", ["aaaa " * 50, "bbbb " * 50], sources=["a", "b"])
    out = run_tokenize(tmp_path, "causal", raw=tmp_path / "raw", sources=["b"])
    learned = load_tokenizer(out / "tokenizer").get_vocab()
    assert "bb" in learned and "aa" not in learned


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (["web", "boks"], r"sources names boks, but .* has no such records, only of books, news, web"),
        (["news"], r"the validation split has no records of these sources, only of books, web"),
    ],
)
def test_tokenize_of_missing_sources_names_the_existing_ones(
    tmp_path: Path, mixed: Path, sources: list[str], message: str
) -> None:
    with pytest.raises(StageError, match=message):
        run_tokenize(tmp_path, "causal", raw=mixed, sources=sources)
    assert not (tmp_path / "t").exists()


def test_tokenize_of_a_task_with_a_start_copies_the_tokenizer_of_the_start(tmp_path: Path) -> None:
    first = run_tokenize(tmp_path, "causal", out="first")
    raw = write_raw(tmp_path / "other", dict.fromkeys(SPLITS, ("Quite another text. " * 20,)))
    out = run_tokenize(tmp_path, "causal", raw=raw, out="next", start=first / "tokenizer")
    assert read_contents(out / "tokenizer") == read_contents(first / "tokenizer")
    assert read_contents(out / "tokenizer") != read_contents(
        run_tokenize(tmp_path, "causal", raw=raw, out="own") / "tokenizer"
    )
    assert read_stats(out)["tokenizer"] == {"task": "first"}
