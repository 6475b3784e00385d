"""Stage `baseline@TASK`: the model's block-independent figures before training, untrained or pretrained.

Reads   data/tokens/TASK/, the model's pinned checkpoint if it has one
Writes  metrics/baseline/TASK.json
Command python -m stages.baseline task=causal
"""

import logging
from pathlib import Path

from pydantic import ValidationInfo, field_validator

from stages.core.artifacts import Documents, check_out, write_json
from stages.core.config import Seed, part
from stages.figures.schema import Evaluate
from stages.model.hardware import Hardware
from stages.model.schema import Model, ObjectiveName, check_task
from stages.tokens.vocabulary import Vocabulary

log = logging.getLogger(__name__)


@part
class BaselineConfig:
    task: str
    """Name of the task, under which the metrics stand."""
    model: Model
    objective: ObjectiveName
    hardware: Hardware
    seed: Seed
    """Of the initial weights."""
    evaluate: Evaluate
    tokens: str
    """Directory of tokenize's shards."""
    out: str
    """File to write."""

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


def main(config: BaselineConfig) -> None:
    check_out(config.out)
    from stages.figures.metrics import document_metrics
    from stages.model.models import build_model, prepare_torch
    from stages.model.objectives import make_objective

    prepare_torch(config.hardware)
    vocabulary = Vocabulary.read(config.tokens)
    model = build_model(config.model, vocabulary, config.seed).to(config.hardware.device)
    objective = make_objective(config.objective.name, vocabulary)
    figures = {}
    for split in ("validation", "test"):
        documents = Documents(Path(config.tokens) / split)
        figures[split] = document_metrics(
            model, objective, documents, vocabulary, config.evaluate, config.hardware.evaluate_batch_tokens
        )
        log.info(
            "%s %s before training: %.4f", split, objective.document_metric, figures[split][objective.document_metric]
        )
    write_json(config.out, {config.task: figures})
