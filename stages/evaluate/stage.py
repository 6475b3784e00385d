"""Stage `evaluate@TASK`: a trained model -> comparable metrics, those from before training as well, and samples.

Reads   models/TASK/, data/tokens/TASK/, data/blocks/TASK/{validation,test}/, reports/baseline/TASK/, the sources that
        evaluate.texts names in data/sources/NAME/
Writes  metrics/TASK.json ({"TASK": {"val": {...}, "test": {...}}}: the headline metrics under short names),
        reports/evaluate/TASK/metrics.json ({"TASK": {"validation": {...}, "test": {...}, "texts": {"NAME": {...}}}}:
        all metrics, also by source and group), reports/evaluate/TASK/{validation,test,texts-NAME}.parquet (baseline's
        tables of scores, with those after training), reports/evaluate/TASK/tokens/ (the same files: the bits of each
        token after training), reports/samples/TASK.md
Command python -m stages.evaluate task=causal
"""

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import ValidationInfo, field_validator

from stages.core.artifacts import Blocks, check_out, read_json, staged, to_numpy, write_json, write_text
from stages.core.config import part
from stages.core.errors import StageError
from stages.figures.groups import document_figures, figures_by_group
from stages.figures.names import EVALUATED, SAMPLES, TOKENS, headline, with_texts_apart
from stages.figures.schema import Evaluate, Samples, check_prompts
from stages.figures.scores import TokenBits, add_scores, read_scores, scores_in, write_scores, write_token_bits
from stages.figures.texts import Texts, open_texts
from stages.hub.files import usable_positions
from stages.launch.torchrun import run_in_processes
from stages.model.hardware import Hardware
from stages.model.lean_import import import_lean
from stages.model.schema import ObjectiveConfig
from stages.tokens.texts import Flatten, FlattenData, choose_flatten
from stages.tokens.vocabulary import Vocabulary

log = logging.getLogger(__name__)


@part
class EvaluateConfig:
    task: str
    """Name of the task, under which the metrics stand."""
    data: FlattenData
    flatten: Flatten | None = None
    """The task's own way to make documents of records; null: that of conf/data."""
    objective: ObjectiveConfig
    hardware: Hardware
    evaluate: Evaluate
    samples: Samples
    trained: str
    """Directory of the trained model."""
    tokens: str
    """Directory of tokenize."""
    blocks: str
    """Directory of group_texts."""
    baseline: str
    """Directory of baseline's scores and samples."""
    sources: str
    """Directory of the sources that evaluate.texts names."""
    out: str
    """File of the headline metrics to write."""
    report: str
    """Directory of all metrics and of the scores to write."""
    samples_out: str
    """File of the samples to write."""

    @field_validator("samples")
    @classmethod
    def _suit_the_objective(cls, samples: Samples, info: ValidationInfo) -> Samples:
        objective = info.data.get("objective")
        if objective is not None:
            check_prompts(samples, objective.name)
        return samples


def main(config: EvaluateConfig) -> None:
    check_out(config.report, ["metrics.json"])
    check_out(config.samples_out)
    check_out(config.out)
    run_in_processes("evaluate", evaluate, config)


