"""Tests of the verification of a training by segments: their choice, the probability, and what a replay catches."""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from stages.core.errors import StageError
from tools.verify.report import describe_segments
from tools.verify.segments import (
    Segment,
    StepsReplay,
    choose_segments,
    compute_catch_probability,
    list_segments,
    verify_training,
)


class FakeTraining:
    """Training of `num_steps` steps, whose state after a step is the sum of the steps until then."""

    def __init__(self, num_steps: int, kept: Sequence[int], changed: int | None = None) -> None:
        """
        Args:
            changed: step that was changed when the chain was recorded.
        """
        self.chain, self._kept, self._changed = [], list(kept), changed
        self._checkpoints = {0: 0}
        state = 0
        for step in range(1, num_steps + 1):
            state += step + 1000 * (step == changed)
            self.chain.append(f"{state:016x}")
            self._checkpoints[step] = state
        self.replayed: list[Segment] = []
        self.model_difference: str | None = None

    def list_kept_steps(self) -> list[int]:
        return self._kept

    def replay_steps(self, first: int, last: int) -> StepsReplay:
        self.replayed.append(Segment(first, last))
        states = itertools.accumulate(range(first + 1, last + 1), initial=self._checkpoints[first])
        links = [f"{state:016x}" for state in states][1:]
        end = int(links[-1], 16)
        return StepsReplay(links, None if end == self._checkpoints[last] or last not in self._kept else "a weight")

    def find_model_difference(self) -> str | None:
        return self.model_difference


@pytest.mark.parametrize(
    ("kept", "expected"),
    [
        ([], [(0, 10)]),
        ([4], [(0, 4), (4, 10)]),
        ([4, 10], [(0, 4), (4, 10)]),
        ([10], [(0, 10)]),
        ([1, 9, 20], [(0, 1), (1, 9), (9, 10)]),
    ],
)
def test_segments_cover_each_step_once(kept: list[int], expected: list[tuple[int, int]]) -> None:
    assert list_segments(kept, 10) == expected


def test_segments_of_a_training_without_steps_are_none() -> None:
    assert list_segments([], 0) == []


def test_chosen_segments_are_distinct_ordered_and_repeated_by_the_seed() -> None:
    segments = list_segments(range(10, 100, 10), 100)
    chosen = choose_segments(segments, 4, seed=5)
    assert chosen == choose_segments(segments, 4, seed=5) == sorted(set(chosen))
    assert len(chosen) == 4
    assert len({tuple(choose_segments(segments, 4, seed)) for seed in range(20)}) > 10
    assert choose_segments(segments, 99, seed=0) == segments


def test_every_segment_is_chosen_equally_often_whatever_its_length() -> None:
    segments = list_segments([1, 2, 50], 100)
    counts = Counter(segment for seed in range(4000) for segment in choose_segments(segments, 1, seed))
    assert all(abs(counts[segment] - 1000) < 150 for segment in segments)  # 5.5 standard deviations


def enumerate_probability(num_segments: int, num_replayed: int, num_changed: int) -> float:
    """Share of all choices that include one of the first `num_changed` segments."""
    choices = list(itertools.combinations(range(num_segments), num_replayed))
    return sum(min(choice) < num_changed for choice in choices) / len(choices)


@pytest.mark.parametrize("num_changed", [1, 2, 5])
@pytest.mark.parametrize("num_replayed", [1, 2, 3, 7])
def test_probability_is_the_share_of_choices_that_include_a_changed_segment(
    num_replayed: int, num_changed: int
) -> None:
    found = compute_catch_probability(7, num_replayed, num_changed)
    assert math.isclose(found, enumerate_probability(7, num_replayed, num_changed))


def test_probability_for_one_changed_step_is_the_share_of_segments() -> None:
    assert compute_catch_probability(40, 10) == 0.25
    assert compute_catch_probability(28, 2) == 2 / 28
    assert compute_catch_probability(40, 40) == 1.0


