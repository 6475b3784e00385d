"""Replay of stages in a clean clone of a commit, in which no earlier result can be found.

The clone has its own empty DVC cache, LM_REPRO_CACHE and LM_REPRO_BRANCHES, so that no stage is restored from a cache,
and no training resumes from a checkpoint. It also starts without dvc.lock: what the file has at the end was computed.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import psutil
from dvc.dvcfile import PROJECT_FILE
from dvc.fs import LocalFileSystem
from dvc.repo import Repo
from dvc.repo.reproduce import get_active_graph, plan_repro
from dvc.stage import PipelineStage
from dvc_data.hashfile.build import build
from dvc_data.hashfile.db import HashFileDB
from dvc_data.hashfile.tree import Tree

from stages.core.artifacts import lock_handle
from stages.core.dvc_cache import DvcCache, is_directory_md5
from stages.core.errors import StageError, printable
from tools.lock_history import LOCK, Entry, parse_mapping

_PREFIX = "lm-repro-verify-"
_STDERR = 2  # file descriptor
_REPRO = ("repro", "--quiet", "--force", "--single-item", "--no-run-cache", "--no-commit")
# Settings of this process that would let a replay find earlier results, or report it as a training of its own.
_DROPPED_VARIABLES = ("DVC_STAGE", "DVC_ROOT", "LM_REPRO_TRACK")


class HashedPath(NamedTuple):
    """Hashes of a file or directory, as DVC computes them."""

    md5: str
    files: dict[str, str]
    """Files of a directory, relative path to md5; for a file, only the empty string."""


def hash_path(repo: Repo, path: Path) -> HashedPath:
    """Hash a file or directory. Reads all bytes, unlike DVC, which trusts a file whose size and time are unchanged.

    Args:
        repo: the repository that `path` is in; its .dvcignore applies.
    """
    database = HashFileDB(LocalFileSystem(), str(path))
    _, _, hashed = build(database, str(path), database.fs, "md5", ignore=repo.dvcignore, dry_run=True)
    md5 = str(hashed.hash_info.value)
    if isinstance(hashed, Tree):
        return HashedPath(md5, {"/".join(key): str(info.value) for key, _, info in hashed})
    return HashedPath(md5, {"": md5})


def list_cached_files(cache: DvcCache, md5: str) -> dict[str, str] | None:
    """Return the files of an out, relative path to md5; for a file, only the empty string.

    None if the listing of a directory is not in DVC's cache, or is damaged.
    """
    return cache.list_files(md5) if is_directory_md5(md5) else {"": md5}


class StageRun(NamedTuple):
    """Replay of a stage in the clone."""

    entry: Entry
    """New entry in dvc.lock; empty if the stage did not run to its end."""
    problem: str
    """Why it did not; the empty string if it did."""
    seconds: float


class Clone:
    """A clean clone of a commit, to replay stages in."""

    def __init__(self, directory: Path, environment: dict[str, str]) -> None:
        self.directory = directory
        self.environment = environment
        """Environment variables for commands in the clone."""
        self.repo = Repo(str(directory), config={"core": {"site_cache_dir": environment["DVC_SITE_CACHE_DIR"]}})

    def list_stages(self) -> list[Any]:
        """Return the stages of dvc.yaml as DVC's objects, in DVC's order of execution."""
        stages = plan_repro(get_active_graph(self.repo.index.graph))
        return [stage for stage in stages if isinstance(stage, PipelineStage) and stage.path_in_repo == PROJECT_FILE]

    def list_uncached_outs(self) -> set[str]:
        """Return the outs that DVC leaves to git, such as metrics."""
        return {out.def_path for stage in self.list_stages() for out in stage.outs if not out.use_cache}

    def run_stage(self, stage: Any, command: Sequence[str] = _REPRO) -> StageRun:
        """Run a stage. Its output goes to stderr.

        Args:
            command: command of DVC; `dvc commit` records the outs that are in the clone instead of running the stage.
        """
        started = time.monotonic()
        missing = [dep.def_path for dep in stage.deps if not _exists(dep)]
        if missing:
            problem = f"its input {printable(missing[0])} is not available"
        elif stage.frozen:
            problem = "it is frozen (`dvc unfreeze`)"
        else:
            code = self.run_command([sys.executable, "-m", "dvc", *command, stage.name])
            problem = f"its command failed with exit code {code}; the message is above" if code else ""
        entry = {} if problem else self.read_lock().get(stage.name, {})
        return StageRun(entry, problem, time.monotonic() - started)

    def run_command(self, command: Sequence[str], env: dict[str, str] | None = None) -> int:
        """Run a command in the clone and return its exit code; if this process is interrupted, kill it.

        Args:
            env: its environment variables; None: `self.environment`.
        """
        process = subprocess.Popen(
            command, cwd=self.directory, env=env or self.environment, stdin=subprocess.DEVNULL, stdout=_STDERR
        )
        try:
            return process.wait()
        except BaseException:
            _kill_tree(process.pid)
            process.wait()
            raise

    def read_lock(self) -> dict[str, Entry]:
        """Return the entries of the stages that have run so far."""
        file = self.directory / LOCK
        return parse_mapping(file.read_text(encoding="utf-8")).get("stages", {}) if file.is_file() else {}


def _exists(dep: Any) -> bool:
    """Return True if a dependency exists, or if it is on the network, where only the stage can tell."""
    return dep.protocol != "local" or bool(dep.exists)


def _kill_tree(pid: int) -> None:
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        for descendant in [*process.children(recursive=True), process]:
            with contextlib.suppress(psutil.Error):
                descendant.kill()


@contextlib.contextmanager
def open_clone(repo: Repo, commit: str, lock: dict[str, Entry]) -> Iterator[Clone]:
    """Clone a commit of a repository into a temporary directory, which is removed at the end of the block.

    Args:
        lock: entries of dvc.lock at the commit; paths in them may lead out of the repository (`../text.jsonl`).

    Raises:
        StageError: if git fails, or if the commit is not a DVC repository.
        DvcException: if DVC cannot open it.
    """
    _remove_abandoned_clones()
    with _make_temporary_directory() as root:
        # A path `../text.jsonl` of the clone is inside `root` as well.
        depth = max((_count_parents(item["path"]) for item in _list_items(lock, "deps")), default=0)
        directory = root.joinpath(*["parent"] * depth, "clone")
        directory.parent.mkdir(parents=True, exist_ok=True)
        environment = _build_environment(root)
        # Only a shared clone also has the commits of experiments, which are on no branch.
        clone = ["clone", "--quiet", "--shared", "--no-checkout", str(repo.root_dir), str(directory)]
        for command in (clone, ["-C", str(directory), "checkout", "--quiet", "--detach", commit]):
            done = subprocess.run(["git", *command], env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                reason = (done.stderr.strip() or "failed").splitlines()[-1]
                raise StageError(f"git {command[-1] if command is clone else 'checkout'}: {printable(reason)}")
        if not (directory / ".dvc").is_dir():
            raise StageError(f"commit {commit[:7]} has no directory .dvc")
        (directory / LOCK).unlink()
        (directory / ".dvc/config.local").write_text("[cache]\n    dir = cache\n", encoding="utf-8")
        yield Clone(directory, environment)


@contextlib.contextmanager
def _make_temporary_directory() -> Iterator[Path]:
    """Create a directory that is locked while this process runs, and remove it at the end of the block."""
    root = Path(tempfile.mkdtemp(prefix=_PREFIX)).resolve()
    handle = os.open(root, os.O_RDONLY)
    try:
        lock_handle(handle)
        yield root
    finally:
        os.close(handle)
        shutil.rmtree(root, ignore_errors=True)


def _remove_abandoned_clones() -> None:
    """Remove the directories of earlier processes that were killed by SIGKILL."""
    for abandoned in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            handle = os.open(abandoned, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                lock_handle(handle)
                shutil.rmtree(abandoned)
            finally:
                os.close(handle)


def _build_environment(root: Path) -> dict[str, str]:
    """Return the environment for commands in the clone: this Python, and caches below `root`."""
    # git's own variables (GIT_DIR, ...) are set in hooks, and would lead back to the workspace.
    local = subprocess.run(["git", "rev-parse", "--local-env-vars"], capture_output=True, text=True, check=False).stdout
    dropped = {*local.split(), *_DROPPED_VARIABLES}
    return {
        **{name: value for name, value in os.environ.items() if name not in dropped},
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "DVC_SITE_CACHE_DIR": str(root / "dvc"),
        "LM_REPRO_CACHE": str(root / "cache"),
        "LM_REPRO_BRANCHES": str(root / "branches"),  # also if keep_for_branches.directory is set
    }


def _count_parents(path: str) -> int:
    """Return the number of `..` at the beginning of a path."""
    parts = PurePath(os.path.normpath(path)).parts
    return next((number for number, part in enumerate(parts) if part != ".."), len(parts))


# -- inputs that no stage writes ---------------------------------------------------------------------------------------


def provide_inputs(clone: Clone, repo: Repo, lock: dict[str, Entry]) -> Iterator[str]:
    """Copy the inputs that neither git nor a stage of the clone has; yield those that are not found as in dvc.lock.

    These are files of data.path that git ignores or that DVC tracks, and models of earlier commits that a
    configuration pins by their md5 sum. Absolute paths and URLs are read by the stages themselves.

    Args:
        repo: the repository of the workspace, which has them in its working tree or in DVC's cache.
        lock: entries of dvc.lock at the commit.
    """
    cache = DvcCache(repo)
    outs = [PurePath(item["path"]) for item in _list_items(lock, "outs")]
    for path, md5 in {item["path"]: item.get("md5") for item in _list_items(lock, "deps")}.items():
        place, here = clone.directory / path, Path(repo.root_dir, path)
        written = any(PurePath(path).is_relative_to(out) or out.is_relative_to(path) for out in outs)
        if written or md5 is None or "://" in path or Path(path).is_absolute() or place.exists():
            continue
        if here.exists() and hash_path(repo, here).md5 == md5:
            _copy_path(here, place)
        elif not restore_path(cache, md5, place):
            found = "differs from it in the workspace" if here.exists() else "is neither in git nor in the workspace"
            yield f"{printable(path)}: its md5 in dvc.lock is {md5}, but it {found}, and DVC's cache does not have it"
            continue
        if hash_path(clone.repo, place).md5 != md5:  # a damaged file in the cache
            _remove_path(place)
            yield f"{printable(path)}: its copy in DVC's cache is damaged"
    own = DvcCache(clone.repo)
    for md5 in dict.fromkeys(_find_pinned_models(lock)):
        files = list_cached_files(cache, md5) or {}
        for name in dict.fromkeys([md5, *files.values()]):  # a stage compares them with their md5 sums
            if cache.get_path(name).is_file():
                _copy_path(cache.get_path(name), own.get_path(name))


def restore_path(cache: DvcCache, md5: str, place: Path) -> bool:
    """Copy a file or directory from DVC's cache to `place`; return False if the cache does not have all of it."""
    files = list_cached_files(cache, md5)
    if files is None or not all(cache.get_path(file_md5).is_file() for file_md5 in files.values()):
        return False
    for name, file_md5 in files.items():
        _copy_path(cache.get_path(file_md5), place / name)
    return True


def _copy_path(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, copy_function=shutil.copyfile)
    else:
        shutil.copyfile(source, target)


def _remove_path(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _list_items(lock: dict[str, Entry], section: str) -> Iterator[dict[str, Any]]:
    for entry in lock.values():
        yield from entry.get(section) or []


def _find_pinned_models(value: Any) -> Iterator[str]:
    """Yield the md5 sums of the models that values of dvc.lock pin (see stages.core.pins.TrainedModel)."""
    if isinstance(value, dict):
        if {"rev", "task", "md5"} <= value.keys() and isinstance(value["md5"], str):
            yield value["md5"]
        for item in value.values():
            yield from _find_pinned_models(item)
    elif isinstance(value, list):
        for item in value:
            yield from _find_pinned_models(item)
