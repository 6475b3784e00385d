"""Replay some steps of a training in this process, for `python -m tools.verify --segments`.

Command python -m tools.verify.replay_steps REPORT ACTION KEY=VALUE...

ACTION is `list` (the steps of kept checkpoints), `model` (compare the trained model with the state chain), or
FIRST-LAST (replay the steps FIRST + 1 to LAST). REPORT is the JSON file to write.
"""

import functools
import sys
from pathlib import Path
from typing import Any

from stages.core.artifacts import write_json
from stages.shell.app import run
from stages.train.replay import find_model_difference, list_kept_steps, replay_steps
from stages.train.stage import TrainConfig
from stages.train.state_chain import read_state_chain


def main() -> None:
    report, action = sys.argv[1:3]
    sys.argv[1:3] = []
    run("train", TrainConfig, functools.partial(replay, report, action))


def replay(report: str, action: str, config: TrainConfig) -> None:
    """Do `action`, and write its result to the file `report`."""
    result: Any
    if action == "list":
        result = list_kept_steps(config)
    elif action == "model":
        result = find_model_difference(config, read_state_chain(Path(config.report)))
    else:
        first, last = map(int, action.split("-"))
        result = replay_steps(config, first, last)._asdict()
    write_json(report, result)


if __name__ == "__main__":
    main()
