"""Verification of the stages of a commit: each is replayed, and compared with dvc.lock, git and copies on disk."""

import enum
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from dvc.fs import LocalFileSystem
from dvc.repo import Repo

from stages.core.artifacts import compute_sha256
from stages.core.dvc_cache import DvcCache
from stages.core.errors import printable, printable_lines
from tools.lock_history import Entry, parse_mapping, read_lock
from tools.verify.compare import (
    Difference,
    MetricChange,
    check_copies,
    compare_entries,
    compare_numbers,
    describe_file_changes,
    find_metric_changes,
)
from tools.verify.replay import Clone, StageRun, hash_path, list_cached_files, restore_path
from tools.verify.segments import SegmentsResult

TrainingVerifier = Callable[[Clone, str], SegmentsResult]
"""Replays segments of the training of a stage, whose outs are in the clone: `verifier(clone, "train@causal")`."""


class Verdict(enum.Enum):
    VERIFIED = "verified"
    DIFFERS = "differs"
    NOT_REPLAYED = "not replayed"


class StageResult(NamedTuple):
    """Result of the verification of a stage."""

    name: str
    verdict: Verdict
    seconds: float
    problem: str
    """Why the stage was not replayed; the empty string if it was."""
    differences: list[Difference]
    metric_changes: list[MetricChange]
    outs: dict[str, str]
    """Outs in dvc.lock of the commit, path to md5."""
    files: dict[str, str]
    """Files of the outs, path to hexadecimal SHA-256; empty unless the stage is verified."""
    segments: SegmentsResult | None = None
    """Replayed segments of a training; None if the stage was replayed as a whole."""


def log(message: str) -> None:
    """Print a message about the progress to stderr, above the output of the stages."""
    print(printable_lines(f"verify: {message}"), file=sys.stderr, flush=True)


def verify_stages(
    clone: Clone, repo: Repo, lock: dict[str, Entry], verify_training: TrainingVerifier | None
) -> Iterator[StageResult]:
    """Replay and compare the stages one after the other.

    Args:
        repo: the repository of the workspace.
        lock: entries of dvc.lock at the commit.
        verify_training: verifies a part of a training; None: trainings are replayed like the other stages.
    """
    current = parse_mapping(read_lock()).get("stages")
    in_workspace = current if isinstance(current, dict) else {}
    stages = clone.list_stages()
    names = [stage.name for stage in stages]
    for number, (name, stage) in enumerate(zip(names, stages, strict=True), 1):
        log(f"stage {number} of {len(stages)}: {printable(name)}")
        claimed = lock.get(name, {})
        copies = list(check_copies(repo, claimed, in_workspace.get(name) or {}))
        if verify_training is None or name.partition("@")[0] != "train" or not claimed:
            yield compare_stage(clone, repo, name, claimed, clone.run_stage(stage), copies)
            continue
        problem = restore_outs(clone, repo, claimed)
        run = clone.run_stage(stage, ["commit", "--quiet", "--force"]) if not problem else StageRun({}, problem, 0.0)
        result = compare_stage(clone, repo, name, claimed, run, copies)
        yield add_segments(result, verify_training(clone, name)) if not run.problem else result
    for name in [name for name in lock if name not in names]:
        copies = list(check_copies(repo, lock[name], in_workspace.get(name) or {}))
        problem = "dvc.yaml has no such stage: delete its entry from dvc.lock"
        yield StageResult(name, Verdict.NOT_REPLAYED, 0.0, problem, copies, [], _get_outs(lock[name]), {})


def restore_outs(clone: Clone, repo: Repo, claimed: Entry) -> str:
    """Copy the outs of a stage from DVC's cache to the clone; return why not, or the empty string."""
    for path, md5 in _get_outs(claimed).items():
        if not restore_path(DvcCache(repo), md5, clone.directory / path):
            return f"{printable(path)} ({md5}) is not in DVC's cache: run `dvc pull`, or verify with --all"
    return ""


