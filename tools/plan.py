"""Say what the trainings and evaluations that `dvc repro` would run take: steps, memory, disk and seconds.

Command python -m tools.plan [STAGE]

Each stage is tried on this machine, in a temporary directory: baseline and evaluate on some documents and blocks, train
for some ten steps. STAGE (`train@causal`) limits this to the stage and those that it depends on. The log of a training
that was planned ends with the plan and what it took.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from stages.core.artifacts import SPLITS, Blocks, read_json, shard_batches, shard_name, write_checksums, write_shard
from stages.core.compose import compose, load
from stages.core.errors import ConfigError, StageError, printable, printable_lines
from stages.evaluate.stage import EvaluateConfig
from stages.train.plan import Plan, show_bytes, show_seconds, write_plan
from stages.train.stage import TrainConfig
from tools.compare import width_of
from tools.forecast import CODE, Forecast, Verdict, writes_inputs
from tools.trial import TRIAL_STEPS, Call, Report
from tools.why import read_forecast

PLANNED = ("baseline", "train", "evaluate")
"""The stages that take long, in the order in which they run."""
MOST_STEPS = 10 * TRIAL_STEPS  # of a trial whose steps are short
DEFAULT_INTERVAL = 500  # transformers' eval_steps, save_steps and logging_steps
BYTES_OF_STATE = 3  # a checkpoint to the weights: with AdamW's two averages
HELD_OUT = SPLITS[1:]


class Amounts(NamedTuple):
    """What a stage works on; 0 where it has no use for it."""

    documents: int
    tokens: int
    blocks: int
    steps: int


class Cost(NamedTuple):
    """What a stage takes."""

    seconds: float
    peak_bytes: int
    disk_bytes: int
    """Of what it writes, in the workspace and in DVC's cache, and of checkpoints meanwhile."""


class Trial(NamedTuple):
    """What a trial of a stage took."""

    report: Report
    seconds: float
    """From the start of its process to the end."""
    peak_bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], prog="python -m tools.plan")
    parser.add_argument("stage", nargs="?", help="such as train@causal; all stages if it is not given")
    forecasts = read_forecast("plan", parser.parse_args().stage or None)
    ready, waiting = tasks_to_plan(forecasts)
    for task, names in waiting.items():
        first = f"run `dvc repro {' '.join(names)}` first"
        print(printable_lines(f"{task}: not planned, since its data are not up to date: {first}"))
    if not ready and not waiting:
        print("`dvc repro` would run no training and no evaluation.")
    rows: list[tuple[str, Amounts, Cost | None]] = []
    try:
        for task, names in ready.items():
            with tempfile.TemporaryDirectory() as scratch:
                rows += plan_task(task, names, Path(scratch))
    except (ConfigError, StageError) as error:
        sys.exit(printable_lines(f"plan: {error}"))
    if rows:
        show(rows)


