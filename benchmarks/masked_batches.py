"""Speed of building masked batches, and memory for a row of 8,192 tokens with isolated documents, on a CPU.

Command python -m benchmarks.masked_batches

Batches have 64 x 512 tokens of DistilRoBERTa's shape (benchmarks/training.py). They are built in this process and by
the Trainer's loader with one worker process. The row has documents of 300 tokens and is the input of a BERT with two
layers of width 64 and no dropout. Its memory is the increase over the memory before, measured while the batch is built,
in evaluation, and in a training step. The last line printed is one JSON object.
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

BATCH_SIZE, BLOCK_SIZE, ROW_TOKENS, DOCUMENT_TOKENS = 64, 512, 8192, 300
NUM_BATCHES = 60
PAGE_BYTES = 4096


def main() -> None:
    # Memory first: freed memory stays with the process and would hide an increase.
    result = {**measure_row_memory(), **measure_batch_rates()}
    for name, value in result.items():
        print(f"{name:32} {value:14,.0f}")
    print(json.dumps(result))


def measure_batch_rates() -> dict[str, float]:
    options = ["--shape", "distilroberta", "--batch-size", str(BATCH_SIZE), "--block-size", str(BLOCK_SIZE)]
    arguments = training.parse_arguments([*options, "--steps", str(NUM_BATCHES)])
    with tempfile.TemporaryDirectory() as scratch:
        arguments.scratch = scratch
        training.write_blocks(arguments, Path(scratch), (NUM_BATCHES + training.WARM_UP) * BATCH_SIZE)
        config = training.make_training_config(arguments, "++trainer.dataloader_num_workers=1")
        prepare_torch(config.hardware)
        setup = training.make_setup(arguments, config)
        indices = list(range(BATCH_SIZE))
        in_process = measure_rate(
            setup.objective.build_batch(setup.train[indices], indices, 42, 0) for _ in range(NUM_BATCHES)
        )
        loader = make_trainer(config, *setup[1:], scratch).get_train_dataloader()
        return {"tokens_per_second": in_process, "tokens_per_second_of_a_worker": measure_rate(loader)}


def measure_rate(batches: Any) -> float:
    """Iterate over the batches and return tokens/s, without the first WARM_UP batches."""
    started = 0.0
    for number, _ in enumerate(batches, 1):
        if number == training.WARM_UP:
            started = time.perf_counter()
    return (number - training.WARM_UP) * BATCH_SIZE * BLOCK_SIZE / (time.perf_counter() - started)


def measure_row_memory() -> dict[str, float]:
    from transformers import AutoConfig, AutoModelForMaskedLM

    arguments = training.parse_arguments(["--shape", "tiny-roberta"])
    vocabulary = training.make_vocabulary(arguments)
    layers = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 1}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    shape = {"vocab_size": vocabulary.size, "max_position_embeddings": ROW_TOKENS, **layers, **dropout}
    model = AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", **shape))
    arguments.scratch = "-"
    config = training.make_training_config(arguments)
    prepare_torch(config.hardware)
    objective = make_objective("mlm", vocabulary, config.objective, model)
    blocks = np.full((1, ROW_TOKENS), training.NUM_SPECIAL_IDS, np.uint16)
    blocks[:, ::DOCUMENT_TOKENS] = vocabulary.prefix[0]

    def make_batch(length: int = ROW_TOKENS) -> dict[str, Any]:
        return objective.build_batch(blocks[:, :length], [0], 0, 0)

    def forward(length: int = ROW_TOKENS) -> Any:
        inputs = make_batch(length)
        del inputs["labels"]
        return model(**isolate_segments(inputs, model)).logits

    def evaluate(length: int = ROW_TOKENS) -> None:
        with full_precision(model):
            forward(length)

    def train(length: int = ROW_TOKENS) -> None:
        forward(length).sum().backward()

    memory = {"batch_bytes": measure_peak_bytes(make_batch), "evaluation_bytes": measure_peak_bytes(evaluate)}
    use_fast_kernels(model.train(), "cpu")
    return {**memory, "training_bytes": measure_peak_bytes(train)}


def measure_peak_bytes(work: Callable[..., Any]) -> float:
    """Run `work` and return the largest increase of the process's memory during it, in bytes."""
    work(DOCUMENT_TOKENS)  # warm-up: imports, threads
    initial = read_resident_bytes()
    with track_peak_bytes(initial) as most:
        work()
    return most[0] - initial


@contextlib.contextmanager
def track_peak_bytes(initial: float) -> Iterator[list[float]]:
    """Yield a list with one item, the most bytes in memory so far; a thread updates it while the block runs."""
    most, ended = [initial], threading.Event()

    def watch() -> None:
        while not ended.wait(0.0005):
            most[0] = max(most[0], read_resident_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield most
    finally:
        ended.set()
        watcher.join()


def read_resident_bytes() -> float:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * PAGE_BYTES


if __name__ == "__main__":
    main()
