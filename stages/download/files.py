"""Files at a path or URL, with their formats, compressions and splits."""

import logging
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
import fsspec.core

from stages.core.errors import StageError, printable

log = logging.getLogger(__name__)

FORMATS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text",
    ".md": "text",
}  # fmt: skip
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
_OWN_SPLIT = re.compile(r"(train|validation|valid|val|dev|test)(?![a-z])", re.IGNORECASE)
PATH_LIMIT = 1000  # maximum number of characters of a path in a message
_MAX_LISTED_FILES = 20  # in a log line


def find_files(path: str) -> list[tuple[Any, str]]:
    """Return the readable files at `path` (a file, a directory or a URL) with their file systems, sorted by name.

    Raises:
        StageError: if there are no readable files.
    """
    shown = printable(path, PATH_LIMIT)
    try:
        file_system, root = _open_file_system(path)
        # Over HTTP, `exists` returns False for a refused request unless strict, and `isdir` reads the whole file and
        # returns True if it contains links.
        options = {"strict": True} if is_web(path) else {}
        if not file_system.exists(root, **options):
            files = []
        elif not (is_web(path) and get_format(root)) and file_system.isdir(root):
            files = _list_data_files(file_system, root)
        else:
            files = [root]
            _refuse_special(file_system, root)
            if not get_format(root):
                raise StageError(
                    f"data.path={shown}: unknown format; its name must end in {', '.join(FORMATS)} (.gz, .zst may"
                    " follow)"
                )
    except StageError:
        raise
    except Exception as error:
        if reason := explain_web_error(error):
            raise StageError(f"data.path={shown}: {reason}") from None
        if isinstance(error, OSError) and error.errno is not None:  # of the operating system
            raise
        if isinstance(error, ImportError | OSError | ValueError):
            raise StageError(f"data.path={shown}: {printable(error)}") from None
        raise
    if not files and "://" in path:
        raise StageError(f"data.path={shown}: there is no such file")
    if not files:
        _refuse_unreadable(path)
        raise StageError(f"data.path={shown}: no such file, or a directory without {', '.join(FORMATS)} files")
    return [(file_system, file) for file in files]


def is_web(path: str) -> bool:
    return path.startswith(("http://", "https://"))


def _open_file_system(path: str) -> tuple[Any, str]:
    """Return the file system of `path`, and its name in that file system."""
    if "://" not in path:  # fsspec would give other characters in the name a meaning
        return fsspec.filesystem("file"), str(Path.cwd() / path)
    if is_web(path):
        from stages.download.web import create_client

        return tuple(fsspec.core.url_to_fs(path, get_client=create_client))
    return tuple(fsspec.core.url_to_fs(path))


def _list_data_files(file_system: Any, root: str) -> list[str]:
    """Return the files of a known format below the directory `root`; log the files that are left out.

    Raises:
        StageError: if an entry is a link to a directory, which DVC does not follow, or is not a regular file.
    """
    entries = _list_local_entries(root) if is_local(file_system) else file_system.find(root)
    found = sorted(file for file in entries if not _is_hidden(file.removeprefix(root)))
    if is_local(file_system):
        for file in found:
            _refuse_special(file_system, file)
            if Path(file).is_dir():
                raise StageError(
                    f"{printable(file, PATH_LIMIT)} is a link to a directory, which DVC does not track: copy the"
                    " directory there, or set data.path to it"
                )
    files = [file for file in found if get_format(file)]
    if len(files) < len(found):
        log.info("%s: %d files of other formats left out", printable(root, PATH_LIMIT), len(found) - len(files))
    texts = [file for file in files if get_format(file) == "text"]
    if len(texts) == len(files) or not texts:
        return files
    # In a directory of data files, README.md and LICENSE.txt are not records.
    names = ", ".join(printable(PurePosixPath(file).name, 60) for file in texts[:_MAX_LISTED_FILES])
    more = f" and {len(texts) - _MAX_LISTED_FILES} more" if len(texts) > _MAX_LISTED_FILES else ""
    log.info("%s: plain text next to data files left out: %s%s", printable(root, PATH_LIMIT), names, more)
    return [file for file in files if get_format(file) != "text"]


def _list_local_entries(root: str) -> Iterator[str]:
    """Yield the files and the links to directories below `root`, without entering hidden directories.

    Unlike fsspec's `find`, raise the system's error if a directory cannot be read.
    """

    def raise_error(error: OSError) -> None:
        raise error

    for directory, directories, files in os.walk(root, onerror=raise_error):
        links = [name for name in directories if Path(directory, name).is_symlink()]
        directories[:] = [name for name in directories if not name.startswith(".")]
        yield from (os.path.join(directory, name) for name in [*files, *links])  # noqa: PTH118 (ten times faster)


def is_local(file_system: Any) -> bool:
    """Return True if `file_system` is the local one."""
    return "file" in file_system.protocol


def _refuse_special(file_system: Any, file: str) -> None:
    """Raise StageError if `file` exists but is not a regular file: reading a FIFO would wait for a writer."""
    local = Path(file)
    if is_local(file_system) and local.exists() and not local.is_file() and not local.is_dir():
        raise StageError(
            f"{printable(file, PATH_LIMIT)} is a FIFO, a socket or a device: replace it by a file with its content"
        )


def _refuse_unreadable(path: str) -> None:
    """Raise the system's error if `path` cannot be accessed, which fsspec reports as an absent file."""
    local = Path(path)
    if os.path.lexists(local):
        local.stat()
        if local.is_dir():
            next(local.iterdir(), None)


def explain_web_error(error: BaseException) -> str:
    """Describe an error of the HTTP client, for a message; return the empty string for other errors."""
    if "aiohttp" not in sys.modules:  # slow to import
        return ""
    from stages.download.web import explain_client_error

    return explain_client_error(error)


def get_format(file: str) -> str | None:
    """Return the format that the suffix of `file` indicates, ignoring compression; None if it is unknown."""
    name = _strip_query(file)
    return FORMATS.get(PurePosixPath(name.stem).suffix if name.suffix in _COMPRESSIONS else name.suffix)


def get_compression(file: str) -> str | None:
    """Return the compression that the suffix of `file` indicates; None if it is not compressed."""
    return _COMPRESSIONS.get(_strip_query(file).suffix)


def _is_hidden(file: str) -> bool:
    """Return True if any component of the path `file` begins with a dot."""
    return any(step.startswith(".") for step in PurePosixPath(file).parts)


def _strip_query(file: str) -> PurePosixPath:
    """Return `file` in lower case, without the query of a URL."""
    return PurePosixPath((file.split("?")[0] if is_web(file) else file).lower())


def infer_split(name: str) -> str | None:
    """Return the split that `name`, of a file or a source's split, indicates; None if it indicates none."""
    match = _OWN_SPLIT.match(PurePosixPath(name).name) or _OWN_SPLIT.fullmatch(PurePosixPath(name).parent.name)
    if match is None:
        return None
    word = match[1].lower()
    return word if word in ("train", "test") else "validation"
