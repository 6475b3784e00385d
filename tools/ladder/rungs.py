"""Rungs of a scaling ladder in DVC: which have results, and what was measured.

A rung has results if an experiment of the last commit has its name and was run with its settings and with the values
that the working tree has now. Only values that a stage of the rung reads are compared.
"""

import enum
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from stages.core.config import MISSING, find_value, read_yaml
from stages.core.errors import StageError, printable
from tools.compare import is_unfinished, list_revisions
from tools.experiments import parse_key
from tools.ladder.file import Ladder, Rung
from tools.outs import Outs
from tools.report_data import describe_failure, find_headline_metric, get_metrics_path
from tools.yaml_edit import is_same_value, merge_values, nest_value

_AUTO_CLASSES = {"bits_per_byte": "AutoModelForCausalLM", "pseudo_bits_per_byte": "AutoModelForMaskedLM"}
"""Class of transformers for models with each metric."""


class State(enum.Enum):
    DONE = "done"
    MISSING = "to run"
    STALE = "to run again"
    """Its experiment was run with other values."""
    PENDING = "in the queue"


class RungState(NamedTuple):
    """State of a rung."""

    rung: Rung
    state: State
    reason: str
    """For a rung that is stale, the first value that differs; for a pending one, the state of its execution."""
    rev: str
    """Commit of its experiment; empty if there is none with results."""

    @property
    def is_to_run(self) -> bool:
        """Return True if the rung has to run, for the first time or again."""
        return self.state in (State.MISSING, State.STALE)


class MeasuredRung(NamedTuple):
    """Results of a rung."""

    experiment: str
    rev: str
    size: str
    length: str
    num_parameters: int
    """All parameters, those of the embeddings included; shared ones count once."""
    num_non_embedding: int
    num_tokens: int
    """Training tokens seen, counting each pass over the data; exact to less than one batch."""
    num_unique_tokens: int
    """Training tokens in the data."""
    metric: str
    bits: float
    """Metric on validation, in bits per byte."""
    error: float
    """Its standard error over documents."""


def find_states(ladder: Ladder, exp_show: list[dict[str, Any]], outs: Outs) -> list[RungState]:
    """Find the state of each rung in the output of `dvc exp show --json`."""
    rows = {row["name"]: row for row in list_revisions(exp_show) if row.get("name") and "executor" in row}
    return [_find_state(rung, rows.get(rung.experiment), ladder.target, outs) for rung in ladder.rungs]


def _find_state(rung: Rung, row: dict[str, Any] | None, target: str, outs: Outs) -> RungState:
    if row is None:
        return RungState(rung, State.MISSING, "", "")
    if is_unfinished(row):
        failed = bool(row.get("error")) or (row.get("executor") or {}).get("state") == "failed"
        return RungState(rung, State.MISSING if failed else State.PENDING, describe_failure(row), "")
    lock = outs.read_lock(row["rev"])
    reason = next(_find_other_values(lock, target, rung.settings), "")
    return RungState(rung, State.STALE if reason else State.DONE, reason, row["rev"])


