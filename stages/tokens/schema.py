"""Schema of the tokenizer section of conf/model."""

from typing import Annotated

from pydantic import Field, model_validator

from stages.core.config import part, whole
from stages.core.pins import TrainedAt, check_pin

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@whole
class TrainedTokenizer:
    vocab_size: Annotated[int, Field(ge=257 + len(_SPECIAL_TOKENS))]
    """Tokens, the 256 bytes and the special tokens included."""
    special_tokens: dict[str, str]
    """Role (eos_token, mask_token, ...) to token; ids follow this order from 0. cls and sep wrap a document."""
    chat_template: str | None = None
    """How conversations are rendered, in Jinja as transformers runs it; null: there are none."""

    @model_validator(mode="after")
    def _known_roles(self) -> "TrainedTokenizer":
        for role in self.special_tokens:
            if role not in _SPECIAL_TOKENS:
                raise ValueError(f"tokenizer.train.special_tokens.{role} is not a role: {', '.join(_SPECIAL_TOKENS)}")
        return self


@whole
class TokenizerSource:
    """Either `train`, or `path` with a pin (a Hub `revision` or the hashes of local `files`), or `from`."""

    train: TrainedTokenizer | None = None
    """A byte-level BPE of its own, trained on the training split; null: the tokenizer at `path`."""
    path: str | None = None
    """A Hub repository or a local directory."""
    revision: str | None = None
    """Commit of a Hub repository."""
    files: dict[str, str] | None = None
    """File name to sha256 of a local directory, as tools/pin_model writes them."""
    from_: Annotated[TrainedAt | None, Field(alias="from")] = None
    """The tokenizer of a model that a task of this repository trained, in an experiment or at a commit."""

    @model_validator(mode="after")
    def _one_origin(self) -> "TokenizerSource":
        if (self.train is None) == (self.path is None and self.from_ is None):
            raise ValueError("model.tokenizer: give one of `train`, `path` and `from`")
        check_pin("model.tokenizer", self)
        return self


@part
class ModelTokenizer:
    """What `tokenize` reads of conf/model/NAME.yaml."""

    tokenizer: TokenizerSource
