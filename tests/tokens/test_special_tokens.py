"""Special tokens that other files than tokenizer.json name, or transformers' classes add; and what is exported."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import run_stage
from data_helpers import CAUSAL_TOKENS, MLM_TOKENS, hashes, write_bpe, write_word_piece
from hostile import pinned_tokenizer
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from stages.core.errors import StageError
from stages.tokens import vocabulary
from stages.tokens.vocabulary import Vocabulary, export_tokenizer, load_tokenizer, vocabulary_of
from tools import generate

Make = Callable[[Path], Any]
SETTINGS = "tokenizer_config.json"
PLAIN = {"tokenizer_class": "PreTrainedTokenizerFast"}
END = {"eos_token": "<|endoftext|>"}
TEXT = "Why is the sky blue? <|endoftext|> [MASK] <p>"


def bpe(tokens: Mapping[str, str], settings: Any, **files: Any) -> Make:
    """A byte-level BPE with these special tokens in its vocabulary, and other files beside it."""

    def make(directory: Path) -> None:
        write_bpe(directory, tokens)
        for name, content in {"tokenizer_config": settings, **files}.items():
            (directory / f"{name}.json").write_text(json.dumps(content))

    return make


def bert(directory: Path) -> None:
    """A WordPiece whose [MASK] and [PAD] its class alone knows."""
    file = write_word_piece(directory) / "tokenizer.json"
    content = json.loads(file.read_text())
    content["added_tokens"] = content["added_tokens"][1:4]
    for token in ("[MASK]", "[PAD]"):
        content["model"]["vocab"][f"word{token}"] = content["model"]["vocab"].pop(token)
    file.write_text(json.dumps(content))
    (directory / "special_tokens_map.json").unlink()
    (directory / "config.json").write_text(json.dumps({"model_type": "bert"}))


def padded(directory: Path) -> None:
    """A tokenizer.json that pads by a token that it does not have."""
    tokenizer = Tokenizer.from_file(str(write_bpe(directory, CAUSAL_TOKENS) / "tokenizer.json"))
    tokenizer.enable_padding(pad_id=0, pad_token="<p>")
    tokenizer.save(str(directory / "tokenizer.json"))


TWO = {"eos_token": "<e>", "pad_token": "<f>"}
NO_MASK = {role: token for role, token in MLM_TOKENS.items() if role != "mask_token"}
CASES: dict[str, tuple[str, int, Make]] = {
    "eos-in-the-settings": ("causal", 301, bpe({}, PLAIN | {"eos_token": "</s>"})),
    "eos-in-an-object": ("causal", 301, bpe({}, PLAIN | {"eos_token": {"content": "</s>", "__type": "AddedToken"}})),
    "eos-in-the-map": ("causal", 301, bpe({}, PLAIN, special_tokens_map={"eos_token": "</s>"})),
    "eos-and-a-class": ("causal", 302, bpe({}, {"tokenizer_class": "GPT2Tokenizer", "eos_token": "</s>"})),
    "class-with-another-end": (
        "causal",
        301,
        bpe({"eos_token": "</s>"}, {"tokenizer_class": "GPT2Tokenizer", "eos_token": "</s>"}),
    ),
    "class-of-the-model": (
        "causal",
        301,
        bpe({"eos_token": "</s>"}, {"eos_token": "</s>"}, config={"model_type": "gpt2"}),
    ),
    "mask-of-bert": ("mlm", 39, bert),
    "mask-of-roberta": ("mlm", 301, bpe(NO_MASK, {}, config={"model_type": "roberta"})),
    "mask-in-the-settings": ("mlm", 301, bpe(NO_MASK, PLAIN | MLM_TOKENS)),
    "pad-in-added-tokens": ("causal", 301, bpe(END, PLAIN | END | {"pad_token": "<p>"}, added_tokens={"<p>": 300})),
    "pad-behind-a-gap": ("causal", 301, bpe(END, PLAIN | END | {"pad_token": "<p>"}, added_tokens={"<p>": 310})),
    "word-in-added-tokens": ("causal", 301, bpe(END, PLAIN | END, added_tokens={"zebra": 300})),
    "token-in-the-decoder": (
        "causal",
        301,
        bpe(END, PLAIN | END | {"added_tokens_decoder": {"300": {"content": "<p>", "special": True}}}),
    ),
    "extra-tokens": ("causal", 302, bpe(END, PLAIN | END | {"extra_special_tokens": ["<p>", "<q>"]})),
    "additional-tokens": ("causal", 301, bpe(END, PLAIN | END | {"additional_special_tokens": ["<p>"]})),
    "token-of-a-model": ("causal", 301, bpe(END, PLAIN | END | {"image_token": "<p>"})),
    "unknown-token": ("causal", 301, bpe(END, PLAIN | END | {"unk_token": "<p>"})),
    "padding-of-tokenizer-json": ("causal", 301, padded),
    "two-files-that-differ": (
        "causal",
        300,
        bpe(TWO, PLAIN | {"eos_token": "<e>"}, special_tokens_map={"eos_token": "<f>"}),
    ),
}  # fmt: skip
WRAP = {"causal": ("end_of_sequence", ["eos_token"]), "mlm": ("template", ["mask_token"])}
MODEL_TYPE = {"causal": "gpt2", "mlm": "bert"}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for each case."""
    root = tmp_path_factory.mktemp("tokenizers")
    for name, (_, _, make) in CASES.items():
        make(root / name)
    return root


