"""Conversations, as a tokenizer's chat template renders them, in segments of which the assistant's words count.

A template is a program that comes with a tokenizer: it runs in the sandbox of transformers, which gives it no access to
files, modules or attributes. What people wrote stays text: a control token that is spelt out in a message is encoded as
any other characters, unlike the same token in the template.
"""

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from stages.core.errors import StageError, is_error, printable

CHAT_TEMPLATE_FILE = "chat_template.jinja"

Message = dict[str, str]
"""The `role` (system, user or assistant) and the `content` of a message."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # transformers' own block, around what an assistant says
# Characters for private use, in Unicode's last plane, stand for control tokens that messages spell.
_PRIVATE, _LAST = 0x100000, 0x10FFFD


class Segment(NamedTuple):
    """A part of a conversation that is encoded by itself."""

    text: str
    """Empty for a control token."""
    is_counted: bool
    control: int = -1
    """Id of a control token; -1: the segment is text."""


class ChatTemplate:
    """The chat template of a tokenizer."""

    def __init__(self, source: str, special: dict[str, str], tokenizer: Tokenizer) -> None:
        """
        Args:
            source: the template, in Jinja's language.
            special: role (bos_token, eos_token, ...) to token, as the template may name it.
            tokenizer: its special tokens are those that the template may put into a document.
        """
        self.source = source
        self._special = special
        added = tokenizer.get_added_tokens_decoder().items()
        self._tokens = {token.content: (number, token) for number, token in added if token.special}
        longest_first = sorted(self._tokens, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def split(self, messages: Sequence[Message]) -> list[Segment]:
        """The segments of a conversation: what the assistant says counts, up to the control token that ends it.

        Raises:
            ValueError: if the template cannot render these messages, or does not tell what the assistant says.
        """
        shielded, spelt = self._shield(messages)
        text, spans = self._render_with_spans(shielded)
        return list(self._segments(text, spans, spelt))

    def split_prompt(self, prompt: str) -> list[Segment]:
        """The segments of a user's `prompt` up to where the assistant's answer begins.

        Raises:
            ValueError: as `split`.
        """
        shielded, spelt = self._shield([{"role": "user", "content": prompt}])
        return list(self._segments(self._render(shielded, add_generation_prompt=True), [], spelt))

    def _shield(self, messages: Sequence[Message]) -> tuple[list[Message], dict[str, str]]:
        """The messages with a private character for each control token that they spell, and what these stand for.

        Raises:
            ValueError: if no private character is left.
        """
        contents = [message["content"] for message in messages]
        found = sorted({token for content in contents for token in self._pattern.findall(content)})
        if not found:
            return list(messages), {}
        taken = set("".join(contents))
        free = (chr(code) for code in range(_PRIVATE, _LAST) if chr(code) not in taken)
        shields = dict(zip(found, free, strict=False))
        if len(shields) < len(found):
            raise ValueError("the messages use all characters of Unicode's last plane for private use")
        shielded = [
            {**message, "content": self._pattern.sub(lambda token: shields[token[0]], message["content"])}
            for message in messages
        ]
        return shielded, {shield: token for token, shield in shields.items()}

    def _render_with_spans(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """A conversation as text, and where in it the assistant speaks.

        Where the template does not mark it (`{% generation %}`), an answer is what its message adds to the text of the
        messages before it, with the prompt for generation.
        """
        if _GENERATION.search(self.source):
            return self._render_marked(messages)
        text, spans = self._render(messages), []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:number], add_generation_prompt=True)
            after = text if number == len(messages) - 1 else self._render(messages[: number + 1])
            if not (text.startswith(after) and after.startswith(before)):
                raise ValueError(
                    f"the chat template changes what comes before message {number + 1} when it is added, so that"
                    " it cannot be told what the assistant says: mark it in the template, {% generation %} ..."
                    " {% endgeneration %}"
                )
            spans.append((len(before), len(after)))
        return text, [self._without_tail(text, span) for span in spans]

    def _without_tail(self, text: str, span: tuple[int, int]) -> tuple[int, int]:
        """`span` without the white space behind its last control token, which the assistant does not write."""
        start, end = span
        ends = [found.end() for found in self._pattern.finditer(text, start, end)]
        return (start, ends[-1]) if ends and not text[ends[-1] : end].strip() else span

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        rendered, _ = self._call(messages, add_generation_prompt=add_generation_prompt)
        return str(rendered[0])

    def _render_marked(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        rendered, spans = self._call(messages, return_assistant_tokens_mask=True)
        return str(rendered[0]), [(int(start), int(end)) for start, end in spans[0]]

    def _call(self, messages: Sequence[Message], **options: bool) -> Any:
        # Imported here: seconds of transformers, which no other document needs.
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            return render_jinja_template([list(messages)], chat_template=self.source, **options, **self._special)
        except BaseException as error:  # of the template: whatever Jinja or the template itself raises
            if not is_error(error):
                raise
            raise ValueError(f"the chat template refuses its messages: {_words(error)}") from None

    def _segments(self, text: str, spans: Sequence[tuple[int, int]], spelt: dict[str, str]) -> Iterator[Segment]:
        """The rendered `text`, cut at control tokens and where the assistant begins and ends to speak."""
        edges = {0, len(text), *(edge for span in spans for edge in span)}
        tokens = list(self._pattern.finditer(text))
        edges.update(edge for token in tokens for edge in token.span())
        starts = {token.start(): self._tokens[token[0]] for token in tokens}
        ends = {token.end(): self._tokens[token[0]] for token in tokens}
        ordered = sorted(edges)
        for start, end in itertools.pairwise(ordered):
            is_counted = any(first <= start < last for first, last in spans)
            if start in starts:
                yield Segment("", is_counted, starts[start][0])
                continue
            piece = text[start:end]
            # White space beside some tokens belongs to them.
            if end in starts and starts[end][1].lstrip:
                piece = piece.rstrip()
            if start in ends and ends[start][1].rstrip:
                piece = piece.lstrip()
            if piece:
                yield Segment("".join(spelt.get(character, character) for character in piece), is_counted)


def _words(error: BaseException) -> str:
    return printable(" ".join(str(error).split()), 300) or type(error).__name__


def read_chat_template(directory: Path, tokenizer: Tokenizer, special: dict[str, int]) -> ChatTemplate:
    """The chat template of the tokenizer whose files are in `directory`.

    Args:
        special: role to id.

    Raises:
        StageError: if it has none.
    """
    file, settings = directory / CHAT_TEMPLATE_FILE, directory / "tokenizer_config.json"
    source: Any = None
    if file.is_file():
        source = file.read_text(encoding="utf-8")
    elif settings.is_file():
        source = json.loads(settings.read_text(encoding="utf-8")).get("chat_template")
    if isinstance(source, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = named.get("default")
    if not isinstance(source, str) or not source.strip():
        raise StageError(
            f"flatten.messages=true: the tokenizer in {directory} has no chat template: choose the model of a chat"
            f" tokenizer, add {CHAT_TEMPLATE_FILE} to its files, or set flatten.prompt and flatten.completion"
        )
    tokens = {role: str(tokenizer.id_to_token(number)) for role, number in special.items()}
    return ChatTemplate(source, tokens, tokenizer)
