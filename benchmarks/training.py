"""Compare training with the pipeline and with the guide's script: speed, memory and time to the same loss.

Command python benchmarks/training.py --shape distilgpt2 --hardware cpu_bf16 --steps 30 [--compile]
        [--against plain] [--batch-size 16] [--block-size 512] [--gradient-checkpointing]

Both sides train the same fresh model on the same blocks, each in its own process. They alternate in turns of a second,
so that changes of the machine's speed affect both. The guide's side is its script: the Trainer with its
TrainingArguments and DataCollatorForLanguageModeling, in fp32. The other opponents are `--against guide_bf16`, the
guide's script with bf16=True; `--against plain`, a plain loop around the pipeline's model, batches and loss, which
shows the cost of the Trainer; and `--against keras`, the pipeline with framework: keras.

ours_python_share is the median share of our steps that is not spent in the forward and backward pass, the loss,
gradient clipping or the optimizer: the time of the Trainer, the loader and the masking. (It is meaningless on a GPU,
which works asynchronously.)

tokens/s is that of the median step after the first WARM_UP steps; compile_seconds is the extra time of those first
steps. Inductor's cache is in the cache directory; LM_REPRO_CACHE=$(mktemp -d) makes it cold. The last line printed is
one JSON object.
"""

import argparse
import contextlib
import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python benchmarks/training.py`

import numpy as np

from stages.core.artifacts import Blocks, choose_token_dtype, get_shard_name, to_arrow, write_checksums, write_shard
from stages.tokens.vocabulary import Vocabulary

ROOT = Path(__file__).resolve().parent.parent
WARM_UP = 5  # steps, for compilation and first use of memory
EVALUATIONS = 4  # number of validation losses, evenly spaced over the steps
VALIDATION_BLOCKS = 16
LEARNING_RATE = 5e-4
NUM_SPECIAL_IDS = 5  # ids below are control tokens
TURN_SECONDS = 1.0
TURN_LINE, REPORT_PREFIX = "your turn", "report "  # output lines of a side

GPT2: dict[str, float] = {"n_positions": 1024, "n_embd": 768, "n_layer": 6, "n_head": 12, "initializer_range": 0.02}
GPT2 |= {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
ROBERTA: dict[str, float] = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 6}
ROBERTA |= {
    "num_attention_heads": 12,
    "initializer_range": 0.02,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}
# Name to task, default batch size, vocabulary size, and differences from the task's tiny model.
SHAPES: dict[str, tuple[str, int, int, dict[str, float]]] = {
    "tiny-gpt2": ("causal", 4, 4096, {}),
    "tiny-roberta": ("mlm", 4, 1024, {}),
    "distilgpt2": ("causal", 8, 50257, GPT2),
    "gpt2": ("causal", 16, 50257, GPT2 | {"n_layer": 12}),
    "distilroberta": ("mlm", 8, 50265, ROBERTA),
}
TINY = {"causal": "tiny-gpt2", "mlm": "tiny-roberta"}
SIDES = ("ours", "guide", "guide_bf16", "plain", "keras")


def main() -> None:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as scratch:
        write_blocks(arguments, Path(scratch))
        ours, other = run_in_turn([start_side(side, scratch) for side in ("ours", arguments.against)])
    goal = max(ours["losses"][-1], other["losses"][-1])
    for side, found in {"ours": ours, arguments.against: other}.items():
        curve = ", ".join(f"{loss:.3f}" for loss in found["losses"])
        print(
            f"{side:6} {found['tokens_per_second']:8,.0f} tokens/s  {found['peak_rss_bytes'] / 2**30:5.2f} GiB at most"
            f"  evaluation {found['evaluation_tokens_per_second']:,.0f} tokens/s"
            f"  validation loss {curve}  {compute_seconds_to_loss(goal, found):.1f} s to {goal:.3f}"
        )
    result = {
        "shape": arguments.shape,
        "steps": arguments.steps,
        "ours_tokens_per_second": round(ours["tokens_per_second"]),
        f"{arguments.against}_tokens_per_second": round(other["tokens_per_second"]),
        "ratio": round(ours["tokens_per_second"] / other["tokens_per_second"], 3),
        "ours_peak_rss_bytes": ours["peak_rss_bytes"],
        f"{arguments.against}_peak_rss_bytes": other["peak_rss_bytes"],
        "ours_python_share": round(ours["python_share"], 4),
        "compile_seconds": round(ours["warm_up_seconds"], 1) if arguments.compile else 0.0,
    }
    print(json.dumps(result))


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--shape", choices=tuple(SHAPES), default="tiny-gpt2")
    parser.add_argument("--hardware", default="cpu")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--against", choices=SIDES[1:], default="guide")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--scratch", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.against == "keras" and (
        arguments.compile or arguments.gradient_checkpointing or arguments.hardware != "cpu"
    ):
        parser.error("--against keras: it trains with --hardware cpu, without --compile and --gradient-checkpointing")
    arguments.task, batch_size, arguments.vocab_size, arguments.model = SHAPES[arguments.shape]
    arguments.batch_size = arguments.batch_size or batch_size
    return arguments


def start_side(side: str, scratch: str) -> "subprocess.Popen[str]":
    """Start a side in a new process, which trains for one turn per line of its input."""
    command = [sys.executable, __file__, *sys.argv[1:], "--side", side, "--scratch", scratch]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def run_in_turn(processes: "list[subprocess.Popen[str]]") -> list[dict[str, Any]]:
    """Let the processes train in turns until all have finished, and return their reports."""
    reports: dict[int, dict[str, Any]] = {}
    while len(reports) < len(processes):
        for index, process in enumerate(processes):
            assert process.stdin is not None and process.stdout is not None
            if index in reports:
                continue
            process.stdin.write("\n")
            process.stdin.flush()
            line = next((line for line in process.stdout if line.startswith((TURN_LINE, REPORT_PREFIX))), None)
            if line is None:
                sys.exit(f"{process.args!r} failed")
            if line.startswith(REPORT_PREFIX):
                reports[index] = json.loads(line.removeprefix(REPORT_PREFIX))
    return [reports[index] for index in range(len(processes))]


def compute_seconds_to_loss(goal: float, found: dict[str, Any]) -> float:
    """Return the seconds of training until the validation loss reached `goal`, interpolated linearly."""
    return float(np.interp(-goal, [-loss for loss in found["losses"]], found["seconds"]))


# -- the text ----------------------------------------------------------------------------------------------------------


def write_blocks(arguments: argparse.Namespace, directory: Path, num_blocks: int | None = None) -> None:
    """Write blocks of the embedded sample with words as tokens, and without document ends, as in the guide.

    The id of a word is its frequency rank after NUM_SPECIAL_IDS, limited to the vocabulary.

    Args:
        num_blocks: total number of blocks in both splits; the sample is repeated if it is shorter. If None, the
            sample is used once.
    """
    import pyarrow as pa

    records = (ROOT / "data/sample/askscience.jsonl").read_text(encoding="utf-8").splitlines()
    words = [word for record in records for text in json.loads(record)["answers"]["text"] for word in text.split()]
    ranks = {word: rank for rank, (word, _) in enumerate(Counter(words).most_common())}
    # [num_words]; np.resize repeats or truncates it to [num_blocks, block_size].
    ids = np.array([min(NUM_SPECIAL_IDS + ranks[word], arguments.vocab_size - 1) for word in words])
    size = arguments.block_size
    blocks = np.resize(ids, (num_blocks or len(ids) // size, size)).astype(choose_token_dtype(arguments.vocab_size))
    schema = pa.schema([("input_ids", pa.list_(pa.from_numpy_dtype(blocks.dtype), size))])
    held_out = min(VALIDATION_BLOCKS, len(blocks) // 4)
    for split, rows in {"train": blocks[:-held_out], "validation": blocks[-held_out:]}.items():
        column = pa.FixedSizeListArray.from_arrays(to_arrow(rows.reshape(-1)), size)
        written = write_shard(directory / split / get_shard_name(0), schema, [pa.record_batch([column], schema=schema)])
        write_checksums(directory / split, [written])


def make_vocabulary(arguments: argparse.Namespace) -> Vocabulary:
    roles = ["cls_token", "pad_token", "sep_token", "unk_token", "mask_token"]
    if arguments.task == "causal":
        return Vocabulary(size=arguments.vocab_size, special={"eos_token": 0}, prefix=[], suffix=[0], lead=[0])
    special = {role: index for index, role in enumerate(roles)}
    return Vocabulary(size=arguments.vocab_size, special=special, prefix=[0], suffix=[2], lead=[])


# -- a side, in a new process ------------------------------------------------------------------------------------------


class Clock:
    """Timer of the steps, which also computes the validation loss EVALUATIONS times without counting its time.

    A GPU works asynchronously. The clock synchronizes with it at the end of the warm-up, before each evaluation and at
    the end; only the sum of the steps between two of these points is meaningful.
    """

    def __init__(self, model: Any, objective: Any, validation: Blocks, num_steps: int) -> None:
        self._model, self._objective, self._validation, self._num_steps = model, objective, validation, num_steps
        self._on_gpu = model.device.type == "cuda"
        self._steps: list[float] = []
        self._evaluation_seconds: list[float] = []
        self._python_shares: list[float] = []
        self._work_seconds = 0.0  # of the current step
        self.refresh: Callable[[], None] = lambda: None  # copies the trained weights to `model`
        self._seconds, self._losses = [0.0], [self._evaluate()]
        self._started = self._turn = time.perf_counter()

    def step(self) -> None:
        """Record the end of a step; evaluate and wait for the next turn if they are due."""
        number = len(self._steps) + 1
        evaluates = number % max(1, self._num_steps // EVALUATIONS) == 0
        if self._on_gpu and (evaluates or number in (WARM_UP, self._num_steps)):
            import torch

            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._started
        self._steps.append(seconds)
        self._python_shares.append(1.0 - self._work_seconds / seconds)
        if evaluates:
            self._seconds.append(sum(self._steps))
            self._losses.append(self._evaluate())
        if time.perf_counter() - self._turn > TURN_SECONDS:
            print(TURN_LINE, flush=True)
            input()
            self._turn = time.perf_counter()
        self._started, self._work_seconds = time.perf_counter(), 0.0

    def wrap_work(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function` with its time counted as work of the step, not as time of the loop around it."""

        def timed_function(*arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                self._work_seconds += time.perf_counter() - started

        return timed_function

    def _evaluate(self) -> float:
        from stages.model.block_loss import compute_block_loss

        self.refresh()
        started = time.perf_counter()
        loss = compute_block_loss(self._model, self._objective, self._validation, 1024)
        self._evaluation_seconds.append(time.perf_counter() - started)
        return loss

    def build_report(self, tokens_per_step: int) -> dict[str, Any]:
        usual = (statistics.mean if self._on_gpu else statistics.median)(self._steps[WARM_UP:] or self._steps)
        return {
            "tokens_per_second": tokens_per_step / usual,
            "python_share": statistics.median(self._python_shares[WARM_UP:] or self._python_shares),
            "evaluation_tokens_per_second": self._validation.block_size
            * len(self._validation)
            / statistics.median(self._evaluation_seconds),
            "warm_up_seconds": sum(self._steps[:WARM_UP]) - usual * len(self._steps[:WARM_UP]),
            "seconds": self._seconds,
            "losses": self._losses,
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "peak_gpu_bytes": self._peak_gpu_bytes(),
            "sizes": get_model_sizes(self._model),
        }

    def _peak_gpu_bytes(self) -> int | None:
        """Return the peak bytes of tensors on the GPU, or None if the model is not on a GPU."""
        if not self._on_gpu:
            return None
        import torch

        return torch.cuda.max_memory_allocated()


def get_model_sizes(model: Any) -> dict[str, int]:
    """Return the sizes that determine a model's floating-point operations: parameters, layers and width."""
    import torch

    embeddings = [module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    return {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "embedding_parameters": sum(weight.numel() for weight in embeddings),
        "word_embedding_parameters": model.get_input_embeddings().weight.numel(),
        "layers": model.config.num_hidden_layers,
        "width": model.config.hidden_size,
    }


class TrainingSetup(NamedTuple):
    """Configuration, model and data of a side."""

    config: Any
    model: Any
    """On the device of `config`."""
    objective: Any
    train: Blocks
    validation: Blocks


def make_setup(arguments: argparse.Namespace, config: Any) -> TrainingSetup:
    """Build a fresh model of the shape and open the blocks of arguments.scratch."""
    from stages.model.models import build_model
    from stages.model.objectives import make_objective

    vocabulary, scratch = make_vocabulary(arguments), Path(arguments.scratch)
    model = build_model(config.model, vocabulary, config.seed).to(config.hardware.device)
    objective = make_objective(config.objective.name, vocabulary, config.objective, model)
    return TrainingSetup(config, model, objective, Blocks(scratch / "train"), Blocks(scratch / "validation"))


def run_side(arguments: argparse.Namespace) -> None:
    import torch

    from stages.model.models import prepare_torch

    input()
    config = make_training_config(arguments)
    if arguments.side.startswith("guide"):  # its script does not configure the allocator
        torch.set_num_threads(config.hardware.num_threads)
    else:
        prepare_torch(config.hardware)
    built = make_setup(arguments, config)
    clock = Clock(built.model, built.objective, built.validation, arguments.steps)
    sides = {"ours": train_ours, "plain": train_with_plain_loop, "keras": train_with_keras}
    sides |= {"guide": train_with_guide, "guide_bf16": train_with_guide}
    sides[arguments.side](arguments, *built, clock)
    print(REPORT_PREFIX + json.dumps(clock.build_report(arguments.batch_size * arguments.block_size)))


def make_training_config(arguments: argparse.Namespace, *more: str) -> Any:
    """Return the task's default configuration, changed to train the shape's model without validation.

    Args:
        more: additional overrides.
    """
    from stages.core.compose import compose_config, load_config
    from stages.train.stage import TrainConfig

    sizes = [f"block_size={arguments.block_size}", f"batch_size={arguments.batch_size}"]
    values = [*sizes, "seed=42", f"learning_rate={LEARNING_RATE}", "num_train_epochs=null"]
    switches = {"torch_compile": arguments.compile, "activation_checkpointing": arguments.gradient_checkpointing}
    trainer = [f"++trainer.{name}={value}" for name, value in {**switches, "max_steps": arguments.steps}.items()]
    shape = [f"++model.config.{key}={value}" for key, value in arguments.model.items()]
    if "n_positions" in arguments.model:
        shape.append(f"model.max_positions={arguments.model['n_positions']}")
    paths = ["trainer.eval_strategy='no'", "tokens=-", "blocks=-", "out=-", f"report={arguments.scratch}/report"]
    groups = [
        f"task={arguments.task}",
        f"model={TINY[arguments.task]}",
        "adapter=none",
        "framework=trainer",
        f"hardware={arguments.hardware}",
    ]
    return load_config(TrainConfig, compose_config("train", [*groups, *values, *trainer, *shape, *paths, *more]))


def make_clock_callback(clock: Clock) -> Any:
    from transformers import TrainerCallback

    class Steps(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.step()

    return Steps()


def train_ours(
    arguments: argparse.Namespace, config: Any, model: Any, objective: Any, train: Any, validation: Any, clock: Clock
) -> None:
    from stages.frameworks.trainer import make_trainer, prepare_framework

    prepare_framework(config)
    trainer = make_trainer(config, model, objective, train, validation, arguments.scratch)
    trainer.add_callback(make_clock_callback(clock))
    with time_work(clock, trainer):
        trainer.train()


@contextlib.contextmanager
def time_work(clock: Clock, trainer: Any) -> Iterator[None]:
    """Let `clock` count the work of the steps of `trainer` in this context, by wrapping the innermost calls."""
    import torch

    timed_calls = [
        (trainer.model, "forward"),
        (trainer._loss, "sum_nats"),
        (torch.Tensor, "backward"),
        (torch.nn.utils, "clip_grad_norm_"),
        (torch.optim.AdamW, "step"),
    ]
    originals = [(owner, name, vars(owner).get(name)) for owner, name in timed_calls]
    for owner, name in timed_calls:
        setattr(owner, name, clock.wrap_work(getattr(owner, name)))
    try:
        yield
    finally:
        for owner, name, original in originals:
            delattr(owner, name) if original is None else setattr(owner, name, original)


def train_with_keras(
    arguments: argparse.Namespace, config: Any, model: Any, objective: Any, train: Any, validation: Any, clock: Clock
) -> None:
    from stages.frameworks import keras as framework
    from stages.shell.interruption import StopRequest
    from stages.train.schema import Framework

    settings = {name: value for name, value in config.trainer.items() if value and name != "max_steps"}
    epochs = arguments.steps / -(-len(train) // config.batch_size)
    jax_framework = Framework(name="keras", backend="jax")
    config = dataclasses.replace(config, framework=jax_framework, trainer=settings, num_train_epochs=epochs)
    framework.prepare_framework(config)
    from stages.frameworks.keras.models import copy_to_torch
    from stages.frameworks.keras.training import KerasTraining

    training = KerasTraining(
        config, model, objective, train, validation, Path(arguments.scratch) / "keras", StopRequest()
    )
    training.handler.add_callback(make_clock_callback(clock))

    def refresh() -> None:
        training.built.jax_state_sync()
        copy_to_torch(training.built, model)

    clock.refresh = refresh
    training.train_or_resume()


def train_with_plain_loop(
    arguments: argparse.Namespace, config: Any, model: Any, objective: Any, train: Any, validation: Any, clock: Clock
) -> None:
    """Train on the pipeline's batches with a minimal loop."""
    import torch

    from stages.model.isolation import isolate_segments
    from stages.model.loss import TokenLoss
    from stages.model.masking import IGNORED
    from stages.train.attention import use_fast_kernels

    use_fast_kernels(model, config.hardware.device)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.01, fused=True)
    loss = TokenLoss(model)
    model.train().config.use_cache = False
    for step in range(arguments.steps):
        indices = [(step * arguments.batch_size + row) % len(train) for row in range(arguments.batch_size)]
        batch = objective.build_batch(train[indices], indices, config.seed, 0)
        labels = batch.pop("labels")
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=config.trainer["bf16"]):
            with loss.hidden_outputs():
                outputs = model(**isolate_segments(batch, model)).logits
            nats = loss.sum_nats(outputs, objective.get_targets(labels))
        (nats / (labels != IGNORED).sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.step()


def train_with_guide(
    arguments: argparse.Namespace, config: Any, model: Any, objective: Any, train: Any, validation: Any, clock: Clock
) -> None:
    from datasets import Dataset
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    blocks = train[range(len(train))].tolist()
    mlm = arguments.task == "mlm"
    training_arguments = TrainingArguments(
        output_dir=arguments.scratch,
        learning_rate=LEARNING_RATE,  # the guide's 2e-5 is for a pretrained model
        weight_decay=0.01,
        per_device_train_batch_size=arguments.batch_size,
        max_steps=arguments.steps,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        use_cpu=config.hardware.device == "cpu",
        bf16=arguments.side == "guide_bf16",
    )
    trainer = Trainer(
        model=model,
        args=training_arguments,
        train_dataset=Dataset.from_dict(
            {"input_ids": blocks, "attention_mask": np.ones_like(blocks).tolist(), "labels": blocks}
        ),
        data_collator=DataCollatorForLanguageModeling(
            tokenizer=make_word_tokenizer(arguments), mlm=mlm, **({"mlm_probability": 0.15} if mlm else {})
        ),
        callbacks=[make_clock_callback(clock)],
    )
    trainer.train()


def make_word_tokenizer(arguments: argparse.Namespace) -> Any:
    """Return a tokenizer for the guide's collator, with the special tokens and size of the vocabulary."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{index}": index for index in range(arguments.vocab_size)}
    special = {role: f"w{index}" for role, index in make_vocabulary(arguments).special.items()}
    if arguments.task == "causal":
        special["pad_token"] = special["eos_token"]  # as the guide does
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w3")), **special)


if __name__ == "__main__":
    run_side(parse_arguments()) if "--side" in sys.argv else main()
