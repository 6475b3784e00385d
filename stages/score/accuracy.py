"""Accuracy of scored items: of all of them, and of those that have the same value of a group."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stages.figures.groups import rows_by_value
from stages.score.items import Item

SCORES = ("sum", "per_token", "per_byte")
"""By what choices are compared: log-likelihood, log-likelihood per token, log-likelihood per UTF-8 byte."""

_Z = 1.959963984540054  # of a two-sided interval of 95 %


def tabulate(
    items: Sequence[Item], groups: Sequence[str], nats: npt.NDArray[np.float64], num_tokens: npt.NDArray[np.int64]
) -> pa.Table:
    """A row for each item.

    Columns: source string; row int64; groups struct<NAME: string, ...>, if there are any; answer int64;
    log_likelihood list<double> (nats), tokens list<int64>, bytes list<int64>, a value for each choice; correct
    struct<sum: bool, per_token: bool, per_byte: bool>, whether the answer has the highest score; tie bool, whether
    the best of the other choices has exactly the answer's log-likelihood, which counts as wrong.

    Args:
        groups: names of the groups.
        nats: log-likelihoods of all choices of all items, [num_choices].
        num_tokens: tokens of each of these choices, [num_choices].
    """
    num_bytes = np.array([len(choice.encode()) for item in items for choice in item.choices], np.int64)
    ends = np.cumsum([0, *(len(item.choices) for item in items)], dtype=np.int32)  # [num_items + 1]
    scores = {"sum": nats, "per_token": nats / num_tokens, "per_byte": nats / num_bytes}
    margins = {name: _margins(items, ends, scores[name]) for name in SCORES}
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


def _margins(
    items: Sequence[Item], ends: npt.NDArray[np.int32], scores: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """By how much the score of each item's answer is above the best of the others, [num_items]."""
    parts = [scores[start:end] for start, end in itertools.pairwise(ends.tolist())]
    return np.array(
        [part[item.answer] - np.delete(part, item.answer).max() for part, item in zip(parts, items, strict=True)]
    )


def accuracy_figures(table: pa.Table) -> dict[str, Any]:
    """The figures of all items of a table, and under `groups` those of each value of each group.

    Keys: items, chance (the accuracy of guessing), ties, and accuracy, which has for each of SCORES the number of items
    that are correct, their share, and its 95 % interval (Wilson 1927), low to high.
    """
    counts = {name: np.array(table.column("correct").combine_chunks().field(name)) for name in SCORES}
    chance = np.array([1 / len(choices) for choices in table.column("tokens").to_pylist()])
    ties = np.array(table.column("tie").combine_chunks())

    def figures(rows: npt.NDArray[np.int64]) -> dict[str, Any]:
        accuracy = {name: _share(int(counts[name][rows].sum()), len(rows)) for name in SCORES}
        return {
            "items": len(rows),
            "chance": math.fsum(chance[rows]) / len(rows),
            "ties": int(ties[rows].sum()),
            "accuracy": accuracy,
        }

    groups = table.column("groups").combine_chunks() if "groups" in table.column_names else None
    ones = np.ones(len(table), np.int64)
    found = {
        field.name: {name: {**more, **figures(rows)} for name, rows, more in rows_by_value(values, ones)}
        for field, values in (zip(groups.type, groups.flatten(), strict=True) if groups is not None else ())
    }
    return {**figures(np.arange(len(table))), "groups": found}


def _share(correct: int, total: int) -> dict[str, float]:
    low, high = wilson_interval(correct, total)
    return {"correct": correct, "share": correct / total, "low": low, "high": high}


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson 1927): within 0 to 1, and not empty where all or none are correct."""
    share, weight = correct / total, _Z**2 / total
    middle = (share + weight / 2) / (1 + weight)
    half = math.sqrt(share * (1 - share) * weight + weight**2 / 4) / (1 + weight)
    return min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half))
