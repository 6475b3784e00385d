"""Load, train and export the tokenizer of a task, and find its control tokens."""

import contextlib
import functools
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter, ValidationError
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from stages.core.artifacts import (
    COUNTED,
    SEGMENT_START,
    TokenIds,
    choose_token_dtype,
    copy_files,
    make_damage_error,
    read_json,
    read_json_object,
)
from stages.core.errors import StageError, format_cause, is_error, printable
from stages.tokens.chat import CHAT_TEMPLATE_FILE
from stages.tokens.schema import TrainedTokenizer

log = logging.getLogger(__name__)

_CONFIG_FILE = "tokenizer_config.json"
_SPECIAL_TOKENS_FILE = "special_tokens_map.json"
_ADDED_TOKENS_FILE = "added_tokens.json"
_TOKEN_LISTS = (
    "added_tokens_decoder", "additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens",
)  # fmt: skip
# Tokenizer classes of transformers that do not add tokens to those of tokenizer.json.
_PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")


@dataclass(frozen=True)
class Vocabulary:
    """Size and special token ids of a tokenizer, as stored in data/tokens/TASK/stats.json for later stages."""

    size: int
    """Number of ids: the largest id plus 1."""
    special: dict[str, int]
    """Maps each role (eos_token, mask_token, ...) to its token id."""
    prefix: list[int]
    """Control token ids before the text of every document."""
    suffix: list[int]
    """Control token ids after the text of every document."""
    lead: list[int]
    """Control token ids before the first document of a split."""

    @property
    def dtype(self) -> Any:
        """Narrowest dtype for the ids: uint16 or uint32."""
        return choose_token_dtype(self.size)

    @property
    def control_ids(self) -> TokenIds:
        """[num_control] sorted ids of the tokens that wrap documents; text is never encoded to them."""
        return np.unique(np.array([*self.prefix, *self.suffix, *self.lead], dtype=self.dtype))

    @functools.cached_property
    def ordinary_ids(self) -> TokenIds:
        """[num_ordinary] sorted ids without a special role; random tokens are drawn from them."""
        special = [*self.special.values(), *self.control_ids.tolist()]
        return np.setdiff1d(np.arange(self.size, dtype=self.dtype), np.array(special, dtype=self.dtype))

    def is_text(self, ids: TokenIds) -> npt.NDArray[np.bool_]:
        """Return a mask of the `ids` that are not control tokens, a bool array of the shape of `ids`."""
        return np.isin(ids, self.control_ids, invert=True)

    def select_text_tokens(self, ids: TokenIds) -> TokenIds:
        """Return `ids`, [num_tokens], without the control tokens: [num_text_tokens] of the same dtype."""
        return ids[self.is_text(ids)]

    @classmethod
    def read(cls, tokens: str | Path) -> "Vocabulary":
        """Read the vocabulary from stats.json in the directory `tokens`.

        Raises:
            StageError: if the file is damaged.
        """
        file = Path(tokens) / "stats.json"
        try:
            content = json.dumps(read_json(file)["vocabulary"])
            vocabulary: Vocabulary = TypeAdapter(cls).validate_json(content, strict=True)
        except (KeyError, TypeError, ValidationError) as error:
            raise make_damage_error(file, f"it has no valid vocabulary: {type(error).__name__}") from None
        ids = [*vocabulary.special.values(), *vocabulary.prefix, *vocabulary.suffix, *vocabulary.lead]
        if not all(0 <= number < vocabulary.size for number in ids):
            raise make_damage_error(file, f"a control token has an id outside its {vocabulary.size} tokens")
        return vocabulary


def mark_control_tokens(prefix: Sequence[int], suffix: Sequence[int] = ()) -> list[int]:
    """Return the marks of the control tokens that wrap a document.

    A segment begins at the prefix or, without a prefix, at the suffix of the document before. The suffix is counted,
    because the model is to learn where documents end. To mark the lead of a split, pass it as `prefix`.
    """
    starts = [SEGMENT_START] * len(prefix[:1]) + [0] * len(prefix[1:])
    return starts + [COUNTED if prefix else COUNTED | SEGMENT_START] * len(suffix)


def build_vocabulary(tokenizer: Tokenizer, directory: Path, wrap: str, requires: Iterable[str]) -> Vocabulary:
    """Build the vocabulary of a tokenizer.

    Args:
        directory: files of the tokenizer.
        wrap: `tokenize.wrap` of conf/task, or `none` if a chat template already inserts all control tokens.
        requires: roles of the special tokens that the task needs.

    Raises:
        StageError: if the tokenizer lacks a token that the task needs.
    """
    needs = set(requires)
    special = read_special_tokens(tokenizer, directory)
    if needs - set(special):
        special = _read_special_tokens_with_transformers(directory) | special
    elif (own := _load_tokenizer_file(directory)) is not None and not _have_same_tokens(own, tokenizer):
        special |= _read_special_tokens_with_transformers(directory)
    for role in sorted(needs - set(special)):
        raise StageError(f"the tokenizer has no {role}, which the task needs: choose another model for this task")
    end = [special["eos_token"]] if wrap == "end_of_sequence" else []
    prefix, suffix = _find_template_tokens(tokenizer) if wrap == "template" else ([], end)
    size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    if outside := sorted(number for number in [*special.values(), *prefix, *suffix] if number >= size):
        raise StageError(f"the tokenizer has {size} tokens, but a special token has the id {outside[0]}")
    return Vocabulary(size=size, special=special, prefix=prefix, suffix=suffix, lead=end)


