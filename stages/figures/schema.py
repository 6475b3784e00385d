"""Schema of the sections evaluate and samples of conf/task."""

from typing import Annotated

from pydantic import AfterValidator, Field

from stages.core.config import Positive, Seed, whole


def _check_once(names: list[str]) -> list[str]:
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"evaluate.texts names {', '.join(repeated)} more than once")
    return names


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$")]


@whole
class Evaluate:
    context: Annotated[int, Field(ge=4)]
    """Tokens in a window of bits_per_byte and pseudo_bits_per_byte."""
    max_documents: Positive | None
    """Documents evaluated, evenly spaced over the split; null: all."""
    texts: Annotated[list[Name], AfterValidator(_check_once)]
    """Sources of params.yaml, all of whose records are evaluated as well, before and after training."""
    include_prompts: bool = False
    """Metrics of documents are over all text, prompts included; false: over the text that counts."""


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


def check_prompts(samples: Samples, objective: str) -> None:
    """Raise ValueError unless `samples` says what a model of this objective needs."""
    problems = []
    if objective == "causal":
        missing = [key for key in ("max_new_tokens", "temperature") if getattr(samples, key) is None]
        problems += [f"samples.{key} is missing for objective.name=causal" for key in missing]
    else:
        wrong = [prompt for prompt in samples.prompts if prompt.count("{mask}") != 1]
        problems += [f"samples.prompts: {prompt!r} needs exactly one {{mask}}" for prompt in wrong]
    if problems:
        raise ValueError("\n".join(problems))
