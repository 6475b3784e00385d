"""Estimate the steps, memory, disk space and time of the trainings and evaluations that `dvc repro` would run.

Command python -m tools.plan [STAGE]

Each stage is tried on this machine, in a temporary directory: baseline and evaluate on some documents and blocks, train
for about ten steps. STAGE (`train@causal`) limits this to the stage and its dependencies. The log of a planned training
ends with a comparison of the plan and the actual cost.
"""

import argparse
import json
import math
import os
import signal
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

from stages.core.artifacts import SPLITS, Blocks, get_shard_name, read_batches, read_json, write_checksums, write_shard
from stages.core.compose import compose_config, load_config
from stages.core.errors import ConfigError, StageError, printable, printable_lines
from stages.evaluate.stage import EvaluateConfig
from stages.train.batches import count_steps, count_steps_per_epoch
from stages.train.plan import Plan, format_bytes, format_seconds, write_plan
from stages.train.stage import TrainConfig
from tools.compare import measure_width
from tools.forecast import CODE, Forecast, Verdict, writes_inputs
from tools.trial import TRIAL_STEPS, TimedCall, TrialReport
from tools.why import read_forecast

PLANNED = ("baseline", "train", "evaluate")
"""Stages that take long, in order of execution."""
MAX_TRIAL_STEPS = 10 * TRIAL_STEPS  # limit of a trial with short steps
DEFAULT_INTERVAL = 500  # transformers' default of eval_steps, save_steps and logging_steps
BYTES_OF_STATE = 3  # size of a checkpoint relative to the weights: AdamW stores two averages
HELD_OUT = SPLITS[1:]


class Amounts(NamedTuple):
    """Amounts of input and steps of a stage; 0 if it does not use them."""

    documents: int
    tokens: int
    blocks: int
    steps: int


class Cost(NamedTuple):
    """Cost of a stage."""

    seconds: float
    peak_bytes: int
    disk_bytes: int
    """Size of its outputs, in the workspace and in DVC's cache, and of the checkpoints while it runs."""


class Trial(NamedTuple):
    """Result of a trial of a stage."""

    report: TrialReport
    seconds: float
    """Run time of its process."""
    peak_bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], prog="python -m tools.plan")
    parser.add_argument("stage", nargs="?", help="for example train@causal (default: all stages)")
    forecasts = read_forecast("plan", parser.parse_args().stage or None)
    ready, waiting = choose_tasks(forecasts)
    for task, names in waiting.items():
        first = f"run `dvc repro {' '.join(names)}` first"
        print(printable_lines(f"{task}: not planned, because its data are not up to date: {first}"))
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
        print_table(rows)


