"""Result of a scaling ladder: the law, its back-test on the largest rung, and its extrapolation; reports/ladder."""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from stages.core.artifacts import read_json, write_json
from stages.core.errors import StageError, format_cause, printable
from tools.ladder.file import MIN_KINDS, Ladder, Rung
from tools.ladder.rungs import MeasuredRung
from tools.scaling_law import MIN_POINTS, OPERATIONS_PER_WEIGHT, Fit, Law, fit_with_intervals

DIRECTORY = Path("reports/ladder")
_NUM_CURVE_POINTS = 25
FACTOR = 10
"""Default budget of the extrapolation, as a multiple of the largest rung's compute."""


@dataclass(kw_only=True)
class Interval:
    """Value with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(kw_only=True)
class Parameter(Interval):
    """Parameter of the law."""

    identified: bool
    """False if the interval is too wide (`Fit.is_identified`): the rungs do not determine the parameter."""


@dataclass(kw_only=True)
class Point:
    """Rung as a point of the fit: the mean over its seeds."""

    size: str
    length: str
    experiments: list[str]
    revs: list[str]
    """Commit of each experiment."""
    num_parameters: int
    num_non_embedding: int
    num_tokens: int
    num_unique_tokens: int
    bits: float
    """Bits per byte on validation."""
    error: float
    """Standard error over documents. The rungs share their documents, so it is no error of their differences."""
    deviation_of_seeds: float | None
    """Standard deviation over seeds; null for a single seed."""
    fitted: float | None
    """Prediction by the law of all rungs; null for fewer rungs than the law needs."""

    @property
    def compute(self) -> float:
        """Operations of training, 6 N D."""
        return float(OPERATIONS_PER_WEIGHT) * self.num_parameters * self.num_tokens

    @property
    def num_epochs(self) -> float:
        return self.num_tokens / self.num_unique_tokens


@dataclass(kw_only=True)
class Curve:
    """Predictions of the back-test for one size, by increasing numbers of tokens."""

    size: str
    compute: list[float]
    values: list[float]
    low: list[float]
    high: list[float]


@dataclass(kw_only=True)
class BackTest:
    """Prediction of the rung with most compute by the law of all others."""

    size: str
    length: str
    predicted: Interval
    measured: float
    within: bool
    """True if the measured value is within the interval."""
    larger: list[str]
    """Experiments without results that have or may have more compute."""
    curves: list[Curve]


@dataclass(kw_only=True)
class Optimum:
    """Numbers of parameters and tokens with the lowest predicted loss for a budget."""

    num_parameters: Interval
    num_tokens: Interval


@dataclass(kw_only=True)
class Extrapolation:
    """Prediction for a compute budget, by the law of all rungs."""

    compute: float
    num_parameters: float
    num_tokens: float
    predicted: Interval
    optimum: Optimum | None
    """Null if the rungs do not determine it."""


@dataclass(kw_only=True)
class LadderResult:
    """Content of reports/ladder/NAME.json."""

    name: str
    task: str
    commit: str
    """Commit from which the experiments were run."""
    metric: str
    points: list[Point]
    missing: list[str]
    """Experiments of the ladder without results, which are not in the points."""
    parameters: dict[str, Parameter]
    """E, A, B, alpha and beta of the law of all rungs."""
    log_error: float
    """Standard deviation of the logarithm of the metric around this law."""
    back_test: BackTest
    extrapolation: Extrapolation


def make_points(rungs: Sequence[MeasuredRung]) -> list[Point]:
    """Average the rungs over seeds; return the points by increasing compute."""
    groups: dict[tuple[str, str], list[MeasuredRung]] = {}
    for rung in rungs:
        groups.setdefault((rung.size, rung.length), []).append(rung)
    points = []
    for (size, length), members in groups.items():
        first, bits = members[0], [rung.bits for rung in members]
        points.append(
            Point(
                size=size,
                length=length,
                experiments=[rung.experiment for rung in members],
                revs=[rung.rev for rung in members],
                num_parameters=first.num_parameters,
                num_non_embedding=first.num_non_embedding,
                num_tokens=first.num_tokens,
                num_unique_tokens=first.num_unique_tokens,
                bits=statistics.fmean(bits),
                error=statistics.fmean(rung.error for rung in members),
                deviation_of_seeds=statistics.stdev(bits) if len(bits) > 1 else None,
                fitted=None,
            )
        )
    return sorted(points, key=lambda point: point.compute)


def find_missing(ladder: Ladder, points: Sequence[Point]) -> list[Rung]:
    """Return the rungs of a ladder that are not in the points."""
    measured = {experiment for point in points for experiment in point.experiments}
    return [rung for rung in ladder.rungs if rung.experiment not in measured]


def analyze(ladder: Ladder, commit: str, metric: str, points: list[Point], budget: float | None) -> LadderResult:
    """Fit the law, back-test it on the point with most compute, and extrapolate.

    Args:
        commit: commit from which the experiments were run.
        points: by increasing compute; their `fitted` is set.
        budget: compute to extrapolate to, in operations; None: FACTOR times that of the last point.

    Raises:
        StageError: if there are too few points.
    """
    check_enough(points)
    fit = _fit_points(points)
    for point, value in zip(points, _predict(fit.law, points), strict=True):
        point.fitted = value
    parameters = {}
    for key in Law._fields:
        low, high = fit.compute_interval([getattr(law, key) for law in fit.replicates])
        value, identified = getattr(fit.law, key), fit.is_identified(key)
        parameters[key] = Parameter(value=value, low=low, high=high, identified=identified)
    budget = FACTOR * points[-1].compute if budget is None else budget
    missing = find_missing(ladder, points)
    return LadderResult(
        name=ladder.name,
        task=ladder.task,
        commit=commit,
        metric=metric,
        points=points,
        missing=[rung.experiment for rung in missing],
        parameters=parameters,
        log_error=fit.log_error,
        back_test=_back_test(points, missing),
        extrapolation=_extrapolate(fit, points[-1], budget),
    )


def check_enough(points: Sequence[Point]) -> None:
    """Raise StageError if there are too few points to fit the law without the one with most compute."""
    others = points[:-1]
    kinds = {
        "rungs": (len(others), MIN_POINTS),
        "sizes": (len({point.num_parameters for point in others}), MIN_KINDS),
        "token counts": (len({point.num_tokens for point in others}), MIN_KINDS),
    }
    if few := [f"{found} of at least {least} {kind}" for kind, (found, least) in kinds.items() if found < least]:
        raise StageError(f"too few rungs with results to fit the law without the largest: {', '.join(few)}")


def _fit_points(points: Sequence[Point]) -> Fit:
    return fit_with_intervals(
        [point.num_parameters for point in points],
        [point.num_tokens for point in points],
        [point.bits for point in points],
    )


def _predict(law: Law, points: Sequence[Point]) -> list[float]:
    sizes, tokens = [point.num_parameters for point in points], [point.num_tokens for point in points]
    return [float(value) for value in law.predict(sizes, tokens)]


def _make_interval(fit: Fit, value: float, *replicates: float) -> Interval:
    low, high = fit.compute_interval(replicates)
    return Interval(value=value, low=low, high=high)


def _predict_with_interval(fit: Fit, num_parameters: float, num_tokens: float) -> Interval:
    low, high = fit.predict_interval(num_parameters, num_tokens)
    return Interval(value=float(fit.law.predict(num_parameters, num_tokens)), low=low, high=high)


def _back_test(points: Sequence[Point], missing: Sequence[Rung]) -> BackTest:
    *others, largest = points
    fit = _fit_points(others)
    predicted = _predict_with_interval(fit, largest.num_parameters, largest.num_tokens)
    return BackTest(
        size=largest.size,
        length=largest.length,
        predicted=predicted,
        measured=largest.bits,
        within=predicted.low <= largest.bits <= predicted.high,
        larger=list(_list_larger(points, missing)),
        curves=list(_list_curves(fit, points)),
    )


def _list_larger(points: Sequence[Point], missing: Sequence[Rung]) -> Iterator[str]:
    """Yield the missing experiments that have more compute than the last point, or an unknown one.

    The compute of a missing rung is known if its size was measured with another length, and its length with another
    size.
    """
    sizes = {point.size: float(point.num_parameters) for point in points}
    lengths = {point.length: float(point.num_tokens) for point in points}
    measured = {(point.size, point.length) for point in points}  # with another seed
    for rung in missing:
        compute = OPERATIONS_PER_WEIGHT * sizes.get(rung.size, math.inf) * lengths.get(rung.length, math.inf)
        if (rung.size, rung.length) not in measured and compute > points[-1].compute:
            yield rung.experiment


def _list_curves(fit: Fit, points: Sequence[Point]) -> Iterator[Curve]:
    """Yield the predictions for each size, over the token counts of its points."""
    for size in dict.fromkeys(point.size for point in points):
        own = [point for point in points if point.size == size]
        counts = [point.num_tokens for point in own]
        tokens = np.geomspace(min(counts), max(counts), _NUM_CURVE_POINTS if len(set(counts)) > 1 else 1)
        found = [_predict_with_interval(fit, own[0].num_parameters, float(count)) for count in tokens]
        yield Curve(
            size=size,
            compute=[float(OPERATIONS_PER_WEIGHT * own[0].num_parameters * count) for count in tokens],
            values=[interval.value for interval in found],
            low=[interval.low for interval in found],
            high=[interval.high for interval in found],
        )


def _extrapolate(fit: Fit, largest: Point, compute: float) -> Extrapolation:
    """Predict the metric for a budget, with N and D both scaled by the root of its ratio to that of `largest`."""
    scale = math.sqrt(compute / largest.compute)
    num_parameters, num_tokens = largest.num_parameters * scale, largest.num_tokens * scale
    optimum = None
    if fit.is_identified("alpha") and fit.is_identified("beta"):
        shapes = [law.optimize_shape(compute) for law in (fit.law, *fit.replicates)]
        sizes, tokens = zip(*shapes, strict=True)
        optimum = Optimum(num_parameters=_make_interval(fit, *sizes), num_tokens=_make_interval(fit, *tokens))
    return Extrapolation(
        compute=compute,
        num_parameters=num_parameters,
        num_tokens=num_tokens,
        predicted=_predict_with_interval(fit, num_parameters, num_tokens),
        optimum=optimum,
    )


# -- description -------------------------------------------------------------------------------------------------------


def describe_result(result: LadderResult) -> Iterator[str]:
    """Yield lines on the rungs, the back-test, the law and the extrapolation."""
    yield f"{len(result.points)} rungs with results, of commit {result.commit[:7]}."
    yield from describe_missing(result.missing)
    yield ""
    yield from _describe_back_test(result, result.back_test)
    form = "E + A / N^alpha + B / D^beta"
    yield f"\nLaw of all {len(result.points)} rungs: {form}, relative error {result.log_error:.2%}"
    for name, parameter in result.parameters.items():
        note = "" if parameter.identified else "  not determined by these rungs"
        value, low, high = (_format_parameter(number) for number in (parameter.value, parameter.low, parameter.high))
        yield f"  {name:5}  {value} ({low} to {high}){note}"
    yield from _describe_extrapolation(result.extrapolation, result.points[-1])


def describe_missing(missing: Sequence[str]) -> Iterator[str]:
    """Yield a line on experiments without results; nothing if there are none."""
    if missing:
        yield f"Without results, and not in the fit: {', '.join(missing)}"


def _describe_back_test(result: LadderResult, back_test: BackTest) -> Iterator[str]:
    yield (
        f"Back-test: the other {len(result.points) - 1} rungs predict"
        f" {_format_bits(back_test.predicted)} for {back_test.size} {back_test.length}, the rung with most compute."
    )
    yield f"  measured: {back_test.measured:.4f}, within the interval: {'yes' if back_test.within else 'no'}"
    if back_test.larger:
        yield f"  not the largest rung of the ladder: {', '.join(back_test.larger)} may have more compute"
    if not back_test.within:
        yield from (f"  possible reason: {reason}" for reason in _explain_miss(result))


def _describe_extrapolation(extrapolation: Extrapolation, largest: Point) -> Iterator[str]:
    ratio = extrapolation.compute / largest.compute
    yield (
        f"\nExtrapolation to {extrapolation.compute:.2e} operations, {ratio:.3g} times those of the largest rung, with"
        " new text:"
        f"\n  {extrapolation.num_parameters:.3g} parameters, {extrapolation.num_tokens:.3g} tokens (the largest rung"
        f" with both scaled alike): {_format_bits(extrapolation.predicted)}"
    )
    optimum = extrapolation.optimum
    if optimum is None:
        yield "  compute-optimal numbers: not determined by these rungs"
    else:
        yield (
            f"  compute-optimal: {_format_count(optimum.num_parameters)} parameters,"
            f" {_format_count(optimum.num_tokens)} tokens"
        )


def _format_parameter(number: float) -> str:
    return "0" if abs(number) < 1e-6 else f"{number:.4g}"


def _format_bits(interval: Interval) -> str:
    return f"{interval.value:.4f} bits per byte (95 %: {interval.low:.4f} to {interval.high:.4f})"


def _format_count(interval: Interval) -> str:
    return f"{interval.value:.2g} ({interval.low:.2g} to {interval.high:.2g})"


def _explain_miss(result: LadderResult) -> list[str]:
    """Return possible reasons for a measured value outside the interval, as far as the rungs show them."""
    *others, largest = result.points
    reasons = []
    if result.back_test.measured > result.back_test.predicted.high:
        if largest.num_epochs > 1:
            reasons.append(
                f"it sees each token {largest.num_epochs:.3g} times, and the law counts repeated tokens as new ones"
                " (Muennighoff et al. 2023)"
            )
        reasons.append("its learning rate or schedule may suit it less well than those of the others suit them")
    else:
        reasons.append(
            "the smaller rungs may be trained less well than it, or so briefly that their loss follows no power law yet"
        )
    if (ratio := largest.compute / others[-1].compute) > 2:
        reasons.append(f"it takes {ratio:.3g} times the compute of the largest rung in the fit")
    return reasons


# -- file --------------------------------------------------------------------------------------------------------------


def write_result(result: LadderResult) -> Path:
    """Write a result to reports/ladder/NAME.json and return its path."""
    file = DIRECTORY / f"{result.name}.json"
    write_json(file, TypeAdapter(LadderResult).dump_python(result, mode="json"))
    return file


def read_results() -> Iterator[LadderResult | str]:
    """Yield the results in reports/ladder; for a file that cannot be read, the reason instead."""
    for file in sorted(DIRECTORY.glob("*.json")):
        try:
            content: Any = read_json(file)
            yield TypeAdapter(LadderResult).validate_python(content)
        except ValidationError as error:
            yield f"{printable(file)}: {format_cause(error)}"
        except StageError as error:
            yield str(error)
