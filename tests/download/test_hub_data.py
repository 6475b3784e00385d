"""hub_data: data sets of the Hub over real HTTP, with each client in a separate process."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from data_helpers import read_contents
from hub_cases import (
    COMMIT,
    DATA,
    LIMIT_SECONDS,
    OTHER,
    REPOSITORIES,
    Case,
    Client,
    encode_parquet,
    make_records,
    run_case,
)
from mini_hub import MiniHub

from stages.download.hub_data import read_hub
from stages.download.schema import HubData

FAST = (
    "branch",
    "server gone, warm cache, all records",
)  # the fast cases among those that succeed, which import datasets
SILENT = ("hangs", "for ever")


def mark_slow(case: Case) -> Any:
    slow = any(word in case.name for word in SILENT) if case.words else case.name not in FAST
    return pytest.param(case, marks=pytest.mark.slow if slow else (), id=case.name)


@pytest.mark.parametrize("case", [mark_slow(case) for case in DATA])
def test_hub_data_in_every_case_is_read_or_fails_with_a_remedy(case: Case, tmp_path: Path) -> None:
    found = run_case(case, "data", tmp_path)
    assert found.failed == bool(case.words), found.said
    for words in (*case.words, *case.notes, *((f"the data set {case.repository}",) if case.words else ())):
        assert words in found.said
    assert "Traceback" not in found.said
    assert (tmp_path / "raw").is_dir() == (not found.failed or case.warm)
    if found.failed:
        assert found.seconds < LIMIT_SECONDS


@pytest.mark.slow
def test_hub_data_streamed_downloaded_or_cached_is_the_same(tmp_path: Path) -> None:
    found = []
    with MiniHub(REPOSITORIES).serve() as url:
        for place, number in (("part", 200), ("whole", None)):
            client = Client(tmp_path / place, url)
            done = client.download("o/n", COMMIT, number)
            assert done.returncode == 0, done.stderr
            found.append(read_contents(client.place / "raw"))
    assert client.download("o/n", COMMIT, None).returncode == 0  # the server is gone
    found.append(read_contents(client.place / "raw"))
    assert found[0] == found[1] == found[2]
    assert json.loads(found[0]["stats.json"])["records_in"] == 200


@pytest.mark.slow
def test_hub_data_of_the_first_records_does_not_fetch_the_other_files(tmp_path: Path) -> None:
    files = {f"data/train-{i:05d}-of-00003.parquet": encode_parquet(make_records()) for i in range(3)}
    hub = MiniHub({"datasets/o/n": {COMMIT: files}})
    with hub.serve() as url:
        assert Client(tmp_path, url).download().returncode == 0
    fetched = {path for path in hub.requests if path.endswith(".parquet")}
    assert {path[-len("00000-of-00003.parquet") :] for path in fetched} == {"00000-of-00003.parquet"}


@pytest.mark.slow
def test_hub_data_of_a_branch_that_moved_warns_once_and_is_in_the_ledger(tmp_path: Path) -> None:
    files: Any = {"data/train.parquet": encode_parquet(make_records())}
    hub = MiniHub({"datasets/o/n": {COMMIT: files, OTHER: files}}, branches={"main": COMMIT})
    said, commits = [], []
    with hub.serve() as url:
        client = Client(tmp_path, url)
        for commit in (COMMIT, COMMIT, OTHER, OTHER):
            hub.branches["main"] = commit
            said.append(f"main of o/n moved from commit {COMMIT} to {OTHER}" in client.download("o/n", "main").stderr)
            commits.append(json.loads((tmp_path / "raw/stats.json").read_text())["source"]["commit"])
    assert said == [False, False, True, False]
    assert commits == [COMMIT, COMMIT, OTHER, OTHER]
    error = client.download("o/n", "main").stderr  # the server is gone
    assert f"main was commit {OTHER} when it was last read here" in error


@pytest.mark.slow
def test_hub_data_of_another_commit_in_the_cache_is_not_used(tmp_path: Path) -> None:
    with MiniHub(REPOSITORIES).serve() as url:
        client = Client(tmp_path, url)
        assert client.download("o/n", COMMIT, None).returncode == 0
    assert "could not be read" in client.download("o/n", OTHER, None).stderr


class _FakeDatasets(types.ModuleType):
    """Replacement of the library: a data set with the arguments of load_dataset in every record."""

    def __init__(self) -> None:
        super().__init__("datasets")
        self.utils = types.SimpleNamespace(logging=types.SimpleNamespace(set_verbosity_error=lambda: None))
        self.config = types.SimpleNamespace(HF_DATASETS_CACHE="cache")
        self.exceptions = types.SimpleNamespace(DatasetsError=Exception)

    def load_dataset(self, path: str, name: str | None, split: str, **rest: Any) -> list[Any]:
        return [{"name": name, "split": split, **rest} for _ in range(2)]


def test_hub_data_of_several_splits_are_read_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", _FakeDatasets())
    hub = HubData(id="o/n", config="c", revision="main", splits=["train", "dev"])
    rows = list(read_hub(hub, COMMIT, whole=False))
    assert [(row.location, row.split) for row in rows] == [
        ("o/n[train]:0", "train"), ("o/n[train]:1", "train"),
        ("o/n[dev]:0", "validation"), ("o/n[dev]:1", "validation"),
    ]  # fmt: skip
    own = {"revision": COMMIT, "streaming": True, "cache_dir": f"cache/{COMMIT}/c"}
    assert rows[3].value == {"name": "c", "split": "dev", **own}
