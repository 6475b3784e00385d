"""Publish a trained model, its tokenizer and a card that says how it came to be on the Hugging Face Hub.

Command python -m tools.publish causal [--dry-run [FILE]]

conf/publish.yaml names the repository of each task. The card is written from git and dvc.lock, so publishing is refused
while the workspace differs from them. Not a stage: it has a side effect.
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
from stages.core.compose import Params, forbidden_values
from stages.core.config import CONF, nearest, read_yaml, validate, whole
from stages.core.errors import ConfigError, StageError, printable_lines
from stages.hub.client import hub_unreachable
from stages.hub.files import CONVERT, PICKLES
from stages.shell.app import describe_error
from stages.shell.keys import keys_of
from tools.card import RecordedRun, make_card
from tools.check import dvc_problem

# What must be as in HEAD, in addition to the files that dvc.lock names. conf/publish.yaml does not affect the model.
DESCRIBING = ("dvc.yaml", "dvc.lock", "params.yaml", "stages", "conf", "metrics", ":(exclude)conf/publish.yaml")
# What of an earlier model at the Hub would be read beside this one; what a user added there stays.
STALE = (".safetensors", ".json", ".txt", ".model", *PICKLES)
TOKENS = "https://huggingface.co/settings/tokens"


@whole
class Publication:
    """What conf/publish.yaml says of a task."""

    repository: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")] | None
    """OWNER/NAME on the Hub; null: it cannot be published yet."""
    license: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.+-]*$")] | None
    """The Hub's identifier of a license; null: none is chosen, and the card says so."""
    language: str | list[str] | None
    """Code or codes of the text's language."""
    private: bool
    """Of a repository that is created; a public one that is there is refused if true."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], prog="python -m tools.publish")
    parser.add_argument("task", help="a task of params.yaml")
    parser.add_argument(
        "--dry-run",
        nargs="?",
        type=Path,
        const=Path("reports/cards/TASK.md"),
        metavar="FILE",
        help="write the card for review, publish nothing (default: reports/cards/TASK.md)",
    )
    arguments = parser.parse_args()
    try:
        publish(arguments.task, arguments.dry_run)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if os.environ.get("LM_REPRO_DEBUG") == "1":
            raise
        sys.exit(printable_lines(f"publish: error: {describe_error(error)}"))


def publish(task: str, dry_run: Path | None) -> None:
    settings = publication(task)
    if settings.repository is None and dry_run is None:
        raise StageError(
            f"conf/publish.yaml: {task}.repository is null: write OWNER/NAME, the repository on the Hub to publish to"
            " (`--dry-run` writes the card without)"
        )
    run, files = recorded_run(task)
    language = [settings.language] if isinstance(settings.language, str) else settings.language
    card = make_card(run, settings.repository, settings.license, language)
    if settings.license is None:
        print(f"publish: no license is chosen (conf/publish.yaml: {task}.license); the card says so", file=sys.stderr)
    if not git("branch", "--remotes", "--contains", run.commit):
        print(
            f"publish: commit {run.commit[:7]}, which the card names, is on no remote yet: `git push`", file=sys.stderr
        )
    if dry_run is not None:
        file = dry_run.with_name(dry_run.name.replace("TASK", task))
        write_text(file, str(card))
        print(f"{file}: the card, for review; published beside it would be {', '.join(files)}")
        return
    print(f"published at {upload(settings, card, Path(f'models/{task}'), files, run)}")


def publication(task: str) -> Publication:
    """What conf/publish.yaml says of `task`.

    Raises:
        StageError: if there is no such task, if it has no section there, or if a value is wrong.
    """
    tasks, sections = Params().names("task"), read_yaml(CONF / "publish.yaml")
    if task not in tasks:
        raise StageError(f"{task} is no task of params.yaml: {nearest(task, tasks)}")
    if not isinstance(sections.get(task), dict):
        keys = ", ".join(key.name for key in keys_of(Publication))
        raise StageError(f"conf/publish.yaml has no section {task}: add `{task}:` with the keys {keys}")
    if problems := list(forbidden_values(sections[task], task)):
        raise ConfigError([f"conf/publish.yaml: {problem}" for problem in problems])
    try:
        return validate(Publication, sections[task], "conf/publish.yaml")
    except ConfigError as error:
        raise ConfigError([f"conf/publish.yaml: {task}.{problem}" for problem in error.problems]) from None


# -- what made the model -----------------------------------------------------------------------------------------------


def recorded_run(task: str) -> tuple[RecordedRun, list[str]]:
    """What git and dvc.lock hold of the model in the workspace, and the names of its files.

    Raises:
        StageError: if the workspace is not what they hold, naming what differs.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    commit = git("rev-parse", "--verify", "HEAD")
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
        raise StageError(dvc_problem(error)) from None
    order = list(yaml.safe_load(Path("dvc.yaml").read_text(encoding="utf-8"))["stages"])
    names.sort(key=lambda name: order.index(name.partition("@")[0]))  # DVC's own order varies
    if changed:
        raise StageError(
            "the workspace is not what dvc.lock holds, so that the card would lie: "
            + "; ".join(f"{name}: {', '.join(differences(changed[name]))}" for name in names if name in changed)
            + f"\n  `dvc repro {' '.join(last)}` makes it so (`dvc checkout` restores files changed by hand);"
            " then commit"
        )
    locked = yaml.safe_load(Path("dvc.lock").read_text(encoding="utf-8"))["stages"]
    stages = {name: locked[name] for name in names}
    check_committed(stages)
    if listing is None:
        raise StageError(f"DVC's cache lacks the listing of models/{task}: run `dvc commit --force train@{task}`")
    files = ["/".join(key) for key, _, _ in listing]
    if pickles := [name for name in files if Path(name).suffix in PICKLES]:
        raise StageError(f"models/{task}/{pickles[0]} is never published: {CONVERT}")
    path = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))["data"]["path"]
    return RecordedRun(task, commit, public_remote(), stages, in_git(path), dvc_remote), sorted(files)


