"""Comparison of the entries of dvc.lock with those of a replay, and of the files that they describe."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from dvc.repo import Repo

from stages.core.config import MISSING, flatten_values
from stages.core.dvc_cache import DvcCache
from stages.core.errors import printable
from tools.keys import format_value
from tools.lock_history import Entry
from tools.verify.replay import HashedPath, hash_path, list_cached_files

# Of an item of `deps` or `outs`: where a remote has it, which is no property of its content.
_NOT_COMPARED = ("cloud", "files", "remote", "push")
_MAX_NAMES = 5  # listed files of a directory


class Difference(NamedTuple):
    """Difference between dvc.lock and a replay, or between dvc.lock and a file on this machine."""

    kind: str
    """`cmd`, `params`, `deps` or `outs`: a section of dvc.lock; `git`: a file of the commit; `copy`: a file of the
    workspace or of DVC's cache."""
    path: str
    description: str


class MetricChange(NamedTuple):
    """Number in a JSON file that differs between dvc.lock and a replay."""

    path: str
    key: str
    claimed: float
    replayed: float

    @property
    def relative(self) -> float:
        """Relative difference; infinite if one of the numbers is 0 or not finite."""
        scale = min(abs(self.claimed), abs(self.replayed))
        difference = abs(self.claimed - self.replayed)
        return difference / scale if scale and math.isfinite(difference) else math.inf


def compare_entries(claimed: Entry, replayed: Entry) -> Iterator[Difference]:
    """Yield each difference between two entries of dvc.lock: command, values, inputs and outputs."""
    if claimed.get("cmd") != replayed.get("cmd"):
        yield Difference("cmd", "", f"{printable(claimed.get('cmd'))} -> {printable(replayed.get('cmd'))}")
    old, new = ({(file, key): value for file, key, value in _list_params(entry)} for entry in (claimed, replayed))
    for file, key in dict.fromkeys([*old, *new]):
        before, after = old.get((file, key), MISSING), new.get((file, key), MISSING)
        if before != after:
            yield Difference("params", file, f"{printable(key)}: {_format_param(before)} -> {_format_param(after)}")
    for section in ("deps", "outs"):
        before, after = ({item["path"]: item for item in entry.get(section) or []} for entry in (claimed, replayed))
        for path in dict.fromkeys([*before, *after]):
            values = [_select_compared(items.get(path, {})) for items in (before, after)]
            if values[0] != values[1]:
                yield Difference(section, path, " -> ".join(map(_format_item, values)))


def _list_params(entry: Entry) -> Iterator[tuple[str, str, Any]]:
    for file, values in (entry.get("params") or {}).items():
        for key, value in values.items():
            yield file, key, value


def _format_param(value: Any) -> str:
    return "(not set)" if value is MISSING else printable(format_value(value))


def _select_compared(item: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in item.items() if key not in _NOT_COMPARED}


def _format_item(item: dict[str, Any]) -> str:
    """Return the hash of an item of `deps` or `outs`, and its size."""
    checksum = next((item[key] for key in ("md5", "etag", "checksum") if key in item), None)
    if checksum is None:
        return "(none)"
    return printable(f"{checksum}, {item['size']:,} bytes" if isinstance(item.get("size"), int) else checksum)


def describe_file_changes(old: dict[str, str], new: dict[str, str]) -> str:
    """Describe which files of a directory differ between two listings, relative path to md5."""
    kinds = {
        "changed": [name for name in new if name in old and new[name] != old[name]],
        "new": [name for name in new if name not in old],
        "missing": [name for name in old if name not in new],
    }
    parts = []
    for kind, names in kinds.items():
        if names:
            more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
            parts.append(f"{', '.join(map(printable, sorted(names)[:_MAX_NAMES]))}{more} {kind}")
    return "; ".join(parts)


# -- numbers -----------------------------------------------------------------------------------------------------------


def compare_numbers(path: str, old: bytes, new: bytes) -> Iterator[MetricChange]:
    """Yield the numbers that differ between two versions of a JSON file; none if one is not JSON."""
    try:
        before, after = (dict(flatten_values(json.loads(text))) for text in (old, new))
    except (ValueError, AttributeError, RecursionError):
        return
    for key, value in before.items():
        other = after.get(key)
        if _is_number(value) and _is_number(other) and value != other:
            yield MetricChange(path, key, float(value), float(other))


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def find_metric_changes(
    cache: DvcCache, path: str, md5: str, replayed: Path, hashed: HashedPath
) -> Iterator[MetricChange]:
    """Yield the numbers that differ in the JSON files of an out, as far as DVC's cache has the old files.

    Args:
        md5: md5 sum of the out in dvc.lock.
        replayed: the out of the replay.
        hashed: its hashes.
    """
    for name, old in (list_cached_files(cache, md5) or {}).items():
        file, here = cache.get_path(old), replayed / name
        changed = hashed.files.get(name) not in (None, old)
        if changed and here.suffix == ".json" and file.is_file():
            yield from compare_numbers(f"{path}/{name}" if name else path, file.read_bytes(), here.read_bytes())


# -- copies on this machine --------------------------------------------------------------------------------------------


def check_copies(repo: Repo, claimed: Entry, in_workspace: Entry) -> Iterator[Difference]:
    """Yield the outs on this machine that are not what dvc.lock says, in DVC's cache and in the workspace.

    Files of the workspace are compared if its own dvc.lock claims the same as that of the commit. Missing files are no
    difference.

    Args:
        claimed: entry of a stage at the commit.
        in_workspace: its entry in the workspace's dvc.lock.
    """
    cache = DvcCache(repo)
    current = {item["path"]: item.get("md5") for item in in_workspace.get("outs") or []}
    for item in claimed.get("outs") or []:
        path, md5 = str(item["path"]), str(item.get("md5", ""))
        if not md5:
            continue
        files = list_cached_files(cache, md5) or {}
        for name, file_md5 in {"": md5, **files}.items():
            file = cache.get_path(file_md5)
            if file.is_file() and hash_path(repo, file).md5 != file_md5.removesuffix(".dir"):
                where = f"{printable(name)}: " if name else ""
                yield Difference("copy", path, f"{where}its file in DVC's cache is damaged ({file.name})")
        here = Path(repo.root_dir, path)
        if current.get(path) == md5 and here.exists() and (found := hash_path(repo, here)).md5 != md5:
            changed = describe_file_changes(files, found.files) if found.files.keys() != {""} and files else ""
            yield Difference("copy", path, f"its copy in the workspace is not that of dvc.lock: {changed or found.md5}")
