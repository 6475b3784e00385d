"""Figures by group: they add up to the whole, and each is that of its documents alone."""

import json
import math

import numpy as np
import pyarrow as pa
import pytest
from data_helpers import steady
from hypothesis import given
from hypothesis import strategies as st

from stages.figures.groups import (
    MOST_VALUES,
    NONE,
    OTHERS,
    document_figures,
    figures_by_group,
    ratio_with_error,
    value_name,
)
from stages.figures.scores import Scores

VALUES = st.one_of(
    st.none(), st.sampled_from(["", "a", "a.b", NONE, OTHERS, '"', '"(none)"', "日本"]), st.text(max_size=3)
)
BITS = st.floats(0, 1e4)
DOCUMENTS = st.lists(
    st.tuples(VALUES, st.integers(0, 10**6), st.integers(0, 1000), BITS, BITS), min_size=1, max_size=40
)


def table_of(rows, values=None):
    """Scores of documents: a value of the group `g`, bytes, tokens, bits before and after, of each."""
    columns = list(zip(*rows, strict=True))
    groups = pa.StructArray.from_arrays([pa.array(columns[0] if values is None else values, pa.string())], ["g"])
    return pa.table(
        {
            "record": pa.array(range(len(rows)), pa.int64()),
            "source": pa.array(["toy"] * len(rows)),
            "groups": groups,
            "bytes": pa.array(columns[1], pa.int64()),
            "tokens": pa.array(columns[2], pa.int64()),
            "bits_before": pa.array(columns[3], pa.float64()),
            "bits_after": pa.array(columns[4], pa.float64()),
        }
    )


def scores_of(rows):
    _, num_bytes, num_tokens, _, bits = zip(*rows, strict=True)
    return Scores(np.array(num_bytes), np.array(num_tokens), np.array(bits))


@steady
@given(DOCUMENTS)
def test_groups_of_any_documents_add_up_to_the_whole(rows):
    whole = scores_of(rows)
    for values in figures_by_group("bpb", table_of(rows)).values():
        for key, total in (
            ("documents", len(rows)),
            ("bytes", whole.num_bytes.sum()),
            ("tokens", whole.num_tokens.sum()),
        ):
            assert sum(figures[key] for figures in values.values()) == total
        for key, column in (("base_bits", 3), ("bits", 4)):
            total = math.fsum(row[column] for row in rows)
            assert math.fsum(figures[key] for figures in values.values()) == pytest.approx(total, rel=1e-12)


@steady
@given(DOCUMENTS)
def test_groups_of_any_documents_have_the_figures_of_their_own_documents(rows):
    found = figures_by_group("bpb", table_of(rows))["g"]
    assert list(found) == sorted(found, key=lambda name: -found[name]["bytes"])
    for value in {row[0] for row in rows}:
        figures, own = found[value_name(value)], scores_of([row for row in rows if row[0] == value])
        assert figures["documents"] == len(own.bits)
        assert ("bpb" in figures) == ("base_bpb" in figures) == bool(own.num_bytes.any())
        assert ("bpb_se" in figures) == (len(own.bits) > 1 and bool(own.num_bytes.any()))
        if "bpb_se" in figures:
            assert (figures["bpb"], figures["bpb_se"]) == ratio_with_error(own.bits, own.num_bytes)


@steady
@given(DOCUMENTS)
def test_groups_with_more_values_than_have_figures_of_their_own_sum_up_the_rest(rows):
    many = [row for row in rows for _ in range(5)]
    values = [f"{index % 150}" for index in range(len(many))]
    found = figures_by_group("bpb", table_of(many, values))["g"]
    distinct = len(set(values))
    assert len(found) == min(distinct, MOST_VALUES + 1)
    assert sum(figures["bytes"] for figures in found.values()) == sum(row[1] for row in many)
    if distinct > MOST_VALUES:
        assert list(found)[-1] == OTHERS and found[OTHERS]["values"] == distinct - MOST_VALUES
        smallest = min(figures["bytes"] for name, figures in found.items() if name != OTHERS)
        sizes = [sum(row[1] for row, own in zip(many, values, strict=True) if own == v) for v in set(values) - {*found}]
        assert max(sizes) <= smallest


@given(st.lists(VALUES, unique=True))
def test_value_names_of_different_values_differ(values):
    assert len({value_name(value) for value in values}) == len(values)


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("a (b)", "a (b)"),
        (None, NONE),
        (NONE, '"(none)"'),
        (OTHERS, '"(others)"'),
        ("", '""'),
        ('"(none)"', json.dumps('"(none)"')),
    ],
)
def test_value_name_is_the_value_unless_it_could_be_taken_for_another(value, name):
    assert value_name(value) == name


def test_groups_that_no_record_keeps_are_the_source_alone():
    table = table_of([("a", 3, 1, 4.0, 2.0)]).drop_columns(["groups"])
    assert figures_by_group("bpb", table) == {
        "source": {
            "toy": {
                "bpb": pytest.approx(2 / 3),
                "base_bpb": pytest.approx(4 / 3),
                "documents": 1,
                "tokens": 1,
                "bytes": 3,
                "bits": 2.0,
                "base_bits": 4.0,
            }
        }
    }


def test_groups_of_a_single_document_have_no_standard_error_and_the_whole_has_0():
    rows = [("a", 10, 2, 30.0, 20.0)]
    assert "bpb_se" not in figures_by_group("bpb", table_of(rows))["g"]["a"]
    assert document_figures("bpb", scores_of(rows))["bpb_se"] == 0.0