def differences(items: list[Any]) -> list[str]:
    """What `dvc status` says of a stage, in a few words each: `stages/train/stage.py modified`, `changed command`."""
    found = []
    for item in items:
        for change, paths in item.items() if isinstance(item, dict) else [(item, {})]:
            found += [
                f"{path} {how if isinstance(how, str) else ' '.join(how) + ' changed'}" for path, how in paths.items()
            ]
            found += [] if paths else [change]
    return found


def check_committed(stages: dict[str, Any]) -> None:
    """Raise StageError unless HEAD holds the code, configuration, figures and text that `stages` stand on."""
    outs = {out["path"] for stage in stages.values() for out in stage["outs"]}
    deps = {dep["path"] for stage in stages.values() for dep in stage["deps"]} - outs
    params = {file for stage in stages.values() for file in stage.get("params", {})}
    here = sorted(path for path in deps | params if inside(path))
    changed = git("diff", "--name-only", "HEAD", "--", *DESCRIBING, *here).splitlines()
    code = [path for path in here if path == "stages" or path.startswith("conf/")]
    tracked = [Path(file) for file in git("ls-files").splitlines()]
    known = {path.as_posix() for file in tracked for path in (file, *file.parents)}  # a package is a dependency, too
    changed += sorted({*code, "dvc.yaml", "dvc.lock", "params.yaml"} - known)
    changed += git("ls-files", "--others", "--exclude-standard", "--", *code).splitlines()
    if changed:
        raise StageError(
            f"not committed as in the workspace: {', '.join(dict.fromkeys(changed))}: the card names a commit, which"
            " must hold what made the model: commit them (or `git restore` them)"
        )


def inside(path: str) -> bool:
    """Whether `path` is in the repository rather than elsewhere on this machine or the network."""
    return "://" not in path and Path(path).resolve().is_relative_to(Path.cwd().resolve())


