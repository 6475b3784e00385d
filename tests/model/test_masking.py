"""Masks of masked language modeling: a function of (seed, epoch, block), with the rates of the config."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toys import CLS, MASK, MASKED, SEP, VOCAB_SIZE, make_objective_config

from stages.core.random_numbers import draw_uint64, draw_uint64_at, mix_bits
from stages.model.masking import EVALUATION_EPOCH, EVALUATION_SEED, IGNORED, mask_blocks

NUM_BLOCKS, BLOCK_SIZE, TOKEN = 400, 128, 7
CONFIG = make_objective_config("mlm")


def masked(blocks, indices=None, seed=42, epoch=0, **config):
    indices = np.arange(len(blocks)) if indices is None else indices
    return mask_blocks(blocks, indices, MASKED, make_objective_config("mlm", **config), seed, epoch)


def equal_blocks(num_blocks=NUM_BLOCKS):
    """Blocks of one repeated text token, so that only the masks differ."""
    return np.full((num_blocks, BLOCK_SIZE), TOKEN, np.uint16)


def chi_square(observed, expected):
    observed, expected = np.asarray(observed, float), np.asarray(expected, float)
    return float(((observed - expected) ** 2 / expected).sum())


def chi_square_limit(freedom):
    """Value that chi-square exceeds with probability 0.001 (Wilson and Hilferty 1931)."""
    return freedom * (1 - 2 / (9 * freedom) + 3.0902 * math.sqrt(2 / (9 * freedom))) ** 3


def test_mix_of_reference_seed_gives_splitmix64s_published_outputs():
    # Outputs of the reference implementation for seed 1234567 (rosettacode.org/wiki/Pseudo-random_numbers/Splitmix64).
    with np.errstate(over="ignore"):
        states = np.uint64(1234567) + np.uint64(0x9E3779B97F4A7C15) * np.arange(1, 6, dtype=np.uint64)
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert mix_bits(states).tolist() == published


def splitmix64(state):
    """The output function of SplitMix64, in Python's integers."""
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
    return state ^ (state >> 31)


@pytest.mark.parametrize(("seed", "epoch", "block"), [(42, 3, 0), (42, 3, 7), (2**32 - 1, EVALUATION_EPOCH, 2**40)])
def test_random_uint64_is_a_splitmix64_sequence_keyed_by_seed_epoch_and_block(seed, epoch, block):
    # Another generator would be as random, but would change the masks of all experiments.
    gamma = 0x9E3779B97F4A7C15
    state = splitmix64((splitmix64((splitmix64(seed) + epoch) % 2**64) + gamma + block) % 2**64)
    expected = [splitmix64((state + gamma * draw) % 2**64) for draw in (1, 2, 3)]
    assert draw_uint64(seed, epoch, [block], 3)[0].tolist() == expected


@given(
    seed=st.integers(0, 2**32 - 1),
    epoch=st.integers(0, EVALUATION_EPOCH),
    indices=st.lists(st.integers(0, 2**40), min_size=1, max_size=8),
)
def test_random_uint64_of_blocks_in_any_company_is_that_of_each_alone(seed, epoch, indices):
    together = draw_uint64(seed, epoch, indices, 6)
    alone = np.concatenate([draw_uint64(seed, epoch, [index], 6) for index in indices])
    assert (together == alone).all()


def test_random_uint64_of_a_longer_row_begins_like_a_shorter_one():
    assert (draw_uint64(1, 2, [3, 4], 30)[:, :9] == draw_uint64(1, 2, [3, 4], 9)).all()


def test_random_uint64_at_places_is_what_stands_there_in_the_rows():
    rows, columns = [2, 0, 0, 1], [5, 0, 11, 5]
    numbers = draw_uint64(1, 2, [30, 40, 2**40], 12)[rows, columns]
    assert (draw_uint64_at(1, 2, np.array([30, 40, 2**40])[rows], columns) == numbers).all()


@pytest.mark.parametrize("epoch", [3, EVALUATION_EPOCH])
def test_mask_blocks_takes_three_draws_a_position_for_choice_replacement_and_token(epoch):
    # Another assignment would be as random, but would change the masks of all experiments.
    blocks, indices = np.random.default_rng(2).integers(0, VOCAB_SIZE, (5, 40)), [7, 3, 0, 9, 2]
    choose, replace, token = (draw_uint64(42, epoch, indices, 3 * 40)[:, part::3] / 2**64 for part in range(3))
    chosen = (choose < 0.15) & ~np.isin(blocks, MASKED.control_ids)
    words = MASKED.ordinary_ids[(token * len(MASKED.ordinary_ids)).astype(int)]
    expected = np.where(replace < 0.8, MASK, np.where(replace < 0.9, words, blocks))
    input_ids, labels = masked(blocks.astype(np.uint16), indices, 42, epoch)
    assert chosen.sum() > 10
    assert (input_ids == np.where(chosen, expected, blocks)).all()
    assert (labels == np.where(chosen, blocks, IGNORED)).all()


@pytest.mark.parametrize(
    ("seed", "epoch", "block"), [(43, 0, 0), (42, 1, 0), (42, 0, 1), (42, EVALUATION_EPOCH, 0), (2**32 - 1, 0, 0)]
)
def test_mask_blocks_of_another_seed_epoch_or_block_differ(seed, epoch, block):
    one = masked(equal_blocks(1), [0], 42, 0)[1]
    other = masked(equal_blocks(1), [block], seed, epoch)[1]
    assert (one != other).any()


