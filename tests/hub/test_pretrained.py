"""Pinned files: local files by their hashes, and files of a Hub over real HTTP, with each client in a new process."""

import json
from pathlib import Path
from typing import Any

import pytest
from data_helpers import hash_files
from hub_cases import COMMIT, LIMIT_SECONDS, MODELS, NAMES, REMOTE, Case, Client, run_case
from mini_hub import MiniHub

from stages.core.artifacts import compute_sha256
from stages.core.errors import StageError
from stages.hub.files import count_usable_positions, find_pinned_files, find_weights_files
from stages.tokens.schema import TokenizerSource

# -- local directories -------------------------------------------------------------------------------------------------


@pytest.fixture
def local(tmp_path: Path) -> Path:
    for name in ("tokenizer.json", "vocab.json", "other.json"):
        (tmp_path / name).write_text(name)
    return tmp_path


def find_pinned(directory: Path, pin: dict[str, str], names: list[str] | None = None) -> dict[str, Path]:
    return find_pinned_files("model", str(directory), None, pin, names or NAMES, ["tokenizer.json"])


def test_sha256_of_a_file_hashes_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert compute_sha256(tmp_path / "a") == "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_pinned_files_of_a_directory_are_the_requested_and_pinned_ones(local: Path) -> None:
    pin = hash_files(local)
    del pin["vocab.json"]
    assert find_pinned(local, pin) == {"tokenizer.json": local / "tokenizer.json"}


def test_pinned_files_below_the_home_directory_are_found(local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(local.parent))
    found = find_pinned_files("model", f"~/{local.name}", None, hash_files(local), NAMES, NAMES)
    assert found["vocab.json"].read_text() == "vocab.json"


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json"])
@pytest.mark.parametrize("change", ["edited", "deleted"])
def test_pinned_files_that_changed_are_an_error_with_the_remedy(local: Path, name: str, change: str) -> None:
    pin = hash_files(local)
    if change == "edited":
        (local / name).write_text("other")
    else:
        (local / name).unlink()
    with pytest.raises(StageError, match=rf"{local / name} .*tools\.pin_model"):
        find_pinned(local, pin)


def test_pinned_files_that_changed_but_are_not_requested_are_ignored(local: Path) -> None:
    pin = hash_files(local)
    (local / "other.json").write_text("changed")
    assert set(find_pinned(local, pin)) == {"tokenizer.json", "vocab.json"}


def test_pinned_files_without_a_required_one_names_it(local: Path) -> None:
    pin = hash_files(local)
    del pin["tokenizer.json"]
    with pytest.raises(StageError, match=rf"model\.path={local} has none of tokenizer\.json"):
        find_pinned(local, pin)


def test_pinned_files_of_an_absent_directory_names_it(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=f"model.path={tmp_path / 'gone'} is not a directory"):
        find_pinned(tmp_path / "gone", {"tokenizer.json": "sha256:0"})


def find_weights(directory: Path, pin: dict[str, str]) -> list[str]:
    return sorted(find_weights_files("model", TokenizerSource(path=str(directory), files=pin)))


def write_sharded(directory: Path) -> None:
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name in names:
        (directory / name).write_text(name)
    index = {"metadata": {}, "weight_map": {"a": names[0], "b": names[1], "c": names[0]}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def test_weights_files_in_one_file_are_only_that_file(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    (tmp_path / "model.safetensors").write_text("all")
    assert find_weights(tmp_path, hash_files(tmp_path)) == ["model.safetensors"]


def test_weights_files_in_shards_are_the_index_and_each_shard_once(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    (tmp_path / "unrelated.safetensors").write_text("")
    assert find_weights(tmp_path, hash_files(tmp_path)) == [
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"
    ]  # fmt: skip


def test_weights_files_with_a_shard_that_is_not_pinned_names_it(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    pin = hash_files(tmp_path)
    del pin["model-00002-of-00002.safetensors"]
    with pytest.raises(StageError, match=r"none of model-00002-of-00002\.safetensors"):
        find_weights(tmp_path, pin)


@pytest.mark.parametrize(
    "shard",
    ["../outside.safetensors", "/etc/passwd", "/outside.safetensors", "sub/a.safetensors", "sub\\a.safetensors",
     "pytorch_model.bin", "a.pt", "a.pkl", "a.safetensors.bin", "a.SAFETENSORS", "safetensors", ".safetensors", "",
     "..", "a.safetensors\0.bin", "a.safetensors\n", "\x1b[2Ja.bin", "x" * 100_000, None, 3, ["a.safetensors"], {}],
    ids=lambda shard: repr(shard)[:24],
)  # fmt: skip
def test_weights_files_of_an_index_that_names_anything_else_are_refused(tmp_path: Path, shard: Any) -> None:
    write_sharded(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    good = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"metadata": {}, "weight_map": {**good, "d": shard}}))
    with pytest.raises(
        StageError, match=r"index\.json names .*only read from \*\.safetensors files in the same directory"
    ) as caught:
        find_weights(tmp_path, hash_files(tmp_path))
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600


NO_INDEX = [
    "", "{", "null", "7", "[]", '["model.safetensors"]', "{}", '{"weight_map": {}, "metadata": {}}',
    '{"weight_map": ["a.safetensors"], "metadata": {}}', '{"weight_map": "a.safetensors", "metadata": {}}',
    '{"weight_map": {"a": "a.safetensors"}}', '{"weight_map": {"a": "a.safetensors"}, "metadata": []}',
    "[" * 200_000, '{"weight_map":' * 200_000, '{"metadata": ' + "9" * 5000 + "}",
]  # fmt: skip


@pytest.mark.parametrize("text", NO_INDEX, ids=lambda text: repr(text[:24]))
def test_weights_files_of_an_invalid_index_are_an_error_that_names_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(StageError, match=r"index\.json is not (JSON|a JSON object|an index of weights)") as caught:
        find_weights(tmp_path, hash_files(tmp_path))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_weights_files_of_only_pickles_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_text("")
    with pytest.raises(StageError, match=r"none of model\.safetensors"):
        find_weights(tmp_path, hash_files(tmp_path))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"model_type": "gpt2", "n_positions": 1024}, 1024),
        ({"model_type": "bert", "max_position_embeddings": 512, "pad_token_id": 0}, 512),
        ({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}, 512),
        ({"model_type": "roberta", "max_position_embeddings": 514}, 512),
        ({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 0}, 513),
        ({"model_type": "bloom"}, None),
    ],
)
def test_usable_positions_exclude_those_that_the_architecture_never_uses(
    settings: dict[str, Any], expected: int | None
) -> None:
    assert count_usable_positions(settings) == expected


