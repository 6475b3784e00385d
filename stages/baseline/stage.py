"""Stage `baseline@TASK`: the model's block-independent figures before training, untrained or pretrained.

Reads   data/tokens/TASK/, the columns source, groups and q_id of data/raw/{validation,test}.parquet, the sources that
        evaluate.texts names in data/sources/NAME/, the model's pinned checkpoint if it has one, models/START/ where the
        task starts from another one
Writes  metrics/baseline/TASK.json, reports/baseline/TASK/{validation,test,texts-NAME}.parquet (the scores of each
        document: stages/figures/scores.py) and samples.json
Command python -m stages.baseline task=causal
"""

import logging
from pathlib import Path

from pydantic import ValidationInfo, field_validator

from stages.core.artifacts import check_out, staged, write_json
from stages.core.config import Seed, part
from stages.figures.groups import document_figures
from stages.figures.names import EVALUATED, EVALUATED_FILES, SAMPLES, TEXTS, with_texts_apart
from stages.figures.schema import Evaluate, Samples, check_prompts
from stages.figures.scores import add_scores, describe_records, write_scores
from stages.figures.texts import open_texts, source_files
from stages.model.hardware import Hardware
from stages.model.lean_import import import_lean
from stages.model.schema import Model, ObjectiveName, check_task
from stages.tokens.texts import Flatten, FlattenData, choose_flatten
from stages.tokens.vocabulary import Vocabulary

log = logging.getLogger(__name__)


@part
class BaselineConfig:
    task: str
    """Name of the task, under which the metrics stand."""
    data: FlattenData
    flatten: Flatten | None = None
    """The task's own way to make documents of records; null: that of conf/data."""
    model: Model
    objective: ObjectiveName
    hardware: Hardware
    seed: Seed
    """Of the initial weights."""
    evaluate: Evaluate
    samples: Samples
    start: str | None
    """Directory of the trained model that training goes on from; null: it begins with `model`."""
    tokens: str
    """Directory of tokenize's shards."""
    raw: str
    """Directory of download's Parquet files."""
    sources: str
    """Directory of the sources that evaluate.texts names."""
    out: str
    """File of the metrics to write."""
    report: str
    """Directory of the scores and samples to write."""

    @field_validator("objective")
    @classmethod
    def _is_the_models(cls, objective: ObjectiveName, info: ValidationInfo) -> ObjectiveName:
        model = info.data.get("model")
        if model is not None:
            check_task(model, objective.name)
        return objective

    @field_validator("evaluate")
    @classmethod
    def _fits_the_model(cls, evaluate: Evaluate, info: ValidationInfo) -> Evaluate:
        model = info.data.get("model")
        if model is not None and evaluate.context > model.max_positions:
            raise ValueError(
                f"evaluate.context={evaluate.context} is above the model's positions, {model.max_positions}"
            )
        return evaluate

    @field_validator("samples")
    @classmethod
    def _suit_the_objective(cls, samples: Samples, info: ValidationInfo) -> Samples:
        objective = info.data.get("objective")
        if objective is not None:
            check_prompts(samples, objective.name)
        return samples


def main(config: BaselineConfig) -> None:
    check_out(config.out)
    check_out(config.report, EVALUATED_FILES)
    import_lean(config.hardware, config.model.attention)
    from stages.figures.metrics import choose_documents, score_documents
    from stages.figures.samples import make_samples
    from stages.model.models import prepare_torch
    from stages.model.objectives import make_objective
    from stages.model.start import build_start

    prepare_torch(config.hardware)
    evaluate, tokens = config.evaluate, Path(config.tokens)
    flatten = choose_flatten(config.flatten, config.data)
    documents = open_texts(evaluate, Path(config.sources), flatten, tokens)
    vocabulary = Vocabulary.read(tokens)
    model = build_start(config.model, config.start, tokens, config.seed).to(config.hardware.device)
    objective = make_objective(config.objective.name, vocabulary)
    metric, tables, figures = objective.document_metric, {}, {}
    for name, texts in documents.items():
        numbers = choose_documents(len(texts), evaluate.max_documents)
        described = describe_records(_record_files(config, name), texts.records(numbers))
        at_once = config.hardware.evaluate_batch_tokens
        scores, _ = score_documents(model, objective, texts, numbers, evaluate.context, at_once)
        tables[name], figures[name] = add_scores(described, scores, "bits_before"), document_figures(metric, scores)
        log.info("%s %s before training: %.4f", name, metric, figures[name][metric])
    positions, tokenizer = config.model.max_positions, tokens / "tokenizer"
    samples = make_samples(config.samples, config.objective.name, model, positions, tokenizer, vocabulary, flatten)
    with staged(config.report, EVALUATED_FILES) as directory:
        write_json(directory / SAMPLES, samples)
        for name, table in tables.items():
            write_scores(directory / f"{name}.parquet", table)
    write_json(config.out, {config.task: with_texts_apart(figures)})


def _record_files(config: BaselineConfig, name: str) -> list[Path]:
    """Download's files of the records of which open_texts gives the documents under `name`."""
    if name in EVALUATED:
        return [Path(config.raw) / f"{name}.parquet"]
    return source_files(Path(config.sources), name.removeprefix(TEXTS))
