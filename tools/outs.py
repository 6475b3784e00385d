"""Outputs of stages at a revision: its dvc.lock, and the content of its outs from DVC's cache.

DVCFileSystem also reads outs, including those in remotes, but takes half a second per revision. That is too slow for a
table of many experiments, so it is only used for files that the cache lacks.
"""

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dvc.api import DVCFileSystem
from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc_data.index import DataIndexDirError

from stages.core.config import MISSING, find_value
from stages.core.dvc_cache import DvcCache, is_directory_md5
from tools.compare import WORKSPACE
from tools.lock_history import parse_mapping, read_lock, read_lock_at


class Outs:
    """Reads dvc.lock and outs of revisions; the revision `workspace` is the working tree."""

    def __init__(self, repo: Repo) -> None:
        self._cache = DvcCache(repo)
        self.read_lock = functools.cache(self._read_lock)
        self._list_files = functools.cache(self._cache.list_files)
        self._open_revision = functools.cache(lambda rev: DVCFileSystem(rev=None if rev == WORKSPACE else rev))

    def _read_lock(self, rev: str) -> dict[str, Any]:
        """Return the entries of dvc.lock by stage; empty if there is no lock or it cannot be parsed."""
        stages = parse_mapping(read_lock() if rev == WORKSPACE else read_lock_at(rev)).get("stages")
        return stages if isinstance(stages, dict) else {}

    def read_out(self, rev: str, path: str) -> bytes | None:
        """Read an out, or a file inside one; None if it does not exist or neither a cache nor a remote has it."""
        if rev == WORKSPACE and Path(path).is_file():
            return Path(path).read_bytes()
        out, md5 = next(((out, md5) for out, md5 in self._list_outs(rev) if f"{path}/".startswith(f"{out}/")), ("", ""))
        if out != path and (files := self._list_files(md5)) is not None:
            md5 = files.get(path.removeprefix(f"{out}/"), "")
        if not md5:
            return None
        if not is_directory_md5(md5) and (file := self._cache.get_path(md5)).is_file():
            return file.read_bytes()
        try:
            content: bytes = self._open_revision(rev).read_bytes(path)
        except (OSError, DvcException, DataIndexDirError):
            return None
        return content

    def read_texts(self, rev: str, paths: Sequence[str]) -> Iterator[str | None]:
        """Yield the text of each path; None as in `read_out`."""
        for path in paths:
            content = self.read_out(rev, path)
            yield None if content is None else content.decode()

    def find_stale_stages(self, rev: str, params: dict[str, Any]) -> set[str]:
        """Return the stages whose outs at a revision do not match its parameters and its other outs.

        This happens in an experiment that only ran one task: the outs of the other tasks stay as they were.

        Args:
            params: params files of the revision with their data, as in `dvc exp show --json`.
        """
        lock = self.read_lock(rev)
        out_hashes = dict(self._list_outs(rev))
        for path, md5 in list(out_hashes.items()):
            # Stages depend on the files in code/, which is a single out.
            out_hashes |= {
                f"{path}/{name}": file_md5 for name, file_md5 in (self._list_files(md5) or {}).items() if path == "code"
            }
        writers = {out["path"]: name for name, stage in lock.items() for out in stage.get("outs", [])}
        stale = {
            name
            for name, stage in lock.items()
            if any(_has_other_values(params, file, keys) for file, keys in stage.get("params", {}).items())
            or any(out_hashes.get(dep["path"], dep.get("md5")) != dep.get("md5") for dep in stage.get("deps", []))
        }
        while downstream := {
            name
            for name, stage in lock.items()
            if name not in stale and any(writers.get(dep["path"]) in stale for dep in stage.get("deps", []))
        }:
            stale |= downstream
        return stale

    def _list_outs(self, rev: str) -> Iterator[tuple[str, str]]:
        """Yield path and hash of each out of a revision."""
        for stage in self.read_lock(rev).values():
            yield from ((out["path"], out.get("md5", "")) for out in stage.get("outs", []))


def _has_other_values(params: dict[str, Any], file: str, locked: dict[str, Any]) -> bool:
    """Return True if a value in `file` differs from the `locked` one; False if the file was not read."""
    values = (params.get(file) or {}).get("data")
    if values is None:
        return False
    return any(find_value(values, key) not in (value, MISSING) for key, value in locked.items())
