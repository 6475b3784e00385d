"""A run that continues from a kept checkpoint of another run ends with the same bytes as a run of its own."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_helpers import REPOSITORY, read_contents
from dvc_project import mark_rest_slow
from training_cases import BEST, RUINED
from transformers import TrainerCallback, TrainingArguments

from stages.core.errors import ConfigError
from stages.train.branches import compute_learning_rates
from stages.train.training import BlockTrainer

STEPS = 8  # of an epoch
KEEP = "checkpoints.keep_for_branches={{every_steps: {}, gigabytes: {}, directory: null}}"
CONSTANT = ["++trainer.lr_scheduler_type=constant_with_warmup", "++trainer.warmup_steps=3", "trainer.logging_steps=3"]
DROPOUT = ["model.config.resid_pdrop=0.1", "model.config.embd_pdrop=0.1"]
STABLE = ["++trainer.lr_scheduler_type=warmup_stable_decay", "++trainer.warmup_steps=2", "trainer.logging_steps=3"]


def decay(steps, kind="linear"):
    """Return a schedule whose last peak is the first of the last `steps` of 16 steps."""
    return [*STABLE, f"++trainer.lr_scheduler_kwargs={{num_decay_steps: {steps}, decay_type: {kind}}}"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LM_REPRO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def fresh(run_toy, tmp_path_factory):
    """`fresh(task, *more)`: outs of a run that neither uses nor keeps checkpoints of other runs."""
    known = {}

    def outs(task, *more):
        if (task, more) not in known:
            root = tmp_path_factory.mktemp("fresh")
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("LM_REPRO_CACHE", str(root / "cache"))
                run_toy("train", task, root / "outs", *more)
            known[task, more] = read_contents(root / "outs")
        return known[task, more]

    return outs


@pytest.fixture
def train_branch(run_toy, tmp_path, caplog):
    """`train_branch(task, *more, every="null", gigabytes=1)`: train and keep checkpoints.

    Returns the outs and the number of shared steps.
    """
    numbers = iter(range(1000))

    def train(task, *more, every="null", gigabytes=1):
        root = tmp_path / f"run-{next(numbers)}"
        caplog.clear()
        with caplog.at_level(logging.INFO):
            run_toy("train", task, root, *more, KEEP.format(every, gigabytes))
        shared = [record.args[0] for record in caplog.records if "taken from a kept checkpoint" in record.msg]
        return read_contents(root), sum(shared)

    return train


def list_kept(cache):
    return sorted(int(path.name.split("-")[1]) for path in (cache / "branches").iterdir() if path.is_dir())


@pytest.mark.parametrize("task", mark_rest_slow(["causal", "mlm"], 1))
def test_more_epochs_at_a_constant_rate_continue_and_end_with_the_same_bytes(train_branch, fresh, own_cache, task):
    more = [*CONSTANT, *(DROPOUT if task == "causal" else ["model.config.hidden_dropout_prob=0.1"])]
    for epochs in (1, 2, 3, 4):
        length = f"num_train_epochs={epochs}"
        outs, shared = train_branch(task, *more, length)
        assert shared == STEPS * (epochs - 1)
        assert outs == fresh(task, *more, length)
    assert list_kept(own_cache) == [8, 16, 24, 32]
    assert not list((own_cache / "checkpoints").glob("*/checkpoint-*"))
    outs, shared = train_branch(task, *more, "num_train_epochs=2")  # a shorter run has nothing left to train
    assert shared == 2 * STEPS
    assert outs == fresh(task, *more, "num_train_epochs=2")


@pytest.mark.parametrize(
    "more", mark_rest_slow([([],), (["++trainer.eval_strategy=steps", "++trainer.eval_steps=4"],)], 1)
)
def test_decays_of_other_lengths_and_shapes_share_the_stable_steps(train_branch, fresh, more):
    _, shared = train_branch("causal", *decay(6), *more)
    assert shared == 0
    for values in (decay(6, "cosine"), decay(6, "1-sqrt")):
        outs, shared = train_branch("causal", *values, *more)
        assert shared == 11
        assert outs == fresh("causal", *values, *more)
    outs, shared = train_branch("causal", *decay(3), *more)
    assert shared == 11
    assert outs == fresh("causal", *decay(3), *more)
    outs, shared = train_branch("causal", *decay(8), *more)  # its decay begins before the kept checkpoints
    assert shared == 0
    assert outs == fresh("causal", *decay(8), *more)


def test_earlier_end_of_a_longer_schedule_shares_its_steps(train_branch, fresh):
    horizon = ["++trainer.max_steps=32", "++trainer.lr_scheduler_type=cosine", "trainer.logging_steps=3"]
    for epochs, expected in ((1, 0), (2, 8), (9, 16)):
        outs, shared = train_branch("causal", *horizon, f"num_train_epochs={epochs}")
        assert shared == expected
        assert outs == fresh("causal", *horizon, f"num_train_epochs={epochs}")
    assert json.loads(outs["report/stats.json"])["steps"] == 32
    # The shorter run has the learning rates of the whole schedule.
    rates = fresh("causal", *horizon, "num_train_epochs=9")["report/plots/metrics/train/learning_rate.tsv"].decode()
    short = fresh("causal", *horizon, "num_train_epochs=1")["report/plots/metrics/train/learning_rate.tsv"].decode()
    assert rates.startswith(short.rstrip("\n"))
    other = ["++trainer.max_steps=31", *horizon[1:]]
    outs, shared = train_branch("causal", *other, "num_train_epochs=2")
    assert shared == 0


@pytest.mark.parametrize("epochs", mark_rest_slow(["0.5", "1.3"], 1))
@pytest.mark.parametrize("strategy", mark_rest_slow(["epoch", "steps", "no"], 2))
def test_run_that_ended_within_an_epoch_is_continued_with_the_same_bytes(train_branch, fresh, epochs, strategy):
    more = [*CONSTANT, f"++trainer.eval_strategy={strategy}"]
    more += ["++trainer.eval_steps=3"] if strategy == "steps" else []
    outs, _ = train_branch("causal", *more, f"num_train_epochs={epochs}")
    assert outs == fresh("causal", *more, f"num_train_epochs={epochs}")
    outs, shared = train_branch("causal", *more, "num_train_epochs=2")
    # A run that evaluated at its end, where a longer one does not, is not continued.
    assert shared == (0 if strategy == "steps" else {"0.5": 4, "1.3": 11}[epochs])
    assert outs == fresh("causal", *more, "num_train_epochs=2")
    outs, shared = train_branch("causal", *more, f"num_train_epochs={epochs}")
    assert outs == fresh("causal", *more, f"num_train_epochs={epochs}")


def test_checkpoints_every_few_steps_are_shared_by_shorter_runs(train_branch, fresh, own_cache):
    train_branch("causal", *CONSTANT, "num_train_epochs=2", every=5)
    assert list_kept(own_cache) == [5, 10, 15, 16]
    for epochs, expected in (("1", 5), ("1.6", 10)):
        outs, shared = train_branch("causal", *CONSTANT, f"num_train_epochs={epochs}")
        assert shared == expected
        assert outs == fresh("causal", *CONSTANT, f"num_train_epochs={epochs}")


def test_run_that_evaluates_after_its_last_step_does_not_take_over_a_checkpoint_without_that(train_branch, fresh):
    more = [*CONSTANT, "++trainer.eval_strategy=steps", "++trainer.eval_steps=3"]
    train_branch("causal", *more, "num_train_epochs=2", every=8)
    outs, shared = train_branch("causal", *more, "num_train_epochs=1")
    assert shared == 0
    assert outs == fresh("causal", *more, "num_train_epochs=1")


def test_early_stopped_run_is_not_continued(train_branch, fresh):
    more = [*BEST, *RUINED, "early_stopping={patience: 2, threshold: 0.0}"]
    for epochs in (12, 12, 14):
        outs, _ = train_branch("causal", *more, f"num_train_epochs={epochs}", every=8)
        assert outs == fresh("causal", *more, f"num_train_epochs={epochs}")
    assert json.loads(outs["report/stats.json"])["steps"] < 12 * STEPS


def test_best_model_of_the_shared_steps_is_found_again(train_branch, fresh):
    more = [*CONSTANT, *BEST, "learning_rate=0.5"]
    train_branch("causal", *more, "num_train_epochs=4")
    outs, shared = train_branch("causal", *more, "num_train_epochs=5")
    assert shared == 32
    assert outs == fresh("causal", *more, "num_train_epochs=5")
    assert json.loads(outs["report/stats.json"])["best_step"] < 32  # otherwise the kept best checkpoint is not tested


@pytest.mark.parametrize(
    "change",
    mark_rest_slow(
        [
            "seed=43",
            "++trainer.warmup_steps=4",
            "trainer.weight_decay=0.5",
            "++trainer.lr_scheduler_type=linear",
            "learning_rate=0.02",
            "trainer.logging_steps=4",
            "++trainer.eval_strategy=no",
            "batch_size=4",
            "model.config.n_embd=32",
            "objective.isolate_documents=false",
            "hardware.per_device_batch_size=2",
            "adapter=lora",
        ],
        3,
    ),
)
def test_run_that_differs_in_an_early_step_shares_nothing(train_branch, fresh, change):
    train_branch("causal", *CONSTANT, "num_train_epochs=1")
    outs, shared = train_branch("causal", *CONSTANT, change)
    assert shared == 0
    assert outs == fresh("causal", *CONSTANT, change)


def test_adapter_continues_with_the_same_bytes(train_branch, fresh):
    more = [*CONSTANT, "adapter=lora", "adapter.dropout=0.1"]
    train_branch("causal", *more, "num_train_epochs=1")
    outs, shared = train_branch("causal", *more)
    assert shared == STEPS
    assert outs == fresh("causal", *more)


def damage_file(name):
    def damage(entry):
        file = next(entry.rglob(name))
        data = file.read_bytes()
        file.unlink()  # not a write through the hard link
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))

    return damage


def empty(entry):
    shutil.rmtree(entry)
    entry.mkdir()


def remove_manifest(entry):
    next(entry.rglob("manifest-0.json")).unlink()


def replace_by_file(entry):
    shutil.rmtree(entry)
    entry.write_text("not a directory")


@pytest.mark.parametrize(
    "damage",
    mark_rest_slow(
        [
            *(damage_file("model.safetensors"), empty, replace_by_file, remove_manifest),
            *map(damage_file, ("optimizer.pt", "trainer_state.json", "state_chain.txt")),
        ],
        3,
    ),
)
def test_damaged_kept_checkpoint_is_not_used_and_the_one_before_is(train_branch, fresh, own_cache, damage):
    train_branch("causal", *CONSTANT, "num_train_epochs=1")
    train_branch("causal", *CONSTANT, "num_train_epochs=2")
    damage(next((own_cache / "branches").glob("*-16-*")))
    outs, shared = train_branch("causal", *CONSTANT, "num_train_epochs=3")
    assert shared == STEPS
    assert outs == fresh("causal", *CONSTANT, "num_train_epochs=3")
    if damage is not replace_by_file:
        assert list_kept(own_cache) == [8, 24]


def test_missing_best_checkpoint_of_a_kept_one_is_damage(train_branch, fresh, own_cache):
    more = [*CONSTANT, *BEST, "learning_rate=0.5"]
    train_branch("causal", *more, "num_train_epochs=4")
    entry = next((own_cache / "branches").glob("*-32-*"))
    best = min(entry.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert best.name != "checkpoint-32"
    shutil.rmtree(best)
    outs, shared = train_branch("causal", *more, "num_train_epochs=5")
    assert shared == 0
    assert outs == fresh("causal", *more, "num_train_epochs=5")


class Killed(BaseException):
    """Exception that ends a run like SIGKILL."""


@pytest.mark.parametrize("step", mark_rest_slow([12, 9, 20], 1))
def test_branch_that_is_killed_resumes_from_its_own_checkpoint(
    train_branch, fresh, monkeypatch, caplog, own_cache, step
):
    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step > step:
                raise Killed

    original = BlockTrainer.train

    def train(self, *arguments, **named):
        self.add_callback(Kill())
        return original(self, *arguments, **named)

    more = [*CONSTANT, "++trainer.save_strategy=steps", "++trainer.save_steps=1"]
    train_branch("causal", *more, "num_train_epochs=1")
    with monkeypatch.context() as patch:
        patch.setattr(BlockTrainer, "train", train)
        with pytest.raises(Killed):
            train_branch("causal", *more, "num_train_epochs=3")
    outs, shared = train_branch("causal", *more, "num_train_epochs=3")
    assert shared == 0  # its own checkpoint is newer than the kept one
    assert any(record.getMessage() == f"resuming from step {step}" for record in caplog.records)
    assert outs == fresh("causal", *more, "num_train_epochs=3")


def test_kept_checkpoints_stay_within_their_size_and_the_last_used_ones_remain(train_branch, own_cache, caplog):
    train_branch("causal", *CONSTANT, "num_train_epochs=1")
    train_branch("causal", "seed=1", *CONSTANT, "num_train_epochs=2")
    entries = {int(path.name.split("-")[1]): path for path in (own_cache / "branches").iterdir() if path.is_dir()}
    size = sum(path.stat().st_size for path in entries[8].rglob("*") if path.is_file())
    os.utime(entries[8], (0, 0))
    train_branch("causal", *CONSTANT, "num_train_epochs=3", gigabytes=2.5 * size / 1e9)  # uses that of step 8
    assert list_kept(own_cache) == [8, 24]
    train_branch("causal", "seed=2", *CONSTANT, "num_train_epochs=1", gigabytes=0.5 * size / 1e9)
    assert "is not kept for branches: checkpoints.keep_for_branches.gigabytes is" in caplog.text
    assert list_kept(own_cache) == [8, 24]


def test_other_files_among_the_kept_checkpoints_are_ignored(train_branch, fresh, own_cache):
    train_branch("causal", *CONSTANT, "num_train_epochs=1")
    [entry] = (path for path in (own_cache / "branches").iterdir() if path.is_dir())
    fingerprint = entry.name.split("-")[0]
    for name in ("", "-", "-12", "-12-x", "-012-" + "0" * 16, "-\N{FULLWIDTH DIGIT SIX}-" + "0" * 16, "-9-" + "0" * 16):
        (entry.parent / f"{fingerprint}{name}").mkdir()
    shutil.copytree(entry, entry.with_name(entry.name + ".bak"))
    outs, shared = train_branch("causal", *CONSTANT)
    assert shared == STEPS
    assert outs == fresh("causal", *CONSTANT)


@pytest.mark.parametrize("scheduler", ["reduce_lr_on_plateau"])
def test_schedule_that_depends_on_the_metric_keeps_nothing_and_says_so(train_branch, own_cache, caplog, scheduler):
    more = [*BEST, f"++trainer.lr_scheduler_type={scheduler}"]
    train_branch("causal", *more)
    assert "checkpoints.keep_for_branches has no effect" in caplog.text
    assert not (own_cache / "branches").exists()


def test_branches_are_refused_where_they_cannot_work(compose_stage, overrides, tmp_path):
    for more, message in [
        (["hardware=ray"], "not supported with hardware.ray"),
        (["framework=keras"], "runs share no steps"),
    ]:
        with pytest.raises(ConfigError) as caught:
            compose_stage("train", *overrides("train", "causal", tmp_path, KEEP.format("null", 1), *more))
        assert any(message in problem for problem in caught.value.problems)


@pytest.mark.parametrize(
    ("kind", "kwargs"),
    [
        *((kind, None) for kind in ("linear", "cosine", "constant", "inverse_sqrt")),
        ("polynomial", {"power": 2.0}),
        ("warmup_stable_decay", {"num_decay_steps": 5}),
        ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
    ],
)
def test_learning_rates_are_those_that_the_optimizer_gets(tmp_path, kind, kwargs):
    import torch
    from transformers.optimization import get_scheduler

    arguments = TrainingArguments(
        output_dir=str(tmp_path), learning_rate=0.3, warmup_steps=0 if kind == "constant" else 4, use_cpu=True,
        lr_scheduler_type=kind, lr_scheduler_kwargs=kwargs,
    )  # fmt: skip
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    schedule = get_scheduler(kind, optimizer, arguments.get_warmup_steps(20), 20, kwargs)
    rates = []
    for _ in range(15):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    np.testing.assert_array_equal(compute_learning_rates(arguments, 15, 20), rates)


def test_read_only_directory_of_kept_checkpoints_does_not_stop_training(train_branch, fresh, own_cache, caplog):
    (own_cache).mkdir(exist_ok=True)
    Path(own_cache / "branches").write_text("a file")
    outs, shared = train_branch("causal", *CONSTANT)
    assert shared == 0
    assert "no kept checkpoint is used" in caplog.text
    assert "is not kept for branches" in caplog.text
    assert outs == fresh("causal", *CONSTANT)


@pytest.mark.slow  # four processes with torch
def test_runs_at_the_same_time_share_kept_checkpoints_and_end_with_the_same_bytes(
    train_branch, fresh, overrides, own_cache, tmp_path
):
    train_branch("causal", *CONSTANT, "num_train_epochs=1", every=2)
    [size, *_] = (
        sum(file.stat().st_size for file in path.rglob("*"))
        for path in (own_cache / "branches").iterdir()
        if path.is_dir()
    )
    keep = KEEP.format(1, 3.5 * size / 1e9)  # every run keeps many and removes those of the others
    runs = {}
    for index, epochs in enumerate((2, 2, 3, 4)):
        out = tmp_path / f"at-once-{index}"
        more = [*CONSTANT, f"num_train_epochs={epochs}", keep]
        command = [sys.executable, "-m", "stages.train", *overrides("train", "causal", out, *more)]
        runs[index, epochs] = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE)
    for (index, epochs), process in runs.items():
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors.decode()
        assert read_contents(tmp_path / f"at-once-{index}") == fresh("causal", *CONSTANT, f"num_train_epochs={epochs}")
