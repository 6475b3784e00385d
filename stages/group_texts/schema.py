"""Schema of what group_texts reads of conf/data."""

from typing import Annotated

from pydantic import Field, field_validator

from stages.core.config import Fraction, part

Weights = Annotated[dict[str, Fraction], Field(min_length=1)]


@part
class WeightedData:
    weights: Weights | None
    """Source to its share of the training tokens; null: every document once, in its order."""

    @field_validator("weights")
    @classmethod
    def _adds_up(cls, weights: Weights | None) -> Weights | None:
        total = sum(weights.values()) if weights else 1.0
        if abs(total - 1.0) > 1e-9:
            raise ValueError(f"data.weights add up to {total:g}: they must add up to 1")
        return weights
