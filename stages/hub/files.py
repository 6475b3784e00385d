"""Find the files of pinned checkpoints and tokenizers in a local directory, DVC's cache, or the Hub and its cache."""

import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.core.artifacts import compute_sha256, read_json_object
from stages.core.dvc_cache import DvcCache
from stages.core.errors import StageError, printable
from stages.core.pins import PinnedSource, TrainedModel
from stages.hub.client import FAILURES, REQUEST_TIMEOUT_SECONDS, explain_hub_error, find_hub_problem, format_page_url

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
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")
CONVERT_HINT = (
    "pickled weights can run code when they are loaded, so they are refused: if you trust them, convert them with"
    " transformers' from_pretrained(DIRECTORY) and save_pretrained(DIRECTORY), which writes model.safetensors"
)
SINGLE_WEIGHTS, SHARDED_WEIGHTS = "model.safetensors", "model.safetensors.index.json"

# Architectures that number positions from pad_token_id + 1; they never use the position embeddings before it.
OFFSET_POSITIONS = ("camembert", "roberta", "xlm-roberta")

_OFFLINE_REMEDIES = {
    "model": "a model from a local directory (python -m tools.pin_model DIRECTORY)",
    "dataset": "a local file with the same records",
}


class _NoRequiredFileError(StageError):
    """The source has none of the required files."""


def find_pinned_files(
    key: str,
    path: str,
    revision: str | None,
    hashes: dict[str, str] | None,
    names: Sequence[str],
    required: Sequence[str],
    kind: str = "model",
) -> dict[str, Path]:
    """Find the files of a pinned source, downloading them from the Hub if needed.

    Args:
        key: config key of the source, for error messages.
        path: local directory (with `hashes`) or Hub repository (with `revision`).
        names: file names to look for.
        required: file names of which at least one must exist.
        kind: kind of the Hub repository, `model` or `dataset`.

    Returns:
        A map from file name to path, with the files of `names` that exist.

    Raises:
        StageError: if the source cannot be reached, differs from its pin, or has none of the `required` files.
    """
    if hashes is not None:
        found = _find_local_files(key, path, hashes, names)
    else:
        found = _find_hub_files(key, path, str(revision), names, required, kind)
    if not any(name in found for name in required):
        raise _NoRequiredFileError(f"{key}.path={printable(path)} has none of {', '.join(required)}")
    return found


def find_source_files(key: str, source: PinnedSource, names: Sequence[str], required: Sequence[str]) -> dict[str, Path]:
    """Find the files of a section of conf/model that has a pin; see `find_pinned_files`."""
    if source.from_ is None:
        return find_pinned_files(key, str(source.path), source.revision, source.files, names, required)
    found = _find_trained_files(key, source.from_, names)
    if not any(name in found for name in required):
        raise _NoRequiredFileError(f"{key}.from={source.from_.description} has none of {', '.join(required)}")
    return found


