"""Hostile and broken input of tokenize and group_texts: each named case has an expected error."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import (
    CAUSAL_TOKENS,
    MLM_TOKENS,
    write_bpe,
    write_raw,
    write_tokens,
    write_word_piece,
)  # fmt: skip
from hostile import list_files, pin_tokenizer, run_stage_for_error
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from stages.core.artifacts import Documents
from stages.download.records import ELI5
from stages.tokens.vocabulary import Vocabulary, load_tokenizer

TEXTS = {"train": ["Rain falls when air cools."] * 9, "validation": ["Salt melts."], "test": ["A café shines."]}
SMALL = "model.tokenizer.train.vocab_size=300"
Make = Callable[[Path], Any]


class Case(NamedTuple):
    name: str
    """Description of the fault."""
    make: Make
    """Function that damages the files of a directory."""
    message: str
    """Part of the error; DIR is replaced by the directory."""
    overrides: tuple[str, ...] = ()


def parametrize_cases(cases: list[Case]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


def truncate(name: str, keep: float) -> Make:
    """Return a function that truncates a file to the fraction `keep` of its length."""
    return lambda d: (d / name).write_bytes((d / name).read_bytes()[: int((d / name).stat().st_size * keep)])


def flip_bit(name: str, where: float) -> Make:
    """Return a function that flips a bit of a file at the fraction `where` of its length."""

    def flip(d: Path) -> None:
        raw = bytearray((d / name).read_bytes())
        raw[int(len(raw) * where)] ^= 1
        (d / name).write_bytes(raw)

    return flip


def remove(name: str) -> Make:
    return lambda d: (d / name).unlink()


def write(name: str, text: str) -> Make:
    return lambda d: (d / name).write_text(text, encoding="utf-8")


def write_table(**columns: list[Any]) -> Make:
    return lambda d: pq.write_table(pa.table(columns), d / "test.parquet")


def change_nothing(_: Path) -> None:
    pass


# -- tokenize ----------------------------------------------------------------------------------------------------------


def write_nulls(d: Path) -> None:
    rows = [{"title": "t", "answers": {"text": [None]}}, {"answers": None}]
    pq.write_table(pa.Table.from_pylist(rows, schema=ELI5), d / "test.parquet")


def replace_by_directory(name: str) -> Make:
    return lambda d: ((d / name).unlink(), (d / name).mkdir())


def write_checked(d: Path) -> None:
    """Write the raw file with page checksums, as download does, and flip a bit of a text."""
    pq.write_table(pq.read_table(d / "test.parquet"), d / "test.parquet", compression="none", write_page_checksum=True)
    raw = (d / "test.parquet").read_bytes()
    (d / "test.parquet").write_bytes(raw.replace(b"shines", b"shinds"))


BROKEN_RAW = [
    Case(
        "raw of another schema", write_table(x=[1]), "DIR/test.parquet is damaged (it has no text column answers.text"
    ),
    Case(
        "raw of numbers",
        write_table(answers=[{"text": [1]}]),
        "DIR/test.parquet is damaged (it has no text column answers.text",
    ),
    Case(
        "raw with nulls", write_nulls, "DIR/test.parquet is damaged (nulls in answers.text, but download writes none)"
    ),
    Case("raw with null titles", write_nulls, "damaged (nulls in title", ("data.flatten.columns=[title]",)),
    Case("raw missing", remove("test.parquet"), "test.parquet"),
    Case("raw a directory", replace_by_directory("test.parquet"), "DIR/test.parquet is damaged"),
    Case("raw empty", truncate("train.parquet", 0), "DIR/train.parquet is damaged (Parquet file size is 0 bytes"),
    Case("raw truncated", truncate("train.parquet", 0.9), "DIR/train.parquet is damaged"),
    Case("raw bit-flipped", write_checked, "DIR/test.parquet is damaged (could not verify page integrity"),
]  # fmt: skip


@parametrize_cases(BROKEN_RAW)
def test_hostile_raw_data_is_named_and_nothing_is_written(tmp_path: Path, case: Case) -> None:
    raw = write_raw(tmp_path / "raw", TEXTS)
    case.make(raw)
    choices = ["task=causal", "data=files", "model=tiny-gpt2", SMALL, f"raw={raw}"]
    error = run_stage_for_error("tokenize", *choices, f"out={tmp_path}/out/tokens", *case.overrides)
    assert case.message.replace("DIR", str(raw)) in error
    assert list_files(tmp_path / "out") == []


def make_bpe(special_tokens: dict[str, str]) -> Make:
    return lambda d: write_bpe(d, special_tokens)


def write_code_tokenizer(d: Path) -> None:
    """Write a tokenizer repository that needs its custom code, which would create the file TOUCHED."""
    d.mkdir()
    (d / "vocab.json").write_text("{}")
    (d / "code.py").write_text(f"open({str(d / 'TOUCHED')!r}, 'w')\nclass Own: pass\n")
    settings = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["code.Own", None]}}
    (d / "tokenizer_config.json").write_text(json.dumps(settings))


def chain(make: Make, *changes: Make) -> Make:
    return lambda d: [step(d) for step in (make, *changes)]


def edit_json(name: str, **changes: Any) -> Make:
    return lambda d: (d / name).write_text(json.dumps(json.loads((d / name).read_text()) | changes))


CAUSAL, MLM = make_bpe(CAUSAL_TOKENS), make_bpe(MLM_TOKENS)
PANIC = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
FIXED = {"type": "FixedLength", "length": 0}
SETTINGS = "tokenizer_config.json"
BROKEN_TOKENIZER = [
    Case("no eos", make_bpe({"pad_token": "<pad>"}), "the tokenizer has no eos_token, which the task needs"),
    Case("no mask", CAUSAL, "the tokenizer has no mask_token, which the task needs: choose another", ("task=mlm",)),
    Case("truncated", chain(CAUSAL, truncate("tokenizer.json", 0.5)), "DIR/tokenizer.json is not a tokenizer: EOF"),
    Case("bit-flipped", chain(CAUSAL, flip_bit("tokenizer.json", 0.02)), "DIR/tokenizer.json is not a tokenizer"),
    Case("settings truncated", chain(CAUSAL, truncate(SETTINGS, 0.5)), f"DIR/{SETTINGS} is not JSON"),
    Case("settings of another shape", chain(CAUSAL, write(SETTINGS, "[]")), f"DIR/{SETTINGS} is not a JSON object"),
    Case(
        "Rust that panics", chain(CAUSAL, edit_json("tokenizer.json", normalizer=PANIC)), "DIR/tokenizer.json is not a"
    ),
    Case(
        "Rust that panics over text", chain(CAUSAL, edit_json("tokenizer.json", pre_tokenizer=FIXED)), "cannot encode"
    ),
    Case("nested", chain(CAUSAL, write("tokenizer.json", "[" * 200_000)), "DIR/tokenizer.json is not a tokenizer"),
    Case("settings nested", chain(CAUSAL, write(SETTINGS, '{"a":' * 200_000)), f"DIR/{SETTINGS} is not JSON"),
    Case("only its own code", write_code_tokenizer, "code in the directory is never run"),
]  # fmt: skip


@parametrize_cases(BROKEN_TOKENIZER)
def test_hostile_tokenizer_is_named_by_its_original_path(tmp_path: Path, case: Case) -> None:
    case.make(tmp_path / "mine")
    choices = pin_tokenizer(tmp_path / "mine")
    raw = write_raw(tmp_path / "raw", TEXTS)
    task = case.overrides or ("task=causal",)
    error = run_stage_for_error("tokenize", *choices, *task, "data=files", f"raw={raw}", f"out={tmp_path}/out/t")
    assert case.message.replace("DIR", str(tmp_path / "mine")) in error
    assert ".tmp-" not in error
    assert list_files(tmp_path / "out") == []
    assert not (tmp_path / "mine/TOUCHED").exists()


@pytest.mark.parametrize(
    ("task", "model", "token"), [("mlm", "tiny-gpt2", "mask_token"), ("causal", "tiny-roberta", "eos_token")]
)
def test_hostile_model_of_another_task_is_refused_before_tokenizing(
    tmp_path: Path, task: str, model: str, token: str
) -> None:
    choices = [f"task={task}", f"model={model}", "data=files", f"raw={tmp_path}", f"out={tmp_path}/t"]
    assert f"has no {token}, which the task needs" in run_stage_for_error("tokenize", *choices)
    measures = [f"task={task}", f"model={model}", "hardware=cpu", "seed=1", f"tokens={tmp_path}"]
    assert "this model cannot be trained with objective.name=" in run_stage_for_error(
        "baseline", *measures, f"out={tmp_path}/b.json", f"report={tmp_path}/b"
    )
    values = ["block_size=8", "learning_rate=1", "num_train_epochs=1", "batch_size=1", f"blocks={tmp_path}"]
    outs = [f"out={tmp_path}/m", f"report={tmp_path}/r"]
    assert "this model cannot be trained with objective.name=" in run_stage_for_error(
        "train", "adapter=none", "framework=trainer", *measures, *values, *outs
    )


def write_metaspace_bpe(d: Path) -> None:
    """Write a BPE in Llama's style, with pieces of letters and byte fallback."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghijklmnopqrstuvwxyz</>"]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    d.mkdir()
    tokenizer.save(str(d / "tokenizer.json"))
    (d / SETTINGS).write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}))


