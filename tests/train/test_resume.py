"""Interrupted and resumed training ends with the same bytes as uninterrupted training."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from data_helpers import REPOSITORY, read_contents, read_until
from dvc_project import mark_rest_slow
from training_cases import BEST, RUINED
from transformers import TrainerCallback

from stages.shell.interruption import Interrupted
from stages.train import checkpoints
from stages.train import stage as train_stage
from stages.train.checkpoints import Checkpoints, find_damage
from stages.train.fingerprints import compute_run_fingerprint
from stages.train.training import BlockTrainer

TASKS = ("causal", "mlm")
EVERY = ["++trainer.save_strategy=steps", "++trainer.save_steps=1", "trainer.logging_steps=4"]
DROPOUT = {
    "causal": ["model.config.resid_pdrop=0.1", "model.config.embd_pdrop=0.1"],
    "mlm": ["model.config.hidden_dropout_prob=0.1"],
}


class Killed(BaseException):
    """Exception that ends a run like SIGKILL: nothing is written after it."""


@pytest.fixture
def kill_at(monkeypatch):
    """`kill_at(step)`: end training after that step and its checkpoint; `kill_at(None)`: do not end it."""

    def kill(step):
        class Kill(TrainerCallback):
            def on_step_end(self, args, state, control, **_):
                if state.global_step > step:
                    raise Killed

            def on_epoch_begin(self, args, state, control, **_):
                if state.global_step >= max(step, 1):
                    raise Killed

        monkeypatch.undo()
        original = BlockTrainer.train

        def train(self, *arguments, **named):
            self.add_callback(Kill())
            return original(self, *arguments, **named)

        if step is not None:
            monkeypatch.setattr(BlockTrainer, "train", train)

    return kill


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Cache directory for this file only: its tests leave checkpoints, which tests of other files must not find."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LM_REPRO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield Path(os.environ["LM_REPRO_CACHE"])


@pytest.fixture(scope="module")
def undisturbed(run_toy, cache, tmp_path_factory):
    """`undisturbed(task, *more)`: outs of an uninterrupted run."""
    known = {}

    def outs(task, *more):
        if (task, more) not in known:
            root = tmp_path_factory.mktemp("undisturbed")
            run_toy("train", task, root, *more)
            known[task, more] = read_contents(root)
        return known[task, more]

    return outs


def resumed_from(caplog):
    return [int(record.args[0]) for record in caplog.records if record.msg.startswith("resuming from step")]


def check_resumes(run_toy, undisturbed, kill_at, caplog, root, task, more, step=5):
    """Check that training killed after `step` resumes there and ends with the bytes of an uninterrupted run."""
    kill_at(step)
    with pytest.raises(Killed):
        run_toy("train", task, root, *more)
    assert not [name for name in read_contents(root) if not name.startswith(".live-report/")]
    kill_at(None)
    caplog.set_level("INFO")
    run_toy("train", task, root, *more)
    assert resumed_from(caplog) == [step]
    assert read_contents(root) == undisturbed(task, *more)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("step", [1, 4, 7, 8, 9, 15])  # of two epochs of eight
def test_training_killed_behind_any_step_ends_with_the_same_bytes(
    run_toy, undisturbed, kill_at, caplog, tmp_path, task, step
):
    more = [*EVERY, *DROPOUT[task]]
    check_resumes(run_toy, undisturbed, kill_at, caplog, tmp_path, task, more, step)


def test_training_killed_again_and_again_ends_with_the_same_bytes(run_toy, undisturbed, kill_at, caplog, tmp_path):
    more = [*EVERY, "hardware.per_device_batch_size=2"]
    caplog.set_level("INFO")
    for step in (2, 3, 7):
        kill_at(step)
        with pytest.raises(Killed):
            run_toy("train", "causal", tmp_path, *more)
    kill_at(None)
    run_toy("train", "causal", tmp_path, *more)
    assert resumed_from(caplog) == [2, 3, 7]
    assert read_contents(tmp_path) == undisturbed("causal", *more)


@pytest.mark.parametrize("task", TASKS)
def test_training_of_an_adapter_killed_ends_with_the_same_bytes(run_toy, undisturbed, kill_at, caplog, tmp_path, task):
    more = [*EVERY, "adapter=lora", "adapter.dropout=0.1"]
    check_resumes(run_toy, undisturbed, kill_at, caplog, tmp_path, task, more)
    assert read_contents(tmp_path)["model/model.safetensors"] != undisturbed(task, *EVERY)["model/model.safetensors"]


@pytest.mark.parametrize("task", TASKS)
def test_training_killed_with_the_best_model_asked_for_keeps_it_and_the_patience(
    run_toy, undisturbed, kill_at, tmp_path, task
):
    more = [*BEST, *RUINED, "num_train_epochs=12", "early_stopping={patience: 4, threshold: 0.0}"]
    expected = undisturbed(task, *more)
    ledger = json.loads(expected["report/stats.json"])
    assert ledger["best_step"] < ledger["steps"] - 10  # otherwise the retained checkpoint is not tested
    kill_at(ledger["steps"] - 4)
    with pytest.raises(Killed):
        run_toy("train", task, tmp_path, *more)
    kill_at(None)
    run_toy("train", task, tmp_path, *more)
    assert read_contents(tmp_path) == expected


KEEP = "checkpoints.keep_for_branches={every_steps: null, gigabytes: 1.0, directory: null}"
EARLY = [*RUINED, "early_stopping={patience: 2, threshold: 0.0}", "num_train_epochs=12"]
BEST_STEPS = [
    *(f"++trainer.{event}_{name}" for event in ("eval", "save") for name in ("strategy=steps", "steps=3")),
    "++trainer.load_best_model_at_end=true",
]


@pytest.mark.parametrize(
    "more",
    mark_rest_slow(
        [
            [*EVERY, "num_train_epochs=0.5"],
            [*BEST, *EARLY],
            [*EVERY],
            ["++trainer.max_steps=12", "trainer.logging_steps=4", KEEP],
            [*BEST_STEPS, *EARLY],
            [*BEST_STEPS, "num_train_epochs=0.75"],
        ],
        2,
    ),
)
def test_training_killed_after_its_last_step_ends_with_the_same_bytes(
    run_toy, undisturbed, monkeypatch, tmp_path, more
):
    def kill(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(train_stage, "write_outputs", kill)
        with pytest.raises(Killed):
            run_toy("train", "causal", tmp_path, *more)
    run_toy("train", "causal", tmp_path, *more)
    assert read_contents(tmp_path) == undisturbed("causal", *more)


def test_training_that_evaluates_before_its_first_step_is_resumed_with_the_same_bytes(
    run_toy, undisturbed, kill_at, caplog, tmp_path
):
    more = [*EVERY, "++trainer.eval_strategy=epoch", "++trainer.eval_on_start=true"]
    check_resumes(run_toy, undisturbed, kill_at, caplog, tmp_path, "causal", more)


def killed_run(run_toy, kill_at, root, *more, step=6):
    kill_at(step)
    with pytest.raises(Killed):
        run_toy("train", "causal", root, *EVERY, *more)
    kill_at(None)


@pytest.mark.parametrize(
    "change", ["seed=43", "trainer.weight_decay=0.5", "learning_rate=0.02", "objective.isolate_documents=false"]
)
def test_checkpoint_of_another_config_is_not_taken(run_toy, undisturbed, kill_at, caplog, tmp_path, change):
    killed_run(run_toy, kill_at, tmp_path / "killed", "trainer.logging_steps=3")
    caplog.set_level("INFO")
    run_toy("train", "causal", tmp_path / "other", *EVERY, "trainer.logging_steps=3", change)
    assert resumed_from(caplog) == []
    run_toy("train", "causal", tmp_path / "killed", *EVERY, "trainer.logging_steps=3")
    assert resumed_from(caplog) == [6]


def test_checkpoint_of_other_library_versions_is_not_taken(run_toy, kill_at, caplog, monkeypatch, tmp_path):
    killed_run(run_toy, kill_at, tmp_path, "trainer.logging_steps=2")
    caplog.set_level("INFO")
    monkeypatch.setattr(checkpoints, "get_versions", lambda *names: dict.fromkeys(names, "0"))
    run_toy("train", "causal", tmp_path, *EVERY, "trainer.logging_steps=2")
    assert resumed_from(caplog) == []


def test_fingerprint_follows_the_bytes_of_the_inputs_and_not_their_places(corpus, overrides, compose_stage, tmp_path):
    def name(*more):
        return compute_run_fingerprint(compose_stage("train", *overrides("train", "causal", tmp_path, *more)))

    for part in ("tokens/causal", "blocks-16/causal"):
        shutil.copytree(corpus / part, tmp_path / "elsewhere" / part)
    places = [f"tokens={tmp_path}/elsewhere/tokens/causal", f"blocks={tmp_path}/elsewhere/blocks-16/causal", "out=x"]
    settings = ["checkpoints.minutes=1", "checkpoints.keep=9"]
    assert name() == name(*places) == name(*places, *settings)
    # The shards count by their checksums, which are verified when they are read.
    checksums = tmp_path / "elsewhere/blocks-16/causal/train/shards.json"
    checksums.write_text(checksums.read_text().replace("0", "1"))
    assert name(*places) != name()


def test_fingerprint_knows_the_number_of_gpus_that_a_config_leaves_open(
    overrides, compose_stage, tmp_path, monkeypatch
):
    def name(number):
        monkeypatch.setattr("stages.model.processes.get_world_size", lambda: number)
        launch = "++hardware.launch={processes_per_machine: null, machines: 1, rendezvous: null}"
        return compute_run_fingerprint(compose_stage("train", *overrides("train", "causal", tmp_path, launch)))

    assert name(2) == name(2) != name(4)


def test_fingerprint_knows_the_version_of_a_library_only_if_the_optimizer_is_from_it(
    overrides, compose_stage, tmp_path, monkeypatch
):
    metadata = tmp_path / "site/schedulefree-1.0.dist-info/METADATA"
    metadata.parent.mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path / "site")

    def name(version, optimizer):
        metadata.write_text(f"Name: schedulefree\nVersion: {version}\n")
        more = f"++trainer.optim={optimizer}"
        return compute_run_fingerprint(compose_stage("train", *overrides("train", "causal", tmp_path, more)))

    assert name("1.0", "schedule_free_sgd") == name("1.0", "schedule_free_sgd") != name("2.0", "schedule_free_sgd")
    assert name("1.0", "adamw_torch") == name("2.0", "adamw_torch")


@pytest.fixture
def own_cache(tmp_path):
    """Cache directory without checkpoints of other tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LM_REPRO_CACHE", str(tmp_path / "cache"))
        yield tmp_path / "cache"


