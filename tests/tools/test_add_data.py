"""Tests of tools.add_data: the configurations that it writes, proposes and refuses."""

import csv
import datetime
import gzip
import json
import random
import re
import shlex
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from data_helpers import REPOSITORY
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st

import stages.core.compose
import stages.core.config
import tools.data_config
from stages.core.compose import compose_config, load_config
from stages.core.config import read_yaml
from stages.core.errors import StageError
from stages.download.stage import DownloadConfig, main
from tools import add_data
from tools.data_columns import collect_columns, preview_data, propose_text_record
from tools.data_config import (
    DataChoice,
    format_yaml_value,
    get_changed_values,
    quote_hydra_value,
    quote_shell_word,
    set_yaml_values,
)

HOSTILE_NAMES = [
    'a"b', "it's", "new\nline", "x: [y] # z", "yes", "null", "1e5", "2026-01-01", "???", "-x", "*a", "!b", "a.b",
    "é 北京 🙂", " spaced ", "", "\x1b[31m", "\u2028", "{", "~",
]  # fmt: skip


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Current directory like a fresh clone: conf/ and params.yaml, without data/."""
    clone = tmp_path / "clone"
    shutil.copytree(REPOSITORY / "conf", clone / "conf")
    shutil.copy(REPOSITORY / "params.yaml", clone)
    for module in (stages.core.config, stages.core.compose, add_data, tools.data_config):
        monkeypatch.setattr(module, "CONF", clone / "conf")
    for module in (stages.core.compose, tools.data_config):
        monkeypatch.setattr(module, "PARAMS", clone / "params.yaml")
    monkeypatch.chdir(clone)
    return clone


@pytest.fixture
def tool(workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Function `tool(*arguments)` that runs the command and returns its output; `SystemExit` if it fails."""

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["add_data", *arguments])
        monkeypatch.setenv("COLUMNS", "200")
        add_data.main()
        return capsys.readouterr().out

    return run


def run_refused(tool: Callable[..., str], *arguments: str) -> str:
    """Run the command, which must fail, and return its error message."""
    with pytest.raises(SystemExit) as exit_:
        tool(*arguments)
    return str(exit_.value)


def write_tickets(file: str = "tickets.csv", num_rows: int = 200) -> str:
    """Write support tickets: two text columns, a title, a key with 40 values, a group, a number and an empty column."""
    generator = random.Random(0)
    with Path(file).open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["id", "customer", "subject", "body", "agent_reply", "lang", "age", "nothing"])
        for number in range(num_rows):
            body = " ".join(f"word{generator.randrange(900)}" for _ in range(40))
            reply = "" if number % 10 == 0 else f"{body[:100]} reply {number}"
            lang = "de" if number % 3 else "en"
            writer.writerow([number, f"c{number % 40}", f"Subject {number}", body, reply, lang, number % 7, ""])
    return file


def write_jsonl(file: str, rows: list[Any]) -> str:
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def read_config(name: str) -> Any:
    return read_yaml(Path(f"conf/data/{name}.yaml").resolve())


# -- writing -----------------------------------------------------------------------------------------------------------


def test_add_data_writes_template_with_only_the_chosen_values_changed(tool: Callable[..., str]) -> None:
    tool(write_tickets(), "--texts", "body", "agent_reply", "--key", "customer", "--groups", "lang")
    template, written = read_config("files"), read_config("tickets")
    changed = {"columns": {"title": "subject", "texts": ["body", "agent_reply"], "roles": None}, "groups": ["lang"]}
    assert written == template | changed | {"split": template["split"] | {"key": "customer"}}
    comments = [re.findall(r"#.*", line) for line in Path("conf/data/files.yaml").read_text().splitlines()[2:]]
    assert [
        re.findall(r"#.*", line) for line in Path("conf/data/tickets.yaml").read_text().splitlines()[1:]
    ] == comments


def test_add_data_configuration_is_read_by_download(tool: Callable[..., str], tmp_path: Path) -> None:
    output = tool(write_tickets(), "--texts", "body", "agent_reply")
    config = load_config(
        DownloadConfig, compose_config("download", ["data=tickets", "data.path=tickets.csv", "out=out"])
    )
    main(config)
    answers = pq.read_table("out/train.parquet").column("answers").to_pylist()
    assert {len(answer["text"]) for answer in answers} == {1, 2}
    assert "Records with text: 200 of 200" in output and "The first document: word" in output
    assert "dvc exp run -S data.name=tickets -S data.path=tickets.csv" in output
    permanent = output.split("set in params.yaml:\n")[1]
    assert yaml.safe_load(permanent) == {"data": {"name": "tickets", "path": "tickets.csv"}}


