"""Differences between models on the same documents, in pairs: how large, how certain, and what would decide them.

Standard errors of two models' figures say nothing about their difference: a document that is hard for one is hard for
the other. So the difference is taken document by document.
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
_MOST_DOCUMENTS = 10**12
"""More than anyone has."""


class Difference(NamedTuple):
    """Bits per byte of one model less those of another."""

    value: float
    """Negative where the first is better."""
    error_of_documents: float
    """Standard error over documents."""
    error_of_seeds: float
    """Standard error over seeds; 0 where both models were trained with a single one, which tells nothing of it."""
    freedom_of_documents: float
    """Degrees of freedom of the first."""
    freedom_of_seeds: int
    """Degrees of freedom of the second, 0 where there is a single seed on both sides."""
    share_better: float
    """Share of the documents that take fewer bits."""
    num_documents: int
    num_seeds: tuple[int, int]
    """Of the one and the other."""

    @property
    def is_none(self) -> bool:
        """Whether the models are the same, as far as these documents tell."""
        return self.value == self.error == 0

    @property
    def error(self) -> float:
        """Standard error, over documents and seeds."""
        return math.hypot(self.error_of_documents, self.error_of_seeds)

    @property
    def freedom(self) -> float:
        """Degrees of freedom of the two errors together."""
        return _degrees_of_freedom(self._variances(1.0))

    def _variances(self, times: float) -> list[tuple[float, float]]:
        """Each variance and its degrees of freedom, with so many times the documents."""
        return [
            (self.error_of_documents**2 / times, self.freedom_of_documents * times),
            (self.error_of_seeds**2, self.freedom_of_seeds),
        ]

    @property
    def interval(self) -> tuple[float, float]:
        """Confidence interval of 95 %."""
        if self.error == math.inf:
            return -math.inf, math.inf
        reach = float(stdtrit(self.freedom, (1 + CONFIDENCE) / 2)) * self.error
        return self.value - reach, self.value + reach

    @property
    def p_value(self) -> float:
        """Probability of a difference at least as large between models that are equally good; two-sided."""
        if self.error in (0, math.inf):
            return 0.0 if self.value and not self.error else 1.0
        return float(2 * stdtr(self.freedom, -abs(self.value) / self.error))

    def documents_needed(self, num_comparisons: int = 1) -> int | None:
        """Documents with which a difference of this size would be found in POWER of all cases.

        None where no number of documents would do: there is no difference, or seeds alone hide it.

        Args:
            num_comparisons: how many differences are looked for at once.
        """
        level = 1 - (1 - CONFIDENCE) / 2 / num_comparisons

        def is_found(number: int) -> bool:
            variances = self._variances(number / self.num_documents)
            error = math.sqrt(sum(variance for variance, _ in variances))
            freedom = _degrees_of_freedom(variances)
            return abs(self.value) >= (float(stdtrit(freedom, level)) + NormalDist().inv_cdf(POWER)) * error

        if self.num_documents < 2 or not self.value or not is_found(_MOST_DOCUMENTS):
            return None
        return bisect.bisect_left(range(_MOST_DOCUMENTS), True, lo=2, key=is_found)


def compare_models(
    ours: Mapping[str, _Bits], others: Mapping[str, _Bits], num_bytes: npt.NDArray[np.int64]
) -> Difference:
    """The difference between two models, each trained with one seed or with several.

    Over documents: the ratio estimator of the pairs' differences, averaged over seeds. Over seeds: the variance of the
    differences where both have the same seeds, else that of the figures, taken to be the same for both models. The
    variances add up, since documents and seeds are drawn independently; how seeds differ from document to document
    counts in both, so that the sum is on the safe side.

    Args:
        ours: seed to the bits of each document, [num_documents].
        others: the same of the other model, or of the same model before a change.
        num_bytes: [num_documents], of the documents' text.
    """
    total = int(num_bytes.sum())
    bits = np.mean(list(ours.values()), axis=0) - np.mean(list(others.values()), axis=0)
    value, error_of_documents, freedom = _estimate_ratio(bits, num_bytes)
    if ours.keys() == others.keys():
        figures = [[(ours[seed] - others[seed]).sum() / total for seed in ours]]
    else:
        figures = [[found.sum() / total for found in model.values()] for model in (ours, others)]
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
    """sum(bits) / sum(num_bytes), its standard error over documents, and the error's degrees of freedom.

    The jackknife (Cochran 1977, section 6.17) rather than the linear approximation, which is too small for few
    documents of very different lengths; long documents count for more, so that there are as many degrees of freedom as
    documents of equal length would give (Kish 1965, section 8.2). A single document says nothing about others.
    """
    total, number = int(num_bytes.sum()), len(bits)
    value = math.fsum(bits) / total
    if number < 2:
        return value, math.inf, 1.0
    without = (value * total - bits) / (total - num_bytes)  # the ratio of all documents but one
    error = math.sqrt((number - 1) / number * math.fsum((without - value) ** 2))
    return value, error, max(1.0, total**2 / float((num_bytes.astype(np.float64) ** 2).sum()) - 1)


def _pool_variance(figures: Sequence[Sequence[float]]) -> tuple[float, int]:
    """The variance of a sum or difference of means, one of each of `figures`, and its degrees of freedom.

    0 and 0 where there is a single figure of each.
    """
    freedom = sum(len(of) - 1 for of in figures)
    squares = sum(float(np.var(of)) * len(of) for of in figures)
    return (squares / freedom * sum(1 / len(of) for of in figures), freedom) if freedom else (0.0, 0)


def _degrees_of_freedom(parts: Sequence[tuple[float, float]]) -> float:
    """Of a sum of variances, each with its own degrees of freedom (Satterthwaite 1946)."""
    total = sum(variance for variance, _ in parts)
    squares = sum(variance**2 / freedom for variance, freedom in parts if freedom > 0)
    return total**2 / squares if squares > 0 else 1.0


def correct_p_values(p_values: Sequence[float]) -> list[float]:
    """The p-values of comparisons made at once, corrected for their number (Holm 1979)."""
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = highest
    return corrected


def judge(difference: Difference, corrected_p: float) -> str:
    """better, worse, the same, or not decided."""
    if difference.is_none:
        return "the same"
    if corrected_p <= 1 - CONFIDENCE:
        return "better" if difference.value < 0 else "worse"
    return "not decided"


def say_what_would_decide(difference: Difference, num_comparisons: int) -> str:
    """What it takes to decide a difference that is not: so many more documents, or more seeds."""
    if difference.num_documents < 2:
        return "more documents"
    needed = difference.documents_needed(num_comparisons)
    if needed is None:
        return "more seeds" if difference.value and difference.error_of_seeds else ""
    return f"{max(1, needed - difference.num_documents):,} documents"
