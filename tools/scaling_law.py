"""Scaling law of a model's loss: fit, intervals, and the compute-optimal shape.

The form is that of Hoffmann et al. 2022 (arXiv:2203.15556, section 3.3):

    L(N, D) = E + A / N^alpha + B / D^beta

with N parameters and D training tokens. Their loss is in nats per token. This module takes any unit, since a constant
factor (bits per byte are nats per token, divided by ln 2 and by the mean bytes of a token) multiplies E, A and B and
leaves the exponents as they are.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.optimize import least_squares, nnls

Floats = npt.NDArray[np.float64]

NUM_PARAMETERS = 5
MIN_POINTS = NUM_PARAMETERS + 3
"""Three more points than parameters. With fewer degrees of freedom, intervals are too wide to tell anything: Student's
t for 95 % is 3.2 with three, 4.3 with two and 12.7 with one."""
CONFIDENCE = 0.95
NUM_REPLICATES = 400
"""Fits of the bootstrap; the limits of a 95 % interval are then the 10th value from either end."""
OPERATIONS_PER_WEIGHT = 6
"""Operations of training per parameter and token: 2 in the forward pass, 4 in the backward pass (Kaplan et al. 2020,
arXiv:2001.08361, section 2.1). Attention over the context and the lookup of embeddings are not counted."""

_EXPONENTS = (0.02, 3.0)
"""Limits of the search for alpha and beta. Beyond them, a term is constant or vanishes within any ladder."""
_MAX_RATIOS = {"E": 3.0, "A": 100.0, "B": 100.0, "alpha": 3.0, "beta": 3.0}
"""Ratios of the limits of an interval from which a parameter counts as not determined. A and B are extrapolations to a
single parameter and token, so they change by orders of magnitude with a small change of the exponents."""
_STARTS = (0.1, 0.3, 0.6, 1.2)
"""Exponents from which the search starts, each alpha with each beta."""
_HUBER_DELTA = 0.01
"""Residual of the logarithm (1 %) from which a point has a linear instead of a quadratic loss. Hoffmann et al. use
1e-3, which is below the noise of small models: nearly all points would then have a linear loss, and the fit would pass
exactly through five of them."""
_TOLERANCE = 1e-10
"""Relative change at which the search ends. That of Hoffmann et al. ended before it had converged, which made their
intervals implausibly narrow (Besiroglu et al. 2024, arXiv:2404.10102)."""


class Law(NamedTuple):
    """Parameters of L(N, D) = E + A / N^alpha + B / D^beta, in the unit of the loss."""

    E: float
    """Loss in the limit of many parameters and tokens."""
    A: float
    B: float
    alpha: float
    beta: float

    def predict(self, sizes: npt.ArrayLike, tokens: npt.ArrayLike) -> Floats:
        """Return the loss of models with these numbers of parameters and training tokens, broadcast together."""
        n, d = np.asarray(sizes, float), np.asarray(tokens, float)
        loss: Floats = self.E + self.A * n**-self.alpha + self.B * d**-self.beta
        return loss

    def optimize_shape(self, compute: float) -> tuple[float, float]:
        """Return the numbers of parameters and tokens with the lowest loss for a compute budget.

        Minimizes L(N, D) under 6 N D = `compute` (Hoffmann et al. 2022, section 3.3).
        """
        ratio = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        product = compute / OPERATIONS_PER_WEIGHT
        size = ratio * product ** (self.beta / (self.alpha + self.beta))
        return size, product / size


class Fit(NamedTuple):
    """Law with its uncertainty."""

    law: Law
    replicates: list[Law]
    """Fits to simulated losses."""
    noise: Floats
    """Standard deviation of the logarithm of the loss around the law, one draw per replicate, `[num_replicates]`."""

    @property
    def log_error(self) -> float:
        """Median of the draws of the noise; about the relative error of a single loss."""
        return float(np.median(self.noise))

    def compute_interval(self, values: npt.ArrayLike) -> tuple[float, float]:
        """Return the interval that contains CONFIDENCE of `values`, one value per replicate."""
        low, high = np.quantile(np.asarray(values, float), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        return float(low), float(high)

    def predict_interval(self, size: float, tokens: float, seed: int = 0) -> tuple[float, float]:
        """Return the interval in which a new loss at this size and number of tokens lies with probability CONFIDENCE.

        It includes the uncertainty of the law and the noise of the new loss.
        """
        means = np.array([float(law.predict(size, tokens)) for law in self.replicates])  # [num_replicates]
        errors = self.noise * np.random.default_rng([seed, 1]).standard_normal(len(means))
        return self.compute_interval(means * np.exp(errors))

    def is_identified(self, name: str) -> bool:
        """Return True if the upper limit of a parameter's interval is less than _MAX_RATIOS times the lower one."""
        low, high = self.compute_interval([getattr(law, name) for law in self.replicates])
        return high < _MAX_RATIOS[name] * low


def fit_law(sizes: npt.ArrayLike, tokens: npt.ArrayLike, losses: npt.ArrayLike) -> Law:
    """Fit the law to measured losses: the third approach of Hoffmann et al. 2022.

    Minimizes the Huber loss of the differences of the logarithms, by a trust-region search from several starts.

    Args:
        sizes: parameters of each model, `[num_points]`.
        tokens: training tokens of each model, `[num_points]`.
        losses: measured losses, `[num_points]`, positive.

    Raises:
        ValueError: if there are fewer than MIN_POINTS points.
    """
    n, d, y = (np.asarray(values, float) for values in (sizes, tokens, losses))
    if len(y) < MIN_POINTS:
        raise ValueError(f"{len(y)} points: a law of {NUM_PARAMETERS} parameters needs {MIN_POINTS} or more")
    problem = _Problem(n, d)
    return problem.solve(np.log(y), [problem.find_start(y, alpha, beta) for alpha in _STARTS for beta in _STARTS])