def test_add_data_existing_configuration_is_overwritten_only_if_forced(tool: Callable[..., str]) -> None:
    tool(write_tickets(), "--texts", "body")
    before = Path("conf/data/tickets.yaml").read_bytes()
    assert "exists: choose another name with --name, or --force" in run_refused(
        tool, "tickets.csv", "--texts", "agent_reply"
    )
    assert Path("conf/data/tickets.yaml").read_bytes() == before
    tool("tickets.csv", "--texts", "agent_reply", "--force")
    assert read_config("tickets")["columns"]["texts"] == ["agent_reply"]


def test_add_data_template_is_never_overwritten(tool: Callable[..., str]) -> None:
    before = Path("conf/data/files.yaml").read_bytes()
    assert "exists" in run_refused(tool, write_tickets("files.csv"), "--texts", "body", "--force")
    assert Path("conf/data/files.yaml").read_bytes() == before


def test_add_data_configuration_that_fails_its_check_is_removed(tool: Callable[..., str]) -> None:
    params = Path("params.yaml").read_text()
    Path("params.yaml").write_text(params.replace("model: tiny-gpt2", "model: tiny-gtp2"))
    assert "did you mean tiny-gpt2?" in run_refused(tool, write_tickets(), "--texts", "body")
    assert not Path("conf/data/tickets.yaml").exists()


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("tickets.csv", "tickets"),
        ("dir/a.b.jsonl.gz", "a.b"),
        ("Meine Daten (2).json", "Meine-Daten-2"),
        ("https://host/x/data.parquet?token", "data"),
        ("北京.txt", "data"),
        (".hidden.csv", "hidden"),
        ("folder/", "folder"),
        ("a\nb.csv", "a-b"),
    ],
)
def test_make_configuration_name_of_path_is_plain_name(path: str, name: str) -> None:
    assert add_data.make_configuration_name(add_data.get_source_stem(path)) == name


def test_add_data_invalid_name_is_made_valid(tool: Callable[..., str]) -> None:
    tool(write_tickets(), "--texts", "body", "--name", "../my tickets")
    assert Path("conf/data/my-tickets.yaml").is_file()


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_add_data_hostile_column_is_written_and_read_back(tool: Callable[..., str], name: str) -> None:
    write_jsonl("h.jsonl", [{name: f"text {number}", "k": number} for number in range(60)])
    output = tool("h.jsonl", f"--texts={name}", "--key", "k", "--title", "")
    assert read_config("h")["columns"] == {"title": None, "texts": [name], "roles": None}
    assert yaml.safe_load(Path("conf/data/h.yaml").read_text())["columns"]["texts"] == [name]
    assert "\x1b" not in output and "\u2028" not in output


def test_add_data_interpolation_in_a_column_is_refused(tool: Callable[..., str]) -> None:
    write_jsonl("h.jsonl", [{"${oc.env:HOME}": "text"}])
    assert "cannot contain ${" in run_refused(tool, "h.jsonl", "--texts", "${oc.env:HOME}")


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=4), st.text(max_size=20))
@example(HOSTILE_NAMES, "1e5")
def test_set_yaml_values_any_names_are_parsed_alike_by_all_parsers(names: list[str], title: str) -> None:
    title = title.encode(errors="ignore").decode()
    template = (REPOSITORY / "conf/data/files.yaml").read_text(encoding="utf-8")
    choice = DataChoice(names, title, names, names, "file")
    text = set_yaml_values(template, get_changed_values(choice))
    for values in (yaml.safe_load(text), stages.core.config._parse_yaml("x", text)):
        assert (values["columns"], values["groups"]) == ({"title": title, "texts": names, "roles": None}, names)
        assert values["split"]["key"] == (names[0] if len(names) == 1 else names)


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(lambda text: "${" not in text))
@example("it's \\'mine\\")
@example("100")
def test_quote_hydra_value_is_parsed_by_hydra_as_the_text(text: str) -> None:
    (override,) = OverridesParser.create().parse_overrides([f"data.path={quote_hydra_value(text)}"])
    assert override.value() == text


