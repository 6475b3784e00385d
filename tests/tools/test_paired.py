"""Tests of tools.paired by simulation and against the bootstrap."""

import numpy as np
import pytest
from scipy.stats import t

from stages.figures.groups import compute_ratio_with_error
from tools.paired import Difference, compare_models, correct_p_values, describe_needed_data, judge_difference


def draw_documents(number, random):
    """Draw bytes and hardness (bits per byte) of documents of very different lengths: two `[number]` arrays."""
    num_bytes = random.lognormal(5.5, 0.8, number).astype(np.int64) + 20
    return num_bytes, random.normal(2.4, 0.3, number)


def draw_models(num_bytes, hardness, random, effect=0.0, seeds=((0,), (0,)), seed_error=0.0):
    """Draw the bits by seed of two models; the first takes `effect` bits per byte more."""
    models = []
    for own, effect_of in zip(seeds, (effect, 0.0), strict=True):
        noise = {seed: random.normal(0, seed_error) + random.normal(0, 0.05, len(num_bytes)) for seed in own}
        models.append({str(seed): num_bytes * (hardness + effect_of + of) for seed, of in noise.items()})
    return models


@pytest.mark.parametrize("number", [25, 100, 400])
def test_compare_equal_models_rejects_at_most_six_percent(number):
    random, found = np.random.default_rng(number), 0
    for _ in range(1000):
        num_bytes, hardness = draw_documents(number, random)
        ours, others = draw_models(num_bytes, hardness, random)
        found += compare_models(ours, others, num_bytes).p_value <= 0.05
    assert 25 <= found <= 60


@pytest.mark.parametrize("seeds", [((0, 1, 2), (0, 1, 2)), ((0, 1, 2, 3), (4, 5, 6)), ((0, 1, 2, 3, 4), (0,))])
def test_compare_equal_models_with_several_seeds_rejects_at_most_six_percent(seeds):
    random, found = np.random.default_rng(1), 0
    for _ in range(1000):
        num_bytes, hardness = draw_documents(60, random)
        ours, others = draw_models(num_bytes, hardness, random, seeds=seeds, seed_error=0.02)
        found += compare_models(ours, others, num_bytes).p_value <= 0.05
    assert found <= 60


def test_compare_pairs_detects_difference_hidden_by_unpaired_errors():
    num_bytes, hardness = draw_documents(100, np.random.default_rng(3))
    ours, others = draw_models(num_bytes, hardness, np.random.default_rng(4), effect=0.06)
    difference = compare_models(ours, others, num_bytes)
    assert difference.p_value < 0.001
    _, unpaired_error = compute_ratio_with_error(ours["0"], num_bytes)
    assert difference.error < unpaired_error / 3 and abs(difference.value) < 2 * unpaired_error


def test_documents_needed_detect_the_difference_in_four_of_five_cases():
    random = np.random.default_rng(5)
    num_bytes, hardness = draw_documents(2000, random)
    ours, others = draw_models(num_bytes, hardness, random, effect=0.01)
    needed = compare_models(ours, others, num_bytes)._replace(value=0.01).estimate_documents_needed()
    found = 0
    for _ in range(600):
        num_bytes, hardness = draw_documents(needed, random)
        found += compare_models(*draw_models(num_bytes, hardness, random, 0.01), num_bytes).p_value <= 0.05
    assert 0.72 <= found / 600 <= 0.88


def test_interval_equals_the_bootstrap_over_documents():
    random = np.random.default_rng(6)
    num_bytes, hardness = draw_documents(300, random)
    ours, others = draw_models(num_bytes, hardness, random, effect=0.01)
    difference = compare_models(ours, others, num_bytes)
    drawn = random.integers(0, 300, (20_000, 300))
    bits = ours["0"] - others["0"]
    bootstrap = bits[drawn].sum(1) / num_bytes[drawn].sum(1)
    width = difference.interval[1] - difference.interval[0]
    assert np.quantile(bootstrap, [0.025, 0.975]) == pytest.approx(difference.interval, abs=0.05 * width)
    assert bootstrap.std() == pytest.approx(difference.error, rel=0.05)


def test_interval_with_seeds_is_at_least_as_wide_as_the_hierarchical_bootstrap():
    random = np.random.default_rng(7)
    num_bytes, hardness = draw_documents(300, random)
    seeds = tuple(range(12))
    ours, others = draw_models(num_bytes, hardness, random, seeds=(seeds, seeds), seed_error=0.01)
    difference = compare_models(ours, others, num_bytes)
    bits = np.array([ours[str(seed)] - others[str(seed)] for seed in seeds])
    bootstrap = []
    for _ in range(4000):
        documents = random.integers(0, 300, 300)
        of_seeds = bits[random.integers(0, 12, 12)][:, documents].mean(0)
        bootstrap.append(of_seeds.sum() / num_bytes[documents].sum())
    assert 0.97 * np.std(bootstrap) <= difference.error <= 1.25 * np.std(bootstrap)
    assert difference.error_of_seeds > 0 and difference.num_seeds == (12, 12)


def test_difference_of_two_documents_equals_hand_calculation():
    ours, others = {"1": np.array([90.0, 220.0])}, {"1": np.array([100.0, 200.0])}
    difference = compare_models(ours, others, np.array([50, 50]))
    assert difference.value == pytest.approx(0.1)
    # Ratios without one document: 20 / 50 and -10 / 50. Both are 0.3 from 0.1: sqrt(1 / 2 * 2 * 0.09) = 0.3.
    assert difference.error == pytest.approx(0.3)
    assert difference.share_better == 0.5
    assert difference.interval[1] - difference.value == pytest.approx(float(t.ppf(0.975, 1)) * 0.3)


@pytest.mark.parametrize(
    ("ours", "others", "verdict", "would_decide"),
    [
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], "the same", ""),
        ([1.0, 2.0, 3.0], [2.0, 4.0, 6.0], "better", ""),
        ([2.0, 4.0, 6.0], [1.0, 2.0, 3.0], "worse", ""),
        ([2.0], [1.0], "not decided", "more documents"),
        ([2.0, 2.0], [1.0, 3.0], "not decided", ""),
        ([2.0, 2.0, 1.0], [1.0, 3.0, 0.5], "not decided", "285 documents"),  # 288 in all
    ],
)
def test_verdict_of_small_cases_is_as_expected(ours, others, verdict, would_decide):
    num_bytes = np.array([10, 20, 30][: len(ours)])
    difference = compare_models({"1": np.array(ours)}, {"1": np.array(others)}, num_bytes)
    assert judge_difference(difference, difference.p_value) == verdict
    if verdict == "not decided":
        assert describe_needed_data(difference, 1) == would_decide


@pytest.mark.parametrize(
    ("value", "error_of_seeds", "num_seeds"),
    [
        (0.01, 0.02, 3),
        (0.01, 0.0035, 3),
        (0.0626, 0.0063, 2),
    ],  # two seeds: ten standard errors are few with one degree of freedom
)
def test_needed_data_with_large_seed_error_is_more_seeds(value, error_of_seeds, num_seeds):
    difference = Difference(value, 0.001, error_of_seeds, 40.0, num_seeds - 1, 0.6, 100, (num_seeds, num_seeds))
    assert judge_difference(difference, difference.p_value) == "not decided"
    assert describe_needed_data(difference, 1) == "more seeds"


def test_correct_p_values_matches_holm():
    assert correct_p_values([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert correct_p_values([]) == []
    assert correct_p_values([0.5, 0.9]) == [1.0, 1.0]
    assert correct_p_values([0.02]) == [0.02]
