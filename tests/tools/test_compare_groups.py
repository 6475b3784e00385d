"""Tests of `make compare BY=GROUP`: one column per value of a group, as many as fit, and the rest below."""

import io
import json
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from rich.console import Console

from tools import compare_groups
from tools.outs import Outs


def make_figures(bits: float, num_bytes: int) -> dict[str, Any]:
    return {"bits_per_byte": bits, "base_bits_per_byte": 4.0, "documents": 2, "bytes": num_bytes}


def make_experiment(name: str, bits: float, values: dict[str, float], **more: Any) -> dict[str, Any]:
    """Return a row of `dvc exp show --json`, and as `report` the text of its reports/evaluate/causal/metrics.json."""
    splits = {}
    for split, add in (("validation", 0.0), ("test", 1.0)):
        by_value = {
            value: make_figures(found + add, 1000 - number) for number, (value, found) in enumerate(values.items())
        }
        groups = {"source": {"toy": make_figures(bits + add, 1000)}, "topic": by_value}
        splits[split] = {"bits_per_byte": bits + add, "bytes": 1000, "groups": groups}
    short = {"val": {"bpb": bits}, "test": {"bpb": bits + 1}}
    metrics = {"metrics/causal.json": {"data": {"causal": short}}}
    params = {"params.yaml": {"data": {"seed": name}}}
    rev = "workspace" if name == "workspace" else name * 40
    report = json.dumps({"causal": splits})
    return {"rev": rev, "name": name, "data": {"params": params, "metrics": metrics}, "report": report, **more}


def render_comparison(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *found: dict[str, Any],
    group: str = "topic",
    split: str = "val",
    width: int = 80,
) -> str:
    class Reports(Outs):
        def read_texts(self, rev: str, paths: Sequence[str]) -> Iterator[str | None]:
            (row,) = (row for row in found if row["rev"] == rev)
            assert paths == ["reports/evaluate/causal/metrics.json"]
            yield row["report"]

    monkeypatch.setattr(compare_groups, "Outs", Reports)
    console = Console(width=width, highlight=False, file=io.StringIO())
    compare_groups.compare_groups(list(found), group, split, console)
    return capsys.readouterr().out


TWO_EXPERIMENTS = (
    make_experiment("a", 2.5, {"why": 2.25, "how": 3.0}),
    make_experiment("b", 2.0, {"why": 2.5, "how": 2.75, "if": 1.5}),
)


def test_compare_by_group_has_one_column_per_value_and_marks_the_best(monkeypatch, capsys) -> None:
    text = render_comparison(monkeypatch, capsys, *TWO_EXPERIMENTS)
    lines = [line.split() for line in text.splitlines() if line.strip()]
    assert lines[0] == ["causal:", "bits_per_byte", "by", "topic", "(val)"]
    assert lines[1] == ["experiment", "why", "how", "if"]
    assert lines[3] == ["a", "2.2500*", "3.0000", "-"]
    assert lines[4] == ["b", "2.5000", "2.7500*", "1.5000*"]


def test_compare_by_group_split_test_shows_metrics_of_test(monkeypatch, capsys) -> None:
    text = render_comparison(monkeypatch, capsys, *TWO_EXPERIMENTS, split="test")
    assert "by topic (test)" in text and "3.2500*" in text and "2.2500" not in text


@pytest.mark.parametrize("number", [12, 100])
def test_compare_by_group_too_many_values_lists_the_rest_below(monkeypatch, capsys, number: int) -> None:
    values = {f"value{index:03}": 2.0 + index / 8 for index in range(number)}
    text = render_comparison(
        monkeypatch, capsys, make_experiment("a", 2.5, values), make_experiment("b", 2.5, values | {"value000": 9.0})
    )
    table, _, below = text.partition("Other values, most text first:\n")
    assert max(map(len, table.splitlines())) <= 80
    in_table = sum(f"value{index:03}" in table for index in range(number))
    lines = below.strip().splitlines()
    assert in_table > 3 and in_table + len(lines) == number
    shown = f"{2.0 + in_table / 8:.4f}*"
    assert lines[0].split() == [f"value{in_table:03}", "a", f"{shown},", "b", shown]


def test_compare_by_group_in_narrow_terminal_shows_one_value_uncut(monkeypatch, capsys) -> None:
    text = render_comparison(monkeypatch, capsys, *TWO_EXPERIMENTS, width=10)
    assert "…" not in text and "2.2500*" in text and "how  a 3.0000, b 2.7500*" in text


def test_compare_by_group_hostile_values_are_shown_without_control_characters(monkeypatch, capsys) -> None:
    hostile = "\x1b[2J[red]x[/red]\n" * 3 + "y" * 300
    text = render_comparison(monkeypatch, capsys, make_experiment("a", 2.5, {hostile: 1.0, "how": 2.0}))
    assert "\x1b" not in text and "[red]x" in text.replace("\n", "").replace(" ", "")
    assert max(map(len, text.splitlines())) <= 80


def test_compare_by_unknown_group_lists_known_groups(monkeypatch, capsys) -> None:
    with pytest.raises(SystemExit, match=r"--by nope: no experiment has .* there are source, topic"):
        render_comparison(monkeypatch, capsys, *TWO_EXPERIMENTS, group="nope")


def test_compare_by_group_names_experiments_without_cached_metrics(monkeypatch, capsys) -> None:
    lost = make_experiment("c", 1.5, {"why": 1.0}) | {"report": None}
    stale = make_experiment("d", 1.25, {"why": 1.0}) | {"report": TWO_EXPERIMENTS[0]["report"]}
    text = render_comparison(monkeypatch, capsys, *TWO_EXPERIMENTS, lost, stale)
    assert "Not shown because no metrics by group were found in the cache: c, d" in text
    with pytest.raises(SystemExit, match="no metrics by group: run `make`, or `dvc pull`"):
        render_comparison(monkeypatch, capsys, lost)


def test_compare_by_group_experiments_without_results_are_left_out(monkeypatch, capsys) -> None:
    queued = make_experiment("c", 1.5, {"why": 1.0}, executor={"state": "queued"})
    same = TWO_EXPERIMENTS[0] | {"rev": "workspace", "name": None}
    text = render_comparison(monkeypatch, capsys, same, *TWO_EXPERIMENTS, queued)
    assert [line.split()[0] for line in text.splitlines() if "2.2500" in line or "2.5000" in line] == ["a", "b"]
