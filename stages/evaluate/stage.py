"""Stage `evaluate@TASK`: a trained model -> comparable metrics, before and after training, and samples.

Reads   models/TASK/, data/tokens/TASK/, data/blocks/TASK/{validation,test}/, reports/baseline/TASK/, data/sources/NAME/
        for each source in evaluate.texts
Writes  metrics/TASK.json ({"TASK": {"val": {...}, "test": {...}}}: the headline metrics under short names),
        reports/evaluate/TASK/metrics.json ({"TASK": {"validation": {...}, "test": {...}, "texts": {"NAME": {...}}}}:
        all metrics, also by source and group), reports/evaluate/TASK/{validation,test,texts-NAME}.parquet (baseline's
        tables with the scores after training added), reports/evaluate/TASK/tokens/ (files of the same names with the
        bits of each token after training), reports/samples/TASK.md
Command python -m stages.evaluate task=causal
"""

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stages.core.artifacts import (
    Blocks,
    check_output_path,
    read_json,
    to_numpy,
    write_directory,
    write_json,
    write_text,
)
from stages.core.config import config_view
from stages.core.errors import StageError
from stages.figures.groups import compute_document_figures, compute_group_figures
from stages.figures.names import EVALUATED, SAMPLES_FILE, TOKENS_DIRECTORY, select_headline_metrics, separate_texts
from stages.figures.schema import Evaluate, TaskSamples
from stages.figures.scores import TokenBits, add_scores, get_scores, read_scores, write_scores, write_token_bits
from stages.figures.texts import Texts, open_texts
from stages.hub.files import count_usable_positions
from stages.launch.torchrun import run_in_processes
from stages.model.hardware import Hardware
from stages.model.lean_import import import_lean
from stages.model.schema import ObjectiveConfig, check_within_positions
from stages.tokens.texts import Flatten, FlattenData, choose_flatten
from stages.tokens.vocabulary import Vocabulary

log = logging.getLogger(__name__)


@config_view
class EvaluateConfig:
    task: str
    """Name of the task, and key of its metrics."""
    data: FlattenData
    flatten: Flatten | None = None
    """Rules of this task for turning records into documents; null: those of conf/data."""
    objective: ObjectiveConfig
    hardware: Hardware
    evaluate: Evaluate
    samples: TaskSamples
    trained: str
    """Directory of the trained model."""
    tokens: str
    """Directory of tokenize."""
    blocks: str
    """Directory of group_texts."""
    baseline: str
    """Directory of baseline's scores and samples."""
    sources: str
    """Directory of the sources in evaluate.texts."""
    out: str
    """File of the headline metrics to write."""
    report: str
    """Directory of all metrics and of the scores to write."""
    samples_out: str
    """File of the samples to write."""


def main(config: EvaluateConfig) -> None:
    check_output_path(config.report, ["metrics.json"])
    check_output_path(config.samples_out)
    check_output_path(config.out)
    run_in_processes("evaluate", evaluate_task, config)


