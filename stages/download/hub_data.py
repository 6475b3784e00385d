"""Records of the Hub's data sets, through `datasets`: each at one commit, whatever its branch does meanwhile."""

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from stages.core.artifacts import write_text
from stages.core.errors import StageError
from stages.download.files import own_split
from stages.download.records import Row
from stages.download.schema import HubData
from stages.hub.client import ANSWER_SECONDS, FAILURES, HubSilentError, explain, hub_unreachable, page_of
from stages.shell.cache import cache_directory

log = logging.getLogger(__name__)

COMMIT = re.compile(r"[0-9a-f]{40}")
_WAYS_ON = (
    "\n  Ways on: a network, or the data set in a file (data.name=files, data.path=FILE). What download wrote before"
    " stays in DVC's cache: `dvc repro` without --force takes it from there."
)


def resolve_commit(hub: HubData) -> str:
    """The commit that hub.revision is now, so that a branch that moves is seen in the ledger.

    Raises:
        StageError: if the Hub does not answer (but for a commit, of which there may be a copy in the cache), or has no
            such data set or revision.
    """
    from huggingface_hub import HfApi

    if Path(hub.id).exists():
        # The library would read that instead, at no revision.
        raise StageError(f"hub.id={hub.id} is a path here: set data.name=files and data.path={hub.id} to read it")
    if reason := hub_unreachable():
        if COMMIT.fullmatch(hub.revision):
            log.warning("the Hub cannot be reached (%s): only a copy in the cache can be read", reason)
            return hub.revision
        last = _last_seen(hub)
        pin = f"\n  {hub.revision} was commit {last} when it was last read here: hub.revision: {last}" if last else ""
        raise StageError(
            f"the data set {hub.id} cannot be read at revision {hub.revision}, the Hub cannot be reached:"
            f" {reason}{_WAYS_ON}{pin}"
        )
    try:
        commit = str(HfApi().dataset_info(hub.id, revision=hub.revision, timeout=ANSWER_SECONDS).sha)
    except FAILURES as error:
        raise StageError(
            f"the data set {hub.id} cannot be read at revision {hub.revision}: {_explain(error, hub)}"
        ) from None
    if not COMMIT.fullmatch(hub.revision):
        _notice_move(hub, commit)
    return commit


def read_hub(hub: HubData, commit: str, whole: bool) -> Iterator[Row]:
    """The rows of the data set's splits at `commit`, one split after the other.

    Args:
        whole: fetch all files, which are then in the cache for the next time; else records as they are asked for.
    """
    import datasets  # 2.5 s that only this source pays

    datasets.utils.logging.set_verbosity_error()
    # A directory for each commit: where the Hub fails, the library takes whatever revision it finds in its cache.
    cache = Path(datasets.config.HF_DATASETS_CACHE) / commit / (hub.config or "default")
    for name in hub.splits:
        try:
            rows = datasets.load_dataset(
                hub.id, hub.config, revision=commit, split=name, streaming=not whole, cache_dir=str(cache)
            )
            for index, value in enumerate(rows):
                yield Row(f"{hub.id}[{name}]:{index}", own_split(name), value)
        except (*FAILURES, RuntimeError, datasets.exceptions.DatasetsError) as error:
            reason: Exception = error
            if isinstance(error, datasets.exceptions.DatasetsError) and isinstance(error.__cause__, Exception):
                reason = error.__cause__  # "An error occurred while generating the dataset" says nothing
            if isinstance(reason, OSError) and reason.strerror:  # the system's: a full disk
                raise reason from None
            words = _explain(reason, hub)
            if not whole and _WAYS_ON in words:
                words += "\n  (max_records streams, which fills no cache; max_records: null fills one.)"
            raise StageError(
                f"the data set {hub.id} (revision {commit}, split {name}) could not be read: {words}"
            ) from None


def _explain(error: Exception, hub: HubData) -> str:
    if "scripts are no longer supported" in str(error):
        return (
            "it is a script, and code of others is never run. The Hub keeps a copy in Parquet of most such data sets:"
            " set hub.revision: refs/convert/parquet, or choose another data set"
        )
    silent = isinstance(error, HubSilentError | ConnectionError)  # the latter: offline, in the words of datasets
    return explain(error, page_of(hub.id, "datasets/")) + (_WAYS_ON if silent else "")


def _memory(hub: HubData) -> Path:
    """The file that holds the commit that a branch was last: DVC removes a stage's outs before it runs."""
    return cache_directory() / "branches" / quote(f"{hub.id}@{hub.revision}", safe="")


def _last_seen(hub: HubData) -> str:
    file = _memory(hub)
    return file.read_text(encoding="utf-8").strip() if file.is_file() else ""


def _notice_move(hub: HubData, commit: str) -> None:
    try:
        last = _last_seen(hub)
        write_text(_memory(hub), f"{commit}\n")
    except OSError as error:  # a cache that cannot be used changes no result
        log.warning("that %s is now %s cannot be kept in mind: %s", hub.revision, commit, error)
        return
    if last and last != commit:
        log.warning(
            "%s of %s moved from commit %s to %s since it was last read here", hub.revision, hub.id, last, commit
        )
