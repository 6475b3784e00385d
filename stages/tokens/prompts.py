"""Prompts: the beginnings of documents that a causal model completes, encoded as they were in training."""

import json

from tokenizers import Tokenizer

from stages.tokens.chat import ChatTemplate
from stages.tokens.texts import Flatten
from stages.tokens.vocabulary import rust_errors

TRAINED_FORM = "{#- The model was trained on documents of this form. -#}"
"""What an exported chat template begins with if it says how the model was trained."""


class PromptEncoder:
    """Encodes what a causal model is given in front of a completion."""

    def __init__(self, tokenizer: Tokenizer, lead: list[int], flatten: Flatten, template: ChatTemplate | None) -> None:
        """
        Args:
            lead: control tokens before a document.
            template: renders the prompt of a conversation, for flatten.messages.
        """
        self._tokenizer, self._lead, self._flatten, self._template = tokenizer, lead, flatten, template
        self.separator = "\n\n" if flatten.messages else "" if flatten.counts_all else flatten.separator
        """What a reader sees between a prompt and its completion."""

    def __call__(self, prompt: str) -> list[int]:
        """The ids of `prompt`, up to where its completion begins."""
        if self._template is None:
            text = prompt + self.separator if prompt else ""
            return [*self._lead, *self._encode(text)]
        ids = list(self._lead)
        for segment in self._template.split_prompt(prompt):
            ids += self._encode(segment.text) if segment.control < 0 else [segment.control]
        return ids

    def _encode(self, text: str) -> list[int]:
        with rust_errors("the tokenizer cannot encode the prompt"):
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def prompt_template(flatten: Flatten, template: ChatTemplate | None) -> str | None:
    """A chat template by which others give the model prompts as it was trained on them; None: it has no prompts."""
    if template is not None:
        return TRAINED_FORM + template.source
    if flatten.counts_all:
        return None
    # Jinja reads the escapes of JSON.
    separator = json.dumps(flatten.separator, ensure_ascii=False)
    return (
        TRAINED_FORM + "{{- eos_token -}}{%- for message in messages -%}{%- if message.role == 'assistant' -%}"
        "{{- message.content + eos_token -}}{%- else -%}{{- message.content + " + separator + " -}}{%- endif -%}"
        "{%- endfor -%}"
    )
