"""Conversations: messages with roles, up to the first missing message."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from data_helpers import make_source_data, read_stats, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from stages.core.errors import StageError
from stages.download.records import BadRecordError, build_record, select_messages
from stages.download.schema import Columns
from stages.download.stage import DownloadConfig, main

COLUMNS = Columns(title=None, texts=["messages.content"], roles="messages.role")


def make_conversation(
    *messages: tuple[str, Any], key: str = "messages", names: tuple[str, str] = ("role", "content")
) -> Any:
    return {key: [dict(zip(names, message, strict=True)) for message in messages]}


def read_answers(row: Any, columns: Columns = COLUMNS) -> tuple[list[str], list[str]]:
    record, _ = build_record(row, columns)
    return record["answers"]["role"], record["answers"]["text"]


def test_messages_keep_their_roles_and_order() -> None:
    row = make_conversation(("system", "S"), ("user", "U"), ("assistant", "A"), ("user", "V"), ("assistant", "B"))
    assert read_answers(row) == (["system", "user", "assistant", "user", "assistant"], ["S", "U", "A", "V", "B"])


def test_roles_of_other_formats_are_converted_to_those_of_chat_templates() -> None:
    row = make_conversation(("human", "U"), ("gpt", "A"), key="conversations", names=("from", "value"))
    columns = Columns(title=None, texts=["conversations.value"], roles="conversations.from")
    assert read_answers(row, columns) == (["user", "assistant"], ["U", "A"])


@pytest.mark.parametrize("removed", ["", "[deleted]", None])
def test_messages_after_a_removed_message_are_left_out(removed: Any) -> None:
    row = make_conversation(("user", "U"), ("assistant", "A"), ("user", removed), ("assistant", "B"))
    assert read_answers(row) == (["user", "assistant"], ["U", "A"])


def test_empty_system_message_is_left_out_without_the_next() -> None:
    assert read_answers(make_conversation(("system", ""), ("user", "U"), ("assistant", "A"))) == (
        ["user", "assistant"],
        ["U", "A"],
    )


@pytest.mark.parametrize("messages", [[("user", "U")], [("user", ""), ("assistant", "A")], []])
def test_conversation_without_the_assistant_has_no_messages(messages: Any) -> None:
    assert read_answers(make_conversation(*messages)) == ([], [])


@given(
    roles=st.lists(st.sampled_from(["system", "user", "assistant"]), max_size=7),
    chosen=st.sets(st.integers(0, 6)),
)
def test_select_messages_gives_a_prefix_except_for_system_messages(roles: list[str], chosen: set[int]) -> None:
    kept = [index for index in range(len(roles)) if index in chosen]
    found = select_messages(roles, kept)
    assert set(found) <= set(kept)
    if found:
        missing = set(range(found[-1])) - set(found)
        assert all(roles[index] == "system" for index in missing)
        assert "assistant" in [roles[index] for index in found]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (make_conversation(("tool", "U")), "contains the role 'tool', not one of system, user, assistant"),
        ({"messages": {"content": ["a", "b"], "role": ["user"]}}, "contains 1 roles, for 2 messages"),
        ({"messages": [{"content": "a"}]}, "no column 'messages.role'"),
        (make_conversation((7, "U")), "contains int, not text"),
    ],
)
def test_malformed_conversation_names_the_column(row: Any, message: str) -> None:
    with pytest.raises(BadRecordError, match=message):
        build_record(row, COLUMNS)


def test_roles_with_several_columns_of_texts_are_refused() -> None:
    with pytest.raises(
        ValidationError, match=r"columns.roles=role: columns.texts must name a single column of messages"
    ):
        Columns(title=None, texts=["a", "b"], roles="role")


def run_download(tmp_path: Path, rows: list[Any], **changes: Any) -> Path:
    file = write_jsonl(tmp_path / "chat.jsonl", rows)
    data = make_source_data(file, columns=COLUMNS, **changes)
    main(DownloadConfig(data=data, source="chat", out=str(tmp_path / "raw")))
    return tmp_path / "raw"


def test_download_writes_the_roles_of_texts_and_counts_empty_conversations(tmp_path: Path) -> None:
    rows = [
        make_conversation(("user", f"Question {number}?"), ("assistant", f"Answer {number}.")) for number in range(60)
    ]
    raw = run_download(tmp_path, [*rows, make_conversation(("user", "Only a question."))])
    table = pq.read_table(raw / "train.parquet")
    for record in table.column("answers").to_pylist():
        assert record["role"] == ["user", "assistant"]
        assert [text.split()[0] for text in record["text"]] == ["Question", "Answer"]
    assert json.dumps(read_stats(raw)).count('"without_answers": 1') == 1


def test_download_that_removes_a_message_ends_the_conversation_there(tmp_path: Path) -> None:
    from stages.download.cleaning_schema import WordsStep

    long = " ".join(["word"] * 9)
    rows = [
        make_conversation(("user", f"{long} {number}"), ("assistant", long), ("user", "short"), ("assistant", long))
        for number in range(60)
    ]
    raw = run_download(tmp_path, rows, clean=[WordsStep(step="words", minimum=5)])
    for record in pq.read_table(raw / "train.parquet").column("answers").to_pylist():
        assert record["role"] == ["user", "assistant"]


def test_download_of_an_unknown_role_names_file_and_line(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"chat.jsonl:2: column 'messages.role' contains the role 'bot'"):
        run_download(tmp_path, [make_conversation(("user", "U"), ("assistant", "A")), make_conversation(("bot", "B"))])
