"""Records of data sets of the Hub, read with `datasets` at a fixed commit even if a branch moves meanwhile."""

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from stages.core.artifacts import write_text
from stages.core.errors import StageError
from stages.download.files import infer_split
from stages.download.records import Row
from stages.download.schema import HubData
from stages.hub.client import (
    FAILURES,
    REQUEST_TIMEOUT_SECONDS,
    HubTimeoutError,
    explain_hub_error,
    find_hub_problem,
    format_page_url,
)
from stages.shell.cache import get_cache_directory

log = logging.getLogger(__name__)

COMMIT = re.compile(r"[0-9a-f]{40}")
_OFFLINE_REMEDY = (
    "\n  Connect to a network, or read the data set from a file (data.name=files, data.path=FILE). Earlier outputs of"
    " download stay in DVC's cache: `dvc repro` without --force restores them."
)


def resolve_commit(hub: HubData) -> str:
    """Return the current commit of hub.revision. The ledger stores it, which shows that a branch has moved.

    Raises:
        StageError: if the Hub has no such data set or revision, or does not answer. If hub.revision is a commit, an
            unreachable Hub is only a warning, since the cache may have a copy.
    """
    from huggingface_hub import HfApi

    if Path(hub.id).exists():
        # The library would read the path instead, at no revision.
        raise StageError(f"hub.id={hub.id} is a local path: set data.name=files and data.path={hub.id} to read it")
    if reason := find_hub_problem():
        if COMMIT.fullmatch(hub.revision):
            log.warning("the Hub cannot be reached (%s): only a cached copy can be read", reason)
            return hub.revision
        last = _read_last_commit(hub)
        pin = f"\n  {hub.revision} was commit {last} when it was last read here: hub.revision: {last}" if last else ""
        raise StageError(
            f"the data set {hub.id} cannot be read at revision {hub.revision}, the Hub cannot be reached:"
            f" {reason}{_OFFLINE_REMEDY}{pin}"
        )
    try:
        commit = str(HfApi().dataset_info(hub.id, revision=hub.revision, timeout=REQUEST_TIMEOUT_SECONDS).sha)
    except FAILURES as error:
        raise StageError(
            f"the data set {hub.id} cannot be read at revision {hub.revision}: {_explain_error(error, hub)}"
        ) from None
    if not COMMIT.fullmatch(hub.revision):
        _record_commit(hub, commit)
    return commit


def read_hub(hub: HubData, commit: str, whole: bool) -> Iterator[Row]:
    """Yield the rows of the data set's splits at `commit`, one split after the other.

    Args:
        whole: if True, download all files into the cache first; otherwise stream the records.

    Raises:
        StageError: if the data set cannot be read.
    """
    import datasets  # takes 2.5 s to import, which only this source needs

    datasets.utils.logging.set_verbosity_error()
    # One cache directory per commit: if the Hub fails, the library uses any revision that it finds in its cache.
    cache = Path(datasets.config.HF_DATASETS_CACHE) / commit / (hub.config or "default")
    for name in hub.splits:
        try:
            rows = datasets.load_dataset(
                hub.id, hub.config, revision=commit, split=name, streaming=not whole, cache_dir=str(cache)
            )
            for index, value in enumerate(rows):
                yield Row(f"{hub.id}[{name}]:{index}", infer_split(name), value)
        except (*FAILURES, RuntimeError, datasets.exceptions.DatasetsError) as error:
            reason: Exception = error
            if isinstance(error, datasets.exceptions.DatasetsError) and isinstance(error.__cause__, Exception):
                reason = error.__cause__  # "An error occurred while generating the dataset" says nothing
            if isinstance(reason, OSError) and reason.strerror:  # of the operating system, for example a full disk
                raise reason from None
            words = _explain_error(reason, hub)
            if not whole and _OFFLINE_REMEDY in words:
                words += "\n  (With max_records, records are streamed and not cached; max_records: null caches them.)"
            raise StageError(
                f"the data set {hub.id} (revision {commit}, split {name}) could not be read: {words}"
            ) from None


def _explain_error(error: Exception, hub: HubData) -> str:
    if "scripts are no longer supported" in str(error):
        return (
            "it is a script, and remote code is never run. The Hub has a Parquet copy of most of these data sets: set"
            " hub.revision: refs/convert/parquet, or choose another data set"
        )
    silent = isinstance(error, HubTimeoutError | ConnectionError)  # datasets raises ConnectionError if offline
    return explain_hub_error(error, format_page_url(hub.id, "datasets/")) + (_OFFLINE_REMEDY if silent else "")


def _get_commit_file(hub: HubData) -> Path:
    """Return the file with the last commit of a branch. It is no out, because DVC removes a stage's outs first."""
    return get_cache_directory() / "branches" / quote(f"{hub.id}@{hub.revision}", safe="")


def _read_last_commit(hub: HubData) -> str:
    """Return the commit of the branch when it was last read, or the empty string."""
    file = _get_commit_file(hub)
    return file.read_text(encoding="utf-8").strip() if file.is_file() else ""


def _record_commit(hub: HubData, commit: str) -> None:
    """Save the commit of the branch, and warn if it has moved."""
    try:
        last = _read_last_commit(hub)
        write_text(_get_commit_file(hub), f"{commit}\n")
    except OSError as error:  # an unusable cache does not change the result
        log.warning("could not record that %s is now at %s: %s", hub.revision, commit, error)
        return
    if last and last != commit:
        log.warning(
            "%s of %s moved from commit %s to %s since it was last read here", hub.revision, hub.id, last, commit
        )