@pytest.mark.parametrize("key", ["n_positions", "max_position_embeddings", "pad_token_id"])
@pytest.mark.parametrize("value", ["many", [], {}, 1.5])
def test_usable_positions_of_a_non_integer_names_the_key(key: str, value: Any) -> None:
    with pytest.raises(StageError, match=rf"config\.json: {key}=.* is not an integer"):
        count_usable_positions({"model_type": "roberta", "max_position_embeddings": 514, key: value})


# -- the Hub -----------------------------------------------------------------------------------------------------------


def decode_files(names: list[str]) -> dict[str, str]:
    return {name: REMOTE[name].decode() for name in names if name in REMOTE}


def test_hub_files_come_from_the_server_once_and_from_the_cache_when_it_is_gone(tmp_path: Path) -> None:
    hub = MiniHub({"o/n": {COMMIT: REMOTE}})
    with hub.serve() as url:
        client = Client(tmp_path, url)
        assert client.fetch() == decode_files(NAMES)
        num_requests = len(hub.requests)
        assert client.fetch() == decode_files(NAMES)
        assert len(hub.requests) == num_requests > 0
    assert client.fetch() == decode_files(NAMES)
    assert client.fetch(HF_HUB_OFFLINE="1") == decode_files(NAMES)


def test_hub_files_of_a_cache_filled_by_others_are_used_without_the_server(tmp_path: Path) -> None:
    with MiniHub({"o/n": {COMMIT: REMOTE}}).serve() as url:
        client = Client(tmp_path, url)
        client.fetch("o/n", COMMIT, ["tokenizer.json"])
    assert client.fetch() == decode_files(["tokenizer.json"])


def test_hub_files_of_another_revision_are_not_mixed_up(tmp_path: Path) -> None:
    other = "f" * 40
    with MiniHub({"o/n": {COMMIT: REMOTE, other: {"tokenizer.json": b"another"}}}).serve() as url:
        client = Client(tmp_path, url)
        client.fetch()
        assert client.fetch("o/n", other) == {"tokenizer.json": "another"}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.slow if case.name.endswith(("within a file", "for ever")) else ())
        for case in MODELS
    ],
    ids=lambda case: case.name,
)
def test_hub_files_in_every_case_are_found_or_an_error_with_the_remedy(case: Case, tmp_path: Path) -> None:
    found = run_case(case, "model", tmp_path)
    assert found.failed == bool(case.words), found.said
    for words in (*case.words, *case.notes, *((f"model.path={case.repository}",) if case.words else ())):
        assert words in found.said
    assert found.seconds < LIMIT_SECONDS


def test_hub_files_without_a_required_one_are_an_error_that_names_it(tmp_path: Path) -> None:
    with MiniHub({"o/n": {COMMIT: {"vocab.json": b"{}"}}}).serve() as url:
        assert "model.path=o/n has none of tokenizer.json" in Client(tmp_path, url).error()


def test_hub_file_that_the_server_fails_to_send_is_an_error_and_not_absent(tmp_path: Path) -> None:
    hub = MiniHub({"o/n": {COMMIT: REMOTE}}, failing=("tokenizer_config.json",))
    with hub.serve() as url:
        client = Client(tmp_path, url)
        assert "tokenizer_config.json could not be fetched" in client.error()
        hub.failing = ()
        assert client.fetch() == decode_files(NAMES)
