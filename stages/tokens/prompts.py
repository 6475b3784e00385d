"""Prompts for causal models, encoded in the same way as the beginnings of training documents."""

import json

from tokenizers import Tokenizer

from stages.tokens.chat import ChatTemplate
from stages.tokens.texts import Flatten
from stages.tokens.vocabulary import convert_rust_errors

TRAINED_FORM_COMMENT = "{#- The model was trained on documents of this form. -#}"
"""First line of an exported chat template that reproduces the form of the training documents."""


class PromptEncoder:
    """Encodes the prompts that a causal model completes."""

    def __init__(self, tokenizer: Tokenizer, lead: list[int], flatten: Flatten, template: ChatTemplate | None) -> None:
        """
        Args:
            lead: control token ids before a document.
            template: chat template that renders the prompt if `flatten.messages` is set, otherwise None.
        """
        self._tokenizer, self._lead, self._flatten, self._template = tokenizer, lead, flatten, template
        self.separator = "\n\n" if flatten.messages else "" if flatten.counts_all else flatten.separator
        """Text to show between a prompt and its completion."""

    def __call__(self, prompt: str) -> list[int]:
        """Return the token ids of `prompt`, up to the start of its completion."""
        if self._template is None:
            text = prompt + self.separator if prompt else ""
            return [*self._lead, *self._encode(text)]
        ids = list(self._lead)
        for segment in self._template.split_prompt(prompt):
            ids += self._encode(segment.text) if segment.control_id < 0 else [segment.control_id]
        return ids

    def _encode(self, text: str) -> list[int]:
        with convert_rust_errors("the tokenizer cannot encode the prompt"):
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def build_prompt_template(flatten: Flatten, template: ChatTemplate | None) -> str | None:
    """Return a chat template that renders prompts in the form of the training documents.

    It is exported with the model, for other software. Returns None if the training documents have no prompts.
    """
    if template is not None:
        return TRAINED_FORM_COMMENT + template.source
    if flatten.counts_all:
        return None
    # A JSON string is a valid Jinja string literal.
    separator = json.dumps(flatten.separator, ensure_ascii=False)
    return (
        TRAINED_FORM_COMMENT + "{{- eos_token -}}{%- for message in messages -%}{%- if message.role == 'assistant' -%}"
        "{{- message.content + eos_token -}}{%- else -%}{{- message.content + " + separator + " -}}{%- endif -%}"
        "{%- endfor -%}"
    )