def test_mask_blocks_of_all_seeds_epochs_and_blocks_are_distinct():
    masks = {
        masked(equal_blocks(20), range(20), seed, epoch)[1][block].tobytes()
        for seed in range(5)
        for epoch in range(5)
        for block in range(20)
    }
    assert len(masks) == 5 * 5 * 20


@pytest.mark.parametrize("order", [[2, 0, 1], [1], [1, 1], [2, 1]])
def test_mask_blocks_in_any_order_and_number_masks_each_the_same(order):
    blocks = np.random.default_rng(0).integers(5, VOCAB_SIZE, (3, BLOCK_SIZE)).astype(np.uint16)
    whole, some = masked(blocks), masked(blocks[order], order)
    assert all((part == full[order]).all() for full, part in zip(whole, some, strict=True))


def test_mask_blocks_chooses_fifteen_percent_by_chi_square():
    chosen = int((masked(equal_blocks())[1] != IGNORED).sum())
    total = NUM_BLOCKS * BLOCK_SIZE
    assert chi_square([chosen, total - chosen], [0.15 * total, 0.85 * total]) < chi_square_limit(1)


@pytest.mark.parametrize("axis", [0, 1])
def test_mask_blocks_chooses_evenly_over_positions_and_blocks_by_chi_square(axis):
    chosen = (masked(equal_blocks())[1] != IGNORED).sum(axis=axis)
    number = (NUM_BLOCKS, BLOCK_SIZE)[axis]
    statistic = chi_square([chosen, number - chosen], [[0.15 * number], [0.85 * number]])
    assert statistic < chi_square_limit(len(chosen))


def test_mask_blocks_replaces_eighty_ten_ten_by_chi_square():
    input_ids, labels = masked(equal_blocks())
    chosen = input_ids[labels != IGNORED]
    # A random token may be any ordinary token, also the original one.
    number = len(MASKED.ordinary_ids)
    counts = [(chosen == MASK).sum(), (chosen == TOKEN).sum(), ((chosen != MASK) & (chosen != TOKEN)).sum()]
    rates = np.array([0.8, 0.1 + 0.1 / number, 0.1 * (number - 1) / number])
    assert chi_square(counts, rates * len(chosen)) < chi_square_limit(2)


def test_mask_blocks_draws_random_tokens_evenly_over_the_ordinary_tokens_by_chi_square():
    input_ids, labels = masked(equal_blocks(), mask_replace_prob=0.0, random_replace_prob=1.0)
    counts = np.bincount(input_ids[labels != IGNORED], minlength=VOCAB_SIZE)
    special = [*MASKED.special.values(), *MASKED.control_ids]
    assert counts[special].sum() == 0
    drawn = np.delete(counts, special)
    assert chi_square(drawn, [drawn.sum() / len(drawn)] * len(drawn)) < chi_square_limit(len(drawn) - 1)


def test_mask_blocks_leaves_unchosen_tokens_and_labels_chosen_ones_with_themselves():
    blocks = np.random.default_rng(1).integers(0, VOCAB_SIZE, (50, BLOCK_SIZE)).astype(np.uint16)
    before = blocks.copy()
    input_ids, labels = masked(blocks)
    assert (input_ids == blocks)[labels == IGNORED].all()
    assert (labels == blocks)[labels != IGNORED].all()
    assert (blocks == before).all()


@pytest.mark.parametrize(
    "trained_with", [{"mlm_probability": 0.4}, {"mask_replace_prob": 0.5, "random_replace_prob": 0.5}]
)
def test_mask_blocks_of_evaluation_are_the_same_whatever_training_masks(trained_with):
    blocks = equal_blocks()
    ours, labels = masked(blocks, None, EVALUATION_SEED, EVALUATION_EPOCH, **trained_with)
    expected, expected_labels = masked(blocks, None, EVALUATION_SEED, EVALUATION_EPOCH)
    assert (ours == expected).all() and (labels == expected_labels).all()
    assert (labels != IGNORED).mean() == pytest.approx(0.15, abs=0.01)
    assert (
        masked(blocks, None, EVALUATION_SEED, 0, **trained_with)[0] != masked(blocks, None, EVALUATION_SEED, 0)[0]
    ).any()


@given(seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 100))
def test_mask_blocks_with_control_tokens_never_chooses_them(seed, epoch):
    blocks = np.random.default_rng(seed).integers(0, VOCAB_SIZE, (4, 32)).astype(np.uint16)
    blocks[:, [0, 9, 31]], blocks[:, 8] = CLS, SEP
    input_ids, labels = masked(blocks, None, seed, epoch, mlm_probability=0.999)
    control = (blocks == CLS) | (blocks == SEP)
    assert (labels[control] == IGNORED).all()
    assert (input_ids[control] == blocks[control]).all()
    assert (labels[~control] != IGNORED).mean() > 0.9


@pytest.mark.parametrize(
    ("mask", "random", "least_masked", "most_masked", "least_same", "most_same"),
    [(1.0, 0.0, 1.0, 1.0, 0.0, 0.0), (0.0, 0.0, 0.0, 0.0, 1.0, 1.0), (0.0, 1.0, 0.0, 0.0, 0.01, 0.04)],
)
def test_mask_blocks_with_a_share_of_one_replaces_all_chosen_so(
    mask, random, least_masked, most_masked, least_same, most_same
):
    input_ids, labels = masked(equal_blocks(), mask_replace_prob=mask, random_replace_prob=random)
    chosen = input_ids[labels != IGNORED]
    assert least_masked <= (chosen == MASK).mean() <= most_masked
    assert least_same <= (chosen == TOKEN).mean() <= most_same
