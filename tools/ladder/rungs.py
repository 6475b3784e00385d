"""Rungs of a scaling ladder in DVC: which have results, and what was measured.

A rung has results if an experiment of the last commit has its name and was run with its settings and with the values,
code and source data that the working tree has now. Only those that a stage of the rung reads are compared.
"""

import enum
import itertools
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from stages.core.config import MISSING, find_value
from stages.core.errors import StageError, printable
from tools.compare import is_unfinished, list_revisions
from tools.experiments import (
    WorkingTree,
    find_differences,
    hash_evaluated_documents,
    list_upstream,
    parse_key,
)
from tools.ladder.file import Ladder, Rung
from tools.outs import Outs
from tools.report_data import describe_failure, find_headline_metric, get_metrics_path, get_scores_path

_AUTO_CLASSES = {"bits_per_byte": "AutoModelForCausalLM", "pseudo_bits_per_byte": "AutoModelForMaskedLM"}
"""Class of transformers for models with each metric."""


class State(enum.Enum):
    DONE = "done"
    MISSING = "to run"
    STALE = "to run again"
    """Its experiment was run with other values, code or source data."""
    PENDING = "in the queue"


class RungState(NamedTuple):
    """State of a rung."""

    rung: Rung
    state: State
    reason: str
    """For a rung that is stale, the first difference; for a pending one, the state of its execution."""
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
    documents: str
    """Hash of the documents of validation."""


def find_states(ladder: Ladder, exp_show: list[dict[str, Any]], outs: Outs, tree: WorkingTree) -> list[RungState]:
    """Find the state of each rung in the output of `dvc exp show --json`."""
    rows = {row["name"]: row for row in list_revisions(exp_show) if row.get("name") and "executor" in row}
    return [_find_state(rung, rows.get(rung.experiment), ladder.target, outs, tree) for rung in ladder.rungs]


def _find_state(rung: Rung, row: dict[str, Any] | None, target: str, outs: Outs, tree: WorkingTree) -> RungState:
    if row is None:
        return RungState(rung, State.MISSING, "", "")
    if is_unfinished(row):
        failed = bool(row.get("error")) or (row.get("executor") or {}).get("state") == "failed"
        return RungState(rung, State.MISSING if failed else State.PENDING, describe_failure(row), "")
    lock = outs.read_lock(row["rev"])
    reasons = (find(lock, target, rung.settings, tree) for find in (find_differences, _find_unread_settings))
    reason = next(itertools.chain.from_iterable(reasons), "")
    return RungState(rung, State.STALE if reason else State.DONE, reason, row["rev"])


def _find_unread_settings(
    lock: Mapping[str, Any], target: str, settings: Mapping[str, Any], tree: WorkingTree
) -> Iterator[str]:
    """Yield the settings that no stage of a run read."""
    read = [
        (file, key)
        for stage in list_upstream(lock, target, tree.stages)
        for file, values in (lock[stage].get("params") or {}).items()
        for key in values or {}
    ]
    for file, name in (parse_key(text)[:2] for text in settings):
        if not any(file == own and f"{name}.".startswith(f"{key}.") for own, key in read):
            yield f"no stage of {target} reads {printable(file)}:{printable(name)}"


def read_measured(ladder: Ladder, states: Sequence[RungState], outs: Outs) -> list[MeasuredRung]:
    """Read the results of the rungs that are done.

    Raises:
        StageError: if results cannot be read, or rungs were evaluated on different documents.
    """
    measured = [_read_rung(ladder.task, state.rung, state.rev, outs) for state in states if state.state is State.DONE]
    for rung in measured:
        if rung.documents != measured[0].documents:
            raise StageError(
                f"{measured[0].experiment} and {rung.experiment} were evaluated on different validation documents:"
                " remove the settings that change them, such as max_records or split of conf/data, from sizes and"
                " lengths"
            )
    return measured


def _read_rung(task: str, rung: Rung, rev: str, outs: Outs) -> MeasuredRung:
    def fail(path: str) -> NoReturn:
        raise StageError(
            f"{path} of {rung.experiment} is in no cache: `dvc exp remove {rung.experiment}`, and run the ladder again"
        )

    def read(path: str) -> Any:
        content = outs.read_out(rev, path)
        return fail(path) if content is None else json.loads(content)

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
        num_tokens=round(_count_epochs(ledger, outs.read_lock(rev)[f"train@{task}"]) * num_blocks) * block_size,
        num_unique_tokens=num_blocks * block_size,
        metric=metric,
        bits=metrics[metric],
        error=metrics[f"{metric}_se"],
        documents=hash_evaluated_documents(outs, rev, task) or fail(get_scores_path(task, "validation")),
    )


def _count_epochs(ledger: Mapping[str, Any], training: Mapping[str, Any]) -> float:
    """Return the epochs until the step whose weights the model has.

    Args:
        ledger: stats.json of the training.
        training: its entry of dvc.lock.
    """
    # The files are sorted as they take precedence: those of conf/base, conf/hardware, conf/task.
    values = [find_value(section, "trainer.load_best_model_at_end") for section in training["params"].values()]
    is_best = [value for value in values if value is not MISSING][-1:] == [True]
    # Without an evaluation there is no best step, and the model is that of the last step.
    step = (is_best and ledger["best_step"]) or ledger["steps"]
    return float(ledger["epochs"] * step / ledger["steps"])


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