def left(cache):
    """Checkpoints of the one killed run."""
    (place,) = {path.parent for path in cache.rglob("checkpoint-*")}
    return Checkpoints(place, keep=2)


FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "manifest-0.json")
DAMAGES = [*((file, "missing") for file in FILES), *((file, "cut") for file in FILES[:2]), (FILES[0], "flipped")]


@pytest.mark.parametrize(("file", "damage"), DAMAGES)
def test_damaged_checkpoint_is_passed_over_for_the_one_before(
    run_toy, undisturbed, kill_at, own_cache, caplog, tmp_path, file, damage
):
    killed_run(run_toy, kill_at, tmp_path / "out")
    path = left(own_cache).get_path(6) / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()
    if damage != "missing":
        path.write_bytes(data if damage == "flipped" else data[:-7])
    caplog.set_level("INFO")
    run_toy("train", "causal", tmp_path / "out", *EVERY)
    assert resumed_from(caplog) == [5]
    assert any("step 6 is damaged" in record.getMessage() for record in caplog.records)
    assert read_contents(tmp_path / "out") == undisturbed("causal", *EVERY)


def test_checkpoints_that_are_all_damaged_mean_a_new_start(run_toy, undisturbed, kill_at, own_cache, caplog, tmp_path):
    killed_run(run_toy, kill_at, tmp_path / "out")
    for step in left(own_cache).list_steps():
        (left(own_cache).get_path(step) / "optimizer.pt").unlink()
    caplog.set_level("INFO")
    run_toy("train", "causal", tmp_path / "out", *EVERY)
    assert resumed_from(caplog) == []
    assert read_contents(tmp_path / "out") == undisturbed("causal", *EVERY)


