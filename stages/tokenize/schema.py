"""Schema of what tokenize reads of conf/data and conf/task."""

from typing import Annotated, Literal

from pydantic import Field

from stages.core.config import whole


@whole
class Flatten:
    columns: Annotated[list[Literal["title", "selftext", "answers.text"]], Field(min_length=1)]
    """Columns of ELI5's schema that make up a document's text, in this order."""
    joiner: str
    """Stands between them, and between the answers."""


@whole
class Tokenize:
    wrap: Literal["end_of_sequence", "template"]
    """end_of_sequence: before the first and after every document; template: the tokenizer's own special tokens."""
    requires: list[Literal["eos_token", "mask_token"]]
    """Special tokens without which the task cannot be trained."""
