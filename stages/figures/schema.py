"""Schema of the sections evaluate and samples of conf/task."""

from typing import Annotated

from pydantic import AfterValidator, Field, ValidationInfo

from stages.core.config import Positive, Seed, config_section


def _check_once(names: list[str]) -> list[str]:
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"evaluate.texts names {', '.join(repeated)} more than once")
    return names


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$")]


@config_section
class Evaluate:
    context: Annotated[int, Field(ge=4)]
    """Tokens per window of bits_per_byte and pseudo_bits_per_byte."""
    max_documents: Positive | None
    """Maximum number of documents to evaluate, evenly spaced over the split; null: all."""
    texts: Annotated[list[Name], AfterValidator(_check_once)]
    """Sources of params.yaml that are also evaluated, with all their records, before and after training."""
    include_prompts: bool = False
    """If true, metrics of documents cover all text, prompts included; if false, only the text that counts."""


@config_section
class Samples:
    seed: Seed
    """Seed of the sampling (causal)."""
    max_new_tokens: Positive | None = None
    """Maximum number of tokens generated after a prompt (causal)."""
    temperature: Annotated[float, Field(gt=0.0)] | None = None
    """Sampling temperature (causal)."""
    top_k: Positive
    """Number of most likely tokens to sample from (causal) or to show (mlm)."""
    prompts: list[str]
    """Beginnings to complete (causal), or sentences with one {mask} (mlm)."""


def _check_prompts(samples: Samples, info: ValidationInfo) -> Samples:
    """Check that `samples` has the values and prompts that the field `objective`, declared before it, needs.

    Raises:
        ValueError: with one problem per line.
    """
    problems = []
    objective = info.data.get("objective")
    if objective is None:  # it has a problem of its own
        return samples
    if objective.name == "causal":
        missing = [key for key in ("max_new_tokens", "temperature") if getattr(samples, key) is None]
        problems += [f"samples.{key} is missing for objective.name=causal" for key in missing]
    else:
        wrong = [prompt for prompt in samples.prompts if prompt.count("{mask}") != 1]
        problems += [f"samples.prompts: {prompt!r} needs exactly one {{mask}}" for prompt in wrong]
    if problems:
        raise ValueError("\n".join(problems))
    return samples


TaskSamples = Annotated[Samples, AfterValidator(_check_prompts)]
"""Samples of a stage's config, checked against its objective."""
