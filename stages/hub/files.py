"""Files of pinned checkpoints and tokenizers: in a local directory, DVC's cache, the Hub or its cache."""

import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.core.artifacts import read_object, sha256
from stages.core.dvc_cache import DvcCache
from stages.core.errors import StageError, printable
from stages.core.pins import Pinned, TrainedAt
from stages.hub.client import ANSWER_SECONDS, FAILURES, explain, hub_unreachable, page_of

log = logging.getLogger(__name__)

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "config.json",
    "chat_template.jinja",
)  # fmt: skip
VOCABULARY_FILES = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")
CONVERT = (
    "pickled weights can run code when they are read, so they are not: where you trust them, convert them with"
    " transformers' from_pretrained(DIRECTORY) and save_pretrained(DIRECTORY), which writes model.safetensors"
)
SINGLE_WEIGHTS, SHARDED_WEIGHTS = "model.safetensors", "model.safetensors.index.json"

# Architectures that number positions from pad_token_id + 1 on, so that the first of their embeddings are never used.
OFFSET_POSITIONS = ("camembert", "roberta", "xlm-roberta")

_WAYS_ON = {
    "model": "a model from a local directory (python -m tools.pin_model DIRECTORY)",
    "dataset": "a local file with the same records",
}


class _NoneFoundError(StageError):
    """A source that has none of the files without which it is of no use."""


def pinned_files(
    key: str,
    path: str,
    revision: str | None,
    hashes: dict[str, str] | None,
    names: Sequence[str],
    required: Sequence[str],
    kind: str = "model",
) -> dict[str, Path]:
    """The files of `names` that the pinned source has, by name; at least one of `required` is among them.

    Args:
        key: the config key that names the source, for errors.
        path: a local directory with `hashes`, or a Hub repository with a `revision`.
        kind: of the repository, `model` or `dataset`.

    Raises:
        StageError: if the source cannot be reached, is not what its pin says, or has none of `required`.
    """
    if hashes is not None:
        found = _local(key, path, hashes, names)
    else:
        found = _hub(key, path, str(revision), names, required, kind)
    if not any(name in found for name in required):
        raise _NoneFoundError(f"{key}.path={printable(path)} has none of {', '.join(required)}")
    return found


def source_files(key: str, source: Pinned, names: Sequence[str], required: Sequence[str]) -> dict[str, Path]:
    """The files of `names` that a section of conf/model has, by name; as `pinned_files`."""
    if source.from_ is None:
        return pinned_files(key, str(source.path), source.revision, source.files, names, required)
    found = _trained(key, source.from_, names)
    if not any(name in found for name in required):
        raise _NoneFoundError(f"{key}.from={source.from_.place} has none of {', '.join(required)}")
    return found