def _find_template_tokens(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Return the ids of the control tokens that `tokenizer` puts before a text and after it."""
    with convert_rust_errors("the tokenizer cannot encode 'a'"):
        plain = tokenizer.encode("a", add_special_tokens=False).ids
        wrapped = tokenizer.encode("a", add_special_tokens=True).ids
    for start in range(len(wrapped) - len(plain) + 1):
        if plain and wrapped[start : start + len(plain)] == plain:
            return wrapped[:start], wrapped[start + len(plain) :]
    raise StageError(
        f"the tokenizer encodes 'a' as {printable(plain)} without special tokens, but as {printable(wrapped)} with"
        " them, so it cannot wrap documents; choose another model for this task"
    )


def read_special_tokens(tokenizer: Tokenizer, directory: Path) -> dict[str, int]:
    """Read the special tokens named in the tokenizer's files, as a map from role to id."""
    settings = [_read_object_if_exists(directory / name) for name in (_CONFIG_FILE, _SPECIAL_TOKENS_FILE)]
    if "added_tokens_decoder" in settings[0]:
        settings.reverse()  # as in transformers, tokenizer_config.json then overrides special_tokens_map.json
    special = {}
    for role, token in (item for file in settings for item in file.items()):
        content = _get_token_text(token)
        if role.endswith("_token") and isinstance(content, str):
            token_id = tokenizer.token_to_id(content)
            if token_id is not None:
                special[role] = token_id
    return dict(sorted(special.items()))


def _get_token_text(token: Any) -> Any:
    """Return the text of a token from a tokenizer file: the value, or `content` if the value is an object."""
    return token.get("content") if isinstance(token, dict) else token


def _read_object_if_exists(file: Path) -> dict[str, Any]:
    """Read the JSON object in `file`; an empty one if the file does not exist."""
    return read_json_object(file) if file.is_file() else {}


def _read_named_tokens(directory: Path) -> set[str]:
    """Read the texts of all tokens named in the files other than tokenizer.json."""
    named: list[Any] = [*_read_object_if_exists(directory / _ADDED_TOKENS_FILE)]
    for key, value in (
        item
        for name in (_CONFIG_FILE, _SPECIAL_TOKENS_FILE)
        for item in _read_object_if_exists(directory / name).items()
    ):
        if key.endswith("_token"):
            named.append(value)
        elif key in _TOKEN_LISTS and isinstance(value, list | dict):
            named += value.values() if isinstance(value, dict) else value
    return {content for content in map(_get_token_text, named) if isinstance(content, str)}


def _is_complete(tokenizer: Tokenizer, directory: Path) -> bool:
    """Return True if `tokenizer`, which is loaded only from tokenizer.json, surely lacks no tokens.

    If False, transformers may add tokens to it.
    """
    settings = _read_object_if_exists(directory / _CONFIG_FILE)
    name = settings.get("tokenizer_class")
    if (directory / "config.json").is_file() if name is None else name not in _PLAIN_CLASSES:
        return False  # the class can add tokens; if it is not named, it follows from the model type in config.json
    named = _read_named_tokens(directory)
    if tokenizer.padding is not None:
        named.add(tokenizer.padding["pad_token"])
    return all(tokenizer.token_to_id(token) is not None for token in named)


def _read_special_tokens_with_transformers(directory: Path) -> dict[str, int]:
    # For old repositories, the special tokens are defaults in the code of transformers.
    tokenizer = load_transformers_tokenizer(directory)
    roles = tokenizer.special_tokens_map
    return {
        role: tokenizer.convert_tokens_to_ids(token) for role, token in sorted(roles.items()) if isinstance(token, str)
    }


def load_transformers_tokenizer(directory: Path) -> Any:
    """Load the tokenizer in `directory` with transformers, without running code from the directory.

    The import of transformers takes 5 s.
    """
    from transformers import AutoTokenizer

    reason = "code in the directory is never run"
    with convert_rust_errors(f"transformers cannot load a tokenizer from {directory} ({reason})"):
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


@contextlib.contextmanager
def convert_rust_errors(problem: str) -> Iterator[None]:
    """Convert the errors raised inside the block to a StageError that says `problem` and the reason.

    The libraries in Rust raise bare Exceptions, and BaseExceptions for panics.
    """
    try:
        yield
    except BaseException as error:
        if not is_error(error):
            raise
        raise StageError(f"{problem}: {format_cause(error, 200)}") from None


def _load_tokenizer_file(directory: Path) -> Tokenizer | None:
    """Load the tokenizer from tokenizer.json in `directory`, without other files; None if the file does not exist."""
    file = directory / "tokenizer.json"
    if not file.is_file():
        return None
    with convert_rust_errors(f"{file} is not a tokenizer"):
        return Tokenizer.from_file(str(file))


def _have_same_tokens(one: Tokenizer, other: Tokenizer) -> bool:
    return bool(one.get_vocab(with_added_tokens=True) == other.get_vocab(with_added_tokens=True))


def load_tokenizer(directory: Path) -> Tokenizer:
    """Load the tokenizer in `directory`, set to encode spelled-out control tokens as text.

    It has the same tokens as the tokenizer that transformers loads from `directory`, including tokens that are missing
    from tokenizer.json and named in other files.
    """
    tokenizer = _load_tokenizer_file(directory)
    if tokenizer is None:
        tokenizer = load_transformers_tokenizer(directory).backend_tokenizer
    elif not _is_complete(tokenizer, directory):
        try:
            made = load_transformers_tokenizer(directory).backend_tokenizer
        except StageError as error:
            log.warning("%s: only tokenizer.json is used", error)
        else:
            if not _have_same_tokens(made, tokenizer):
                tokenizer = made
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None  # BPE dropout would encode the same text differently each time
    return tokenizer


def check_same_tokenizer(own: Path, model: str, tokens: Path) -> None:
    """Raise StageError unless the tokenizers in two directories are the same.

    Args:
        own: directory of the tokenizer that a model was trained with.
        model: name of that model, for the message.
        tokens: directory of the tokenizer that encoded the text.
    """
    one, other = load_tokenizer(own), load_tokenizer(tokens)
    if json.loads(one.to_str())["model"] != json.loads(other.to_str())["model"] or not _have_same_tokens(one, other):
        sizes = [len(tokenizer.get_vocab(with_added_tokens=True)) for tokenizer in (one, other)]
        raise StageError(
            f"{model} was trained with its own tokenizer, of {sizes[0]:,} tokens, but the text was encoded with another"
            f" one, {tokens}, of {sizes[1]:,} tokens: a model continues with its own tokenizer"
        )


def export_tokenizer(
    source: Path, directory: Path, special: dict[str, int], max_length: int, chat_template: str | None = None
) -> None:
    """Write the tokenizer in `source` to the model directory `directory`.

    The files are copied, but tokenizer_config.json also gets the values that transformers would otherwise take from the
    model's configuration or from defaults in its code: the class, the special tokens and the maximum length.

    Args:
        special: maps each role to its token id.
        max_length: maximum number of tokens of the model.
        chat_template: replaces the tokenizer's own chat template; None: keep it.
    """
    copy_files(source, directory, exclude=["config.json", _CONFIG_FILE])
    settings = _read_object_if_exists(source / _CONFIG_FILE)
    tokenizer, own = load_tokenizer(source), _load_tokenizer_file(source)
    if own is None or not _have_same_tokens(own, tokenizer):  # for some model types, transformers ignores other classes
        tokenizer.save(str(directory / "tokenizer.json"))
        settings["tokenizer_class"] = _PLAIN_CLASSES[0]
    elif settings.get("tokenizer_class") is None or "auto_map" in settings:
        try:
            name = type(load_transformers_tokenizer(source)).__name__
        except StageError:  # load_tokenizer used only tokenizer.json
            name = _PLAIN_CLASSES[0]
        settings["tokenizer_class"] = _PLAIN_CLASSES[0] if name in _PLAIN_CLASSES else name
    settings.pop("auto_map", None)
    for role, number in special.items():
        if not isinstance(_get_token_text(settings.get(role)), str):
            settings[role] = tokenizer.id_to_token(number)
    settings["model_max_length"] = max_length
    if chat_template is not None:
        settings.pop("chat_template", None)
        (directory / CHAT_TEMPLATE_FILE).write_text(chat_template, encoding="utf-8")
    (directory / _CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def train_tokenizer(config: TrainedTokenizer, texts: Iterator[list[str]], directory: Path) -> None:
    """Train a byte-level BPE on batches of texts, and write its files to `directory` in the format of transformers.

    Training is deterministic: the same texts give the same merges. Special tokens get the ids from 0, in the order of
    the config.
    """
    roles = config.special_tokens
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # lstrip: the token of a word includes the space before it, so a mask token must absorb that space.
    added = [AddedToken(token, special=True, lstrip=role == "mask_token") for role, token in roles.items()]
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=added,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if {"cls_token", "sep_token"} <= roles.keys():
        cls, sep = roles["cls_token"], roles["sep_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{cls} $A {sep}",
            pair=f"{cls} $A {sep} $B {sep}",
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in (cls, sep)],
        )
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **roles}
    (directory / _CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    if config.chat_template is not None:
        (directory / CHAT_TEMPLATE_FILE).write_text(config.chat_template, encoding="utf-8")
