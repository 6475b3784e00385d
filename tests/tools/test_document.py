"""Tests of tools.document: docs/configuration.md matches the schemas and conf/, and describes types and values."""

import pytest
import yaml

from stages.core.config import CONF, MISSING
from tools import document
from tools.keys import describe_type

FILES = sorted(file.relative_to(CONF).as_posix() for file in CONF.glob("*/*.yaml"))


def test_document_page_is_up_to_date() -> None:
    assert document.PAGE.read_text(encoding="utf-8") == document.render_configuration_page(), (
        "run `python -m tools.document`"
    )


@pytest.mark.parametrize("content", [None, "# Configuration\n"])
def test_document_check_of_outdated_page_fails_with_command(monkeypatch, tmp_path, content) -> None:
    page = tmp_path / "configuration.md"
    if content is not None:
        page.write_text(content, encoding="utf-8")
    monkeypatch.setattr(document, "PAGE", page)
    monkeypatch.setattr("sys.argv", ["document", "--check"])
    with pytest.raises(SystemExit, match=r"is out of date: run `python -m tools.document`"):
        document.main()
    assert page.is_file() == (content is not None)  # nothing written


def test_document_check_of_written_page_passes(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(document, "PAGE", tmp_path / "configuration.md")
    monkeypatch.setattr("sys.argv", ["document"])
    document.main()
    monkeypatch.setattr("sys.argv", ["document", "--check"])
    document.main()


@pytest.mark.parametrize("file", FILES)
def test_document_page_lists_every_key_of_conf_file(file: str) -> None:
    section = document.render_configuration_page().split(f"\n## conf/{file.partition('/')[0]}\n")[1].split("\n## ")[0]
    values = yaml.safe_load((CONF / file).read_text(encoding="utf-8"))
    # Keys of `config`, `files` and `filter` are free; all others belong to a schema or to TrainingArguments.
    names = [
        name
        for name, _ in document.flatten_values(values)
        if name.partition(".")[0] not in ("config", "files", "filter")
    ]
    missing = [name for name in names if f"| `{name}` |" not in section]
    free_sections = (".special_tokens.", ".accelerator_config.", ".fsdp_config.")
    assert [name for name in missing if not any(section in name for section in free_sections)] == []


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "integer", "minimum": 1}, "whole number from 1"),
        ({"type": "number", "exclusiveMinimum": 0.0, "exclusiveMaximum": 1.0}, "number above 0 to below 1"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "text or `null`"),
        ({"anyOf": [{"$ref": "#/$defs/HubData"}, {"type": "null"}]}, "a section (below) or `null`"),
        ({"enum": ["no", "epoch"]}, "`'no'`, `epoch`"),
        ({"enum": [str(number) for number in range(12)]}, "12 names"),
        ({"type": "array", "items": {"type": "string"}, "minItems": 1}, "list of text (not empty)"),
        ({"type": "boolean"}, "`true`, `false`"),
    ],
)
def test_describe_type_gives_type_and_range_in_words(schema, words) -> None:
    assert describe_type(schema) == words


@pytest.mark.parametrize(
    ("values", "cell"),
    [
        ({"cpu": 2, "gpu": 2}, "`2`"),
        ({"cpu": 2, "gpu": 8}, "`2`: cpu<br>`8`: gpu"),
        ({"cpu": MISSING, "gpu": True}, "`true`: gpu"),
        ({"cpu": MISSING}, ""),
        ({str(number): number for number in range(5)}, "[differs by file](../conf/hardware)"),
    ],
)
def test_format_file_values_names_files_if_values_differ(values, cell) -> None:
    assert document.format_file_values(values, "hardware") == cell


def test_read_commented_yaml_returns_comments_of_nested_keys(tmp_path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("# about\nouter:  # of all\n  inner: '#1'  # of one\nplain: 2\n", encoding="utf-8")
    assert document.read_commented_yaml(file) == (
        {"outer": {"inner": "#1"}, "plain": 2},
        {"outer": "of all", "outer.inner": "of one"},
    )
