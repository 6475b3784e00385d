"""Which files a path names: local ones, those of a URL, of which format, and of which split."""

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
PATH_LIMIT = 1000  # characters of a path in a message
_NAMES = 20  # files that a log line names


def find_files(path: str) -> list[tuple[Any, str]]:
    """The readable files at `path` (a file, a directory or a URL), each with its file system, sorted by name.

    Raises:
        StageError: if there are none, or what is there cannot be read.
    """
    shown = printable(path, PATH_LIMIT)
    try:
        file_system, root = _file_system(path)
        # Over HTTP, what is refused is taken for absent unless strict, and isdir reads the whole file and takes one
        # with links in it for a directory.
        options = {"strict": True} if is_web(path) else {}
        if not file_system.exists(root, **options):
            files = []
        elif not (is_web(path) and format_of(root)) and file_system.isdir(root):
            files = _files_below(file_system, root)
        else:
            files = [root]
            _refuse_special(file_system, root)
            if not format_of(root):
                raise StageError(
                    f"data.path={shown}: unknown format; give it one of {', '.join(FORMATS)} (.gz, .zst may follow)"
                )
    except StageError:
        raise
    except Exception as error:
        if reason := describe_web(error):
            raise StageError(f"data.path={shown}: {reason}") from None
        if isinstance(error, OSError) and error.errno is not None:  # the system's
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


def _file_system(path: str) -> tuple[Any, str]:
    """The file system that `path` is on, and its name there."""
    if "://" not in path:  # whatever else fsspec would see in its name
        return fsspec.filesystem("file"), str(Path.cwd() / path)
    if is_web(path):
        from stages.download.web import client

        return tuple(fsspec.core.url_to_fs(path, get_client=client))
    return tuple(fsspec.core.url_to_fs(path))


def _files_below(file_system: Any, root: str) -> list[str]:
    """The files of a known format below the directory `root`; those that are left out are logged.

    Raises:
        StageError: if a directory there is a link, which DVC does not follow, or an entry is no file.
    """
    entries = _local_entries(root) if is_local(file_system) else file_system.find(root)
    found = sorted(file for file in entries if not _is_hidden(file.removeprefix(root)))
    if is_local(file_system):
        for file in found:
            _refuse_special(file_system, file)
            if Path(file).is_dir():
                raise StageError(
                    f"{printable(file, PATH_LIMIT)} is a link to a directory, which DVC does not track: copy the"
                    " directory there, or set data.path to it"
                )
    files = [file for file in found if format_of(file)]
    if len(files) < len(found):
        log.info("%s: %d files of other formats left out", printable(root, PATH_LIMIT), len(found) - len(files))
    texts = [file for file in files if format_of(file) == "text"]
    if len(texts) == len(files) or not texts:
        return files
    # README.md and LICENSE.txt of a data set are no records.
    names = ", ".join(printable(PurePosixPath(file).name, 60) for file in texts[:_NAMES])
    more = f" and {len(texts) - _NAMES} more" if len(texts) > _NAMES else ""
    log.info("%s: plain text beside data files left out: %s%s", printable(root, PATH_LIMIT), names, more)
    return [file for file in files if format_of(file) != "text"]


def _local_entries(root: str) -> Iterator[str]:
    """What is below `root` and no directory, links to directories included; hidden directories are not entered.

    Unlike fsspec's `find`, raises the system's error where a directory cannot be read.
    """

    def fail(error: OSError) -> None:
        raise error

    for directory, directories, files in os.walk(root, onerror=fail):
        links = [name for name in directories if Path(directory, name).is_symlink()]
        directories[:] = [name for name in directories if not name.startswith(".")]
        yield from (os.path.join(directory, name) for name in [*files, *links])  # noqa: PTH118 (ten times faster)


def is_local(file_system: Any) -> bool:
    """Whether `file_system` is that of this machine."""
    return "file" in file_system.protocol


def _refuse_special(file_system: Any, file: str) -> None:
    """Raise StageError if `file` is there, but no regular file: reading a FIFO waits for a writer."""
    local = Path(file)
    if is_local(file_system) and local.exists() and not local.is_file() and not local.is_dir():
        raise StageError(
            f"{printable(file, PATH_LIMIT)} is a FIFO, a socket or a device: put a file with its content in its place"
        )


def _refuse_unreadable(path: str) -> None:
    """Raise the system's own error where `path` cannot be looked at: fsspec takes that for an absent file."""
    local = Path(path)
    if os.path.lexists(local):
        local.stat()
        if local.is_dir():
            next(local.iterdir(), None)


def describe_web(error: BaseException) -> str:
    """Words for an error of the HTTP client; the empty string for all others."""
    if "aiohttp" not in sys.modules:  # whose import takes a while
        return ""
    from stages.download.web import describe

    return describe(error)


def format_of(file: str) -> str | None:
    """The format that the name of `file` says, compression aside."""
    name = _without_query(file)
    return FORMATS.get(PurePosixPath(name.stem).suffix if name.suffix in _COMPRESSIONS else name.suffix)


def compression_of(file: str) -> str | None:
    """The compression that the name of `file` says."""
    return _COMPRESSIONS.get(_without_query(file).suffix)


def _is_hidden(file: str) -> bool:
    """Whether the name of `file`, or of a directory that it is in, begins with a dot."""
    return any(step.startswith(".") for step in PurePosixPath(file).parts)


def _without_query(file: str) -> PurePosixPath:
    return PurePosixPath((file.split("?")[0] if is_web(file) else file).lower())


def own_split(name: str) -> str | None:
    """The split that a file or split called `name` is by its own account."""
    match = _OWN_SPLIT.match(PurePosixPath(name).name) or _OWN_SPLIT.fullmatch(PurePosixPath(name).parent.name)
    if match is None:
        return None
    word = match[1].lower()
    return word if word in ("train", "test") else "validation"