# -- the directory of checkpoints --------------------------------------------------------------------------------------


def write_checkpoint(found, step, best=None):
    with found.write_checkpoint(step, best) as aside:
        (aside / f"checkpoint-{step}/deep").mkdir(parents=True)
        (aside / f"checkpoint-{step}/deep/file").write_text(str(step))


def test_checkpoints_keep_the_newest_and_the_best(tmp_path):
    found = Checkpoints(tmp_path / "run", keep=2)
    for step in (1, 2, 9, 10, 11):
        write_checkpoint(found, step, best=2)
    assert found.list_steps() == [2, 10, 11]
    assert found.find_newest() == 11
    assert (found.get_path(11) / "deep/file").read_text() == "11"


def test_checkpoints_cleared_are_gone(tmp_path):
    found = Checkpoints(tmp_path / "run", keep=2)
    write_checkpoint(found, 1)
    write_checkpoint(found, 2)
    found.remove_all()
    assert found.list_steps() == []


def test_checkpoint_whose_writing_fails_is_not_there(tmp_path):
    found = Checkpoints(tmp_path / "run", keep=2)
    write_checkpoint(found, 1)
    with pytest.raises(OSError, match="full"), found.write_checkpoint(2, None) as aside:
        (aside / "checkpoint-2").mkdir()
        raise OSError("full")
    assert found.list_steps() == [1]
    assert [path.name for path in found.directory.iterdir()] == ["checkpoint-1"]


