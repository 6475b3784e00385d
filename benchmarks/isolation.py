"""Training speed with and without isolation of the documents in a block.

Command python -m benchmarks.isolation [--task causal] [--steps 60] [--rounds 3]
Needs   a finished `dvc repro`

Alternates between training the task's default model on the pipeline's blocks with and without isolation, and prints the
median of each.
The last line printed is one JSON object: task, isolated_tokens_per_second, packed_tokens_per_second, ratio.
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from pathlib import Path

from stages.core.artifacts import Blocks
from stages.core.compose import compose_config, load_config
from stages.frameworks.trainer import make_trainer
from stages.model.models import build_model, prepare_torch
from stages.model.objectives import make_objective
from stages.tokens.vocabulary import Vocabulary
from stages.train.stage import TrainConfig

MODELS = {"causal": "tiny-gpt2", "mlm": "tiny-modernbert"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--task", choices=tuple(MODELS), default="causal")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    arguments = parser.parse_args()
    config = build_training_config(arguments.task, arguments.steps, arguments.batch_size)
    speeds: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(arguments.rounds):
        for isolated in speeds:
            objective = dataclasses.replace(config.objective, isolate_documents=isolated)
            speeds[isolated].append(measure_tokens_per_second(dataclasses.replace(config, objective=objective)))
    isolated_speed, packed_speed = (statistics.median(speeds[key]) for key in (True, False))
    result = {"task": arguments.task, "isolated_tokens_per_second": round(isolated_speed)}
    result |= {"packed_tokens_per_second": round(packed_speed), "ratio": round(isolated_speed / packed_speed, 3)}
    print(json.dumps(result))


def build_training_config(task: str, steps: int, batch_size: int) -> TrainConfig:
    """Return the task's default configuration, changed to run `steps` steps without validation."""
    paths = [f"tokens=data/tokens/{task}", f"blocks=data/blocks/{task}", "out=-", "report=-"]
    values = ["seed=42", "block_size=128", "learning_rate=0.001", "num_train_epochs=100", f"batch_size={batch_size}"]
    trainer = [f"+trainer.max_steps={steps}", "trainer.eval_strategy=no"]
    groups = [f"task={task}", f"model={MODELS[task]}", "adapter=none", "hardware=cpu", "framework=trainer"]
    return load_config(TrainConfig, compose_config("train", [*groups, *values, *trainer, *paths]))


def measure_tokens_per_second(config: TrainConfig) -> float:
    """Train with `config` and return its tokens per second, without start-up and imports."""
    prepare_torch(config.hardware)
    vocabulary, blocks = Vocabulary.read(config.tokens), Path(config.blocks)
    model = build_model(config.model, vocabulary, config.seed)
    objective = make_objective(config.objective.name, vocabulary, config.objective, model)
    train, validation = Blocks(blocks / "train"), Blocks(blocks / "validation")
    with tempfile.TemporaryDirectory() as scratch:
        config = dataclasses.replace(config, report=f"{scratch}/report")  # live curves are written there
        trainer = make_trainer(config, model, objective, train, validation, scratch)
        started = time.monotonic()
        trainer.train()
        return float(trainer.state.global_step * config.batch_size * train.block_size / (time.monotonic() - started))


if __name__ == "__main__":
    main()
