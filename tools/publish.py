"""Publish a trained model on the Hugging Face Hub, with its tokenizer and a card that documents how it was made.

Command python -m tools.publish causal [--dry-run [FILE]]

conf/publish.yaml sets the repository of each task. The card is written from git and dvc.lock, so publishing is refused
while the workspace differs from them. It is also refused if the model gives away more of its training text than the
limits in conf/publish.yaml allow (tools/leaks/). It is not a stage, because it has a side effect.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit, urlunsplit

import yaml
from pydantic import Field

from stages.core.artifacts import write_text
from stages.core.compose import Params, find_forbidden_values
from stages.core.config import CONF, config_section, read_yaml, suggest_name, validate_values
from stages.core.errors import ConfigError, StageError, format_cause, printable_lines
from stages.hub.client import find_hub_problem
from stages.hub.files import CONVERT_HINT, PICKLE_SUFFIXES
from stages.shell.app import format_error
from tools.card import RecordedRun, make_card
from tools.check import explain_dvc_error
from tools.keys import list_keys
from tools.leaks.report import (
    LeakLimits,
    explain_refusal,
    read_report,
    render_memorization_section,
)
from tools.verify.statement import PUBLISHED_NAME, get_statement_path, is_passed, read_statement

# Paths that must be as in HEAD, in addition to the files in dvc.lock. conf/publish.yaml does not affect the model.
TRACKED_PATHS = ("dvc.yaml", "dvc.lock", "params.yaml", "stages", "conf", "metrics", ":(exclude)conf/publish.yaml")
# Files of an earlier model on the Hub that would be loaded together with the new ones. Files that users added stay.
STALE_SUFFIXES = (".safetensors", ".json", ".txt", ".model", *PICKLE_SUFFIXES)
TOKENS_URL = "https://huggingface.co/settings/tokens"


@config_section
class Publication:
    """Section of a task in conf/publish.yaml."""

    repository: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")] | None
    """OWNER/NAME on the Hub; null if the task cannot be published yet."""
    license: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.+-]*$")] | None
    """License identifier of the Hub; null if none is chosen, which the card says."""
    language: str | list[str] | None
    """Language code or codes of the text."""
    private: bool
    """If True, a new repository is private, and publishing to an existing public one is refused."""
    leaks: LeakLimits


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], prog="python -m tools.publish")
    parser.add_argument("task", help="a task of params.yaml")
    parser.add_argument(
        "--dry-run",
        nargs="?",
        type=Path,
        const=Path("reports/cards/TASK.md"),
        metavar="FILE",
        help="write the card for review without publishing (default: reports/cards/TASK.md)",
    )
    arguments = parser.parse_args()
    try:
        publish_model(arguments.task, arguments.dry_run)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if os.environ.get("LM_REPRO_DEBUG") == "1":
            raise
        sys.exit(printable_lines(f"publish: error: {format_error(error)}"))


def publish_model(task: str, dry_run: Path | None) -> None:
    settings = read_publication(task)
    if settings.repository is None and dry_run is None:
        raise StageError(
            f"conf/publish.yaml: {task}.repository is null: write OWNER/NAME, the repository on the Hub to publish to"
            " (`--dry-run` writes the card without it)"
        )
    run, files = read_recorded_run(task)
    language = [settings.language] if isinstance(settings.language, str) else settings.language
    report = read_or_make_report(run, settings.leaks)
    memorization = render_memorization_section(report, settings.leaks)
    card = make_card(run, settings.repository, settings.license, language, memorization)
    refusal = explain_refusal(report, settings.leaks) if report is not None else ""
    if refusal and dry_run is None:
        raise StageError(refusal)
    if settings.license is None:
        print(f"publish: no license is chosen (conf/publish.yaml: {task}.license); the card says so", file=sys.stderr)
    if not run_git("branch", "--remotes", "--contains", run.commit):
        print(
            f"publish: commit {run.commit[:7]}, which the card names, is not on a remote yet: `git push`",
            file=sys.stderr,
        )
    if dry_run is not None:
        file = dry_run.with_name(dry_run.name.replace("TASK", task))
        write_text(file, str(card))
        published = [*files, *find_statement(run.commit)]
        print(f"{file}: the card, for review; these files would be published with it: {', '.join(published)}")
        if refusal:
            print(f"publish: would be refused: {refusal}", file=sys.stderr)
        return
    print(f"published at {upload_model(settings, card, Path(f'models/{task}'), files, run)}")


def read_or_make_report(run: RecordedRun, limits: LeakLimits) -> dict[str, Any] | None:
    """Return the leak report on the model of a run, which is examined if there is no report on it.

    Returns None if there is neither a report nor a limit.
    """
    report, reason = read_report(run.task, run.stages, limits)
    if report is None and limits.has_limits:
        print(f"publish: {reason}: examining models/{run.task} (`python -m tools.leaks {run.task}`)", file=sys.stderr)
        from tools.leaks.command import examine_task  # imports torch, and this module

        return examine_task(run.task, limits)
    return report


def read_publication(task: str) -> Publication:
    """Read the section of `task` in conf/publish.yaml.

    Raises:
        StageError: if the task does not exist, has no section, or a value is invalid.
    """
    tasks, sections = Params().list_items("task"), read_yaml(CONF / "publish.yaml")
    if task not in tasks:
        raise StageError(f"{task} is not a task of params.yaml: {suggest_name(task, tasks)}")
    if not isinstance(sections.get(task), dict):
        keys = ", ".join(key.name for key in list_keys(Publication))
        raise StageError(f"conf/publish.yaml has no section {task}: add `{task}:` with the keys {keys}")
    if problems := list(find_forbidden_values(sections[task], task)):
        raise ConfigError([f"conf/publish.yaml: {problem}" for problem in problems])
    try:
        return validate_values(Publication, sections[task], "conf/publish.yaml")
    except ConfigError as error:
        raise ConfigError([f"conf/publish.yaml: {task}.{problem}" for problem in error.problems]) from None


# -- the record of the run ---------------------------------------------------------------------------------------------


def read_recorded_run(task: str) -> tuple[RecordedRun, list[str]]:
    """Read the record of the workspace's model from git and dvc.lock, and the names of its files.

    Raises:
        StageError: if the workspace differs from git or dvc.lock; the message lists the differences.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    commit = run_git("rev-parse", "--verify", "HEAD")
    last = [f"evaluate@{task}"]
    try:
        with Repo() as repo:
            last += [stage.addressing for stage in repo.index.stages if stage.addressing == f"score@{task}"]
            changed = repo.status(last, with_deps=True)
            collected = [stage for name in last for stage in repo.stage.collect(name, with_deps=True)]
            names = list(dict.fromkeys(stage.addressing for stage in collected))
            model = next(out for out in repo.stage.collect(f"train@{task}")[0].outs if out.def_path == f"models/{task}")
            listing = model.get_obj()
            dvc_remote = bool(repo.config.read("repo").get("core", {}).get("remote"))
    except DvcException as error:
        raise StageError(explain_dvc_error(error)) from None
    order = list(yaml.safe_load(Path("dvc.yaml").read_text(encoding="utf-8"))["stages"])
    names.sort(key=lambda name: order.index(name.partition("@")[0]))  # DVC's own order varies
    if changed:
        raise StageError(
            "the workspace differs from dvc.lock, so the card would be wrong: "
            + "; ".join(f"{name}: {', '.join(list_differences(changed[name]))}" for name in names if name in changed)
            + f"\n  `dvc repro {' '.join(last)}` brings dvc.lock up to date (`dvc checkout` restores files changed by"
            " hand); then commit"
        )
    locked = yaml.safe_load(Path("dvc.lock").read_text(encoding="utf-8"))["stages"]
    stages = {name: locked[name] for name in names}
    check_committed(stages)
    if listing is None:
        raise StageError(f"DVC's cache lacks the listing of models/{task}: run `dvc commit --force train@{task}`")
    files = ["/".join(key) for key, _, _ in listing]
    if pickles := [name for name in files if Path(name).suffix in PICKLE_SUFFIXES]:
        raise StageError(f"models/{task}/{pickles[0]} is never published: {CONVERT_HINT}")
    path = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))["data"]["path"]
    return RecordedRun(task, commit, find_public_remote(), stages, is_in_git(path), dvc_remote), sorted(files)


