"""What revisions' stages wrote: their locks, and files of their outs from DVC's cache.

DVC's own file system reads outs too, from remotes as well, at half a second a revision: too long for a table of many
experiments, so that it is asked only for what the cache lacks.
"""

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dvc.api import DVCFileSystem
from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc_data.index import DataIndexDirError

from stages.core.config import MISSING, find
from stages.core.dvc_cache import DvcCache, is_directory
from tools.compare import WORKSPACE
from tools.lock_history import load_mapping, read_lock, read_lock_at


class Outs:
    """Locks and outs of revisions, of which `workspace` is one."""

    def __init__(self, repo: Repo) -> None:
        self._cache = DvcCache(repo)
        self.read_lock = functools.cache(self._read_lock)
        self._list_files = functools.cache(self._cache.list_files)
        self._open_revision = functools.cache(lambda rev: DVCFileSystem(rev=None if rev == WORKSPACE else rev))

    def _read_lock(self, rev: str) -> dict[str, Any]:
        """What dvc.lock says of each stage; nothing where there is no lock or it cannot be read."""
        stages = load_mapping(read_lock() if rev == WORKSPACE else read_lock_at(rev)).get("stages")
        return stages if isinstance(stages, dict) else {}

    def read(self, rev: str, path: str) -> bytes | None:
        """The content of an out, or of a file in one; None where there is none, or no cache and no remote has it."""
        if rev == WORKSPACE and Path(path).is_file():
            return Path(path).read_bytes()
        out, md5 = next(((out, md5) for out, md5 in self._outs(rev) if f"{path}/".startswith(f"{out}/")), ("", ""))
        if out != path and (files := self._list_files(md5)) is not None:
            md5 = files.get(path.removeprefix(f"{out}/"), "")
        if not md5:
            return None
        if not is_directory(md5) and (file := self._cache.file(md5)).is_file():
            return file.read_bytes()
        try:
            content: bytes = self._open_revision(rev).read_bytes(path)
        except (OSError, DvcException, DataIndexDirError):
            return None
        return content

    def read_texts(self, rev: str, paths: Sequence[str]) -> Iterator[str | None]:
        """The text of each path; None as in `read`."""
        for path in paths:
            content = self.read(rev, path)
            yield None if content is None else content.decode()

    def stale_stages(self, rev: str, params: dict[str, Any]) -> set[str]:
        """Stages whose outs at a revision are not what its parameters and its other outs would give.

        An experiment that ran one task leaves the other's as they were.

        Args:
            params: of the revision, as `dvc exp show --json` has them: file to its data.
        """
        lock = self.read_lock(rev)
        made = dict(self._outs(rev))
        for path, md5 in list(made.items()):
            made |= {
                f"{path}/{name}": hashed for name, hashed in (self._list_files(md5) or {}).items() if path == "code"
            }
        makers = {out["path"]: name for name, stage in lock.items() for out in stage.get("outs", [])}
        stale = {
            name
            for name, stage in lock.items()
            if any(_differs(params, file, keys) for file, keys in stage.get("params", {}).items())
            or any(made.get(dep["path"], dep.get("md5")) != dep.get("md5") for dep in stage.get("deps", []))
        }
        while behind := {
            name
            for name, stage in lock.items()
            if name not in stale and any(makers.get(dep["path"]) in stale for dep in stage.get("deps", []))
        }:
            stale |= behind
        return stale

    def _outs(self, rev: str) -> Iterator[tuple[str, str]]:
        """Path and hash of each out of a revision."""
        for stage in self.read_lock(rev).values():
            yield from ((out["path"], out.get("md5", "")) for out in stage.get("outs", []))


def _differs(params: dict[str, Any], file: str, locked: dict[str, Any]) -> bool:
    """Whether a revision's `file` has other values than those that a stage was run with; False if it was not read."""
    values = (params.get(file) or {}).get("data")
    if values is None:
        return False
    return any(find(values, key) not in (value, MISSING) for key, value in locked.items())