def test_checkpoint_with_a_file_too_many_or_a_changed_one_is_damaged(tmp_path):
    found = Checkpoints(tmp_path / "run", keep=2)
    write_checkpoint(found, 1)
    assert find_damage(found.get_path(1)) is None
    (found.get_path(1) / "deep/file").write_text("2")
    assert find_damage(found.get_path(1)) == "deep/file changed"


MANIFESTS = [
    "", "[]", "{}", "null", "7", '"text"', '{"deep/file": 1}', '{"deep/file": null}', "[" * 200_000, "{", "\xff",
    '{"deep/file": "sha256:0"}', '{"gone": "sha256:0"}', '{"": "sha256:0"}', '{"\\u0000": "sha256:0"}',
    '{"/dev/zero": "sha256:0"}', '{"%s": "sha256:0"}' % ("x" * 5000),
]  # fmt: skip


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda text: repr(text[:24]))
def test_checkpoint_whose_manifest_says_anything_else_is_left_out(tmp_path, caplog, manifest):
    found = Checkpoints(tmp_path / "run", keep=2)
    write_checkpoint(found, 1)
    write_checkpoint(found, 2)
    (found.get_path(2) / "manifest-0.json").write_text(manifest, encoding="latin-1")
    assert found.find_newest() == 1
    assert [path.name for path in found.directory.iterdir()] == ["checkpoint-1"]
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("the checkpoint of step 2 is damaged (") and message.isprintable() and len(message) < 400


def odd_directory(path):
    path.mkdir()
    (path / "file").write_text("content")