def ids_of(tokenizer: Any) -> dict[str, int]:
    return {role: tokenizer.convert_tokens_to_ids(token) for role, token in tokenizer.special_tokens_map.items()}


@pytest.mark.parametrize("name", CASES)
def test_vocabulary_of_tokens_outside_tokenizer_json_is_transformers(tokenizers: Path, name: str) -> None:
    task, size, _ = CASES[name]
    theirs = AutoTokenizer.from_pretrained(tokenizers / name)
    ours = load_tokenizer(tokenizers / name)
    known = vocabulary_of(ours, tokenizers / name, *WRAP[task])
    assert known.size == size == len(theirs) == max(theirs.get_vocab().values()) + 1
    assert known.special == ids_of(theirs)
    assert ours.get_vocab(with_added_tokens=True) == theirs.get_vocab()
    words = "why is the sky blue"
    assert ours.encode(words, add_special_tokens=False).ids == theirs(words, add_special_tokens=False).input_ids
    spelt = set(ours.encode(TEXT, add_special_tokens=False).ids)
    assert not (set(known.special.values()) - {known.special.get("unk_token")}) & spelt


@pytest.mark.parametrize("name", CASES)
def test_exported_tokenizer_has_the_tokens_of_the_vocabulary_whatever_the_model(
    tokenizers: Path, tmp_path: Path, name: str
) -> None:
    task, size, _ = CASES[name]
    known = vocabulary_of(load_tokenizer(tokenizers / name), tokenizers / name, *WRAP[task])
    for model_type in ("gpt2", "bert", "roberta", "llama", "modernbert", "gpt_neo"):
        directory = tmp_path / model_type
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
        export_tokenizer(tokenizers / name, directory, known.special, 7)
        exported = AutoTokenizer.from_pretrained(directory)
        assert (len(exported), exported.model_max_length, ids_of(exported)) == (size, 7, known.special)


@pytest.mark.parametrize("tokens", [CAUSAL_TOKENS, MLM_TOKENS])
def test_load_tokenizer_of_files_that_agree_does_not_ask_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: dict[str, str]
) -> None:
    def asked(_: Path) -> None:
        raise AssertionError

    monkeypatch.setattr(vocabulary, "transformers_tokenizer", asked)
    directory = write_bpe(tmp_path / "t", tokens)
    task = "mlm" if "mask_token" in tokens else "causal"
    assert vocabulary_of(load_tokenizer(directory), directory, *WRAP[task]).size == 300


def test_load_tokenizer_that_transformers_cannot_make_takes_its_file_by_itself(tmp_path: Path, caplog: Any) -> None:
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["code.Own", None]}, **END}
    bpe(END, own)(tmp_path / "t")
    known = vocabulary_of(load_tokenizer(tmp_path / "t"), tmp_path / "t", *WRAP["causal"])
    assert (known.size, known.special) == (300, {"eos_token": 0})
    assert "is used by itself" in caplog.text
    (tmp_path / "model").mkdir()
    export_tokenizer(tmp_path / "t", tmp_path / "model", known.special, 7)
    exported = AutoTokenizer.from_pretrained(tmp_path / "model", trust_remote_code=False)
    assert (len(exported), ids_of(exported)) == (300, known.special)


