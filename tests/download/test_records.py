"""records: values in nested and flattened rows, records in ELI5's schema, normalized text and hash splits."""

import datetime
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pytest
from data_helpers import make_split, no_deadline
from hypothesis import given
from hypothesis import strategies as st

from stages.core.artifacts import SPLITS
from stages.download.records import (
    ELI5,
    BadRecordError,
    assign_splits,
    build_record,
    build_split_key,
    find_column_value,
    find_mismatch,
    format_scalar,
    hash_split_keys,
    normalize_text,
    read_group_values,
)
from stages.download.schema import Columns, Split

COLUMNS = Columns(title="title", texts=["answers.text"])
NESTED = {
    "q_id": "q1",
    "title": "Why?",
    "selftext": "I wonder.",
    "document": "d1",
    "subreddit": "askscience",
    "answers": {"a_id": ["a", "b"], "text": ["One.", "Two."], "score": [5, -1]},
    "title_urls": {"url": ["http://x.org"]},
    "selftext_urls": {"url": []},
    "answers_urls": {"url": []},
}
_OTHERS = {key: value for key, value in NESTED.items() if key != "answers"}
_ANSWERS = [{"a_id": "a", "text": "One.", "score": 5}, {"a_id": "b", "text": "Two.", "score": -1}]
FLATTENED = _OTHERS | {f"answers.{key}": value for key, value in NESTED["answers"].items()}  # type: ignore[attr-defined]


def make_record(title: str, text: str | list[str] = "text") -> dict[str, Any]:
    return build_record({"title": title, "answers.text": text}, COLUMNS)[0]


def find_split(key: str, by: Split) -> str:
    return SPLITS[int(assign_splits(hash_split_keys([key], by.seed), by)[0])]


def make_key(title: str, text: str | list[str] = "text", names: Sequence[str] = ("title",), **columns: Any) -> str:
    return build_split_key(columns, make_record(title, text), names)


def test_find_column_value_of_a_flattened_and_nested_name_takes_the_flattened() -> None:
    assert find_column_value({"a.b": 1, "a": {"b": 2}}, "a.b") == 1


@pytest.mark.parametrize("row", [{"b": 1, "c": 2}, {"a": {"c": 1}}, {"a": 3}, {"a": [{"b": 1}, {"c": 1}]}, {}])
def test_find_column_value_of_an_absent_column_lists_the_existing_columns(row: dict[str, Any]) -> None:
    with pytest.raises(BadRecordError, match=r"'a\.b'.*" + (", ".join(row) or "none")):
        find_column_value(row, "a.b")


def test_find_column_value_in_lists_of_structs_follows_every_step() -> None:
    assert find_column_value({"a": [{"b": {"c": 1}}, {"b": {"c": 2}}]}, "a.b.c") == [1, 2]


@pytest.mark.parametrize("row", [{f"{'key' * 99}{i}": i for i in range(10**5)}, {"\x1b]0;x\n": 1, "b\r": 2}])
def test_find_column_value_of_an_absent_column_has_a_short_message_for_any_names(row: dict[str, Any]) -> None:
    with pytest.raises(BadRecordError) as raised:
        find_column_value(row, "\x1b[2J" + "a" * 10**6)
    assert len(str(raised.value)) < 2000
    assert str(raised.value).isprintable()


def test_find_column_value_of_an_absent_column_among_many_gives_their_number() -> None:
    with pytest.raises(BadRecordError, match=r"there are: c0, c1, .*, c19 and 1,980 more$"):
        find_column_value({f"c{i}": i for i in range(2000)}, "a")


@pytest.mark.parametrize(
    ("allowed", "expected"),
    [
        ({"category": ["Physics", "Biology"]}, None),
        ({"category": ["Physics"], "year": [2019, 2020]}, "year is 2021, not one of 2019, 2020"),
        ({"category": ["Chemistry"], "year": [2019]}, "category is 'Physics', not one of Chemistry"),
    ],
)
def test_find_mismatch_names_the_first_column_with_another_value(allowed: dict[str, Any], expected: str | None) -> None:
    assert find_mismatch({"category": "Physics", "year": 2021}, allowed) == expected


def test_find_mismatch_of_a_value_of_any_length_has_a_short_message() -> None:
    said = find_mismatch({"x": ["\x1b" * 10**6]}, {"x": list(range(1000))})
    assert said is not None and said.isprintable() and len(said) < 2000


