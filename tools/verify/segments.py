"""Verification of a training by replaying random segments of its steps between kept checkpoints.

train writes a state chain: a link per step, which is a hash of the previous link and of the trained weights after the
step. A segment (first, last] is replayed from the checkpoint of step `first`. Its links are compared with those of the
chain, and its state after step `last` with the checkpoint of this step, from which the next segment starts. So each
change of a step, or of a checkpoint, belongs to one segment, whose replay reveals it.
"""

import itertools
import math
import random
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from stages.core.errors import StageError


class StepsReplay(NamedTuple):
    """Result of `Training.replay_steps`."""

    links: list[str]
    """Links of the replayed steps."""
    difference: str | None
    """What differs besides the links: a part of the state after the last step, of the curves, or of the trained model;
    None if nothing does."""


class Segment(NamedTuple):
    """Steps first + 1 to last of a training, which starts from the checkpoint of step `first`; 0 is the start."""

    first: int
    last: int

    @property
    def num_steps(self) -> int:
        return self.last - self.first

    def __str__(self) -> str:
        return f"steps {self.first + 1:,} to {self.last:,}"


class SegmentReplay(NamedTuple):
    """Result of the replay of a segment."""

    segment: Segment
    first_difference: int | None = None
    """First step whose link differs from the chain; None if all links are equal."""
    difference: str | None = None
    """What differs besides the links, as in StepsReplay; None if nothing does."""
    problem: str = ""
    """Why the segment could not be replayed; the empty string if it was."""

    @property
    def differs(self) -> bool:
        return self.first_difference is not None or self.difference is not None

    @property
    def verified(self) -> bool:
        return not self.differs and not self.problem


class SegmentsResult(NamedTuple):
    """Result of the verification of a training by segments."""

    num_steps: int
    """Number of steps of the training."""
    segments: list[Segment]
    """All segments between kept checkpoints."""
    seed: int
    """Seed of the choice of segments."""
    replays: list[SegmentReplay]
    """Replays of the chosen segments."""
    seconds: float
    problem: str = ""
    """Why no segment could be replayed; the empty string if some were."""
    model_difference: str | None = None
    """Why the trained model is not that of the chain; None if it is."""
    is_seed_given: bool = False
    """True if the seed was given with --seed, so that it may have been known before a step was changed."""

    @property
    def differs(self) -> bool:
        """True if a replay differs from the chain or from a checkpoint, or the trained model from the chain."""
        return self.model_difference is not None or any(replay.differs for replay in self.replays)

    @property
    def verified(self) -> bool:
        return not self.problem and not self.differs and all(replay.verified for replay in self.replays)

    @property
    def num_replayed(self) -> int:
        """Number of segments that were replayed, without those that could not be."""
        return sum(not replay.problem for replay in self.replays)

    @property
    def num_steps_replayed(self) -> int:
        return sum(replay.segment.num_steps for replay in self.replays if not replay.problem)

    @property
    def probability(self) -> float:
        """Probability with which a change of one step would have been caught, whichever step it was."""
        return compute_catch_probability(len(self.segments), self.num_replayed) if self.segments else 0.0


class Training(Protocol):
    """A training whose steps can be replayed."""

    def list_kept_steps(self) -> list[int]:
        """Return the steps whose checkpoints were kept, in ascending order."""

    def replay_steps(self, first: int, last: int) -> StepsReplay:
        """Replay the steps first + 1 to last, from the checkpoint of step `first`."""

    def find_model_difference(self) -> str | None:
        """Describe why the trained model is not that of the chain; None if it is."""


def list_segments(kept_steps: Sequence[int], num_steps: int) -> list[Segment]:
    """Return the segments between consecutive kept checkpoints, including the start and the end of the training."""
    ends = {0, num_steps, *(step for step in kept_steps if 0 < step < num_steps)}
    return [Segment(first, last) for first, last in itertools.pairwise(sorted(ends))]


def choose_segments(segments: Sequence[Segment], number: int, seed: int) -> list[Segment]:
    """Choose segments uniformly without replacement, and return them in order.

    Every segment has the same chance whatever its length, so that no step is less likely to be replayed than another.

    Args:
        number: number of segments; all of them if there are fewer.
        seed: seed of the choice. Whoever might change a step must not know it beforehand.
    """
    return sorted(random.Random(seed).sample(segments, min(number, len(segments))))


def compute_catch_probability(num_segments: int, num_replayed: int, num_changed: int = 1) -> float:
    """Compute the probability that a random choice of segments includes a changed one.

    The number of changed segments among those chosen is hypergeometric: 1 - C(S - c, N) / C(S, N) for N of S segments,
    of which c are changed. For a single one this is N / S, wherever the changed step is.

    Args:
        num_segments: number of segments, S.
        num_replayed: number of segments that are replayed, N.
        num_changed: number of segments with a changed step, c.
    """
    num_choices = math.comb(num_segments, num_replayed)
    return (num_choices - math.comb(num_segments - num_changed, num_replayed)) / num_choices


def replay_segments(training: Training, chain: Sequence[str], segments: Sequence[Segment]) -> Iterator[SegmentReplay]:
    """Replay segments, and compare each with the chain.

    Args:
        chain: links of all steps.
        segments: the segments to replay.
    """
    for segment in segments:
        claimed = chain[segment.first : segment.last]
        try:
            replay = training.replay_steps(segment.first, segment.last)
        except StageError as error:
            yield SegmentReplay(segment, problem=str(error))
            continue
        pairs = itertools.zip_longest(claimed, replay.links)
        first = next((number for number, (old, new) in enumerate(pairs, segment.first + 1) if old != new), None)
        yield SegmentReplay(segment, first, replay.difference)


def verify_training(training: Training, chain: Sequence[str], number: int, seed: int) -> SegmentsResult:
    """Replay random segments of a training, and compare them with its chain.

    Args:
        chain: links of all steps.
        number: number of segments to replay; all of them if there are fewer.
        seed: seed of the choice of segments.
    """
    started = time.monotonic()
    segments = list_segments(training.list_kept_steps(), len(chain))
    if not segments:
        return SegmentsResult(0, [], seed, [], 0.0, "its chain has no steps")
    replays = list(replay_segments(training, chain, choose_segments(segments, number, seed)))
    difference = training.find_model_difference()
    return SegmentsResult(len(chain), segments, seed, replays, time.monotonic() - started, "", difference)
