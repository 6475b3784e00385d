"""Schema of the tokenize section of conf/task."""

from typing import Literal

from stages.core.config import config_section


@config_section
class Tokenize:
    wrap: Literal["end_of_sequence", "template"]
    """end_of_sequence: one before the first and after every document; template: the tokenizer's own special tokens."""
    requires: list[Literal["eos_token", "mask_token"]]
    """Roles of the special tokens that the task needs."""
