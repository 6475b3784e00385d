"""The pipeline end to end with the real DVC, at the smallest size, in a copy of the repository."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from dvc_project import ALL, TASKS, build_environment, edit_yaml, flatten_revisions, parse_stages_run, run_command


def test_pipeline_second_repro_runs_nothing(clean: Path) -> None:
    assert parse_stages_run(run_command(clean, "dvc", "repro")) == set()
    assert run_command(clean, "git", "status", "--porcelain") == ""


def test_pipeline_check_and_summary_describe_this_run(clean: Path) -> None:
    assert f"{len(ALL)} stages is in order" in run_command(clean, sys.executable, "-m", "tools.check")
    summary = run_command(clean, sys.executable, "-m", "tools.summary")
    figures = json.loads((clean / "reports/evaluate/causal/metrics.json").read_text())["causal"]["test"]
    row = next(line for line in summary.splitlines() if line.strip().startswith("causal"))
    assert row.split()[1:5] == [
        "tiny-gpt2",
        "bits_per_byte",
        *(f"{figures[key]:.3f}" for key in ("base_bits_per_byte", "bits_per_byte")),
    ]
    assert "dvc exp run -S block_size=256" in summary


def test_pipeline_metrics_have_the_same_keys_in_both_splits(clean: Path) -> None:
    for task, own, short in (("causal", "bits_per_byte", "bpb"), ("mlm", "pseudo_bits_per_byte", "pseudo_bpb")):
        splits = json.loads((clean / f"reports/evaluate/{task}/metrics.json").read_text())[task]
        assert list(splits) == ["validation", "test"]
        assert splits["validation"].keys() == splits["test"].keys()
        assert {own, f"{own}_se", f"base_{own}", "documents", "tokens", "bytes"} <= splits["test"].keys()
        headline = json.loads((clean / f"metrics/{task}.json").read_text())
        assert headline == {task: {"val": {short: splits["validation"][own]}, "test": {short: splits["test"][own]}}}


def test_pipeline_experiment_with_another_block_size_runs_six_stages_and_is_compared(
    clean: Path,
) -> None:
    ran = parse_stages_run(run_command(clean, "dvc", "exp", "run", "-n", "wide", "-S", "block_size=128"))
    assert ran == {f"{stage}@{task}" for stage in ("group_texts", "train", "evaluate") for task in TASKS}
    assert parse_stages_run(run_command(clean, "dvc", "repro")) == set()  # the workspace keeps the experiment
    revisions = json.loads(run_command(clean, "dvc", "exp", "show", "--json"))
    rows = {
        row["name"]: row["data"] for row in flatten_revisions(revisions) if row.get("name") or row["rev"] == "workspace"
    }
    assert {"main", "wide"} <= rows.keys()
    sizes = {name: rows[name]["params"]["params.yaml"]["data"]["block_size"] for name in ("main", "wide")}
    assert sizes == {"main": 64, "wide": 128}
    for name in ("main", "wide"):
        metrics = rows[name]["metrics"]["metrics/causal.json"]["data"]["causal"]["test"]
        assert 0 < metrics["bpb"] < 10


@pytest.mark.parametrize(
    "change",
    [
        "tasks.causal.learning_rate=0.01",
        pytest.param("conf/task/causal.yaml:trainer.weight_decay=0.1", marks=pytest.mark.slow),
        pytest.param("conf/task/causal.yaml:+trainer.warmup_ratio=0.1", marks=pytest.mark.slow),
    ],
)
def test_pipeline_training_value_of_one_task_trains_and_evaluates_only_that_task(clean: Path, change: str) -> None:
    assert parse_stages_run(run_command(clean, "dvc", "exp", "run", "-S", change)) == {
        "train@causal",
        "evaluate@causal",
    }


def test_pipeline_unknown_trainer_key_is_an_error_naming_the_nearest(clean: Path) -> None:
    output = run_command(
        clean, "dvc", "exp", "run", "-S", "conf/task/causal.yaml:+trainer.weight_dekay=0.1", check=False
    )
    assert "did you mean weight_decay?" in output
    assert "Traceback" not in output


@pytest.mark.slow
def test_pipeline_key_that_training_does_not_use_trains_nothing(clean: Path) -> None:
    edit_yaml(clean / "conf/task/mlm.yaml", samples__top_k=3)
    assert parse_stages_run(run_command(clean, "dvc", "repro")) == {"baseline@mlm", "evaluate@mlm"}


def test_pipeline_unreachable_hub_is_reported_with_the_remedies(clean: Path, tmp_path: Path) -> None:
    edit_yaml(clean / "params.yaml", tasks__causal__model="distilgpt2")
    output = run_command(clean, "env", f"HF_HOME={tmp_path}", "dvc", "repro", "tokenize@causal", check=False)
    for part in ("distilbert/distilgpt2", "cannot be reached", "tools.pin_model", "HF_HOME"):
        assert part in output
    assert not (clean / "data/tokens/causal").exists()


def flip_bit(file: Path) -> None:
    """Flip a bit in the middle of `file`."""
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.chmod(0o644)
    file.write_bytes(raw)


def test_pipeline_damaged_artifacts_are_restored_before_use(clean: Path) -> None:
    names = [
        "data/raw/train.parquet",
        "data/tokens/causal/train/shard-00000.arrow",
        "data/tokens/causal/stats.json",
        "data/tokens/causal/tokenizer/tokenizer.json",
        "data/blocks/mlm/train/shard-00000.arrow",
        "models/causal/model.safetensors",
    ]
    good = {name: (clean / name).read_bytes() for name in names}
    for name in names:
        flip_bit(clean / name)
    assert parse_stages_run(run_command(clean, "dvc", "repro")) == set()  # restored from the run cache
    assert {name: (clean / name).read_bytes() for name in names} == good
    assert run_command(clean, "git", "status", "--porcelain") == ""


def test_pipeline_tokens_damaged_with_unchanged_time_are_named_by_their_reader(clean: Path) -> None:
    """DVC does not read a file with an unchanged time and size, but the reader verifies the checksum."""
    shard = clean / "data/tokens/causal/train/shard-00000.arrow"
    times = (shard.stat().st_atime_ns, shard.stat().st_mtime_ns)
    good = shard.read_bytes()
    flip_bit(shard)
    os.utime(shard, ns=times)
    output = run_command(clean, "dvc", "exp", "run", "-S", "block_size=32", check=False)
    shard.write_bytes(good)  # DVC would not restore it, because it sees no change
    os.utime(shard, ns=times)
    assert "train/shard-00000.arrow is damaged (its checksum does not match)" in output
    assert not (clean / "data/blocks/causal").exists()


@pytest.mark.slow
def test_pipeline_edited_text_runs_all_stages(clean: Path, tmp_path: Path) -> None:
    text = tmp_path / "my questions.jsonl"
    lines = (clean / "data/sample/askscience.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    text.write_text("".join(lines[:70]), encoding="utf-8")
    own = ("-S", "data.name=files", "-S", f"data.path={text}")
    assert parse_stages_run(run_command(clean, "dvc", "exp", "run", *own)) == ALL - {"code"}
    text.write_text("".join(lines[:72]), encoding="utf-8")
    assert parse_stages_run(run_command(clean, "dvc", "repro")) == ALL - {"code"}


@pytest.mark.slow
def test_pipeline_stage_ends_when_its_dvc_is_killed(clean: Path) -> None:
    edit_yaml(clean / "params.yaml", tasks__causal__num_train_epochs=500)
    dvc = subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro", "train@causal"],
        cwd=clean,
        env=build_environment(clean),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert dvc.stdout is not None
    for line in dvc.stdout:
        if "blocks of 64 tokens" in line:
            break
    stage = [
        process for process in psutil.Process(dvc.pid).children(recursive=True) if "stages.train" in process.cmdline()
    ]
    assert stage
    dvc.kill()
    _, alive = psutil.wait_procs(stage, timeout=30)
    assert not alive
    dvc.stdout.close()
    dvc.wait()


@pytest.mark.slow
def test_pipeline_environment_variables_of_accelerate_change_no_weights(clean: Path) -> None:
    before = (clean / "models/causal/model.safetensors").read_bytes()
    output = run_command(
        clean, "env", "ACCELERATE_MIXED_PRECISION=bf16", "dvc", "repro", "--force", "--single-item", "train@causal"
    )
    assert "ACCELERATE_MIXED_PRECISION is ignored" in output
    assert (clean / "models/causal/model.safetensors").read_bytes() == before
