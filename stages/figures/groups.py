"""Figures of documents: of all of them, and of those that have the same value of a property."""

import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stages.core.artifacts import to_numpy
from stages.core.errors import StageError
from stages.figures.scores import Scores, scores_in

MOST_VALUES = 100  # of a group, with figures of their own
NONE, OTHERS = "(none)", "(others)"
"""Names of the documents that have no value, and of those whose values are not among the MOST_VALUES largest."""


def document_figures(metric: str, scores: Scores) -> dict[str, Any]:
    """The block-independent metric of all documents, its standard error, and counts.

    Keys: the metric (bits per UTF-8 byte of text), the same with `_se` (its standard error over documents), documents,
    tokens (of text), bytes.
    """
    ratio, error = ratio_with_error(scores.bits, scores.num_bytes)
    return {metric: ratio, f"{metric}_se": error, **_counts(scores)}


def ratio_with_error(bits: npt.NDArray[np.float64], num_bytes: npt.NDArray[np.int64]) -> tuple[float, float]:
    """sum(bits) / sum(num_bytes) and its standard error over documents (ratio estimator: Cochran 1977, section 6.4).

    The error is 0 for a single document, which says nothing about others.
    """
    total, count = int(num_bytes.sum()), len(bits)
    if total == 0:
        raise StageError("the documents to evaluate hold no text, so that they have no bits per byte: give more text")
    ratio = math.fsum(bits) / total
    residuals = math.fsum((bits - ratio * num_bytes) ** 2)
    return ratio, math.sqrt(residuals * count / (count - 1)) / total if count > 1 else 0.0


def _counts(scores: Scores) -> dict[str, int]:
    return {
        "documents": len(scores.bits),
        "tokens": int(scores.num_tokens.sum()),
        "bytes": int(scores.num_bytes.sum()),
    }


def figures_by_group(metric: str, table: pa.Table) -> dict[str, dict[str, dict[str, Any]]]:
    """For `source` and each group that download kept, the figures of each value, the one with the most bytes first.

    Figures: as in `document_figures`, by bits_after, with base_METRIC by bits_before, and `bits` and `base_bits`, their
    sums. Without the metrics where there is no text, and without the standard error of a single document. The figures
    of the values beyond MOST_VALUES are those of all their documents together, with their number as `values`.
    """
    after, before = scores_in(table, "bits_after"), scores_in(table, "bits_before").bits
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for group, values in group_columns(table).items():
        found[group] = {
            name: {**more, **_figures_of(metric, after.of(rows), before[rows])}
            for name, rows, more in rows_by_value(values, after.num_bytes)
        }
    return found


def group_columns(table: pa.Table) -> dict[str, pa.Array]:
    """The values of each group, [num_documents] strings or nulls."""
    columns = {"source": table.column("source").combine_chunks()}
    if "groups" in table.column_names:
        groups = table.column("groups").combine_chunks()
        columns |= dict(zip((field.name for field in groups.type), groups.flatten(), strict=True))
    return columns


def rows_by_value(
    values: pa.Array, num_bytes: npt.NDArray[np.int64]
) -> Iterator[tuple[str, npt.NDArray[np.int64], dict[str, int]]]:
    """The name of each value, the rows that have it, and how many values it stands for if it stands for the rest."""
    encoded = values.dictionary_encode(null_encoding="encode")
    codes, distinct = to_numpy(encoded.indices), encoded.dictionary.to_pylist()
    sizes = np.bincount(codes, num_bytes, len(distinct))
    order = sorted(range(len(distinct)), key=lambda code: (-sizes[code], distinct[code] or "", distinct[code] is None))
    places = np.empty(len(distinct), np.int64)
    places[order] = np.minimum(np.arange(len(distinct)), MOST_VALUES)  # of each value among the entries
    places = places[codes]  # [num_documents]
    rows = np.argsort(places, kind="stable")
    num_entries = min(len(distinct), MOST_VALUES + 1)
    parts = np.split(rows, np.searchsorted(places[rows], np.arange(1, num_entries)))
    for number, code in enumerate(order[:MOST_VALUES]):
        yield value_name(distinct[code]), parts[number], {}
    if len(distinct) > MOST_VALUES:
        yield OTHERS, parts[MOST_VALUES], {"values": len(distinct) - MOST_VALUES}


def value_name(value: str | None) -> str:
    """The key under which the figures of `value` are: the value, in quotes if it is empty or looks like a key."""
    if value is None:
        return NONE
    return json.dumps(value, ensure_ascii=False) if value in ("", NONE, OTHERS) or value.startswith('"') else value


def _figures_of(metric: str, scores: Scores, before: npt.NDArray[np.float64]) -> dict[str, Any]:
    """The figures of some documents, of which there may be one, and which may hold no text."""
    found: dict[str, Any] = {}
    if scores.num_bytes.any():
        found[metric], error = ratio_with_error(scores.bits, scores.num_bytes)
        found |= {f"{metric}_se": error} if len(before) > 1 else {}
        found[f"base_{metric}"] = ratio_with_error(before, scores.num_bytes)[0]
    return {**found, **_counts(scores), "bits": math.fsum(scores.bits), "base_bits": math.fsum(before)}
