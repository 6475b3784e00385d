"""The entries of stages in dvc.lock, now and at earlier commits and experiments."""

import functools
import itertools
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.repo.experiments.utils import resolve_name
from dvc.scm import resolve_rev

from stages.core.config import MISSING
from stages.core.errors import printable

LOCK = "dvc.lock"
_MOST = 100  # revisions of each kind that are looked through, newest first
# dvc also keeps refs of its own there: refs/exps/stash, refs/exps/exec/EXEC_HEAD.
_EXPERIMENT = re.compile(r"refs/exps/[0-9a-f]{2}/[0-9a-f]{38}/(.+)")

Entry = dict[str, Any]
"""What dvc.lock has of a stage: cmd, deps, params, outs."""


class Revision(NamedTuple):
    """A commit of this branch or an experiment."""

    name: str
    """Such as `commit 3f2a1b7` or `experiment foxy-lamb`."""
    lock: str
    """Its dvc.lock."""

    def entry(self, stage: str) -> Entry:
        """What it has of a stage; empty if it has none."""
        return parse_entry(self.lock, stage)


@functools.cache
def parse_entry(lock: str, stage: str) -> Entry:
    """The entry of a stage in the text of a dvc.lock; empty if there is none.

    Only the lines of this stage are parsed: the whole file would take 50 ms, for each of a hundred revisions.
    """
    found = re.search(rf"^  {re.escape(stage)}:\n((?:   .*\n|\n)*)", lock, flags=re.MULTILINE)
    return {} if found is None else load_mapping(found[1])


def load_mapping(text: str) -> dict[str, Any]:
    """The mapping in the YAML `text` of a dvc.lock or of a part of it; empty if there is none."""
    try:
        # Ten times as fast as the loader in Python, where it is there.
        value = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError:  # a file cut short
        return {}
    return value if isinstance(value, dict) else {}


def read_lock_at(rev: str) -> str:
    """The text of dvc.lock at a revision; empty if there is none."""
    return _git("show", f"{rev}:{LOCK}")


def resolve_revision(repo: Repo, rev: str) -> str:
    """The commit of a revision or of an experiment.

    Raises:
        ValueError: if git knows neither.
    """
    try:
        return str(resolve_rev(repo.scm, rev))
    except DvcException:
        raise ValueError(
            f"git knows no commit and no experiment {printable(rev)} (`dvc exp list --all-commits`); one of another"
            " repository comes with `dvc exp pull REMOTE NAME`"
        ) from None


def find_lock(rev: str) -> str | None:
    """The text of dvc.lock at a commit or an experiment; None where git does not know it."""
    try:
        with Repo() as repo:
            return read_lock_at(resolve_revision(repo, rev))
    except (ValueError, DvcException):
        return None


def is_experiment(repo: Repo, rev: str) -> bool:
    """Whether `rev` is the name of an experiment."""
    return bool(resolve_name(repo.scm, rev).get(rev))


def trained_md5(lock: str, task: str) -> str | None:
    """The md5 of models/TASK in the text of a dvc.lock; None if it has none."""
    return hashes_in(parse_entry(lock, f"train@{task}"), "outs").get(f"models/{task}")


def read_lock() -> str:
    """The text of the workspace's dvc.lock; empty if there is none."""
    try:
        return Path(LOCK).read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


@functools.cache
def read_revisions() -> tuple[Revision, ...]:
    """Commits of the current branch that changed dvc.lock, and experiments; the newest first, commits before them.

    Of revisions with the same dvc.lock, only the first is there.
    """
    named = [*_commits(), *_experiments()]
    locks = _read_locks([commit for commit, _ in named])
    seen: dict[str, Revision] = {}
    for (_, name), lock in zip(named, locks, strict=True):
        if lock:
            seen.setdefault(lock, Revision(name, lock))
    return tuple(seen.values())


def value_in(entry: Entry, file: str, key: str) -> Any:
    """The value of a dotted key of a params file in an entry; MISSING if it has none."""
    values = (entry.get("params") or {}).get(file) or {}
    # A tracked key is dotted itself (`tasks.causal.model`); what is left may lead into its value.
    for tracked in sorted(values, key=len, reverse=True):
        if key == tracked or key.startswith(f"{tracked}."):
            value = values[tracked]
            for step in filter(None, key[len(tracked) :].split(".")):
                value = value.get(step, MISSING) if isinstance(value, dict) else MISSING
            return value
    return MISSING


def hashes_in(entry: Entry, section: str) -> dict[str, str]:
    """Path to hash of the `deps` or `outs` of an entry."""
    return {item["path"]: str(item.get("md5", "")) for item in entry.get(section) or []}


def _commits() -> Iterator[tuple[str, str]]:
    lines = _git("log", f"--max-count={_MOST}", "--format=%H %h", "HEAD", "--", LOCK).splitlines()
    for commit, short in (line.split() for line in lines):
        yield commit, f"commit {short}"


def _experiments() -> Iterator[tuple[str, str]]:
    refs = _git("for-each-ref", "--sort=-creatordate", "--format=%(objectname) %(refname)", "refs/exps").splitlines()
    named = ((line.split(" ", 1)[0], _EXPERIMENT.fullmatch(line.split(" ", 1)[1])) for line in refs)
    found = ((commit, f"experiment {name[1]}") for commit, name in named if name)
    yield from itertools.islice(found, _MOST)


def _read_locks(commits: list[str]) -> list[str]:
    """The text of dvc.lock in each of `commits`, by one process; empty where there is none."""
    command = ["git", "cat-file", "--batch"]
    asked = "".join(f"{commit}:{LOCK}\n" for commit in commits).encode()
    answer = subprocess.run(command, input=asked, check=False, capture_output=True).stdout
    texts, start = [], 0
    for _ in commits:
        end = answer.index(b"\n", start)
        header = answer[start:end].split()
        size = int(header[2]) if len(header) == 3 and header[1] == b"blob" else None
        texts.append("" if size is None else answer[end + 1 : end + 1 + size].decode(errors="replace"))
        start = end + 1 + (0 if size is None else size + 1)
    return texts


def _git(*arguments: str) -> str:
    """What a command of git prints; empty if it fails, as in a repository without a commit."""
    done = subprocess.run(["git", *arguments], check=False, capture_output=True, text=True, errors="replace")
    return done.stdout if done.returncode == 0 else ""


def read_committed(file: str, most: int = 30) -> Iterator[str]:
    """The texts of `file` in the last commits of this branch that changed it, the newest first."""
    for commit in _git("log", f"--max-count={most}", "--format=%H", "HEAD", "--", file).split():
        yield _git("show", f"{commit}:{file}")


def changed_files(path: str) -> list[str]:
    """The files at or below `path` that differ from the last commit, by git."""
    lines = _git("status", "--porcelain", "--untracked-files=all", "-z", "--", path).split("\0")
    return [line[3:] for line in lines if line]
