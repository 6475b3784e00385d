"""Accuracy of scored items, overall and by group."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stages.figures.groups import split_rows_by_value
from stages.score.items import Item

SCORES = ("sum", "per_token", "per_byte")
"""Scores to compare choices by: log-likelihood, log-likelihood per token, log-likelihood per UTF-8 byte."""

_Z = 1.959963984540054  # standard normal quantile of a two-sided 95 % interval


def build_item_table(
    items: Sequence[Item], groups: Sequence[str], nats: npt.NDArray[np.float64], num_tokens: npt.NDArray[np.int64]
) -> pa.Table:
    """Build a table with one row per item.

    Columns: source string; row int64; groups struct<NAME: string, ...>, only if there are groups; answer int64;
    log_likelihood list<double> (nats), tokens list<int64> and bytes list<int64>, with one value per choice; correct
    struct<sum: bool, per_token: bool, per_byte: bool>, true if the answer has the highest score; tie bool, true if the
    best other choice has exactly the log-likelihood of the answer (a tie counts as wrong).

    Args:
        groups: names of the groups.
        nats: [num_choices] float64: log-likelihoods of all choices of all items.
        num_tokens: [num_choices] int64: number of tokens of each choice.
    """
    num_bytes = np.array([len(choice.encode()) for item in items for choice in item.choices], np.int64)
    # Offsets of the items' choices, [num_items + 1].
    ends = np.cumsum([0, *(len(item.choices) for item in items)], dtype=np.int32)
    scores = {"sum": nats, "per_token": nats / num_tokens, "per_byte": nats / num_bytes}
    margins = {name: _compute_margins(items, ends, scores[name]) for name in SCORES}
    columns: dict[str, pa.Array] = {
        "source": pa.array([item.source for item in items], pa.string()),
        "row": pa.array([item.row for item in items], pa.int64()),
    }
    if groups:
        values = [pa.array(column, pa.string()) for column in zip(*(item.groups for item in items), strict=True)]
        columns["groups"] = pa.StructArray.from_arrays(values, list(groups))
    columns["answer"] = pa.array([item.answer for item in items], pa.int64())
    for name, array in {"log_likelihood": nats, "tokens": num_tokens, "bytes": num_bytes}.items():
        columns[name] = pa.ListArray.from_arrays(pa.array(ends), pa.array(array))
    columns["correct"] = pa.StructArray.from_arrays([pa.array(margins[name] > 0) for name in SCORES], list(SCORES))
    columns["tie"] = pa.array(margins["sum"] == 0)
    return pa.table(columns)


def _compute_margins(
    items: Sequence[Item], ends: npt.NDArray[np.int32], scores: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Compute each item's margin: the answer's score minus the best score of the other choices.

    Args:
        ends: [num_items + 1] int32: offsets of the items' choices.
        scores: [num_choices] float64.

    Returns:
        [num_items] float64.
    """
    parts = [scores[start:end] for start, end in itertools.pairwise(ends.tolist())]
    return np.array(
        [part[item.answer] - np.delete(part, item.answer).max() for part, item in zip(parts, items, strict=True)]
    )


def compute_accuracy(table: pa.Table) -> dict[str, Any]:
    """Compute the figures of all items of a table and, under `groups`, of each value of each group.

    Keys: items; chance, the accuracy of guessing; ties; and accuracy. For each of SCORES, accuracy has the number of
    correct items, their share, and the ends (low, high) of its 95 % interval (Wilson 1927).

    Args:
        table: table of `build_item_table`.
    """
    counts = {name: np.array(table.column("correct").combine_chunks().field(name)) for name in SCORES}
    chance = np.array([1 / len(choices) for choices in table.column("tokens").to_pylist()])
    ties = np.array(table.column("tie").combine_chunks())

    def compute_figures(rows: npt.NDArray[np.int64]) -> dict[str, Any]:
        accuracy = {name: _compute_share(int(counts[name][rows].sum()), len(rows)) for name in SCORES}
        return {
            "items": len(rows),
            "chance": math.fsum(chance[rows]) / len(rows),
            "ties": int(ties[rows].sum()),
            "accuracy": accuracy,
        }

    groups = table.column("groups").combine_chunks() if "groups" in table.column_names else None
    ones = np.ones(len(table), np.int64)
    found = {
        field.name: {name: {**more, **compute_figures(rows)} for name, rows, more in split_rows_by_value(values, ones)}
        for field, values in (zip(groups.type, groups.flatten(), strict=True) if groups is not None else ())
    }
    return {**compute_figures(np.arange(len(table))), "groups": found}


def _compute_share(correct: int, total: int) -> dict[str, float]:
    low, high = compute_wilson_interval(correct, total)
    return {"correct": correct, "share": correct / total, "low": low, "high": high}


def compute_wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """Compute the 95 % interval of a proportion (Wilson 1927).

    It lies within 0 and 1, and is not empty even if all or no items are correct.
    """
    share, weight = correct / total, _Z**2 / total
    middle = (share + weight / 2) / (1 + weight)
    half = math.sqrt(share * (1 - share) * weight + weight**2 / 4) / (1 + weight)
    return min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half))
