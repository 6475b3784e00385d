"""Special tokens from files other than tokenizer.json or from classes of transformers, and exported tokenizers."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import run_stage
from data_helpers import CAUSAL_TOKENS, MLM_TOKENS, hash_files, write_bpe, write_word_piece
from hostile import pin_tokenizer
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from stages.core.errors import StageError
from stages.tokens import vocabulary
from stages.tokens.vocabulary import Vocabulary, build_vocabulary, export_tokenizer, load_tokenizer
from tools import generate

Writer = Callable[[Path], Any]
SETTINGS = "tokenizer_config.json"
PLAIN = {"tokenizer_class": "PreTrainedTokenizerFast"}
END = {"eos_token": "<|endoftext|>"}
TEXT = "Why is the sky blue? <|endoftext|> [MASK] <p>"


def make_bpe_writer(tokens: Mapping[str, str], settings: Any, **files: Any) -> Writer:
    """Make a function that writes a byte-level BPE with the special tokens `tokens`, and other files next to it."""

    def write(directory: Path) -> None:
        write_bpe(directory, tokens)
        for name, content in {"tokenizer_config": settings, **files}.items():
            (directory / f"{name}.json").write_text(json.dumps(content))

    return write


def write_bert(directory: Path) -> None:
    """Write a WordPiece tokenizer whose [MASK] and [PAD] are added only by its class."""
    file = write_word_piece(directory) / "tokenizer.json"
    content = json.loads(file.read_text())
    content["added_tokens"] = content["added_tokens"][1:4]
    for token in ("[MASK]", "[PAD]"):
        content["model"]["vocab"][f"word{token}"] = content["model"]["vocab"].pop(token)
    file.write_text(json.dumps(content))
    (directory / "special_tokens_map.json").unlink()
    (directory / "config.json").write_text(json.dumps({"model_type": "bert"}))


def write_padded(directory: Path) -> None:
    """Write a tokenizer.json that pads with a token that it does not have."""
    tokenizer = Tokenizer.from_file(str(write_bpe(directory, CAUSAL_TOKENS) / "tokenizer.json"))
    tokenizer.enable_padding(pad_id=0, pad_token="<p>")
    tokenizer.save(str(directory / "tokenizer.json"))


TWO = {"eos_token": "<e>", "pad_token": "<f>"}
NO_MASK = {role: token for role, token in MLM_TOKENS.items() if role != "mask_token"}
CASES: dict[str, tuple[str, int, Writer]] = {
    "eos-in-the-settings": ("causal", 301, make_bpe_writer({}, PLAIN | {"eos_token": "</s>"})),
    "eos-in-an-object": (
        "causal",
        301,
        make_bpe_writer({}, PLAIN | {"eos_token": {"content": "</s>", "__type": "AddedToken"}}),
    ),
    "eos-in-the-map": ("causal", 301, make_bpe_writer({}, PLAIN, special_tokens_map={"eos_token": "</s>"})),
    "eos-and-a-class": ("causal", 302, make_bpe_writer({}, {"tokenizer_class": "GPT2Tokenizer", "eos_token": "</s>"})),
    "class-with-another-end": (
        "causal",
        301,
        make_bpe_writer({"eos_token": "</s>"}, {"tokenizer_class": "GPT2Tokenizer", "eos_token": "</s>"}),
    ),
    "class-of-the-model": (
        "causal",
        301,
        make_bpe_writer({"eos_token": "</s>"}, {"eos_token": "</s>"}, config={"model_type": "gpt2"}),
    ),
    "mask-of-bert": ("mlm", 39, write_bert),
    "mask-of-roberta": ("mlm", 301, make_bpe_writer(NO_MASK, {}, config={"model_type": "roberta"})),
    "mask-in-the-settings": ("mlm", 301, make_bpe_writer(NO_MASK, PLAIN | MLM_TOKENS)),
    "pad-in-added-tokens": (
        "causal",
        301,
        make_bpe_writer(END, PLAIN | END | {"pad_token": "<p>"}, added_tokens={"<p>": 300}),
    ),
    "pad-after-a-gap": (
        "causal",
        301,
        make_bpe_writer(END, PLAIN | END | {"pad_token": "<p>"}, added_tokens={"<p>": 310}),
    ),
    "word-in-added-tokens": ("causal", 301, make_bpe_writer(END, PLAIN | END, added_tokens={"zebra": 300})),
    "token-in-the-decoder": (
        "causal",
        301,
        make_bpe_writer(END, PLAIN | END | {"added_tokens_decoder": {"300": {"content": "<p>", "special": True}}}),
    ),
    "extra-tokens": ("causal", 302, make_bpe_writer(END, PLAIN | END | {"extra_special_tokens": ["<p>", "<q>"]})),
    "additional-tokens": ("causal", 301, make_bpe_writer(END, PLAIN | END | {"additional_special_tokens": ["<p>"]})),
    "token-of-a-model": ("causal", 301, make_bpe_writer(END, PLAIN | END | {"image_token": "<p>"})),
    "unknown-token": ("causal", 301, make_bpe_writer(END, PLAIN | END | {"unk_token": "<p>"})),
    "padding-of-tokenizer-json": ("causal", 301, write_padded),
    "two-files-that-differ": (
        "causal",
        300,
        make_bpe_writer(TWO, PLAIN | {"eos_token": "<e>"}, special_tokens_map={"eos_token": "<f>"}),
    ),
}  # fmt: skip
WRAP = {"causal": ("end_of_sequence", ["eos_token"]), "mlm": ("template", ["mask_token"])}
MODEL_TYPE = {"causal": "gpt2", "mlm": "bert"}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with one tokenizer per case."""
    root = tmp_path_factory.mktemp("tokenizers")
    for name, (_, _, write) in CASES.items():
        write(root / name)
    return root


