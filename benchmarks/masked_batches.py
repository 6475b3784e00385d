"""Speed of masked batches, and memory of a row of 8,192 tokens whose documents are isolated, on a CPU.

Command python -m benchmarks.masked_batches

Batches are 64 x 512 tokens of DistilRoBERTa's shape (benchmarks/training.py), made in this process and by the Trainer's
loader with one worker process. The row is given to a BERT of two layers of width 64 without dropout: what memory takes
beyond what it took before, when the batch is made, in evaluation, and in a step of training; documents have 300 tokens.
The last line printed is one JSON object.
"""

import contextlib
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import training
from stages.frameworks.trainer import make_trainer
from stages.model.isolation import isolate_segments
from stages.model.models import prepare_torch
from stages.model.objectives import make_objective
from stages.model.precision import full_precision
from stages.train.attention import use_fast_kernels

ROWS, LENGTH, LONG, DOCUMENT = 64, 512, 8192, 300
BATCHES = 60
PAGE_BYTES = 4096


def main() -> None:
    result = {**row_memory(), **batch_rates()}  # in this order: a stage keeps the memory that it frees
    for name, value in result.items():
        print(f"{name:32} {value:14,.0f}")
    print(json.dumps(result))


def batch_rates() -> dict[str, float]:
    given = ["--shape", "distilroberta", "--batch-size", str(ROWS), "--block-size", str(LENGTH)]
    arguments = training.parse([*given, "--steps", str(BATCHES)])
    with tempfile.TemporaryDirectory() as scratch:
        arguments.scratch = scratch
        training.write_blocks(arguments, Path(scratch), (BATCHES + training.WARM_UP) * ROWS)
        config = training.training_config(arguments, "++trainer.dataloader_num_workers=1")
        prepare_torch(config.hardware)
        built = training.build(arguments, config)
        indices = list(range(ROWS))
        in_process = rate(built.objective.batch(built.train[indices], indices, 42, 0) for _ in range(BATCHES))
        loader = make_trainer(config, *built[1:], scratch).get_train_dataloader()
        return {"tokens_per_second": in_process, "tokens_per_second_of_a_worker": rate(loader)}


def rate(batches: Any) -> float:
    """Tokens/s of the batches after the first few."""
    started = 0.0
    for number, _ in enumerate(batches, 1):
        if number == training.WARM_UP:
            started = time.perf_counter()
    return (number - training.WARM_UP) * ROWS * LENGTH / (time.perf_counter() - started)


def row_memory() -> dict[str, float]:
    from transformers import AutoConfig, AutoModelForMaskedLM

    arguments = training.parse(["--shape", "tiny-roberta"])
    vocabulary = training.vocabulary_of(arguments)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 1}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    shape = {"vocab_size": vocabulary.size, "max_position_embeddings": LONG, **sizes, **dropout}
    model = AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", **shape))
    arguments.scratch = "-"
    config = training.training_config(arguments)
    prepare_torch(config.hardware)
    objective = make_objective("mlm", vocabulary, config.objective, model)
    blocks = np.full((1, LONG), training.SPECIAL, np.uint16)
    blocks[:, ::DOCUMENT] = vocabulary.prefix[0]

    def batch(length: int = LONG) -> dict[str, Any]:
        return objective.batch(blocks[:, :length], [0], 0, 0)

    def forward(length: int = LONG) -> Any:
        inputs = batch(length)
        del inputs["labels"]
        return model(**isolate_segments(inputs, model)).logits

    def evaluate(length: int = LONG) -> None:
        with full_precision(model):
            forward(length)

    def train(length: int = LONG) -> None:
        forward(length).sum().backward()

    found = {"batch_bytes": peak(batch), "evaluation_bytes": peak(evaluate)}
    use_fast_kernels(model.train(), "cpu")
    return {**found, "training_bytes": peak(train)}


def peak(work: Callable[..., Any]) -> float:
    """Bytes that the process has at most during `work`, beyond those that it had before it."""
    work(DOCUMENT)  # imports, threads
    before = resident_bytes()
    with highest(before) as seen:
        work()
    return seen[0] - before


@contextlib.contextmanager
def highest(before: float) -> Iterator[list[float]]:
    """A list of the most bytes in memory while the block runs."""
    seen, ended = [before], threading.Event()

    def watch() -> None:
        while not ended.wait(0.0005):
            seen[0] = max(seen[0], resident_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        ended.set()
        watcher.join()


def resident_bytes() -> float:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * PAGE_BYTES


if __name__ == "__main__":
    main()
