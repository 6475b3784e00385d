"""Checkpoints of a training run: each whole or not there, outside the workspace, found again by what the run computes.

DVC deletes a stage's outs before it runs, so that what a killed run is to go on from stands in the user's cache
directory, under a fingerprint of all that decides the result: another run's checkpoint is never taken.
"""

import hashlib
import json
import logging
import os
import platform
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import TypeAdapter, ValidationError

from stages.core.artifacts import sha256, versions
from stages.core.errors import printable
from stages.shell.cache import cache_directory

log = logging.getLogger(__name__)

_MANIFEST = "manifest-{}.json"  # of each process that wrote
_HASHES = TypeAdapter(dict[str, str])  # content of a manifest: file name to hash
_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
LIBRARIES = ("accelerate", "numpy", "peft", "torch", "transformers")


def fingerprint(config: Any, inputs: Iterable[Path], code: Mapping[str, str]) -> str:
    """A name for the run of `config` (as JSON holds it) on the files `inputs`: of all that decides its result.

    That is these, the hashes of the code, the libraries' versions and the kind of machine.
    """
    known = {
        "config": config,
        "code": code,
        "inputs": [(file.name, sha256(file)) for file in inputs],
        "versions": versions(*LIBRARIES),
        "machine": [platform.machine(), platform.python_version()],
    }
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:32]


class Checkpoints:
    """The checkpoints of a run: directories `checkpoint-STEP` in `directory`, of which the newest `keep` stay."""

    def __init__(self, directory: Path, keep: int) -> None:
        self.directory, self._keep = directory, keep

    def path(self, step: int) -> Path:
        """Where the checkpoint of `step` stands, if it does."""
        return self.directory / f"checkpoint-{step}"

    def steps(self) -> list[int]:
        """The steps of the checkpoints there are, the newest last; other entries of the directory are left out."""
        names = ((path, _NAME.fullmatch(path.name)) for path in self.directory.glob("checkpoint-*"))
        return sorted(int(name[1]) for path, name in names if name and path.is_dir() and not path.is_symlink())

    def newest(self) -> int | None:
        """The step of the newest checkpoint whose files are all as they were written; damaged ones are removed."""
        for step in reversed(self.steps()):
            damage = find_damage(self.path(step))
            if damage is None:
                return step
            log.warning("the checkpoint of step %d is damaged (%s) and left out", step, damage)
            _remove(self.path(step))
        return None

    def clear(self) -> None:
        """Remove all checkpoints."""
        for step in self.steps():
            _remove(self.path(step))

    @contextmanager
    def writing(self, step: int, best: int | None, writer: int = 0) -> Iterator[Path]:
        """A directory in which to make a directory `checkpoint-STEP`, that takes its place when it is on the disk.

        Args:
            best: the step of a checkpoint that stays however old it is.
            writer: the number of the process that writes, where parts of several are put together.
        """
        aside = self.directory / ".tmp"
        _remove(aside)  # of a run that was killed
        aside.mkdir(parents=True)
        try:
            yield aside
            _seal(aside / self.path(step).name, writer)
            _remove(self.path(step))
            (aside / self.path(step).name).rename(self.path(step))
            _sync(self.directory)
        finally:
            _remove(aside)
        for old in self.steps()[: -self._keep]:
            if old != best:
                _remove(self.path(old))


def _remove(path: Path) -> None:
    """Remove a directory, or whatever else has its name, as far as this user may."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _seal(checkpoint: Path, writer: int) -> None:
    """Write the hashes of a checkpoint's files beside them, and wait until all of it is on the disk."""
    manifest = checkpoint / _MANIFEST.format(writer)
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    hashes = {file.relative_to(checkpoint).as_posix(): sha256(file) for file in files}
    manifest.write_text(json.dumps(hashes), encoding="utf-8")
    for path in (*files, manifest, checkpoint):
        _sync(path)


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint; None where nothing is."""
    try:
        hashes: dict[str, str] = {}
        for manifest in sorted({checkpoint / _MANIFEST.format(0), *checkpoint.glob(_MANIFEST.format("*"))}):
            hashes |= _HASHES.validate_json(manifest.read_bytes())
        if missing := [name for name in sorted(hashes) if not (checkpoint / name).is_file()]:
            return printable(f"{', '.join(missing)} missing")
        changed = [name for name, digest in sorted(hashes.items()) if sha256(checkpoint / name) != digest]
    except ValidationError as error:
        return f"{manifest.name}: {error.errors()[0]['msg']}"
    except (OSError, ValueError) as error:
        return printable(error)
    if not hashes:
        return "its manifest names no file"
    return printable(f"{', '.join(changed)} changed") if changed else None


def _sync(path: Path) -> None:
    """Wait until `path`, a file or the names in a directory, is on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no directories
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def checkpoint_directory(name: str) -> Iterator[Path]:
    """Where the checkpoints of the run called `name` (its fingerprint) stand; no other process uses it meanwhile.

    It vanishes when the block ends well. Queue workers may train the same at once: each has a place of its own.
    """
    root = cache_directory() / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    lock, place = _first_free(root, name)
    if not (root / place).is_dir():
        _remove(root / place)
    try:
        yield root / place
        _remove(root / place)
    finally:
        lock.release()


def _first_free(root: Path, name: str) -> tuple[FileLock, str]:
    number = 1
    while True:
        place = name if number == 1 else f"{name}-{number}"
        lock = FileLock(root / f"{place}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            number += 1
        else:
            return lock, place
