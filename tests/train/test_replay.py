"""Some steps of a training, replayed from a kept checkpoint, have the links of the training's state chain."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from data_helpers import read_contents
from dvc_project import mark_rest_slow
from safetensors.torch import load_file, save_file
from training_cases import BEST
from transformers.trainer_pt_utils import safe_globals

from stages.core.artifacts import compute_sha256
from stages.core.errors import StageError
from stages.train.replay import find_model_difference, list_kept_steps, replay_steps
from stages.train.state_chain import StateChain, checksum_weights, read_state_chain, write_state_chain

KEEP = "checkpoints.keep_for_branches={every_steps: 5, gigabytes: 1.0, directory: null}"
SETTINGS = {
    "causal": ["model.config.resid_pdrop=0.1", "trainer.logging_steps=3"],
    "mlm": ["model.config.hidden_dropout_prob=0.1", "++trainer.save_strategy=steps", "++trainer.save_steps=4"],
    "best": ["++trainer.load_best_model_at_end=true", "++trainer.save_strategy=epoch", "trainer.eval_strategy=epoch"],
    "linear": ["++trainer.lr_scheduler_type=linear", "hardware.per_device_batch_size=4"],
}


@pytest.fixture(scope="module", params=mark_rest_slow(SETTINGS, 1))
def trained(request, run_toy, overrides, compose_stage, tmp_path_factory):
    """Config and state chain of a training of 16 steps that kept checkpoints."""
    root = tmp_path_factory.mktemp("replayed")
    task = "mlm" if request.param == "mlm" else "causal"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LM_REPRO_CACHE", str(root / "cache"))
        run_toy("train", task, root / "outs", *SETTINGS[request.param], KEEP)
        config = compose_stage("train", *overrides("train", task, root / "outs", *SETTINGS[request.param], KEEP))
        written = read_contents(root)
        yield config, read_state_chain(root / "outs/report")
    assert read_contents(root) == written  # a replay writes nothing


def test_chain_has_a_different_link_for_each_step(trained):
    _, chain = trained
    assert len(chain) == len(set(chain)) == 16
    assert all(len(link) == 16 for link in chain)


def test_segments_between_kept_checkpoints_have_the_links_of_the_chain(trained):
    config, chain = trained
    kept = list_kept_steps(config)
    assert kept == [5, 10, 15, 16]
    for first, last in [(0, 5), (5, 10), (10, 16), (15, 16), (5, 16), (0, 1)]:
        assert replay_steps(config, first, last) == (chain[first:last], None)


@pytest.fixture
def tamper(monkeypatch, tmp_path):
    """`tamper(step, name, change)`: change a file of a kept checkpoint and its manifest, in a copy of the cache."""

    def change_file(step, name, change):
        cache = shutil.copytree(os.environ["LM_REPRO_CACHE"], tmp_path / "cache")
        monkeypatch.setenv("LM_REPRO_CACHE", str(cache))
        checkpoint = next((cache / "branches").glob(f"*-{step}-*")) / f"checkpoint-{step}"
        change(checkpoint / name)
        manifest = json.loads((checkpoint / "manifest-0.json").read_text())
        manifest[name] = compute_sha256(checkpoint / name)
        (checkpoint / "manifest-0.json").write_text(json.dumps(manifest))

    return change_file


def change_weight(file):
    weights = load_file(file)
    name = min(weights)
    changed = weights[name].clone()
    changed.view(-1)[0] = torch.nextafter(changed.view(-1)[0], torch.tensor(9.0))
    save_file({**weights, name: changed}, file, {"format": "pt"})


def swap_weights(file):
    """Exchange two elements of a weight, which leaves its checksum in the state chain the same."""
    weights = load_file(file)
    name = min(weights)
    changed = weights[name].clone()
    changed.view(-1)[:2] = changed.view(-1)[:2].flip(0)
    save_file({**weights, name: changed}, file, {"format": "pt"})


def change_optimizer(file):
    state = torch.load(file, weights_only=True)
    state["state"][0]["exp_avg"] *= 2
    torch.save(state, file)


def change_weight_decay(file):
    state = torch.load(file, weights_only=True)
    state["param_groups"][0]["weight_decay"] += 1
    torch.save(state, file)


def change_state(**values):
    def change(file):
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return change


def change_random_numbers(file):
    with safe_globals():
        state = torch.load(file, weights_only=True)
    state["cpu"] = torch.Generator().manual_seed(3).get_state()
    torch.save(state, file)


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("model.safetensors", change_weight, "the weight "),
        ("optimizer.pt", change_optimizer, "the state of the optimizer"),
        ("optimizer.pt", change_weight_decay, "the settings of the optimizer"),
        ("rng_state.pth", change_random_numbers, "the state of the random numbers"),
        ("trainer_state.json", change_state(epoch=0.5), "the epoch"),
        ("trainer_state.json", change_state(global_step=2), "the global step"),
        ("trainer_state.json", change_state(log_history=[]), "the history of losses"),
    ],
)
@pytest.mark.parametrize("trained", ["causal"], indirect=True)
def test_changed_kept_checkpoint_differs_from_the_state_at_the_end_of_the_segment_before(
    trained, tamper, name, change, expected
):
    config, chain = trained
    tamper(10, name, change)
    links, difference = replay_steps(config, 5, 10)
    assert links == chain[5:10]
    assert difference.startswith(expected)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("trainer_state.json", change_state(global_step=0)),
        ("state_chain.txt", lambda file: file.write_text("")),
    ],
)
@pytest.mark.parametrize("trained", ["causal"], indirect=True)
def test_kept_checkpoint_with_the_state_of_another_step_is_not_replayed_from(trained, tamper, name, change):
    tamper(10, name, change)
    with pytest.raises(StageError, match="checkpoint of step 10 is damaged: it has the state of another step"):
        replay_steps(trained[0], 10, 15)


@pytest.fixture
def copied(trained, tmp_path):
    """Config with a copy of the training's outs, and the state chain."""
    config, chain = trained
    shutil.copytree(Path(os.environ["LM_REPRO_CACHE"]).parent / "outs", tmp_path / "outs")
    return replace(config, out=str(tmp_path / "outs/model"), report=str(tmp_path / "outs/report")), chain


