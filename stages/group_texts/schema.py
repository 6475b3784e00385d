"""Schema of the part of conf/data that group_texts reads."""

from typing import Annotated

from pydantic import Field, field_validator

from stages.core.config import Fraction, config_view

Weights = Annotated[dict[str, Fraction], Field(min_length=1)]


@config_view
class WeightedData:
    weights: Weights | None
    """Source to its share of the training tokens; null: every document once, in the order of the data."""

    @field_validator("weights")
    @classmethod
    def _check_sum(cls, weights: Weights | None) -> Weights | None:
        total = sum(weights.values()) if weights else 1.0
        if abs(total - 1.0) > 1e-9:
            raise ValueError(f"data.weights add up to {total:g}: they must add up to 1")
        return weights
