"""Verification of a part of a training in a clone, whose outs were restored from DVC's cache."""

import os
import secrets
import sys
import tempfile
from pathlib import Path
from typing import Any

from stages.core.artifacts import read_json
from stages.core.errors import StageError
from tools.verify.replay import Clone
from tools.verify.segments import SegmentsResult, StepsReplay, verify_training
from tools.verify.stages import TrainingVerifier, log

_CACHES = ("LM_REPRO_CACHE", "LM_REPRO_BRANCHES")  # where the kept checkpoints of this machine are


class CloneTraining:
    """A training whose steps are replayed by the code of a clone, from the kept checkpoints of this machine."""

    def __init__(self, clone: Clone, task: str) -> None:
        self._task = task
        own = {name: os.environ[name] for name in _CACHES if name in os.environ}
        others = {name: value for name, value in clone.environment.items() if name not in _CACHES}
        self._clone, self.environment = clone, {**others, **own}

    def list_kept_steps(self) -> list[int]:
        steps: list[int] = self._run("list")
        return steps

    def replay_steps(self, first: int, last: int) -> StepsReplay:
        log(f"{self._task}: replaying steps {first + 1:,} to {last:,}")
        return StepsReplay(**self._run(f"{first}-{last}"))

    def find_model_difference(self) -> str | None:
        difference: str | None = self._run("model")
        return difference

    def _run(self, action: str) -> Any:
        """Run an action of tools.verify.replay_steps in the clone, and return its result.

        Raises:
            StageError: if it fails; it has printed the reason.
        """
        with tempfile.TemporaryDirectory(dir=self._clone.directory.parent) as directory:
            report = Path(directory) / "report.json"
            command = [sys.executable, "-m", "tools.verify.replay_steps", str(report), action, f"task={self._task}"]
            if code := self._clone.run_command(command, env=self.environment):
                raise StageError(f"the replay failed with exit code {code}; the message is above")
            return read_json(report)


def make_training_verifier(number: int, given_seed: int | None = None) -> TrainingVerifier:
    """Return a function that replays random segments of a training.

    Args:
        number: number of segments per training.
        given_seed: seed of the choice of segments; None: a random one, which whoever changed a step cannot have known.
    """
    seed = secrets.randbits(32) if given_seed is None else given_seed

    def verify(clone: Clone, stage: str) -> SegmentsResult:
        task = stage.partition("@")[2]
        file = clone.directory / f"reports/train/{task}/state_chain.txt"
        if not file.is_file():
            return SegmentsResult(0, [], seed, [], 0.0, "it has no state chain: verify it with --all")
        chain = file.read_text(encoding="utf-8").split()
        try:
            result = verify_training(CloneTraining(clone, task), chain, number, seed)
            return result._replace(is_seed_given=given_seed is not None)
        except StageError as error:
            return SegmentsResult(len(chain), [], seed, [], 0.0, str(error))

    return verify