def test_find_mismatch_of_an_absent_column_is_a_bad_record_and_ignores_other_types() -> None:
    with pytest.raises(BadRecordError, match="'year'"):
        find_mismatch({"category": "Physics"}, {"year": [2021]})
    assert find_mismatch("text", {"year": [2021]}) is None


@pytest.mark.parametrize(
    "row", [NESTED, FLATTENED, _OTHERS | {"answers": _ANSWERS}], ids=["nested", "flattened", "structs"]
)
def test_build_record_of_every_shape_of_eli5_gives_the_nested_one(row: dict[str, Any]) -> None:
    assert build_record(row, COLUMNS) == (NESTED, 0)


def test_build_record_of_configured_columns_gives_title_and_texts_in_order() -> None:
    columns = Columns(title="meta.heading", texts=["body", "notes"])
    row = {"meta": {"heading": "H"}, "notes": ["n1", "n2"], "body": "b"}
    record, dropped = build_record(row, columns)
    assert (record["title"], record["answers"]["text"], dropped) == ("H", ["b", "n1", "n2"], 0)
    assert (record["answers"]["a_id"], record["answers"]["score"]) == (["", "", ""], [0, 0, 0])


def test_build_record_without_title_column_leaves_the_title_empty() -> None:
    assert build_record({"t": "x", "title": "unused"}, Columns(title=None, texts=["t"]))[0]["title"] == ""


@pytest.mark.parametrize("removed", ["", " \n\t", "[deleted]", "[removed]", "\n[removed] ", None])
def test_build_record_with_a_removed_answer_drops_and_counts_it(removed: str | None) -> None:
    answers = {"text": ["keep", removed, "also"], "a_id": ["a", "b", "c"], "score": [1, 2, 3]}
    record, dropped = build_record({"title": "t", "answers": answers}, COLUMNS)
    assert record["answers"] == {"text": ["keep", "also"], "a_id": ["a", "c"], "score": [1, 3]}
    assert dropped == 1


@pytest.mark.parametrize("text", ["[deleted] by me", "deleted", "[Removed]", "0"])
def test_build_record_with_text_that_only_looks_removed_keeps_it(text: str) -> None:
    record, dropped = build_record({"title": "t", "answers.text": text}, COLUMNS)
    assert (record["answers"]["text"], dropped) == ([text], 0)


@pytest.mark.parametrize("answers", [[], None, {"text": []}, {"text": None}])
def test_build_record_without_answers_has_none(answers: Any) -> None:
    record, dropped = build_record({"title": "t", "answers": answers}, COLUMNS)
    assert (record["answers"]["text"], dropped) == ([], 0)


@pytest.mark.parametrize("beside", [{"a_id": ["a"]}, {"score": [1, 2, 3]}, {"score": 7}, {}])
def test_build_record_with_ids_or_scores_of_another_length_fills_them(beside: dict[str, Any]) -> None:
    record, _ = build_record({"title": "t", "answers": {"text": ["x", "y"]} | beside}, COLUMNS)
    assert record["answers"] == {"text": ["x", "y"], "a_id": ["", ""], "score": [0, 0]}


@pytest.mark.parametrize("scores", [[3.0, None], [2**63 - 1, -(2**63)], (0, 64)])
def test_build_record_of_scores_from_data_frames_converts_them_to_integers(scores: Any) -> None:
    record, _ = build_record({"title": "t", "answers": {"text": ["x", "y"], "score": scores}}, COLUMNS)
    assert record["answers"]["score"] == [score or 0 for score in scores]
    assert all(type(score) is int for score in record["answers"]["score"])


@pytest.mark.parametrize("score", [2**63, -(2**63) - 1])
def test_build_record_of_a_score_of_more_than_64_bits_is_a_bad_record(score: int) -> None:
    with pytest.raises(BadRecordError, match=r"'answers\.score'.*64 bits"):
        build_record({"title": "t", "answers": {"text": ["x"], "score": [score]}}, COLUMNS)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (["a list"], "not an object.*list"),
        ("text", "not an object.*str"),
        (None, "not an object.*NoneType"),
        ({"title": 5, "answers.text": "x"}, "'title' contains int"),
        ({"title": "t", "answers.text": 5}, r"'answers\.text' contains int"),
        ({"title": "t", "answers.text": ["x", {"y": 1}]}, r"'answers\.text' contains dict"),
        ({"title": "t", "answers.text": "x", "q_id": 7}, "'q_id' contains int"),
        ({"title": "t", "answers": {"text": ["x"], "score": ["1"]}}, r"'answers\.score'.*int"),
        ({"title": "t", "answers": {"text": ["x"], "score": [True]}}, r"'answers\.score'.*int"),
        ({"title": "t", "answers": {"text": ["x"], "score": [2**63]}}, r"'answers\.score'.*64 bits"),
        ({"title": "t", "answers": {"text": ["x"], "a_id": [1]}}, r"'answers\.a_id'.*str"),
        ({"title": "t", "answers": {"text": ["x"], "a_id": ["\ud800"]}}, r"'answers\.a_id'.*surrogate"),
        ({"title": "\ud83d", "answers.text": "x"}, "'title'.*surrogate"),
        ({"title": "t", "answers.text": ["x", "\udc00"]}, r"'answers\.text'.*surrogate"),
        ({"title": "t"}, r"no column 'answers\.text'.*title"),
    ],
)
def test_build_record_of_a_malformed_row_names_the_column(row: Any, message: str) -> None:
    with pytest.raises(BadRecordError, match=message):
        build_record(row, COLUMNS)


