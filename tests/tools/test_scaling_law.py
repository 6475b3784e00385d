"""Tests of tools.scaling_law by simulation: known parameters, and the coverage of intervals."""

import numpy as np
import pytest

from tools.scaling_law import MIN_POINTS, Fit, Law, fit_law, fit_with_intervals

SMALL = Law(E=1.2, A=30.0, B=60.0, alpha=0.35, beta=0.37)
HOFFMANN = Law(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)  # Hoffmann et al. 2022, appendix D
BESIROGLU = Law(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)  # Besiroglu et al. 2024
STEEP = Law(E=0.8, A=1e6, B=3e5, alpha=1.2, beta=1.1)
FLAT = Law(E=0.5, A=8.0, B=6.0, alpha=0.12, beta=0.1)


def make_grid(sizes, tokens):
    """Return the sizes and tokens of all combinations, `[num_sizes * num_tokens]` each."""
    n, d = np.meshgrid(sizes, tokens)
    return n.ravel().astype(float), d.ravel().astype(float)


SMALL_GRID = make_grid([2e4, 5e4, 1e5, 3e5], [2e4, 4e4, 8e4])


def draw_losses(law, n, d, noise, seed):
    return law.predict(n, d) * np.exp(noise * np.random.default_rng(seed).standard_normal(len(n)))


@pytest.mark.parametrize(
    ("law", "grid"),
    [
        (SMALL, SMALL_GRID),
        (STEEP, SMALL_GRID),
        (FLAT, make_grid([1e4, 1e5, 1e6, 1e7], [1e4, 1e5, 1e6])),
        (HOFFMANN, make_grid([7e7, 4e8, 2e9, 1e10], [1e9, 1e10, 1e11])),
        (BESIROGLU, make_grid([7e7, 4e8, 2e9, 1e10], [1e9, 1e10, 1e11])),
    ],
    ids=["small", "steep", "flat", "hoffmann", "besiroglu"],
)
def test_fit_of_exact_losses_recovers_the_parameters(law: Law, grid) -> None:
    assert fit_law(*grid, law.predict(*grid)) == pytest.approx(law, rel=1e-3)


@pytest.mark.parametrize("factor", [0.01, 3.0, 1000.0])
def test_fit_in_another_unit_scales_the_terms_and_keeps_the_exponents(factor: float) -> None:
    losses = draw_losses(SMALL, *SMALL_GRID, 0.002, seed=1)
    one, other = fit_law(*SMALL_GRID, losses), fit_law(*SMALL_GRID, factor * losses)
    assert other[3:] == pytest.approx(one[3:], rel=1e-3)
    assert other[:3] == pytest.approx(np.array(one[:3]) * factor, rel=1e-2)


def test_fit_with_one_outlier_stays_near_the_other_points() -> None:
    losses = SMALL.predict(*SMALL_GRID)
    losses[5] *= 1.3
    others = np.arange(len(losses)) != 5
    found = fit_law(*SMALL_GRID, losses).predict(*SMALL_GRID)
    assert np.abs(found / SMALL.predict(*SMALL_GRID) - 1)[others].max() < 0.03


def test_fit_of_too_few_points_is_refused() -> None:
    n, d = (values[: MIN_POINTS - 1] for values in SMALL_GRID)
    with pytest.raises(ValueError, match=f"{MIN_POINTS - 1} points: a law of 5 parameters needs {MIN_POINTS} or more"):
        fit_law(n, d, SMALL.predict(n, d))


def test_fit_does_not_depend_on_the_order_of_the_points() -> None:
    losses = draw_losses(SMALL, *SMALL_GRID, 0.005, seed=2)
    order = np.random.default_rng(3).permutation(len(losses))
    n, d = SMALL_GRID
    one, other = fit_law(n, d, losses), fit_law(n[order], d[order], losses[order])
    assert other.predict(1e6, 1e6) == pytest.approx(float(one.predict(1e6, 1e6)), rel=1e-4)


def test_fit_with_the_same_seed_gives_the_same_intervals() -> None:
    losses = draw_losses(SMALL, *SMALL_GRID, 0.005, seed=4)
    fits = [fit_with_intervals(*SMALL_GRID, losses, 20, seed) for seed in (0, 0, 1)]
    intervals = [fit.predict_interval(1e6, 1e5) for fit in fits]
    assert intervals[0] == intervals[1] != intervals[2]


