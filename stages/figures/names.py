"""Names of the metrics, in full in reports and short in metrics/TASK.json so that `dvc exp show` reads at a glance, and
of what is evaluated.
"""

from typing import Any

EVALUATED = ("validation", "test")
"""Splits that are evaluated."""
EVALUATED_FILES = [f"{split}.parquet" for split in EVALUATED]
"""Files of their documents' scores."""
SAMPLES = "samples.json"
"""What baseline's model says to the prompts."""
TOKENS = "tokens"
"""Directory of the bits of their documents' tokens."""
TEXTS = "texts-"
"""What the name of a source begins with, in files of scores, that is only evaluated."""
SHORT_SPLITS = {"validation": "val", "test": "test"}
# Without the loss and the perplexity, which cannot be compared between block sizes: each further column of
# `dvc exp show` hides a parameter.
SHORT_NAMES = {"bits_per_byte": "bpb", "pseudo_bits_per_byte": "pseudo_bpb"}


def with_texts_apart(figures: dict[str, Any]) -> dict[str, Any]:
    """The figures of the splits by name; those of sources that are only evaluated, if any, by name under `texts`."""
    texts = {name.removeprefix(TEXTS): found for name, found in figures.items() if name not in EVALUATED}
    splits = {name: figures[name] for name in EVALUATED}
    return {**splits, "texts": texts} if texts else splits


def headline(metrics: dict[str, Any]) -> dict[str, dict[str, float]]:
    """What metrics/TASK.json holds of the full metrics of each split: those that experiments are compared by."""
    return {
        short: {SHORT_NAMES[name]: value for name, value in metrics[split].items() if name in SHORT_NAMES}
        for split, short in SHORT_SPLITS.items()
    }


def full_names(headlines: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The inverse of `headline`: the headline metrics under their full names."""
    names = {short: name for name, short in SHORT_NAMES.items()}
    splits = {short: split for split, short in SHORT_SPLITS.items()}
    return {
        splits[split]: {names[short]: value for short, value in metrics.items() if short in names}
        for split, metrics in headlines.items()
        if split in splits
    }
