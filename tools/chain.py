"""Trace a trained model back to the tasks, experiments and commits that it started from, using dvc.lock."""

from collections.abc import Iterator
from pathlib import PurePath
from typing import Any, NamedTuple

from stages.core.compose import PARAMS
from stages.core.errors import printable
from stages.core.starts import NO_START
from tools.lock_history import Entry, find_lock, find_model_md5, find_param_value, get_hashes, parse_entry

_MAX_LINKS = 100  # ends chains of locks that refer to each other


class ChainLink(NamedTuple):
    """One model of a chain of models that were trained from one another."""

    task: str
    rev: str | None
    """Experiment or commit that trained the model; None: the current one."""
    md5: str
    """DVC's md5 of models/TASK; the empty string if unknown."""
    data: str
    """Description of the training text; the empty string if the dvc.lock of `rev` is not available."""
    initial_weights: str
    """Description of the weights that the first model of the chain started from; the empty string for the others."""
    initial_model: dict[str, Any] | None = None
    """Values of conf/model of these weights; None for the other models."""


def read_chain(lock: str, task: str) -> list[ChainLink]:
    """Return the model of `task` and the models that it started from, newest first.

    The dvc.lock of another revision is read from git. The chain ends at a revision that git does not have, or that has
    another model than the pinned one.

    Args:
        lock: text of the current dvc.lock.
    """
    links: list[ChainLink] = []
    rev: str | None = None
    md5 = ""
    while len(links) < _MAX_LINKS:
        entry = parse_entry(lock, f"train@{task}")
        section = {key: find_param_value(entry, PARAMS.name, f"tasks.{task}.{key}") for key in ("model", "start")}
        md5 = md5 or get_hashes(entry, "outs").get(f"models/{task}", "")
        if not entry:
            links.append(ChainLink(task, rev, md5, "", ""))
            break
        start, file = section["start"], f"conf/model/{section['model']}.yaml"
        started = isinstance(start, str) and start != NO_START
        is_fresh = find_param_value(entry, file, "from_scratch") is True  # `from` then only names an architecture
        pin = None if started or is_fresh else find_param_value(entry, file, "from")
        follows = started or isinstance(pin, dict)
        initial_weights = "" if follows else _describe_initial_weights(entry, file)
        initial_model = None if follows else (entry.get("params") or {}).get(file)
        links.append(ChainLink(task, rev, md5, _describe_data(lock, task), initial_weights, initial_model))
        if started:
            task, md5 = str(start), get_hashes(entry, "deps").get(f"models/{start}", "")
        elif isinstance(pin, dict):
            task, rev, md5 = str(pin["task"]), str(pin["rev"]), str(pin["md5"])
            lock = find_lock(rev) or ""
            lock = lock if find_model_md5(lock, task) == md5 else ""
        else:
            break
    return links


def describe_chain(links: list[ChainLink]) -> Iterator[str]:
    """Yield one line of text per model of a chain, and a last line for the initial weights."""
    for number, link in enumerate(links):
        revision = f" of {printable(link.rev)}" if link.rev else ""
        data = f", trained on {link.data}" if link.data else ", whose dvc.lock is not known here"
        verb = "starts from " if number else ""
        yield f"{verb}models/{link.task}{revision} (md5 {link.md5 or 'not known'}){data}"
    if links and links[-1].initial_weights:
        yield f"starts from {links[-1].initial_weights}"


def _describe_data(lock: str, task: str) -> str:
    """Describe the text that a task was tokenized from."""
    tokenized, download = parse_entry(lock, f"tokenize@{task}"), parse_entry(lock, "download")
    name, path = (find_param_value(download, PARAMS.name, f"data.{key}") for key in ("name", "path"))
    sources = find_param_value(tokenized, PARAMS.name, f"tasks.{task}.sources")
    raw = get_hashes(download, "outs").get("data/raw", "not known")
    chosen = f"the sources {', '.join(map(printable, sources))} of " if isinstance(sources, list) else ""
    return f"{chosen}{printable(name)} ({printable(PurePath(str(path)).name)}, data/raw {raw})"


def _describe_initial_weights(entry: Entry, file: str) -> str:
    """Describe the initial weights of a model that did not start from a model of this project."""
    values: dict[str, Any] = {key: find_param_value(entry, file, key) for key in ("from_scratch", "path", "revision")}
    if values["from_scratch"] is True:
        return f"fresh weights ({file})"
    revision = f" at {printable(values['revision'])}" if isinstance(values["revision"], str) else ""
    return f"{printable(PurePath(values['path']).name if not revision else values['path'])}{revision}"
