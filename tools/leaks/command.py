"""Examine how much of its training text a model gives away, before it is published.

Command python -m tools.leaks TASK [--documents 200]
        python -m tools.leaks TASK --make-canaries N FILE

The report shows near-verbatim continuations of documents of train, how well such documents are told from held-out ones,
and the exposure of canaries, if conf/publish.yaml names some. It is written to reports/leaks/TASK.json, where
`python -m tools.publish` reads it. `--make-canaries` writes records with random secrets, to be added to the data.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from stages.core.artifacts import get_versions, write_json
from stages.core.compose import Params, compose_config, load_config
from stages.core.config import suggest_name, validate_values
from stages.core.errors import StageError, is_error, printable, printable_lines
from stages.model.lean_import import import_lean
from stages.model.schema import Model
from stages.shell.app import format_error
from tools.chain import read_chain
from tools.check import explain_dvc_error, get_config_class
from tools.compare import measure_width
from tools.leaks.canaries import make_canaries, read_canaries
from tools.leaks.report import (
    DEFAULT_DOCUMENTS,
    DEFINITIONS,
    LeakLimits,
    explain_refusal,
    get_examined_hashes,
    get_report_path,
    hash_canaries,
    list_figures,
    list_notes,
)
from tools.lock_history import LOCK, parse_mapping, read_lock
from tools.publish import list_differences, read_publication


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], prog="python -m tools.leaks")
    parser.add_argument("task", help="a task of params.yaml")
    parser.add_argument(
        "--documents",
        type=int,
        default=DEFAULT_DOCUMENTS,
        help=f"highest number of documents of train, and of held-out ones (default: {DEFAULT_DOCUMENTS})",
    )
    parser.add_argument(
        "--make-canaries", nargs=2, metavar=("N", "FILE"), help="write N records with canaries to FILE, and exit"
    )
    arguments = parser.parse_args()
    if arguments.documents < 1:
        parser.error(f"--documents {arguments.documents}: it must be 1 or above")
    number, file = arguments.make_canaries or ("1", "")
    if not number.isdecimal() or not 1 <= int(number) <= 10_000:
        parser.error(f"--make-canaries {printable(number)}: it must be a number from 1 to 10000")
    try:
        check_task(arguments.task)
        if arguments.make_canaries:
            write_canaries(arguments.task, int(number), Path(file))
        else:
            examine_and_print(arguments.task, arguments.documents)
    except KeyboardInterrupt:
        sys.exit(130)
    except BaseException as error:
        if not is_error(error) or os.environ.get("LM_REPRO_DEBUG") == "1":
            raise
        sys.exit(printable_lines(f"leaks: error: {format_error(error)}"))


def check_task(task: str) -> None:
    """Raise StageError unless `task` is a task of params.yaml."""
    if task not in (tasks := Params().list_items("task")):
        raise StageError(f"{printable(task)} is not a task of params.yaml: {suggest_name(task, tasks)}")


def write_canaries(task: str, number: int, file: Path) -> None:
    """Write records with canaries, and print how to use them."""
    make_canaries(number, file)
    print(
        f"{printable(file)}: {number} records with a random secret each. Add them to the data (docs/leaks.md), train,"
        f" and set {task}.leaks.canaries to this file in conf/publish.yaml"
    )


def examine_and_print(task: str, num_documents: int) -> None:
    limits = read_publication(task).leaks
    report = examine_task(task, limits, num_documents)
    print_report(report, limits)
    if refusal := explain_refusal(report, limits):
        print(f"\nPublishing is refused: {refusal}")


def examine_task(task: str, limits: LeakLimits, num_documents: int = DEFAULT_DOCUMENTS) -> dict[str, Any]:
    """Examine the model of a task, write the report and return it.

    Raises:
        StageError: if the model was not evaluated in its current state, or the canaries cannot be read.
    """
    stages = read_evaluated_stages(task)
    evaluate, baseline = (
        load_config(get_config_class(stage), compose_config(stage, [], task)) for stage in ("evaluate", "baseline")
    )
    canaries = read_canaries(Path(limits.canaries)) if limits.canaries else []
    import_lean(evaluate.hardware, baseline.model.attention)  # before torch and transformers are imported
    from tools.leaks.examination import examine_model

    report = {
        "definitions": DEFINITIONS,
        "task": task,
        "examined": get_examined_hashes(stages, task),
        "canaries_sha256": hash_canaries(limits),
        **examine_model(evaluate, baseline, find_initial_model(read_lock(), task), canaries, num_documents),
        "versions": get_versions("numpy", "scipy", "tokenizers", "torch", "transformers"),
    }
    write_json(get_report_path(task), report)
    return report


def find_initial_model(lock: str, task: str) -> Model | None:
    """Return the model at the beginning of the chain of trainings that ends with a task (docs/chain.md).

    Args:
        lock: text of the current dvc.lock.

    Returns:
        None if git does not have the dvc.lock of a revision of the chain.
    """
    values = read_chain(lock, task)[-1].initial_model
    return None if values is None else validate_values(Model, values, LOCK)


def read_evaluated_stages(task: str) -> dict[str, Any]:
    """Return the entries of dvc.lock by stage.

    Raises:
        StageError: if the model, its data or its evaluation differ from dvc.lock.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    names = [f"baseline@{task}", f"evaluate@{task}"]
    try:
        with Repo() as repo:
            changed = repo.status(names)
    except DvcException as error:
        raise StageError(explain_dvc_error(error)) from None
    if changed:
        shown = "; ".join(f"{name}: {', '.join(list_differences(items))}" for name, items in changed.items())
        raise StageError(
            f"models/{task} was not evaluated in its current state ({printable(shown, 1000)}): run"
            f" `dvc repro evaluate@{task}`"
        )
    stages = parse_mapping(read_lock()).get("stages")
    return stages if isinstance(stages, dict) else {}


def print_report(report: dict[str, Any], limits: LeakLimits) -> None:
    """Print the figures, how they were measured, and the continuation that is closest to its document."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(report["task"], no_wrap=True)
    for heading in ("train", "95 % interval", "held out", "limit", ""):
        table.add_column(heading, no_wrap=True, justify="right")
    for figure in list_figures(report, limits):
        verdict = "above" if figure.is_above else "within" if figure.limit else ""
        table.add_row(figure.name, figure.value, figure.interval, figure.held_out, figure.limit, verdict)
    console = Console(highlight=False, soft_wrap=True)
    Console(highlight=False, width=max(console.width, measure_width(table, console))).print(table)
    for note in list_notes(report):
        console.print(Text(printable(note, 1000)))
    for found in (report["continuation"] or {}).get("examples", [])[:1]:
        console.print(
            Text(f"\nClosest continuation: record {found['record']} of train, {found['edit_distance']:.0%} differ")
        )
        for key in ("prompt", "document", "model"):
            console.print(Text(f"  {key:9} {printable(found[key], 300)}"))
    for found in (report["exposure"] or {}).get("canaries", []):
        planted = f"in {found['planted']:,} documents of train" if found["planted"] else "not in train"
        console.print(Text(f"  {found['exposure']:4.1f} bits  {planted}: {printable(found['text'])}"))
    console.print(Text(f"-> {get_report_path(report['task'])}"))
