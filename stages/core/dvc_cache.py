"""Files and directories in DVC's cache, by their md5 sums."""

import hashlib
import json
from pathlib import Path
from typing import Any

_DIRECTORY = ".dir"  # suffix of the md5 of a directory


def is_directory_md5(md5: str) -> bool:
    """Return True if an md5 sum is that of a directory listing."""
    return md5.endswith(_DIRECTORY)


class DvcCache:
    """The local DVC cache of a repository."""

    def __init__(self, repo: Any) -> None:
        """
        Args:
            repo: a `dvc.repo.Repo`.
        """
        self._local = repo.cache.local

    def get_path(self, md5: str) -> Path:
        """Return the path of the file with this md5 sum in the cache; the file may not exist."""
        return Path(self._local.oid_to_path(md5))

    def list_files(self, md5: str) -> dict[str, str] | None:
        """Return the files of a directory, relative path to md5.

        None if `md5` is that of a file, or if the listing is not in the cache or is damaged there.
        """
        file = self.get_path(md5)
        if not is_directory_md5(md5) or not file.is_file():
            return None
        content = file.read_bytes()
        if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5.removesuffix(_DIRECTORY):
            return None
        return {entry["relpath"]: entry["md5"] for entry in json.loads(content)}
