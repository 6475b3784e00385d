"""Entries of stages in dvc.lock: in the workspace, at earlier commits and in experiments."""

import functools
import itertools
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import yaml
from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.repo.experiments.utils import resolve_name
from dvc.scm import resolve_rev

from stages.core.config import MISSING
from stages.core.errors import printable

LOCK = "dvc.lock"
_MAX_REVISIONS = 100  # searched revisions of each kind, the newest first
# Leaves out DVC's internal refs: refs/exps/stash, refs/exps/exec/EXEC_HEAD.
_EXPERIMENT = re.compile(r"refs/exps/[0-9a-f]{2}/[0-9a-f]{38}/(.+)")

Entry = dict[str, Any]
"""Entry of a stage in dvc.lock: cmd, deps, params, outs."""


# libyaml's loader, if it is installed, is ten times as fast as the one in Python.
_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _LockSafeLoader(_SafeLoader):  # type: ignore[misc]
    """Reads YAML 1.2, which DVC writes. In PyYAML's YAML 1.1, 1e-05 is a text and no is false."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(?:[0-9]+\.?[0-9]*(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)", "-+.0123456789"),
):
    _LockSafeLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), list(_first))


class Revision(NamedTuple):
    """Commit of this branch, or an experiment."""

    name: str
    """Display name: `commit 3f2a1b7`, `experiment foxy-lamb`."""
    lock: str
    """Text of its dvc.lock."""

    def get_entry(self, stage: str) -> Entry:
        """Return the entry of a stage; empty if there is none."""
        return parse_entry(self.lock, stage)


@functools.cache
def parse_entry(lock: str, stage: str) -> Entry:
    """Return the entry of a stage in the text of a dvc.lock; empty if there is none.

    Only the lines of this stage are parsed. Parsing the whole file takes 50 ms, for each of a hundred revisions.
    """
    found = re.search(rf"^  {re.escape(stage)}:\n((?:   .*\n|\n)*)", lock, flags=re.MULTILINE)
    return {} if found is None else parse_mapping(found[1])


def parse_mapping(text: str) -> dict[str, Any]:
    """Parse the YAML `text` of a dvc.lock or a part of it; empty if it is not a mapping."""
    try:
        value = yaml.load(text, Loader=_LockSafeLoader)
    except yaml.YAMLError:  # a truncated file
        return {}
    return value if isinstance(value, dict) else {}


def read_lock_at(rev: str) -> str:
    """Return the text of dvc.lock at a revision; empty if there is none."""
    return _run_git("show", f"{rev}:{LOCK}")


def resolve_revision(repo: Repo, rev: str) -> str:
    """Return the commit hash of a revision or an experiment.

    Raises:
        ValueError: if git knows neither.
    """
    try:
        return str(resolve_rev(repo.scm, rev))
    except DvcException:
        raise ValueError(
            f"git knows no commit and no experiment {printable(rev)} (`dvc exp list --all-commits`); fetch an"
            " experiment of another repository with `dvc exp pull REMOTE NAME`"
        ) from None


def find_lock(rev: str) -> str | None:
    """Return the text of dvc.lock at a commit or an experiment; None if git does not know the revision."""
    try:
        with Repo() as repo:
            return read_lock_at(resolve_revision(repo, rev))
    except (ValueError, DvcException):
        return None


def is_experiment(repo: Repo, rev: str) -> bool:
    """Return True if `rev` is the name of an experiment."""
    return bool(resolve_name(repo.scm, rev).get(rev))


def find_model_md5(lock: str, task: str) -> str | None:
    """Return the md5 of models/TASK in the text of a dvc.lock, or None."""
    return get_hashes(parse_entry(lock, f"train@{task}"), "outs").get(f"models/{task}")


def read_lock() -> str:
    """Return the text of the workspace's dvc.lock; empty if there is none."""
    try:
        return Path(LOCK).read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


