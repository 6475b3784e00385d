"""Pins, which fix the content of a checkpoint or a tokenizer.

A pin is a Hub revision, the hashes of local files, or the md5 sum in DVC's cache of a model that a task of this
repository trained.
"""

import shlex
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import Field

from stages.core.config import config_section


@config_section
class TrainedModel:
    """A model that a task trained in an experiment or at a commit of this repository, with its tokenizer."""

    rev: str
    """Name of the experiment, or commit. For information only: the files are found by `md5`."""
    task: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
    """The task that trained it: `models/TASK`."""
    md5: Annotated[str, Field(pattern=r"^[0-9a-f]{32}\.dir$")] | None = None
    """The md5 sum of `models/TASK` in dvc.lock of that revision; tools.pin_model writes it."""

    @property
    def description(self) -> str:
        """Name of the model in messages."""
        return f"models/{self.task} of {self.rev}"

    @property
    def pin_command(self) -> str:
        """Command that pins and fetches the model."""
        return f"python -m tools.pin_model models/{self.task} --rev {shlex.quote(self.rev)}"


class PinnedSource(Protocol):
    """A section of a configuration that names files and pins them."""

    path: str | None
    revision: str | None
    files: dict[str, str] | None
    from_: TrainedModel | None


def get_pin(source: PinnedSource) -> dict[str, Any] | None:
    """Return the pin of `source` for a ledger, without local directories; None if it names no files."""
    if source.from_ is not None:
        return {"path": f"models/{source.from_.task}", "md5": source.from_.md5}
    if source.path is None:
        return None
    if source.revision is not None:
        return {"path": source.path, "revision": source.revision}
    return {"path": Path(source.path).name, "files": source.files}


def check_pin(section: str, source: PinnedSource) -> None:
    """Check that the files that `source` names are pinned in exactly one way.

    Args:
        section: dotted key of `source`, for the message.

    Raises:
        ValueError: if they are not pinned, or in several ways.
    """
    if (trained := source.from_) is not None:
        for key in ("path", "revision", "files"):
            if getattr(source, key) is not None:
                raise ValueError(f"{section}.from and {section}.{key} are both set: set {key}: null")
        if trained.md5 is None:
            raise ValueError(f"{section}.from={trained.description} is not pinned: run {trained.pin_command}")
    elif source.path is not None and (source.revision is None) == (source.files is None):
        raise ValueError(
            f"{section}.path={source.path} is not pinned: a Hub repository needs `revision` (a commit),"
            f" a local directory `files` (run: python -m tools.pin_model DIRECTORY)"
        )