def fit_with_intervals(
    sizes: npt.ArrayLike,
    tokens: npt.ArrayLike,
    losses: npt.ArrayLike,
    num_replicates: int = NUM_REPLICATES,
    seed: int = 0,
) -> Fit:
    """Fit the law, and fit it again to simulated losses: a parametric bootstrap.

    Each replicate draws its own standard deviation from the distribution that the residuals leave for it, the scaled
    inverse chi-squared with `num_points - 5` degrees of freedom. For a linear law the resulting intervals are those of
    Student's t. A bootstrap with a fixed deviation, or one that resamples the residuals, is too narrow for a dozen
    points.

    Args:
        sizes, tokens, losses: as in `fit_law`.
        num_replicates: number of simulated fits.
        seed: seed of the simulation.
    """
    n, d, y = (np.asarray(values, float) for values in (sizes, tokens, losses))
    law = fit_law(n, d, y)
    fitted = np.log(law.predict(n, d))  # [num_points]
    freedom = len(y) - NUM_PARAMETERS
    squares = float(np.sum((np.log(y) - fitted) ** 2))
    random = np.random.default_rng([seed, 0])
    noise = np.sqrt(squares / random.chisquare(freedom, num_replicates))  # [num_replicates]
    problem = _Problem(n, d)
    start = problem.encode(law)
    replicates = []
    for deviation in noise:
        simulated = fitted + deviation * random.standard_normal(len(y))
        # From these two starts the search ends where it does from all, in a seventh of the time.
        replicates.append(problem.solve(simulated, [start, problem.find_start(np.exp(simulated), 0.3, 0.3)]))
    return Fit(law, replicates, noise)


class _Problem:
    """Least-squares problem of the law for fixed sizes and tokens.

    The search is in E, A / N0^alpha, B / D0^beta, alpha, beta, with N0 and D0 the geometric means of sizes and tokens:
    the first three then have the magnitude of the loss, and change little with the exponents.
    """

    def __init__(self, sizes: Floats, tokens: Floats) -> None:
        log_sizes, log_tokens = np.log(sizes), np.log(tokens)
        self._centers = float(log_sizes.mean()), float(log_tokens.mean())
        self._log_sizes, self._log_tokens = log_sizes - self._centers[0], log_tokens - self._centers[1]

    def encode(self, law: Law) -> Floats:
        scales = [math.exp(-e * c) for e, c in zip((law.alpha, law.beta), self._centers, strict=True)]
        return np.array([law.E, law.A * scales[0], law.B * scales[1], law.alpha, law.beta])

    def decode(self, values: Floats) -> Law:
        e, a, b, alpha, beta = (float(value) for value in values)
        return Law(e, a * math.exp(alpha * self._centers[0]), b * math.exp(beta * self._centers[1]), alpha, beta)

    def find_start(self, losses: Floats, alpha: float, beta: float) -> Floats:
        """Return start values: with the exponents given, the other values are a linear problem."""
        columns = [np.ones_like(losses), np.exp(-alpha * self._log_sizes), np.exp(-beta * self._log_tokens)]
        linear, _ = nnls(np.stack(columns, axis=1) / losses[:, None], np.ones_like(losses))
        return np.array([*linear, alpha, beta])

    def solve(self, log_losses: Floats, starts: Sequence[Floats]) -> Law:
        """Return the law with the lowest Huber loss that the search reaches from any of the starts."""
        low = np.array([0.0, 0.0, 0.0, _EXPONENTS[0], _EXPONENTS[0]])
        high = np.array([np.inf, np.inf, np.inf, _EXPONENTS[1], _EXPONENTS[1]])
        found = [
            least_squares(
                self._compute_residuals,
                np.clip(start, low + 1e-6, high - 1e-6),
                self._compute_jacobian,
                bounds=(low, high),
                loss="huber",
                f_scale=_HUBER_DELTA,
                args=(log_losses,),
                xtol=_TOLERANCE,
                ftol=_TOLERANCE,
                gtol=_TOLERANCE,
                x_scale=np.array([1.0, 1.0, 1.0, 0.3, 0.3]),
            )
            for start in starts
        ]
        return self.decode(min(found, key=lambda result: float(result.cost)).x)

    def _split_terms(self, values: Floats) -> tuple[Floats, Floats]:
        """Return the terms of the sizes and of the tokens, each `[num_points]`."""
        _, a, b, alpha, beta = values
        return a * np.exp(-alpha * self._log_sizes), b * np.exp(-beta * self._log_tokens)

    def _compute_residuals(self, values: Floats, log_losses: Floats) -> Floats:
        of_sizes, of_tokens = self._split_terms(values)
        residuals: Floats = np.log(values[0] + of_sizes + of_tokens) - log_losses
        return residuals

    def _compute_jacobian(self, values: Floats, log_losses: Floats) -> Floats:
        of_sizes, of_tokens = self._split_terms(values)
        columns = [
            np.ones_like(log_losses),
            of_sizes / values[1],
            of_tokens / values[2],
            -self._log_sizes * of_sizes,
            -self._log_tokens * of_tokens,
        ]
        jacobian: Floats = np.stack(columns, axis=1) / (values[0] + of_sizes + of_tokens)[:, None]  # [num_points, 5]
        return jacobian
