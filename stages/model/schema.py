"""Schemas of conf/model, conf/adapter and the objective section of conf/task."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from stages.core.config import Fraction, Positive, part, whole
from stages.core.errors import printable
from stages.core.pins import TrainedAt, check_pin

# Files that train writes where adapter.merge is false: the additions, and the config of the model that they extend.
ADDITIONS, BASE = "adapter_model.safetensors", "base.json"


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
    from_: Annotated[TrainedAt | None, Field(alias="from")] = None
    """The model that a task of this repository trained, in an experiment or at a commit."""
    from_scratch: bool
    """Fresh weights, whatever `path` holds."""
    max_positions: Positive
    """Tokens that the model can attend to; checked against the model itself when it is built."""
    config: dict[str, Any]
    """Values that override the architecture's configuration."""

    @property
    def has_files(self) -> bool:
        """Whether the architecture's configuration is read from files; else it is built from `config` alone."""
        return self.path is not None or self.from_ is not None

    @property
    def attention(self) -> str | None:
        """The attention that `config` chooses; None: transformers' own choice."""
        return self.config.get("_attn_implementation")

    @model_validator(mode="after")
    def _buildable(self) -> "Model":
        check_pin("model", self)
        if self.has_files:
            return self
        if not self.from_scratch:
            raise ValueError("model.path is missing: a model that is not from_scratch needs one")
        if "model_type" not in self.config:
            raise ValueError("model.config.model_type is missing: a model without path needs its architecture's name")
        return self


def check_task(model: Model, objective: str) -> None:
    """Raise ValueError unless `model` is for the objective of that name."""
    if model.task != objective:
        raise ValueError(
            f"model.task={model.task}: this model cannot be trained with objective.name={objective}; choose another"
            " model for this task"
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


@part
class ObjectiveName:
    name: Literal["causal", "mlm"]
    """causal: predict the next token; mlm: predict masked ones."""


# Architectures for which tests prove that documents of a block do not reach each other. (transformers' masks follow
# reset position_ids in the causal ones; the others need a mask of their own.)
ISOLATION_PROVEN = {"causal": ("gpt2", "gpt_neo", "gptj", "llama"), "mlm": ("bert", "modernbert", "roberta")}


def check_isolation(objective: "ObjectiveConfig", model_type: str | None) -> None:
    """Raise ValueError if documents are to be isolated in an architecture for which that is not proven."""
    if objective.isolate_documents and model_type not in (None, *ISOLATION_PROVEN[objective.name]):
        raise ValueError(
            f"objective.isolate_documents=true is not proven for {printable(model_type)} under {objective.name} (it is"
            f" for {', '.join(ISOLATION_PROVEN[objective.name])}): set isolate_documents: false in"
            f" conf/task/{objective.name}.yaml"
        )


@whole
class ObjectiveConfig:
    name: Literal["causal", "mlm"]
    """causal: predict the next token; mlm: predict masked ones."""
    isolate_documents: bool
    """Attention and positions restart at each document inside a block."""
    mlm_probability: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Share of the text tokens to predict (mlm)."""
    mask_replace_prob: Fraction | None = None
    """Share of these that the mask token replaces (mlm)."""
    random_replace_prob: Fraction | None = None
    """Share of these that a random token replaces (mlm); the rest stay as they are."""

    @model_validator(mode="after")
    def _matches_name(self) -> "ObjectiveConfig":
        masking = {
            "mlm_probability": self.mlm_probability,
            "mask_replace_prob": self.mask_replace_prob,
            "random_replace_prob": self.random_replace_prob,
        }
        wrong = [key for key, value in masking.items() if (value is None) == (self.name == "mlm")]
        if wrong:
            verb = "is missing" if self.name == "mlm" else "has no meaning"
            raise ValueError(f"objective.{wrong[0]} {verb} for objective.name={self.name}")
        if self.name == "mlm" and (self.mask_replace_prob or 0.0) + (self.random_replace_prob or 0.0) > 1.0 + 1e-9:
            raise ValueError("objective.mask_replace_prob + objective.random_replace_prob is above 1")
        return self
