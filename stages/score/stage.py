"""Stage `score@TASK`: a trained model -> its accuracy on minimal pairs or multiple-choice questions.

Reads   models/TASK/; data/tokens/TASK/ (the tokenizer); the file at pairs.TASK.path of params.yaml, or the data set of
        the Hub that conf/pairs/NAME.yaml names
Writes  reports/score/TASK/metrics.json ({"TASK": {...}}: accuracy with its 95 % interval, overall and by group);
        reports/score/TASK/items.parquet (log-likelihoods of each item's choices; columns: stages/score/accuracy.py)
Command python -m stages.score task=causal
"""

import logging
from pathlib import Path

import pyarrow.parquet as pq

from stages.core.artifacts import check_output_path, write_directory, write_json
from stages.core.config import config_view
from stages.hub.files import count_usable_positions
from stages.model.hardware import Hardware
from stages.model.lean_import import import_lean
from stages.model.schema import ObjectiveName, check_within_positions
from stages.score.items import compute_digest, read_items
from stages.score.schema import Pairs
from stages.tokens.vocabulary import Vocabulary, load_tokenizer

log = logging.getLogger(__name__)

_OUT_FILES = ["metrics.json", "items.parquet"]
_METHODS = {"causal": "log_likelihood", "mlm": "pseudo_log_likelihood"}


@config_view
class ScoreConfig:
    task: str
    """Name of the task; the figures are stored under it."""
    pairs: Pairs
    objective: ObjectiveName
    hardware: Hardware
    trained: str
    """Directory of the trained model."""
    tokens: str
    """Directory of tokenize, with the tokenizer."""
    out: str
    """Output directory."""


def main(config: ScoreConfig) -> None:
    check_output_path(config.out, _OUT_FILES)
    items = read_items(config.pairs)
    import_lean(config.hardware)
    from stages.model.models import prepare_torch
    from stages.model.trained import load_trained_model
    from stages.score.accuracy import build_item_table, compute_accuracy
    from stages.score.likelihoods import encode_choices, score_choices

    prepare_torch(config.hardware)
    name, context, tokens = config.objective.name, config.pairs.context, Path(config.tokens)
    vocabulary, tokenizer = Vocabulary.read(tokens), load_tokenizer(tokens / "tokenizer")
    choices = encode_choices(items, tokenizer, vocabulary, config.pairs.joiner)
    model = load_trained_model(name, config.trained).to(config.hardware.device)
    positions = count_usable_positions(model.config.to_dict())
    check_within_positions("pairs.context", context, positions)
    batch_tokens = config.hardware.evaluate_batch_tokens
    nats, num_tokens = score_choices(model, name, choices, vocabulary, context, batch_tokens)
    table = build_item_table(items, config.pairs.groups, nats, num_tokens)
    figures = compute_accuracy(table)
    header = {"method": _METHODS[name], "digest": compute_digest(items)}
    with write_directory(config.out, _OUT_FILES) as directory:
        write_json(directory / "metrics.json", {config.task: {**header, **figures}})
        pq.write_table(table, directory / "items.parquet", compression="zstd", write_page_checksum=True)
    accuracy = figures["accuracy"]["sum"]
    log.info(
        "%.1f %% of %d items correct (95 %% interval %.1f to %.1f, chance %.1f) -> %s",
        *(
            100 * accuracy["share"],
            figures["items"],
            100 * accuracy["low"],
            100 * accuracy["high"],
            100 * figures["chance"],
        ),
        config.out,
    )
    if figures["ties"]:
        log.warning(
            "%d items are ties, which count as wrong: the tokenizer may encode both texts to the same tokens",
            figures["ties"],
        )
