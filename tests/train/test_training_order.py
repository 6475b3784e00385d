"""Inputs of the Trainer: the order of the blocks and their masks, for any batch size and after a resumption."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toys import (
    VOCABULARIES,
    draw_text_ids,
    make_objective_config,
    make_toy_blocks,
    make_toy_model,
    make_toy_objective,
    make_toy_trainer,
    save_blocks,
)
from transformers import TrainerCallback

from stages.model.masking import IGNORED, mask_blocks
from stages.model.objectives import make_objective
from stages.tokens.vocabulary import Vocabulary
from stages.train.training import EpochSampler, TrainingBlocks

NUM_BLOCKS, BLOCK_SIZE = 16, 24


@given(
    num_blocks=st.integers(1, 200),
    seed=st.integers(0, 2**32 - 1),
    epoch=st.integers(0, 1000),
    at_once=st.integers(1, 9),
)
def test_epoch_sampler_of_any_epoch_is_a_permutation_of_that_epochs_keys(num_blocks, seed, epoch, at_once):
    sampler = EpochSampler(num_blocks, seed, at_once)
    sampler.set_epoch(epoch)
    keys, epochs = list(sampler), range(epoch * num_blocks, (epoch + 1) * num_blocks)
    assert sorted(keys[:num_blocks]) == list(epochs)
    assert len(keys) == len(sampler) == math.ceil(num_blocks / at_once) * at_once
    assert all(key < 0 and ~key in epochs for key in keys[num_blocks:])


@pytest.mark.parametrize(("seed", "epoch"), [(0, 1), (1, 0), (2**32 - 1, 0)])
def test_epoch_sampler_of_another_epoch_or_seed_gives_another_order(seed, epoch):
    first, other = EpochSampler(50, 0, 1), EpochSampler(50, seed, 1)
    other.set_epoch(epoch)
    assert [key % 50 for key in first] != [key % 50 for key in other]


def test_epoch_sampler_of_an_epoch_does_not_depend_on_those_before():
    walked, fresh = EpochSampler(50, 0, 1), EpochSampler(50, 0, 1)
    list(walked)
    walked.set_epoch(1)
    list(walked)
    walked.set_epoch(2)
    fresh.set_epoch(2)
    assert list(walked) == list(fresh)


def test_training_blocks_of_a_key_is_the_block_with_its_epochs_masks(tmp_path):
    blocks, vocabulary, config = (
        make_toy_blocks(tmp_path, "mlm", 5, BLOCK_SIZE),
        VOCABULARIES["mlm"],
        make_objective_config("mlm"),
    )
    dataset = TrainingBlocks(blocks, make_objective("mlm", vocabulary, config), seed=9)
    batch = dataset.__getitems__([3 * 5 + 4, 3 * 5 + 0])
    input_ids, labels = mask_blocks(blocks[[4, 0]], [4, 0], vocabulary, config, 9, 3)
    assert batch["input_ids"].tolist() == input_ids.tolist()
    assert batch["labels"].tolist() == labels.tolist()


@pytest.mark.parametrize("task", ["causal", "mlm"])
@pytest.mark.parametrize(("keys", "real"), [([7, 9, ~5, ~5], 2), ([~8, ~8], 0)])
def test_training_blocks_of_keys_that_fill_up_predict_nothing(tmp_path, task, keys, real):
    blocks = make_toy_blocks(tmp_path, task, 5, BLOCK_SIZE)
    objective = make_objective(task, VOCABULARIES[task], make_objective_config(task, isolate_documents=True))
    dataset = TrainingBlocks(blocks, objective, 9)
    filled, whole = dataset.__getitems__(keys), dataset.__getitems__([max(key, ~key) for key in keys])
    assert all(torch.equal(filled[name], value) for name, value in whole.items() if name != "labels")
    assert torch.equal(filled["labels"][:real], whole["labels"][:real])
    assert (filled["labels"][real:] == IGNORED).all() and not (whole["labels"][real:] == IGNORED).all()


# -- batches of the Trainer's own loader -------------------------------------------------------------------------------


def loaded_batches(directory, batch_size, num_workers, num_epochs=2):
    """Batches of the Trainer's loader for task mlm, epoch by epoch, as (input_ids, labels)."""
    model = make_toy_model("roberta")
    blocks = make_toy_blocks(directory / f"blocks-{batch_size}-{num_workers}", "mlm", 10, BLOCK_SIZE)
    trainer = make_toy_trainer(
        directory,
        model,
        make_toy_objective(model),
        blocks,
        per_device_train_batch_size=batch_size,
        dataloader_num_workers=num_workers,
    )
    loader, epochs = trainer.get_train_dataloader(), []
    for epoch in range(num_epochs):
        loader.set_epoch(epoch)
        epochs.append([(batch["input_ids"].tolist(), batch["labels"].tolist()) for batch in loader])
    return epochs


def test_train_dataloader_with_workers_gives_the_same_batches(tmp_path):
    alone = loaded_batches(tmp_path, 4, 0)
    assert [len(epoch) for epoch in alone] == [3, 3]
    assert loaded_batches(tmp_path, 4, 2) == alone


