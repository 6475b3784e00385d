"""The schema of conf/task."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from stages.config import Fraction, Positive, Seed, part, whole


@whole
class Tokenize:
    wrap: Literal["end_of_sequence", "template"]
    """end_of_sequence: before the first and after every document; template: the tokenizer's own special tokens."""
    requires: list[Literal["eos_token", "mask_token"]]
    """Special tokens without which the task cannot be trained."""


@part
class ObjectiveName:
    name: Literal["causal", "mlm"]
    """causal: predict the next token; mlm: predict masked ones."""


# Architectures for which tests prove that documents of a block do not reach each other. (transformers' masks follow
# reset position_ids in the causal ones; the others need a mask of their own.)
ISOLATION_PROVEN = {"causal": ("gpt2", "gpt_neo", "gptj", "llama"), "mlm": ("bert", "modernbert", "roberta")}


def check_isolation(objective: "Objective", model_type: str | None) -> None:
    """Raise ValueError if documents are to be isolated in an architecture for which that is not proven."""
    if objective.isolate_documents and model_type not in (None, *ISOLATION_PROVEN[objective.name]):
        raise ValueError(
            f"objective.isolate_documents=true is not proven for {model_type} under {objective.name} (it is for"
            f" {', '.join(ISOLATION_PROVEN[objective.name])}): set isolate_documents: false in"
            f" conf/task/{objective.name}.yaml"
        )


@whole
class Objective:
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
    def _matches_name(self) -> "Objective":
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


@whole
class Evaluate:
    context: Annotated[int, Field(ge=4)]
    """Tokens in a window of bits_per_byte and pseudo_bits_per_byte."""
    max_documents: Positive | None
    """Documents evaluated, evenly spaced over the split; null: all."""


@whole
class Samples:
    seed: Seed
    """Of the sampling (causal)."""
    max_new_tokens: Positive | None = None
    """Tokens generated after a prompt (causal)."""
    temperature: Annotated[float, Field(gt=0.0)] | None = None
    """Sampling temperature (causal)."""
    top_k: Positive
    """causal: sampled from this many most likely tokens; mlm: this many tokens are shown."""
    prompts: list[str]
    """causal: beginnings to complete; mlm: sentences with one {mask}."""


@whole
class EarlyStopping:
    patience: Positive
    """Evaluations without improvement before training stops."""
    threshold: Annotated[float, Field(ge=0.0)]
    """Improvement that counts, in units of trainer.metric_for_best_model."""
