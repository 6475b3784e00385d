"""docs/configuration.md: in step with the schemas and conf/, and what it says of types and values."""

import pytest
import yaml

from stages.core.config import CONF, MISSING
from stages.shell.keys import describe_type
from tools import document

FILES = sorted(file.relative_to(CONF).as_posix() for file in CONF.glob("*/*.yaml"))


def test_document_page_is_what_would_be_written_now() -> None:
    assert document.PAGE.read_text(encoding="utf-8") == document.page(), "run `python -m tools.document`"


@pytest.mark.parametrize("content", [None, "# Configuration\n"])
def test_document_check_of_a_stale_page_exits_1_and_names_the_command(monkeypatch, tmp_path, content) -> None:
    page = tmp_path / "configuration.md"
    if content is not None:
        page.write_text(content, encoding="utf-8")
    monkeypatch.setattr(document, "PAGE", page)
    monkeypatch.setattr("sys.argv", ["document", "--check"])
    with pytest.raises(SystemExit, match=r"is stale: run `python -m tools.document`"):
        document.main()
    assert page.is_file() == (content is not None)  # nothing written


def test_document_written_page_passes_its_check(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(document, "PAGE", tmp_path / "configuration.md")
    monkeypatch.setattr("sys.argv", ["document"])
    document.main()
    monkeypatch.setattr("sys.argv", ["document", "--check"])
    document.main()


@pytest.mark.parametrize("file", FILES)
def test_document_names_every_key_of_a_conf_file(file: str) -> None:
    section = document.page().split(f"\n## conf/{file.partition('/')[0]}\n")[1].split("\n## ")[0]
    values = yaml.safe_load((CONF / file).read_text(encoding="utf-8"))
    # Those of the architecture and of files are free; the others are keys of a schema or TrainingArguments.
    names = [name for name, _ in document.flat(values) if name.partition(".")[0] not in ("config", "files", "filter")]
    missing = [name for name in names if f"| `{name}` |" not in section]
    free = (".special_tokens.", ".accelerator_config.", ".fsdp_config.")
    assert [name for name in missing if not any(part in name for part in free)] == []


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
def test_describe_says_type_and_range_in_words(schema, words) -> None:
    assert describe_type(schema) == words


@pytest.mark.parametrize(
    ("values", "cell"),
    [
        ({"cpu": 2, "gpu": 2}, "`2`"),
        ({"cpu": 2, "gpu": 8}, "`2`: cpu<br>`8`: gpu"),
        ({"cpu": MISSING, "gpu": True}, "`true`: gpu"),
        ({"cpu": MISSING}, ""),
        ({str(number): number for number in range(5)}, "[each its own](../conf/hardware)"),
    ],
)
def test_in_files_names_the_files_where_their_values_differ(values, cell) -> None:
    assert document.in_files(values, "hardware") == cell


def test_read_gives_the_comment_beside_a_nested_key(tmp_path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("# about\nouter:  # of all\n  inner: '#1'  # of one\nplain: 2\n", encoding="utf-8")
    assert document.read(file) == ({"outer": {"inner": "#1"}, "plain": 2}, {"outer": "of all", "outer.inner": "of one"})