def add_segments(result: StageResult, segments: SegmentsResult) -> StageResult:
    """Add the result of the replayed segments to that of the stage's entry in dvc.lock."""
    verdict = result.verdict
    if segments.differs:
        verdict = Verdict.DIFFERS
    elif not segments.verified and verdict is Verdict.VERIFIED:
        verdict = Verdict.NOT_REPLAYED
    # The curves of the other segments were not computed again.
    files = {path: sha256 for path, sha256 in result.files.items() if not path.startswith("reports/")}
    if verdict is not Verdict.VERIFIED:
        files = {}
    seconds = result.seconds + segments.seconds
    return result._replace(verdict=verdict, problem=segments.problem, files=files, seconds=seconds, segments=segments)


def compare_stage(
    clone: Clone, repo: Repo, name: str, claimed: Entry, run: StageRun, copies: list[Difference]
) -> StageResult:
    """Compare the replay of a stage with its entry in dvc.lock and with the files in git.

    Args:
        claimed: its entry at the commit; empty if there is none.
        copies: differences of the files on this machine.
    """
    outs = _get_outs(claimed)
    problem = run.problem if claimed else "dvc.lock has no entry of it: run `dvc repro`, and commit dvc.lock"
    if problem:
        return StageResult(name, Verdict.NOT_REPLAYED, run.seconds, problem, copies, [], outs, {})
    differences: list[Difference] = []
    changes: list[MetricChange] = []
    cache, replayed = DvcCache(repo), _get_outs(run.entry)
    for difference in compare_entries(claimed, run.entry):
        path = difference.path
        if difference.kind == "outs" and path in outs and path in replayed:
            hashed = hash_path(clone.repo, clone.directory / path)
            changes += find_metric_changes(cache, path, outs[path], clone.directory / path, hashed)
            old = list_cached_files(cache, outs[path]) or {"": ""}
            if "" not in old and (described := describe_file_changes(old, hashed.files)):
                difference = difference._replace(description=described)
        differences.append(difference)
    for path, before, after in find_changed_git_files(clone, [*replayed]):
        description = "the committed file is not the one that the stage writes"
        differences.append(Difference("git", path, description if before is not None else "it was not committed"))
        changes += compare_numbers(path, before or b"", after)
    differences += copies
    changes = list({(change.path, change.key): change for change in changes}.values())
    if differences:
        return StageResult(name, Verdict.DIFFERS, run.seconds, "", differences, changes, outs, {})
    files = {path: sha256 for out in outs for path, sha256 in hash_files(clone, out)}
    return StageResult(name, Verdict.VERIFIED, run.seconds, "", [], [], outs, files)


def _get_outs(entry: Entry) -> dict[str, str]:
    return {item["path"]: str(item.get("md5", "")) for item in entry.get("outs") or []}


def find_changed_git_files(clone: Clone, outs: list[str]) -> Iterator[tuple[str, bytes | None, bytes]]:
    """Yield path, committed content (None: no file) and replayed content of the files that differ from those in git.

    Args:
        outs: outs of the replayed stage.
    """
    if not outs:
        return
    git = ["git", "--literal-pathspecs", "-C", str(clone.directory)]

    def read(*command: str) -> bytes:
        return subprocess.run([*git, *command], env=clone.environment, capture_output=True, check=True).stdout

    def list_paths(*command: str) -> list[str]:
        return [path for path in read(*command).decode().split("\0") if path]

    for path in list_paths("diff", "--name-only", "-z", "HEAD", "--", *outs):
        file = clone.directory / path
        yield path, read("show", f"HEAD:{path}"), file.read_bytes() if file.is_file() else b""
    if uncached := clone.list_uncached_outs().intersection(outs):
        for path in list_paths("ls-files", "--others", "-z", "--", *sorted(uncached)):
            yield path, None, (clone.directory / path).read_bytes()


def hash_files(clone: Clone, out: str) -> Iterator[tuple[str, str]]:
    """Yield path and hexadecimal SHA-256 of each file of an out."""
    path = clone.directory / out
    files = [path] if path.is_file() else map(Path, clone.repo.dvcignore.find(LocalFileSystem(), str(path)))
    for file in sorted(files):
        yield file.relative_to(clone.directory).as_posix(), compute_sha256(file).removeprefix("sha256:")
