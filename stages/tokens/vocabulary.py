"""The tokenizer of a task: its files and its control tokens."""

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
    damaged,
    free_copy,
    read_json,
    read_object,
    token_dtype,
)
from stages.core.errors import StageError, is_error, printable
from stages.tokens.chat import CHAT_TEMPLATE_FILE
from stages.tokens.schema import TrainedTokenizer

log = logging.getLogger(__name__)

_SETTINGS, _ROLES, _ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
_TOKEN_LISTS = (
    "added_tokens_decoder", "additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens",
)  # fmt: skip
# transformers' classes of tokenizers that add no tokens of their own.
_PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")


@dataclass(frozen=True)
class Vocabulary:
    """Token ids that stages after tokenize need, as data/tokens/TASK/stats.json holds them."""

    size: int
    """Number of ids: one more than the largest."""
    special: dict[str, int]
    """Role (eos_token, mask_token, ...) to token id."""
    prefix: list[int]
    """Control tokens before every document's text."""
    suffix: list[int]
    """Control tokens after it."""
    lead: list[int]
    """Control tokens before a split's first document."""

    @property
    def dtype(self) -> Any:
        """The narrowest dtype that holds every id."""
        return token_dtype(self.size)

    @property
    def control(self) -> TokenIds:
        """The ids, sorted, that wrap documents and never stand for text."""
        return np.unique(np.array([*self.prefix, *self.suffix, *self.lead], dtype=self.dtype))

    @functools.cached_property
    def ordinary(self) -> TokenIds:
        """The ids, sorted, that have no special role: what a random token is drawn from."""
        special = [*self.special.values(), *self.control.tolist()]
        return np.setdiff1d(np.arange(self.size, dtype=self.dtype), np.array(special, dtype=self.dtype))

    def is_text(self, ids: TokenIds) -> npt.NDArray[np.bool_]:
        """Which of `ids` are no control tokens, which text never produces."""
        return np.isin(ids, self.control, invert=True)

    def text_tokens(self, ids: TokenIds) -> TokenIds:
        """`ids` without control tokens."""
        return ids[self.is_text(ids)]

    @classmethod
    def read(cls, tokens: str | Path) -> "Vocabulary":
        """The vocabulary of the tokens in the directory `tokens`."""
        file = Path(tokens) / "stats.json"
        try:
            read: Vocabulary = TypeAdapter(cls).validate_json(json.dumps(read_json(file)["vocabulary"]), strict=True)
        except (KeyError, TypeError, ValidationError) as error:
            raise damaged(file, f"no vocabulary in it: {type(error).__name__}") from None
        if not all(
            0 <= number < read.size for number in [*read.special.values(), *read.prefix, *read.suffix, *read.lead]
        ):
            raise damaged(file, f"a control token is outside of its {read.size} tokens")
        return read


def mark_control_tokens(prefix: Sequence[int], suffix: Sequence[int] = ()) -> list[int]:
    """The marks of the control tokens that wrap a document, or of a split's lead as `prefix`.

    A segment begins at the prefix or, where documents have none, at the suffix of the document before. The end of a
    document is to be learned, so that the suffix counts.
    """
    starts = [SEGMENT_START] * len(prefix[:1]) + [0] * len(prefix[1:])
    return starts + [COUNTED if prefix else COUNTED | SEGMENT_START] * len(suffix)


def vocabulary_of(tokenizer: Tokenizer, directory: Path, wrap: str, requires: Iterable[str]) -> Vocabulary:
    """The vocabulary of `tokenizer`, whose files are in `directory`, for documents wrapped as `wrap` says.

    Args:
        wrap: as in conf/task, or `none`: a chat template has already put all control tokens into a document.

    Raises:
        StageError: if the tokenizer lacks a token that the task needs.
    """
    needs = set(requires)
    special = special_tokens(tokenizer, directory)
    if needs - set(special):
        special = _special_tokens_by_transformers(directory) | special
    elif (own := _from_file(directory)) is not None and not _have_same_tokens(own, tokenizer):
        special |= _special_tokens_by_transformers(directory)
    for role in sorted(needs - set(special)):
        raise StageError(f"the tokenizer has no {role}, which the task needs: choose another model for this task")
    end = [special["eos_token"]] if wrap == "end_of_sequence" else []
    prefix, suffix = _template(tokenizer) if wrap == "template" else ([], end)
    size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    if outside := sorted(number for number in [*special.values(), *prefix, *suffix] if number >= size):
        raise StageError(f"the tokenizer has {size} tokens, and gives a special token the id {outside[0]}")
    return Vocabulary(size=size, special=special, prefix=prefix, suffix=suffix, lead=end)