def get_special_ids(tokenizer: Any) -> dict[str, int]:
    return {role: tokenizer.convert_tokens_to_ids(token) for role, token in tokenizer.special_tokens_map.items()}


@pytest.mark.parametrize("name", CASES)
def test_vocabulary_with_tokens_outside_tokenizer_json_matches_transformers(tokenizers: Path, name: str) -> None:
    task, size, _ = CASES[name]
    theirs = AutoTokenizer.from_pretrained(tokenizers / name)
    ours = load_tokenizer(tokenizers / name)
    known = build_vocabulary(ours, tokenizers / name, *WRAP[task])
    assert known.size == size == len(theirs) == max(theirs.get_vocab().values()) + 1
    assert known.special == get_special_ids(theirs)
    assert ours.get_vocab(with_added_tokens=True) == theirs.get_vocab()
    words = "why is the sky blue"
    assert ours.encode(words, add_special_tokens=False).ids == theirs(words, add_special_tokens=False).input_ids
    spelled = set(ours.encode(TEXT, add_special_tokens=False).ids)
    assert not (set(known.special.values()) - {known.special.get("unk_token")}) & spelled


@pytest.mark.parametrize("name", CASES)
def test_exported_tokenizer_for_any_model_type_has_the_tokens_of_the_vocabulary(
    tokenizers: Path, tmp_path: Path, name: str
) -> None:
    task, size, _ = CASES[name]
    known = build_vocabulary(load_tokenizer(tokenizers / name), tokenizers / name, *WRAP[task])
    for model_type in ("gpt2", "bert", "roberta", "llama", "modernbert", "gpt_neo"):
        directory = tmp_path / model_type
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
        export_tokenizer(tokenizers / name, directory, known.special, 7)
        exported = AutoTokenizer.from_pretrained(directory)
        assert (len(exported), exported.model_max_length, get_special_ids(exported)) == (size, 7, known.special)


@pytest.mark.parametrize("tokens", [CAUSAL_TOKENS, MLM_TOKENS])
def test_load_tokenizer_of_consistent_files_does_not_use_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: dict[str, str]
) -> None:
    def fail(_: Path) -> None:
        raise AssertionError

    monkeypatch.setattr(vocabulary, "load_transformers_tokenizer", fail)
    directory = write_bpe(tmp_path / "t", tokens)
    task = "mlm" if "mask_token" in tokens else "causal"
    assert build_vocabulary(load_tokenizer(directory), directory, *WRAP[task]).size == 300


def test_load_tokenizer_unknown_to_transformers_uses_only_tokenizer_json(tmp_path: Path, caplog: Any) -> None:
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["code.Own", None]}, **END}
    make_bpe_writer(END, own)(tmp_path / "t")
    known = build_vocabulary(load_tokenizer(tmp_path / "t"), tmp_path / "t", *WRAP["causal"])
    assert (known.size, known.special) == (300, {"eos_token": 0})
    assert "only tokenizer.json is used" in caplog.text
    (tmp_path / "model").mkdir()
    export_tokenizer(tmp_path / "t", tmp_path / "model", known.special, 7)
    exported = AutoTokenizer.from_pretrained(tmp_path / "model", trust_remote_code=False)
    assert (len(exported), get_special_ids(exported)) == (300, known.special)


@pytest.mark.parametrize(
    "settings", [None, {}, PLAIN, {"tokenizer_class": None}, {"model_max_length": 5}, {"model_max_length": 10**30}, END]
)
def test_exported_tokenizer_truncates_to_max_length_and_leaves_its_source(tmp_path: Path, settings: Any) -> None:
    write_bpe(tmp_path / "t", CAUSAL_TOKENS)
    (tmp_path / f"t/{SETTINGS}").unlink()
    if settings is not None:
        (tmp_path / f"t/{SETTINGS}").write_text(json.dumps(settings))
    before = hash_files(tmp_path / "t")
    (tmp_path / "model").mkdir()
    export_tokenizer(tmp_path / "t", tmp_path / "model", {"eos_token": 0}, 12)
    exported = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert len(exported("word " * 60, truncation=True).input_ids) == exported.model_max_length == 12
    assert hash_files(tmp_path / "t") == before
    assert {name: value for name, value in hash_files(tmp_path / "model").items() if name != SETTINGS} == {
        name: value for name, value in before.items() if name != SETTINGS
    }


