"""Items: valid lines are read, and each invalid line is an error with its place."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from data_helpers import write_jsonl
from hub_cases import encode_parquet

from stages.core.errors import StageError
from stages.score.items import Item, compute_digest, read_items
from stages.score.schema import PairColumns, Pairs

PAIR = {"good": "A cat sleeps.", "bad": "A cat sleep."}
QUESTION = {"prompt": "The sky is", "choices": ["blue", "loud", "a"], "answer": 0}


def make_pairs(path: Path | str, groups: tuple[str, ...] = (), **columns: str) -> Pairs:
    """Make the `pairs` section for the file at `path`."""
    names = {name: name for name in ("good", "bad", "prompt", "choices", "answer")} | columns
    return Pairs(path=str(path), hub=None, columns=PairColumns(**names), joiner=" ", groups=list(groups), context=16)


def read_lines(directory: Path, *lines: Any, **more: Any) -> list[Item]:
    return read_items(make_pairs(write_jsonl(directory / "items.jsonl", lines), **more))


def test_items_of_both_kinds_are_read_in_order_with_their_lines(tmp_path: Path) -> None:
    assert read_lines(tmp_path, PAIR, QUESTION, PAIR) == [
        Item("items.jsonl", 1, "", ["A cat sleeps.", "A cat sleep."], 0, []),
        Item("items.jsonl", 2, "The sky is", ["blue", "loud", "a"], 0, []),
        Item("items.jsonl", 3, "", ["A cat sleeps.", "A cat sleep."], 0, []),
    ]


def test_items_of_other_columns_are_read_by_their_names(tmp_path: Path) -> None:
    line = {"sentence_good": "a", "sentence_bad": "b", "good": 3}
    (item,) = read_lines(tmp_path, line, good="sentence_good", bad="sentence_bad")
    assert item.choices == ["a", "b"]


def test_items_groups_are_texts_or_none_without_a_value(tmp_path: Path) -> None:
    values = ["x", 3, 2.5, True, None, ""]
    lines = [{**PAIR, "field": value} for value in values] + [PAIR]
    found = [item.groups for item in read_lines(tmp_path, *lines, groups=("field",))]
    assert found == [["x"], ["3"], ["2.5"], ["true"], [None], [""], [None]]


def test_items_after_a_byte_order_mark_and_between_blank_lines_are_read(tmp_path: Path) -> None:
    file = tmp_path / "items.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + f"{json.dumps(PAIR)}\r\n\n  \n{json.dumps(QUESTION)}".encode())
    assert [item.row for item in read_items(make_pairs(file))] == [1, 4]


def test_items_with_unicode_and_literal_special_tokens_are_unchanged(tmp_path: Path) -> None:
    choices = ["naïve 北京 🙂\u202e", "<|endoftext|></s>"]
    (item,) = read_lines(tmp_path, {"good": choices[0], "bad": choices[1]})
    assert item.choices == choices


def test_items_of_a_question_may_have_an_empty_prompt(tmp_path: Path) -> None:
    (item,) = read_lines(tmp_path, {**QUESTION, "prompt": ""})
    assert item.prompt == ""


INVALID: dict[str, tuple[Any, str]] = {
    "no columns": ({"text": "a"}, "neither a minimal pair (good, bad) nor a multiple-choice question"),
    "both kinds": ({**PAIR, **QUESTION}, "both a minimal pair"),
    "good missing": ({"bad": "a"}, "good=null: it should be a string"),
    "bad missing": ({"good": "a"}, "bad=null: it should be a string"),
    "good empty": ({"good": "", "bad": "a"}, "good is empty"),
    "good a number": ({"good": 3, "bad": "a"}, "good=3: it should be a string"),
    "the same": ({"good": "a", "bad": "a"}, "good and bad are the same text"),
    "surrogate": ({"good": "\ud800", "bad": "a"}, "good has half of a surrogate pair"),
    "prompt missing": ({"choices": ["a", "b"], "answer": 0}, "prompt=null: it should be a string"),
    "one choice": ({**QUESTION, "choices": ["a"]}, "choices is not a list of at least two texts"),
    "choices a text": ({**QUESTION, "choices": "ab"}, "choices is not a list of at least two texts"),
    "choice empty": ({**QUESTION, "choices": ["a", ""]}, "choices[1] is empty"),
    "choices the same": ({**QUESTION, "choices": ["a", "b", "a"]}, "two of choices are the same text"),
    "answer missing": ({"prompt": "a", "choices": ["a", "b"]}, "answer=null: it should be an index from 0 to 1"),
    "answer beyond": ({**QUESTION, "answer": 3}, "answer=3: it should be an index from 0 to 2"),
    "answer negative": ({**QUESTION, "answer": -1}, "answer=-1: it should be an index from 0 to 2"),
    "answer a boolean": ({**QUESTION, "answer": True}, "answer=true: it should be an index"),
    "answer a text": ({**QUESTION, "answer": "blue"}, 'answer="blue": it should be an index'),
    "group a list": ({**PAIR, "field": ["x"]}, 'field=["x"]: it should be a string'),
}


@pytest.mark.parametrize("name", INVALID)
def test_items_with_an_invalid_line_are_an_error_with_file_and_line(tmp_path: Path, name: str) -> None:
    line, message = INVALID[name]
    with pytest.raises(StageError, match=re.escape(f"items.jsonl:3: {message}")):
        read_lines(tmp_path, {**PAIR, "field": "x"}, QUESTION, line, groups=("field",))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not a JSON object: Expecting"),
        (b"[1]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b'{"good": "\xff"}', "not a JSON object: 'utf-8' codec can't decode"),
        (b'{"good": "a", "good": "b"}', "not a JSON object: an object has the same key twice"),
        (b"[" * 100_000, "not a JSON object"),
    ],
)
def test_items_with_a_line_that_is_not_an_object_are_an_error_with_file_and_line(
    tmp_path: Path, line: bytes, message: str
) -> None:
    file = tmp_path / "items.jsonl"
    file.write_bytes(json.dumps(PAIR).encode() + b"\n" + line + b"\n")
    with pytest.raises(StageError, match=re.escape(f"items.jsonl:2: {message}")):
        read_items(make_pairs(file))


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_items_of_an_empty_file_are_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "items.jsonl").write_bytes(content)
    with pytest.raises(StageError, match="the file has no lines"):
        read_items(make_pairs(tmp_path / "items.jsonl"))


def test_items_without_a_requested_group_are_an_error_that_names_the_nearest_column(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"no item has the column feild; did you mean field\?"):
        read_lines(tmp_path, {**PAIR, "field": "x"}, groups=("feild",))


def test_items_of_the_embedded_file_are_distinct_pairs_of_like_length() -> None:
    items = read_items(make_pairs("data/pairs/english.jsonl", groups=("field", "phenomenon")))
    assert len(items) == 170
    assert len({tuple(item.choices) for item in items}) == len(items)
    assert {good for item in items for good in item.choices[:1]}.isdisjoint(item.choices[1] for item in items)
    counts = [len(choice.split()) for item in items for choice in item.choices]
    assert counts[::2] == counts[1::2]  # no sentence is more likely because it is shorter
    assert all(None not in item.groups for item in items)


def test_items_digest_depends_only_on_texts_and_answers(tmp_path: Path) -> None:
    (pair, question), digest = read_lines(tmp_path, PAIR, QUESTION), "sha256:"
    assert compute_digest([pair, question]).startswith(digest)
    assert compute_digest([pair._replace(source="x", row=9, groups=["a"])]) == compute_digest([pair])
    others = [question._replace(answer=1), question._replace(prompt=""), question._replace(choices=["blue", "loud"])]
    assert len({compute_digest([item]) for item in [pair, question, *others]}) == 5


def test_items_of_an_invalid_parquet_file_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stages.score.schema import HubPairs

    files = {"one": encode_parquet([{"good": "a", "bad": "b", "extra": None}]), "two": b"no Parquet"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(
        "stages.score.items.find_pinned_files",
        lambda key, path, revision, hashes, names, *_: {names[0]: tmp_path / names[0]},
    )
    pairs = make_pairs("-")
    pairs.hub = HubPairs(path="o/n", revision="0" * 40, file="{config}", configs=["one"])
    assert read_items(pairs) == [Item("one", 1, "", ["a", "b"], 0, [])]
    pairs.hub = HubPairs(path="o/n", revision="0" * 40, file="{config}", configs=["one", "two"])
    with pytest.raises(StageError, match=re.escape("o/n[two] is not a Parquet file")):
        read_items(pairs)
