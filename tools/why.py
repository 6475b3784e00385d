"""Say what `dvc repro` would run now, and why: the values, functions and files that changed since the last run.

Command python -m tools.why [STAGE]

Nothing is run. STAGE (`train@causal`) limits this to the stage and those that it depends on.
"""

import argparse
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from typing import Any

from dvc.exceptions import DvcException
from dvc.repo import Repo

from stages.core.config import CONF, MISSING, nearest, read_yaml
from stages.core.errors import ConfigError, printable, printable_lines
from stages.shell.keys import shown
from tools.chain import describe_chain, read_chain
from tools.code_changes import CodeChange
from tools.forecast import CODE, Change, Forecast, ParamChange, Verdict, forecast, list_names
from tools.lock_history import Entry, Revision, hashes_in, parse_entry, read_lock, read_revisions, value_in

WIDTH = 80
_ENDS = {
    Verdict.RUNS: "runs",
    Verdict.MAY_RUN: "may run",
    Verdict.RESTORED: "is restored from DVC's cache",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], prog="python -m tools.why")
    parser.add_argument("stage", nargs="?", help="such as train@causal; all stages if it is not given")
    target = parser.parse_args().stage or None
    forecasts = read_forecast("why", target)
    lines = [line for found in forecasts for line in describe(found)]
    runs = {found.name for found in forecasts if found.verdict is not Verdict.UNCHANGED}
    if CODE in runs and not any(isinstance(change, CodeChange) for found in forecasts for change in found.changes):
        lines += ["", "Only comments, docstrings or messages of the code changed: no other stage runs for that."]
    print(printable_lines("\n".join([summarize(forecasts, target), *lines, *describe_chains(forecasts)])))


def describe_chains(forecasts: list[Forecast]) -> Iterator[str]:
    """What the models that were trained last go back to, of those that did not begin with one of conf/model."""
    for name, task in (found.name.split("@") for found in forecasts if found.name.startswith("train@")):
        if len(links := read_chain(read_lock(), task)) > 1:
            yield f"\nThe last run of {name}@{task}:"
            for line in describe_chain(links):
                yield from _wrap(line, "  ", "      ")


def read_forecast(command: str, target: str | None) -> list[Forecast]:
    """What `dvc repro TARGET` would do; ends the process with an error under the name of `command` if it cannot."""
    try:
        read_yaml(CONF.parent / "params.yaml")
        with Repo() as repo:
            names = [stage.addressing for stage in repo.index.stages]
            if target and target not in {*names, *(name.partition("@")[0] for name in names)}:
                sys.exit(f"{command}: {printable(target)} is no stage of dvc.yaml; {nearest(target, names)}")
            return forecast(repo, target)
    except ConfigError as error:
        sys.exit(printable_lines(f"{command}: {error}"))
    except DvcException as error:
        from tools.check import dvc_problem  # half a second of imports

        sys.exit(printable_lines(f"{command}: {dvc_problem(error)}"))


def summarize(forecasts: list[Forecast], target: str | None) -> str:
    """The first line: how many stages run."""
    repro = f"dvc repro {target}" if target else "dvc repro"
    counts = Counter(found.verdict for found in forecasts)
    if counts[Verdict.UNCHANGED] == len(forecasts):
        return f"`{repro}` would run nothing: the outputs of {_stages(len(forecasts))} are up to date."
    words = [f"run {_stages(counts[Verdict.RUNS])}"] if counts[Verdict.RUNS] else []
    words += [f"restore {counts[Verdict.RESTORED]} from the cache"] if counts[Verdict.RESTORED] else []
    may = counts[Verdict.MAY_RUN]
    after = f"; {may} more {'depends' if may == 1 else 'depend'} on what these write" if may else ""
    return f"`{repro}` would {' and '.join(words)}{after}."


def _stages(number: int) -> str:
    return f"{number} stage{'' if number == 1 else 's'}"


# -- a stage -----------------------------------------------------------------------------------------------------------


def describe(found: Forecast) -> Iterator[str]:
    """The lines on a stage; none if it stays as it is."""
    if found.verdict is Verdict.UNCHANGED:
        return
    entry = parse_entry(read_lock(), found.name)
    yield ""
    yield from _wrap(f"{found.name} {_ENDS[found.verdict]}{_last_run(found, entry)}", "")
    for change in found.changes:
        yield from _wrap(describe_change(change), "  ", "      ")
        if hint := _with_this_value(change, found):
            yield from _wrap(hint, "      ")
    for path, writers in found.waits_for.items():
        same = "" if found.changes else "; if that comes out the same, it does not run"
        yield from _wrap(f"{path}: will be written again by {list_names(writers)}{same}", "  ", "      ")
    if found.verdict is not Verdict.MAY_RUN and found.changes and (names := _with_these_inputs(found)):
        yield from _wrap(f"same values, code and inputs: {list_names(names)}", "  ", "      ")


def describe_change(change: Change) -> str:
    """A change in a line: where, which key or part, old and new value."""
    if isinstance(change, ParamChange):
        return f"{change.file}: {printable(change.key)}: {_value(change.old)} -> {_value(change.new)}"
    path, what = (change.file, change.what) if isinstance(change, CodeChange) else (change.path, change.what)
    return f"{printable(path)}: {printable(what, 1000)}"


def _value(value: Any) -> str:
    return "(not set)" if value is MISSING else printable(shown(value))


def _wrap(text: str, indent: str, more: str | None = None) -> list[str]:
    """`text` in lines of at most WIDTH characters; a path or value stays in one piece."""
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=indent + "    " if more is None else more,
        break_long_words=False,
        break_on_hyphens=False,
    )


# -- where the values were before --------------------------------------------------------------------------------------


def _last_run(found: Forecast, entry: Entry) -> str:
    """With what the values are compared: the revision that has the entry of dvc.lock."""
    if not entry or not found.changes:
        return ""
    names = [revision.name for revision in read_revisions() if revision.entry(found.name) == entry]
    return f" (last run: {names[0] if names else 'the workspace, not committed'})"


def _with_this_value(change: Change, found: Forecast) -> str:
    """Which revisions have the new value of a changed key."""
    if not isinstance(change, ParamChange) or change.new is MISSING:
        return ""
    names = [
        revision.name
        for revision in read_revisions()
        if value_in(revision.entry(found.name), change.file, change.key) == change.new
    ]
    return f"{_value(change.new)} also in {list_names(names, 2)}" if names else ""


def _with_these_inputs(found: Forecast) -> list[str]:
    """The revisions in which the stage ran with the same values, code and inputs."""
    return [revision.name for revision in read_revisions() if _ran_alike(revision, found)]


def _ran_alike(revision: Revision, found: Forecast) -> bool:
    entry = revision.entry(found.name)
    return (entry.get("params") or {}) == found.params and hashes_in(entry, "deps") == found.inputs


if __name__ == "__main__":
    main()
