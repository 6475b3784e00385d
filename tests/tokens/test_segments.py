"""Documents that are only partly counted: a prompt and its completion."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from data_helpers import write_questions
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from stages.core.errors import StageError
from stages.tokens.texts import Flatten, Segments, TextFile

ROWS = [
    ("Why?", "Tell me.", ["Because.", "So."]),
    ("", "", ["Only an answer."]),
    ("A title", "", ["", "x"]),
    ("Ünïcode ✓", "", []),
]
PAIRS = [
    ("Why? Tell me.\n\n", "Because. So."),
    ("", "Only an answer."),
    ("A title\n\n", "x"),
    ("Ünïcode ✓\n\n", ""),
]


@pytest.mark.parametrize("rows", [1, 2, 3, 1000])
def test_prompts_and_completions_in_any_row_groups_are_alternating_segments(tmp_path: Path, rows: int) -> None:
    file = TextFile(write_questions(tmp_path / "a.parquet", ROWS, rows), make_prompt_flatten())
    found = [segments.texts.to_pylist() for segments in file]
    assert [len(texts) // 2 for texts in found] == [len(ROWS[start : start + rows]) for start in range(0, 4, rows)]
    assert [text for texts in found for text in texts] == [text for pair in PAIRS for text in pair]
    for segments in file:
        assert segments.is_counted.tolist() == [False, True] * (len(segments.offsets) - 1)
        assert segments.offsets.tolist() == list(range(0, len(segments.texts) + 1, 2))


def test_prompts_with_custom_joiner_and_separator_use_them(tmp_path: Path) -> None:
    flatten = Flatten(prompt=["title", "selftext"], completion=["answers.text"], joiner=" | ", separator="\nA: ")
    (segments,) = TextFile(write_questions(tmp_path / "a.parquet", ROWS[:1]), flatten)
    assert segments.texts.to_pylist() == ["Why? | Tell me.\nA: ", "Because. | So."]


def make_prompt_flatten() -> Flatten:
    return Flatten(prompt=["title", "selftext"], completion=["answers.text"])


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({}, "give either columns, or prompt and completion, or messages"),
        ({"columns": ["title"], "messages": True}, "give either columns"),
        ({"columns": ["title"], "prompt": ["title"], "completion": ["answers.text"]}, "give either columns"),
        ({"prompt": ["title"]}, "flatten.completion is missing"),
        ({"completion": ["answers.text"]}, "flatten.prompt is missing"),
        ({"prompt": [], "completion": ["answers.text"]}, "at least 1 item"),
        ({"columns": ["document"]}, "Input should be"),
    ],
)
def test_flatten_without_exactly_one_kind_is_an_error(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        Flatten(**values)


def test_flatten_messages_of_records_without_roles_names_the_key_to_set(tmp_path: Path) -> None:
    file = write_questions(tmp_path / "a.parquet", ROWS)
    with pytest.raises(StageError, match=r"flatten.messages=true: .* no roles: set columns.roles \(conf/data\)"):
        TextFile(file, Flatten(messages=True))


@given(
    lengths=st.lists(st.integers(0, 4), min_size=1, max_size=6),
    chosen=st.lists(st.integers(0, 5), max_size=8),
)
def test_take_documents_returns_their_segments_in_the_given_order(lengths: list[int], chosen: list[int]) -> None:
    offsets = np.cumsum([0, *lengths])
    total = int(offsets[-1])
    whole = Segments(
        pa.array([str(number) for number in range(total)], pa.string()),
        offsets,
        np.arange(total) % 3 == 0,
        np.arange(total) % 2 - 1,
    )
    documents = np.array([number % len(lengths) for number in chosen], np.int64)
    part = whole.take_documents(documents)
    expected = [list(range(*whole.offsets[number : number + 2])) for number in documents]
    assert part.texts.to_pylist() == [str(row) for rows in expected for row in rows]
    assert part.is_counted.tolist() == [row % 3 == 0 for rows in expected for row in rows]
    assert part.control_ids is not None
    assert part.control_ids.tolist() == [row % 2 - 1 for rows in expected for row in rows]
    assert part.sum_by_document(np.ones(len(part.texts))).tolist() == [len(rows) for rows in expected]
    assert part.get_document_numbers().tolist() == [number for number, rows in enumerate(expected) for _ in rows]