@pytest.mark.parametrize("word", [name for name in HOSTILE_NAMES if name] + ["$(touch x)", "`x`", "a;b", "\\'\n\\"])
def test_quote_shell_word_is_read_by_shell_as_the_word_and_is_printable(word: str) -> None:
    shown = quote_shell_word(word)
    assert shown.isprintable()
    completed = subprocess.run(
        ["bash", "-c", f"printf %s {shown}"], capture_output=True, check=True, env={"LC_ALL": "C.UTF-8"}
    )
    assert completed.stdout.decode() == word


def test_format_yaml_value_of_plain_names_has_no_quotes() -> None:
    assert format_yaml_value(["body", "agent_reply", "answers.text"]) == "[body, agent_reply, answers.text]"


# -- proposing ---------------------------------------------------------------------------------------------------------


def parse_proposal(output: str) -> list[str]:
    """Return the arguments of the command at the end of a proposal."""
    words = shlex.split(output.strip().splitlines()[-1])
    assert words[:3] == ["python", "-m", "tools.add_data"]
    return words[3:]


def test_add_data_without_texts_proposes_columns_and_writes_nothing(tool: Callable[..., str]) -> None:
    before = sorted(Path("conf/data").iterdir())
    output = tool(write_tickets())
    assert sorted(Path("conf/data").iterdir()) == before
    assert parse_proposal(output) == ["tickets.csv", "--texts", "body", "agent_reply", "--title", "subject"]
    assert "Possible --key: customer, 40 values" in output and "Possible --groups: lang, 2 values" in output
    tool(*parse_proposal(output))
    assert read_config("tickets")["columns"] == {"title": "subject", "texts": ["body", "agent_reply"], "roles": None}


def test_add_data_table_shows_kind_and_counts_of_each_column(tool: Callable[..., str]) -> None:
    lines = tool(write_tickets()).splitlines()
    cells = {line.split()[0]: re.split(r"  +", line.strip()) for line in lines if line.startswith(" ") and line.strip()}
    assert cells["agent_reply"][1:4] == ["text", "20", "180"]
    assert cells["age"][1:4] == ["number as text", "0", "7"]
    assert cells["nothing"][1:4] == ["nothing", "200", "0"]


def test_add_data_single_column_is_proposed(tool: Callable[..., str]) -> None:
    write_jsonl("one.jsonl", [{"only": f"text {number}"} for number in range(9)])
    assert parse_proposal(tool("one.jsonl")) == ["one.jsonl", "--texts", "only"]


def test_add_data_nested_columns_and_lists_of_texts_are_dotted(tool: Callable[..., str]) -> None:
    rows = [{"doc": {"parts": [f"a text {n}", None, "b"], "head": {"title": f"t{n}"}}, "n": n} for n in range(9)]
    assert parse_proposal(tool(write_jsonl("x.jsonl", rows))) == [
        "x.jsonl",
        "--texts",
        "doc.parts",
        "--title",
        "doc.head.title",
    ]
    structs = [{"answers": [{"body": f"one {n}"}, {"body": "two"}]} for n in range(9)]
    assert parse_proposal(tool(write_jsonl("y.jsonl", structs))) == ["y.jsonl", "--texts", "answers.body"]


def test_add_data_eli5_columns_leave_nothing_to_choose(tool: Callable[..., str]) -> None:
    path = str(REPOSITORY / "data/sample/askscience.jsonl")
    output = tool(path)
    assert "nothing to choose" in output and f"dvc exp run -S data.name=files -S data.path={path}" in output
    assert parse_proposal(output) == [path, "--texts", "answers.text"]


