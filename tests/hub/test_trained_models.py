"""Models that a task trained at another commit: from DVC's cache, by their md5 sums."""

import hashlib
import json
from pathlib import Path

import pytest
from data_helpers import write_bpe
from dvc.repo import Repo
from pydantic import TypeAdapter
from toys import toy_model

from stages.core.artifacts import write_json
from stages.core.errors import StageError
from stages.core.pins import TrainedAt, pinned_origin
from stages.hub.files import source_files, weights_files
from stages.model.schema import Model
from stages.model.start import build_start
from stages.tokens.schema import TokenizerSource

SIZE = 300


def put(cache: Path, content: bytes, suffix: str = "") -> str:
    """The md5 of `content`, which DVC's cache has then."""
    md5 = hashlib.md5(content).hexdigest() + suffix
    file = cache / md5[:2] / md5[2:]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return md5


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of a DVC repository, which is the current directory."""
    monkeypatch.chdir(tmp_path)
    Repo.init(no_scm=True).close()
    return tmp_path / ".dvc/cache/files/md5"


@pytest.fixture
def origin(cache: Path, tmp_path: Path) -> TrainedAt:
    """A model with its tokenizer in the cache."""
    directory = write_bpe(tmp_path / "model", {"eos_token": "<|endoftext|>"}, SIZE)
    toy_model("gpt2", vocab_size=SIZE).save_pretrained(directory)
    entries = [{"md5": put(cache, file.read_bytes()), "relpath": file.name} for file in sorted(directory.iterdir())]
    return TrainedAt(rev="lively-lamb", task="causal", md5=put(cache, json.dumps(entries).encode(), ".dir"))


def model_of(origin: TrainedAt) -> Model:
    common = {"task": "causal", "path": None, "revision": None, "files": None, "from_scratch": False}
    return Model(**common, from_=origin, max_positions=64, config={"model_type": "gpt2"})


def write_tokens_of(directory: Path, tokenizer: Path) -> Path:
    """tokenize's directory, of which what a model needs of its tokenizer is there."""
    (directory / "tokenizer").mkdir(parents=True)
    for file in tokenizer.iterdir():
        (directory / "tokenizer" / file.name).write_bytes(file.read_bytes())
    vocabulary = {"size": SIZE, "special": {"eos_token": 0}, "prefix": [], "suffix": [0], "lead": [0]}
    write_json(directory / "stats.json", {"vocabulary": vocabulary})
    return directory


def test_trained_model_is_read_from_the_cache_with_the_bytes_it_was_trained_to(
    origin: TrainedAt, tmp_path: Path
) -> None:
    tokens = write_tokens_of(tmp_path / "tokens", tmp_path / "model")
    built = build_start(model_of(origin), None, tokens, seed=5).state_dict()
    expected = toy_model("gpt2", vocab_size=SIZE).state_dict()
    assert all(weight.equal(expected[name]) for name, weight in built.items())
    files = source_files(
        "model.tokenizer", TokenizerSource(from_=origin), ["tokenizer.json", "nothing.json"], ["tokenizer.json"]
    )
    assert {name: file.read_bytes() for name, file in files.items()} == {
        "tokenizer.json": (tmp_path / "model/tokenizer.json").read_bytes()
    }
    assert pinned_origin(model_of(origin)) == {"path": "models/causal", "md5": origin.md5}
    kept = TypeAdapter(Model).dump_python(model_of(origin), by_alias=True)
    assert kept["from"]["md5"] == origin.md5
    assert TypeAdapter(Model).validate_json(json.dumps(kept)) == model_of(origin)


def test_trained_model_on_text_of_another_tokenizer_says_whose_is_whose(origin: TrainedAt, tmp_path: Path) -> None:
    tokens = write_tokens_of(
        tmp_path / "tokens", write_bpe(tmp_path / "other", {"eos_token": "<|endoftext|>"}, SIZE - 10)
    )
    with pytest.raises(
        StageError, match=r"models/causal of lively-lamb was trained with .* of 300 tokens.*tokens/tokenizer, of 290"
    ):
        build_start(model_of(origin), None, tokens, seed=5)


def test_trained_model_that_the_cache_lacks_says_how_to_fetch_it(cache: Path, origin: TrainedAt) -> None:
    (listing,) = cache.glob("*/*.dir")
    weights = {entry["relpath"]: entry["md5"] for entry in json.loads(listing.read_bytes())}["model.safetensors"]
    file = cache / weights[:2] / weights[2:]
    content = file.read_bytes()
    file.unlink()
    with pytest.raises(
        StageError,
        match=r"not in DVC's cache, or not with model.safetensors: .*pin_model models/causal --rev lively-lamb",
    ):
        weights_files("model", model_of(origin))
    file.write_bytes(content[:-1] + b"x")
    with pytest.raises(StageError, match=r"model\.safetensors is damaged in DVC's cache"):
        weights_files("model", model_of(origin))
    listing.unlink()
    with pytest.raises(StageError, match=r"\(" + str(origin.md5) + r"\) is not in DVC's cache: fetch it"):
        weights_files("model", model_of(origin))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"from_": TrainedAt(rev="lamb", task="causal")},
            "is not pinned: run python -m tools.pin_model models/causal --rev lamb",
        ),
        ({"path": "here"}, "model.from and model.path are both set"),
        ({"files": {"a": "0f"}}, "model.from and model.files are both set"),
    ],
)
def test_trained_model_that_is_not_pinned_in_one_way_is_refused(changes: dict, told: str) -> None:
    origin = TrainedAt(rev="lamb", task="causal", md5="0" * 32 + ".dir")
    values = {"task": "causal", "path": None, "revision": None, "files": None, "from_scratch": False, "from_": origin}
    with pytest.raises(ValueError, match=told):
        Model(**(values | changes), max_positions=64, config={})
