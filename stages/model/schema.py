"""Schemas of conf/model, conf/adapter and the objective section of conf/task."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from stages.core.config import Fraction, Positive, config_section, config_view
from stages.core.errors import StageError, printable
from stages.core.pins import TrainedModel, check_pin

# Files that train writes if adapter.merge is false: the adapter's weights, and the config of its base model.
ADAPTER_WEIGHTS, BASE_MODEL_CONFIG = "adapter_model.safetensors", "base.json"


@config_view
class Model:
    """Settings of conf/model/NAME.yaml that baseline and train use."""

    task: Literal["causal", "mlm"]
    """Task of the architecture."""
    path: str | None
    """Hub repository or local directory; null: the model is built from `config`."""
    revision: str | None
    """Commit of the Hub repository."""
    files: dict[str, str] | None
    """File name to SHA-256 for a local directory, written by tools/pin_model."""
    from_: Annotated[TrainedModel | None, Field(alias="from")] = None
    """Model trained by a task of this repository, in an experiment or at a commit."""
    from_scratch: bool
    """If True, initialize the weights randomly, even if `path` has weights."""
    max_positions: Positive
    """Number of tokens that the model can attend to; checked against the model when it is built."""
    config: dict[str, Any]
    """Values that override the architecture's configuration."""

    @property
    def has_files(self) -> bool:
        """True if the configuration of the architecture is read from files and not only built from `config`."""
        return self.path is not None or self.from_ is not None

    @property
    def attention(self) -> str | None:
        """Attention implementation set in `config`; None: transformers' default."""
        return self.config.get("_attn_implementation")

    @model_validator(mode="after")
    def _check_source(self) -> "Model":
        check_pin("model", self)
        if self.has_files:
            return self
        if not self.from_scratch:
            raise ValueError("model.path is missing: a model that is not from_scratch needs one")
        if "model_type" not in self.config:
            raise ValueError("model.config.model_type is missing: a model without path needs its architecture's name")
        return self


def check_within_positions(key: str, num_tokens: int, positions: int | None) -> None:
    """Raise StageError if the value of `key` is above the number of positions of the model (None: unlimited)."""
    if positions is not None and num_tokens > positions:
        raise StageError(f"{key}={num_tokens} is above the model's positions, {positions}")


def check_task(model: Model, objective: str) -> None:
    """Raise ValueError if `model` is not for the task of `objective`."""
    if model.task != objective:
        raise ValueError(
            f"model.task={model.task}: this model cannot be trained with objective.name={objective}; choose another"
            " model for this task"
        )


@config_section
class Adapter:
    """Low-rank matrices added to the linear layers and trained instead of the weights (LoRA, arXiv 2106.09685)."""

    rank: Positive
    """Rank of an adapter's matrices."""
    alpha: Annotated[float, Field(gt=0.0)]
    """The output of an adapter is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)]
    """Dropout probability of an adapter's inputs in training."""
    targets: Annotated[list[str], Field(min_length=1)] | None
    """Suffixes of the names of layers that get an adapter; null: every linear layer except the output embedding."""
    merge: bool
    """If True, merge the adapter into the weights of the exported model; otherwise export only the adapter."""


@config_view
class ObjectiveName:
    name: Literal["causal", "mlm"]
    """causal: predict the next token; mlm: predict masked tokens."""


# Architectures for which tests prove that the documents in a block do not affect each other. (For the causal ones,
# transformers derives the mask from position_ids that restart; the others need a mask.)
ISOLATION_PROVEN = {"causal": ("gpt2", "gpt_neo", "gptj", "llama"), "mlm": ("bert", "modernbert", "roberta")}


def check_isolation(objective: "ObjectiveConfig", model_type: str | None) -> None:
    """Raise ValueError if `objective` isolates documents and no test proves that for the architecture."""
    if objective.isolate_documents and model_type not in (None, *ISOLATION_PROVEN[objective.name]):
        raise ValueError(
            f"objective.isolate_documents=true is not proven for {printable(model_type)} under {objective.name} (it is"
            f" for {', '.join(ISOLATION_PROVEN[objective.name])}): set isolate_documents: false in"
            f" conf/task/{objective.name}.yaml"
        )


@config_section
class ObjectiveConfig:
    name: Literal["causal", "mlm"]
    """causal: predict the next token; mlm: predict masked tokens."""
    isolate_documents: bool
    """If True, attention and positions restart at each document of a block."""
    mlm_probability: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Probability that a text token is chosen for prediction (mlm)."""
    mask_replace_prob: Fraction | None = None
    """Probability that a chosen token is replaced by the mask token (mlm)."""
    random_replace_prob: Fraction | None = None
    """Probability that a chosen token is replaced by a random token (mlm); the rest are unchanged."""

    @model_validator(mode="after")
    def _check_masking(self) -> "ObjectiveConfig":
        masking = {
            "mlm_probability": self.mlm_probability,
            "mask_replace_prob": self.mask_replace_prob,
            "random_replace_prob": self.random_replace_prob,
        }
        misplaced = [key for key, value in masking.items() if (value is None) == (self.name == "mlm")]
        if misplaced:
            verb = "is missing" if self.name == "mlm" else "has no meaning"
            raise ValueError(f"objective.{misplaced[0]} {verb} for objective.name={self.name}")
        if self.name == "mlm" and (self.mask_replace_prob or 0.0) + (self.random_replace_prob or 0.0) > 1.0 + 1e-9:
            raise ValueError("objective.mask_replace_prob + objective.random_replace_prob is above 1")
        return self
