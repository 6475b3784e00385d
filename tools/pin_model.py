"""Write conf/model/NAME.yaml for a local directory, pinned by the hashes of its files, or for a task's trained model.

Command python -m tools.pin_model DIRECTORY [--name NAME] [--task causal|mlm] [--from-scratch] [--model-type TYPE]
        python -m tools.pin_model models/TASK --rev REV [--name NAME]

The directory contains a model as written by `save_pretrained` (config.json, model.safetensors, tokenizer.json, ...), or
only a tokenizer. In the second case, `--model-type` chooses the architecture to train from scratch on its vocabulary.

With `--rev`, the model is the one that the task trained in the experiment or at the commit REV. It is pinned by its md5
sum in the dvc.lock of REV and read from DVC's cache, after fetching it from the DVC remote if necessary.
"""

import argparse
import contextlib
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from dvc.exceptions import DvcException
from dvc.repo import Repo

from stages.core.artifacts import compute_sha256, read_json_object, write_text
from stages.core.dvc_cache import DvcCache
from stages.core.errors import printable, printable_lines
from stages.hub.files import (
    CONVERT_HINT,
    OFFSET_POSITIONS,
    TOKENIZER_FILES,
    VOCABULARY_FILES,
    count_usable_positions,
    format_only_pickle,
)  # fmt: skip
from stages.model.schema import BASE_MODEL_CONFIG
from tools.lock_history import find_model_md5, is_experiment, read_lock_at, resolve_revision

