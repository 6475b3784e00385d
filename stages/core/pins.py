"""Pins: what fixes the content of a checkpoint or a tokenizer.

A Hub revision, the hashes of local files, or the md5 sum by which DVC keeps a model that a task of this repository
trained.
"""

import shlex
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import Field

from stages.core.config import whole


@whole
class TrainedAt:
    """A model that a task trained in an experiment or at a commit of this repository, with its tokenizer."""

    rev: str
    """Name of the experiment, or commit. For people: what is read is decided by `md5`."""
    task: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
    """The task that trained it: `models/TASK`."""
    md5: Annotated[str, Field(pattern=r"^[0-9a-f]{32}\.dir$")] | None = None
    """Of `models/TASK` in dvc.lock there, as tools/pin_model writes it."""

    @property
    def place(self) -> str:
        """The model, for messages."""
        return f"models/{self.task} of {self.rev}"

    @property
    def pin_command(self) -> str:
        """What pins and fetches the model."""
        return f"python -m tools.pin_model models/{self.task} --rev {shlex.quote(self.rev)}"


class Pinned(Protocol):
    """A section of a configuration that names files and pins them."""

    path: str | None
    revision: str | None
    files: dict[str, str] | None
    from_: TrainedAt | None


def pinned_origin(source: Pinned) -> dict[str, Any] | None:
    """For a ledger, what `source` is pinned to, wherever its files stand; None: it names none."""
    if source.from_ is not None:
        return {"path": f"models/{source.from_.task}", "md5": source.from_.md5}
    if source.path is None:
        return None
    if source.revision is not None:
        return {"path": source.path, "revision": source.revision}
    return {"path": Path(source.path).name, "files": source.files}


def check_pin(where: str, source: Pinned) -> None:
    """Raise ValueError unless the files that `source` names are pinned in exactly one way."""
    if (trained := source.from_) is not None:
        for key in ("path", "revision", "files"):
            if getattr(source, key) is not None:
                raise ValueError(f"{where}.from and {where}.{key} are both set: set {key}: null")
        if trained.md5 is None:
            raise ValueError(f"{where}.from={trained.place} is not pinned: run {trained.pin_command}")
    elif source.path is not None and (source.revision is None) == (source.files is None):
        raise ValueError(
            f"{where}.path={source.path} is not pinned: a Hub repository needs `revision` (a commit),"
            f" a local directory `files` (run: python -m tools.pin_model DIRECTORY)"
        )
