"""Tests of tools.plan, which estimates the cost of trainings and evaluations by trials."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from dvc_project import edit_yaml, run_command

from stages.core.compose import compose_config, load_config
from stages.core.errors import StageError
from stages.train.batches import count_steps
from stages.train.stage import TrainConfig
from tools.forecast import Forecast, Verdict
from tools.plan import Amounts, Cost, choose_tasks, count_events, print_table, run_trial

CONFIG = load_config(TrainConfig, compose_config("train", ["batch_size=4", "num_train_epochs=3"], "causal"))


def build_config(epochs: float | None = 3, **trainer: Any) -> TrainConfig:
    return dataclasses.replace(CONFIG, num_train_epochs=epochs, trainer={"logging_steps": 10, **trainer})


@pytest.mark.parametrize(
    ("config", "steps"),
    [
        (build_config(), 627),  # 834 blocks, 209 batches
        (build_config(0.5), 105),
        (build_config(0.001), 1),
        (build_config(None, max_steps=7), 7),
        (build_config(0.5, max_steps=104), 104),
        (build_config(0.5, max_steps=106), 105),
    ],
    ids=["epochs", "half-an-epoch", "a-step", "max_steps", "max_steps-first", "epochs-first"],
)
def test_count_steps_of_834_blocks_equals_the_trainers(config: TrainConfig, steps: int) -> None:
    assert count_steps(config, 834) == steps


@pytest.mark.parametrize(
    ("trainer", "times"),
    [
        ({"eval_strategy": "epoch"}, 3),
        ({"eval_strategy": "steps", "eval_steps": 100}, 6),
        ({"eval_strategy": "steps", "eval_steps": 0.1}, 9),  # every 63 steps
        ({"eval_strategy": "steps"}, 62),  # logging_steps
        ({"eval_strategy": "no"}, 0),
        ({}, 0),
    ],
    ids=str,
)
def test_count_events_follows_the_strategy(trainer: dict[str, Any], times: int) -> None:
    assert count_events(build_config(**trainer), "eval", 627, 834) == times


def build_forecasts(**verdicts: Verdict) -> list[Forecast]:
    """Build forecasts from verdicts by stage name, with _at_ for @; all other stages are unchanged."""
    names = {name.replace("_at_", "@"): verdict for name, verdict in verdicts.items()}
    chain = {"download": [], "tokenize": ["data/download"], "train": ["data/tokenize@"], "score": ["data/train@"]}
    chain |= {"evaluate": ["data/download", "data/train@"]}
    found = [Forecast("code", names.get("code", Verdict.UNCHANGED), [], {}, {}, {}, ["code"])]
    for stage, inputs in chain.items():
        for item in [""] if stage == "download" else ["a", "b"]:
            name = f"{stage}@{item}".removesuffix("@")
            read = {path + item if path.endswith("@") else path: None for path in inputs}
            found.append(Forecast(name, names.get(name, Verdict.UNCHANGED), [], {}, {}, read, [f"data/{name}"]))
    return found


def test_choose_tasks_returns_tasks_that_run_on_unchanged_data() -> None:
    found = build_forecasts(
        code=Verdict.RUNS, tokenize_at_a=Verdict.RUNS, train_at_a=Verdict.MAY_RUN, train_at_b=Verdict.RUNS,
        evaluate_at_b=Verdict.MAY_RUN, score_at_b=Verdict.MAY_RUN, evaluate_at_a=Verdict.MAY_RUN,
    )  # fmt: skip
    assert choose_tasks(found) == ({"b": ["train", "evaluate"]}, {"a": ["tokenize@a"]})


def test_choose_tasks_waits_for_data_and_skips_restored_stages() -> None:
    moved = build_forecasts(download=Verdict.RESTORED, evaluate_at_a=Verdict.RUNS, train_at_b=Verdict.RESTORED)
    assert choose_tasks(moved) == ({}, {"a": ["download"]})
    assert choose_tasks(build_forecasts(train_at_b=Verdict.RESTORED)) == ({}, {})


def test_plan_table_shows_counts_and_totals(capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[tuple[str, Amounts, Cost | None]] = [
        ("train@causal", Amounts(199, 106_785, 834, 627), Cost(100.0, 1_200_000_000, 5_000_000)),
        ("evaluate@causal", Amounts(51, 28_000, 0, 0), Cost(20.0, 900_000_000, 3_000_000)),
    ]
    print_table(rows)
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "@" in line or "together" in line]
    assert lines == [
        ["train@causal", "199", "106,785", "834", "627", "1.2", "GB", "5.0", "MB", "100", "s"],
        ["evaluate@causal", "51", "28,000", "-", "-", "900", "MB", "3.0", "MB", "20", "s"],
        ["together", "1.2", "GB", "8.0", "MB", "120", "s"],
    ]
    print_table([(*rows[0][:2], None)])
    assert "?: not tried" in capsys.readouterr().out


@pytest.mark.parametrize("number", [9, 999_999_999])
def test_plan_table_fits_80_columns_or_is_wider_without_truncation(
    number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    print_table([("evaluate@causal", Amounts(number, number, number, number), Cost(47.0, 1_200_000_000, 43_000_000))])
    shown = capsys.readouterr().out
    assert "…" not in shown and f"{number:,}" in shown
    assert number > 9 or max(map(len, shown.splitlines())) <= 80


def test_trial_failure_shows_the_error_of_the_stage(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"(?s)the trial of train@none failed:.*params\.yaml has no tasks\.none"):
        run_trial("train", "none", tmp_path / "report.json", [])


@pytest.mark.slow
def test_plan_of_a_project_matches_its_ledgers_and_changes_no_file(clean: Path) -> None:
    edit_yaml(clean / "params.yaml", tasks__causal__learning_rate=0.003)
    before = run_command(clean, "git", "status", "--short")
    printed = run_command(clean, "python", "-m", "tools.plan", "evaluate@causal")
    assert run_command(clean, "git", "status", "--short") == before
    assert "evaluate@causal" in printed and "together" in printed
    row = next(line.split() for line in printed.splitlines() if "train@causal" in line and "trying" not in line)
    ledger = json.loads((clean / "reports/train/causal/stats.json").read_text())
    assert row[3:5] == [str(ledger["blocks"]), str(ledger["steps"])]
    output = run_command(clean, "dvc", "repro", "train@causal")
    assert re.search(r"train: planned [\d.]+ \w+ and [\d.]+ \w+ of memory, took [\d.]+ \w+ and [\d.]+ \w+", output)
    assert "would run no training" in run_command(clean, "python", "-m", "tools.plan", "train@causal", check=False)


@pytest.mark.slow
def test_plan_with_outdated_data_names_the_stage_to_run_first(clean: Path) -> None:
    edit_yaml(clean / "params.yaml", block_size=32)
    said = "causal: not planned, because its data are not up to date: run `dvc repro group_texts@causal` first"
    assert said in run_command(clean, "python", "-m", "tools.plan", "train@causal")


@pytest.mark.slow
@pytest.mark.parametrize("trainer", [{"trainer__eval_strategy": "steps"}, {"trainer__save_strategy": "epoch"}], ids=str)
def test_plan_of_a_training_with_checkpoints_or_evaluations_by_steps_succeeds(
    clean: Path, trainer: dict[str, str]
) -> None:
    edit_yaml(clean / "conf/task/causal.yaml", **trainer)
    row = next(
        line.split()
        for line in run_command(clean, "python", "-m", "tools.plan", "train@causal").splitlines()
        if line.startswith(" train@causal")
    )
    assert row[5:10:2] != ["?"] * 3
    assert not list((clean / ".lm-repro_cache/checkpoints").glob("*/"))
