"""Figures by group: they add up to the total, and each is computed only from its documents."""

import json
import math

import numpy as np
import pyarrow as pa
import pytest
from data_helpers import no_deadline
from hypothesis import given
from hypothesis import strategies as st

from stages.figures.groups import (
    MAX_VALUES,
    NONE,
    OTHERS,
    compute_document_figures,
    compute_group_figures,
    compute_ratio_with_error,
    format_value_name,
)
from stages.figures.scores import Scores

VALUES = st.one_of(
    st.none(), st.sampled_from(["", "a", "a.b", NONE, OTHERS, '"', '"(none)"', "日本"]), st.text(max_size=3)
)
BITS = st.floats(0, 1e4)
DOCUMENTS = st.lists(
    st.tuples(VALUES, st.integers(0, 10**6), st.integers(0, 1000), BITS, BITS), min_size=1, max_size=40
)


def make_table(rows, values=None):
    """Return the table of scores for rows of (value of group `g`, bytes, tokens, bits before, bits after)."""
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


def make_scores(rows):
    _, num_bytes, num_tokens, _, bits = zip(*rows, strict=True)
    return Scores(np.array(num_bytes), np.array(num_tokens), np.array(bits))


@no_deadline
@given(DOCUMENTS)
def test_groups_of_any_documents_add_up_to_the_whole(rows):
    whole = make_scores(rows)
    for values in compute_group_figures("bpb", make_table(rows)).values():
        for key, total in (
            ("documents", len(rows)),
            ("bytes", whole.num_bytes.sum()),
            ("tokens", whole.num_tokens.sum()),
        ):
            assert sum(figures[key] for figures in values.values()) == total
        for key, column in (("base_bits", 3), ("bits", 4)):
            total = math.fsum(row[column] for row in rows)
            assert math.fsum(figures[key] for figures in values.values()) == pytest.approx(total, rel=1e-12)


@no_deadline
@given(DOCUMENTS)
def test_groups_of_any_documents_have_the_figures_of_their_own_documents(rows):
    found = compute_group_figures("bpb", make_table(rows))["g"]
    assert list(found) == sorted(found, key=lambda name: -found[name]["bytes"])
    for value in {row[0] for row in rows}:
        figures, own = found[format_value_name(value)], make_scores([row for row in rows if row[0] == value])
        assert figures["documents"] == len(own.bits)
        assert ("bpb" in figures) == ("base_bpb" in figures) == bool(own.num_bytes.any())
        assert ("bpb_se" in figures) == (len(own.bits) > 1 and bool(own.num_bytes.any()))
        if "bpb_se" in figures:
            assert (figures["bpb"], figures["bpb_se"]) == compute_ratio_with_error(own.bits, own.num_bytes)


@no_deadline
@given(DOCUMENTS)
def test_groups_with_more_values_than_have_figures_of_their_own_sum_up_the_rest(rows):
    many = [row for row in rows for _ in range(5)]
    values = [f"{index % 150}" for index in range(len(many))]
    found = compute_group_figures("bpb", make_table(many, values))["g"]
    distinct = len(set(values))
    assert len(found) == min(distinct, MAX_VALUES + 1)
    assert sum(figures["bytes"] for figures in found.values()) == sum(row[1] for row in many)
    if distinct > MAX_VALUES:
        assert list(found)[-1] == OTHERS and found[OTHERS]["values"] == distinct - MAX_VALUES
        smallest = min(figures["bytes"] for name, figures in found.items() if name != OTHERS)
        sizes = [sum(row[1] for row, own in zip(many, values, strict=True) if own == v) for v in set(values) - {*found}]
        assert max(sizes) <= smallest


@given(st.lists(VALUES, unique=True))
def test_value_names_of_different_values_differ(values):
    assert len({format_value_name(value) for value in values}) == len(values)


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
    assert format_value_name(value) == name


def test_groups_that_no_record_keeps_are_only_the_source():
    table = make_table([("a", 3, 1, 4.0, 2.0)]).drop_columns(["groups"])
    assert compute_group_figures("bpb", table) == {
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
    assert "bpb_se" not in compute_group_figures("bpb", make_table(rows))["g"]["a"]
    assert compute_document_figures("bpb", make_scores(rows))["bpb_se"] == 0.0
