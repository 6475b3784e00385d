"""Schemas of the sections of conf/task, conf/hardware and conf/framework that only train uses."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from stages.core.config import Positive, config_section
from stages.core.errors import printable


@config_section
class EarlyStopping:
    patience: Positive
    """Number of consecutive evaluations without improvement after which training stops."""
    threshold: Annotated[float, Field(ge=0.0)]
    """Minimum improvement that counts, in units of trainer.metric_for_best_model."""


@config_section
class KeepForBranches:
    """Checkpoints kept after training. A run continues from one if both share all steps until then."""

    every_steps: Positive | None
    """Steps between two kept checkpoints, in addition to the last step and the last one before the learning rate
    decays; null: only these two."""
    gigabytes: Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
    """Maximum size of all kept checkpoints; the least recently used ones are removed."""
    directory: str | None
    """Absolute path of the directory for them; null: `branches` in the cache directory."""

    @field_validator("directory")
    @classmethod
    def _check_directory(cls, directory: str | None) -> str | None:
        if directory is not None and not Path(directory).is_absolute():
            raise ValueError(
                f"checkpoints.keep_for_branches.directory={printable(directory)}: it should be an absolute path, since"
                " experiments run in directories of their own"
            )
        return directory


@config_section
class CheckpointSettings:
    """Settings of the checkpoints from which a killed training resumes. They do not change the result."""

    minutes: Annotated[float, Field(gt=0.0)]
    """Minutes between two checkpoints."""
    keep: Positive
    """Number of checkpoints to retain during a run, in addition to the best one if it is needed at the end."""
    keep_for_branches: KeepForBranches | None
    """Checkpoints kept after training, for runs with the same first steps (docs/branches.md); null: none."""


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
