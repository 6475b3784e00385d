"""Log-likelihoods of choices given their prompts, by a causal model, or pseudo-log-likelihoods by a masked one.

Causal: the sum of ln p of the tokens of a choice, each given the tokens before it. Masked: pseudo-log-likelihood
(Salazar et al. 2020) with the correction of Kauf and Ivanova (2023): each token in turn is replaced by the mask token
and predicted, and so are, without being predicted, the tokens after it in the same word. Otherwise the end of a word
gives its beginning away, and words of several tokens look likelier than they are.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from stages.core.errors import StageError, printable
from stages.figures.metrics import document_nats
from stages.model.objectives import Text, Window, make_objective
from stages.score.items import Item
from stages.tokens.encoding import Encoded, refuse_control_tokens
from stages.tokens.vocabulary import Vocabulary, rust_errors

log = logging.getLogger(__name__)


class EncodedChoice(NamedTuple):
    """A choice after its prompt, without control tokens."""

    ids: npt.NDArray[np.int64]
    """[num_tokens] of the prompt, the joiner and the choice, encoded as one text."""
    words: npt.NDArray[np.int64]
    """[num_tokens] number of the word that each token belongs to, as the tokenizer splits words."""
    start: int
    """First token of the choice."""


def encode_choices(
    items: Sequence[Item], tokenizer: Tokenizer, vocabulary: Vocabulary, joiner: str
) -> list[EncodedChoice]:
    """All choices of all items, in order.

    The choice begins where the tokens differ from those of the prompt alone, without the spaces at its end. (lm_eval
    takes as many tokens away as the prompt has: the same, unless a token holds the end of the prompt and the beginning
    of the choice.)

    Raises:
        StageError: if a text spells a control token that the tokenizer cannot keep as text, or a choice has no token.
    """
    texts = [item.prompt + (joiner if item.prompt else "") + choice for item in items for choice in item.choices]
    owners = [number for number, item in enumerate(items) for _ in item.choices]  # [num_choices] the item of each
    with rust_errors("the tokenizer cannot encode these texts"):
        prompts = tokenizer.encode_batch([item.prompt.rstrip() for item in items], add_special_tokens=False)
        encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    choices = [
        EncodedChoice(np.array(text.ids, np.int64), _words(text.word_ids), _common_length(text.ids, prompts[owner].ids))
        for text, owner in zip(encoded, owners, strict=True)
    ]
    _check(choices, [items[owner] for owner in owners], vocabulary)
    return choices


def _words(numbers: list[int | None]) -> npt.NDArray[np.int64]:
    """Numbers of words; a token that belongs to none is a word of its own."""
    return np.array([-1 - place if number is None else number for place, number in enumerate(numbers)], np.int64)


def _common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens `one` and `other` have in common from their beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def _check(choices: Sequence[EncodedChoice], items: Sequence[Item], vocabulary: Vocabulary) -> None:
    """Raise StageError if a choice cannot be scored; `items` has the item of each choice."""
    for choice, item in zip(choices, items, strict=True):
        if choice.start == len(choice.ids):
            shown = printable(item.choices)
            raise StageError(f"{_place(item)}: the tokenizer has no token for one of {shown}: take the item out")
    offsets = np.cumsum([0, *(len(choice.ids) for choice in choices)], dtype=np.int64)
    ids = np.concatenate([choice.ids for choice in choices]).astype(np.uint32)
    refuse_control_tokens(Encoded(ids, offsets), vocabulary, "a text of", [_place(item) for item in items])


def _place(item: Item) -> str:
    return printable(f"{item.source}:{item.row}")


def score_choices(
    model: Any,
    objective: str,
    choices: Sequence[EncodedChoice],
    vocabulary: Vocabulary,
    context: int,
    batch_tokens: int,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """(Pseudo-)log-likelihood of each choice in nats, and its number of tokens; each [num_choices].

    The same tokens are scored once, so that they have the same score to the last digit.

    Args:
        objective: causal or mlm.
        context: tokens in a window. A causal model scores longer texts in windows that move by half their length, as
            for bits_per_byte; a masked one scores each token in the window around it.
    """
    keys = [(choice.start, choice.ids.tobytes(), choice.words.tobytes()) for choice in choices]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    distinct = list(dict(zip(keys, choices, strict=True)).values())
    room = context - 1 if objective == "causal" else context - len(vocabulary.prefix) - len(vocabulary.suffix)
    if too_long := sum(len(choice.ids) > room for choice in distinct):
        log.warning("%d texts are longer than pairs.context=%d: scored in several windows", too_long, context)
    windows = _causal_windows if objective == "causal" else _masked_windows
    nats, num_tokens = document_nats(model, windows(distinct, vocabulary, context), len(distinct), batch_tokens)
    order = np.array([numbers[key] for key in keys])
    return -nats[order], num_tokens[order]


def _causal_windows(choices: Sequence[EncodedChoice], vocabulary: Vocabulary, context: int) -> Iterator[Window]:
    """The windows of bits_per_byte, in which the tokens of a choice are predicted, and none of its prompt."""
    texts = (Text(choice.ids, 0, np.arange(len(choice.ids)) >= choice.start) for choice in choices)
    return make_objective("causal", vocabulary).windows(texts, context)


def _masked_windows(choices: Sequence[EncodedChoice], vocabulary: Vocabulary, context: int) -> Iterator[Window]:
    """A window for each token of a choice, in which it and the rest of its word are masked, and it is predicted."""
    prefix, suffix, mask = vocabulary.prefix, vocabulary.suffix, vocabulary.special["mask_token"]
    size = max(1, context - len(prefix) - len(suffix))
    for number, choice in enumerate(choices):
        last_begin = max(0, len(choice.ids) - size)
        for place in range(choice.start, len(choice.ids)):
            begin = min(max(0, place - size // 2), last_begin)
            text, words = choice.ids[begin : begin + size].copy(), choice.words[begin : begin + size]
            at = place - begin
            text[at:][words[at:] == words[at]] = mask
            input_ids = np.concatenate([prefix, text, suffix]).astype(np.int64)
            target = choice.ids[place : place + 1]
            yield Window(number, input_ids, np.array([at + len(prefix)]), target, np.array([place]))