ODD = {
    "file": lambda path: path.write_text("content"),
    "empty file": lambda path: path.touch(),
    "directory": odd_directory,
    "dangling link": lambda path: path.symlink_to(path.parent / "gone"),
    "link to itself": lambda path: path.symlink_to(path),
    "link to a directory": lambda path: path.symlink_to(path.parent.parent, target_is_directory=True),
    "link to a checkpoint": lambda path: path.symlink_to(path.parent / "checkpoint-1", target_is_directory=True),
    "pipe": os.mkfifo,
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize(
    "name",
    ["checkpoint-6.bak", "checkpoint-", "checkpoint-last", "checkpoint-06", "checkpoint--6", "checkpoint-6 (copy)",
     "checkpoint-\N{FULLWIDTH DIGIT SIX}", "checkpoint-1e3", "checkpoint-best-6"],
)  # fmt: skip
def test_entries_that_are_no_checkpoints_stay_and_stop_nothing(tmp_path, name, kind):
    found = Checkpoints(tmp_path / "run", keep=1)
    write_checkpoint(found, 1)
    ODD[kind](found.directory / name)
    assert (found.list_steps(), found.find_newest()) == ([1], 1)
    write_checkpoint(found, 6)
    assert (found.list_steps(), found.find_newest()) == ([6], 6)
    found.remove_all()
    assert [path.name for path in found.directory.iterdir()] == [name]


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("name", ["checkpoint-6", ".tmp"])
def test_checkpoint_takes_the_place_of_whatever_has_its_name(tmp_path, name, kind):
    found = Checkpoints(tmp_path / "run", keep=2)
    write_checkpoint(found, 1)
    ODD[kind](found.directory / name)
    assert found.find_newest() == 1
    write_checkpoint(found, 6)
    assert found.find_newest() == 6
    assert sorted(path.name for path in found.directory.iterdir()) == ["checkpoint-1", "checkpoint-6"]


@pytest.mark.parametrize("kind", ["file", "dangling link", "link to itself", "pipe"])
def test_checkpoint_directory_takes_the_place_of_what_is_none(cache, kind):
    with checkpoints.lock_checkpoint_directory("odd") as place:
        pass
    ODD[kind](place)
    with checkpoints.lock_checkpoint_directory("odd") as again:
        assert again == place
        write_checkpoint(Checkpoints(place, keep=2), 1)
    assert not place.exists()


def test_checkpoint_directory_in_use_is_left_to_its_user(cache):
    with checkpoints.lock_checkpoint_directory("same") as one, checkpoints.lock_checkpoint_directory("same") as two:
        assert one != two
    with checkpoints.lock_checkpoint_directory("same") as again:
        assert again == one


def test_checkpoint_directory_stays_after_an_error_and_goes_after_the_end(cache):
    with pytest.raises(ValueError, match="oops"), checkpoints.lock_checkpoint_directory("run") as place:
        place.mkdir()
        raise ValueError("oops")
    assert place.is_dir()
    with checkpoints.lock_checkpoint_directory("run") as again:
        assert again == place
    assert not place.exists()


# -- signals -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow  # one process with torch per case
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
@pytest.mark.parametrize("workers", [0, 2])
def test_signal_to_all_processes_writes_a_checkpoint_says_how_to_go_on_and_ends_with_its_code(
    overrides, cache, tmp_path, caplog, number, code, workers
):
    more = ["num_train_epochs=2000", f"trainer.dataloader_num_workers={workers}"]
    command = [sys.executable, "-m", "stages.train", *overrides("train", "causal", tmp_path, *more)]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # the default, as without nohup
    )  # fmt: skip
    read_until(process.stderr, "validation loss")
    os.killpg(process.pid, number)
    said = process.stderr.read()
    assert process.wait(60) == code, said
    assert "`dvc repro` continues from there" in said and "Traceback" not in said
    assert list(cache.rglob("checkpoint-*/optimizer.pt"))