def test_trained_model_is_that_of_the_chain_and_a_changed_one_is_not(copied, tmp_path):
    config, chain = copied
    assert find_model_difference(config, chain) is None
    assert find_model_difference(config, chain[:-1]) == "the training should have 16 steps, but its state chain has 15"
    assert "it does not have the weights of step" in find_model_difference(config, ["0" * 16] * 16)
    change_weight(tmp_path / "outs/model/model.safetensors")
    assert "it does not have the weights of step" in find_model_difference(config, chain)


@pytest.mark.parametrize("trained", ["causal"], indirect=True)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
def test_changed_file_of_the_model_other_than_its_weights_is_found(copied, tmp_path, name):
    config, chain = copied
    file = tmp_path / "outs/model" / name
    file.write_text(file.read_text().replace("{", '{"x": 1,', 1))
    assert find_model_difference(config, chain) == f"{name}: not what train writes for these weights"
    file.unlink()
    if name != "config.json":  # without which there is no model
        assert find_model_difference(config, chain) == f"{name}: not what train writes for these weights"
    (tmp_path / "outs/model/more.bin").write_text("")
    if name != "config.json":
        assert "more.bin" in find_model_difference(config, chain)


@pytest.mark.parametrize("trained", ["causal"], indirect=True)
def test_training_of_fewer_steps_than_the_config_says_is_found(copied):
    config, chain = copied
    longer = replace(config, num_train_epochs=3.0)
    assert find_model_difference(longer, chain) == "the training should have 24 steps, but its ledger has 16"


def change_curve(outs, name, step, value):
    file = outs / f"report/plots/metrics/{name}.tsv"
    lines = [line.split("\t") for line in file.read_text().splitlines()]
    column = lines[0].index(file.stem)
    lines = [[value if k == column and line[0] == str(step) else cell for k, cell in enumerate(line)] for line in lines]
    file.write_text("".join("\t".join(line) + "\n" for line in lines))