CONF = Path("conf/model")
ADAPTER_ONLY_ERROR = "{} only contains the weights of an adapter: train it with adapter.merge: true"
SCRATCH_POSITIONS = 512  # every architecture supports it by default or by setting max_position_embeddings


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], prog="python -m tools.pin_model")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--rev", help="experiment or commit of this repository that has models/TASK")
    parser.add_argument("--name", help="name of the configuration (default: name of the directory)")
    parser.add_argument("--task", choices=("causal", "mlm"), help="task of the model (default: from its config.json)")
    parser.add_argument(
        "--from-scratch", action="store_true", help="use the configuration and tokenizer, not the weights"
    )
    parser.add_argument(
        "--model-type", help="architecture to train from scratch, for a directory with only a tokenizer"
    )
    parser.add_argument("--force", action="store_true", help="overwrite an existing configuration")
    arguments = parser.parse_args()
    directory = arguments.directory.expanduser().resolve()
    default = directory.name if arguments.rev is None else f"{directory.name}-{arguments.rev}"
    name = arguments.name or re.sub(r"[^\w.-]", "-", default)
    file = CONF / f"{name}.yaml"
    if file.exists() and not arguments.force:
        sys.exit(f"pin_model: {printable(file)} exists: choose another --name, or --force")
    try:
        if arguments.rev is None:
            config = pin_directory(directory, arguments.task, arguments.from_scratch, arguments.model_type)
        else:
            config = pin_trained_model(directory, arguments.rev, arguments.from_scratch)
    except (OSError, ValueError, DvcException) as error:
        sys.exit(printable_lines(f"pin_model: {error}"))
    header = "# Pinned by `python -m tools.pin_model`: a file that changes is an error until it is pinned again.\n"
    write_text(file, header + yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    print(f"{printable(file)}: use it with -S tasks.{config['task']}.model={name}")


def pin_directory(directory: Path, task: str | None, from_scratch: bool, model_type: str | None) -> dict[str, Any]:
    """Return the configuration of the model in `directory`.

    Raises:
        ValueError: if the directory has no tokenizer or model that can be used.
    """
    if not directory.is_dir():
        raise ValueError(f"{printable(directory)} is not a directory")
    tokenizer_files = [file for file in TOKENIZER_FILES if (directory / file).is_file()]
    if not any(file in VOCABULARY_FILES for file in tokenizer_files):
        raise ValueError(f"{printable(directory)} has no tokenizer: none of {', '.join(VOCABULARY_FILES)}")
    tokenizer = {"path": str(directory), "files": {name: compute_sha256(directory / name) for name in tokenizer_files}}
    if (directory / BASE_MODEL_CONFIG).is_file():
        raise ValueError(ADAPTER_ONLY_ERROR.format(printable(directory)))
    if not (directory / "config.json").is_file():
        if model_type is None:
            raise ValueError(
                f"{directory} has no config.json: choose the architecture to train on its tokenizer with --model-type"
            )
        settings: dict[str, Any] = {"model_type": model_type}
        if model_type in OFFSET_POSITIONS:
            settings["max_position_embeddings"] = SCRATCH_POSITIONS + 2
        return {
            "task": task or ("mlm" if has_mask_token(directory) else "causal"),
            "tokenizer": tokenizer,
            "path": None,
            "revision": None,
            "files": None,
            "from": None,
            "from_scratch": True,
            "max_positions": SCRATCH_POSITIONS,
            "config": settings,
        }
    settings = read_json_object(directory / "config.json")
    weights = sorted(file.name for file in directory.glob("*.safetensors*"))
    if not weights and not from_scratch:
        raise ValueError(
            f"{directory} has no *.safetensors weights{format_only_pickle(directory)}: {CONVERT_HINT}; or use"
            " --from-scratch"
        )
    positions = count_usable_positions(settings)
    if positions is None:
        raise ValueError("config.json does not set the number of positions: write max_positions by hand")
    names = ["config.json", *(["generation_config.json"] if (directory / "generation_config.json").is_file() else [])]
    names += [] if from_scratch else weights
    return {
        "task": task or infer_task(settings, directory),
        "tokenizer": tokenizer,
        "path": str(directory),
        "revision": None,
        "files": {name: compute_sha256(directory / name) for name in names},
        "from": None,
        "from_scratch": from_scratch,
        "max_positions": positions,
        "config": {"model_type": settings.get("model_type")},
    }


def pin_trained_model(directory: Path, rev: str, from_scratch: bool) -> dict[str, Any]:
    """Return the configuration of the model that a task trained at `rev`; `directory` is models/TASK.

    Raises:
        ValueError: if `rev` has no such model, or it cannot be fetched or used.
    """
    task = directory.name
    with Repo() as repo:
        if directory.parent != Path(repo.root_dir).resolve() / "models":
            raise ValueError(f"{printable(directory)}: with --rev, name the model of a task: models/TASK")
        commit = resolve_revision(repo, rev)
        md5 = find_model_md5(read_lock_at(commit), task)
        if md5 is None:
            raise ValueError(f"dvc.lock of {printable(rev)} has no models/{printable(task)}")
        fetch_model(repo, commit, task, md5)
        cache = DvcCache(repo)
        listed = cache.list_files(md5)
        assert listed is not None
        with tempfile.TemporaryDirectory() as scratch:
            for name, file_md5 in listed.items():
                (Path(scratch) / name).symlink_to(cache.get_path(file_md5))
            if (Path(scratch) / BASE_MODEL_CONFIG).is_file():  # an error without the path of the links
                raise ValueError(ADAPTER_ONLY_ERROR.format(f"models/{task} of {printable(rev)}"))
            config = pin_directory(Path(scratch), None, from_scratch, None)
        # The name of an experiment is stable; a branch moves, so its commit is written.
        origin = {"rev": rev if is_experiment(repo, rev) else commit, "task": task, "md5": md5}
    return {**config, "tokenizer": {"from": origin}, "path": None, "files": None, "from": dict(origin)}


def fetch_model(repo: Repo, commit: str, task: str, md5: str) -> None:
    """Fetch models/TASK of a commit into DVC's cache, unless it is already there.

    Raises:
        ValueError: if no remote has it.
    """
    cache = DvcCache(repo)

    def is_cached() -> bool:
        listed = cache.list_files(md5)
        return listed is not None and all(cache.get_path(file).is_file() for file in listed.values())

    if not is_cached():
        with contextlib.suppress(DvcException):
            repo.fetch(targets=[f"models/{task}"], revs=[commit], workspace=False)
    if not is_cached():
        raise ValueError(
            f"models/{task} of {commit[:7]} ({md5}) is neither in DVC's cache nor in a remote: `dvc push` it where it"
            " was trained, or run `dvc repro` there again"
        )


def infer_task(settings: dict[str, Any], directory: Path) -> str:
    """Infer the task from a model's architecture or, if that is not enough, from the tokenizer's mask token."""
    names = settings.get("architectures")
    architectures = " ".join(map(str, names)) if isinstance(names, list) else ""
    if "CausalLM" in architectures or "LMHead" in architectures:
        return "causal"
    return "mlm" if "MaskedLM" in architectures or has_mask_token(directory) else "causal"


def has_mask_token(directory: Path) -> bool:
    """Return True if the tokenizer in `directory` has a mask token."""
    files = (directory / name for name in ("tokenizer_config.json", "special_tokens_map.json"))
    return any(read_json_object(file).get("mask_token") for file in files if file.is_file())


if __name__ == "__main__":
    main()