def choose_tasks(forecasts: Sequence[Forecast]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Return the stages to plan by task, and the stages that must run earlier a task can be planned, by task."""
    ready: dict[str, list[str]] = {}
    waiting: dict[str, list[str]] = {}
    pending = [
        forecast for forecast in forecasts if forecast.verdict is not Verdict.UNCHANGED and forecast.name != CODE
    ]
    data_stages = [forecast for forecast in pending if forecast.name.partition("@")[0] not in PLANNED]
    for forecast in pending:
        name, _, task = forecast.name.partition("@")
        if name not in PLANNED or forecast.verdict is Verdict.RESTORED:
            continue
        if earlier := [other.name for other in data_stages if writes_inputs(other, forecast)]:
            waiting[task] = list(dict.fromkeys([*waiting.get(task, []), *earlier]))
        else:
            ready.setdefault(task, []).append(name)
    return {task: names for task, names in ready.items() if task not in waiting}, waiting


# -- a task ------------------------------------------------------------------------------------------------------------


def plan_task(task: str, stages: Sequence[str], scratch: Path) -> Iterator[tuple[str, Amounts, Cost | None]]:
    """Yield name, amounts and cost of each of a task's `stages`; the cost is None if they use several processes.

    Raises:
        ConfigError, StageError: if the configuration is wrong or a trial fails.
    """
    config, evaluation = (
        load_config(TrainConfig, compose_config("train", item=task)),
        load_config(EvaluateConfig, compose_config("evaluate", item=task)),
    )
    amounts = {name: count_amounts(name, config, evaluation) for name in stages}
    if config.hardware.launch is not None or config.hardware.ray is not None:
        yield from ((f"{name}@{task}", amounts[name], None) for name in stages)
        return
    trials = _Trials(task, config, evaluation, scratch)
    for name in PLANNED:
        # An evaluation needs a trained model and the baseline scores of the same documents.
        if name in stages or (name == "baseline" and "evaluate" in stages):
            print(f"plan: trying {name}@{task} ...", file=sys.stderr)
            cost = getattr(trials, name)()
            if name in stages:
                yield f"{name}@{task}", amounts[name], cost


def count_amounts(name: str, config: TrainConfig, evaluation: EvaluateConfig) -> Amounts:
    """Read the amounts of a stage from the ledgers of the data stages."""
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


def count_events(config: TrainConfig, key: str, steps: int, num_blocks: int) -> int:
    """Return how many times a training of `steps` steps evaluates (`key` is "eval") or saves ("save")."""
    strategy = config.trainer.get(f"{key}_strategy", "no")
    if strategy == "epoch":
        return math.ceil(steps / count_steps_per_epoch(config, num_blocks))
    if strategy != "steps":
        return 0
    interval = float(config.trainer.get(f"{key}_steps") or config.trainer.get("logging_steps") or DEFAULT_INTERVAL)
    return steps // math.ceil(interval if interval >= 1 else interval * steps)


class _Trials:
    """Trials of a task's stages; each trial uses the outputs of the earlier ones."""

    def __init__(self, task: str, config: TrainConfig, evaluation: EvaluateConfig, scratch: Path) -> None:
        self._task, self._config, self._evaluation, self._scratch = task, config, evaluation, scratch
        self._num_blocks = {split: len(Blocks(Path(config.blocks) / split)) for split in SPLITS}
        self._ledgers = {split: read_json(Path(config.tokens) / split / "stats.json") for split in HELD_OUT}
        self._blocks = self._write_sample_blocks()
        self._documents = self._count_sample_documents()

    def _count_sample_documents(self) -> int:
        """Return the number of documents that have about as many tokens as one evaluation batch."""
        max_documents = self._evaluation.evaluate.max_documents or sys.maxsize
        ledger = self._ledgers["validation"]
        mean: float = max(1.0, ledger["text_tokens"] / max(ledger["documents"], 1))
        return min(max_documents, max(4, math.ceil(self._config.hardware.evaluate_batch_tokens / mean)))

    def _write_sample_blocks(self) -> Path:
        """Write a directory with all training blocks and two evaluation batches of blocks per held-out split."""
        source, target = Path(self._config.blocks), self._scratch / "blocks"
        target.mkdir()
        (target / "train").symlink_to((source / "train").resolve())
        max_blocks = max(1, 2 * self._config.hardware.evaluate_batch_tokens // self._config.block_size)
        for split in HELD_OUT:
            batch = next(batch for batch in read_batches(source / split) if len(batch))
            file = target / split / get_shard_name(0)
            write_checksums(target / split, [write_shard(file, batch.schema, [batch.slice(0, max_blocks)])])
        return target

    def baseline(self) -> Cost:
        outputs = {"out": "baseline.json", "report": "baseline"}
        trial = self._run_stage("baseline", outputs, [f"evaluate.max_documents={self._documents}"])
        return Cost(self._estimate_seconds(trial), trial.peak_bytes, 2 * self._measure_bytes(outputs.values()))

    def train(self) -> Cost:
        outputs = {"out": "model", "report": "train"}
        trial = self._run_stage("train", outputs, [*self._shorten_training(), f"blocks={_quote_path(self._blocks)}"])
        marks = trial.report.marks
        num_blocks = self._num_blocks["train"]
        steps = count_steps(self._config, num_blocks)
        counts = {"step": steps - 1} | {
            event: count_events(self._config, key, steps, num_blocks)
            for event, key in (("evaluate", "eval"), ("save", "save"))
        }
        first, *others = marks["step"]  # the first step allocates and compiles, so it is not extrapolated
        durations = {"step": others or [first], "evaluate": marks.get("evaluate", []), "save": marks.get("save", [])}
        num_sampled = len(Blocks(self._blocks / "validation"))
        durations["evaluate"] = [
            seconds * self._num_blocks["validation"] / num_sampled for seconds in durations["evaluate"]
        ]
        fixed = trial.seconds - sum(map(sum, marks.values()))
        seconds = fixed + first + sum(counts[event] * _mean(durations[event]) for event in durations)
        disk = 2 * self._measure_bytes(outputs.values()) + self._estimate_checkpoint_bytes(
            seconds, bool(counts["save"])
        )
        if trial.report.fingerprint is not None:
            write_plan(trial.report.fingerprint, Plan(seconds=seconds, peak_bytes=trial.peak_bytes))
        return Cost(seconds, trial.peak_bytes, disk)

    def evaluate(self) -> Cost:
        outputs = {"out": "metrics.json", "report": "evaluate", "samples_out": "samples.md"}
        model = self._scratch / "model"
        inputs = {"trained": model if model.exists() else Path(self._evaluation.trained)}
        inputs |= {"baseline": self._scratch / "baseline", "blocks": self._blocks}
        given = [f"{key}={_quote_path(path)}" for key, path in inputs.items()]
        trial = self._run_stage("evaluate", outputs, [*given, f"evaluate.max_documents={self._documents}"])
        return Cost(self._estimate_seconds(trial), trial.peak_bytes, 2 * self._measure_bytes(outputs.values()))

    def _shorten_training(self) -> Iterator[str]:
        """Yield overrides for a short training that still evaluates and saves if the full training does."""
        num_blocks, trainer = self._num_blocks["train"], self._config.trainer
        steps = min(
            count_steps(self._config, num_blocks),
            TRIAL_STEPS if self._config.framework.name == "keras" else MAX_TRIAL_STEPS,
        )
        if self._config.num_train_epochs is None:
            yield f"++trainer.max_steps={steps}"
        else:  # which Keras supports too
            yield f"num_train_epochs={(steps - 0.5) / count_steps_per_epoch(self._config, num_blocks)}"
        for key in ("eval", "save"):
            if trainer.get(f"{key}_strategy") == "steps":
                yield f"++trainer.{key}_steps={TRIAL_STEPS}"

    def _run_stage(self, stage: str, outputs: dict[str, str], overrides: list[str]) -> Trial:
        outs = [f"{key}={_quote_path(self._scratch / name)}" for key, name in outputs.items()]
        start = self._config.start
        if stage != "evaluate" and start is not None and not Path(start).is_dir():
            overrides = [*overrides, "start=null"]  # not trained yet; new weights of the same shape take as long
        return run_trial(stage, self._task, self._scratch / f"{stage}-report.json", [*outs, *overrides])

    def _estimate_seconds(self, trial: Trial) -> float:
        """Extrapolate the run time of a stage from a trial on some of its documents and blocks."""
        documents = [call for call in trial.report.calls if call.unit == "documents"]
        blocks = [call for call in trial.report.calls if call.unit == "blocks"]
        work = sum(call.seconds * self._compute_documents_ratio(call, number) for number, call in enumerate(documents))
        for split, call in zip(HELD_OUT, blocks, strict=False):  # a baseline computes no loss over blocks
            work += call.seconds * self._num_blocks[split] / call.done
        return trial.seconds - sum(call.seconds for call in trial.report.calls) + work

    def _compute_documents_ratio(self, call: TimedCall, number: int) -> float:
        """Return the ratio of the whole stage's work on a set of documents to the work in the trial's `call`."""
        documents = min(call.available, self._evaluation.evaluate.max_documents or call.available)
        if number >= len(HELD_OUT):  # a source that is only evaluated
            return documents / max(call.documents, 1)
        tokens = self._ledgers[HELD_OUT[number]]["text_tokens"] * documents / max(call.available, 1)
        return float(tokens / max(call.done, 1))

    def _measure_bytes(self, names: Any) -> int:
        paths = [self._scratch / name for name in names]
        files = [file for path in paths for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()]
        return sum(file.stat().st_size for file in files)

    def _estimate_checkpoint_bytes(self, seconds: float, saves: bool) -> int:
        """Estimate the peak size of the checkpoints in the cache directory, including one being written."""
        settings = self._config.checkpoints
        if not saves and seconds < 60.0 * settings.minutes:
            return 0
        weights = sum(file.stat().st_size for file in (self._scratch / "model").glob("*.safetensors"))
        return (settings.keep + 1) * BYTES_OF_STATE * weights


def run_trial(stage: str, task: str, file: Path, overrides: Sequence[str]) -> Trial:
    """Run a stage for a task with `overrides`, in a separate process.

    Raises:
        StageError: if it fails, with the stage's error message.
    """
    environment = {
        **os.environ,
        "DVC_STAGE": f"{stage}@{task}",
        "LM_REPRO_TRACK": "",
    }  # experiment trackers ignore trials
    command = [sys.executable, "-m", "tools.trial", stage, str(file), *overrides]
    started = time.monotonic()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    error_output = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise StageError(f"the trial of {stage}@{task} failed:\n{error_output.strip()[-2000:]}")
    values = json.loads(file.read_text(encoding="utf-8"))
    report = TrialReport([TimedCall(**call) for call in values["calls"]], values["marks"], values["fingerprint"])
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Trial(report, time.monotonic() - started, peak)


def _quote_path(path: Path) -> str:
    """Quote a path for a Hydra override."""
    text = str(path).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{text}'"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


# -- the table ---------------------------------------------------------------------------------------------------------


def print_table(rows: list[tuple[str, Amounts, Cost | None]]) -> None:
    """Print one row per stage, and their total when run one after the other."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))  # fits into 80 columns
    table.add_column("stage", no_wrap=True)
    for heading in (*Amounts._fields, "memory", "disk", "time"):
        table.add_column(heading, no_wrap=True, justify="right")
    for name, amounts, cost in rows:
        counts = [f"{number:,}" if number else "-" for number in amounts]
        table.add_row(printable(name), *counts, *(_format_cost(cost) if cost else ("?", "?", "?")))
    costs = [cost for _, _, cost in rows if cost is not None]
    if len(costs) > 1:
        seconds, disk = sum(cost.seconds for cost in costs), sum(cost.disk_bytes for cost in costs)
        total = Cost(seconds, max(cost.peak_bytes for cost in costs), disk)
        table.add_row("together", *[""] * len(Amounts._fields), *_format_cost(total), style="bold")
    console = Console(highlight=False)
    Console(highlight=False, width=max(console.width, measure_width(table, console))).print(table)
    if len(costs) < len(rows):
        print("?: not tried, because the hardware config uses several processes (hardware.launch or hardware.ray)")


def _format_cost(cost: Cost) -> tuple[str, str, str]:
    return format_bytes(cost.peak_bytes), format_bytes(cost.disk_bytes), format_seconds(cost.seconds)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end silently in `| head -1`
    main()
