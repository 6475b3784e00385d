"""tools.plan: what trainings and evaluations would take, by a trial of each."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from dvc_project import edit, run

from stages.core.compose import compose, load
from stages.core.errors import StageError
from stages.train.stage import TrainConfig
from tools.forecast import Forecast, Verdict
from tools.plan import Amounts, Cost, count_steps, count_times, run_trial, show, tasks_to_plan

CONFIG = load(TrainConfig, compose("train", ["batch_size=4", "num_train_epochs=3"], "causal"))


def training(epochs: float | None = 3, **trainer: Any) -> TrainConfig:
    return dataclasses.replace(CONFIG, num_train_epochs=epochs, trainer={"logging_steps": 10, **trainer})


@pytest.mark.parametrize(
    ("config", "steps"),
    [
        (training(), 627),  # 834 blocks, 209 batches
        (training(0.5), 105),
        (training(0.001), 1),
        (training(None, max_steps=7), 7),
    ],
    ids=["epochs", "half-an-epoch", "a-step", "max_steps"],
)
def test_steps_are_those_that_the_trainer_makes_of_834_blocks(config: TrainConfig, steps: int) -> None:
    assert count_steps(config, 834) == steps


@pytest.mark.parametrize(
    ("trainer", "times"),
    [
        ({"eval_strategy": "epoch"}, 3),
        ({"eval_strategy": "steps", "eval_steps": 100}, 6),
        ({"eval_strategy": "steps", "eval_steps": 0.1}, 9),  # each 63 steps
        ({"eval_strategy": "steps"}, 62),  # logging_steps
        ({"eval_strategy": "no"}, 0),
        ({}, 0),
    ],
    ids=str,
)
def test_evaluations_are_as_often_as_the_strategy_says(trainer: dict[str, Any], times: int) -> None:
    assert count_times(training(**trainer), "eval", 627, 834) == times


def forecast(**verdicts: Verdict) -> list[Forecast]:
    """Of stages whose names have _at_ for @; the others do not run."""
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


def test_tasks_to_plan_are_those_with_something_that_runs_on_data_that_stay() -> None:
    found = forecast(
        code=Verdict.RUNS, tokenize_at_a=Verdict.RUNS, train_at_a=Verdict.MAY_RUN, train_at_b=Verdict.RUNS,
        evaluate_at_b=Verdict.MAY_RUN, score_at_b=Verdict.MAY_RUN, evaluate_at_a=Verdict.MAY_RUN,
    )  # fmt: skip
    assert tasks_to_plan(found) == ({"b": ["train", "evaluate"]}, {"a": ["tokenize@a"]})


def test_tasks_to_plan_wait_for_the_download_and_leave_out_what_is_restored() -> None:
    moved = forecast(download=Verdict.RESTORED, evaluate_at_a=Verdict.RUNS, train_at_b=Verdict.RESTORED)
    assert tasks_to_plan(moved) == ({}, {"a": ["download"]})
    assert tasks_to_plan(forecast(train_at_b=Verdict.RESTORED)) == ({}, {})


def test_plan_shows_counts_and_what_the_stages_take_together(capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[tuple[str, Amounts, Cost | None]] = [
        ("train@causal", Amounts(199, 106_785, 834, 627), Cost(100.0, 1_200_000_000, 5_000_000)),
        ("evaluate@causal", Amounts(51, 28_000, 0, 0), Cost(20.0, 900_000_000, 3_000_000)),
    ]
    show(rows)
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "@" in line or "together" in line]
    assert lines == [
        ["train@causal", "199", "106,785", "834", "627", "1.2", "GB", "5.0", "MB", "100", "s"],
        ["evaluate@causal", "51", "28,000", "-", "-", "900", "MB", "3.0", "MB", "20", "s"],
        ["together", "1.2", "GB", "8.0", "MB", "120", "s"],
    ]
    show([(*rows[0][:2], None)])
    assert "?: not tried" in capsys.readouterr().out


@pytest.mark.parametrize("number", [9, 999_999_999])
def test_plan_fits_80_columns_or_is_wider_but_never_cut(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    show([("evaluate@causal", Amounts(number, number, number, number), Cost(47.0, 1_200_000_000, 43_000_000))])
    shown = capsys.readouterr().out
    assert "…" not in shown and f"{number:,}" in shown
    assert number > 9 or max(map(len, shown.splitlines())) <= 80


def test_trial_that_fails_says_why_in_the_words_of_the_stage(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"(?s)the trial of train@none failed:.*params\.yaml has no tasks\.none"):
        run_trial("train", "none", tmp_path / "report.json", [])


@pytest.mark.slow
def test_plan_of_a_project_counts_as_its_ledgers_do_and_changes_nothing(clean: Path) -> None:
    edit(clean / "params.yaml", tasks__causal__learning_rate=0.003)
    before = run(clean, "git", "status", "--short")
    printed = run(clean, "python", "-m", "tools.plan", "evaluate@causal")
    assert run(clean, "git", "status", "--short") == before
    assert "evaluate@causal" in printed and "together" in printed
    row = next(line.split() for line in printed.splitlines() if "train@causal" in line and "trying" not in line)
    ledger = json.loads((clean / "reports/train/causal/stats.json").read_text())
    assert row[3:5] == [str(ledger["blocks"]), str(ledger["steps"])]
    output = run(clean, "dvc", "repro", "train@causal")
    assert re.search(r"train: planned [\d.]+ \w+ and [\d.]+ \w+ of memory, took [\d.]+ \w+ and [\d.]+ \w+", output)
    assert "would run no training" in run(clean, "python", "-m", "tools.plan", "train@causal", check=False)


@pytest.mark.slow
def test_plan_of_data_that_are_not_up_to_date_says_what_to_run_first(clean: Path) -> None:
    edit(clean / "params.yaml", block_size=32)
    said = "causal: not planned, since its data are not up to date: run `dvc repro group_texts@causal` first"
    assert said in run(clean, "python", "-m", "tools.plan", "train@causal")


@pytest.mark.slow
@pytest.mark.parametrize("trainer", [{"trainer__eval_strategy": "steps"}, {"trainer__save_strategy": "epoch"}], ids=str)
def test_plan_of_a_training_with_checkpoints_or_evaluations_by_steps_is_made(
    clean: Path, trainer: dict[str, str]
) -> None:
    edit(clean / "conf/task/causal.yaml", **trainer)
    row = next(
        line.split()
        for line in run(clean, "python", "-m", "tools.plan", "train@causal").splitlines()
        if line.startswith(" train@causal")
    )
    assert row[5:10:2] != ["?"] * 3
    assert not list((clean / ".lm-repro_cache/checkpoints").glob("*/"))
