"""Verify a commit by replay: run its stages again in a clean clone, and compare the results with its dvc.lock.

Command python -m tools.verify [COMMIT] [--all | --segments N [--seed SEED]] [--statement FILE]

Nothing is taken from DVC's cache or from checkpoints of earlier runs, and the workspace is not touched. The commands of
the commit are executed: only verify commits that you would run. With --segments, not all steps of the trainings are
replayed, but N random segments between kept checkpoints (docs/verify.md).

The exit code is 0 if everything was verified. The statement in reports/verify/COMMIT.json says what was.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dvc.exceptions import DvcException
from dvc.repo import Repo

from stages.core.artifacts import check_output_path, read_json, write_json
from stages.core.dvc_cache import DvcCache
from stages.core.errors import StageError, printable, printable_lines
from stages.shell.app import format_error
from stages.shell.interruption import Interrupted, end_on_signals
from tools.lock_history import Entry, list_changed_files, parse_mapping, read_lock_at, resolve_revision
from tools.verify.replay import hash_path, list_cached_files, open_clone, provide_inputs
from tools.verify.report import Verification, describe_verification, list_processors, make_statement
from tools.verify.stages import TrainingVerifier, log, verify_stages
from tools.verify.statement import get_statement_path
from tools.verify.training import make_training_verifier


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], prog="python -m tools.verify")
    parser.add_argument("commit", nargs="?", default="HEAD", help="commit, tag or experiment (default: HEAD)")
    method = parser.add_mutually_exclusive_group()
    method.add_argument("--all", action="store_true", help="replay every stage (default)")
    method.add_argument("--segments", type=int, metavar="N", help="of a training, only replay N random segments")
    parser.add_argument("--seed", type=int, help="choose the same segments as a verification that printed this seed")
    parser.add_argument("--statement", type=Path, metavar="FILE", help="default: reports/verify/COMMIT.json")
    arguments = parser.parse_args()
    if arguments.segments is not None and arguments.segments < 1:
        parser.error("--segments: a whole number from 1")
    if arguments.seed is not None and arguments.segments is None:
        parser.error("--seed chooses segments: add --segments N")
    verify_training = None
    if arguments.segments is not None:
        verify_training = make_training_verifier(arguments.segments, arguments.seed)
    try:
        end_on_signals()
        sys.exit(run_verification(arguments.commit, arguments.statement, verify_training))
    except Interrupted as interrupted:
        sys.exit(interrupted.exit_code)
    except Exception as error:
        if os.environ.get("LM_REPRO_DEBUG") == "1":
            raise
        sys.exit(printable_lines(f"verify: error: {format_error(error)}"))


def run_verification(rev: str, statement: Path | None, verify_training: TrainingVerifier | None) -> int:
    """Verify a commit, print the result, write the statement, and return the exit code.

    Raises:
        StageError: if the current directory is not in a DVC repository, or the commit cannot be verified.
    """
    if statement is not None:
        statement = statement.absolute()
        check_output_path(statement)  # before the replay, which may take hours
    try:
        repo = Repo()
    except DvcException as error:
        raise StageError(str(error)) from None
    with repo:
        os.chdir(repo.root_dir)
        verification = verify_commit(repo, rev, verify_training)
        file = statement or get_statement_path(verification.commit)
        write_json(file, make_statement(verification))
    print(printable_lines("\n".join(describe_verification(verification))))
    print(f"\nStatement (in-toto, not signed): {printable(file)}")
    return 0 if verification.verified else 1


def verify_commit(repo: Repo, rev: str, verify_training: TrainingVerifier | None = None) -> Verification:
    """Replay the stages of a commit in a clean clone, and compare the results with its dvc.lock.

    Args:
        repo: the repository of the workspace.
        verify_training: verifies a part of a training; None: trainings are replayed like the other stages.

    Raises:
        StageError: if there is no such commit, or if it has no valid dvc.lock.
    """
    started = datetime.now(UTC)
    commit = find_commit(repo, rev)
    text = read_lock_at(commit)
    lock = parse_lock(text, commit)
    environment_differences = list(find_environment_differences(repo, lock))
    for message in (*list_notes(repo, commit), *(f"warning: {warning}" for warning in environment_differences)):
        log(message)
    try:
        with open_clone(repo, commit, lock) as clone:
            missing = list(provide_inputs(clone, repo, lock))
            for problem in missing:
                log(f"warning: {problem}")
            stages = list(verify_stages(clone, repo, lock, verify_training))
    except DvcException as error:
        raise StageError(f"DVC cannot read the stages of commit {commit[:7]}: {printable(error)}") from None
    return Verification(commit, text, stages, missing, environment_differences, started, datetime.now(UTC))


def find_commit(repo: Repo, rev: str) -> str:
    """Return the hash of a commit, of the commit of a tag, or of an experiment.

    Raises:
        StageError: if git knows none.
    """
    try:
        return str(repo.scm.resolve_commit(resolve_revision(repo, rev)).hexsha)
    except ValueError as error:
        raise StageError(str(error)) from None


def parse_lock(text: str, commit: str) -> dict[str, Entry]:
    """Return the entries of dvc.lock at a commit.

    Raises:
        StageError: if there are none, or if one is not in DVC's format.
    """
    lock = parse_mapping(text).get("stages")
    if not isinstance(lock, dict) or not lock:
        reason = "its dvc.lock has no stages" if text else "it has no dvc.lock"
        raise StageError(
            f"commit {commit[:7]} claims no results: {reason}; run `dvc repro`, and commit dvc.lock and metrics/"
        )
    for name, entry in lock.items():
        if not _is_entry(entry):
            raise StageError(f"dvc.lock of commit {commit[:7]} is damaged: {printable(name)} is no entry of a stage")
    return lock


def _is_entry(entry: Any) -> bool:
    """Return True if a value has the structure of an entry of dvc.lock."""
    if not isinstance(entry, dict):
        return False
    params, sections = entry.get("params") or {}, [entry.get(section) or [] for section in ("deps", "outs")]
    return (
        isinstance(params, dict)
        and all(isinstance(values, dict) for values in params.values())
        and all(isinstance(items, list) for items in sections)
        and all(isinstance(item, dict) and isinstance(item.get("path"), str) for items in sections for item in items)
    )


def list_notes(repo: Repo, commit: str) -> Iterator[str]:
    """Yield the first messages: the commit, and that changes of the workspace are not verified."""
    yield f"commit {commit[:7]} is replayed in a temporary clone"
    if (head := find_commit(repo, "HEAD")) != commit:
        yield f"the workspace is at another commit, {head[:7]}, which is not verified"
    if changed := list_changed_files("."):
        names = ", ".join(map(printable, changed[:3])) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
        yield f"the workspace has changes that are not committed ({names}), which are not verified"


def find_environment_differences(repo: Repo, lock: dict[str, Entry]) -> Iterator[str]:
    """Yield how this environment differs from the one in the ledgers of a commit's artifacts: versions and processor.

    The ledgers are read from DVC's cache. Those that it does not have are not compared.
    """
    from tools.check import compare_versions  # imports the stages

    cache = DvcCache(repo)
    ledgers = {}
    for item in (item for entry in lock.values() for item in entry.get("outs") or []):
        md5 = (list_cached_files(cache, str(item.get("md5", ""))) or {}).get("stats.json")
        if md5 and (file := cache.get_path(md5)).is_file() and hash_path(repo, file).md5 == md5:
            ledgers[item["path"]] = file
    for path, library, used, installed in compare_versions(ledgers):
        yield f"{printable(path)} was made with {library} {used}, but {installed} is installed: results may differ"
    for path, ledger in ledgers.items():
        processor = read_json(ledger).get("processor")
        if processor is not None and processor not in (found := list_processors()):
            yield f"{printable(path)} was made on {printable(processor)}, this is {found[-1]}: last digits may differ"
