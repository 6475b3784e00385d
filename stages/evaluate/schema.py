"""Schema of the samples section of conf/task."""

from typing import Annotated

from pydantic import Field

from stages.core.config import Positive, Seed, whole


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
