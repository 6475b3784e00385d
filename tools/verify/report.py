"""Report and statement of a verification."""

import hashlib
import platform
from collections.abc import Iterator
from datetime import datetime
from typing import Any, NamedTuple

from stages.core.artifacts import get_versions
from stages.core.errors import printable
from stages.train.checkpoints import LIBRARIES
from tools.verify.compare import Difference, MetricChange
from tools.verify.segments import SegmentReplay, SegmentsResult
from tools.verify.stages import StageResult, Verdict
from tools.verify.statement import build_statement

_MAX_SHOWN = 8  # differences of a stage; further ones are counted


class Verification(NamedTuple):
    """Result of the verification of a commit."""

    commit: str
    lock: str
    """Text of its dvc.lock."""
    stages: list[StageResult]
    missing_inputs: list[str]
    """Inputs that no stage writes and that were not found, each with the reason."""
    environment_differences: list[str]
    """Differences of this environment from the one that made the artifacts: versions of libraries, processor."""
    started: datetime
    finished: datetime

    @property
    def verified(self) -> bool:
        return all(stage.verdict is Verdict.VERIFIED for stage in self.stages)


def describe_verification(verification: Verification) -> Iterator[str]:
    """Yield the lines of the report."""
    stages = verification.stages
    num_verified = sum(stage.verdict is Verdict.VERIFIED for stage in stages)
    seconds = (verification.finished - verification.started).total_seconds()
    yield (
        f"commit {verification.commit[:7]}: {num_verified} of {len(stages)} stages verified,"
        f" in {format_duration(seconds)}"
    )
    yield ""
    width = max(len(stage.name) for stage in stages)
    for stage in stages:
        verdict = stage.verdict.value if stage.verdict is Verdict.VERIFIED else stage.verdict.value.upper()
        yield f"  {printable(stage.name):{width}}  {verdict:12}  {format_duration(stage.seconds):>8}"
        if stage.problem:
            yield f"      {stage.problem}"
        for difference in stage.differences[:_MAX_SHOWN]:
            yield f"      {describe_difference(difference)}"
        if (num_hidden := len(stage.differences) - _MAX_SHOWN) > 0:
            yield f"      and {num_hidden} more differences, which are in the statement"
        if stage.metric_changes:
            yield f"      {describe_metric_changes(stage.metric_changes)}"
        if stage.segments is not None and not stage.problem:
            yield from (f"      {line}" for line in describe_segments(stage.segments))
    if explanation := list(explain_differences(verification)):
        yield from ["", *explanation]


def describe_difference(difference: Difference) -> str:
    """Describe a difference in one line."""
    kind = {"cmd": "command", "git": "in git", "copy": "on this machine"}.get(difference.kind, difference.kind)
    return (
        f"{kind}: {printable(difference.path)}{': ' if difference.path else ''}{printable(difference.description, 400)}"
    )


def describe_metric_changes(changes: list[MetricChange]) -> str:
    """Describe the largest of the differences between numbers."""
    largest = max(changes, key=lambda change: change.relative)
    number = "1 number differs" if len(changes) == 1 else f"{len(changes)} numbers differ, the most"
    return (
        f"{number} by {largest.relative:.1g} of its value: {printable(largest.path)}, {printable(largest.key)}:"
        f" {largest.claimed!r} -> {largest.replayed!r}"
    )


def describe_segments(result: SegmentsResult) -> Iterator[str]:
    """Yield the lines about a training that was verified by segments."""
    num_segments = len(result.segments)
    yield (
        f"replayed {result.num_replayed} of {num_segments} segments (seed {result.seed}),"
        f" {result.num_steps_replayed:,} of {result.num_steps:,} steps:"
    )
    for replay in result.replays:
        yield f"  {replay.segment}: {describe_segment(replay)}"
    if result.model_difference is not None:
        yield f"  trained model: DIFFERS: {printable(result.model_difference)}"
    yield (
        f"a change of one step would have been caught with a probability of {result.probability:.1%}"
        f" ({result.num_replayed} / {num_segments}: each segment was equally likely to be chosen)"
        + (", if the given seed was not known before" if result.is_seed_given else "")
    )


def describe_segment(replay: SegmentReplay) -> str:
    """Describe the result of one replayed segment."""
    if replay.problem:
        return f"NOT REPLAYED: {printable(replay.problem, 400)}"
    if replay.first_difference is not None:
        return f"DIFFERS from step {replay.first_difference:,} on"
    if replay.difference is not None:
        return f"DIFFERS: {printable(replay.difference)}"
    return "same weights after every step"


