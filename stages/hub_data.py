"""Records of the Hub's data sets, through `datasets`."""

from collections.abc import Iterator
from pathlib import Path

from stages.config import HubData
from stages.errors import StageError
from stages.pretrained import CONNECT_SECONDS, hub_unreachable
from stages.sources import Row, own_split


def resolve_commit(hub: HubData) -> str:
    """The commit that hub.revision is now, so that a branch that moves is seen in the ledger.

    Raises:
        StageError: if the Hub does not answer, or has no such data set or revision.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    if Path(hub.id).exists():
        # The library would read that instead, at no revision.
        raise StageError(f"hub.id={hub.id} is a path here: set data.name=files and data.path={hub.id} to read it")
    ways_on = "\n  Ways on: a network, or the data set in a file (data.name=files, data.path=FILE)."
    if reason := hub_unreachable():
        raise StageError(f"the data set {hub.id} cannot be read, the Hub cannot be reached: {reason}{ways_on}")
    try:
        return str(HfApi().dataset_info(hub.id, revision=hub.revision, timeout=CONNECT_SECONDS).sha)
    except (HfHubHTTPError, OSError, ValueError) as error:  # ValueError: no name that a data set can have
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise StageError(
            f"the Hub has no data set {hub.id} at revision {hub.revision}: {first_line}{ways_on}"
        ) from None


def read_hub(hub: HubData, commit: str) -> Iterator[Row]:
    import datasets  # 2.5 s that only this source pays

    datasets.utils.logging.set_verbosity_error()
    for name in hub.splits:
        try:
            rows = datasets.load_dataset(hub.id, hub.config, revision=commit, split=name, streaming=True)
            for index, value in enumerate(rows):
                yield Row(f"{hub.id}[{name}]:{index}", own_split(name), value)
        except (OSError, ValueError, RuntimeError) as error:
            raise StageError(
                f"the data set {hub.id} (revision {commit}, split {name}) could not be read: {error}"
            ) from None
