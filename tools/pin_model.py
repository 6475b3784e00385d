"""Write conf/model/NAME.yaml for a local directory, pinned by the hashes of its files, or for a task's trained model.

Command python -m tools.pin_model DIRECTORY [--name NAME] [--task causal|mlm] [--from-scratch] [--model-type TYPE]
        python -m tools.pin_model models/TASK --rev REV [--name NAME]

The directory holds a model as `save_pretrained` writes it (config.json, model.safetensors, tokenizer.json, ...), or a
tokenizer alone, with `--model-type` saying which architecture to train from scratch on its vocabulary.

With `--rev`, the model is the one that the task trained in the experiment or at the commit REV. It is pinned by its md5
sum in dvc.lock there, and read from DVC's cache, into which it is fetched if only the DVC remote has it.
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

from stages.core.artifacts import read_object, sha256, write_text
from stages.core.dvc_cache import DvcCache
from stages.core.errors import printable, printable_lines
from stages.hub.files import (
    CONVERT,
    OFFSET_POSITIONS,
    TOKENIZER_FILES,
    VOCABULARY_FILES,
    only_pickles,
    usable_positions,
)  # fmt: skip
from stages.model.schema import BASE
from tools.lock_history import is_experiment, read_lock_at, resolve_revision, trained_md5

CONF = Path("conf/model")
ONLY_ADDITIONS = "{} only has the additions of an adapter: train it with adapter.merge: true"
SCRATCH_POSITIONS = 512  # within every architecture's defaults, or set


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], prog="python -m tools.pin_model")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--rev", help="experiment or commit of this repository that has models/TASK")
    parser.add_argument("--name", help="name of the configuration (default: the directory's)")
    parser.add_argument("--task", choices=("causal", "mlm"), help="default: what the model's config.json says")
    parser.add_argument(
        "--from-scratch", action="store_true", help="take the configuration and tokenizer, not the weights"
    )
    parser.add_argument(
        "--model-type", help="architecture to train from scratch, for a directory with a tokenizer alone"
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
            config = pin(directory, arguments.task, arguments.from_scratch, arguments.model_type)
        else:
            config = pin_trained(directory, arguments.rev, arguments.from_scratch)
    except (OSError, ValueError, DvcException) as error:
        sys.exit(printable_lines(f"pin_model: {error}"))
    header = "# Pinned by `python -m tools.pin_model`: a file that changes is an error until it is pinned anew.\n"
    write_text(file, header + yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    print(f"{printable(file)}: use it with -S tasks.{config['task']}.model={name}")


def pin(directory: Path, task: str | None, from_scratch: bool, model_type: str | None) -> dict[str, Any]:
    """The configuration of the model in `directory`."""
    if not directory.is_dir():
        raise ValueError(f"{printable(directory)} is not a directory")
    tokenizer_files = [file for file in TOKENIZER_FILES if (directory / file).is_file()]
    if not any(file in VOCABULARY_FILES for file in tokenizer_files):
        raise ValueError(f"{printable(directory)} has no tokenizer: none of {', '.join(VOCABULARY_FILES)}")
    tokenizer = {"path": str(directory), "files": {name: sha256(directory / name) for name in tokenizer_files}}
    if (directory / BASE).is_file():
        raise ValueError(ONLY_ADDITIONS.format(printable(directory)))
    if not (directory / "config.json").is_file():
        if model_type is None:
            raise ValueError(
                f"{directory} has no config.json: say with --model-type which architecture to train on its tokenizer"
            )
        settings: dict[str, Any] = {"model_type": model_type}
        if model_type in OFFSET_POSITIONS:
            settings["max_position_embeddings"] = SCRATCH_POSITIONS + 2
        return {
            "task": task or ("mlm" if has_mask(directory) else "causal"),
            "tokenizer": tokenizer,
            "path": None,
            "revision": None,
            "files": None,
            "from": None,
            "from_scratch": True,
            "max_positions": SCRATCH_POSITIONS,
            "config": settings,
        }
    settings = read_object(directory / "config.json")
    weights = sorted(file.name for file in directory.glob("*.safetensors*"))
    if not weights and not from_scratch:
        raise ValueError(
            f"{directory} has no *.safetensors weights{only_pickles(directory)}: {CONVERT}; or use --from-scratch"
        )
    positions = usable_positions(settings)
    if positions is None:
        raise ValueError("config.json names no number of positions: write max_positions by hand")
    names = ["config.json", *(["generation_config.json"] if (directory / "generation_config.json").is_file() else [])]
    names += [] if from_scratch else weights
    return {
        "task": task or task_of(settings, directory),
        "tokenizer": tokenizer,
        "path": str(directory),
        "revision": None,
        "files": {name: sha256(directory / name) for name in names},
        "from": None,
        "from_scratch": from_scratch,
        "max_positions": positions,
        "config": {"model_type": settings.get("model_type")},
    }


def pin_trained(directory: Path, rev: str, from_scratch: bool) -> dict[str, Any]:
    """The configuration of the model in `directory`, models/TASK, as a task trained it at `rev`."""
    task = directory.name
    with Repo() as repo:
        if directory.parent != Path(repo.root_dir).resolve() / "models":
            raise ValueError(f"{printable(directory)}: with --rev, name the model of a task: models/TASK")
        commit = resolve_revision(repo, rev)
        md5 = trained_md5(read_lock_at(commit), task)
        if md5 is None:
            raise ValueError(f"dvc.lock of {printable(rev)} has no models/{printable(task)}")
        fetch_model(repo, commit, task, md5)
        cache = DvcCache(repo)
        listed = cache.list_files(md5)
        assert listed is not None
        with tempfile.TemporaryDirectory() as scratch:
            for name, file_md5 in listed.items():
                (Path(scratch) / name).symlink_to(cache.file(file_md5))
            if (Path(scratch) / BASE).is_file():  # in words without the place of links
                raise ValueError(ONLY_ADDITIONS.format(f"models/{task} of {printable(rev)}"))
            config = pin(Path(scratch), None, from_scratch, None)
        # An experiment keeps its name; a branch moves.
        origin = {"rev": rev if is_experiment(repo, rev) else commit, "task": task, "md5": md5}
    return {**config, "tokenizer": {"from": origin}, "path": None, "files": None, "from": dict(origin)}


def fetch_model(repo: Repo, commit: str, task: str, md5: str) -> None:
    """Fetch models/TASK of a commit into DVC's cache, unless it is there.

    Raises:
        ValueError: if no remote has it.
    """
    cache = DvcCache(repo)

    def is_cached() -> bool:
        listed = cache.list_files(md5)
        return listed is not None and all(cache.file(file).is_file() for file in listed.values())

    if not is_cached():
        with contextlib.suppress(DvcException):
            repo.fetch(targets=[f"models/{task}"], revs=[commit], workspace=False)
    if not is_cached():
        raise ValueError(
            f"models/{task} of {commit[:7]} ({md5}) is neither in DVC's cache nor in a remote: `dvc push` it where it"
            " was trained, or run `dvc repro` there again"
        )


def task_of(settings: dict[str, Any], directory: Path) -> str:
    """The task that a model's own architecture names, or the one that its tokenizer has the tokens for."""
    names = settings.get("architectures")
    architectures = " ".join(map(str, names)) if isinstance(names, list) else ""
    if "CausalLM" in architectures or "LMHead" in architectures:
        return "causal"
    return "mlm" if "MaskedLM" in architectures or has_mask(directory) else "causal"


def has_mask(directory: Path) -> bool:
    """Whether the tokenizer in `directory` names a mask token."""
    files = (directory / name for name in ("tokenizer_config.json", "special_tokens_map.json"))
    return any(read_object(file).get("mask_token") for file in files if file.is_file())


if __name__ == "__main__":
    main()