@pytest.mark.parametrize("trained", ["best"], indirect=True)
def test_best_step_is_that_of_the_validation_curve_and_a_changed_curve_is_found(copied, tmp_path):
    config, chain = copied
    best = json.loads((tmp_path / "outs/report/stats.json").read_text())["best_step"]
    other = ({8, 16} - {best}).pop()
    change_curve(tmp_path / "outs", "validation/loss", other, "0.001")
    assert find_model_difference(config, chain).startswith(f"the best step of the validation curve is {other}, but")
    segment = (5, 10) if other == 8 else (10, 16)
    assert replay_steps(config, *segment).difference == f"validation/loss of step {other}"
    change_curve(tmp_path / "outs", "train/loss", 10, "0.5")
    assert replay_steps(config, 5, 10).difference is not None


@pytest.mark.parametrize("trained", ["causal", "best"], indirect=True)
def test_replay_of_the_last_segment_finds_a_changed_model_whatever_its_checksum(copied, tmp_path):
    config, chain = copied
    step = json.loads((tmp_path / "outs/report/stats.json").read_text())
    last = step["best_step"] or step["steps"]
    assert replay_steps(config, 5, last) == (chain[5:last], None)
    swap_weights(tmp_path / "outs/model/model.safetensors")
    assert find_model_difference(config, chain) is None
    assert replay_steps(config, 5, last) == (chain[5:last], "the weights of the trained model")
    if last < 16:  # inside a segment
        assert replay_steps(config, 5, 16) == (chain[5:], "the weights of the trained model")


def test_early_stop_is_that_of_the_trainer(run_toy, overrides, compose_stage, tmp_path, monkeypatch):
    monkeypatch.setenv("LM_REPRO_CACHE", str(tmp_path / "cache"))
    for number, patience in enumerate((1, 2, 30)):
        stopping = f"early_stopping={{patience: {patience}, threshold: 0.02}}"
        more = [*BEST, "learning_rate=0.3", "num_train_epochs=6", stopping]
        run_toy("train", "causal", tmp_path / str(number), *more)
        config = compose_stage("train", *overrides("train", "causal", tmp_path / str(number), *more))
        chain = read_state_chain(tmp_path / str(number) / "report")
        assert len(chain) < 48 or patience == 30
        assert find_model_difference(config, chain) is None
        assert "steps, but its state chain has" in find_model_difference(config, chain[:-8])


def test_replay_from_a_step_that_was_not_kept_is_an_error(trained):
    config, _ = trained
    with pytest.raises(StageError, match="the kept checkpoint of step 7 is missing or damaged"):
        replay_steps(config, 7, 10)


def test_changed_weight_changes_every_later_link(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.LayerNorm(5).to(torch.bfloat16))
    chain, other = StateChain(), StateChain()
    for step in range(3):
        chain.on_step_end(None, None, None, model=model)
        if step == 1:
            with torch.no_grad():
                model[0].weight[2, 1] = torch.nextafter(model[0].weight[2, 1], torch.tensor(9.0))
        other.on_step_end(None, None, None, model=model)
    assert chain.links[0] == other.links[0]
    assert chain.links[1] != other.links[1]
    assert chain.links[2] != other.links[2]
    write_state_chain(tmp_path, chain.links)
    assert read_state_chain(tmp_path) == chain.links


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (0,)])
def test_checksum_covers_every_trained_element(dtype, shape):
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype))
    model.frozen = torch.nn.Parameter(torch.zeros(2), requires_grad=False)
    before = checksum_weights(model)
    assert len(before) == (8 if model.weight.numel() else 0)
    model.frozen += 1
    assert checksum_weights(model) == before
    for index in range(model.weight.numel()):
        with torch.no_grad():
            value = model.weight.view(-1)[index].clone()
            model.weight.view(-1)[index] = value + 1
            assert checksum_weights(model) != before
            model.weight.view(-1)[index] = value
    assert checksum_weights(model) == before


def test_training_in_several_processes_or_with_keras_is_not_replayed(overrides, compose_stage, tmp_path):
    launch = "++hardware.launch={processes_per_machine: 2, machines: 1, rendezvous: null}"
    for more, message in [
        ([launch], "in several processes"),
        (["framework=keras"], "framework=keras writes no"),
        (["adapter=lora"], "with an adapter"),
    ]:
        config = compose_stage("train", *overrides("train", "causal", tmp_path, *more))
        with pytest.raises(StageError, match=message):
            list_kept_steps(config)
