"""Stage `score@TASK`: a trained model -> its accuracy on minimal pairs or multiple-choice questions.

Reads   models/TASK/, data/tokens/TASK/ (the tokenizer), the file at pairs.TASK.path of params.yaml (or the data set of
        the Hub that conf/pairs/NAME.yaml names)
Writes  reports/score/TASK/metrics.json ({"TASK": {...}}: accuracy with its 95 % interval, also by group) and
        reports/score/TASK/items.parquet (the log-likelihoods of each item's choices: stages/score/accuracy.py)
Command python -m stages.score task=causal
"""

import logging
from pathlib import Path

import pyarrow.parquet as pq

from stages.core.artifacts import check_out, staged, write_json
from stages.core.config import part
from stages.core.errors import StageError
from stages.hub.files import usable_positions
from stages.model.hardware import Hardware
from stages.model.lean_import import import_lean
from stages.model.schema import ObjectiveName
from stages.score.items import digest_of, read_items
from stages.score.schema import Pairs
from stages.tokens.vocabulary import Vocabulary, load_tokenizer

log = logging.getLogger(__name__)

_FILES = ["metrics.json", "items.parquet"]
_METHODS = {"causal": "log_likelihood", "mlm": "pseudo_log_likelihood"}


@part
class ScoreConfig:
    task: str
    """Name of the task, under which the figures are."""
    pairs: Pairs
    objective: ObjectiveName
    hardware: Hardware
    trained: str
    """Directory of the trained model."""
    tokens: str
    """Directory of tokenize, with the tokenizer."""
    out: str
    """Directory to write."""


def main(config: ScoreConfig) -> None:
    check_out(config.out, _FILES)
    items = read_items(config.pairs)
    import_lean(config.hardware)
    from stages.model.models import prepare_torch
    from stages.model.trained import load_trained
    from stages.score.accuracy import accuracy_figures, tabulate
    from stages.score.likelihoods import encode_choices, score_choices

    prepare_torch(config.hardware)
    name, context, tokens = config.objective.name, config.pairs.context, Path(config.tokens)
    vocabulary, tokenizer = Vocabulary.read(tokens), load_tokenizer(tokens / "tokenizer")
    choices = encode_choices(items, tokenizer, vocabulary, config.pairs.joiner)
    model = load_trained(name, config.trained).to(config.hardware.device)
    positions = usable_positions(model.config.to_dict())
    if positions is not None and context > positions:
        raise StageError(f"pairs.context={context} is above the model's positions, {positions}")
    at_once = config.hardware.evaluate_batch_tokens
    nats, num_tokens = score_choices(model, name, choices, vocabulary, context, at_once)
    table = tabulate(items, config.pairs.groups, nats, num_tokens)
    figures = accuracy_figures(table)
    described = {"method": _METHODS[name], "digest": digest_of(items)}
    with staged(config.out, _FILES) as directory:
        write_json(directory / "metrics.json", {config.task: {**described, **figures}})
        pq.write_table(table, directory / "items.parquet", compression="zstd", write_page_checksum=True)
    found = figures["accuracy"]["sum"]
    log.info(
        "%.1f %% of %d items correct (95 %% interval %.1f to %.1f, chance %.1f) -> %s",
        *(100 * found["share"], figures["items"], 100 * found["low"], 100 * found["high"], 100 * figures["chance"]),
        config.out,
    )
    if figures["ties"]:
        log.warning(
            "%d items have a tie, which counts as wrong: the tokenizer may not tell the texts apart", figures["ties"]
        )
