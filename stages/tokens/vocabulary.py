"""The tokenizer of a task: its files and its control tokens."""

import functools
import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from stages.core.artifacts import TokenIds, damaged, read_json, token_dtype
from stages.core.errors import StageError
from stages.tokens.schema import TrainedTokenizer

log = logging.getLogger(__name__)


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

    def text_tokens(self, ids: TokenIds) -> TokenIds:
        """`ids` without control tokens, which text never produces."""
        return ids[~np.isin(ids, self.control)]

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


def vocabulary_of(tokenizer: Tokenizer, directory: Path, wrap: str, requires: Iterable[str]) -> Vocabulary:
    """The vocabulary of `tokenizer`, whose files are in `directory`, for documents wrapped as `wrap` says.

    Raises:
        StageError: if the tokenizer lacks a token that the task needs.
    """
    needs = set(requires)
    special = special_tokens(tokenizer, directory)
    if needs - set(special):
        special = _special_tokens_by_transformers(directory) | special
    for role in sorted(needs - set(special)):
        raise StageError(f"the tokenizer has no {role}, which the task needs: choose another model for this task")
    if wrap == "end_of_sequence":
        prefix, suffix = [], [special["eos_token"]]
        lead = suffix
    else:
        alone = tokenizer.encode("a", add_special_tokens=False).ids
        whole = tokenizer.encode("a", add_special_tokens=True).ids
        start = next(i for i in range(len(whole)) if whole[i : i + len(alone)] == alone)
        prefix, suffix, lead = whole[:start], whole[start + len(alone) :], []
    size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    return Vocabulary(size=size, special=special, prefix=prefix, suffix=suffix, lead=lead)


def special_tokens(tokenizer: Tokenizer, directory: Path) -> dict[str, int]:
    """Role to id of the special tokens that the tokenizer's own files name."""
    special = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        file = directory / name
        try:
            settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        except ValueError as error:
            raise StageError(f"{file} is not JSON: {error}") from None
        if not isinstance(settings, dict):
            raise StageError(f"{file} is not a JSON object")
        for role, token in settings.items():
            content = token.get("content") if isinstance(token, dict) else token
            if role.endswith("_token") and isinstance(content, str):
                token_id = tokenizer.token_to_id(content)
                if token_id is not None:
                    special[role] = token_id
    return dict(sorted(special.items()))


def _special_tokens_by_transformers(directory: Path) -> dict[str, int]:
    # Old repositories leave them to defaults in transformers' code.
    tokenizer = _by_transformers(directory)
    roles = tokenizer.special_tokens_map
    return {
        role: tokenizer.convert_tokens_to_ids(token) for role, token in sorted(roles.items()) if isinstance(token, str)
    }


def _by_transformers(directory: Path) -> Any:
    """The tokenizer in `directory` as transformers makes it, at 5 s of imports; never by code that lies there."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a tokenizer's own class raises
        raise StageError(
            f"{directory} holds no tokenizer that transformers can make (by its own code; code of a repository is never"
            f" run): {' '.join(str(error).split())[:200]}"
        ) from None


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer in `directory`, by which a control token spelt out in a text is text."""
    file = directory / "tokenizer.json"
    if file.is_file():
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises bare Exceptions
            raise StageError(f"{file} is not a tokenizer: {error}") from None
    else:
        tokenizer = _by_transformers(directory).backend_tokenizer
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None  # BPE dropout would encode a text anew each time
    return tokenizer


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
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