def test_train_dataloader_with_another_batch_size_gives_the_same_rows_in_the_same_order(tmp_path):
    def rows(batch_size):
        epochs = loaded_batches(tmp_path, batch_size, 0)
        filled = [IGNORED] * BLOCK_SIZE
        return [[row for batch in epoch for row in zip(*batch, strict=True) if row[1] != filled] for epoch in epochs]

    assert rows(10) == rows(3)


# The first token identifies a masked block: it is a control token, which is never chosen.
NUMBERED = Vocabulary(
    size=50,
    special=VOCABULARIES["mlm"].special,
    prefix=[0],
    suffix=list(range(30, 30 + NUM_BLOCKS)),
    lead=[],
)


def trained_masks(directory, batch_size, seed=3, resume=False, **arguments):
    """Map (epoch, block) to the model's inputs in two epochs, masked or not; and the order of these pairs."""
    ids = np.stack([draw_text_ids(BLOCK_SIZE, seed) % 20 + 5 for seed in range(NUM_BLOCKS)])
    ids[:, 0] = 30 + np.arange(NUM_BLOCKS)
    blocks, model = save_blocks(directory / "blocks", ids), make_toy_model("roberta")
    seen = []

    def record(_, args, inputs):
        if model.training:
            epoch = int(trainer.state.epoch or 0)
            seen.extend(((epoch, row[0] - 30), tuple(row)) for row in inputs["input_ids"].tolist())

    model.register_forward_pre_hook(record, with_kwargs=True)
    objective = make_objective("mlm", NUMBERED, make_objective_config("mlm", mlm_probability=0.4), model)
    trainer = make_toy_trainer(
        directory,
        model,
        objective,
        blocks,
        per_device_train_batch_size=batch_size,
        num_train_epochs=2,
        seed=seed,
        **arguments,
    )
    trainer.train(resume_from_checkpoint=resume or None)
    return dict(seen), list(dict.fromkeys(key for key, _ in seen))  # filler rows repeat the first row of the epoch


@pytest.fixture(scope="module")
def masks(tmp_path_factory):
    return trained_masks(tmp_path_factory.mktemp("masks"), 16)


def test_training_masks_cover_each_block_once_an_epoch_in_a_new_order(masks):
    by_block, order = masks
    first, second = order[:NUM_BLOCKS], order[NUM_BLOCKS:]
    assert sorted(first) == [(0, block) for block in range(NUM_BLOCKS)]
    assert sorted(second) == [(1, block) for block in range(NUM_BLOCKS)]
    assert [block for _, block in first] != [block for _, block in second]
    assert all(by_block[0, block] != by_block[1, block] for block in range(NUM_BLOCKS))


@pytest.mark.parametrize(
    "arguments",
    [
        {"batch_size": 4, "gradient_accumulation_steps": 4},
        {"batch_size": 8, "dataloader_num_workers": 2},
        {"batch_size": 3},
    ],
    ids=["accumulated", "workers", "uneven"],
)
def test_training_masks_of_a_block_in_an_epoch_are_equal_however_batched(masks, tmp_path, arguments):
    assert trained_masks(tmp_path, **arguments) == masks


def test_training_masks_with_another_seed_differ(masks, tmp_path):
    other, _ = trained_masks(tmp_path, 16, seed=4)
    assert all(other[key] != mask for key, mask in masks[0].items())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_resumed_inside_an_epoch_goes_on_with_the_same_blocks_and_masks(masks, tmp_path, num_workers):
    whole, order = masks
    arguments = {"save_strategy": "steps", "save_steps": 3, "dataloader_num_workers": num_workers}
    trained_masks(tmp_path, 4, max_steps=3, **arguments)
    rest, rest_order = trained_masks(tmp_path, 4, resume=True, **arguments)
    assert rest_order == order[3 * 4 :]
    assert rest == {key: whole[key] for key in rest_order}


def test_training_resumed_inside_an_epoch_ends_with_the_same_weights(tmp_path):
    def weights(directory, **arguments):
        model = make_toy_model("gpt2", resid_pdrop=0.1)
        blocks = make_toy_blocks(directory / "blocks", "causal", NUM_BLOCKS, BLOCK_SIZE)
        resume = arguments.pop("resume", None)
        common = {"per_device_train_batch_size": 4, "max_steps": 6, "learning_rate": 0.01, "save_steps": 3}
        arguments = {**common, "save_strategy": "steps", "callbacks": [], **arguments}
        make_toy_trainer(directory, model, make_toy_objective(model), blocks, **arguments).train(
            resume_from_checkpoint=resume
        )
        return model.state_dict()

    straight = weights(tmp_path / "straight")
    weights(tmp_path / "killed", callbacks=[StopAt(3)])
    resumed = weights(tmp_path / "killed", resume=True)
    assert all(torch.equal(resumed[name], value) for name, value in straight.items())


class StopAt(TrainerCallback):
    def __init__(self, step):
        self._step = step

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step == self._step