# -- tokenizers that break ---------------------------------------------------------------------------------------------


def make_edited_writer(**changes: Any) -> Writer:
    """Make a function that writes a tokenizer.json with changed values; `model_KEY` is a value of its model."""

    def write(directory: Path) -> None:
        file = write_bpe(directory, MLM_TOKENS) / "tokenizer.json"
        content = json.loads(file.read_text())
        for key, value in changes.items():
            section = content["model"] if key.startswith("model_") else content
            section[key.removeprefix("model_")] = value
        file.write_text(json.dumps(content))

    return write


def make_broken_writer(name: str, content: str) -> Writer:
    return lambda directory: (write_bpe(directory, MLM_TOKENS) / name).write_text(content)


TEMPLATE = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "X", "type_id": 0}}], "pair": [],
            "special_tokens": {}}  # fmt: skip
BROKEN: dict[str, Writer] = {
    "panics-in-its-merges": make_edited_writer(model_continuing_subword_prefix="#####"),
    "panics-in-its-normalizer": make_edited_writer(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    "panics-over-a-template": make_edited_writer(post_processor=TEMPLATE),
    "panics-over-a-text": make_edited_writer(pre_tokenizer={"type": "FixedLength", "length": 0}),
    "panics-over-a-replacement": make_edited_writer(
        normalizer={"type": "Replace", "pattern": {"String": ""}, "content": "x"}
    ),
    "no-unknown-token": make_edited_writer(model={"type": "WordLevel", "vocab": {"b": 0}, "unk_token": "z"}),
    "no-token-for-a": make_edited_writer(model={"type": "BPE", "vocab": {"b": 0}, "merges": []}),
    "wraps-in-unknown-ids": make_edited_writer(
        post_processor={"type": "BertProcessing", "sep": ["x", 99999], "cls": ["y", 9]}
    ),
    "nested": make_broken_writer("tokenizer.json", "[" * 200_000),
    "nested-objects": make_broken_writer("tokenizer.json", '{"model":' * 200_000),
    "settings-nested": make_broken_writer(SETTINGS, '{"a":' * 200_000),
    "settings-of-a-list": make_broken_writer(SETTINGS, "[]"),
    "map-nested": make_broken_writer("special_tokens_map.json", "[" * 200_000),
    "map-of-text": make_broken_writer("special_tokens_map.json", '"mask_token"'),
    "added-tokens-nested": make_broken_writer("added_tokens.json", "[" * 200_000),
    "added-tokens-of-a-list": make_broken_writer("added_tokens.json", "[1]"),
    "number-of-digits": make_broken_writer(SETTINGS, '{"model_max_length": ' + "9" * 5000 + "}"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_tokenizer_is_a_one_line_error(tmp_path: Path, name: str) -> None:
    BROKEN[name](tmp_path / "t")
    with pytest.raises(StageError) as caught:
        build_vocabulary(load_tokenizer(tmp_path / "t"), tmp_path / "t", *WRAP["mlm"])
    said = str(caught.value)
    assert "tokenizer" in said or str(tmp_path) in said
    assert said.isprintable() and len(said) < 600


# -- the stages --------------------------------------------------------------------------------------------------------


@pytest.mark.slow  # trains a toy for each
@pytest.mark.parametrize("name", ["eos-in-the-settings", "class-of-the-model", "pad-after-a-gap", "mask-of-bert"])
def test_tokens_outside_tokenizer_json_reach_the_exported_model(
    tokenizers: Path,
    corpus: Path,
    overrides: Any,
    cache: Path,
    tmp_path: Path,
    capsys: Any,
    monkeypatch: Any,
    name: str,
) -> None:
    task, size, _ = CASES[name]
    tokens, blocks = f"tokens={tmp_path}/tokens", f"blocks={tmp_path}/blocks"
    choices = [f"task={task}", "data=files", *pin_tokenizer(tokenizers / name)]
    run_stage("tokenize", *choices, f"raw={corpus}/raw", f"out={tmp_path}/tokens")
    run_stage("group_texts", "block_size=16", tokens, f"raw={corpus}/raw", f"out={tmp_path}/blocks")
    for stage in ("baseline", "train", "evaluate"):
        given = [tokens] if stage == "baseline" else [tokens, blocks]
        if task == "mlm" and stage != "evaluate":  # positions begin after the pad token's id
            given.append("model.config.max_position_embeddings=128")
        run_stage(stage, *overrides(stage, task, tmp_path, *given))
    exported = AutoTokenizer.from_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert len(exported) == size == config["vocab_size"] == Vocabulary.read(tmp_path / "tokens").size
    assert exported.model_max_length == 64
    capsys.readouterr()
    prompt = "Rain falls" if task == "causal" else "Rain {mask} when air cools"
    monkeypatch.setattr("sys.argv", ["generate", str(tmp_path / "model"), prompt, "--top-k", "3"])
    generate.main()
    assert capsys.readouterr().out
