"""Pins: what fixes the content of a checkpoint or a tokenizer, a Hub revision or the hashes of local files."""

from pathlib import Path
from typing import Any, Protocol


class Pinned(Protocol):
    """A section of a configuration that names files and pins them."""

    path: str | None
    revision: str | None
    files: dict[str, str] | None


def pinned_origin(source: Pinned) -> dict[str, Any] | None:
    """For a ledger, what `source` is pinned to: a Hub revision, or the hashes of local files, wherever they stand."""
    if source.path is None:
        return None
    if source.revision is not None:
        return {"path": source.path, "revision": source.revision}
    return {"path": Path(source.path).name, "files": source.files}


def check_pin(where: str, path: str, revision: str | None, files: dict[str, str] | None) -> None:
    """Raise ValueError unless `path` is pinned by exactly one of a revision and file hashes."""
    if (revision is None) == (files is None):
        raise ValueError(
            f"{where}.path={path} is not pinned: a Hub repository needs `revision` (a commit),"
            f" a local directory `files` (run: python -m tools.pin_model DIRECTORY)"
        )
