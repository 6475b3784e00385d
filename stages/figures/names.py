"""Names of the metrics and of the files of scores.

Reports use the full names; metrics/TASK.json uses short ones to keep the table of `dvc exp show` narrow.
"""

from typing import Any

EVALUATED = ("validation", "test")
"""Splits that are evaluated."""
EVALUATED_FILES = [f"{split}.parquet" for split in EVALUATED]
"""Files with the scores of the documents of these splits."""
SAMPLES_FILE = "samples.json"
"""File with the samples of the model before training."""
TOKENS_DIRECTORY = "tokens"
"""Directory of the files with the bits of each token."""
TEXTS_PREFIX = "texts-"
"""Prefix of a source that is only evaluated, in names of files of scores."""
SHORT_SPLITS = {"validation": "val", "test": "test"}
# Loss and perplexity have no short name: they cannot be compared between block sizes, and each additional column of
# `dvc exp show` hides a parameter.
SHORT_NAMES = {"bits_per_byte": "bpb", "pseudo_bits_per_byte": "pseudo_bpb"}


def separate_texts(figures: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of the splits by name, and those of sources that are only evaluated, if any, under `texts`."""
    texts = {name.removeprefix(TEXTS_PREFIX): found for name, found in figures.items() if name not in EVALUATED}
    splits = {name: figures[name] for name in EVALUATED}
    return {**splits, "texts": texts} if texts else splits


def select_headline_metrics(metrics: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return the contents of metrics/TASK.json: the metrics that experiments are compared by, under short names."""
    return {
        short: {SHORT_NAMES[name]: value for name, value in metrics[split].items() if name in SHORT_NAMES}
        for split, short in SHORT_SPLITS.items()
    }


def expand_metric_names(headlines: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return headline metrics under their full names: the inverse of `select_headline_metrics`."""
    names = {short: name for name, short in SHORT_NAMES.items()}
    splits = {short: split for split, short in SHORT_SPLITS.items()}
    return {
        splits[split]: {names[short]: value for short, value in metrics.items() if short in names}
        for split, metrics in headlines.items()
        if split in splits
    }
