"""External text in messages: one short line without control characters."""

import pytest
from tokenizers import Tokenizer

from stages.core.errors import StageError, escape_controls, is_error, printable, printable_lines
from stages.shell.app import format_error


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("plain text, äöü, 日本", "plain text, äöü, 日本"),
        ("red \x1b[31m", r"red \x1b[31m"),
        ("two\nlines\r\n", r"two\nlines\r\n"),
        ("bell\x07 del\x7f c1\x9b", r"bell\x07 del\x7f c1\x9b"),
        ("right-to-left \u202eevil", r"right-to-left \u202eevil"),
        ("half \ud800", r"half \ud800"),
        ("line\u2028separator", r"line\u2028separator"),
        (["a list"], "['a list']"),
    ],
)
def test_printable_escapes_what_a_terminal_would_obey(value, shown) -> None:
    assert printable(value) == shown


def test_printable_shortens_and_says_how_long_it_was() -> None:
    assert printable("x" * 201) == "x" * 200 + "... (201 characters)"
    assert printable("x" * 200) == "x" * 200
    assert printable("abcdef", 2) == "ab... (6 characters)"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("two\n\tlines, \xa0 日本 👩‍🔬", "two\n\tlines, \xa0 日本 👩‍🔬"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("over\rwritten \x9b2J \x7f", r"over\rwritten \x9b2J \x7f"),
        ("\u202eevil\u2066 \u2028", r"\u202eevil\u2066 \u2028"),
    ],
)
def test_without_controls_keeps_text_and_its_lines(text, shown) -> None:
    assert escape_controls(text) == shown


def test_printable_lines_keeps_lines_apart_and_guards_each() -> None:
    assert printable_lines("one\n  two\x1b") == "one\n  two\\x1b"
    assert len(printable_lines("y" * 9_000_000 + "\nz")) < 2100


PANICS = """{"version": "1.0", "added_tokens": [],
 "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
 "model": {"type": "BPE", "vocab": {}, "merges": []}}"""


def test_is_error_of_a_panic_of_rust_code_though_it_is_no_exception() -> None:
    with pytest.raises(BaseException, match="charsmap") as caught:
        Tokenizer.from_str(PANICS)
    assert not isinstance(caught.value, Exception)
    assert is_error(caught.value)
    assert format_error(caught.value).startswith("PanicException: Precompiled")


@pytest.mark.parametrize(
    ("error", "expected"),
    [(StageError("x"), True), (RecursionError(), True), (KeyboardInterrupt(), False), (SystemExit(), False),
     (GeneratorExit(), False)],
)  # fmt: skip
def test_is_error_of_what_ends_a_process_is_false(error: BaseException, expected: bool) -> None:
    assert is_error(error) == expected