_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
_VALUE = st.none() | st.text(max_size=4) | st.lists(st.none() | st.text(max_size=4), max_size=3) | st.integers()
_ANSWER_FIELDS = st.dictionaries(st.sampled_from(["text", "a_id", "score"]), _VALUE | st.lists(st.integers()))


@no_deadline
@given(st.dictionaries(st.sampled_from(["title", "q_id", "title_urls"]), _VALUE), st.none() | _VALUE | _ANSWER_FIELDS)
def test_build_record_of_anything_is_storable_or_a_bad_record(row: dict[str, Any], answers: Any) -> None:
    try:
        record, _ = build_record({**row, "answers": answers}, COLUMNS)
    except BadRecordError:
        return
    assert pa.Table.from_pylist([record], schema=ELI5).to_pylist() == [record]


@pytest.mark.parametrize(
    "variant",
    [
        "why is the sky blue",
        " WHY is\tthe  sky\nblue?!",
        "«Why, is the sky-blue?»",
        "Why_is the \uff53\uff4b\uff59 blue",
    ],
)
def test_normalize_text_of_trivial_variants_is_the_same(variant: str) -> None:
    assert normalize_text(variant) == normalize_text("Why is the sky blue?") == "why is the sky blue"


def add_shuffled_marks(letters: str, number: int, seed: int) -> str:
    """Add `number` random marks of all combining classes to each letter, in non-canonical order."""
    marks = [chr(code) for code in range(0x20000) if unicodedata.combining(chr(code))]
    # Marks that decompose into several, marks that combine once normalized, and characters without a mark's class.
    marks += ["\u0344", "\u0f73", "\uff9e", "\uff9f", "\u00a8", "\u3099", "\u200d", "\ufe0f"]
    draw = random.Random(seed)
    return "".join(letter + "".join(draw.choices(marks, k=number)) for letter in letters)


@pytest.mark.parametrize("number", [1, 30, 99, 100, 101, 3000])
@pytest.mark.parametrize("seed", range(5))
def test_normalize_text_of_letters_with_many_marks_equals_nfkc(number: int, seed: int) -> None:
    text = add_shuffled_marks("eéか\u1100 \u0915😀ﬁ", number, seed)
    folded = unicodedata.normalize("NFKC", text).casefold()
    assert normalize_text(text) == re.sub(r"[\W_]+", " ", folded).strip()


@pytest.mark.timeout(60)  # quadratic time would take an hour
@pytest.mark.parametrize("marks", ["\u0301\u0323", "\uff9e\u0323", "\u0344\u0316", "\u0f73\u0f71"])
def test_normalize_text_of_a_million_marks_takes_linear_time(marks: str) -> None:
    assert normalize_text("e" + marks * 500_000 + " x").endswith(" x")


@pytest.mark.parametrize("other", ["why is the sea blue", "why is the sky blue 2", "whyistheskyblue"])
def test_normalize_text_of_another_title_differs(other: str) -> None:
    assert normalize_text(other) != normalize_text("Why is the sky blue?")


@pytest.mark.parametrize(("text", "expected"), [("  ?! \n ++ ", "?! ++"), ("", ""), (" \n", "")])
def test_normalize_text_of_only_symbols_keeps_them(text: str, expected: str) -> None:
    assert normalize_text(text) == expected


def test_build_split_key_without_title_is_the_text() -> None:
    assert make_key(" ", "Some Text!") == "some text"
    assert make_key(" ", ["Some", "Text!"]) == "some text"
    assert make_key("Title", "Some Text!") == "title"


