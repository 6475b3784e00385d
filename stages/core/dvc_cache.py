"""Files and directories in DVC's cache, by their md5 sums."""

import json
from pathlib import Path
from typing import Any

_DIRECTORY = ".dir"  # how the md5 of a directory ends


def is_directory(md5: str) -> bool:
    """Whether an md5 sum is that of a directory's listing."""
    return md5.endswith(_DIRECTORY)


class DvcCache:
    """DVC's cache of a repository on this machine."""

    def __init__(self, repo: Any) -> None:
        """
        Args:
            repo: a `dvc.repo.Repo`.
        """
        self._local = repo.cache.local

    def file(self, md5: str) -> Path:
        """Where the cache keeps `md5`, if it has it."""
        return Path(self._local.oid_to_path(md5))

    def list_files(self, md5: str) -> dict[str, str] | None:
        """Relative path to md5 of the files of a directory; None for one that the cache does not have, or a file."""
        file = self.file(md5)
        if not is_directory(md5) or not file.is_file():
            return None
        return {entry["relpath"]: entry["md5"] for entry in json.loads(file.read_bytes())}