def evaluate_task(config: EvaluateConfig) -> None:
    """Evaluate the task as one of the stage's processes; rank 0 writes the outputs."""
    import_lean(config.hardware)
    from stages.figures.metrics import choose_documents
    from stages.figures.samples import check_samples, format_page, make_samples
    from stages.model.models import prepare_torch
    from stages.model.objectives import make_objective
    from stages.model.processes import get_rank, wait_for_all
    from stages.model.trained import load_trained_model

    prepare_torch(config.hardware)
    name, tokens = config.objective.name, Path(config.tokens)
    vocabulary = Vocabulary.read(tokens)
    model = load_trained_model(name, config.trained).to(config.hardware.device)
    positions = count_usable_positions(model.config.to_dict())
    check_within_positions("evaluate.context", config.evaluate.context, positions)
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
    scored = {key: _score_texts(config, key, texts, chosen[key], model, objective) for key, texts in documents.items()}
    metrics = {key: _compute_figures(config, key, table, model, objective) for key, (table, _) in scored.items()}
    if not get_rank():
        samples = make_samples(config.samples, name, model, positions, tokens / "tokenizer", vocabulary, flatten)
        before = read_json(Path(config.baseline) / SAMPLES_FILE)
        check_samples(before, samples, Path(config.baseline) / SAMPLES_FILE)
        with write_directory(config.report, ["metrics.json"]) as directory:
            write_json(directory / "metrics.json", {config.task: separate_texts(metrics)})
            (directory / TOKENS_DIRECTORY).mkdir()
            for key, (table, tokens_scored) in scored.items():
                write_scores(directory / f"{key}.parquet", table)
                records = to_numpy(table.column("record").combine_chunks())
                write_token_bits(directory / TOKENS_DIRECTORY / f"{key}.parquet", records, tokens_scored)
        write_text(config.samples_out, format_page(name, before, samples))
        write_json(config.out, {config.task: select_headline_metrics(metrics)})
    wait_for_all()
    log.info("-> %s, %s, %s", config.out, config.report, config.samples_out)


def _score_texts(
    config: EvaluateConfig, name: str, texts: Texts, numbers: npt.NDArray[np.int64], model: Any, objective: Any
) -> tuple[pa.Table, list[TokenBits]]:
    """Score documents with the trained model.

    Args:
        name: name of the documents in `open_texts`.
        numbers: numbers of the documents to score, [num_documents] int64.

    Returns:
        Baseline's table of these documents with the column bits_after added, and the bits of each document's tokens.

    Raises:
        StageError: if baseline scored other documents.
    """
    from stages.figures.metrics import score_documents

    file = Path(config.baseline) / f"{name}.parquet"
    table, batch_tokens = read_scores(file), config.hardware.evaluate_batch_tokens
    scores, token_bits = score_documents(model, objective, texts, numbers, config.evaluate.context, batch_tokens)
    before, records = get_scores(table, "bits_before"), to_numpy(table.column("record").combine_chunks())
    pairs = (
        (records, texts.get_records(numbers)),
        (before.num_bytes, scores.num_bytes),
        (before.num_tokens, scores.num_tokens),
    )
    if not all(np.array_equal(one, other) for one, other in pairs):
        raise StageError(f"{file} has the scores of other documents: run `dvc repro baseline@{config.task}`")
    return add_scores(table, scores, "bits_after"), token_bits


def _compute_figures(config: EvaluateConfig, name: str, table: pa.Table, model: Any, objective: Any) -> dict[str, Any]:
    """Return the metrics of a table of scores, before and after training and by group; for a split also the loss."""
    metric = objective.document_metric
    figures = compute_document_figures(metric, get_scores(table, "bits_after"))
    counts = {key: figures.pop(key) for key in ("documents", "tokens", "bytes")}
    before = compute_document_figures(metric, get_scores(table, "bits_before"))[metric]
    log.info("%s %s: %.4f before training, %.4f after", name, metric, before, figures[metric])
    loss = _compute_block_loss(config, name, model, objective) if name in EVALUATED else {}
    groups = compute_group_figures(metric, table)
    return {**figures, f"base_{metric}": before, **loss, **counts, "groups": groups}


def _compute_block_loss(config: EvaluateConfig, split: str, model: Any, objective: Any) -> dict[str, float]:
    """Return the loss over the blocks of a split, and its perplexity, under the objective's names."""
    from stages.model.block_loss import compute_block_loss

    lossy = read_json(Path(config.tokens) / split / "stats.json").get("documents_lossy", 0)
    if lossy:
        log.warning(
            "%s: the tokenizer cannot reproduce %d documents exactly: do not compare bits per byte across tokenizers",
            split,
            lossy,
        )
    loss = compute_block_loss(
        model, objective, Blocks(Path(config.blocks) / split), config.hardware.evaluate_batch_tokens
    )
    loss_name, perplexity_name = objective.loss_metrics
    return {loss_name: loss, perplexity_name: math.exp(loss)}