@pytest.mark.parametrize("changed", [1, 3, 4, 5, 10])
def test_changed_step_is_caught_exactly_by_the_segment_that_contains_it(changed: int) -> None:
    training = FakeTraining(10, [3, 4, 8], changed)
    for seed in range(10):
        result = verify_training(training, training.chain, 2, seed)
        replayed = [replay.segment for replay in result.replays]
        assert result.verified == (not any(segment.first < changed <= segment.last for segment in replayed))
        differing = [replay for replay in result.replays if not replay.verified]
        assert all(replay.first_difference == changed for replay in differing)


def test_all_segments_are_replayed_if_more_are_asked_for_and_the_probability_is_one() -> None:
    training = FakeTraining(10, [3, 8])
    result = verify_training(training, training.chain, 9, seed=0)
    assert training.replayed == [(0, 3), (3, 8), (8, 10)]
    assert (result.verified, result.probability, result.num_steps_replayed) == (True, 1.0, 10)


def test_changed_link_of_the_chain_is_caught() -> None:
    training = FakeTraining(10, [5])
    chain = [*training.chain[:6], "f" * 16, *training.chain[7:]]
    result = verify_training(training, chain, 2, seed=0)
    assert [replay.first_difference for replay in result.replays] == [None, 7]


def test_chain_that_is_shorter_than_the_training_is_caught() -> None:
    training = FakeTraining(10, [5])
    result = verify_training(training, training.chain[:8], 2, seed=0)
    assert not result.verified or result.num_steps == 8  # the model is then not that of the chain: next test


def test_model_that_is_not_that_of_the_chain_is_caught_by_any_choice() -> None:
    training = FakeTraining(10, [5])
    training.model_difference = "it does not have the weights of step 10"
    result = verify_training(training, training.chain, 1, seed=0)
    assert not result.verified
    assert "  trained model: DIFFERS: it does not have the weights of step 10" in list(describe_segments(result))


def test_changed_checkpoint_between_two_segments_is_caught_by_the_state_at_the_end_of_the_first() -> None:
    training = FakeTraining(10, [5])
    training._checkpoints[5] += 7  # and the steps after it were trained from the changed one
    training.chain[5:] = training.replay_steps(5, 10).links
    result = verify_training(training, training.chain, 2, seed=0)
    assert [(replay.first_difference, replay.difference) for replay in result.replays] == [
        (None, "a weight"),
        (None, None),
    ]
    assert not result.verified


def test_segment_that_cannot_be_replayed_is_not_verified_and_the_others_are(monkeypatch: Any) -> None:
    training = FakeTraining(10, [5])
    replay = training.replay_steps

    def fail_in_first(first: int, last: int) -> StepsReplay:
        if first == 0:
            raise StageError("the kept checkpoint is damaged")
        return replay(first, last)

    monkeypatch.setattr(training, "replay_steps", fail_in_first)
    result = verify_training(training, training.chain, 2, seed=0)
    assert [(found.problem, found.verified) for found in result.replays] == [
        ("the kept checkpoint is damaged", False),
        ("", True),
    ]
    assert not result.verified
    assert (result.probability, result.num_steps_replayed) == (0.5, 5)


def test_report_of_segments_states_probability_seed_and_steps() -> None:
    training = FakeTraining(100, [10, 20, 30], changed=25)
    result = verify_training(training, training.chain, 4, seed=77)
    lines = list(describe_segments(result))
    assert lines == [
        "replayed 4 of 4 segments (seed 77), 100 of 100 steps:",
        "  steps 1 to 10: same weights after every step",
        "  steps 11 to 20: same weights after every step",
        "  steps 21 to 30: DIFFERS from step 25 on",
        "  steps 31 to 100: same weights after every step",
        "a change of one step would have been caught with a probability of 100.0%"
        " (4 / 4: each segment was equally likely to be chosen)",
    ]