@pytest.mark.parametrize(
    ("value", "key"),
    [
        ("Ann B.", "ann b"),
        (7, "7"),
        (True, "true"),
        (1.5, "1 5"),
        (datetime.date(2024, 2, 29), "2024 02 29"),
        (datetime.datetime(2024, 2, 29, 1), "2024 02 29t01 00 00"),
        ("", "some text"),
        (None, "some text"),
    ],
)
def test_build_split_key_of_another_column_is_its_value_as_text(value: Any, key: str) -> None:
    assert make_key("Title", "Some text", ["customer"], customer=value) == key
    assert make_key("Title", "Some text", ["meta.customer"], meta={"customer": value}) == key


def test_build_split_key_of_several_columns_depends_on_each_and_on_their_order() -> None:
    keys = [(a, b) for a in ("a", "a b", "") for b in ("b", "a b", "c", "")]
    found = {make_key("t", "text", ["x", "y"], x=a, y=b) for a, b in keys}
    assert len(found) == len(keys)
    assert make_key("Sky?", "text", ["title", "x"], x="!A") == make_key("SKY", "other", ["title", "x"], x="a")


def test_build_split_key_of_no_columns_is_the_text() -> None:
    assert make_key("Title", "Some Text!", []) == "some text"


@pytest.mark.parametrize("value", [["a"], {"a": 1}, b"a"])
def test_format_scalar_of_another_type_names_the_column(value: Any) -> None:
    with pytest.raises(
        BadRecordError, match=rf"column 'meta' contains {type(value).__name__}, not a text, number or da"
    ):
        format_scalar(value, "meta")


@pytest.mark.parametrize(
    ("value", "text"),
    [("", ""), (" A", " A"), (None, None), (False, "false"), (10, "10"), (0.1, "0.1"), (-0.0, "-0.0")],
)
def test_read_group_values_are_texts_as_json_writes_them(value: Any, text: str | None) -> None:
    assert read_group_values({"a": {"b": value}, "c": "d"}, ["a.b", "source", "a.b"]) == {"a.b": text}


def test_read_group_values_of_an_absent_column_is_a_bad_record() -> None:
    with pytest.raises(BadRecordError, match=r"no column 'b'; there are: a"):
        read_group_values({"a": 1}, ["a", "b"])


# Recorded from a run. Any other result would move records between the splits of existing experiments.
@pytest.mark.parametrize(("key", "expected"), [("a", "train"), ("question 36", "validation"), ("question 37", "test")])
def test_split_of_known_keys_never_changes(key: str, expected: str) -> None:
    assert find_split(key, make_split()) == expected


def test_split_of_another_seed_draws_another_split() -> None:
    keys = [str(i) for i in range(200)]
    assert [find_split(key, make_split(seed=0)) for key in keys] != [
        find_split(key, make_split(seed=1)) for key in keys
    ]


@no_deadline
@given(st.lists(_TEXT, max_size=20), st.lists(_TEXT, max_size=20), st.integers(0, 2**32 - 1))
def test_split_when_records_are_added_moves_none(titles: list[str], added: list[str], seed: int) -> None:
    def assigned(all_titles: list[str]) -> dict[str, str]:
        return {title: find_split(make_key(title), make_split(seed=seed)) for title in all_titles}

    before, after = assigned(titles), assigned([*added, *titles])
    assert before == {title: after[title] for title in titles}


_WORD = st.text("abcXYZéßΣς1", min_size=1, max_size=5)


@no_deadline
@given(st.lists(_WORD, min_size=1, max_size=5), st.sampled_from(["?", " !", "...", ""]), st.sampled_from([" ", " - "]))
def test_split_of_titles_that_are_equal_when_normalized_is_the_same(words: list[str], end: str, gap: str) -> None:
    plain, variant = " ".join(words), gap.join(words).upper() + end
    narrow = make_split(train=0.34, validation=0.33, test=0.33)
    assert find_split(make_key(plain), narrow) == find_split(make_key(variant, "other"), narrow)


@pytest.mark.parametrize(
    "shares", [{"train": 0.8, "validation": 0.1, "test": 0.1}, {"train": 0.5, "validation": 0.2, "test": 0.3}]
)
def test_split_of_many_keys_matches_the_fractions(shares: dict[str, float]) -> None:
    counts = Counter(find_split(f"question {i}", make_split(**shares)) for i in range(10_000))
    assert {name: counts[name] / 10_000 for name in shares} == pytest.approx(shares, abs=0.015)
