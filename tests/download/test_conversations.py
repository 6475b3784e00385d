"""Conversations: messages with roles, kept up to the first that is missing."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from data_helpers import read_stats, source_data, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from stages.core.errors import StageError
from stages.download.records import BadRecordError, kept_messages, to_record
from stages.download.schema import Columns
from stages.download.stage import DownloadConfig, main

COLUMNS = Columns(title=None, texts=["messages.content"], roles="messages.role")


def talk(*messages: tuple[str, Any], key: str = "messages", names: tuple[str, str] = ("role", "content")) -> Any:
    return {key: [dict(zip(names, message, strict=True)) for message in messages]}


def answers(row: Any, columns: Columns = COLUMNS) -> tuple[list[str], list[str]]:
    record, _ = to_record(row, columns)
    return record["answers"]["role"], record["answers"]["text"]


def test_messages_keep_their_roles_and_order() -> None:
    row = talk(("system", "S"), ("user", "U"), ("assistant", "A"), ("user", "V"), ("assistant", "B"))
    assert answers(row) == (["system", "user", "assistant", "user", "assistant"], ["S", "U", "A", "V", "B"])


def test_roles_of_other_formats_are_those_of_chat_templates() -> None:
    row = talk(("human", "U"), ("gpt", "A"), key="conversations", names=("from", "value"))
    columns = Columns(title=None, texts=["conversations.value"], roles="conversations.from")
    assert answers(row, columns) == (["user", "assistant"], ["U", "A"])


@pytest.mark.parametrize("removed", ["", "[deleted]", None])
def test_what_follows_a_removed_message_is_left_out(removed: Any) -> None:
    row = talk(("user", "U"), ("assistant", "A"), ("user", removed), ("assistant", "B"))
    assert answers(row) == (["user", "assistant"], ["U", "A"])


def test_an_empty_system_message_is_left_out_by_itself() -> None:
    assert answers(talk(("system", ""), ("user", "U"), ("assistant", "A"))) == (["user", "assistant"], ["U", "A"])


@pytest.mark.parametrize("messages", [[("user", "U")], [("user", ""), ("assistant", "A")], []])
def test_a_conversation_in_which_the_assistant_says_nothing_has_no_messages(messages: Any) -> None:
    assert answers(talk(*messages)) == ([], [])


@given(
    roles=st.lists(st.sampled_from(["system", "user", "assistant"]), max_size=7),
    chosen=st.sets(st.integers(0, 6)),
)
def test_kept_messages_are_a_beginning_but_for_system_messages(roles: list[str], chosen: set[int]) -> None:
    kept = [index for index in range(len(roles)) if index in chosen]
    found = kept_messages(roles, kept)
    assert set(found) <= set(kept)
    if found:
        missing = set(range(found[-1])) - set(found)
        assert all(roles[index] == "system" for index in missing)
        assert "assistant" in [roles[index] for index in found]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (talk(("tool", "U")), "holds the role 'tool', none of system, user, assistant"),
        ({"messages": {"content": ["a", "b"], "role": ["user"]}}, "holds 1 roles, for 2 messages"),
        ({"messages": [{"content": "a"}]}, "no column 'messages.role'"),
        (talk((7, "U")), "holds int, not text"),
    ],
)
def test_a_malformed_conversation_names_the_column(row: Any, message: str) -> None:
    with pytest.raises(BadRecordError, match=message):
        to_record(row, COLUMNS)


def test_roles_beside_several_columns_of_texts_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"columns.roles=role: name one column of messages"):
        Columns(title=None, texts=["a", "b"], roles="role")


def download(tmp_path: Path, rows: list[Any], **changes: Any) -> Path:
    file = write_jsonl(tmp_path / "chat.jsonl", rows)
    data = source_data(file, columns=COLUMNS, **changes)
    main(DownloadConfig(data=data, source="chat", out=str(tmp_path / "raw")))
    return tmp_path / "raw"


def test_download_writes_the_roles_beside_the_texts_and_counts_what_is_empty(tmp_path: Path) -> None:
    rows = [talk(("user", f"Question {number}?"), ("assistant", f"Answer {number}.")) for number in range(60)]
    raw = download(tmp_path, [*rows, talk(("user", "Only a question."))])
    table = pq.read_table(raw / "train.parquet")
    for record in table.column("answers").to_pylist():
        assert record["role"] == ["user", "assistant"]
        assert [text.split()[0] for text in record["text"]] == ["Question", "Answer"]
    assert json.dumps(read_stats(raw)).count('"without_answers": 1') == 1


def test_download_that_cleans_a_message_away_ends_the_conversation_there(tmp_path: Path) -> None:
    from stages.download.cleaning_schema import WordsStep

    long = " ".join(["word"] * 9)
    rows = [
        talk(("user", f"{long} {number}"), ("assistant", long), ("user", "short"), ("assistant", long))
        for number in range(60)
    ]
    raw = download(tmp_path, rows, clean=[WordsStep(step="words", minimum=5)])
    for record in pq.read_table(raw / "train.parquet").column("answers").to_pylist():
        assert record["role"] == ["user", "assistant"]


def test_download_of_an_unknown_role_names_file_and_line(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"chat.jsonl:2: column 'messages.role' holds the role 'bot'"):
        download(tmp_path, [talk(("user", "U"), ("assistant", "A")), talk(("bot", "B"))])