def test_add_data_proposed_command_is_quoted_for_a_shell(tool: Callable[..., str]) -> None:
    write_jsonl("it's (mine).jsonl", [{"the text": f"text {n}", "-y": f"texts {n}"} for n in range(9)])
    arguments = parse_proposal(tool("it's (mine).jsonl", "--name", "mine"))
    assert arguments == ["it's (mine).jsonl", "--texts=-y", "--texts=the text", "--name", "mine"]
    output = tool(*arguments)
    (next_command,) = [line for line in output.splitlines() if "dvc exp run" in line]
    printed = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {next_command}"], capture_output=True, text=True, check=True
    )
    (override,) = OverridesParser.create().parse_overrides([printed.stdout.splitlines()[-1]])
    assert override.value() == "it's (mine).jsonl"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"book.txt": "A line.\nAnother.\n\nA paragraph.\nIts end.\n\nThe last."}, "paragraph"),
        ({"lines.txt": "\n".join(f"Sentence {number}." for number in range(200))}, "line"),
        ({f"{number:02d}.txt": "One.\n\nTwo." for number in range(40)}, "file"),
        ({"long.txt": "\n\n".join("\n".join(["x"] * 90) for _ in range(3))}, "line"),
    ],
    ids=["paragraphs", "lines", "many files", "lines with rare gaps"],
)
def test_add_data_plain_text_proposes_record_unit_by_layout(
    tool: Callable[..., str], files: dict[str, str], expected: str
) -> None:
    Path("texts").mkdir()
    for name, text in files.items():
        (Path("texts") / name).write_text(text)
    assert propose_text_record(preview_data("texts", 1000))[0] == expected
    arguments = parse_proposal(tool("texts"))
    assert arguments == ["texts", "--text-record", expected]
    tool(*arguments)
    assert read_config("texts") == read_config("files") | {"text_record": expected}


# -- refusing and warning ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--texts", "bdy"], "--texts 'bdy': no such column; did you mean body?"),
        (["--texts", "zzz"], "no such column; there are id, customer, subject, body"),
        (["--texts", "body", "--key", "custmer"], "--key 'custmer': no such column; did you mean customer?"),
        (["--texts", "body", "--title", "tytle", "--groups", "land"], "--groups 'land': no such column"),
        (["--texts", "body", "--key", "title"], "--key 'title': no such column"),
        (["--texts", "body", "--text-record", "line"], "--text-record is for plain text"),
    ],
)
def test_add_data_unknown_column_is_refused_by_name(tool: Callable[..., str], options: list[str], message: str) -> None:
    assert message in run_refused(tool, write_tickets(), *options)
    assert not Path("conf/data/tickets.yaml").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--texts", "number"], "--texts 'number': contains whole number, not text"),
        (["--texts", "fields"], "--texts 'fields': has nested fields: fields.a, fields.b"),
        (["--texts", "text", "--key", "list"], "--key 'list': contains list of texts, not one value per record"),
        (["--texts", "text", "--title", "number"], "--title 'number': contains whole number, not one text"),
        (["--texts", "text", "--key", "title", "--title", "text"], "--key title: in split.key, `title` means"),
    ],
)
def test_add_data_column_of_another_kind_is_refused(tool: Callable[..., str], options: list[str], message: str) -> None:
    row = {"text": "a", "number": 1, "fields": {"a": "x", "b": 2}, "list": ["x"], "title": "t"}
    assert message in run_refused(tool, write_jsonl("x.jsonl", [row]), *options)


def test_add_data_columns_of_numbers_are_refused(tool: Callable[..., str]) -> None:
    assert "no column has text" in run_refused(tool, write_jsonl("x.jsonl", [{"a": 1, "b": None, "c": "5"}]))


