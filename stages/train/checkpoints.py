"""Checkpoints of a training run, written atomically outside the workspace.

DVC deletes the outs of a stage before it runs. Checkpoints are therefore in the user's cache directory, under a
fingerprint of everything that determines the result, so that a run only resumes from its own checkpoints.
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

from stages.core.artifacts import compute_sha256, get_versions
from stages.core.errors import printable
from stages.shell.cache import get_cache_directory

log = logging.getLogger(__name__)

_MANIFEST_NAME = "manifest-{}.json"  # one per process that writes, by rank
_HASHES = TypeAdapter(dict[str, str])  # content of a manifest: file name to SHA-256
_CHECKPOINT_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
LIBRARIES = ("accelerate", "numpy", "peft", "torch", "transformers")


def compute_fingerprint(config: Any, inputs: Iterable[Path], code: Mapping[str, str]) -> str:
    """Hash everything that determines the result of a run, as its name: 32 hexadecimal digits.

    In addition to the arguments these are the versions of the libraries and of Python, and the type of the machine.

    Args:
        config: the configuration of the run, serializable as JSON.
        inputs: the input files; their names and contents count, not their directories.
        code: hash of each source file, by its name.
    """
    parts = {
        "config": config,
        "code": code,
        "inputs": [(file.name, compute_sha256(file)) for file in inputs],
        "versions": get_versions(*LIBRARIES),
        "machine": [platform.machine(), platform.python_version()],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


class Checkpoints:
    """Checkpoints of a run: directories `checkpoint-STEP` in `directory`. Only the newest `keep` are retained."""

    def __init__(self, directory: Path, keep: int) -> None:
        self.directory, self._keep = directory, keep

    def get_path(self, step: int) -> Path:
        """Return the directory for the checkpoint of `step`, which need not exist."""
        return self.directory / f"checkpoint-{step}"

    def list_steps(self) -> list[int]:
        """Return the steps of the checkpoints in the directory, in ascending order; ignore its other entries."""
        names = ((path, _CHECKPOINT_NAME.fullmatch(path.name)) for path in self.directory.glob("checkpoint-*"))
        return sorted(int(name[1]) for path, name in names if name and path.is_dir() and not path.is_symlink())

    def find_newest(self) -> int | None:
        """Return the step of the newest intact checkpoint, or None; remove newer ones that are damaged."""
        for step in reversed(self.list_steps()):
            damage = find_damage(self.get_path(step))
            if damage is None:
                return step
            log.warning("the checkpoint of step %d is damaged (%s) and ignored", step, damage)
            remove_path(self.get_path(step))
        return None

    def add_checkpoint(self, source: Path) -> None:
        """Add the checkpoint in the directory `source`, named `checkpoint-STEP`, through hard links where possible."""
        aside, target = self.directory / ".tmp", self.directory / source.name
        remove_path(aside)  # left by a run that was killed
        shutil.copytree(source, aside, copy_function=link_or_copy)
        remove_path(target)
        aside.rename(target)

    def remove_all(self) -> None:
        """Remove all checkpoints."""
        for step in self.list_steps():
            remove_path(self.get_path(step))

    @contextmanager
    def write_checkpoint(self, step: int, best: int | None, writer: int = 0) -> Iterator[Path]:
        """Write a checkpoint atomically.

        Yields a temporary directory. The block creates `checkpoint-STEP` in it, which is moved to its place at the end
        of the block, once all of it is on the disk. Old checkpoints are then removed.

        Args:
            best: step of a checkpoint to retain regardless of its age.
            writer: rank of this process, if several processes each write a part of the checkpoint.
        """
        aside = self.directory / ".tmp"
        remove_path(aside)  # left by a run that was killed
        aside.mkdir(parents=True)
        try:
            yield aside
            _write_manifest(aside / self.get_path(step).name, writer)
            remove_path(self.get_path(step))
            (aside / self.get_path(step).name).rename(self.get_path(step))
            _sync_to_disk(self.directory)
        finally:
            remove_path(aside)
        for old in self.list_steps()[: -self._keep]:
            if old != best:
                remove_path(self.get_path(old))


def link_or_copy(source: str, target: str) -> None:
    """Create `target` as a hard link to the file `source`, or as a copy on another file system.

    The files of a checkpoint are never changed, only removed, so that they can be linked.
    """
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def remove_path(path: Path) -> None:
    """Remove a directory, file or link; ignore errors, such as missing permissions."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _write_manifest(checkpoint: Path, writer: int) -> None:
    """Write the manifest with the hashes of a checkpoint's files, and flush all of the checkpoint to the disk."""
    manifest = checkpoint / _MANIFEST_NAME.format(writer)
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    hashes = {file.relative_to(checkpoint).as_posix(): compute_sha256(file) for file in files}
    manifest.write_text(json.dumps(hashes), encoding="utf-8")
    for path in (*files, manifest, checkpoint):
        _sync_to_disk(path)


def find_damage(checkpoint: Path) -> str | None:
    """Compare the files of a checkpoint with its manifests; describe the first problem, or return None."""
    try:
        hashes: dict[str, str] = {}
        for manifest in sorted({checkpoint / _MANIFEST_NAME.format(0), *checkpoint.glob(_MANIFEST_NAME.format("*"))}):
            hashes |= _HASHES.validate_json(manifest.read_bytes())
        if missing := [name for name in sorted(hashes) if not (checkpoint / name).is_file()]:
            return printable(f"{', '.join(missing)} missing")
        changed = [name for name, digest in sorted(hashes.items()) if compute_sha256(checkpoint / name) != digest]
    except ValidationError as error:
        return f"{manifest.name}: {error.errors()[0]['msg']}"
    except (OSError, ValueError) as error:
        return printable(error)
    if not hashes:
        return "its manifest names no file"
    return printable(f"{', '.join(changed)} changed") if changed else None


def _sync_to_disk(path: Path) -> None:
    """Flush a file, or the entries of a directory, to the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open directories
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def lock_checkpoint_directory(name: str) -> Iterator[Path]:
    """Lock the directory for the checkpoints of the run `name` (its fingerprint), and yield it.

    It is removed at the end of the block, but not after an exception. Queue workers that train the same config at the
    same time each get a separate directory.
    """
    root = get_cache_directory() / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    lock, directory = _lock_first_free_name(root, name)
    if not directory.is_dir():
        remove_path(directory)
    try:
        yield directory
        remove_path(directory)
    finally:
        lock.release()


def _lock_first_free_name(root: Path, name: str) -> tuple[FileLock, Path]:
    """Lock the first of `name`, `name-2`, `name-3`, ... that is not locked; return the lock and the path in `root`."""
    number = 1
    while True:
        candidate = name if number == 1 else f"{name}-{number}"
        lock = FileLock(root / f"{candidate}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            number += 1
        else:
            return lock, root / candidate
