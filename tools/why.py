"""Show which stages `dvc repro` would run now, and why: values, functions and files that changed since the last run.

Command python -m tools.why [STAGE]

No stage is run. STAGE (`train@causal`) limits the output to the stage and its dependencies.
"""

import argparse
import signal
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dvc.exceptions import DvcException
from dvc.repo import Repo

from stages.core.artifacts import Blocks
from stages.core.compose import compose_config, load_config
from stages.core.config import CONF, MISSING, read_yaml, suggest_name
from stages.core.errors import ConfigError, StageError, printable, printable_lines
from stages.train.batches import count_steps
from tools.chain import describe_chain, read_chain
from tools.code_changes import CodeChange
from tools.forecast import CODE, Change, Forecast, ParamChange, Verdict, forecast_stages, list_names
from tools.keys import format_value
from tools.lock_history import Entry, Revision, find_param_value, get_hashes, parse_entry, read_lock, read_revisions

WIDTH = 80
_VERDICT_TEXTS = {
    Verdict.RUNS: "runs",
    Verdict.MAY_RUN: "may run",
    Verdict.RESTORED: "is restored from DVC's cache",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], prog="python -m tools.why")
    parser.add_argument("stage", nargs="?", help="for example train@causal (default: all stages)")
    target = parser.parse_args().stage or None
    forecasts = read_forecast("why", target)
    lines = [line for found in forecasts for line in describe_forecast(found)]
    runs = {found.name for found in forecasts if found.verdict is not Verdict.UNCHANGED}
    if CODE in runs and not any(isinstance(change, CodeChange) for found in forecasts for change in found.changes):
        lines += [
            "",
            "Only comments, docstrings or messages of the code changed: no other stage runs because of that.",
        ]
    print(printable_lines("\n".join([summarize(forecasts, target), *lines, *describe_chains(forecasts)])))


def describe_chains(forecasts: list[Forecast]) -> Iterator[str]:
    """Describe how the last trained models were made, except those that started directly from a model of conf/model."""
    for name, task in (found.name.split("@") for found in forecasts if found.name.startswith("train@")):
        if len(links := read_chain(read_lock(), task)) > 1:
            yield f"\nThe last run of {name}@{task}:"
            for line in describe_chain(links):
                yield from _wrap(line, "  ", "      ")


def read_forecast(command: str, target: str | None) -> list[Forecast]:
    """Forecast `dvc repro TARGET`; on an error, exit with a message that starts with `command`."""
    try:
        read_yaml(CONF.parent / "params.yaml")
        with Repo() as repo:
            names = [stage.addressing for stage in repo.index.stages]
            if target and target not in {*names, *(name.partition("@")[0] for name in names)}:
                sys.exit(f"{command}: {printable(target)} is not a stage of dvc.yaml; {suggest_name(target, names)}")
            return forecast_stages(repo, target)
    except ConfigError as error:
        sys.exit(printable_lines(f"{command}: {error}"))
    except DvcException as error:
        from tools.check import explain_dvc_error  # half a second of imports

        sys.exit(printable_lines(f"{command}: {explain_dvc_error(error)}"))


def summarize(forecasts: list[Forecast], target: str | None) -> str:
    """Return the first line of the output: how many stages run."""
    repro = f"dvc repro {target}" if target else "dvc repro"
    counts = Counter(found.verdict for found in forecasts)
    if counts[Verdict.UNCHANGED] == len(forecasts):
        return f"`{repro}` would run nothing: the outputs of {_format_num_stages(len(forecasts))} are up to date."
    actions = [f"run {_format_num_stages(counts[Verdict.RUNS])}"] if counts[Verdict.RUNS] else []
    actions += [f"restore {counts[Verdict.RESTORED]} from the cache"] if counts[Verdict.RESTORED] else []
    num_may_run = counts[Verdict.MAY_RUN]
    rest = f"; {num_may_run} more {'depends' if num_may_run == 1 else 'depend'} on their outputs" if num_may_run else ""
    return f"`{repro}` would {' and '.join(actions)}{rest}."


def _format_num_stages(number: int) -> str:
    return f"{number} stage{'' if number == 1 else 's'}"


# -- a stage -----------------------------------------------------------------------------------------------------------


