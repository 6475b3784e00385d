"""Several processes: the same numbers as one process, errors and interruptions."""

import json
import os
import signal
import socket
import subprocess
import sys

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from data_helpers import REPOSITORY, read_contents, read_until
from training_cases import BEST, NO_DROPOUT, ProcessConfig, read_losses
from transformers import TrainingArguments

from stages.core.artifacts import Blocks
from stages.core.config import flatten_values
from stages.core.errors import StageError
from stages.launch.torchrun import run_in_processes
from stages.model.hardware import Hardware, Launch, RayTrain
from stages.model.processes import (
    broadcast_from_first,
    gather_from_all,
    get_rank,
    get_world_size,
    max_over_processes,
    sum_over_processes,
)
from stages.train.training import ProcessSeed

TASKS = ("causal", "mlm")
TWO = "++hardware.launch={processes_per_machine: 2, machines: 1, rendezvous: null}"
FIFTY_STEPS = ["batch_size=12", "num_train_epochs=10", "trainer.logging_steps=1"]


# -- the numbers of one ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one(run_toy, cache, tmp_path_factory):
    """Task to the outs of one process, without dropout and with the loss of every step."""
    roots = {task: tmp_path_factory.mktemp(f"one-{task}") for task in TASKS}
    for task, root in roots.items():
        run_toy("baseline", task, root, *NO_DROPOUT[task])
        run_toy("train", task, root, *NO_DROPOUT[task], *FIFTY_STEPS)
        run_toy("evaluate", task, root)
    return roots


