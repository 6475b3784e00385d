"""Schema of the tokenizer section of conf/model."""

from typing import Annotated

from pydantic import Field, model_validator

from stages.core.config import config_section, config_view
from stages.core.pins import TrainedModel, check_pin

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@config_section
class TrainedTokenizer:
    vocab_size: Annotated[int, Field(ge=257 + len(_SPECIAL_TOKENS))]
    """Number of tokens, including the 256 bytes and the special tokens."""
    special_tokens: dict[str, str]
    """Role (eos_token, mask_token, ...) to token; ids follow this order from 0. cls and sep tokens wrap documents."""
    chat_template: str | None = None
    """Chat template for conversations, in Jinja as transformers runs it; null: no conversations."""

    @model_validator(mode="after")
    def _check_roles(self) -> "TrainedTokenizer":
        for role in self.special_tokens:
            if role not in _SPECIAL_TOKENS:
                raise ValueError(f"tokenizer.train.special_tokens.{role} is not a role: {', '.join(_SPECIAL_TOKENS)}")
        return self


@config_section
class TokenizerSource:
    """Source of the tokenizer: `train`, or `path` with a pin (a Hub `revision` or hashes of local `files`), or `from`.

    Exactly one of them is given.
    """

    train: TrainedTokenizer | None = None
    """Train a byte-level BPE on the training split; null: use an existing tokenizer."""
    path: str | None = None
    """Hub repository or local directory."""
    revision: str | None = None
    """Commit of the Hub repository."""
    files: dict[str, str] | None = None
    """Maps each file of the local directory to its sha256, as written by tools/pin_model."""
    from_: Annotated[TrainedModel | None, Field(alias="from")] = None
    """Use the tokenizer of a model that a task of this repository trained, in an experiment or at a commit."""

    @model_validator(mode="after")
    def _check_origin(self) -> "TokenizerSource":
        if (self.train is None) == (self.path is None and self.from_ is None):
            raise ValueError("model.tokenizer: give one of `train`, `path` and `from`")
        check_pin("model.tokenizer", self)
        return self


@config_view
class ModelTokenizer:
    """The section of conf/model/NAME.yaml that `tokenize` reads."""

    tokenizer: TokenizerSource
