"""Schema of the evaluate section of conf/task."""

from typing import Annotated

from pydantic import AfterValidator, Field

from stages.core.config import Positive, whole


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
