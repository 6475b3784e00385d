"""Live curves and trackers, which do not change the result of a training."""

import logging
import os
import random
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import read_contents
from transformers import TrainerCallback

from stages.core.errors import StageError
from stages.train import live
from stages.train.fingerprints import compute_run_fingerprint
from stages.train.live import get_live_directory
from stages.train.tracking import format_without_secrets
from stages.train.training import BlockTrainer
from stages.train.watchers import get_run_name, is_running, read_tracker_names

MORE = ["++trainer.save_strategy=steps", "++trainer.save_steps=2", "trainer.logging_steps=2"]
DROPOUT = ["model.config.resid_pdrop=0.1"]


class Killed(BaseException):
    """Exception that ends a run like SIGKILL: nothing is written after it."""


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Cache directory without checkpoints of other tests."""
    monkeypatch.setenv("LM_REPRO_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LM_REPRO_TRACK", raising=False)
    monkeypatch.delenv("DVC_EXP_NAME", raising=False)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "")  # the tracker sets them; restored at the end


@pytest.fixture(scope="module")
def undisturbed(run_toy, tmp_path_factory):
    """Outs of a training without trackers."""
    root = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LM_REPRO_CACHE", str(tmp_path_factory.mktemp("cache")))
        run_toy("train", "causal", root, *MORE, *DROPOUT)
    return read_contents(root)


@pytest.fixture
def at_step(monkeypatch):
    """`at_step(step, act)`: make training call `act` after that step."""

    def set_up(step, act):
        class Act(TrainerCallback):
            def on_step_begin(self, args, state, control, **_):
                if state.global_step == step:
                    act()

        original = BlockTrainer.train

        def train(self, *arguments, **named):
            self.add_callback(Act())
            return original(self, *arguments, **named)

        monkeypatch.setattr(BlockTrainer, "train", train)

    return set_up


def kill():
    raise Killed


def steps(directory, name="train"):
    lines = (directory / f"{name}.tsv").read_text(encoding="utf-8").splitlines()
    return [int(line.split("\t")[0]) for line in lines[1:]]


def test_live_curves_grow_while_training_runs_and_are_gone_after_it(run_toy, undisturbed, at_step, tmp_path):
    seen = []
    directory = get_live_directory(tmp_path / "out/report")
    at_step(11, lambda: seen.append((steps(directory), steps(directory, "validation"), is_running(directory))))
    run_toy("train", "causal", tmp_path / "out", *MORE, *DROPOUT)
    assert seen == [([2, 4, 6, 8, 10], [8], True)]
    assert read_contents(tmp_path / "out") == undisturbed
    assert not directory.exists()


def test_live_curves_of_a_killed_training_stay_and_go_on_after_its_resumption(
    run_toy, undisturbed, at_step, tmp_path, monkeypatch
):
    directory = get_live_directory(tmp_path / "out/report")
    at_step(11, kill)
    with pytest.raises(Killed):
        run_toy("train", "causal", tmp_path / "out", *MORE, *DROPOUT)
    monkeypatch.undo()
    monkeypatch.setenv("LM_REPRO_CACHE", str(tmp_path / "cache"))
    assert sorted(read_contents(tmp_path / "out")) == [".live-report/train.tsv", ".live-report/validation.tsv"]
    seen = []
    at_step(13, lambda: seen.append(steps(directory)))
    run_toy("train", "causal", tmp_path / "out", *MORE, *DROPOUT)
    assert seen == [[2, 4, 6, 8, 10, 12]]  # each only once
    assert read_contents(tmp_path / "out") == undisturbed


def test_live_curves_that_cannot_be_written_end_no_training(
    run_toy, undisturbed, at_step, tmp_path, monkeypatch, caplog
):
    def full(*_):
        raise OSError(28, "No space left on device")

    at_step(5, lambda: monkeypatch.setattr(live, "_format_rows", full))
    run_toy("train", "causal", tmp_path / "out", *MORE, *DROPOUT)
    assert read_contents(tmp_path / "out") == undisturbed
    assert len([record for record in caplog.records if "no live curves" in record.message]) == 1


def test_live_curves_leave_a_file_in_their_place_alone(run_toy, undisturbed, tmp_path):
    (tmp_path / "out").mkdir()
    get_live_directory(tmp_path / "out/report").write_text("mine")
    run_toy("train", "causal", tmp_path / "out", *MORE, *DROPOUT)
    assert read_contents(tmp_path / "out") == {**undisturbed, ".live-report": b"mine"}


def test_directory_without_a_writer_is_of_no_running_training(tmp_path):
    assert not is_running(tmp_path)
    assert not is_running(tmp_path / "gone")


# -- trackers ----------------------------------------------------------------------------------------------------------


class FakeTrackio(types.ModuleType):
    """Fake package `trackio` that records its calls, draws random numbers, and fails from a given call on."""

    __version__ = "0.30.0"

    def __init__(self, fails_at=None):
        super().__init__("trackio")
        self.__spec__ = types.SimpleNamespace(name="trackio")
        self.told, self._fails_at, self.config = [], fails_at, {}
        self.config = type("Config", (dict,), {"update": lambda self, values, **_: dict.update(self, values)})()
        space = types.SimpleNamespace(get=lambda: None)
        self.context_vars = types.SimpleNamespace(current_space_id=space, current_project=space)

    def _note(self, what, values):
        random.random(), np.random.random(), torch.rand(3)
        if what == self._fails_at:
            raise ConnectionError("https://me:hunter22@host/ cannot be reached with 0123456789abcdef")
        self.told.append((what, values))

    def init(self, **values):
        self._note("init", values)

    def log(self, values):
        self._note("log", values)

    def finish(self):
        self._note("finish", None)


@pytest.fixture
def trackio(monkeypatch):
    def install(fails_at=None):
        fake = FakeTrackio(fails_at)
        monkeypatch.setitem(sys.modules, "trackio", fake)
        monkeypatch.setenv("LM_REPRO_TRACK", "trackio")
        monkeypatch.setenv("TRACKIO_DIR", "elsewhere")
        return fake

    return install


def test_training_with_a_tracker_has_the_same_bytes_and_tells_it_the_losses(
    run_toy, undisturbed, trackio, tmp_path, monkeypatch
):
    fake = trackio()
    monkeypatch.setenv("DVC_EXP_NAME", "wide")
    run_toy("train", "causal", tmp_path / "out", *MORE, *DROPOUT)
    assert read_contents(tmp_path / "out") == undisturbed
    (_, started), *logged = fake.told
    assert (started["name"], started["project"]) == ("causal-wide", "lm-repro")
    losses = [values["train/global_step"] for what, values in logged if what == "log" and "train/loss" in values]
    assert losses == [2, 4, 6, 8, 10, 12, 14, 16]
    assert logged[-1] == ("finish", None)


@pytest.mark.parametrize("fails_at", ["init", "log", "finish"])
def test_tracker_that_fails_is_named_once_and_ends_no_training(
    run_toy, undisturbed, trackio, tmp_path, monkeypatch, caplog, fails_at
):
    trackio(fails_at)
    monkeypatch.setenv("TRACKIO_API_KEY", "0123456789abcdef")
    run_toy("train", "causal", tmp_path / "out", *MORE, *DROPOUT)
    assert read_contents(tmp_path / "out") == undisturbed
    (said,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert said == (
        "trackio failed (ConnectionError: https://***@host/ cannot be reached with ***): training continues without it"
    )


def test_tracker_is_in_no_fingerprint(compose_stage, overrides, trackio, tmp_path):
    config = compose_stage("train", *overrides("train", "causal", tmp_path))
    before = compute_run_fingerprint(config)
    trackio()
    assert compute_run_fingerprint(compose_stage("train", *overrides("train", "causal", tmp_path))) == before


def test_checkpoints_hold_nothing_of_a_tracker(run_toy, trackio, at_step, tmp_path):
    found = []
    for place in ("without", "with"):
        os.environ["LM_REPRO_CACHE"] = str(tmp_path / place)
        if place == "with":
            trackio()
        at_step(5, kill)
        with pytest.raises(Killed):
            run_toy("train", "causal", tmp_path / place / "out", *MORE, *DROPOUT)
        (directory,) = (tmp_path / place).rglob("checkpoint-4")
        found.append({name: data for name, data in read_contents(directory).items() if name in COMPARED})
    assert found[0] == found[1] and len(found[0]) == len(COMPARED)


COMPARED = ("model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt")


def test_unknown_tracker_is_an_error_that_lists_those_there_are(monkeypatch):
    monkeypatch.setenv("LM_REPRO_TRACK", "tensorbord")
    with pytest.raises(
        StageError, match="LM_REPRO_TRACK=tensorbord: choose one or more of trackio, tensorboard, wandb, mlflow"
    ):
        read_tracker_names()


def test_tracker_that_is_not_installed_is_an_error_before_training(run_toy, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("LM_REPRO_TRACK", " mlflow ,")
    with pytest.raises(StageError, match="the package mlflow is not installed: run `uv pip install mlflow`"):
        run_toy("train", "causal", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_run_is_named_by_its_task_and_experiment(compose_stage, overrides, tmp_path, monkeypatch):
    config = compose_stage("train", *overrides("train", "mlm", tmp_path))
    assert get_run_name(config) == "mlm"
    monkeypatch.setenv("DVC_EXP_NAME", "silky-cat")
    assert get_run_name(config) == "mlm-silky-cat"


def test_errors_are_shown_without_secrets(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "abcdef0123456789")
    shown = format_without_secrets(ValueError("key abcdef0123456789\nof http://u:p@host"))
    assert shown == "ValueError: key *** of http://***@host"


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_has_the_losses_and_the_outs_their_bytes(run_toy, undisturbed, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("LM_REPRO_TRACK", "tensorboard")
    run_toy("train", "causal", tmp_path / "out", *MORE, *DROPOUT)
    assert read_contents(tmp_path / "out") == undisturbed
    (directory,) = Path(tmp_path / "cache/tracking/tensorboard").iterdir()
    assert directory.name.startswith("causal-")
    events = EventAccumulator(str(directory)).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4, 6, 8, 10, 12, 14, 16]