@pytest.mark.parametrize("task", ["causal", pytest.param("mlm", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "more",
    [
        pytest.param([], id="whole"),
        pytest.param(["hardware.per_device_batch_size=3"], id="accumulated", marks=pytest.mark.slow),
    ],
)
def test_training_in_two_processes_has_the_losses_of_one(run_toy, corpus, cache, one, tmp_path, task, more):
    assert len(Blocks(corpus / f"blocks-16/{task}/train")) % 12  # the last batch is not full
    run_toy("train", task, tmp_path, *NO_DROPOUT[task], *FIFTY_STEPS, TWO, *more)
    expected = read_losses(one[task])
    assert len(expected) >= 50
    np.testing.assert_allclose(read_losses(tmp_path), expected, atol=1e-4)
    assert read_contents(tmp_path / "report").keys() == read_contents(one[task] / "report").keys()


@pytest.mark.parametrize("task", [pytest.param("causal", marks=pytest.mark.slow), "mlm"])
def test_evaluate_in_two_processes_writes_the_metrics_of_one(run_toy, one, tmp_path, task):
    outs = [f"out={tmp_path}/metrics.json", f"samples_out={tmp_path}/samples.md", f"report={tmp_path}/evaluation"]
    run_toy("evaluate", task, one[task], TWO, *outs)
    found, expected = (
        json.loads((root / "evaluation/metrics.json").read_text())[task] for root in (tmp_path, one[task])
    )
    assert found.keys() == expected.keys()
    assert dict(flatten_values(found)) == pytest.approx(dict(flatten_values(expected)), rel=1e-6)
    for split in ("validation", "test"):  # each process has scored every second document
        ours, others = (pq.read_table(root / f"evaluation/tokens/{split}.parquet") for root in (tmp_path, one[task]))
        assert ours.drop_columns("bits") == others.drop_columns("bits")
        bits = (np.concatenate(table.column("bits").to_pylist()) for table in (ours, others))
        np.testing.assert_allclose(*bits, rtol=1e-4, atol=1e-5)
    assert (tmp_path / "samples.md").read_text() == (one[task] / "samples.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("more", [["adapter=lora"], BEST], ids=["adapter", "best model"])
def test_training_in_two_processes_has_the_ledger_of_one(run_toy, cache, tmp_path, task, more):
    for name, launch in (("one", []), ("two", [TWO])):
        run_toy("train", task, tmp_path / name, *NO_DROPOUT[task], "trainer.logging_steps=1", *more, *launch)
    one, two = (json.loads((tmp_path / name / "report/stats.json").read_text()) for name in ("one", "two"))
    assert two.pop("best_validation_loss") == pytest.approx(one.pop("best_validation_loss"), abs=1e-4)
    assert two == one
    np.testing.assert_allclose(read_losses(tmp_path / "two"), read_losses(tmp_path / "one"), atol=1e-4)


@pytest.mark.slow
def test_training_in_a_launched_process_has_the_bytes_of_training_in_the_stages_own(run_toy, cache, tmp_path, capfd):
    launch = "++hardware.launch={processes_per_machine: 1, machines: 1, rendezvous: null}"
    run_toy("train", "causal", tmp_path / "launched", launch)
    assert "is ignored" not in capfd.readouterr().err  # set by the launcher
    run_toy("train", "causal", tmp_path / "own")
    assert read_contents(tmp_path / "launched") == read_contents(tmp_path / "own")


@pytest.mark.slow
def test_training_in_two_processes_killed_ends_with_the_same_bytes(run_toy, cache, tmp_path, monkeypatch, capfd):
    every = [TWO, "++trainer.save_strategy=steps", "++trainer.save_steps=3"]
    run_toy("train", "causal", tmp_path / "undisturbed", *every)
    monkeypatch.setattr("stages.train.stage.train", train_and_be_killed)
    with pytest.raises(StageError, match="SIGKILL"):
        run_toy("train", "causal", tmp_path / "killed", *every)
    assert [name for name in read_contents(tmp_path / "killed") if not name.startswith(".live-report/")] == []
    # Also run by a function of this file: the modules that this file imports are part of the fingerprint.
    monkeypatch.setattr("stages.train.stage.train", train_on)
    run_toy("train", "causal", tmp_path / "killed", *every)
    assert "resuming from step 12" in capfd.readouterr().err
    assert read_contents(tmp_path / "killed") == read_contents(tmp_path / "undisturbed")


@pytest.mark.slow
def test_training_in_two_processes_continues_from_a_kept_checkpoint_with_the_same_bytes(
    run_toy, cache, tmp_path, capfd
):
    constant = [TWO, "++trainer.lr_scheduler_type=constant"]
    keep = "checkpoints.keep_for_branches={every_steps: null, gigabytes: 1.0, directory: %s}" % (tmp_path / "kept")
    run_toy("train", "causal", tmp_path / "fresh", *constant)
    run_toy("train", "causal", tmp_path / "first", *constant, keep, "num_train_epochs=1")
    run_toy("train", "causal", tmp_path / "branch", *constant, keep)
    assert "the first 8 steps are taken from a kept checkpoint" in capfd.readouterr().err
    assert read_contents(tmp_path / "branch") == read_contents(tmp_path / "fresh")


def train_on(config):
    from stages.train.stage import train

    train(config)


def train_and_be_killed(config):
    """Train, but exit the second of two processes without an error after step 13, in the second epoch."""
    from transformers import TrainerCallback

    from stages.train.stage import train
    from stages.train.training import BlockTrainer

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 13 and get_rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)

    original = BlockTrainer.train

    def killed(self, *arguments, **named):
        self.add_callback(Kill())
        return original(self, *arguments, **named)

    BlockTrainer.train = killed
    train(config)


FAKE_SRUN = """#!/bin/bash
# As srun does on its nodes: the command so many times, side by side, and its worst exit code. It passes SIGTERM on,
# ends its tasks on SIGHUP, and tells nobody of one SIGINT.
nodes=${1#--nodes=}; shift
pids=
trap 'kill -TERM $pids' TERM HUP
trap 'echo srun: interrupt, one more within 1 sec to abort >&2' INT
while [ "$nodes" -gt 0 ]; do setsid "$@" & pids="$pids $!"; nodes=$((nodes - 1)); done
worst=0
for pid in $pids; do
  wait "$pid"; code=$?
  while kill -0 "$pid" 2>/dev/null; do wait "$pid"; code=$?; done
  [ "$code" = 0 ] || worst=$code
done
exit $worst
"""


@pytest.fixture
def started_by(tmp_path):
    """Overrides for a launch on two machines, both this one, through a fake srun."""
    srun = tmp_path / "srun"
    srun.write_text(FAKE_SRUN)
    srun.chmod(0o755)
    return (
        "++hardware.launch={processes_per_machine: 1, machines: 2, rendezvous: null,"
        f" started_by: ['{srun}', '--nodes={{machines}}']}}"
    )


@pytest.mark.slow
def test_training_on_two_machines_that_srun_starts_has_the_losses_of_one(overrides, cache, one, tmp_path, started_by):
    command = overrides("train", "causal", tmp_path, *NO_DROPOUT["causal"], *FIFTY_STEPS, started_by)
    code, said = stage("train", command)
    assert code == 0, said
    np.testing.assert_allclose(read_losses(tmp_path), read_losses(one["causal"]), atol=1e-4)


@pytest.mark.slow
def test_an_error_on_machines_that_srun_starts_is_shown(overrides, cache, tmp_path, started_by):
    code, said = stage("train", overrides("train", "causal", tmp_path, started_by, "block_size=32"))
    assert code == 1
    assert "block_size=32: the blocks in" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_machines_with_different_commands_do_not_train_together(overrides, cache, tmp_path):
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{one.getsockname()[1]}"
    launch = f"++hardware.launch={{processes_per_machine: 1, machines: 2, rendezvous: '{place}'}}"
    machines = [
        subprocess.Popen(
            [sys.executable, "-m", "stages.train", *overrides("train", "causal", tmp_path, launch, *more)],
            cwd=REPOSITORY,
            stderr=subprocess.PIPE,
            text=True,
        )
        for more in ([], ["seed=7", "learning_rate=0.5"])
    ]
    said = [machine.communicate(timeout=120)[1] for machine in machines]
    assert [machine.returncode for machine in machines] == [1, 1], said
    for words in said:
        assert "process 1 was started with other values than process 0: learning_rate, seed" in words
    assert not (tmp_path / "model").exists()


def stage(name, command):
    """Run a stage as a process; return its exit code and output."""
    run = [sys.executable, "-m", f"stages.{name}", *command]
    done = subprocess.run(run, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True, check=False, timeout=300)
    return done.returncode, done.stderr


# -- what the processes agree on, and how they end ---------------------------------------------------------------------


def in_two(work):
    run_in_processes("train", work, ProcessConfig(2))


def agree(_):
    assert (get_world_size(), {0, 1}) == (2, {get_rank(), 1 - get_rank()})
    assert broadcast_from_first(f"from {get_rank()}") == "from 0"
    assert gather_from_all(f"from {get_rank()}") == ["from 0", "from 1"]
    assert sum_over_processes(np.array([1.0, get_rank()])).tolist() == [2.0, 1.0]
    assert max_over_processes([get_rank(), 5 - get_rank()]) == [1, 5]


def fail_alone(_):
    if get_rank() == 1:
        raise StageError("the second one's own words")
    dist.barrier()


def die_alone(_):
    if get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def draw_alone(_):
    arguments = TrainingArguments(output_dir="unused", seed=42, use_cpu=True)
    ProcessSeed().on_train_begin(arguments, None, None)
    assert len({tuple(drawn) for drawn in gather_from_all(torch.rand(4).tolist())}) == 2


def listen_to_nobody(_):
    family = [psutil.Process(os.getppid()), psutil.Process()]
    places = [one.laddr.ip for process in family for one in process.net_connections() if one.status == "LISTEN"]
    assert places
    assert set(places) <= {"127.0.0.1"}, places


def agree_and_keep_to_themselves(config):
    for work in (agree, draw_alone, listen_to_nobody):
        work(config)


def test_processes_agree_draw_dropout_of_their_own_and_listen_on_the_loopback_alone():
    in_two(agree_and_keep_to_themselves)  # all in one test: starting the processes takes most of the time


@pytest.mark.slow
@pytest.mark.parametrize(("work", "message"), [(fail_alone, "the second one's own words"), (die_alone, "SIGKILL")])
def test_processes_end_all_with_the_error_of_the_first_that_fails(work, message):
    with pytest.raises(StageError, match=f"process 1 of 2: .*{message}"):
        in_two(work)
    children = [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]
    assert [child for child in children if "spawn_main" in child] == []  # the resource tracker may still run


def test_processes_of_one_a_gpu_without_a_gpu_is_an_error():
    with pytest.raises(StageError, match=r"processes_per_machine.*no GPU"):
        run_in_processes("train", agree, ProcessConfig(None))


def test_two_launchers_are_an_error():
    launch = Launch(processes_per_machine=1, machines=1, rendezvous=None)
    ray = RayTrain(workers=2, max_failures=0, storage=None)
    rest = {"device": "cpu", "num_threads": 1, "per_device_batch_size": None, "evaluate_batch_tokens": 1}
    with pytest.raises(ValueError, match=r"hardware\.launch and hardware\.ray both start processes"):
        Hardware(**rest, launch=launch, ray=ray)


@pytest.mark.parametrize("place", ["nonsense", "host:", ":29500", "localhost:abc", "127.0.0.1:99999"])
def test_launch_with_a_meeting_place_that_is_none_is_an_error(place):
    with pytest.raises(ValueError, match=f"launch.rendezvous={place} should be HOST:PORT"):
        Launch(processes_per_machine=1, machines=2, rendezvous=place)


def test_launch_on_several_machines_without_a_meeting_place_is_an_error():
    with pytest.raises(ValueError, match=r"machines=2 needs launch\.rendezvous"):
        Launch(processes_per_machine=1, machines=2, rendezvous=None)


@pytest.mark.slow  # several processes, each with torch
@pytest.mark.parametrize(
    ("number", "to_all", "code"),
    [
        (signal.SIGTERM, False, 143),
        (signal.SIGTERM, True, 143),
        (signal.SIGHUP, True, 129),
        (signal.SIGINT, True, 130),
        (signal.SIGKILL, False, -9),
    ],
    ids=["SIGTERM", "SIGTERM to all", "closed terminal", "Ctrl-C", "SIGKILL"],
)
@pytest.mark.parametrize("by", ["torch", "srun"])
def test_processes_told_to_end_leave_a_checkpoint_and_nobody_behind(
    overrides, cache, tmp_path, started_by, by, number, to_all, code
):
    seed = f"seed={code % 99 + 100 * (by == 'srun')}"
    launch = started_by if by == "srun" else TWO
    command = overrides("train", "causal", tmp_path, launch, "num_train_epochs=2000", seed)
    before = set(cache.rglob("checkpoint-*/manifest-0.json"))
    process = subprocess.Popen(
        [sys.executable, "-m", "stages.train", *command],
        cwd=REPOSITORY,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # the tests may run under nohup
    )
    before_it = read_until(process.stderr, "validation loss")
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    (os.killpg if to_all else os.kill)(process.pid, number)
    said = before_it + process.stderr.read()
    assert process.wait(90) == code, said
    assert "Traceback" not in said
    _, alive = psutil.wait_procs(family, timeout=30)
    assert alive == []
    if number != signal.SIGKILL or by == "srun":  # the end of the stage stops it
        assert said.count("`dvc repro` continues from there") == 1, said
        assert set(cache.rglob("checkpoint-*/manifest-0.json")) - before
    assert not (tmp_path / "model").exists()
