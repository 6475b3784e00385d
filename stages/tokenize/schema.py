"""Schema of the tokenize section of conf/task."""

from typing import Literal

from stages.core.config import whole


@whole
class Tokenize:
    wrap: Literal["end_of_sequence", "template"]
    """end_of_sequence: before the first and after every document; template: the tokenizer's own special tokens."""
    requires: list[Literal["eos_token", "mask_token"]]
    """Special tokens without which the task cannot be trained."""
