"""Tests of benchmarks/gpu.py on a CPU: its arithmetic, a failing part, and every part at toy size without DVC."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu
from benchmarks.gpu import Session, compute_training_flops_per_token, get_peak_flops, run_parts

GPT2_124M = {
    "parameters": 124_439_808,
    "embedding_parameters": 50257 * 768 + 1024 * 768,
    "word_embedding_parameters": 50257 * 768,
    "layers": 12,
    "width": 768,
}
# Modules that the benchmark must not need.
HIDDEN_MODULES = ("dvc", "dvclive", "fastokens")


def test_training_flops_of_gpt2_are_those_computed_by_hand() -> None:
    by_hand = 6 * (124_439_808 - 786_432) + 12 * 12 * 768 * 1024
    assert by_hand == 855_166_464
    assert compute_training_flops_per_token(GPT2_124M, 1024, 1.0) == by_hand


def test_training_flops_count_the_output_embedding_for_predicted_positions_only() -> None:
    difference = compute_training_flops_per_token(GPT2_124M, 512, 1.0) - compute_training_flops_per_token(
        GPT2_124M, 512, 0.15
    )
    assert difference == pytest.approx(6 * 0.85 * 50257 * 768)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", None),
        ("cpu", None),
    ],
)
def test_peak_flops_of_a_card_are_known_or_none(name: str, peak: float | None) -> None:
    assert get_peak_flops(name) == peak


def test_part_that_fails_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(session: Session) -> dict[str, Any]:
        raise ValueError("no such kernel")

    monkeypatch.setattr(gpu, "PARTS", {"first": (fail, 60.0), "second": (lambda session: {"rate": 1}, 60.0)})
    session = Session("cpu", True, tmp_path)
    run_parts(["first", "second"], session)
    assert session.results == {"first": {"error": "ValueError: no such kernel"}, "second": {"rate": 1}}


def test_part_for_which_no_time_is_left_is_skipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "TOTAL_SECONDS", gpu.MIN_PART_SECONDS / 2)
    session = Session("cpu", True, tmp_path)
    run_parts(["fsdp"], session)
    assert list(session.results["fsdp"]) == ["skipped"]


def test_process_that_takes_too_long_is_an_error_of_its_part(tmp_path: Path) -> None:
    found = gpu.capture_outcome(gpu.run_child, Session("cpu", True, tmp_path, deadline=0.0), "http.server", "0")
    assert found == {"error": "ChildError: not done in the time of this part"}


@pytest.fixture
def toy_runner(tmp_path: Path) -> Any:
    """Function that runs parts of the benchmark, without access to HIDDEN_MODULES, and returns the report."""

    def run(*parts: str) -> dict[str, Any]:
        hidden = "import sys\n" + "".join(f"sys.modules[{name!r}] = None\n" for name in HIDDEN_MODULES)
        (tmp_path / "sitecustomize.py").write_text(hidden, encoding="utf-8")
        command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--toy", "--parts", *parts]
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        output = subprocess.run(command, cwd=gpu.ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True)
        report: dict[str, Any] = json.loads(output.stdout.splitlines()[-1])
        return report

    return run


def test_evaluation_on_the_same_device_is_equal(toy_runner: Any) -> None:
    report = toy_runner("evaluation")
    assert report["evaluation"]["equal"] and report["evaluation"]["relative_difference"] == 0.0
    assert 3.0 < report["evaluation"]["cpu"]["loss"] < math.log(4096)  # a fresh model of tiny-gpt2's vocabulary


@pytest.mark.slow
def test_killed_run_resumes_to_the_same_bytes(toy_runner: Any) -> None:
    found = toy_runner("resume")["resume"]
    assert found["resumed_from_step"] == gpu.CHECKPOINT_STEPS
    assert found["identical"] and found["uninterrupted_runs_identical"]


@pytest.mark.slow
def test_one_process_of_several_trains(toy_runner: Any) -> None:
    found = toy_runner("fsdp")["fsdp"]
    assert found["sharded"] is False and found["loss_after"] < found["loss_before"]


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["gpt2", "distilroberta"])
def test_training_and_loader_report_rates(toy_runner: Any, shape: str) -> None:
    report = toy_runner(shape, "loader")
    sides = [report[shape][side] for side in ("ours", "ours_compiled", "guide", "guide_bf16")]
    for side in sides:
        assert side["tokens_per_second"] > 0 and side["peak_bytes"] > 2**20 and side["mfu"] is None
    assert report[shape]["ours_over_guide"] > 0
    assert report["loader"][shape]["over_training"] > 1