def describe_forecast(forecast: Forecast) -> Iterator[str]:
    """Yield the lines about a stage; none if it is unchanged."""
    if forecast.verdict is Verdict.UNCHANGED:
        return
    entry = parse_entry(read_lock(), forecast.name)
    yield ""
    yield from _wrap(f"{forecast.name} {_VERDICT_TEXTS[forecast.verdict]}{_describe_last_run(forecast, entry)}", "")
    for change in forecast.changes:
        yield from _wrap(describe_change(change), "  ", "      ")
        if hint := _describe_same_value(change, forecast):
            yield from _wrap(hint, "      ")
    for path, writers in forecast.waits_for.items():
        condition = "" if forecast.changes else "; if it does not change, this stage does not run"
        yield from _wrap(f"{path}: will be written again by {list_names(writers)}{condition}", "  ", "      ")
    if forecast.verdict is Verdict.RUNS and forecast.name.startswith("train@"):
        yield from _wrap(describe_shared_steps(forecast.name.partition("@")[2]), "  ", "      ")
    if forecast.verdict is not Verdict.MAY_RUN and forecast.changes and (names := _find_same_runs(forecast)):
        yield from _wrap(f"same values, code and inputs: {list_names(names)}", "  ", "      ")


def describe_shared_steps(task: str) -> str:
    """Say how many of a training's steps are in a kept checkpoint of another run; an empty text if none are kept."""
    from stages.train.stage import TrainConfig

    config = load_config(TrainConfig, compose_config("train", item=task))
    if config.checkpoints.keep_for_branches is None:
        return ""
    from stages.frameworks.trainer import find_branches  # seconds of imports

    try:
        num_blocks = len(Blocks(Path(config.blocks) / "train"))
        branches = find_branches(config, num_blocks)
    except (AssertionError, RuntimeError, StageError) as error:  # torch raises several types if it has no GPU
        return f"the steps shared with kept checkpoints are unknown: {error}"
    if branches is None:
        return ""
    num_shared, num_steps = max(branches.list_steps(), default=0), count_steps(config, num_blocks)
    return f"{num_shared:,} of {num_steps:,} steps are taken from a kept checkpoint (docs/branches.md)"


def describe_change(change: Change) -> str:
    """Describe a change in one line: file, key or part, old and new value."""
    if isinstance(change, ParamChange):
        return f"{change.file}: {printable(change.key)}: {_format_value(change.old)} -> {_format_value(change.new)}"
    path = change.file if isinstance(change, CodeChange) else change.path
    return f"{printable(path)}: {printable(change.description, 1000)}"


def _format_value(value: Any) -> str:
    return "(not set)" if value is MISSING else printable(format_value(value))


def _wrap(text: str, indent: str, next_indent: str | None = None) -> list[str]:
    """Wrap `text` to lines of at most WIDTH characters, without breaking a path or value."""
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=indent + "    " if next_indent is None else next_indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


# -- earlier runs ------------------------------------------------------------------------------------------------------


def _describe_last_run(forecast: Forecast, entry: Entry) -> str:
    """Name the revision of the last run, which has the same entry of dvc.lock."""
    if not entry or not forecast.changes:
        return ""
    names = [revision.name for revision in read_revisions() if revision.get_entry(forecast.name) == entry]
    return f" (last run: {names[0] if names else 'the workspace, not committed'})"


def _describe_same_value(change: Change, forecast: Forecast) -> str:
    """Name the revisions that have the new value of a changed key."""
    if not isinstance(change, ParamChange) or change.new is MISSING:
        return ""
    names = [
        revision.name
        for revision in read_revisions()
        if find_param_value(revision.get_entry(forecast.name), change.file, change.key) == change.new
    ]
    return f"{_format_value(change.new)} also in {list_names(names, 2)}" if names else ""


def _find_same_runs(forecast: Forecast) -> list[str]:
    """List the revisions in which the stage ran with the same values, code and inputs."""
    return [revision.name for revision in read_revisions() if _is_same_run(revision, forecast)]


def _is_same_run(revision: Revision, forecast: Forecast) -> bool:
    entry = revision.get_entry(forecast.name)
    return (entry.get("params") or {}) == forecast.params and get_hashes(entry, "deps") == forecast.inputs


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end silently in `| head -1`
    main()
