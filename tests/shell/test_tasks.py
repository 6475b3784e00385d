"""tasks: pieces in order, here unless a cluster is asked for, and what is said where there is none."""

import sys

import pytest

from stages.core.errors import StageError
from stages.shell.tasks import are_spread, run_pieces


def test_each_gives_the_results_in_order() -> None:
    assert list(run_pieces(str, [3, 1, 2])) == ["3", "1", "2"]


def test_each_raises_what_a_piece_raises() -> None:
    with pytest.raises(ZeroDivisionError):
        list(run_pieces(lambda number: 1 // number, [1, 0]))


@pytest.mark.parametrize(("place", "spread"), [("", False), ("ray", True)])
def test_pieces_are_spread_where_the_environment_says_so(
    monkeypatch: pytest.MonkeyPatch, place: str, spread: bool
) -> None:
    monkeypatch.setenv("LM_REPRO_PREPROCESSING", place)
    assert are_spread() is spread


def test_pieces_anywhere_else_are_an_error_that_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LM_REPRO_PREPROCESSING", "dask")
    with pytest.raises(StageError, match="LM_REPRO_PREPROCESSING=dask: it should be ray"):
        are_spread()


def test_pieces_on_ray_without_it_are_an_error_that_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LM_REPRO_PREPROCESSING", "ray")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(StageError, match="Ray is not installed: `make ray`"):
        list(run_pieces(str, [1]))
