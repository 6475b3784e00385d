"""Paired differences between models on the same documents: size, uncertainty, and the data needed to decide them.

The standard errors of two models' figures say nothing about their difference, because a document that is hard for one
model is hard for the other too. Differences are therefore computed document by document.
"""

import bisect
import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import stdtr, stdtrit

_Bits = npt.NDArray[np.float64]

CONFIDENCE, POWER = 0.95, 0.8
_MAX_DOCUMENTS = 10**12
"""Upper bound of the search, more documents than any corpus has."""


class Difference(NamedTuple):
    """Bits per byte of one model minus those of another."""

    value: float
    """Difference in bits per byte; negative if the first model is better."""
    error_of_documents: float
    """Standard error over documents."""
    error_of_seeds: float
    """Standard error over seeds; 0 if both models have a single seed, which leaves it unknown."""
    freedom_of_documents: float
    """Degrees of freedom of `error_of_documents`."""
    freedom_of_seeds: int
    """Degrees of freedom of `error_of_seeds`; 0 if both models have a single seed."""
    share_better: float
    """Share of the documents for which the first model takes fewer bits."""
    num_documents: int
    num_seeds: tuple[int, int]
    """Number of seeds of the first and of the second model."""

    @property
    def is_zero(self) -> bool:
        """True if the models give identical results on these documents."""
        return self.value == self.error == 0

    @property
    def error(self) -> float:
        """Standard error over documents and seeds together."""
        return math.hypot(self.error_of_documents, self.error_of_seeds)

    @property
    def freedom(self) -> float:
        """Degrees of freedom of `error`."""
        return _combine_degrees_of_freedom(self._scale_variances(1.0))

    def _scale_variances(self, scale: float) -> list[tuple[float, float]]:
        """Return both variances with their degrees of freedom, for `scale` times as many documents."""
        return [
            (self.error_of_documents**2 / scale, self.freedom_of_documents * scale),
            (self.error_of_seeds**2, self.freedom_of_seeds),
        ]

    @property
    def interval(self) -> tuple[float, float]:
        """Confidence interval of 95 %, in bits per byte."""
        if self.error == math.inf:
            return -math.inf, math.inf
        reach = float(stdtrit(self.freedom, (1 + CONFIDENCE) / 2)) * self.error
        return self.value - reach, self.value + reach

    @property
    def p_value(self) -> float:
        """Two-sided p-value of the hypothesis that the models are equally good."""
        if self.error in (0, math.inf):
            return 0.0 if self.value and not self.error else 1.0
        return float(2 * stdtr(self.freedom, -abs(self.value) / self.error))

    def estimate_documents_needed(self, num_comparisons: int = 1) -> int | None:
        """Return the number of documents with which a difference of this size is found with probability POWER.

        Returns None if no number of documents is enough: the difference is zero, or the error over seeds is too large.

        Args:
            num_comparisons: number of differences that are tested together.
        """
        level = 1 - (1 - CONFIDENCE) / 2 / num_comparisons

        def is_found(number: int) -> bool:
            variances = self._scale_variances(number / self.num_documents)
            error = math.sqrt(sum(variance for variance, _ in variances))
            freedom = _combine_degrees_of_freedom(variances)
            return abs(self.value) >= (float(stdtrit(freedom, level)) + NormalDist().inv_cdf(POWER)) * error

        if self.num_documents < 2 or not self.value or not is_found(_MAX_DOCUMENTS):
            return None
        return bisect.bisect_left(range(_MAX_DOCUMENTS), True, lo=2, key=is_found)