@functools.cache
def read_revisions() -> tuple[Revision, ...]:
    """Return the commits of the current branch that changed dvc.lock, then the experiments, each newest first.

    Revisions with the same dvc.lock are listed once, as the first of them.
    """
    commits_with_names = [*_list_commits(), *_list_experiments()]
    locks = _read_locks([commit for commit, _ in commits_with_names])
    by_lock: dict[str, Revision] = {}
    for (_, name), lock in zip(commits_with_names, locks, strict=True):
        if lock:
            by_lock.setdefault(lock, Revision(name, lock))
    return tuple(by_lock.values())


def find_param_value(entry: Entry, file: str, key: str) -> Any:
    """Return the value of a dotted key of a params file in an entry; MISSING if it has none."""
    values = (entry.get("params") or {}).get(file) or {}
    # A tracked key may contain dots (`tasks.causal.model`). The rest of `key` is a path inside its value.
    for tracked in sorted(values, key=len, reverse=True):
        if key == tracked or key.startswith(f"{tracked}."):
            value = values[tracked]
            for name in filter(None, key[len(tracked) :].split(".")):
                value = value.get(name, MISSING) if isinstance(value, dict) else MISSING
            return value
    return MISSING


def get_hashes(entry: Entry, section: str) -> dict[str, str]:
    """Return the hash of each path in the `deps` or `outs` of an entry."""
    return {item["path"]: str(item.get("md5", "")) for item in entry.get(section) or []}


def _list_commits() -> Iterator[tuple[str, str]]:
    lines = _run_git("log", f"--max-count={_MAX_REVISIONS}", "--format=%H %h", "HEAD", "--", LOCK).splitlines()
    for commit, short in (line.split() for line in lines):
        yield commit, f"commit {short}"


def _list_experiments() -> Iterator[tuple[str, str]]:
    refs = _run_git(
        "for-each-ref", "--sort=-creatordate", "--format=%(objectname) %(refname)", "refs/exps"
    ).splitlines()
    named = ((line.split(" ", 1)[0], _EXPERIMENT.fullmatch(line.split(" ", 1)[1])) for line in refs)
    found = ((commit, f"experiment {name[1]}") for commit, name in named if name)
    yield from itertools.islice(found, _MAX_REVISIONS)


def _read_locks(commits: list[str]) -> list[str]:
    """Return the text of dvc.lock at each of `commits`, read by a single process; empty if it has none."""
    command = ["git", "cat-file", "--batch"]
    request = "".join(f"{commit}:{LOCK}\n" for commit in commits).encode()
    answer = subprocess.run(command, input=request, check=False, capture_output=True).stdout
    texts, start = [], 0
    for _ in commits:
        end = answer.index(b"\n", start)
        header = answer[start:end].split()
        size = int(header[2]) if len(header) == 3 and header[1] == b"blob" else None
        texts.append("" if size is None else answer[end + 1 : end + 1 + size].decode(errors="replace"))
        start = end + 1 + (0 if size is None else size + 1)
    return texts


def _run_git(*arguments: str) -> str:
    """Return the output of a git command; empty if it fails, as in a repository without a commit."""
    process = subprocess.run(["git", *arguments], check=False, capture_output=True, text=True, errors="replace")
    return process.stdout if process.returncode == 0 else ""


def read_committed_versions(file: str, max_commits: int = 30) -> Iterator[str]:
    """Yield the text of `file` at the last `max_commits` commits of this branch that changed it, the newest first."""
    for commit in _run_git("log", f"--max-count={max_commits}", "--format=%H", "HEAD", "--", file).split():
        yield _run_git("show", f"{commit}:{file}")


def list_changed_files(path: str) -> list[str]:
    """Return the files at or below `path` that differ from the last commit according to git."""
    lines = _run_git("status", "--porcelain", "--untracked-files=all", "-z", "--", path).split("\0")
    return [line[3:] for line in lines if line]