@pytest.mark.parametrize(
    "settings", [None, {}, PLAIN, {"tokenizer_class": None}, {"model_max_length": 5}, {"model_max_length": 10**30}, END]
)
def test_exported_tokenizer_truncates_to_the_models_tokens_and_leaves_its_source(tmp_path: Path, settings: Any) -> None:
    write_bpe(tmp_path / "t", CAUSAL_TOKENS)
    (tmp_path / f"t/{SETTINGS}").unlink()
    if settings is not None:
        (tmp_path / f"t/{SETTINGS}").write_text(json.dumps(settings))
    before = hashes(tmp_path / "t")
    (tmp_path / "model").mkdir()
    export_tokenizer(tmp_path / "t", tmp_path / "model", {"eos_token": 0}, 12)
    exported = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert len(exported("word " * 60, truncation=True).input_ids) == exported.model_max_length == 12
    assert hashes(tmp_path / "t") == before
    assert {name: value for name, value in hashes(tmp_path / "model").items() if name != SETTINGS} == {
        name: value for name, value in before.items() if name != SETTINGS
    }


# -- tokenizers that break ---------------------------------------------------------------------------------------------


def edited(**changes: Any) -> Make:
    """Sets values of tokenizer.json, those of its model as `model_KEY`."""

    def make(directory: Path) -> None:
        file = write_bpe(directory, MLM_TOKENS) / "tokenizer.json"
        content = json.loads(file.read_text())
        for key, value in changes.items():
            place = content["model"] if key.startswith("model_") else content
            place[key.removeprefix("model_")] = value
        file.write_text(json.dumps(content))

    return make


def broken(name: str, content: str) -> Make:
    return lambda directory: (write_bpe(directory, MLM_TOKENS) / name).write_text(content)


TEMPLATE = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "X", "type_id": 0}}], "pair": [],
            "special_tokens": {}}  # fmt: skip
BROKEN: dict[str, Make] = {
    "panics-in-its-merges": edited(model_continuing_subword_prefix="#####"),
    "panics-in-its-normalizer": edited(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    "panics-over-a-template": edited(post_processor=TEMPLATE),
    "panics-over-a-text": edited(pre_tokenizer={"type": "FixedLength", "length": 0}),
    "panics-over-a-replacement": edited(normalizer={"type": "Replace", "pattern": {"String": ""}, "content": "x"}),
    "no-unknown-token": edited(model={"type": "WordLevel", "vocab": {"b": 0}, "unk_token": "z"}),
    "no-token-for-a": edited(model={"type": "BPE", "vocab": {"b": 0}, "merges": []}),
    "wraps-in-unknown-ids": edited(post_processor={"type": "BertProcessing", "sep": ["x", 99999], "cls": ["y", 9]}),
    "nested": broken("tokenizer.json", "[" * 200_000),
    "nested-objects": broken("tokenizer.json", '{"model":' * 200_000),
    "settings-nested": broken(SETTINGS, '{"a":' * 200_000),
    "settings-of-a-list": broken(SETTINGS, "[]"),
    "map-nested": broken("special_tokens_map.json", "[" * 200_000),
    "map-of-text": broken("special_tokens_map.json", '"mask_token"'),
    "added-tokens-nested": broken("added_tokens.json", "[" * 200_000),
    "added-tokens-of-a-list": broken("added_tokens.json", "[1]"),
    "number-of-digits": broken(SETTINGS, '{"model_max_length": ' + "9" * 5000 + "}"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_tokenizer_that_breaks_is_an_error_of_a_line(tmp_path: Path, name: str) -> None:
    BROKEN[name](tmp_path / "t")
    with pytest.raises(StageError) as caught:
        vocabulary_of(load_tokenizer(tmp_path / "t"), tmp_path / "t", *WRAP["mlm"])
    said = str(caught.value)
    assert "tokenizer" in said or str(tmp_path) in said
    assert said.isprintable() and len(said) < 600


# -- the stages --------------------------------------------------------------------------------------------------------


@pytest.mark.slow  # trains a toy for each
@pytest.mark.parametrize("name", ["eos-in-the-settings", "class-of-the-model", "pad-behind-a-gap", "mask-of-bert"])
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
    choices = [f"task={task}", "data=files", *pinned_tokenizer(tokenizers / name)]
    run_stage("tokenize", *choices, f"raw={corpus}/raw", f"out={tmp_path}/tokens")
    run_stage("group_texts", "block_size=16", tokens, f"raw={corpus}/raw", f"out={tmp_path}/blocks")
    for stage in ("baseline", "train", "evaluate"):
        given = [tokens] if stage == "baseline" else [tokens, blocks]
        if task == "mlm" and stage != "evaluate":  # whose positions begin behind the pad token's id
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