def _template(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The control tokens that `tokenizer` puts before a text, and those behind it."""
    with rust_errors("the tokenizer cannot encode 'a'"):
        alone = tokenizer.encode("a", add_special_tokens=False).ids
        whole = tokenizer.encode("a", add_special_tokens=True).ids
    for start in range(len(whole) - len(alone) + 1):
        if alone and whole[start : start + len(alone)] == alone:
            return whole[:start], whole[start + len(alone) :]
    raise StageError(
        f"the tokenizer encodes 'a' as {printable(alone)} without special tokens, and as {printable(whole)} with them:"
        " documents cannot be wrapped by it; choose another model for this task"
    )


def special_tokens(tokenizer: Tokenizer, directory: Path) -> dict[str, int]:
    """Role to id of the special tokens that the tokenizer's own files name."""
    settings = [_object(directory / name) for name in (_SETTINGS, _ROLES)]
    if "added_tokens_decoder" in settings[0]:
        settings.reverse()  # as transformers: such a file stands above the other one
    special = {}
    for role, token in (item for file in settings for item in file.items()):
        content = _content(token)
        if role.endswith("_token") and isinstance(content, str):
            token_id = tokenizer.token_to_id(content)
            if token_id is not None:
                special[role] = token_id
    return dict(sorted(special.items()))


def _content(token: Any) -> Any:
    """The text of a token as the files have it: by itself, or in an object that says how it is matched."""
    return token.get("content") if isinstance(token, dict) else token


def _object(file: Path) -> dict[str, Any]:
    """The JSON object in `file`; an empty one where there is no such file."""
    return read_object(file) if file.is_file() else {}


def _named_tokens(directory: Path) -> set[str]:
    """The tokens that the files beside tokenizer.json name."""
    named: list[Any] = [*_object(directory / _ADDED)]
    for key, value in (item for name in (_SETTINGS, _ROLES) for item in _object(directory / name).items()):
        if key.endswith("_token"):
            named.append(value)
        elif key in _TOKEN_LISTS and isinstance(value, list | dict):
            named += value.values() if isinstance(value, dict) else value
    return {content for content in map(_content, named) if isinstance(content, str)}


def _is_complete(tokenizer: Tokenizer, directory: Path) -> bool:
    """Whether `tokenizer`, of tokenizer.json by itself, surely has all tokens that transformers would give it."""
    settings = _object(directory / _SETTINGS)
    name = settings.get("tokenizer_class")
    if (directory / "config.json").is_file() if name is None else name not in _PLAIN_CLASSES:
        return False  # its class, with no name that of the model, may add tokens of its own
    named = _named_tokens(directory)
    if tokenizer.padding is not None:
        named.add(tokenizer.padding["pad_token"])
    return all(tokenizer.token_to_id(token) is not None for token in named)


def _special_tokens_by_transformers(directory: Path) -> dict[str, int]:
    # Old repositories leave them to defaults in transformers' code.
    tokenizer = transformers_tokenizer(directory)
    roles = tokenizer.special_tokens_map
    return {
        role: tokenizer.convert_tokens_to_ids(token) for role, token in sorted(roles.items()) if isinstance(token, str)
    }


def transformers_tokenizer(directory: Path) -> Any:
    """The tokenizer in `directory` as transformers makes it, at 5 s of imports; never by code that lies there."""
    from transformers import AutoTokenizer

    ways = "by its own code; code of a repository is never run"
    with rust_errors(f"{directory} holds no tokenizer that transformers can make ({ways})"):
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


@contextlib.contextmanager
def rust_errors(problem: str) -> Iterator[None]:
    """Raise a StageError, `problem` and the reason, for whatever tokenizers raises: bare Exceptions, and panics."""
    try:
        yield
    except BaseException as error:
        if not is_error(error):
            raise
        raise StageError(f"{problem}: {printable(' '.join(str(error).split()))}") from None


def _from_file(directory: Path) -> Tokenizer | None:
    """The tokenizer of the tokenizer.json in `directory` by itself, if there is one."""
    file = directory / "tokenizer.json"
    if not file.is_file():
        return None
    with rust_errors(f"{file} is not a tokenizer"):
        return Tokenizer.from_file(str(file))


def _have_same_tokens(one: Tokenizer, other: Tokenizer) -> bool:
    return bool(one.get_vocab(with_added_tokens=True) == other.get_vocab(with_added_tokens=True))


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer in `directory`, by which a control token spelt out in a text is text.

    It has the tokens that transformers' tokenizer of the directory has, those included that tokenizer.json lacks and
    other files name.
    """
    tokenizer = _from_file(directory)
    if tokenizer is None:
        tokenizer = transformers_tokenizer(directory).backend_tokenizer
    elif not _is_complete(tokenizer, directory):
        try:
            made = transformers_tokenizer(directory).backend_tokenizer
        except StageError as error:
            log.warning("%s: tokenizer.json is used by itself", error)
        else:
            if not _have_same_tokens(made, tokenizer):
                tokenizer = made
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None  # BPE dropout would encode a text anew each time
    return tokenizer


def check_same_tokenizer(own: Path, model: str, tokens: Path) -> None:
    """Raise StageError unless the tokenizers in two directories are the same.

    Args:
        own: has the tokenizer that a model was trained with.
        model: that model, for the message.
        tokens: has the tokenizer by which the text was tokenized.
    """
    one, other = load_tokenizer(own), load_tokenizer(tokens)
    if json.loads(one.to_str())["model"] != json.loads(other.to_str())["model"] or not _have_same_tokens(one, other):
        sizes = [len(tokenizer.get_vocab(with_added_tokens=True)) for tokenizer in (one, other)]
        raise StageError(
            f"{model} was trained with the tokenizer there, of {sizes[0]:,} tokens; the text is in tokens of another"
            f" one, {tokens}, of {sizes[1]:,} tokens: a model goes on with its own tokenizer"
        )


def export_tokenizer(
    source: Path, directory: Path, special: dict[str, int], max_length: int, chat_template: str | None = None
) -> None:
    """Write the tokenizer in `source` beside a model in `directory`, which takes `max_length` tokens.

    Its files are copied, but tokenizer_config.json also says what transformers would otherwise take from the model's
    configuration or from its own code: the class, the `special` tokens and how many tokens to truncate to.

    Args:
        chat_template: takes the place of the tokenizer's own; None: it stays.
    """
    free_copy(source, directory, leave=["config.json", _SETTINGS])
    settings, tokenizer, own = _object(source / _SETTINGS), load_tokenizer(source), _from_file(source)
    if own is None or not _have_same_tokens(own, tokenizer):  # beside some models no class but the plain one is used
        tokenizer.save(str(directory / "tokenizer.json"))
        settings["tokenizer_class"] = _PLAIN_CLASSES[0]
    elif settings.get("tokenizer_class") is None or "auto_map" in settings:
        try:
            name = type(transformers_tokenizer(source)).__name__
        except StageError:  # load_tokenizer took tokenizer.json by itself
            name = _PLAIN_CLASSES[0]
        settings["tokenizer_class"] = _PLAIN_CLASSES[0] if name in _PLAIN_CLASSES else name
    settings.pop("auto_map", None)
    for role, number in special.items():
        if not isinstance(_content(settings.get(role)), str):
            settings[role] = tokenizer.id_to_token(number)
    settings["model_max_length"] = max_length
    if chat_template is not None:
        settings.pop("chat_template", None)
        (directory / CHAT_TEMPLATE_FILE).write_text(chat_template, encoding="utf-8")
    (directory / _SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def train_tokenizer(config: TrainedTokenizer, texts: Iterator[list[str]], directory: Path) -> None:
    """Train a byte-level BPE on `texts`, batch by batch, and write its files to `directory`, in transformers' format.

    Deterministic: the same texts give the same merges. Special tokens have the ids from 0, in the config's order.
    """
    roles = config.special_tokens
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # lstrip: the space before a word belongs to its token, so a mask in a sentence takes the space along.
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
    (directory / _SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    if config.chat_template is not None:
        (directory / CHAT_TEMPLATE_FILE).write_text(config.chat_template, encoding="utf-8")
