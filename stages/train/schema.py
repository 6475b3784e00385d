"""Schemas of what train alone reads of conf/task and conf/hardware."""

from typing import Annotated

from pydantic import Field

from stages.core.config import Positive, whole


@whole
class EarlyStopping:
    patience: Positive
    """Evaluations without improvement before training stops."""
    threshold: Annotated[float, Field(ge=0.0)]
    """Improvement that counts, in units of trainer.metric_for_best_model."""


@whole
class CheckpointSettings:
    """What a killed training goes on from; changes no result."""

    minutes: Annotated[float, Field(gt=0.0)]
    """Between two checkpoints."""
    keep: Positive
    """Checkpoints kept of a run that is not finished; the best one stays as well where it is asked for."""
