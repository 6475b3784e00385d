"""Verification of a training by replaying random segments of its steps between kept checkpoints.

train writes a hash chain: one line per step, a hash of the previous line and of the trained weights after the step. A
segment (first, last] is replayed from the checkpoint of step `first`, and its lines are compared with those of the
chain. A step that was changed, in the training or in a checkpoint, gives another line in its segment.
"""

import math
import random
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

from stages.core.errors import StageError


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
    first_difference: int | None
    """First step whose line differs from the chain; None if all lines are equal."""
    problem: str = ""
    """Why the segment could not be replayed; the empty string if it was."""

    @property
    def verified(self) -> bool:
        return self.first_difference is None and not self.problem


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

    @property
    def verified(self) -> bool:
        return not self.problem and all(replay.verified for replay in self.replays)

    @property
    def num_steps_replayed(self) -> int:
        return sum(replay.segment.num_steps for replay in self.replays)

    @property
    def probability(self) -> float:
        """Probability with which a change of one step would have been caught, whichever step it was."""
        return compute_catch_probability(len(self.segments), len(self.replays)) if self.segments else 0.0


class Training(Protocol):
    """A training whose steps can be replayed."""

    def list_kept_steps(self) -> list[int]:
        """Return the steps whose checkpoints were kept, in ascending order."""

    def replay_steps(self, first: int, last: int) -> list[str]:
        """Replay the steps first + 1 to last, from the checkpoint of step `first`; return their lines of the chain."""


def list_segments(kept_steps: Sequence[int], num_steps: int) -> list[Segment]:
    """Return the segments between consecutive kept checkpoints, including the start and the end of the training."""
    inner = {step for step in kept_steps if 0 < step < num_steps}
    return [Segment(first, last) for first, last in pairwise(sorted({0, num_steps} | inner))] if num_steps else []


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
    missed = math.comb(num_segments - num_changed, num_replayed) / math.comb(num_segments, num_replayed)
    return 1.0 - missed


def replay_segments(training: Training, chain: Sequence[str], segments: Sequence[Segment]) -> Iterator[SegmentReplay]:
    """Replay segments, and compare each with the chain.

    Args:
        chain: lines of the chain, one per step.
        segments: the segments to replay.
    """
    for segment in segments:
        claimed = chain[segment.first : segment.last]
        try:
            lines = training.replay_steps(segment.first, segment.last)
        except StageError as error:
            yield SegmentReplay(segment, None, str(error))
            continue
        if len(lines) != len(claimed):
            yield SegmentReplay(segment, None, f"its replay has {len(lines):,} steps, the chain {len(claimed):,}")
            continue
        different = (number for number, pair in enumerate(zip(claimed, lines, strict=True)) if pair[0] != pair[1])
        first = next(different, None)
        yield SegmentReplay(segment, None if first is None else segment.first + 1 + first)


def verify_training(training: Training, chain: Sequence[str], number: int, seed: int) -> SegmentsResult:
    """Replay random segments of a training, and compare them with its chain.

    Args:
        chain: lines of the chain, one per step.
        number: number of segments to replay; all of them if there are fewer.
        seed: seed of the choice of segments.
    """
    started = time.monotonic()
    segments = list_segments(training.list_kept_steps(), len(chain))
    if not segments:
        return SegmentsResult(0, [], seed, [], 0.0, "its chain has no steps")
    replays = list(replay_segments(training, chain, choose_segments(segments, number, seed)))
    return SegmentsResult(len(chain), segments, seed, replays, time.monotonic() - started)
