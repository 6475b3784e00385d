"""The schema of conf/model and conf/adapter, and how what they name is pinned."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from stages.config import Positive, part, whole

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@whole
class TrainedTokenizer:
    vocab_size: Annotated[int, Field(ge=257 + len(SPECIAL_TOKENS))]
    """Tokens, the 256 bytes and the special tokens included."""
    special_tokens: dict[str, str]
    """Role (eos_token, mask_token, ...) to token; ids follow this order from 0. cls and sep wrap a document."""

    @model_validator(mode="after")
    def _known_roles(self) -> "TrainedTokenizer":
        for role in self.special_tokens:
            if role not in SPECIAL_TOKENS:
                raise ValueError(f"tokenizer.train.special_tokens.{role} is not a role: {', '.join(SPECIAL_TOKENS)}")
        return self


@whole
class TokenizerSource:
    """Either `train`, or `path` with a pin: a Hub `revision` or the hashes of local `files`."""

    train: TrainedTokenizer | None = None
    """A byte-level BPE of its own, trained on the training split; null: the tokenizer at `path`."""
    path: str | None = None
    """A Hub repository or a local directory."""
    revision: str | None = None
    """Commit of a Hub repository."""
    files: dict[str, str] | None = None
    """File name to sha256 of a local directory, as tools/pin_model writes them."""

    @model_validator(mode="after")
    def _one_origin(self) -> "TokenizerSource":
        if (self.train is None) == (self.path is None):
            raise ValueError("model.tokenizer: give either `train` or `path`")
        if self.path is not None:
            check_pin("model.tokenizer", self.path, self.revision, self.files)
        return self


@part
class ModelTokenizer:
    """What `tokenize` reads of conf/model/NAME.yaml."""

    tokenizer: TokenizerSource


@part
class Model:
    """What baseline and train read of conf/model/NAME.yaml."""

    task: Literal["causal", "mlm"]
    """The task that the architecture is for."""
    path: str | None
    """A Hub repository or a local directory; null: built from `config` alone."""
    revision: str | None
    """Commit of a Hub repository."""
    files: dict[str, str] | None
    """File name to sha256 of a local directory, as tools/pin_model writes them."""
    from_scratch: bool
    """Fresh weights, whatever `path` holds."""
    max_positions: Positive
    """Tokens that the model can attend to; checked against the model itself when it is built."""
    config: dict[str, Any]
    """Values that override the architecture's configuration."""

    @model_validator(mode="after")
    def _buildable(self) -> "Model":
        if self.path is not None:
            check_pin("model", self.path, self.revision, self.files)
        elif not self.from_scratch:
            raise ValueError("model.path is missing: a model that is not from_scratch needs one")
        elif "model_type" not in self.config:
            raise ValueError("model.config.model_type is missing: a model without path needs its architecture's name")
        return self


def origin(source: TokenizerSource | Model) -> dict[str, Any] | None:
    """For a ledger, what `source` is pinned to: a Hub revision, or the hashes of local files, wherever they stand."""
    if source.path is None:
        return None
    if source.revision is not None:
        return {"path": source.path, "revision": source.revision}
    return {"path": Path(source.path).name, "files": source.files}


def check_task(model: Model, task: str) -> None:
    """Raise ValueError unless `model` is for `task`."""
    if model.task != task:
        raise ValueError(f"{task}.model: this model is for task={model.task}")


def check_pin(where: str, path: str, revision: str | None, files: dict[str, str] | None) -> None:
    """Raise ValueError unless `path` is pinned by exactly one of a revision and file hashes."""
    if (revision is None) == (files is None):
        raise ValueError(
            f"{where}.path={path} is not pinned: a Hub repository needs `revision` (a commit),"
            f" a local directory `files` (run: python -m tools.pin_model DIRECTORY)"
        )


@whole
class Adapter:
    """Train low-rank additions to a model's linear layers in place of its weights (LoRA, arXiv 2106.09685)."""

    rank: Positive
    """Inner size of an addition."""
    alpha: Annotated[float, Field(gt=0.0)]
    """An addition is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)]
    """Of an addition's inputs while training."""
    targets: Annotated[list[str], Field(min_length=1)] | None
    """Ends of the names of the layers that get one; null: every linear layer but the output embedding."""
    merge: bool
    """Write the model with the additions in its weights; false: the additions alone, with the name of their model."""
