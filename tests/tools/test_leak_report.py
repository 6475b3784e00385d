"""Tests of the leak report: its limits, its file and its section in the card."""

from pathlib import Path
from typing import Any

import pytest
from leak_cases import SECRET, make_limits, make_report

from stages.core.artifacts import write_json
from stages.core.errors import StageError
from tools.leaks.report import (
    explain_refusal,
    find_excesses,
    get_examined_hashes,
    get_report_path,
    hash_canaries,
    list_figures,
    list_notes,
    read_report,
    render_memorization_section,
)

STAGES = {
    "download": {"outs": [{"path": "data/raw", "md5": "r.dir"}]},
    "evaluate@causal": {
        "deps": [{"path": "models/causal", "md5": "m.dir"}, {"path": "data/tokens/causal", "md5": "t.dir"}],
        "outs": [{"path": "reports/evaluate/causal", "md5": "e.dir"}],
    },
}


@pytest.mark.parametrize(
    ("figures", "keys"),
    [
        ({"share": 0.01, "auc": 0.95, "exposure": 10.0}, []),
        ({"share": 0.02}, ["max_verbatim_share"]),
        ({"auc": 0.96}, ["max_membership_auc"]),
        ({"exposure": 10.1}, ["max_exposure"]),
        ({"share": 1.0, "auc": 1.0, "exposure": 12.0}, ["max_verbatim_share", "max_membership_auc", "max_exposure"]),
        ({"auc": 1.0, "membership": []}, []),
        ({"share": 1.0, "continuation": None}, []),
    ],
)
def test_find_excesses_returns_figures_above_their_limits(figures: dict[str, Any], keys: list[str]) -> None:
    assert [item.key for item in find_excesses(make_report(**figures), make_limits())] == keys


def test_find_excesses_ignores_limits_that_are_null() -> None:
    limits = make_limits(max_verbatim_share=None, max_membership_auc=None, max_exposure=None)
    assert find_excesses(make_report(1.0, 1.0, 12.0), limits) == [] and not limits.has_limits


def test_explain_refusal_names_key_value_limit_and_remedy() -> None:
    text = explain_refusal(make_report(share=0.3), make_limits())
    assert "max_verbatim_share: 0.3 is above 0.01" in text and "causal.leaks" in text and "raise the limit" in text
    assert len(text.splitlines()) == 2


NOT_IN_TRAIN = {"alternatives": 4095, "canaries": [], "highest": None}


@pytest.mark.parametrize(
    ("missing", "key", "reason"),
    [
        ({"continuation": {"train": None, "held_out": None}}, "max_verbatim_share", "no document of train has 16"),
        ({"membership": []}, "max_membership_auc", "train or the held-out splits have no document of 16"),
        ({"membership": None}, "max_membership_auc", "the weights before all training are unknown"),
        ({"exposure": NOT_IN_TRAIN}, "max_exposure", "none of the canaries is in a document of train"),
    ],
)
def test_explain_refusal_of_an_unmeasured_figure_with_a_limit_says_why_and_how_to_go_on(
    missing: dict[str, Any], key: str, reason: str
) -> None:
    report = make_report() | missing
    text = explain_refusal(report, make_limits())
    assert f"(causal.leaks): {key}: {reason}" in text and f"set {key}: null" in text and len(text.splitlines()) == 2
    assert explain_refusal(report, make_limits(**{key: None})) == ""
    assert list(list_notes(report))  # also without the figure


@pytest.mark.parametrize("missing", [{}, {"continuation": None}, {"exposure": None}])
def test_explain_refusal_allows_figures_that_do_not_apply(missing: dict[str, Any]) -> None:
    assert explain_refusal(make_report() | missing, make_limits()) == ""


def test_explain_refusal_lists_figures_above_limits_and_unmeasured_ones() -> None:
    text = explain_refusal(make_report(share=0.3, membership=[]), make_limits())
    assert "max_verbatim_share: 0.3 is above" in text and "set max_membership_auc: null" in text


def test_report_of_the_current_model_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_json(get_report_path("causal"), make_report(examined=get_examined_hashes(STAGES, "causal")))
    report, reason = read_report("causal", STAGES, make_limits())
    assert report is not None and reason == ""


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "does not exist"),
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ({"definitions": 0}, "another version"),
        ({"examined": {"models/causal": "x"}}, "another model or other data"),
        ({"canaries_sha256": "sha256:x"}, "other canaries"),
        ({"documents": 1}, "--documents 1, below 200"),
    ],
)
def test_report_that_is_missing_damaged_or_stale_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Any, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    file = get_report_path("causal")
    if isinstance(content, dict):
        write_json(file, make_report(examined=get_examined_hashes(STAGES, "causal")) | content)
    elif content is not None:
        file.parent.mkdir(parents=True)
        file.write_text(content)
    report, found = read_report("causal", STAGES, make_limits())
    assert report is None and reason in found


def test_report_is_stale_after_a_change_of_the_canaries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    limits = make_limits(canaries="canaries.jsonl")
    Path("canaries.jsonl").write_text('{"canary": "code 123456"}')
    examined = get_examined_hashes(STAGES, "causal")
    write_json(get_report_path("causal"), make_report(examined=examined, canaries_sha256=hash_canaries(limits)))
    assert read_report("causal", STAGES, limits)[0] is not None
    Path("canaries.jsonl").write_text('{"canary": "code 654321"}')
    assert read_report("causal", STAGES, limits)[0] is None
    Path("canaries.jsonl").unlink()
    with pytest.raises(StageError, match=r"leaks\.canaries=canaries\.jsonl"):
        read_report("causal", STAGES, limits)


def test_card_section_has_figures_and_limits_but_no_training_text() -> None:
    text = render_memorization_section(make_report(share=0.3, exposure=11.5), make_limits())
    assert "| near-verbatim continuations | 30.0% | 0.0% to 100.0% | 0.0% | 1.0% (exceeded) |" in text
    assert "| membership AUC, 32 tokens | 0.500 | 0.000 to 1.000 | 0.5 | 0.950 |" in text
    assert "| membership AUC, 128 tokens | 1.000 | 0.000 to 1.000 | 0.5 |  |" in text
    assert "| TPR at 1 % FPR, 32 tokens | 10.0% |  | 2.0% |  |" in text and "about 2.0% would be" in text
    assert "| highest exposure of a canary (bits) | 11.5 |  |  | 10.0 (exceeded) |" in text
    assert SECRET not in text and "123456" not in text


def test_card_section_without_limits_says_that_nothing_was_examined() -> None:
    assert render_memorization_section(None, make_limits()).startswith("Not examined")


def test_report_without_measures_says_why() -> None:
    report = make_report(continuation=None, membership=[])
    notes = " ".join(list_notes(report))
    assert (
        "masked model" in notes
        and "Membership was not measured: train or" in notes
        and "No canaries are planted" in notes
    )
    assert list(list_figures(report, make_limits())) == [] and "| measure" not in render_memorization_section(
        report, make_limits()
    )