def compare_models(
    ours: Mapping[str, _Bits], others: Mapping[str, _Bits], num_bytes: npt.NDArray[np.int64]
) -> Difference:
    """Compute the difference between two models, each trained with one or several seeds.

    The error over documents is that of the ratio estimator of the paired differences, averaged over seeds. The error
    over seeds comes from the variance of the differences if both models have the same seeds. Otherwise it comes from
    the variance of the figures, assumed to be equal for both models. The variances are added, because documents and
    seeds are drawn independently. The interaction of both is counted twice, so the sum is conservative.

    Args:
        ours: bits of each document by seed, `[num_documents]`, float64.
        others: the same for the other model, or for the same model before a change.
        num_bytes: bytes of text of each document, `[num_documents]`, int64.
    """
    total = int(num_bytes.sum())
    # [num_seeds, num_documents] averaged to [num_documents] for both models.
    bits = np.mean(list(ours.values()), axis=0) - np.mean(list(others.values()), axis=0)
    value, error_of_documents, freedom = _estimate_ratio(bits, num_bytes)
    if ours.keys() == others.keys():  # one list of differences by seed, otherwise one list of figures per model
        figures = [[(ours[seed] - others[seed]).sum() / total for seed in ours]]
    else:
        figures = [[seed_bits.sum() / total for seed_bits in model.values()] for model in (ours, others)]
    variance_of_seeds, freedom_of_seeds = _pool_variance(figures)
    return Difference(
        value=value,
        error_of_documents=error_of_documents,
        error_of_seeds=math.sqrt(variance_of_seeds),
        freedom_of_documents=freedom,
        freedom_of_seeds=freedom_of_seeds,
        share_better=float((bits < 0).mean()),
        num_documents=len(num_bytes),
        num_seeds=(len(ours), len(others)),
    )


def _estimate_ratio(bits: _Bits, num_bytes: npt.NDArray[np.int64]) -> tuple[float, float, float]:
    """Return sum(bits) / sum(num_bytes), its standard error over documents, and the error's degrees of freedom.

    The error is the jackknife's (Cochran 1977, section 6.17): the linear approximation is too small for a few documents
    of very different lengths. Long documents count for more, so the degrees of freedom are those of the equivalent
    number of documents of equal length (Kish 1965, section 8.2). The error of a single document is infinite.

    Args:
        bits: `[num_documents]`, float64.
        num_bytes: `[num_documents]`, int64.
    """
    total, number = int(num_bytes.sum()), len(bits)
    value = math.fsum(bits) / total
    if number < 2:
        return value, math.inf, 1.0
    without = (value * total - bits) / (total - num_bytes)  # [num_documents], the ratio without each document
    error = math.sqrt((number - 1) / number * math.fsum((without - value) ** 2))
    return value, error, max(1.0, total**2 / float((num_bytes.astype(np.float64) ** 2).sum()) - 1)


def _pool_variance(figures: Sequence[Sequence[float]]) -> tuple[float, int]:
    """Return the variance of a sum or difference of the means of `figures`, and its degrees of freedom.

    Both are 0 if every sequence has a single figure.
    """
    freedom = sum(len(values) - 1 for values in figures)
    squares = sum(float(np.var(values)) * len(values) for values in figures)
    return (squares / freedom * sum(1 / len(values) for values in figures), freedom) if freedom else (0.0, 0)


def _combine_degrees_of_freedom(parts: Sequence[tuple[float, float]]) -> float:
    """Combine the degrees of freedom of a sum of (variance, degrees of freedom) `parts` (Satterthwaite 1946)."""
    total = sum(variance for variance, _ in parts)
    squares = sum(variance**2 / freedom for variance, freedom in parts if freedom > 0)
    return total**2 / squares if squares > 0 else 1.0


def correct_p_values(p_values: Sequence[float]) -> list[float]:
    """Correct the p-values of several comparisons for their number (Holm 1979)."""
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = highest
    return corrected


def judge_difference(difference: Difference, corrected_p: float) -> str:
    """Return the verdict: better, worse, the same, or not decided."""
    if difference.is_zero:
        return "the same"
    if corrected_p <= 1 - CONFIDENCE:
        return "better" if difference.value < 0 else "worse"
    return "not decided"


def describe_needed_data(difference: Difference, num_comparisons: int) -> str:
    """Say how many more documents, or that more seeds, are needed to decide an undecided difference."""
    if difference.num_documents < 2:
        return "more documents"
    needed = difference.estimate_documents_needed(num_comparisons)
    if needed is None:
        return "more seeds" if difference.value and difference.error_of_seeds else ""
    return f"{max(1, needed - difference.num_documents):,} documents"
