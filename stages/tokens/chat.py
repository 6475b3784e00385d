"""Conversations rendered by a tokenizer's chat template and cut into segments; the assistant's segments are counted.

A chat template is a program that comes with a tokenizer. It runs in the sandbox of transformers, without access to
files, modules or attributes. Messages stay text: if a message spells out a control token, the token is encoded as
ordinary characters. The same token in the template becomes a control token.
"""

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from stages.core.errors import StageError, format_cause, is_error

CHAT_TEMPLATE_FILE = "chat_template.jinja"

Message = dict[str, str]
"""A message: its `role` (system, user or assistant) and its `content`."""

# The block that marks the assistant's text in a template; transformers adds it to Jinja.
_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Range of private-use characters in Unicode's last plane. While the template renders, they replace the control tokens
# that messages spell out.
_FIRST_PRIVATE, _LAST_PRIVATE = 0x100000, 0x10FFFD


class Segment(NamedTuple):
    """A part of a conversation that is encoded separately: a piece of text or one control token."""

    text: str
    """Text of the segment; empty for a control token."""
    is_counted: bool
    """True if the assistant wrote the segment."""
    control_id: int = -1
    """Id of the control token; -1 for text."""


class ChatTemplate:
    """Chat template of a tokenizer."""

    def __init__(self, source: str, special: dict[str, str], tokenizer: Tokenizer) -> None:
        """
        Args:
            source: Jinja source of the template.
            special: maps each role (bos_token, eos_token, ...) to its token; the template sees roles as variables.
            tokenizer: tokenizer whose special tokens the template may insert.
        """
        self.source = source
        self._special = special
        added = tokenizer.get_added_tokens_decoder().items()
        self._tokens = {token.content: (number, token) for number, token in added if token.special}
        longest_first = sorted(self._tokens, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def split_messages(self, messages: Sequence[Message]) -> list[Segment]:
        """Return the segments of a conversation.

        The counted segments are the assistant's messages, each with the control token that ends it.

        Raises:
            ValueError: if the template cannot render the messages, or if the assistant's text cannot be located in the
                result.
        """
        shielded, spelled = self._shield_control_tokens(messages)
        text, spans = self._render_with_spans(shielded)
        return list(self._cut_segments(text, spans, spelled))

    def split_prompt(self, prompt: str) -> list[Segment]:
        """Return the segments of a user's `prompt`, up to the start of the assistant's answer.

        Raises:
            ValueError: if the template cannot render the prompt.
        """
        shielded, spelled = self._shield_control_tokens([{"role": "user", "content": prompt}])
        return list(self._cut_segments(self._render(shielded, add_generation_prompt=True), [], spelled))

    def _shield_control_tokens(self, messages: Sequence[Message]) -> tuple[list[Message], dict[str, str]]:
        """Replace each control token spelled out in the messages with a private-use character.

        Returns:
            The messages after the replacement, and a map from private-use character to control token.

        Raises:
            ValueError: if the messages leave too few private-use characters unused.
        """
        contents = [message["content"] for message in messages]
        found = sorted({token for content in contents for token in self._pattern.findall(content)})
        if not found:
            return list(messages), {}
        taken = set("".join(contents))
        free = (chr(code) for code in range(_FIRST_PRIVATE, _LAST_PRIVATE) if chr(code) not in taken)
        shields = dict(zip(found, free, strict=False))
        if len(shields) < len(found):
            raise ValueError("the messages use all characters of Unicode's last plane for private use")
        shielded = [
            {**message, "content": self._pattern.sub(lambda token: shields[token[0]], message["content"])}
            for message in messages
        ]
        return shielded, {shield: token for token, shield in shields.items()}

    def _render_with_spans(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """Return a conversation as text, and the spans (start, end) of the assistant's text in it.

        If the template does not mark these spans with `{% generation %}`, an answer is the text that its message adds
        to the rendering of the earlier messages with the generation prompt.
        """
        if _GENERATION_BLOCK.search(self.source):
            return self._render_marked(messages)
        text, spans = self._render(messages), []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:number], add_generation_prompt=True)
            after = text if number == len(messages) - 1 else self._render(messages[: number + 1])
            if not (text.startswith(after) and after.startswith(before)):
                raise ValueError(
                    f"the chat template changes the text before message {number + 1} when that message is added, so the"
                    " assistant's text cannot be located: mark it in the template with {% generation %} ..."
                    " {% endgeneration %}"
                )
            spans.append((len(before), len(after)))
        return text, [self._strip_trailing_space(text, span) for span in spans]

    def _strip_trailing_space(self, text: str, span: tuple[int, int]) -> tuple[int, int]:
        """Remove the white space after the last control token of `span`: the assistant does not write it."""
        start, end = span
        ends = [found.end() for found in self._pattern.finditer(text, start, end)]
        return (start, ends[-1]) if ends and not text[ends[-1] : end].strip() else span

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        rendered, _ = self._call_template(messages, add_generation_prompt=add_generation_prompt)
        return str(rendered[0])

    def _render_marked(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        rendered, spans = self._call_template(messages, return_assistant_tokens_mask=True)
        return str(rendered[0]), [(int(start), int(end)) for start, end in spans[0]]

    def _call_template(self, messages: Sequence[Message], **options: bool) -> Any:
        # A local import: transformers takes seconds to import, and only conversations need it.
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            return render_jinja_template([list(messages)], chat_template=self.source, **options, **self._special)
        except BaseException as error:  # Jinja and the template can raise any exception
            if not is_error(error):
                raise
            raise ValueError(f"the chat template rejects its messages: {format_cause(error)}") from None

    def _cut_segments(self, text: str, spans: Sequence[tuple[int, int]], spelled: dict[str, str]) -> Iterator[Segment]:
        """Cut the rendered `text` at its control tokens and at the ends of the assistant's `spans`.

        Args:
            spelled: maps the private-use characters in `text` back to the control tokens that they replaced.
        """
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
            # Some tokens absorb the white space next to them.
            if end in starts and starts[end][1].lstrip:
                piece = piece.rstrip()
            if start in ends and ends[start][1].rstrip:
                piece = piece.lstrip()
            if piece:
                yield Segment("".join(spelled.get(character, character) for character in piece), is_counted)


def read_chat_template(directory: Path, tokenizer: Tokenizer, special: dict[str, int]) -> ChatTemplate:
    """Read the chat template from the tokenizer files in `directory`.

    Args:
        special: maps each role (bos_token, eos_token, ...) to its token id.

    Raises:
        StageError: if the tokenizer has no chat template.
    """
    file, settings = directory / CHAT_TEMPLATE_FILE, directory / "tokenizer_config.json"
    source: Any = None
    if file.is_file():
        source = file.read_text(encoding="utf-8")
    elif settings.is_file():
        source = json.loads(settings.read_text(encoding="utf-8")).get("chat_template")
    if isinstance(source, list):  # several named templates
        templates = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = templates.get("default")
    if not isinstance(source, str) or not source.strip():
        raise StageError(
            f"flatten.messages=true: the tokenizer in {directory} has no chat template: choose a model with a chat"
            f" template, add {CHAT_TEMPLATE_FILE} to its files, or set flatten.prompt and flatten.completion"
        )
    tokens = {role: str(tokenizer.id_to_token(number)) for role, number in special.items()}
    return ChatTemplate(source, tokens, tokenizer)
