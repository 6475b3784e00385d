"""Stage `baseline@TASK`: the untrained or pretrained model -> its block-independent metrics before training.

Reads   data/tokens/TASK/, the columns source, groups and q_id of data/raw/{validation,test}.parquet, data/sources/NAME/
        for each source in evaluate.texts, the model's pinned checkpoint if it has one, models/START/ if the task starts
        from another one
Writes  metrics/baseline/TASK.json, reports/baseline/TASK/{validation,test,texts-NAME}.parquet (the scores of each
        document: stages/figures/scores.py) and samples.json
Command python -m stages.baseline task=causal
"""

import logging
from pathlib import Path

from pydantic import ValidationInfo, field_validator

from stages.core.artifacts import check_output_path, write_directory, write_json
from stages.core.config import Seed, config_view
from stages.figures.groups import compute_document_figures
from stages.figures.names import EVALUATED, EVALUATED_FILES, SAMPLES_FILE, TEXTS_PREFIX, separate_texts
from stages.figures.schema import Evaluate, TaskSamples
from stages.figures.scores import add_scores, read_record_columns, write_scores
from stages.figures.texts import find_source_files, open_texts
from stages.model.hardware import Hardware
from stages.model.lean_import import import_lean
from stages.model.schema import Model, ObjectiveName, check_task, check_within_positions
from stages.tokens.texts import Flatten, FlattenData, choose_flatten
from stages.tokens.vocabulary import Vocabulary

log = logging.getLogger(__name__)


@config_view
class BaselineConfig:
    task: str
    """Name of the task, and key of its metrics."""
    data: FlattenData
    flatten: Flatten | None = None
    """Rules of this task for turning records into documents; null: those of conf/data."""
    model: Model
    objective: ObjectiveName
    hardware: Hardware
    seed: Seed
    """Seed of the initial weights."""
    evaluate: Evaluate
    samples: TaskSamples
    start: str | None
    """Directory of the trained model that training starts from; null: it starts from `model`."""
    tokens: str
    """Directory of tokenize's shards."""
    raw: str
    """Directory of download's Parquet files."""
    sources: str
    """Directory of the sources in evaluate.texts."""
    out: str
    """File of the metrics to write."""
    report: str
    """Directory of the scores and samples to write."""

    @field_validator("objective")
    @classmethod
    def _check_objective_fits_model(cls, objective: ObjectiveName, info: ValidationInfo) -> ObjectiveName:
        model = info.data.get("model")
        if model is not None:
            check_task(model, objective.name)
        return objective

    @field_validator("evaluate")
    @classmethod
    def _check_context_fits_model(cls, evaluate: Evaluate, info: ValidationInfo) -> Evaluate:
        model = info.data.get("model")
        if model is not None:
            check_within_positions("evaluate.context", evaluate.context, model.max_positions)
        return evaluate


def main(config: BaselineConfig) -> None:
    check_output_path(config.out)
    check_output_path(config.report, EVALUATED_FILES)
    import_lean(config.hardware, config.model.attention)
    from stages.figures.metrics import choose_documents, score_documents
    from stages.figures.samples import make_samples
    from stages.model.models import prepare_torch
    from stages.model.objectives import make_objective
    from stages.model.start import build_start_model

    prepare_torch(config.hardware)
    evaluate, tokens = config.evaluate, Path(config.tokens)
    flatten = choose_flatten(config.flatten, config.data)
    documents = open_texts(evaluate, Path(config.sources), flatten, tokens)
    vocabulary = Vocabulary.read(tokens)
    model = build_start_model(config.model, config.start, tokens, config.seed).to(config.hardware.device)
    objective = make_objective(config.objective.name, vocabulary)
    metric, tables, figures = objective.document_metric, {}, {}
    for name, texts in documents.items():
        numbers = choose_documents(len(texts), evaluate.max_documents)
        records = read_record_columns(_find_record_files(config, name), texts.get_records(numbers))
        batch_tokens = config.hardware.evaluate_batch_tokens
        scores, _ = score_documents(model, objective, texts, numbers, evaluate.context, batch_tokens)
        tables[name] = add_scores(records, scores, "bits_before")
        figures[name] = compute_document_figures(metric, scores)
        log.info("%s %s before training: %.4f", name, metric, figures[name][metric])
    positions, tokenizer = config.model.max_positions, tokens / "tokenizer"
    samples = make_samples(config.samples, config.objective.name, model, positions, tokenizer, vocabulary, flatten)
    with write_directory(config.report, EVALUATED_FILES) as directory:
        write_json(directory / SAMPLES_FILE, samples)
        for name, table in tables.items():
            write_scores(directory / f"{name}.parquet", table)
    write_json(config.out, {config.task: separate_texts(figures)})


def _find_record_files(config: BaselineConfig, name: str) -> list[Path]:
    """Return the Parquet files of download with the records of the documents that open_texts returns as `name`."""
    if name in EVALUATED:
        return [Path(config.raw) / f"{name}.parquet"]
    return find_source_files(Path(config.sources), name.removeprefix(TEXTS_PREFIX))
