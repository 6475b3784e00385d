"""Schema of the evaluate section of conf/task."""

from typing import Annotated

from pydantic import Field

from stages.core.config import Positive, whole


@whole
class Evaluate:
    context: Annotated[int, Field(ge=4)]
    """Tokens in a window of bits_per_byte and pseudo_bits_per_byte."""
    max_documents: Positive | None
    """Documents evaluated, evenly spaced over the split; null: all."""
