"""Metrics of all documents, and of the documents with the same value of a property (group)."""

import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stages.core.artifacts import to_numpy
from stages.core.errors import StageError
from stages.figures.scores import Scores, get_scores

MAX_VALUES = 100  # values of a group that are reported separately
NONE, OTHERS = "(none)", "(others)"
"""Keys for the documents without a value, and for all values that are not among the MAX_VALUES largest."""


def compute_document_figures(metric: str, scores: Scores) -> dict[str, Any]:
    """Return the block-independent metric of all documents, its standard error, and counts.

    Keys: `metric` (bits per UTF-8 byte of text), `metric` with `_se` (its standard error over documents), documents,
    tokens (of text), bytes.
    """
    ratio, error = compute_ratio_with_error(scores.bits, scores.num_bytes)
    return {metric: ratio, f"{metric}_se": error, **_count_totals(scores)}


def compute_ratio_with_error(bits: npt.NDArray[np.float64], num_bytes: npt.NDArray[np.int64]) -> tuple[float, float]:
    """Return sum(bits) / sum(num_bytes), and its standard error over documents.

    Ratio estimator: Cochran 1977, section 6.4. The error of a single document cannot be estimated and is given as 0.

    Args:
        bits, num_bytes: one value per document, [num_documents].

    Raises:
        StageError: if the documents have no text.
    """
    total, count = int(num_bytes.sum()), len(bits)
    if total == 0:
        raise StageError("the documents to evaluate have no text, so bits per byte is undefined: provide more text")
    ratio = math.fsum(bits) / total
    residuals = math.fsum((bits - ratio * num_bytes) ** 2)
    return ratio, math.sqrt(residuals * count / (count - 1)) / total if count > 1 else 0.0


def _count_totals(scores: Scores) -> dict[str, int]:
    return {
        "documents": len(scores.bits),
        "tokens": int(scores.num_tokens.sum()),
        "bytes": int(scores.num_bytes.sum()),
    }


def compute_group_figures(metric: str, table: pa.Table) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the metrics of each value of `source` and of each group that download stored, most bytes first.

    The keys of `compute_document_figures` (from bits_after), base_METRIC (from bits_before), and the sums `bits` and
    `base_bits`. Documents without text have no metrics, and a single document has no standard error. The values beyond
    MAX_VALUES are combined; `values` is their number.
    """
    after, before = get_scores(table, "bits_after"), get_scores(table, "bits_before").bits
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for group, values in get_group_columns(table).items():
        found[group] = {
            name: {**extra, **_compute_value_figures(metric, after.select(rows), before[rows])}
            for name, rows, extra in split_rows_by_value(values, after.num_bytes)
        }
    return found


def get_group_columns(table: pa.Table) -> dict[str, pa.Array]:
    """Return the values of each group, [num_documents] strings or nulls."""
    columns = {"source": table.column("source").combine_chunks()}
    if "groups" in table.column_names:
        groups = table.column("groups").combine_chunks()
        columns |= dict(zip((field.name for field in groups.type), groups.flatten(), strict=True))
    return columns


def split_rows_by_value(
    values: pa.Array, num_bytes: npt.NDArray[np.int64]
) -> Iterator[tuple[str, npt.NDArray[np.int64], dict[str, int]]]:
    """Yield the key of each value, its rows, and extra figures, most bytes first.

    The rest of the values beyond MAX_VALUES comes last, under the key OTHERS, with their number as the extra figure.

    Args:
        values: strings or nulls, [num_documents].
        num_bytes: bytes of each document, [num_documents] int64.
    """
    encoded = values.dictionary_encode(null_encoding="encode")
    codes, distinct = to_numpy(encoded.indices), encoded.dictionary.to_pylist()  # codes: [num_documents]
    sizes = np.bincount(codes, num_bytes, len(distinct))  # [num_values] bytes of each value
    order = sorted(range(len(distinct)), key=lambda code: (-sizes[code], distinct[code] or "", distinct[code] is None))
    # Rank of each value, [num_values]: all values beyond MAX_VALUES share the last rank.
    value_ranks = np.empty(len(distinct), np.int64)
    value_ranks[order] = np.minimum(np.arange(len(distinct)), MAX_VALUES)
    ranks = value_ranks[codes]  # [num_documents]
    rows = np.argsort(ranks, kind="stable")
    num_entries = min(len(distinct), MAX_VALUES + 1)
    parts = np.split(rows, np.searchsorted(ranks[rows], np.arange(1, num_entries)))
    for number, code in enumerate(order[:MAX_VALUES]):
        yield format_value_name(distinct[code]), parts[number], {}
    if len(distinct) > MAX_VALUES:
        yield OTHERS, parts[MAX_VALUES], {"values": len(distinct) - MAX_VALUES}


def format_value_name(value: str | None) -> str:
    """Return the key for a value of a group: the value itself, quoted if it is empty or looks like another key."""
    if value is None:
        return NONE
    return json.dumps(value, ensure_ascii=False) if value in ("", NONE, OTHERS) or value.startswith('"') else value


def _compute_value_figures(metric: str, scores: Scores, before: npt.NDArray[np.float64]) -> dict[str, Any]:
    """Return the metrics of the documents with one value; there may be only one document, or no text.

    Args:
        before: bits before training, [num_documents].
    """
    found: dict[str, Any] = {}
    if scores.num_bytes.any():
        found[metric], error = compute_ratio_with_error(scores.bits, scores.num_bytes)
        found |= {f"{metric}_se": error} if len(before) > 1 else {}
        found[f"base_{metric}"] = compute_ratio_with_error(before, scores.num_bytes)[0]
    return {**found, **_count_totals(scores), "bits": math.fsum(scores.bits), "base_bits": math.fsum(before)}
