"""hub_data: data sets of the Hub."""

import os
import subprocess
import sys
import types
from typing import Any

import pytest
from data_helpers import REPOSITORY

from stages.config import HubData
from stages.errors import StageError
from stages.hub_data import read_hub


class _Datasets(types.ModuleType):
    """A data set of one revision, `abc`."""

    def __init__(self) -> None:
        super().__init__("datasets")
        self.utils = types.SimpleNamespace(logging=types.SimpleNamespace(set_verbosity_error=lambda: None))

    def load_dataset(self, path: str, name: str | None, revision: str, split: str, streaming: bool) -> list[Any]:
        if revision != "abc":
            raise ValueError("no such revision")
        return [{"name": name, "split": split, "n": number} for number in range(2)]


def test_read_hub_gives_the_splits_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", _Datasets())
    hub = HubData(id="o/n", config="c", revision="abc", splits=["train", "dev"])
    rows = list(read_hub(hub, "abc"))
    assert [(row.where, row.split) for row in rows] == [
        ("o/n[train]:0", "train"), ("o/n[train]:1", "train"),
        ("o/n[dev]:0", "validation"), ("o/n[dev]:1", "validation"),
    ]  # fmt: skip
    assert rows[3].value == {"name": "c", "split": "dev", "n": 1}


def test_read_hub_that_fails_names_data_set_and_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", _Datasets())
    hub = HubData(id="o/n", config=None, revision="main", splits=["train"])
    with pytest.raises(StageError, match=r"(?s)o/n \(revision main, split train\).*no such revision"):
        list(read_hub(hub, "main"))


@pytest.mark.parametrize("offline", ["1", "0"])
def test_resolve_commit_of_an_unreachable_hub_says_so_with_the_way_on(offline: str) -> None:
    code = (
        "from stages.config import HubData; from stages.hub_data import resolve_commit;"
        "resolve_commit(HubData(id='o/n', config=None, revision='main', splits=['train']))"
    )
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": offline}
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=REPOSITORY, check=False
    )
    for part in ("StageError", "o/n", "cannot be reached", "data.name=files"):
        assert part in ended.stderr