def list_differences(items: list[Any]) -> list[str]:
    """Format the output of `dvc status` for a stage: `stages/train/stage.py modified`, `changed command`."""
    found = []
    for item in items:
        for change, paths in item.items() if isinstance(item, dict) else [(item, {})]:
            found += [
                f"{path} {how if isinstance(how, str) else ' '.join(how) + ' changed'}" for path, how in paths.items()
            ]
            found += [] if paths else [change]
    return found


def check_committed(stages: dict[str, Any]) -> None:
    """Raise StageError unless HEAD has the code, configuration, metrics and text that `stages` depend on."""
    outs = {out["path"] for stage in stages.values() for out in stage["outs"]}
    deps = {dep["path"] for stage in stages.values() for dep in stage["deps"]} - outs
    params = {file for stage in stages.values() for file in stage.get("params", {})}
    here = sorted(path for path in deps | params if is_in_repository(path))
    changed = run_git("diff", "--name-only", "HEAD", "--", *TRACKED_PATHS, *here).splitlines()
    code = [path for path in here if path == "stages" or path.startswith("conf/")]
    tracked = [Path(file) for file in run_git("ls-files").splitlines()]
    known = {path.as_posix() for file in tracked for path in (file, *file.parents)}  # a package can be a dependency
    changed += sorted({*code, "dvc.yaml", "dvc.lock", "params.yaml"} - known)
    changed += run_git("ls-files", "--others", "--exclude-standard", "--", *code).splitlines()
    if changed:
        raise StageError(
            f"not committed as in the workspace: {', '.join(dict.fromkeys(changed))}: the card names a commit, which"
            " must contain everything that made the model: commit them (or `git restore` them)"
        )


