"""Stored plan of a training, for its log."""

import logging
from pathlib import Path

import pytest

from stages.train.plan import Plan, format_bytes, format_seconds, log_against_plan, measure_peak_bytes, write_plan


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LM_REPRO_CACHE", str(tmp_path))
    return tmp_path


def test_log_of_a_planned_training_has_the_plan_and_what_it_took(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    write_plan("one", Plan(seconds=720.0, peak_bytes=1_500_000_000))
    log_against_plan("one")
    (message,) = caplog.messages
    assert message.startswith("planned 12 min and 1.5 GB of memory, took ")


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"seconds": "long"}', "\x00"])
def test_log_of_a_training_without_a_sound_plan_says_nothing(
    cache: Path, content: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    if content is not None:
        (cache / "plans").mkdir()
        (cache / "plans/one.json").write_text(content)
    log_against_plan("one")
    assert caplog.messages == []


def test_peak_of_this_process_counts_what_it_allocates() -> None:
    before = measure_peak_bytes()
    held = bytearray(before)  # zeros, so not all of its pages are touched
    held[::4096] = b"x" * len(held[::4096])
    assert before + 0.5 * len(held) < measure_peak_bytes() < 10 * before


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (47.4, "47 s"), (299.4, "299 s"), (300, "5 min"), (12_000, "3 h 20 min")],
)
def test_seconds_are_shown_to_two_or_three_digits(seconds: float, shown: str) -> None:
    assert format_seconds(seconds) == shown


@pytest.mark.parametrize(
    ("size", "shown"), [(40, "0.0 kB"), (940_000, "940 kB"), (1_440_000, "1.4 MB"), (2.5e10, "25 GB"), (3e12, "3.0 TB")]
)
def test_bytes_are_shown_to_two_or_three_digits(size: float, shown: str) -> None:
    assert format_bytes(size) == shown
