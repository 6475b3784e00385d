"""Tests of the grid of benchmarks/search.py."""

import pytest

from benchmarks.search import list_points, make_grid
from tools.search.space import Choices, Halving, Range, Space

SPACE = Space(
    "causal",
    None,
    Halving(epochs=[1]),
    {"a": Range(low=0.01, high=1.0, log=True), "b": Choices(choices=["x", "y"]), "c": Range(low=1, high=3)},
    {},
)


@pytest.mark.parametrize(("points", "size"), [(1, 1), (2, 2), (7, 4), (8, 8), (12, 12), (18, 18), (100, 96)])
def test_grid_has_as_many_points_as_fit(points: int, size: int) -> None:
    grid = make_grid(SPACE, points)
    assert len(set(grid)) == len(grid) == size


def test_grid_values_are_in_the_middle_of_equal_parts() -> None:
    assert list_points(SPACE.keys["a"], 1) == [0.1]
    assert list_points(SPACE.keys["a"], 2) == [0.03162, 0.3162]
    assert list_points(Range(low=0.0, high=0.4, step=0.1), 2) == [0.1, 0.3]
    assert list_points(SPACE.keys["c"], 9) == [1, 2, 3]
    assert list_points(SPACE.keys["b"], 9) == ["x", "y"]
