"""What a trained model goes back to: the tasks, experiments and commits whose models it started from, by dvc.lock."""

from collections.abc import Iterator
from pathlib import PurePath
from typing import Any, NamedTuple

from stages.core.compose import PARAMS
from stages.core.errors import printable
from stages.core.starts import NO_START
from tools.lock_history import Entry, find_lock, hashes_in, parse_entry, value_in

_MOST = 100  # links, of locks that lead to each other


class Link(NamedTuple):
    """A model of a chain."""

    task: str
    rev: str | None
    """Experiment or commit that trained it; None: this one."""
    md5: str
    """Of models/TASK."""
    data: str
    """In words, the text that it was trained on; empty where its dvc.lock is not known."""
    origin: str
    """In words, what the first model of a chain began with; empty where another link follows or it is not known."""


def read_chain(lock: str, task: str) -> list[Link]:
    """The model of a task, the one that it started from, and so on, by the text of a dvc.lock.

    Locks at other revisions are asked of git; where it does not know one, the chain ends there.
    """
    links: list[Link] = []
    rev: str | None = None
    md5 = ""
    while len(links) < _MOST:
        entry = parse_entry(lock, f"train@{task}")
        section = {key: value_in(entry, PARAMS.name, f"tasks.{task}.{key}") for key in ("model", "start")}
        md5 = md5 or hashes_in(entry, "outs").get(f"models/{task}", "")
        if not entry:
            links.append(Link(task, rev, md5, "", ""))
            break
        start, file = section["start"], f"conf/model/{section['model']}.yaml"
        started = isinstance(start, str) and start != NO_START
        origin = None if started else value_in(entry, file, "from")
        follows = started or isinstance(origin, dict)
        links.append(Link(task, rev, md5, _data(lock, task), "" if follows else _beginning(entry, file)))
        if started:
            task, md5 = str(start), hashes_in(entry, "deps").get(f"models/{start}", "")
        elif isinstance(origin, dict):
            task, rev, md5 = str(origin["task"]), str(origin["rev"]), str(origin["md5"])
            lock = find_lock(rev) or ""
        else:
            break
    return links


def describe_chain(links: list[Link]) -> Iterator[str]:
    """A line for each link."""
    for number, link in enumerate(links):
        where = f" of {printable(link.rev)}" if link.rev else ""
        data = f", trained on {link.data}" if link.data else ", whose dvc.lock is not known here"
        verb = "starts from " if number else ""
        yield f"{verb}models/{link.task}{where} (md5 {link.md5 or 'not known'}){data}"
    if links and links[-1].origin:
        yield f"starts from {links[-1].origin}"


def _data(lock: str, task: str) -> str:
    """The text of a task's tokens, in words."""
    tokenized, download = parse_entry(lock, f"tokenize@{task}"), parse_entry(lock, "download")
    name, path = (value_in(download, PARAMS.name, f"data.{key}") for key in ("name", "path"))
    sources = value_in(tokenized, PARAMS.name, f"tasks.{task}.sources")
    raw = hashes_in(download, "outs").get("data/raw", "not known")
    chosen = f"the sources {', '.join(map(printable, sources))} of " if isinstance(sources, list) else ""
    return f"{chosen}{printable(name)} ({printable(PurePath(str(path)).name)}, data/raw {raw})"


def _beginning(entry: Entry, file: str) -> str:
    """What a model without a start began with, in words."""
    values: dict[str, Any] = {key: value_in(entry, file, key) for key in ("from_scratch", "path", "revision")}
    if values["from_scratch"] is True:
        return f"fresh weights ({file})"
    revision = f" at {printable(values['revision'])}" if isinstance(values["revision"], str) else ""
    return f"{printable(PurePath(values['path']).name if not revision else values['path'])}{revision}"