def _find_other_values(lock: Mapping[str, Any], target: str, settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield the values of a run that differ from the working tree with `settings`, and settings that it did not read.

    Args:
        lock: entries of the run's dvc.lock by stage.
        target: last stage of the run.
    """
    files: dict[str, Any] = {}

    def read_file(name: str) -> Any:
        if name not in files:
            files[name] = read_yaml(Path(name)) if Path(name).is_file() else {}
        return files[name]

    wanted = {parse_key(name)[:2]: value for name, value in settings.items()}
    for (file, key), value in wanted.items():
        files[file] = merge_values(read_file(file), nest_value(tuple(key.split(".")), value))
    if target not in lock:
        yield f"its dvc.lock has no {target}"
        return
    read: set[tuple[str, str]] = set()
    for stage in _list_upstream(lock, target):
        for file, values in (lock[stage].get("params") or {}).items():
            for key, value in (values or {}).items():
                read |= {(file, name) for own, name in wanted if own == file and f"{name}.".startswith(f"{key}.")}
                now = find_value(read_file(file), key)
                if not is_same_value(value, now):
                    shown = "not set" if now is MISSING else printable(json.dumps(now), 60)
                    yield f"{printable(file)}:{printable(key)} was {printable(json.dumps(value), 60)}, now {shown}"
    for file, key in wanted.keys() - read:
        yield f"no stage of {target} reads {printable(file)}:{printable(key)}"


def _list_upstream(lock: Mapping[str, Any], target: str) -> list[str]:
    """Return `target` and the stages whose outs it needs, directly or through others."""
    writers = {out["path"]: name for name, stage in lock.items() for out in stage.get("outs", [])}
    found = [target]
    for name in found:  # grows while it is read
        needed = (writers.get(dep["path"]) for dep in lock[name].get("deps", []))
        found += dict.fromkeys(stage for stage in needed if stage is not None and stage not in found)
    return found


def read_measured(ladder: Ladder, states: Sequence[RungState], outs: Outs) -> list[MeasuredRung]:
    """Read the results of the rungs that are done.

    Raises:
        StageError: if results cannot be read, or rungs were run with different code or source data.
    """
    done = [state for state in states if state.state is State.DONE]
    _refuse_mixed_inputs(ladder.target, done, outs)
    return [_read_rung(ladder.task, state.rung, state.rev, outs) for state in done]


def _refuse_mixed_inputs(target: str, done: Sequence[RungState], outs: Outs) -> None:
    """Raise StageError if two rungs depend on different versions of a file that no stage of theirs writes."""
    first: dict[str, tuple[str, str]] = {}  # path to md5 and experiment
    for state in done:
        lock = outs.read_lock(state.rev)
        stages = _list_upstream(lock, target)
        written = {out["path"] for name in stages for out in lock[name].get("outs", [])}
        for dep in (dep for name in stages for dep in lock[name].get("deps", []) if dep["path"] not in written):
            md5, other = first.setdefault(dep["path"], (dep.get("md5", ""), state.rung.experiment))
            if md5 != dep.get("md5", ""):
                raise StageError(
                    f"{printable(dep['path'])} differs between the experiments {other} and {state.rung.experiment}:"
                    f" remove the older one (dvc exp remove {other}) and run the ladder again"
                )


def _read_rung(task: str, rung: Rung, rev: str, outs: Outs) -> MeasuredRung:
    def read(path: str) -> Any:
        content = outs.read_out(rev, path)
        if content is None:
            raise StageError(
                f"{path} of {rung.experiment} is in no cache: `dvc exp remove {rung.experiment}`, and run the ladder"
                " again"
            )
        return json.loads(content)

    metrics = read(get_metrics_path(task))[task]["validation"]
    ledger, blocks = read(f"reports/train/{task}/stats.json"), read(f"data/blocks/{task}/train/stats.json")
    metric = find_headline_metric(metrics)
    block_size, num_blocks = blocks["block_size"], ledger["blocks"]
    num_parameters, num_non_embedding = count_parameters(read(f"models/{task}/config.json"), metric)
    return MeasuredRung(
        experiment=rung.experiment,
        rev=rev,
        size=rung.size,
        length=rung.length,
        num_parameters=num_parameters,
        num_non_embedding=num_non_embedding,
        num_tokens=round(ledger["epochs"] * num_blocks) * block_size,
        num_unique_tokens=num_blocks * block_size,
        metric=metric,
        bits=metrics[metric],
        error=metrics[f"{metric}_se"],
    )


def count_parameters(config: dict[str, Any], metric: str) -> tuple[int, int]:
    """Return the numbers of all parameters and of those outside embeddings of a model.

    The model is built on the meta device, without memory for its weights. A weight that two layers share counts once,
    and as an embedding if one of the layers is one.

    Args:
        config: content of its config.json.
        metric: metric of its task, which tells whether it has a causal or a masked head.
    """
    import torch  # here because these imports take seconds
    import transformers
    from transformers.initialization import no_init_weights

    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch, "config.json").write_text(json.dumps(config), encoding="utf-8")
        found = transformers.AutoConfig.from_pretrained(scratch, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"), no_init_weights():
        model = getattr(transformers, _AUTO_CLASSES[metric]).from_config(found)
    model.tie_weights()  # which is otherwise part of the initialization of weights
    return model.num_parameters(), model.num_parameters(exclude_embeddings=True)
