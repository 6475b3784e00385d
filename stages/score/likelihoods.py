"""Log-likelihoods (causal models) or pseudo-log-likelihoods (masked models) of choices given their prompts.

Causal: the sum of ln p over the tokens of a choice, each given the tokens before it. Masked: the pseudo-log-likelihood
of Salazar et al. (2020) with the correction of Kauf and Ivanova (2023). Each token in turn is replaced by the mask
token and predicted. The later tokens of the same word are masked as well but not predicted; otherwise the end of a word
gives away its beginning, and words of several tokens look too likely.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from stages.core.errors import StageError, printable
from stages.figures.metrics import compute_document_nats
from stages.model.objectives import Window, make_objective
from stages.score.items import Item
from stages.tokens.encoding import DocumentText, EncodedTexts, refuse_control_tokens
from stages.tokens.vocabulary import Vocabulary, convert_rust_errors

log = logging.getLogger(__name__)


class EncodedChoice(NamedTuple):
    """A choice with its prompt, without control tokens."""

    ids: npt.NDArray[np.int64]
    """[num_tokens] int64: ids of the prompt, the joiner and the choice, encoded as one text."""
    words: npt.NDArray[np.int64]
    """[num_tokens] int64: number of each token's word, as split by the tokenizer."""
    start: int
    """Index of the first token of the choice."""


def encode_choices(
    items: Sequence[Item], tokenizer: Tokenizer, vocabulary: Vocabulary, joiner: str
) -> list[EncodedChoice]:
    """Encode all choices of all items, in order.

    A choice begins at the first token that differs from the tokens of the prompt without its trailing spaces. (lm_eval
    instead skips as many tokens as the prompt has. The result is the same, unless one token contains both the end of
    the prompt and the beginning of the choice.)

    Args:
        joiner: text between a prompt and a choice; omitted if the prompt is empty.

    Raises:
        StageError: if a text spells a control token that the tokenizer cannot encode as text, or a choice has no token.
    """
    texts = [item.prompt + (joiner if item.prompt else "") + choice for item in items for choice in item.choices]
    owners = [number for number, item in enumerate(items) for _ in item.choices]  # [num_choices] index of each item
    with convert_rust_errors("the tokenizer cannot encode these texts"):
        prompts = tokenizer.encode_batch([item.prompt.rstrip() for item in items], add_special_tokens=False)
        encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    choices = [
        EncodedChoice(
            np.array(text.ids, np.int64),
            _fill_word_numbers(text.word_ids),
            _count_common_tokens(text.ids, prompts[owner].ids),
        )
        for text, owner in zip(encoded, owners, strict=True)
    ]
    _check_choices(choices, [items[owner] for owner in owners], vocabulary)
    return choices


def _fill_word_numbers(numbers: list[int | None]) -> npt.NDArray[np.int64]:
    """Return the word numbers of a text's tokens, [num_tokens] int64. A token outside words is a separate word."""
    # -1 - index: negative, so that it differs from all word numbers.
    return np.array([-1 - index if number is None else number for index, number in enumerate(numbers)], np.int64)


def _count_common_tokens(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of the common prefix of `one` and `other`."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))


def _check_choices(choices: Sequence[EncodedChoice], items: Sequence[Item], vocabulary: Vocabulary) -> None:
    """Raise StageError if a choice cannot be scored.

    Args:
        choices: [num_choices].
        items: [num_choices] the item of each choice.
    """
    for choice, item in zip(choices, items, strict=True):
        if choice.start == len(choice.ids):
            shown = printable(item.choices)
            raise StageError(f"{_format_place(item)}: the tokenizer has no token for one of {shown}: remove the item")
    offsets = np.cumsum([0, *(len(choice.ids) for choice in choices)], dtype=np.int64)
    ids = np.concatenate([choice.ids for choice in choices]).astype(np.uint32)
    refuse_control_tokens(EncodedTexts(ids, offsets), vocabulary, "a text of", [_format_place(item) for item in items])


def _format_place(item: Item) -> str:
    return printable(f"{item.source}:{item.row}")


def score_choices(
    model: Any,
    objective: str,
    choices: Sequence[EncodedChoice],
    vocabulary: Vocabulary,
    context: int,
    batch_tokens: int,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Compute the (pseudo-)log-likelihood of each choice.

    Choices with the same tokens are scored once, so their scores are equal to the last digit.

    Args:
        objective: causal or mlm.
        context: tokens per window. For longer texts, a causal model uses windows that move by half their length, as for
            bits_per_byte; a masked model uses a window around each token.
        batch_tokens: maximum number of tokens per batch, including padding.

    Returns:
        The (pseudo-)log-likelihoods in nats, [num_choices] float64, and the numbers of tokens, [num_choices] int64.
    """
    keys = [(choice.start, choice.ids.tobytes(), choice.words.tobytes()) for choice in choices]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    distinct = list(dict(zip(keys, choices, strict=True)).values())
    room = context - 1 if objective == "causal" else context - len(vocabulary.prefix) - len(vocabulary.suffix)
    if too_long := sum(len(choice.ids) > room for choice in distinct):
        log.warning("%d texts are longer than pairs.context=%d: scored in several windows", too_long, context)
    windows = _build_causal_windows if objective == "causal" else _build_masked_windows
    nats, num_tokens = compute_document_nats(model, windows(distinct, vocabulary, context), len(distinct), batch_tokens)
    order = np.array([numbers[key] for key in keys])  # [num_choices] index of each choice among the distinct ones
    return -nats[order], num_tokens[order]


def _build_causal_windows(choices: Sequence[EncodedChoice], vocabulary: Vocabulary, context: int) -> Iterator[Window]:
    """Build the windows of bits_per_byte; only the tokens of the choice are predicted, not those of its prompt."""
    texts = (DocumentText(choice.ids, 0, np.arange(len(choice.ids)) >= choice.start) for choice in choices)
    return make_objective("causal", vocabulary).build_windows(texts, context)


def _build_masked_windows(choices: Sequence[EncodedChoice], vocabulary: Vocabulary, context: int) -> Iterator[Window]:
    """Build one window per token of a choice: the token and the rest of its word are masked, the token is predicted."""
    prefix, suffix, mask = vocabulary.prefix, vocabulary.suffix, vocabulary.special["mask_token"]
    size = max(1, context - len(prefix) - len(suffix))  # text tokens per window
    for number, choice in enumerate(choices):
        last_begin = max(0, len(choice.ids) - size)
        for index in range(choice.start, len(choice.ids)):
            # The window is centered on the token, but does not extend beyond the text. [at most size]
            begin = min(max(0, index - size // 2), last_begin)
            text, words = choice.ids[begin : begin + size].copy(), choice.words[begin : begin + size]
            position = index - begin  # of the token in the window
            text[position:][words[position:] == words[position]] = mask
            input_ids = np.concatenate([prefix, text, suffix]).astype(np.int64)
            target = choice.ids[index : index + 1]
            yield Window(number, input_ids, np.array([position + len(prefix)]), target, np.array([index]))