def _find_trained_files(key: str, trained: TrainedModel, names: Sequence[str]) -> dict[str, Path]:
    """Find the files of a trained model in DVC's cache."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    subject = f"{key}.from={trained.description} ({trained.md5})"
    try:
        with Repo() as repo:
            cache = DvcCache(repo)
    except DvcException as error:
        raise StageError(f"{subject}: cannot read DVC's cache: {error}") from None
    listed = cache.list_files(str(trained.md5))
    found = {name: cache.get_path(listed[name]) for name in names if name in listed} if listed is not None else {}
    missing = [name for name, file in found.items() if not file.is_file()]
    if listed is None or missing:
        raise StageError(
            f"{subject} is not in DVC's cache{f', or lacks {missing[0]} there' if missing else ''}: fetch it with"
            f" {trained.pin_command} --force; if git does not know {trained.rev}, run `dvc exp pull REMOTE"
            f" {trained.rev}` first"
        )
    for name, file in found.items():
        with file.open("rb") as stream:
            if hashlib.file_digest(stream, "md5").hexdigest() != listed[name]:
                raise StageError(
                    f"{subject}: {name} is damaged in DVC's cache ({file}): remove that file, and fetch it again"
                )
    return found


def format_only_pickle(directory: Path) -> str:
    """Return `, only FILE` for the first pickle in `directory`, by name; an empty string if there is no pickle."""
    pickles = sorted(file for file in directory.iterdir() if file.suffix in PICKLE_SUFFIXES)
    return f", only {printable(pickles[0])}" if pickles else ""


def find_weights_files(key: str, source: PinnedSource) -> dict[str, Path]:
    """Find the safetensors files of a pinned checkpoint; include the index if the weights are sharded."""
    required = (SINGLE_WEIGHTS, SHARDED_WEIGHTS)
    try:
        found = find_source_files(key, source, required, required)
    except _NoRequiredFileError as error:
        only = format_only_pickle(Path(str(source.path)).expanduser()) if source.files is not None else ""
        raise StageError(f"{error}{only}: {CONVERT_HINT}") from None
    if SINGLE_WEIGHTS in found:
        return {SINGLE_WEIGHTS: found[SINGLE_WEIGHTS]}
    for shard in read_shard_names(found[SHARDED_WEIGHTS]):
        found |= find_source_files(key, source, [shard], [shard])
    return found


def read_shard_names(index: Path) -> list[str]:
    """Read the names of the safetensors files from an index of sharded weights, sorted.

    Raises:
        StageError: if the file is not an index of weights, or if it names a file in another directory or of another
            format.
    """
    content = read_json_object(index)
    shards = content.get("weight_map")
    if not isinstance(shards, dict) or not shards or not isinstance(content.get("metadata"), dict):
        raise StageError(f"{printable(index)} is not an index of weights: it needs the objects weight_map and metadata")
    for shard in shards.values():
        if not isinstance(shard, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", shard):
            raise StageError(
                f"{printable(index)} names {printable(repr(shard))}: weights are only read from *.safetensors files"
                " in the same directory"
            )
    return sorted(set(shards.values()))


def count_usable_positions(settings: Mapping[str, Any]) -> int | None:
    """Return the maximum number of tokens of a model with the configuration `settings`; None if there is no limit.

    Raises:
        StageError: if one of the values in `settings` is not an integer.
    """
    for key in ("n_positions", "max_position_embeddings", "pad_token_id"):
        if not isinstance(settings.get(key), int | None):
            raise StageError(f"config.json: {key}={printable(repr(settings[key]))} is not an integer")
    positions = settings.get("n_positions") or settings.get("max_position_embeddings")
    if positions is not None and settings.get("model_type") in OFFSET_POSITIONS:
        return int(positions) - int(1 if settings.get("pad_token_id") is None else settings["pad_token_id"]) - 1
    return positions


def _find_local_files(key: str, path: str, hashes: dict[str, str], names: Sequence[str]) -> dict[str, Path]:
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
                f"{printable(file)} is pinned but does not exist: restore it, or run python -m tools.pin_model to pin"
                " the directory again"
            )
        if compute_sha256(file) != hashes[name]:
            raise StageError(
                f"{printable(file)} is not the pinned file (its hash differs): run python -m tools.pin_model to pin it"
                " again"
            )
        found[name] = file
    return found


def _find_hub_files(
    key: str, repository: str, revision: str, names: Sequence[str], required: Sequence[str], kind: str
) -> dict[str, Path]:
    # Unlike the lookup of transformers, this makes no request for a cached revision and fails fast without a network.
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
    unreachable = find_hub_problem()
    if unreachable:
        # A cache filled by other tools does not record which files the repository lacks.
        if any(name in found for name in required):
            return found
        raise StageError(
            f"{key}.path={printable(repository)} (revision {revision}) is not in the cache, and the Hub cannot be"
            f" reached: {unreachable}\n"
            f"  Use {_OFFLINE_REMEDIES[kind]}, or set HF_HOME to a cache that has a copy."
        )
    log.info("fetching %s at %s from the Hub", repository, revision[:12])
    for name in unknown:
        try:
            found[name] = Path(
                hf_hub_download(
                    repository, name, revision=revision, repo_type=kind, etag_timeout=REQUEST_TIMEOUT_SECONDS
                )
            )
        except RemoteEntryNotFoundError:  # not its base class, which is also raised if the server fails
            continue
        except FAILURES as error:
            raise StageError(
                f"{key}.path={printable(repository)} (revision {revision}): {name} could not be fetched:"
                f" {explain_hub_error(error, format_page_url(repository, 'datasets/' if kind == 'dataset' else ''))}"
            ) from None
    return found