def tasks_to_plan(forecasts: Sequence[Forecast]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Task to its stages to plan, and task to the stages that must run before it can be planned."""
    ready: dict[str, list[str]] = {}
    waiting: dict[str, list[str]] = {}
    moving = [found for found in forecasts if found.verdict is not Verdict.UNCHANGED and found.name != CODE]
    data = [found for found in moving if found.name.partition("@")[0] not in PLANNED]
    for found in moving:
        name, _, task = found.name.partition("@")
        if name not in PLANNED or found.verdict is Verdict.RESTORED:
            continue
        if before := [other.name for other in data if writes_inputs(other, found)]:
            waiting[task] = list(dict.fromkeys([*waiting.get(task, []), *before]))
        else:
            ready.setdefault(task, []).append(name)
    return {task: names for task, names in ready.items() if task not in waiting}, waiting


# -- a task ------------------------------------------------------------------------------------------------------------


def plan_task(task: str, stages: Sequence[str], scratch: Path) -> Iterator[tuple[str, Amounts, Cost | None]]:
    """Name, amounts and cost of each of the stages of a task; no cost where several processes would work.

    Raises:
        ConfigError, StageError: if the configuration is wrong or a trial fails.
    """
    config, evaluation = (
        load(TrainConfig, compose("train", item=task)),
        load(EvaluateConfig, compose("evaluate", item=task)),
    )
    amounts = {name: amounts_of(name, config, evaluation) for name in stages}
    if config.hardware.launch is not None or config.hardware.ray is not None:
        yield from ((f"{name}@{task}", amounts[name], None) for name in stages)
        return
    trials = _Trials(task, config, evaluation, scratch)
    for name in PLANNED:
        # An evaluation needs the model of a training, and the scores of the same documents before it.
        if name in stages or (name == "baseline" and "evaluate" in stages):
            print(f"plan: trying {name}@{task} ...", file=sys.stderr)
            cost = getattr(trials, name)()
            if name in stages:
                yield f"{name}@{task}", amounts[name], cost


def amounts_of(name: str, config: TrainConfig, evaluation: EvaluateConfig) -> Amounts:
    """What a stage works on, by the ledgers of the data stages."""
    tokens, blocks = Path(config.tokens), Path(config.blocks)
    if name == "train":
        ledger = read_json(blocks / "train" / "stats.json")
        return Amounts(
            ledger["documents"], ledger["tokens_in"], ledger["blocks"], count_steps(config, ledger["blocks"])
        )
    ledgers = [read_json(tokens / split / "stats.json") for split in HELD_OUT]
    counts = [min(ledger["documents"], evaluation.evaluate.max_documents or ledger["documents"]) for ledger in ledgers]
    scored = [
        ledger["text_tokens"] * count // max(ledger["documents"], 1)
        for ledger, count in zip(ledgers, counts, strict=True)
    ]
    num_blocks = sum(len(Blocks(blocks / split)) for split in HELD_OUT) if name == "evaluate" else 0
    return Amounts(sum(counts), sum(scored), num_blocks, 0)


def steps_per_epoch(config: TrainConfig, num_blocks: int) -> int:
    return max(1, math.ceil(num_blocks / config.batch_size))


def count_steps(config: TrainConfig, num_blocks: int) -> int:
    """Optimizer steps of a whole training; with early stopping, at most."""
    if config.num_train_epochs is None:
        return int(config.trainer["max_steps"])
    return math.ceil(config.num_train_epochs * steps_per_epoch(config, num_blocks))


def count_times(config: TrainConfig, key: str, steps: int, num_blocks: int) -> int:
    """How often in `steps` a training evaluates (`key`: eval) or saves (save)."""
    strategy = config.trainer.get(f"{key}_strategy", "no")
    if strategy == "epoch":
        return math.ceil(steps / steps_per_epoch(config, num_blocks))
    if strategy != "steps":
        return 0
    interval = float(config.trainer.get(f"{key}_steps") or config.trainer.get("logging_steps") or DEFAULT_INTERVAL)
    return steps // math.ceil(interval if interval >= 1 else interval * steps)


class _Trials:
    """The trials of a task's stages; each uses what those before it wrote."""

    def __init__(self, task: str, config: TrainConfig, evaluation: EvaluateConfig, scratch: Path) -> None:
        self._task, self._config, self._evaluation, self._scratch = task, config, evaluation, scratch
        self._num_blocks = {split: len(Blocks(Path(config.blocks) / split)) for split in SPLITS}
        self._ledgers = {split: read_json(Path(config.tokens) / split / "stats.json") for split in HELD_OUT}
        self._blocks = self._sample_blocks()
        self._documents = self._sample_size()

    def _sample_size(self) -> int:
        """Number of documents of a split with about as many tokens as are evaluated at once."""
        most = self._evaluation.evaluate.max_documents or sys.maxsize
        ledger = self._ledgers["validation"]
        mean: float = max(1.0, ledger["text_tokens"] / max(ledger["documents"], 1))
        return min(most, max(4, math.ceil(self._config.hardware.evaluate_batch_tokens / mean)))

    def _sample_blocks(self) -> Path:
        """A directory of blocks: those of training, and as many held-out ones as are evaluated at once, twice."""
        source, target = Path(self._config.blocks), self._scratch / "blocks"
        target.mkdir()
        (target / "train").symlink_to((source / "train").resolve())
        most = max(1, 2 * self._config.hardware.evaluate_batch_tokens // self._config.block_size)
        for split in HELD_OUT:
            batch = next(batch for batch in shard_batches(source / split) if len(batch))
            file = target / split / shard_name(0)
            write_checksums(target / split, [write_shard(file, batch.schema, [batch.slice(0, most)])])
        return target

    def baseline(self) -> Cost:
        places = {"out": "baseline.json", "report": "baseline"}
        trial = self._run("baseline", places, [f"evaluate.max_documents={self._documents}"])
        return Cost(self._seconds(trial), trial.peak_bytes, 2 * self._size(places.values()))

    def train(self) -> Cost:
        places = {"out": "model", "report": "train"}
        trial = self._run("train", places, [*self._shortened(), f"blocks={_quoted(self._blocks)}"])
        marks = trial.report.marks
        num_blocks = self._num_blocks["train"]
        steps = count_steps(self._config, num_blocks)
        times = {"step": steps - 1} | {
            what: count_times(self._config, key, steps, num_blocks)
            for what, key in (("evaluate", "eval"), ("save", "save"))
        }
        first, *others = marks["step"]  # the first one allocates and compiles
        used = {"step": others or [first], "evaluate": marks.get("evaluate", []), "save": marks.get("save", [])}
        sampled = len(Blocks(self._blocks / "validation"))
        used["evaluate"] = [seconds * self._num_blocks["validation"] / sampled for seconds in used["evaluate"]]
        fixed = trial.seconds - sum(map(sum, marks.values()))
        seconds = fixed + first + sum(times[what] * _mean(used[what]) for what in used)
        disk = 2 * self._size(places.values()) + self._checkpoint_bytes(seconds, bool(times["save"]))
        if trial.report.fingerprint is not None:
            write_plan(trial.report.fingerprint, Plan(seconds=seconds, peak_bytes=trial.peak_bytes))
        return Cost(seconds, trial.peak_bytes, disk)

    def evaluate(self) -> Cost:
        places = {"out": "metrics.json", "report": "evaluate", "samples_out": "samples.md"}
        model = self._scratch / "model"
        inputs = {"trained": model if model.exists() else Path(self._evaluation.trained)}
        inputs |= {"baseline": self._scratch / "baseline", "blocks": self._blocks}
        given = [f"{key}={_quoted(path)}" for key, path in inputs.items()]
        trial = self._run("evaluate", places, [*given, f"evaluate.max_documents={self._documents}"])
        return Cost(self._seconds(trial), trial.peak_bytes, 2 * self._size(places.values()))

    def _shortened(self) -> Iterator[str]:
        """Overrides that end a training early, with an evaluation and a checkpoint where it has any."""
        num_blocks, trainer = self._num_blocks["train"], self._config.trainer
        steps = min(
            count_steps(self._config, num_blocks), TRIAL_STEPS if self._config.framework.name == "keras" else MOST_STEPS
        )
        if self._config.num_train_epochs is None:
            yield f"++trainer.max_steps={steps}"
        else:  # which Keras has as well
            yield f"num_train_epochs={(steps - 0.5) / steps_per_epoch(self._config, num_blocks)}"
        for key in ("eval", "save"):
            if trainer.get(f"{key}_strategy") == "steps":
                yield f"++trainer.{key}_steps={TRIAL_STEPS}"

    def _run(self, stage: str, places: dict[str, str], overrides: list[str]) -> Trial:
        outs = [f"{key}={_quoted(self._scratch / name)}" for key, name in places.items()]
        start = self._config.start
        if stage != "evaluate" and start is not None and not Path(start).is_dir():
            overrides = [*overrides, "start=null"]  # not trained yet: fresh weights of its shape take as long
        return run_trial(stage, self._task, self._scratch / f"{stage}-report.json", [*outs, *overrides])

    def _seconds(self, trial: Trial) -> float:
        """What a stage takes of which a trial worked on some of the documents and blocks."""
        documents = [call for call in trial.report.calls if call.what == "documents"]
        blocks = [call for call in trial.report.calls if call.what == "blocks"]
        work = sum(call.seconds * self._documents_share(call, number) for number, call in enumerate(documents))
        for split, call in zip(HELD_OUT, blocks, strict=False):  # a baseline has no loss over blocks
            work += call.seconds * self._num_blocks[split] / call.done
        return trial.seconds - sum(call.seconds for call in trial.report.calls) + work

    def _documents_share(self, call: Call, number: int) -> float:
        """The work of a whole stage on the documents of which its trial scored some, to that in the trial."""
        documents = min(call.available, self._evaluation.evaluate.max_documents or call.available)
        if number >= len(HELD_OUT):  # of a source that is only evaluated
            return documents / max(call.documents, 1)
        tokens = self._ledgers[HELD_OUT[number]]["text_tokens"] * documents / max(call.available, 1)
        return float(tokens / max(call.done, 1))

    def _size(self, names: Any) -> int:
        paths = [self._scratch / name for name in names]
        files = [file for path in paths for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()]
        return sum(file.stat().st_size for file in files)

    def _checkpoint_bytes(self, seconds: float, saves: bool) -> int:
        """Of the checkpoints that stand in the cache directory at once, one being written included."""
        settings = self._config.checkpoints
        if not saves and seconds < 60.0 * settings.minutes:
            return 0
        weights = sum(file.stat().st_size for file in (self._scratch / "model").glob("*.safetensors"))
        return (settings.keep + 1) * BYTES_OF_STATE * weights


def run_trial(stage: str, task: str, file: Path, overrides: Sequence[str]) -> Trial:
    """Run a stage for a task with `overrides`, in a process of its own.

    Raises:
        StageError: if it fails, in its own words.
    """
    environment = {**os.environ, "DVC_STAGE": f"{stage}@{task}", "LM_REPRO_TRACK": ""}  # a trial is no run to follow
    command = [sys.executable, "-m", "tools.trial", stage, str(file), *overrides]
    started = time.monotonic()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise StageError(f"the trial of {stage}@{task} failed:\n{said.strip()[-2000:]}")
    values = json.loads(file.read_text(encoding="utf-8"))
    report = Report([Call(**call) for call in values["calls"]], values["marks"], values["fingerprint"])
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Trial(report, time.monotonic() - started, peak)


def _quoted(path: Path) -> str:
    """A path as Hydra takes it in an override."""
    text = str(path).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{text}'"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


# -- the table ---------------------------------------------------------------------------------------------------------


def show(rows: list[tuple[str, Amounts, Cost | None]]) -> None:
    """Print a row for each stage, and what they take together, one after the other."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))  # fits into 80 columns
    table.add_column("stage", no_wrap=True)
    for heading in (*Amounts._fields, "memory", "disk", "time"):
        table.add_column(heading, no_wrap=True, justify="right")
    for name, amounts, cost in rows:
        counts = [f"{number:,}" if number else "-" for number in amounts]
        table.add_row(printable(name), *counts, *(_cells(cost) if cost else ("?", "?", "?")))
    costs = [cost for _, _, cost in rows if cost is not None]
    if len(costs) > 1:
        seconds, disk = sum(cost.seconds for cost in costs), sum(cost.disk_bytes for cost in costs)
        whole = Cost(seconds, max(cost.peak_bytes for cost in costs), disk)
        table.add_row("together", *[""] * len(Amounts._fields), *_cells(whole), style="bold")
    console = Console(highlight=False)
    Console(highlight=False, width=max(console.width, width_of(table, console))).print(table)
    if len(costs) < len(rows):
        print("?: not tried, since hardware has several processes (hardware.launch or hardware.ray)")


def _cells(cost: Cost) -> tuple[str, str, str]:
    return show_bytes(cost.peak_bytes), show_bytes(cost.disk_bytes), show_seconds(cost.seconds)


if __name__ == "__main__":
    main()