def explain_differences(verification: Verification) -> Iterator[str]:
    """Yield what the differences may mean, and what to do."""
    differences = [(stage, difference) for stage in verification.stages for difference in stage.differences]
    kinds = {difference.kind for _, difference in differences}
    if "copy" in kinds:
        yield "On this machine, files are not what dvc.lock says. `dvc checkout --force` restores those of the"
        yield "workspace; remove damaged files of DVC's cache, then `dvc pull` or `dvc repro`."
    outs = tuple(f"{path}/" for stage in verification.stages for path in stage.outs)
    written = {difference.path for _, difference in differences if f"{difference.path}/".startswith(outs)}
    if any(
        difference.kind in ("cmd", "params") or (difference.kind == "deps" and difference.path not in written)
        for _, difference in differences
    ):
        yield "The commit has other values, code or inputs than its dvc.lock was written with."
    first = next(
        (stage for stage, difference in differences if difference.kind == "outs" and not _has_other_inputs(stage)), None
    )
    if first is not None:
        yield (
            f"{printable(first.name)} is the first stage with other outputs for the same values, code and inputs."
            " Another kind of processor or another version of a library"
        )
        yield (
            "changes the last digits of results: byte equality is only promised for the same kind of machine and the"
            " same versions (docs/verify.md)."
        )


def _has_other_inputs(stage: StageResult) -> bool:
    return any(difference.kind in ("cmd", "params", "deps") for difference in stage.differences)


def format_duration(seconds: float) -> str:
    """Format a duration: `12.3 s`, `4 min 5 s`, `2 h 3 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


# -- the statement -----------------------------------------------------------------------------------------------------


def make_statement(verification: Verification) -> dict[str, Any]:
    """Build the in-toto statement of a verification."""
    partly = {stage.name: stage.segments for stage in verification.stages if stage.segments is not None}
    details = {
        "method": "segments" if partly else "all",
        "timeStarted": format_time(verification.started),
        "timeFinished": format_time(verification.finished),
        "machine": describe_machine(),
        "versions": read_installed_versions(),
        "environmentDifferences": verification.environment_differences,
        "missingInputs": verification.missing_inputs,
        "stages": {stage.name: _record_stage(stage) for stage in verification.stages},
        "segments": {name: _record_segments(result) for name, result in partly.items()},
    }
    return build_statement(
        verification.commit,
        hashlib.sha256(verification.lock.encode()).hexdigest(),
        dict(_list_tests(verification.stages)),
        {path: sha256 for stage in verification.stages for path, sha256 in stage.files.items()},
        details,
    )


def _list_tests(stages: list[StageResult]) -> Iterator[tuple[str, bool]]:
    """Yield the names of the tests of a statement, and whether they passed."""
    for stage in stages:
        if stage.segments is None or stage.verdict is not Verdict.VERIFIED:
            yield stage.name, stage.verdict is Verdict.VERIFIED
        if stage.segments is not None:
            for replay in stage.segments.replays:
                yield f"{stage.name}: {replay.segment}", replay.verified


def _record_stage(stage: StageResult) -> dict[str, Any]:
    return {
        "verdict": stage.verdict.value,
        "seconds": round(stage.seconds, 1),
        "outs": stage.outs,
        "problem": stage.problem or None,
        "differences": [difference._asdict() for difference in stage.differences],
        "numbers": [
            {**change._asdict(), "claimed": repr(change.claimed), "replayed": repr(change.replayed)}
            for change in stage.metric_changes
        ],
    }


def _record_segments(result: SegmentsResult) -> dict[str, Any]:
    return {
        "steps": result.num_steps,
        "stepsReplayed": result.num_steps_replayed,
        "numSegments": len(result.segments),
        "numReplayed": result.num_replayed,
        "seed": result.seed,
        "seedSource": "given" if result.is_seed_given else "random",
        "probability": result.probability,
        "modelDifference": result.model_difference,
        "formula": "numReplayed / numSegments, for a change of one step",
        "replays": [
            {
                "firstStep": replay.segment.first + 1,
                "lastStep": replay.segment.last,
                "firstDifference": replay.first_difference,
                "difference": replay.difference,
                "problem": replay.problem or None,
            }
            for replay in result.replays
        ],
    }


def format_time(time: datetime) -> str:
    """Format a time as in RFC 3339, in UTC and without fractions of a second."""
    return time.replace(microsecond=0).isoformat().replace("+00:00", "Z")


def describe_machine() -> dict[str, str]:
    """Return the kind of this machine, without names of its own."""
    machine = {"system": platform.system(), "machine": platform.machine(), "python": platform.python_version()}
    return {**machine, "processor": ", ".join(list_processors())}


def list_processors() -> list[str]:
    """Return the processors of this machine as ledgers name them: the CPU, then a GPU if it has one."""
    import torch  # a second

    from stages.model.precision import describe_processor

    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    return [describe_processor(device) for device in devices]


def read_installed_versions() -> dict[str, str]:
    """Return the installed versions of the libraries that determine results, and of DVC."""
    return get_versions("dvc", "pyarrow", "tokenizers", *LIBRARIES)