def _trained(key: str, trained: TrainedAt, names: Sequence[str]) -> dict[str, Path]:
    """The files of `names` that a trained model has, in DVC's cache."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    what = f"{key}.from={trained.place} ({trained.md5})"
    try:
        with Repo() as repo:
            cache = DvcCache(repo)
    except DvcException as error:
        raise StageError(f"{what} cannot be looked for in DVC's cache: {error}") from None
    listed = cache.list_files(str(trained.md5))
    found = {name: cache.file(listed[name]) for name in names if name in listed} if listed is not None else {}
    missing = [name for name, file in found.items() if not file.is_file()]
    if listed is None or missing:
        raise StageError(
            f"{what} is not in DVC's cache{f', or not with {missing[0]}' if missing else ''}: fetch it with"
            f" {trained.pin_command} --force; where git does not know {trained.rev}, with `dvc exp pull REMOTE"
            f" {trained.rev}` first"
        )
    for name, file in found.items():
        with file.open("rb") as stream:
            if hashlib.file_digest(stream, "md5").hexdigest() != listed[name]:
                raise StageError(
                    f"{what}: {name} is damaged in DVC's cache ({file}): remove that file, and fetch it again"
                )
    return found


def only_pickles(directory: Path) -> str:
    """`, only FILE` for the first pickle that `directory` holds by its name; empty where there is none."""
    pickles = sorted(file for file in directory.iterdir() if file.suffix in PICKLES)
    return f", only {printable(pickles[0])}" if pickles else ""


def weights_files(key: str, source: Pinned) -> dict[str, Path]:
    """The safetensors files of a pinned checkpoint, with the index where there are several."""
    required = (SINGLE_WEIGHTS, SHARDED_WEIGHTS)
    try:
        found = source_files(key, source, required, required)
    except _NoneFoundError as error:
        only = only_pickles(Path(str(source.path)).expanduser()) if source.files is not None else ""
        raise StageError(f"{error}{only}: {CONVERT}") from None
    if SINGLE_WEIGHTS in found:
        return {SINGLE_WEIGHTS: found[SINGLE_WEIGHTS]}
    for shard in shard_names(found[SHARDED_WEIGHTS]):
        found |= source_files(key, source, [shard], [shard])
    return found


def shard_names(index: Path) -> list[str]:
    """The files that an index of sharded weights names: safetensors beside it.

    Raises:
        StageError: if it names any other file, elsewhere or of another format, or is no such index.
    """
    content = read_object(index)
    shards = content.get("weight_map")
    if not isinstance(shards, dict) or not shards or not isinstance(content.get("metadata"), dict):
        raise StageError(f"{printable(index)} is not an index of weights: it needs the objects weight_map and metadata")
    for shard in shards.values():
        if not isinstance(shard, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", shard):
            raise StageError(
                f"{printable(index)} names {printable(repr(shard))}: weights are only read from *.safetensors files"
                " beside it"
            )
    return sorted(set(shards.values()))


def usable_positions(settings: Mapping[str, Any]) -> int | None:
    """Tokens that a model with the configuration `settings` can attend to; None where nothing bounds them."""
    for key in ("n_positions", "max_position_embeddings", "pad_token_id"):
        if not isinstance(settings.get(key), int | None):
            raise StageError(f"config.json: {key}={printable(repr(settings[key]))} is not an integer")
    positions = settings.get("n_positions") or settings.get("max_position_embeddings")
    if positions is not None and settings.get("model_type") in OFFSET_POSITIONS:
        return int(positions) - int(1 if settings.get("pad_token_id") is None else settings["pad_token_id"]) - 1
    return positions


def _local(key: str, path: str, hashes: dict[str, str], names: Sequence[str]) -> dict[str, Path]:
    directory = Path(path).expanduser()
    if not directory.is_dir():
        raise StageError(f"{key}.path={printable(path)} is not a directory on this machine")
    found = {}
    for name in names:
        file = directory / name
        if name not in hashes:
            continue  # not pinned, not used
        if not file.is_file():
            raise StageError(
                f"{printable(file)} is pinned but not there: python -m tools.pin_model pins the directory anew"
            )
        if sha256(file) != hashes[name]:
            raise StageError(
                f"{printable(file)} is not the pinned file (its hash differs): python -m tools.pin_model pins it anew"
            )
        found[name] = file
    return found


def _hub(
    key: str, repository: str, revision: str, names: Sequence[str], required: Sequence[str], kind: str
) -> dict[str, Path]:
    # Unlike transformers' own look-up, a cached revision costs no request and a dead network costs seconds.
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import RemoteEntryNotFoundError

    found: dict[str, Path] = {}
    unknown = []
    for name in names:
        cached = try_to_load_from_cache(repository, name, revision=revision, repo_type=kind)
        if isinstance(cached, str):
            found[name] = Path(cached)
        elif cached is None:
            unknown.append(name)
    if not unknown:
        return found
    unreachable = hub_unreachable()
    if unreachable:
        if any(name in found for name in required):  # a cache that other tools filled does not know what is absent
            return found
        raise StageError(
            f"{key}.path={printable(repository)} (revision {revision}) is not in the cache, and the Hub cannot be"
            f" reached: {unreachable}\n"
            f"  Ways on: {_WAYS_ON[kind]}, or HF_HOME set to a cache that holds a copy."
        )
    log.info("fetching %s at %s from the Hub", repository, revision[:12])
    for name in unknown:
        try:
            found[name] = Path(
                hf_hub_download(repository, name, revision=revision, repo_type=kind, etag_timeout=ANSWER_SECONDS)
            )
        except RemoteEntryNotFoundError:  # not its base class, which a server that fails half-way raises as well
            continue
        except FAILURES as error:
            raise StageError(
                f"{key}.path={printable(repository)} (revision {revision}): {name} could not be fetched:"
                f" {explain(error, page_of(repository, 'datasets/' if kind == 'dataset' else ''))}"
            ) from None
    return found