def hold_out_largest(seed: int, noise: float, num_replicates: int) -> tuple[Fit, float, float, float]:
    """Return the fit without the largest point, and that point's size, tokens and loss."""
    n, d = SMALL_GRID
    losses = draw_losses(SMALL, n, d, noise, seed)
    largest = int(np.argmax(n * d))
    others = np.arange(len(n)) != largest
    fit = fit_with_intervals(n[others], d[others], losses[others], num_replicates, seed)
    return fit, n[largest], d[largest], losses[largest]


def count_within(noise: float, num_ladders: int, num_replicates: int) -> int:
    """Return how many simulated ladders have their largest point within its predicted interval."""
    within = 0
    for seed in range(num_ladders):
        fit, size, tokens, loss = hold_out_largest(seed, noise, num_replicates)
        low, high = fit.predict_interval(size, tokens)
        within += low <= loss <= high
    return within


def test_interval_contains_the_largest_point_of_most_simulated_ladders() -> None:
    assert count_within(0.005, num_ladders=12, num_replicates=60) >= 10


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.003, 0.01])
def test_interval_contains_the_largest_point_as_often_as_stated(noise: float) -> None:
    # Of 120 ladders, 114 are expected and 108 or more have a probability of 99 %.
    assert 108 <= count_within(noise, num_ladders=120, num_replicates=120) <= 119


def test_interval_is_missed_by_a_point_that_does_not_follow_the_law() -> None:
    fit, size, tokens, loss = hold_out_largest(1, 0.003, 60)
    low, high = fit.predict_interval(size, tokens)
    assert low <= loss <= high and not low <= 1.1 * loss <= high and not low <= 0.9 * loss <= high


def test_interval_of_a_far_extrapolation_is_wider() -> None:
    fit, size, tokens, _ = hold_out_largest(2, 0.003, 60)
    widths = [np.ptp(fit.predict_interval(scale * size, scale * tokens)) for scale in (1, 10, 100)]
    assert widths == sorted(widths) and widths[2] > 1.5 * widths[0]


def test_parameters_of_a_wide_precise_grid_are_identified_and_within_their_intervals() -> None:
    grid = make_grid([1e6, 1e7, 1e8, 1e9, 1e10], [1e8, 1e9, 1e10, 1e11, 1e12])
    fit = fit_with_intervals(*grid, draw_losses(BESIROGLU, *grid, 0.002, seed=5), 60)
    for name, value in BESIROGLU._asdict().items():
        low, high = fit.compute_interval([getattr(law, name) for law in fit.replicates])
        assert fit.is_identified(name) and low < value < high


def test_exponents_of_a_narrow_noisy_grid_are_not_identified() -> None:
    grid = make_grid([1e5, 1.2e5, 1.4e5], [1e5, 1.2e5, 1.4e5])
    fit = fit_with_intervals(*grid, draw_losses(SMALL, *grid, 0.02, seed=6), 60)
    assert not any(fit.is_identified(name) for name in ("alpha", "beta", "A", "B"))


@pytest.mark.parametrize("compute", [1e15, 5.76e23])
def test_optimal_shape_has_the_lowest_loss_of_its_budget(compute: float) -> None:
    size, tokens = HOFFMANN.optimize_shape(compute)
    assert 6 * size * tokens == pytest.approx(compute)
    others = size * np.array([0.5, 0.9, 1.1, 2.0])
    assert (HOFFMANN.predict(others, compute / 6 / others) > float(HOFFMANN.predict(size, tokens))).all()


def test_parameters_are_identified_by_the_ratio_of_their_limits() -> None:
    replicates = [
        Law(E=1.0 + share, A=10.0**share, B=1000.0**share, alpha=0.2 + share, beta=0.5 + share)
        for share in np.linspace(0, 1, 41)
    ]
    fit = Fit(replicates[20], replicates, np.zeros(41))
    assert [name for name in Law._fields if fit.is_identified(name)] == ["E", "A", "beta"]
    assert not fit._replace(replicates=[law._replace(E=0.0) for law in replicates]).is_identified("E")