@pytest.mark.parametrize(
    ("options", "warning"),
    [
        (["--texts", "nothing"], "column 'nothing' is empty in all 200 records"),
        (["--texts", "age"], "column 'age' contains only numbers"),
        (["--texts", "body", "--key", "lang"], "lang decides the split and has only 2 distinct values"),
    ],
)
def test_add_data_questionable_column_prints_warning(
    tool: Callable[..., str], options: list[str], warning: str
) -> None:
    assert f"Warning: {warning}" in tool(write_tickets(), *options)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.csv", None, "no such file"),
        ("empty.csv", b"", "has no records"),
        ("empty.txt", b"\n\n", "has no records"),
        ("head.csv", b"a,b\n", "has no records"),
        ("binary.jsonl", bytes(range(256)) * 50, "has no readable records"),
        ("binary.csv", b"\x1f\x8b\x00\x01", "contains gzip"),
        ("binary.bin", b"\x00", "unknown format"),
        ("cut.parquet", b"PAR1\x15\x00", "damaged or cut short"),
        ("list.jsonl", b"[1]\n[2]\n", "not an object with columns"),
    ],
)
def test_add_data_unreadable_file_is_refused_in_one_line(
    tool: Callable[..., str], name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        Path(name).write_bytes(content)
    assert message in (output := run_refused(tool, name)) and "\n" not in output


def test_add_data_path_with_a_password_is_refused_without_showing_it(tool: Callable[..., str]) -> None:
    output = run_refused(tool, "https://me:hunter2@host/x.csv")
    assert "credentials" in output and "hunter2" not in output


def test_preview_data_reads_only_the_beginning_of_a_large_file(workplace: Path) -> None:
    line = json.dumps({"text": "x" * 1000}) + "\n"
    with gzip.open("large.jsonl.gz", "wt", compresslevel=1) as stream:
        for _ in range(100):
            stream.write(line * 1000)
    tracemalloc.start()
    preview = preview_data("large.jsonl.gz", 1000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(preview.rows) == 1000 and peak < 10_000_000  # of 100 MB


def test_preview_data_of_directory_reads_records_of_every_file(workplace: Path) -> None:
    Path("many").mkdir()
    for number in range(5):
        write_jsonl(f"many/{number}.jsonl", [{f"column{number}": "text"}] * 400)
    preview = preview_data("many", 1000)
    assert len(preview.rows) == 1000 and len(collect_columns(preview.rows)) == 5


def test_preview_data_counts_unreadable_records(workplace: Path) -> None:
    Path("x.jsonl").write_text('{"a": "b"}\nnot json\n[1]\n')
    preview = preview_data("x.jsonl", 10)
    assert (len(preview.rows), preview.num_bad_records) == (1, 2) and "x.jsonl:2: not JSON" in preview.first_bad_record


def test_collect_columns_of_parquet_recognizes_types(workplace: Path) -> None:
    table = pa.table(
        {"t": ["a"], "l": [["b", "c"]], "d": [datetime.date(2026, 1, 1)], "x": [1.5], "b": [True], "n": [None]}
    )
    pq.write_table(table, "t.parquet")
    kinds = {name: list(column.kinds) for name, column in collect_columns(preview_data("t.parquet", 10).rows).items()}
    assert kinds == {"t": ["text"], "l": ["list of texts"], "d": ["date"], "x": ["number"], "b": ["boolean"], "n": []}


def test_download_missing_column_error_names_the_command(tool: Callable[..., str]) -> None:
    write_tickets()
    config = load_config(DownloadConfig, compose_config("download", ["data=files", "data.path=tickets.csv", "out=out"]))
    with pytest.raises(StageError, match=r"no column 'title'.*python -m tools\.add_data"):
        main(config)


# -- answers only ------------------------------------------------------------------------------------------------------


def write_conversations(file: str = "chat.jsonl") -> str:
    rows = [
        {"messages": [{"role": "user", "content": f"Q {number}?"}, {"role": "assistant", "content": f"A {number}."}]}
        for number in range(60)
    ]
    return write_jsonl(file, rows)


def test_add_data_answers_only_uses_the_title_as_prompt(tool: Callable[..., str]) -> None:
    tool(write_tickets(), "--texts", "agent_reply", "--answers-only")
    assert read_config("tickets")["flatten"] == {
        "prompt": ["title", "selftext"],
        "completion": ["answers.text"],
        "joiner": " ",
        "separator": "\n\n",
    }


def test_add_data_proposes_the_roles_of_messages(tool: Callable[..., str]) -> None:
    output = tool(write_conversations())
    assert "--texts messages.content --roles messages.role" in output


def test_add_data_conversations_warn_of_tasks_that_cannot_use_them(tool: Callable[..., str]) -> None:
    output = tool(write_conversations(), "--texts", "messages.content", "--roles", "messages.role")
    written = read_config("chat")
    assert written["columns"] == {"title": None, "texts": ["messages.content"], "roles": "messages.role"}
    assert written["flatten"] == {"messages": True}
    assert "Warning: the task mlm cannot use this data: flatten.messages=true: conversations are for causal" in output
    assert "dvc exp run -S data.name=chat -S data.path=chat.jsonl evaluate@causal" in output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--texts", "agent_reply", "--answers-only", "--title", ""], "the title is the prompt: name its column"),
        (["--texts", "body", "agent_reply", "--roles", "subject"], "--roles subject: give one column of messages"),
        (["--texts", "body", "--roles", "nobody"], "--roles 'nobody': no such column"),
        (["--texts", "body", "--roles", "subject", "--answers-only"], "only the assistant's messages count"),
    ],
)
def test_add_data_invalid_answers_only_or_roles_is_refused(
    tool: Callable[..., str], options: list[str], message: str
) -> None:
    assert message in run_refused(tool, write_tickets(), *options)