def is_in_repository(path: str) -> bool:
    """Return True if `path` is in the repository, not elsewhere on this machine or on the network."""
    return "://" not in path and Path(path).resolve().is_relative_to(Path.cwd().resolve())


def is_in_git(path: str) -> bool:
    """Return True if git tracks the file or the whole directory `path`."""
    return (
        is_in_repository(path)
        and bool(run_git("ls-files", "--", path))
        and not run_git("ls-files", "--others", "--", path)
    )


def find_public_remote() -> str | None:
    """Return the URL from which others can clone, without credentials; None if there is none."""
    remotes = run_git("remote").splitlines()
    if not remotes:
        return None
    url = run_git("remote", "get-url", "origin" if "origin" in remotes else remotes[0])
    parts = urlsplit(url)
    if parts.scheme in ("http", "https", "ssh", "git"):
        user = "git@" if parts.scheme == "ssh" and parts.username == "git" else ""
        return urlunsplit((parts.scheme, user + parts.netloc.rpartition("@")[2], parts.path, "", ""))
    return url if url.startswith("git@") else None  # others cannot clone from a path on this machine


def run_git(*arguments: str) -> str:
    """Run git and return its output.

    Raises:
        StageError: if git fails.
    """
    done = subprocess.run(["git", "-c", "core.quotePath=off", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise StageError(f"git {arguments[0]}: {(done.stderr.strip() or 'failed').splitlines()[0]}")
    return done.stdout.strip()


# -- to the Hub --------------------------------------------------------------------------------------------------------


def upload_model(settings: Publication, card: Any, directory: Path, files: list[str], run: RecordedRun) -> str:
    """Upload `files` of `directory`, the card and the statement of tools.verify in one commit; return the URL.

    Raises:
        StageError: if the Hub cannot be reached or refuses the upload.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError

    name = str(settings.repository)
    published = {file: directory / file for file in files} | find_statement(run.commit)
    if get_token() is None:
        raise StageError(f"the Hub requires a login: run `hf auth login`, or set HF_TOKEN to a token of {TOKENS_URL}")
    if unreachable := find_hub_problem():
        raise StageError(f"the Hub cannot be reached: {unreachable}\n  Nothing was published; try again when it can")
    try:
        card.validate()
        api = HfApi()
        api.create_repo(name, private=settings.private, exist_ok=True)
        there = api.model_info(name)
        if settings.private and not there.private:
            raise StageError(
                f"{name} exists and is public, but conf/publish.yaml says private: true: make it private on the Hub, or"
                f" set {run.task}.private: false"
            )
        present = {sibling.rfilename for sibling in there.siblings or []}
        stale = sorted(
            file for file in present - published.keys() if "/" not in file and Path(file).suffix in STALE_SUFFIXES
        )
        api.create_commit(
            name,
            [
                CommitOperationAdd("README.md", str(card).encode()),
                *(CommitOperationAdd(file, path) for file, path in published.items()),
                *(CommitOperationDelete(file) for file in stale),
            ],
            commit_message=f"{run.task} of lm-repro commit {run.commit[:7]}",
        )
    except StageError:
        raise
    except HfHubHTTPError as error:
        raise StageError(describe_refusal(name, error)) from None
    except ValueError as error:  # the Hub's message; nearly always about the card's metadata
        raise StageError(f"the Hub refuses {name} (see conf/publish.yaml): {format_cause(error)}") from None
    except Exception as error:  # the HTTP libraries have different errors
        cause = error.__cause__ or error
        raise StageError(
            f"publishing was interrupted ({type(cause).__name__}: {format_cause(cause)})\n  Run it again: files that"
            " are already there are not sent twice, and the model changes in one commit or not at all"
        ) from None
    if stale:
        print(f"deleted from the repository, left from an earlier model: {', '.join(stale)}")
    return f"{constants.ENDPOINT}/{name}"


def find_statement(commit: str) -> dict[str, Path]:
    """Return the published name and the path of the statement that a commit was verified; empty if there is none.

    Statements on failed verifications are not published, since they may contain local paths.
    """
    statement = read_statement(commit)
    return {PUBLISHED_NAME: get_statement_path(commit)} if statement is not None and is_passed(statement) else {}


def describe_refusal(name: str, error: Any) -> str:
    """Describe why the Hub refused an upload, and the remedy."""
    status = error.response.status_code if error.response is not None else None
    if status == 401:
        return f"the Hub rejected the token (401): run `hf auth login`, or set HF_TOKEN to a token of {TOKENS_URL}"
    if status == 403:
        return (
            f"the token cannot write to {name} (403): give it write access to {name.partition('/')[0]} ({TOKENS_URL}),"
            " or name another repository in conf/publish.yaml"
        )
    return f"the Hub refuses {name} ({status}): {(error.server_message or str(error)).strip().splitlines()[0]}"


if __name__ == "__main__":
    main()
