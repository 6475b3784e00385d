"""Schemas of the sections of conf/task, conf/hardware and conf/framework that only train uses."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from stages.core.config import Positive, config_section


@config_section
class EarlyStopping:
    patience: Positive
    """Number of consecutive evaluations without improvement after which training stops."""
    threshold: Annotated[float, Field(ge=0.0)]
    """Minimum improvement that counts, in units of trainer.metric_for_best_model."""


@config_section
class CheckpointSettings:
    """Settings of the checkpoints from which a killed training resumes. They do not change the result."""

    minutes: Annotated[float, Field(gt=0.0)]
    """Minutes between two checkpoints."""
    keep: Positive
    """Number of checkpoints to retain during a run, in addition to the best one if it is needed at the end."""


@config_section
class Framework:
    name: Literal["trainer", "keras"]
    """trainer: transformers' Trainer, on torch; keras: `fit` of a Keras model built from KerasHub's layers."""
    backend: Literal["jax", "tensorflow"] | None
    """Backend of Keras; null for the Trainer."""

    @model_validator(mode="after")
    def _check_backend(self) -> "Framework":
        if (self.backend is None) == (self.name == "keras"):
            verb = "is missing" if self.name == "keras" else "has no meaning"
            raise ValueError(f"framework.backend {verb} for framework={self.name}")
        return self