def evaluate(config: EvaluateConfig) -> None:
    """The work of the stage, as one of the processes that do it does it."""
    import_lean(config.hardware)
    from stages.figures.metrics import choose_documents
    from stages.figures.samples import check_samples, make_samples, write_page
    from stages.model.models import prepare_torch
    from stages.model.objectives import make_objective
    from stages.model.processes import rank, wait_for_all
    from stages.model.trained import load_trained

    prepare_torch(config.hardware)
    name, tokens = config.objective.name, Path(config.tokens)
    vocabulary = Vocabulary.read(tokens)
    model = load_trained(name, config.trained).to(config.hardware.device)
    positions = usable_positions(model.config.to_dict())
    if positions is not None and config.evaluate.context > positions:
        raise StageError(f"evaluate.context={config.evaluate.context} is above the model's positions, {positions}")
    block_size = Blocks(Path(config.blocks) / "validation").block_size
    if config.evaluate.context > block_size:
        log.warning(
            "evaluate.context=%d is above block_size=%d: a model trained from scratch has no trained positions there",
            config.evaluate.context,
            block_size,
        )
    objective = make_objective(name, vocabulary, config.objective, model)
    flatten = choose_flatten(config.flatten, config.data)
    documents = open_texts(config.evaluate, Path(config.sources), flatten, tokens)
    chosen = {key: choose_documents(len(texts), config.evaluate.max_documents) for key, texts in documents.items()}
    scored = {key: _score(config, key, texts, chosen[key], model, objective) for key, texts in documents.items()}
    metrics = {key: _figures(config, key, table, model, objective) for key, (table, _) in scored.items()}
    if not rank():
        samples = make_samples(config.samples, name, model, positions, tokens / "tokenizer", vocabulary, flatten)
        before = read_json(Path(config.baseline) / SAMPLES)
        check_samples(before, samples, Path(config.baseline) / SAMPLES)
        with staged(config.report, ["metrics.json"]) as directory:
            write_json(directory / "metrics.json", {config.task: with_texts_apart(metrics)})
            (directory / TOKENS).mkdir()
            for key, (table, tokens_scored) in scored.items():
                write_scores(directory / f"{key}.parquet", table)
                records = to_numpy(table.column("record").combine_chunks())
                write_token_bits(directory / TOKENS / f"{key}.parquet", records, tokens_scored)
        write_text(config.samples_out, write_page(name, before, samples))
        write_json(config.out, {config.task: headline(metrics)})
    wait_for_all()
    log.info("-> %s, %s, %s", config.out, config.report, config.samples_out)


def _score(
    config: EvaluateConfig, name: str, texts: Texts, numbers: npt.NDArray[np.int64], model: Any, objective: Any
) -> tuple[pa.Table, list[TokenBits]]:
    """Baseline's table of the documents called `name` with these numbers, with their bits after training, and those of
    their tokens."""
    from stages.figures.metrics import score_documents

    file = Path(config.baseline) / f"{name}.parquet"
    table, at_once = read_scores(file), config.hardware.evaluate_batch_tokens
    scores, token_bits = score_documents(model, objective, texts, numbers, config.evaluate.context, at_once)
    before, records = scores_in(table, "bits_before"), to_numpy(table.column("record").combine_chunks())
    pairs = (
        (records, texts.records(numbers)),
        (before.num_bytes, scores.num_bytes),
        (before.num_tokens, scores.num_tokens),
    )
    if not all(np.array_equal(one, other) for one, other in pairs):
        raise StageError(f"{file} is of other documents than these: run `dvc repro baseline@{config.task}`")
    return add_scores(table, scores, "bits_after"), token_bits


def _figures(config: EvaluateConfig, name: str, table: pa.Table, model: Any, objective: Any) -> dict[str, Any]:
    """The metrics of a table of scores, after training and before, by group as well; of a split also the loss."""
    metric = objective.document_metric
    figures = document_figures(metric, scores_in(table, "bits_after"))
    counts = {key: figures.pop(key) for key in ("documents", "tokens", "bytes")}
    before = document_figures(metric, scores_in(table, "bits_before"))[metric]
    log.info("%s %s: %.4f before training, %.4f after", name, metric, before, figures[metric])
    loss = _block_loss(config, name, model, objective) if name in EVALUATED else {}
    groups = figures_by_group(metric, table)
    return {**figures, f"base_{metric}": before, **loss, **counts, "groups": groups}


def _block_loss(config: EvaluateConfig, split: str, model: Any, objective: Any) -> dict[str, float]:
    """The loss over the blocks of a split, and its perplexity."""
    from stages.model.block_loss import block_loss

    lossy = read_json(Path(config.tokens) / split / "stats.json").get("documents_lossy", 0)
    if lossy:
        log.warning(
            "%s: %d documents do not survive the tokenizer: compare no bits per byte across tokenizers", split, lossy
        )
    loss = block_loss(model, objective, Blocks(Path(config.blocks) / split), config.hardware.evaluate_batch_tokens)
    loss_name, perplexity_name = objective.loss_metrics
    return {loss_name: loss, perplexity_name: math.exp(loss)}
