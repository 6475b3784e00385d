"""vocabulary: training is deterministic, text never becomes control tokens, and no part of a text is lost."""

import json
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
    read_contents,
    write_bpe,
    write_word_piece,
)  # fmt: skip
from tokenizers import Tokenizer

from stages.core.artifacts import write_json
from stages.core.errors import StageError
from stages.tokens.schema import TrainedTokenizer
from stages.tokens.vocabulary import Vocabulary, build_vocabulary, load_tokenizer, read_special_tokens, train_tokenizer

SPELT_OUT = ["<|endoftext|>", "<s>", "</s>", "<pad>", "<unk>", "<mask>", "[CLS]", "[SEP]", "[MASK]"]
ROLES = {"causal": CAUSAL_TOKENS, "mlm": MLM_TOKENS}
WRAP = {"causal": ("end_of_sequence", ["eos_token"]), "mlm": ("template", ["mask_token"])}


@pytest.fixture(scope="module", params=["causal", "mlm"])
def own_tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A task and the directory of a tokenizer trained for it."""
    return request.param, write_bpe(tmp_path_factory.mktemp("own") / "tokenizer", ROLES[request.param])


def make_vocabulary(task: str, directory: Path) -> Vocabulary:
    wrap, requires = WRAP[task]
    return build_vocabulary(load_tokenizer(directory), directory, wrap, requires)


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ROLES)
def test_train_tokenizer_twice_writes_the_same_bytes(tmp_path: Path, task: str) -> None:
    one, two = (read_contents(write_bpe(tmp_path / name, ROLES[task])) for name in ("one", "two"))
    assert one == two
    assert set(one) == {"tokenizer.json", "tokenizer_config.json"}


TRAIN = """
import sys
from pathlib import Path
sys.path.insert(0, "tests")
from data_helpers import MLM_TOKENS, write_bpe
write_bpe(Path(sys.argv[1]), MLM_TOKENS)
"""


@pytest.mark.parametrize(
    "settings", [{"RAYON_NUM_THREADS": "1"}, {"RAYON_NUM_THREADS": "7"}, {"TOKENIZERS_PARALLELISM": "false"}]
)
def test_train_tokenizer_in_another_process_with_other_threads_writes_the_same_bytes(
    tmp_path: Path, settings: dict[str, str]
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONHASHSEED": "11", **settings}
    command = [sys.executable, "-c", TRAIN, str(tmp_path / "there")]
    subprocess.run(command, check=True, env=environment, cwd=REPOSITORY)
    assert read_contents(tmp_path / "there") == read_contents(write_bpe(tmp_path / "here", MLM_TOKENS))


def test_train_tokenizer_on_other_texts_learns_other_tokens(tmp_path: Path) -> None:
    for name, text in (("a", "abab " * 50), ("c", "cdcd " * 50)):
        train_tokenizer(TrainedTokenizer(vocab_size=300, special_tokens={}), iter([[text]]), tmp_path / name)
    assert read_contents(tmp_path / "a")["tokenizer.json"] != read_contents(tmp_path / "c")["tokenizer.json"]


@pytest.mark.parametrize("task", ROLES)
def test_train_tokenizer_numbers_special_tokens_from_0_in_their_order(tmp_path: Path, task: str) -> None:
    tokenizer = Tokenizer.from_file(str(write_bpe(tmp_path / "t", ROLES[task]) / "tokenizer.json"))
    ids = [tokenizer.token_to_id(token) for token in ROLES[task].values()]
    assert ids == list(range(len(ids)))


@pytest.mark.parametrize("vocab_size", [264, 265, 290])
def test_train_tokenizer_has_the_requested_size(tmp_path: Path, vocab_size: int) -> None:
    directory = write_bpe(tmp_path / "t", CAUSAL_TOKENS, vocab_size)
    assert make_vocabulary("causal", directory).size == vocab_size


def test_train_tokenizer_without_any_text_still_encodes_bytes(tmp_path: Path) -> None:
    config = TrainedTokenizer(vocab_size=300, special_tokens=dict(CAUSAL_TOKENS))
    train_tokenizer(config, iter([]), tmp_path / "t")
    tokenizer = load_tokenizer(tmp_path / "t")
    assert tokenizer.decode(tokenizer.encode("naïve 🙂").ids) == "naïve 🙂"
    assert make_vocabulary("causal", tmp_path / "t").size == 257


# -- loading -----------------------------------------------------------------------------------------------------------


def test_load_tokenizer_disables_truncation_and_padding(tmp_path: Path) -> None:
    file = write_bpe(tmp_path / "t", MLM_TOKENS) / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(file))
    assert len(load_tokenizer(file.parent).encode("word " * 60).ids) > 60
    assert len(load_tokenizer(file.parent).encode("a").ids) == 3


@pytest.mark.parametrize("content", ["", "{", "{}", '{"version": "1.0"}'])
def test_load_tokenizer_of_a_damaged_file_is_an_error_that_names_it(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(StageError, match=f"{tmp_path / 'tokenizer.json'} is not a tokenizer"):
        load_tokenizer(tmp_path)


# -- roles and wrapping ------------------------------------------------------------------------------------------------


def test_vocabulary_of_a_causal_tokenizer_ends_documents(tmp_path: Path) -> None:
    known = make_vocabulary("causal", write_bpe(tmp_path / "t", CAUSAL_TOKENS))
    assert (known.prefix, known.suffix, known.lead, known.special) == ([], [0], [0], {"eos_token": 0})


@pytest.mark.parametrize(("make", "prefix", "suffix"), [(write_bpe, [0], [2]), (write_word_piece, [2], [3])])
def test_vocabulary_of_an_mlm_tokenizer_wraps_as_its_template_does(
    tmp_path: Path, make: Any, prefix: list[int], suffix: list[int]
) -> None:
    directory = make(tmp_path / "t", MLM_TOKENS) if make is write_bpe else make(tmp_path / "t")
    known = make_vocabulary("mlm", directory)
    assert (known.prefix, known.suffix, known.lead) == (prefix, suffix, [])
    assert known.special["mask_token"] == 4


def test_vocabulary_of_a_tokenizer_without_template_wraps_nothing(tmp_path: Path) -> None:
    directory = write_bpe(tmp_path / "t", {"mask_token": "<mask>"})
    known = make_vocabulary("mlm", directory)
    assert (known.prefix, known.suffix, known.lead) == ([], [], [])
    assert known.control_ids.tolist() == []


@pytest.mark.parametrize(("task", "other"), [("causal", {"pad_token": "<pad>"}), ("mlm", CAUSAL_TOKENS)])
def test_vocabulary_without_the_tasks_token_is_an_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, other: dict[str, str]
) -> None:
    # The defaults of transformers add no tokens here, and importing it takes 5 s.
    monkeypatch.setattr("stages.tokens.vocabulary._read_special_tokens_with_transformers", lambda directory: {})
    with pytest.raises(StageError, match=f"has no {WRAP[task][1][0]}"):
        make_vocabulary(task, write_bpe(tmp_path / "t", other))


@pytest.mark.parametrize(
    ("file", "token"),
    [
        ("special_tokens_map.json", "<|endoftext|>"),
        ("tokenizer_config.json", "<|endoftext|>"),
        ("special_tokens_map.json", {"content": "<|endoftext|>", "lstrip": False}),
    ],
)
def test_read_special_tokens_finds_them_in_either_file_and_form(tmp_path: Path, file: str, token: Any) -> None:
    directory = write_bpe(tmp_path / "t", CAUSAL_TOKENS)
    (directory / "tokenizer_config.json").unlink()
    others = {"pad_token": None, "unk_token": "<not in the vocabulary>", "model_max_length": 5, "extra_tokens": ["a"]}
    (directory / file).write_text(json.dumps({"eos_token": token, **others}))
    assert read_special_tokens(Tokenizer.from_file(str(directory / "tokenizer.json")), directory) == {"eos_token": 0}


@pytest.mark.parametrize(("size", "dtype"), [(300, np.uint16), (65_536, np.uint16), (65_537, np.uint32)])
def test_vocabulary_dtype_is_the_narrowest_for_every_id(size: int, dtype: Any) -> None:
    known = Vocabulary(size=size, special={}, prefix=[size - 1], suffix=[], lead=[])
    assert known.dtype == dtype
    assert known.control_ids.tolist() == [size - 1]


def test_select_text_tokens_drops_control_tokens() -> None:
    known = Vocabulary(size=300, special={}, prefix=[2], suffix=[3, 1], lead=[1])
    assert known.control_ids.tolist() == [1, 2, 3]
    assert known.select_text_tokens(np.array([2, 9, 8, 9, 3, 1], np.uint16)).tolist() == [9, 8, 9]


def test_vocabulary_read_returns_the_written_vocabulary(tmp_path: Path, own_tokenizer: tuple[str, Path]) -> None:
    known = make_vocabulary(*own_tokenizer)
    write_json(tmp_path / "stats.json", {"vocabulary": known.__dict__})
    assert Vocabulary.read(tmp_path) == known


OLD_REPOSITORY = """
import sys
from pathlib import Path
from stages.tokens.vocabulary import load_tokenizer, build_vocabulary
tokenizer = load_tokenizer(Path(sys.argv[1]))
known = build_vocabulary(tokenizer, Path(sys.argv[1]), "end_of_sequence", ["eos_token"])
literal = tokenizer.encode("<|endoftext|>").ids
print(known.suffix == [tokenizer.token_to_id("<|endoftext|>")] and not set(known.suffix) & set(literal))
"""


@pytest.mark.slow  # imports transformers and torch
def test_vocabulary_of_an_old_repository_uses_the_defaults_of_transformers(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(write_bpe(tmp_path / "t", CAUSAL_TOKENS) / "tokenizer.json"))
    (tmp_path / "old").mkdir()
    tokenizer.model.save(str(tmp_path / "old"))
    (tmp_path / "old/config.json").write_text('{"model_type": "gpt2"}')
    assert set(read_contents(tmp_path / "old")) == {"vocab.json", "merges.txt", "config.json"}
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", OLD_REPOSITORY, str(tmp_path / "old")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.strip() == "True", done.stderr