def in_git(path: str) -> bool:
    """Whether git holds the file or the whole directory `path`."""
    return inside(path) and bool(git("ls-files", "--", path)) and not git("ls-files", "--others", "--", path)


def public_remote() -> str | None:
    """The URL that others can clone from, without credentials; None where there is none."""
    remotes = git("remote").splitlines()
    if not remotes:
        return None
    url = git("remote", "get-url", "origin" if "origin" in remotes else remotes[0])
    parts = urlsplit(url)
    if parts.scheme in ("http", "https", "ssh", "git"):
        user = "git@" if parts.scheme == "ssh" and parts.username == "git" else ""
        return urlunsplit((parts.scheme, user + parts.netloc.rpartition("@")[2], parts.path, "", ""))
    return url if url.startswith("git@") else None  # a path on this machine leads others nowhere


def git(*arguments: str) -> str:
    """What `git` prints."""
    done = subprocess.run(["git", "-c", "core.quotePath=off", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise StageError(f"git {arguments[0]}: {(done.stderr.strip() or 'failed').splitlines()[0]}")
    return done.stdout.strip()


# -- to the Hub --------------------------------------------------------------------------------------------------------


def upload(settings: Publication, card: Any, directory: Path, files: list[str], run: RecordedRun) -> str:
    """Put `files` of `directory` and the card into the repository, in one commit, and give its address."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError

    name = str(settings.repository)
    if get_token() is None:
        raise StageError(f"the Hub asks who you are: run `hf auth login`, or set HF_TOKEN to a token of {TOKENS}")
    if unreachable := hub_unreachable():
        raise StageError(f"the Hub cannot be reached: {unreachable}\n  Nothing was published; try again when it can")
    try:
        card.validate()
        api = HfApi()
        api.create_repo(name, private=settings.private, exist_ok=True)
        there = api.model_info(name)
        if settings.private and not there.private:
            raise StageError(
                f"{name} is there and public, and conf/publish.yaml says private: true: make it private on the Hub, or"
                f" set {run.task}.private: false"
            )
        present = {sibling.rfilename for sibling in there.siblings or []}
        stale = sorted(file for file in present - set(files) if "/" not in file and Path(file).suffix in STALE)
        api.create_commit(
            name,
            [
                CommitOperationAdd("README.md", str(card).encode()),
                *(CommitOperationAdd(file, directory / file) for file in files),
                *(CommitOperationDelete(file) for file in stale),
            ],
            commit_message=f"{run.task} of lm-repro commit {run.commit[:7]}",
        )
    except StageError:
        raise
    except HfHubHTTPError as error:
        raise StageError(refusal(name, error)) from None
    except ValueError as error:  # in the Hub's own words; the card's metadata are nearly all that it can dislike
        raise StageError(f"the Hub refuses {name} (see conf/publish.yaml): {in_a_line(error)}") from None
    except Exception as error:  # whichever HTTP library is below
        cause = error.__cause__ or error
        raise StageError(
            f"publishing broke off ({type(cause).__name__}: {in_a_line(cause)})\n  Run it again: files that are there"
            " already are not sent twice, and the model changes in one commit or not at all"
        ) from None
    if stale:
        print(f"deleted there, left from an earlier model: {', '.join(stale)}")
    return f"{constants.ENDPOINT}/{name}"


def in_a_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def refusal(name: str, error: Any) -> str:
    """What the Hub has against it, and what to do."""
    status = error.response.status_code if error.response is not None else None
    if status == 401:
        return f"the Hub does not know the token (401): run `hf auth login`, or set HF_TOKEN to a token of {TOKENS}"
    if status == 403:
        return (
            f"the token may not write to {name} (403): give it write access to {name.partition('/')[0]} ({TOKENS}), or"
            " name another repository in conf/publish.yaml"
        )
    return f"the Hub refuses {name} ({status}): {(error.server_message or str(error)).strip().splitlines()[0]}"


if __name__ == "__main__":
    main()
