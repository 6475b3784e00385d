"""Accuracy of made-up scores: correct answers, intervals and groups."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.figures.groups import NONE
from stages.score.accuracy import SCORES, build_item_table, compute_accuracy, compute_wilson_interval
from stages.score.items import Item


def make_pair(row, field=None, choices=("aa", "bbbb")):
    return Item("f", row, "", list(choices), 0, [field])


def compute_figures(items, nats, tokens=None, groups=("field",)):
    tokens = np.ones(len(nats), np.int64) if tokens is None else np.array(tokens)
    return compute_accuracy(build_item_table(items, groups, np.array(nats), tokens))


@given(st.integers(1, 3000).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total))))
def test_wilson_interval_ends_where_the_score_test_does(counts):
    correct, total = counts
    low, high = compute_wilson_interval(correct, total)
    share = correct / total
    assert 0.0 <= low <= share <= high <= 1.0
    for end in (low, high):
        if 0.0 < end < 1.0:  # |share - p| = z standard errors at p
            distance = abs(share - end) / math.sqrt(end * (1 - end) / total)
            assert distance == pytest.approx(1.959963984540054, rel=1e-6)


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662)],
)
def test_wilson_interval_of_known_counts_matches_published_values(correct, total, low, high):
    assert compute_wilson_interval(correct, total) == pytest.approx((low, high), abs=5e-5)


def test_accuracy_by_each_score_divides_by_tokens_or_bytes_of_the_choice():
    # sum: -6 > -7; per token: -3 > -3.5; per byte of "aa", "bbbb": -3 < -1.75.
    found = compute_figures([make_pair(1)], [-6.0, -7.0], [2, 2])["accuracy"]
    assert [found[name]["correct"] for name in SCORES] == [1, 1, 0]
    found = compute_figures([make_pair(1)], [-6.0, -7.0], [2, 4])["accuracy"]
    assert [found[name]["correct"] for name in SCORES] == [1, 0, 0]


def test_item_table_counts_utf_8_bytes():
    table = build_item_table([make_pair(1, choices=("é北", "abc"))], (), np.array([-1.0, -2.0]), np.array([1, 1]))
    assert table.column("bytes").to_pylist() == [[5, 3]]
    assert "groups" not in table.column_names


def test_accuracy_of_a_tie_counts_as_wrong_and_is_counted():
    found = compute_figures([make_pair(1), make_pair(2)], [-6.0, -6.0, -5.0, -6.0])
    assert (found["ties"], found["accuracy"]["sum"]["correct"]) == (1, 1)


def test_accuracy_of_questions_compares_the_answer_with_the_best_of_the_others():
    question = Item("f", 1, "p", ["a", "b", "c"], 1, [None])
    for nats, correct in (([-3.0, -1.0, -2.0], 1), ([-3.0, -2.0, -1.0], 0), ([0.0, -2.0, -3.0], 0)):
        found = compute_figures([question], nats)
        assert found["accuracy"]["sum"]["correct"] == correct
        assert found["chance"] == pytest.approx(1 / 3)


def test_accuracy_chance_is_the_mean_over_items_of_several_kinds():
    items = [make_pair(1), Item("f", 2, "p", ["a", "b", "c", "d"], 3, [None])]
    assert compute_figures(items, [-1.0, -2.0, -4.0, -3.0, -2.0, -1.0])["chance"] == pytest.approx((1 / 2 + 1 / 4) / 2)


def test_accuracy_of_groups_adds_up_with_the_largest_first():
    items = [make_pair(1, "x"), make_pair(2, "y"), make_pair(3, "y"), make_pair(4)]
    found = compute_figures(items, [-1.0, -2.0, -2.0, -1.0, -1.0, -2.0, -1.0, -2.0])
    groups = found["groups"]["field"]
    assert list(groups) == ["y", NONE, "x"]
    assert [figures["items"] for figures in groups.values()] == [2, 1, 1]
    assert [figures["accuracy"]["sum"]["share"] for figures in groups.values()] == [0.5, 1.0, 1.0]
    assert (found["items"], found["accuracy"]["sum"]["correct"]) == (4, 3)
    assert "groups" not in groups["y"]


def test_item_table_has_one_row_per_item():
    items = [make_pair(7, "x"), Item("g", 9, "p", ["a", "b", "c"], 2, [None])]
    table = build_item_table(items, ("field",), np.arange(5.0), np.arange(1, 6))
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    assert (columns["source"], columns["row"], columns["answer"]) == (["f", "g"], [7, 9], [0, 2])
    assert columns["groups"] == [{"field": "x"}, {"field": None}]
    assert columns["log_likelihood"] == [[0.0, 1.0], [2.0, 3.0, 4.0]]
    assert columns["tokens"] == [[1, 2], [3, 4, 5]]
    assert columns["bytes"] == [[2, 4], [1, 1, 1]]
    assert columns["correct"] == [dict.fromkeys(SCORES, False), dict.fromkeys(SCORES, True)]
    assert columns["tie"] == [False, False]