def write_word_level(d: Path) -> None:
    """Write a WordLevel vocabulary, in which control tokens are ordinary words."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "<mask>": 2, "air": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<unk>", "</s>", "<mask>"])
    d.mkdir()
    tokenizer.save(str(d / "tokenizer.json"))
    (d / SETTINGS).write_text(json.dumps({"eos_token": "</s>", "mask_token": "<mask>", "unk_token": "<unk>"}))


def write_unigram(d: Path) -> None:
    letters = dict.fromkeys("▁abcdefghijklmnopqrstuvwxyz<>/|[]")
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((letter, -2.0) for letter in letters)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    d.mkdir()
    tokenizer.save(str(d / "tokenizer.json"))
    (d / SETTINGS).write_text(json.dumps({"eos_token": "</s>", "unk_token": "<unk>"}))


LITERALS = ["<|endoftext|>", "a </s> b", "<s><pad><mask><unk>", "[CLS] [SEP] [MASK] [PAD]", "<0x0A>"]


@pytest.mark.parametrize("literal", LITERALS)
@pytest.mark.parametrize(
    ("task", "make", "keeps"),
    [
        ("causal", CAUSAL, True),
        ("mlm", MLM, True),
        ("mlm", write_word_piece, True),
        ("causal", write_metaspace_bpe, True),
        ("causal", write_word_level, False),
        ("causal", write_unigram, False),
    ],
    ids=["byte-level causal", "byte-level mlm", "WordPiece", "BPE of pieces", "WordLevel", "Unigram"],
)
def test_hostile_text_that_spells_control_tokens_never_becomes_one(
    tmp_path: Path, task: str, make: Make, keeps: bool, literal: str
) -> None:
    make(tmp_path / "mine")
    raw = write_raw(tmp_path / "raw", TEXTS | {"test": [literal]})
    choices = [*pin_tokenizer(tmp_path / "mine"), f"task={task}", "data=files", f"raw={raw}"]
    error = run_stage_for_error("tokenize", *choices, f"out={tmp_path}/t")
    if error:
        assert not keeps
        assert "test document 0 spells a control token, which this tokenizer cannot encode as text" in error
        return
    vocabulary, ids = Vocabulary.read(tmp_path / "t"), Documents(tmp_path / "t/test")[0].tolist()
    inside = ids[len(vocabulary.lead + vocabulary.prefix) : len(ids) - len(vocabulary.suffix)]
    roles = {number for role, number in vocabulary.special.items() if role != "unk_token"}
    assert roles.isdisjoint(inside)
    if (
        load_tokenizer(tmp_path / "mine").token_to_id("Ġ") is not None
    ):  # only byte-level tokenizers decode to the same text
        assert load_tokenizer(tmp_path / "mine").decode(inside, skip_special_tokens=False) == literal


# -- group_texts -------------------------------------------------------------------------------------------------------

DOCUMENTS = {name: [[5, 6, 7] * 5] * 9 for name in TEXTS}
SHARD = "test/shard-00000.arrow"
REMADE = "and run `dvc repro` to create it again"


def write_foreign_shard(d: Path) -> None:
    with pa.ipc.new_file(str(d / SHARD), pa.schema([("x", pa.int8())])) as writer:
        writer.write_batch(pa.record_batch([pa.array([1], pa.int8())], names=["x"]))


BROKEN_TOKENS = [
    Case(
        "fewer tokens than a block", change_nothing, "block_size=500: the train split has only 135", ("block_size=500",)
    ),
    Case(
        "fewer test tokens than a block",
        lambda d: write_tokens(d, DOCUMENTS | {"test": [[5, 6]]}),
        "block_size=8: the test split has only 2 tokens, fewer than one block; choose a smaller block_size or more",
    ),
    Case("a split without documents", lambda d: write_tokens(d, DOCUMENTS | {"test": []}), "split has only 0 tokens"),
    Case("shard empty", truncate(SHARD, 0), f"DIR/{SHARD} is damaged"),
    Case("shard truncated", truncate(SHARD, 0.9), f"DIR/{SHARD} is damaged"),
    *(
        Case(f"shard bit-flipped at {where}", flip_bit(SHARD, where), f"DIR/{SHARD} is damaged (its checksum does not")
        for where in (0.01, 0.3, 0.5, 0.7, 0.99)
    ),
    Case("shard missing", remove(SHARD), "DIR/test has no shards: run `dvc repro`"),
    Case("shard a directory", replace_by_directory(SHARD), f"DIR/{SHARD} is damaged"),
    Case("shard of another schema", write_foreign_shard, f"DIR/{SHARD} is damaged"),
    Case("shard too many", lambda d: shutil.copy(d / SHARD, d / "test/shard-00001.arrow"), "DIR/test: the shards do"),
    Case("checksums truncated", truncate("test/shards.json", 0.5), f"delete DIR/test/shards.json {REMADE}"),
    Case("checksums bit-flipped", flip_bit("test/shards.json", 0.8), f"DIR/{SHARD} is damaged"),
    Case("checksums of another shape", write("test/shards.json", "[]"), "the shards do not match shards.json"),
    Case("ledger missing", remove("stats.json"), "No such file or directory: DIR/stats.json"),
    Case("ledger empty", truncate("stats.json", 0), "DIR/stats.json is damaged (Expecting value: line 1 column 1"),
    Case("ledger truncated", truncate("stats.json", 0.7), f"delete DIR/stats.json {REMADE}"),
    Case("ledger without vocabulary", write("stats.json", "{}"), "DIR/stats.json is damaged (it has no valid vocab"),
    Case("ledger of another shape", write("stats.json", "[]"), "DIR/stats.json is damaged (it has no valid vocabulary"),
    Case("ledger of text", write("stats.json", '{"vocabulary": {"size": "9"}}'), "damaged (it has no valid vocabulary"),
    Case(
        "ledger of a smaller vocabulary",
        write(
            "stats.json",
            '{"vocabulary": {"size": 3, "special": {"eos_token": 4}, "prefix": [], "suffix": [4], "lead": []}}',
        ),
        "DIR/stats.json is damaged (a control token has an id outside its 3 tokens)",
    ),
    Case(
        "block_size of one", change_nothing, "block_size=1: it should be greater than or equal to 2", ("block_size=1",)
    ),
]  # fmt: skip


@parametrize_cases(BROKEN_TOKENS)
def test_hostile_tokens_are_named_and_nothing_is_written(tmp_path: Path, case: Case) -> None:
    tokens = write_tokens(tmp_path / "tokens", DOCUMENTS)
    case.make(tokens)
    size = case.overrides or ("block_size=8",)
    raw = write_raw(tmp_path / "raw", {name: ["a text"] for name in TEXTS})
    error = run_stage_for_error("group_texts", f"tokens={tokens}", f"raw={raw}", f"out={tmp_path}/out/blocks", *size)
    assert case.message.replace("DIR", str(tokens)) in error
    assert list_files(tmp_path / "out") == []


def test_hostile_vocabulary_above_uint16_is_stored_in_uint32(tmp_path: Path) -> None:
    """Token ids of 65,536 and above, from a vocabulary of 70,000 words, do not fit into 16 bits."""
    vocabulary = {"<unk>": 0, "</s>": 1} | {f"w{number}": number for number in range(2, 70_000)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    (tmp_path / "mine").mkdir()
    tokenizer.save(str(tmp_path / "mine/tokenizer.json"))
    (tmp_path / "mine" / SETTINGS).write_text(json.dumps({"eos_token": "</s>"}))
    raw = write_raw(tmp_path / "raw", {name: ["w2 w65535 w65536 w69999"] for name in TEXTS})
    choices = [*pin_tokenizer(tmp_path / "mine"), "task=causal", "data=files", f"raw={raw}"]
    assert run_stage_for_error("tokenize", *choices, f"out={tmp_path}/tokens") == ""
    grouping = ["block_size=3", f"tokens={tmp_path}/tokens", f"raw={raw}", f"out={tmp_path}/blocks"]
    assert run_stage_for_error("group_texts", *grouping) == ""
    ids = Documents(tmp_path / "tokens/test")[0]
    assert (ids.dtype, ids.tolist()) == (np.uint32, [1, 2, 65_535, 65_536, 69_999, 1])