def raise_signal_in_step(monkeypatch, step):
    """Raise SIGTERM in a step of each training that follows."""

    class Signal(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == step - 1:
                signal.raise_signal(signal.SIGTERM)

    original = BlockTrainer.train

    def train(self, *arguments, **named):
        self.add_callback(Signal())
        return original(self, *arguments, **named)

    monkeypatch.setattr(BlockTrainer, "train", train)


@pytest.mark.parametrize("more", mark_rest_slow([["num_train_epochs=0.5", KEEP], ["num_train_epochs=1", *EVERY]], 1))
def test_request_by_signal_in_the_last_step_lets_training_end(run_toy, undisturbed, tmp_path, monkeypatch, more):
    expected = undisturbed("causal", *more)
    raise_signal_in_step(monkeypatch, json.loads(expected["report/stats.json"])["steps"])
    run_toy("train", "causal", tmp_path, *more)
    assert read_contents(tmp_path) == expected


def test_request_by_signal_ends_training_behind_a_checkpoint(
    run_toy, undisturbed, caplog, cache, tmp_path, monkeypatch
):
    raise_signal_in_step(monkeypatch, 4)
    with pytest.raises(Interrupted, match="stopped at step 4 of 16") as caught:
        run_toy("train", "causal", tmp_path, "trainer.logging_steps=4")
    assert caught.value.exit_code == 143
    monkeypatch.undo()
    caplog.set_level("INFO")
    monkeypatch.setenv("LM_REPRO_CACHE", str(cache))
    run_toy("train", "causal", tmp_path, "trainer.logging_steps=4")
    assert resumed_from(caplog) == [4]
    assert read_contents(tmp_path) == undisturbed("causal", "trainer.logging_steps=4")


# -- training that goes on from another task's model -------------------------------------------------------------------


@pytest.fixture(scope="module")
def starts(run_toy, cache, tmp_path_factory):
    """Task to the directory of a trained model; `other` is a causal model with other weights."""
    root = tmp_path_factory.mktemp("starts")
    for name, task, *more in (("causal", "causal"), ("mlm", "mlm"), ("other", "causal", "seed=7")):
        run_toy("train", task, root / name, *more)
    return {name: root / name / "model" for name in ("causal", "mlm", "other")}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("more", [[], ["adapter=lora"]])
def test_training_from_a_start_killed_ends_with_the_same_bytes(
    run_toy, undisturbed, starts, kill_at, caplog, tmp_path, task, more
):
    more = [*EVERY, *more, f"start={starts[task]}"]
    check_resumes(run_toy, undisturbed, kill_at, caplog, tmp_path, task, more)
    ledger = json.loads(read_contents(tmp_path)["report/stats.json"])
    assert ledger["start"]["files"].keys() == {file.name for file in starts[task].iterdir()}
    assert ledger["from_scratch"] is False


def test_checkpoint_of_another_start_is_not_taken(run_toy, undisturbed, starts, kill_at, caplog, tmp_path):
    more = ["trainer.logging_steps=5"]
    shutil.copytree(starts["causal"], tmp_path / "start")
    killed_run(run_toy, kill_at, tmp_path / "out", *more, f"start={tmp_path}/start")
    caplog.set_level("INFO")
    run_toy("train", "causal", tmp_path / "other", *EVERY, *more, f"start={starts['other']}")
    run_toy("train", "causal", tmp_path / "none", *EVERY, *more)
    assert resumed_from(caplog) == []
    shutil.copy(starts["other"] / "model.safetensors", tmp_path / "start")
    run_toy("train", "causal", tmp_path / "changed", *EVERY, *more, f"start={tmp_path}/start")
    assert resumed_from(caplog) == []
    run_toy("train", "causal", tmp_path / "out", *EVERY, *more, f"start={starts['causal']}")
    assert resumed_from(caplog) == [6]  # the directory of the start model does not matter
