"""Stage `evaluate@TASK`: a trained model -> comparable metrics, those from before training as well, and samples.

Reads   models/TASK/, data/tokens/TASK/, data/blocks/TASK/{validation,test}/, metrics/baseline/TASK.json
Writes  metrics/TASK.json ({"TASK": {"val": {...}, "test": {...}}}: the headline metrics under short names),
        reports/evaluate/TASK/metrics.json ({"TASK": {"validation": {...}, "test": {...}}}: all metrics),
        reports/samples/TASK.md
Command python -m stages.evaluate task=causal
"""

import logging
import math
from pathlib import Path
from typing import Any

from pydantic import ValidationInfo, field_validator

from stages.core.artifacts import Blocks, Documents, check_out, damaged, read_json, staged, write_json, write_text
from stages.core.config import part
from stages.core.errors import StageError
from stages.evaluate.schema import Samples
from stages.figures.names import headline
from stages.figures.schema import Evaluate
from stages.hub.files import usable_positions
from stages.launch.torchrun import run_in_processes
from stages.model.hardware import Hardware
from stages.model.schema import ObjectiveConfig
from stages.tokens.vocabulary import Vocabulary

log = logging.getLogger(__name__)


@part
class EvaluateConfig:
    task: str
    """Name of the task, under which the metrics stand."""
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
    """File of baseline."""
    out: str
    """File of the headline metrics to write."""
    report: str
    """Directory of all metrics to write."""
    samples_out: str
    """File of the samples to write."""

    @field_validator("samples")
    @classmethod
    def _suit_the_objective(cls, samples: Samples, info: ValidationInfo) -> Samples:
        objective = info.data.get("objective")
        causal = objective is not None and objective.name == "causal"
        problems = []
        for key in ("max_new_tokens", "temperature"):
            if causal and getattr(samples, key) is None:
                problems.append(f"samples.{key} is missing for objective.name=causal")
        if objective is not None and not causal:
            wrong = [prompt for prompt in samples.prompts if prompt.count("{mask}") != 1]
            problems += [f"samples.prompts: {prompt!r} needs exactly one {{mask}}" for prompt in wrong]
        if problems:
            raise ValueError("\n".join(problems))
        return samples


def main(config: EvaluateConfig) -> None:
    check_out(config.report, ["metrics.json"])
    check_out(config.samples_out)
    check_out(config.out)
    run_in_processes("evaluate", evaluate, config)


def evaluate(config: EvaluateConfig) -> None:
    """The work of the stage, as one of the processes that do it does it."""
    from stages.evaluate.samples import make_samples
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
    figures = read_json(config.baseline)
    before = figures.get(config.task) if isinstance(figures, dict) else None
    if not isinstance(before, dict) or before.keys() != {"validation", "test"}:
        raise damaged(config.baseline, f"no {config.task} figures of validation and test")
    metrics = {split: _evaluate_split(config, split, model, objective, vocabulary, before[split]) for split in before}
    if not rank():
        samples = make_samples(config.samples, name, model, tokens / "tokenizer", vocabulary)
        with staged(config.report, ["metrics.json"]) as directory:
            write_json(directory / "metrics.json", {config.task: metrics})
        write_text(config.samples_out, samples)
        write_json(config.out, {config.task: headline(metrics)})
    wait_for_all()
    log.info("-> %s, %s, %s", config.out, config.report, config.samples_out)


def _evaluate_split(
    config: EvaluateConfig, split: str, model: Any, objective: Any, vocabulary: Vocabulary, before: dict[str, float]
) -> dict[str, float]:
    """The metrics of a split: the block-independent one after and before training, and the loss over blocks."""
    from stages.figures.metrics import document_metrics
    from stages.model.block_loss import block_loss

    tokens, blocks = Path(config.tokens) / split, Blocks(Path(config.blocks) / split)
    lossy = read_json(tokens / "stats.json").get("documents_lossy", 0)
    if lossy:
        log.warning(
            "%s: %d documents do not survive the tokenizer: compare no bits per byte across tokenizers", split, lossy
        )
    at_once = config.hardware.evaluate_batch_tokens
    figures = document_metrics(model, objective, Documents(tokens), vocabulary, config.evaluate, at_once)
    loss = block_loss(model, objective, blocks, at_once)
    metric, (loss_name, perplexity_name) = objective.document_metric, objective.loss_metrics
    log.info("%s %s: %.4f before training, %.4f after", split, metric, before[metric], figures[metric])
    counts = {key: figures.pop(key) for key in ("documents", "tokens", "bytes")}
    assert counts == {key: before[key] for key in counts}  # the same documents, before and after
    return {
        **figures,
        f"base_{metric}": before[metric],
        loss_name: loss,
        perplexity_name: math.exp(loss),
        **counts,
    }
