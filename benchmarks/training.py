"""Training by the pipeline against training by the guide's script: speed, memory and time to the same loss.

Command python benchmarks/training.py --shape distilgpt2 --hardware cpu_bf16 --steps 30 [--compile]
        [--against plain] [--batch-size 16] [--block-size 512] [--gradient-checkpointing]

Both sides train the same fresh model on the same blocks, each in a process of its own, and take turns of a second, so
that a machine whose speed varies is the same for both. The guide's side is its script: Trainer, its TrainingArguments
and DataCollatorForLanguageModeling, in fp32; `--against guide_bf16` sets bf16=True there. `--against plain` puts a bare
loop around the pipeline's own model, batches and loss in its place, to show what the Trainer costs; `--against keras`
trains with framework: keras.

ours_python_share is the median share of our steps that is neither forward nor backward pass, loss, clipping of
gradients or optimizer: what the Trainer, the loader and the making of masks take. (On a GPU, which works behind the
program, it means nothing.)

tokens/s is that of the median step after the first WARM_UP ones; compile_seconds is what these took beyond such a step.
Inductor's cache stays in the cache directory: with LM_REPRO_CACHE=$(mktemp -d) it is cold. The last line printed is one
JSON object.
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # python benchmarks/training.py, too

import numpy as np

from stages.core.artifacts import Blocks, shard_name, to_arrow, token_dtype, write_checksums, write_shard
from stages.tokens.vocabulary import Vocabulary

ROOT = Path(__file__).resolve().parent.parent
WARM_UP = 5  # steps: compiling, memory that is touched for the first time
EVALUATIONS = 4  # of the validation loss, evenly over the steps
VALIDATION_BLOCKS = 16
LEARNING_RATE = 5e-4
SPECIAL = 5  # ids below are control tokens
TURN_SECONDS = 1.0
TURN, REPORT = "your turn", "report "  # what a side says

GPT2 = {"n_positions": 1024, "n_embd": 768, "n_layer": 6, "n_head": 12, "initializer_range": 0.02}
GPT2 |= {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
ROBERTA = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 6, "num_attention_heads": 12}
ROBERTA |= {"initializer_range": 0.02, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
# Task, default batch size, vocabulary, and what differs from the task's tiny model.
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
    arguments = parse()
    with tempfile.TemporaryDirectory() as scratch:
        write_blocks(arguments, Path(scratch))
        ours, other = in_turn([start_side(side, scratch) for side in ("ours", arguments.against)])
    goal = max(ours["losses"][-1], other["losses"][-1])
    for side, found in {"ours": ours, arguments.against: other}.items():
        curve = ", ".join(f"{loss:.3f}" for loss in found["losses"])
        print(
            f"{side:6} {found['tokens_per_second']:8,.0f} tokens/s  {found['peak_rss_bytes'] / 2**30:5.2f} GiB at most"
            f"  evaluation {found['evaluation_tokens_per_second']:,.0f} tokens/s"
            f"  validation loss {curve}  {seconds_to(goal, found):.1f} s to {goal:.3f}"
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


def parse(given: list[str] | None = None) -> argparse.Namespace:
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
    arguments = parser.parse_args(given)
    if arguments.against == "keras" and (
        arguments.compile or arguments.gradient_checkpointing or arguments.hardware != "cpu"
    ):
        parser.error("--against keras: it trains with --hardware cpu, without --compile and --gradient-checkpointing")
    arguments.task, batch_size, arguments.vocab_size, arguments.model = SHAPES[arguments.shape]
    arguments.batch_size = arguments.batch_size or batch_size
    return arguments


def start_side(side: str, scratch: str) -> "subprocess.Popen[str]":
    """A side in a process of its own, which trains for a turn for every line that it is given."""
    command = [sys.executable, __file__, *sys.argv[1:], "--side", side, "--scratch", scratch]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def in_turn(processes: "list[subprocess.Popen[str]]") -> list[dict[str, Any]]:
    """The reports of the processes, which train in turn."""
    reports: dict[int, dict[str, Any]] = {}
    while len(reports) < len(processes):
        for index, process in enumerate(processes):
            assert process.stdin is not None and process.stdout is not None
            if index in reports:
                continue
            process.stdin.write("\n")
            process.stdin.flush()
            line = next((line for line in process.stdout if line.startswith((TURN, REPORT))), None)
            if line is None:
                sys.exit(f"{' '.join(map(str, process.args))} failed")
            if line.startswith(REPORT):
                reports[index] = json.loads(line.removeprefix(REPORT))
    return [reports[index] for index in range(len(processes))]


def seconds_to(goal: float, found: dict[str, Any]) -> float:
    """Seconds of training until the validation loss was `goal`, between evaluations in proportion."""
    return float(np.interp(-goal, [-loss for loss in found["losses"]], found["seconds"]))


# -- the text ----------------------------------------------------------------------------------------------------------


def write_blocks(arguments: argparse.Namespace, directory: Path, num_blocks: int | None = None) -> None:
    """Blocks of the embedded sample, its words as ids by their frequency; without document ends, which the guide has
    not.

    Args:
        num_blocks: of both splits together, the sample repeated if it has fewer; None: those of the sample.
    """
    import pyarrow as pa

    records = (ROOT / "data/sample/askscience.jsonl").read_text(encoding="utf-8").splitlines()
    words = [word for record in records for text in json.loads(record)["answers"]["text"] for word in text.split()]
    ranks = {word: rank for rank, (word, _) in enumerate(Counter(words).most_common())}
    ids = np.array([min(SPECIAL + ranks[word], arguments.vocab_size - 1) for word in words])
    size = arguments.block_size
    blocks = np.resize(ids, (num_blocks or len(ids) // size, size)).astype(token_dtype(arguments.vocab_size))
    schema = pa.schema([("input_ids", pa.list_(pa.from_numpy_dtype(blocks.dtype), size))])
    held_out = min(VALIDATION_BLOCKS, len(blocks) // 4)
    for split, rows in {"train": blocks[:-held_out], "validation": blocks[-held_out:]}.items():
        column = pa.FixedSizeListArray.from_arrays(to_arrow(rows.reshape(-1)), size)
        written = write_shard(directory / split / shard_name(0), schema, [pa.record_batch([column], schema=schema)])
        write_checksums(directory / split, [written])


def vocabulary_of(arguments: argparse.Namespace) -> Vocabulary:
    roles = ["cls_token", "pad_token", "sep_token", "unk_token", "mask_token"]
    if arguments.task == "causal":
        return Vocabulary(size=arguments.vocab_size, special={"eos_token": 0}, prefix=[], suffix=[0], lead=[0])
    special = {role: index for index, role in enumerate(roles)}
    return Vocabulary(size=arguments.vocab_size, special=special, prefix=[0], suffix=[2], lead=[])


# -- a side, in its own process ----------------------------------------------------------------------------------------


class Clock:
    """The seconds of each step and, at EVALUATIONS of them, the validation loss, the time for which does not count.

    A GPU works behind the program: there, the clock waits for it at the end of the warm-up, before each evaluation and
    at the end, and only sums of steps between these mean anything.
    """

    def __init__(self, model: Any, objective: Any, validation: Blocks, num_steps: int) -> None:
        self._model, self._objective, self._validation, self._num_steps = model, objective, validation, num_steps
        self._on_gpu = model.device.type == "cuda"
        self._steps: list[float] = []
        self._evaluation_seconds: list[float] = []
        self._python_shares: list[float] = []
        self._work_seconds = 0.0  # of the step
        self.refresh: Callable[[], None] = lambda: None  # has `model` hold the weights that are trained
        self._seconds, self._losses = [0.0], [self._evaluate()]
        self._started = self._turn = time.perf_counter()

    def step(self) -> None:
        """To be called at the end of each step."""

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
            print(TURN, flush=True)
            input()
            self._turn = time.perf_counter()
        self._started, self._work_seconds = time.perf_counter(), 0.0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, the time of which counts as work of the step and not of the loop around it."""

        def timed_function(*arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                self._work_seconds += time.perf_counter() - started

        return timed_function

    def _evaluate(self) -> float:
        from stages.model.block_loss import block_loss

        self.refresh()
        started = time.perf_counter()
        loss = block_loss(self._model, self._objective, self._validation, 1024)
        self._evaluation_seconds.append(time.perf_counter() - started)
        return loss

    def report(self, tokens_per_step: int) -> dict[str, Any]:
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
            "sizes": model_sizes(self._model),
        }

    def _peak_gpu_bytes(self) -> int | None:
        """The most memory of the GPU that tensors took; None where the model is not on one."""
        if not self._on_gpu:
            return None
        import torch

        return torch.cuda.max_memory_allocated()


def model_sizes(model: Any) -> dict[str, int]:
    """What the floating-point operations of a model follow from: numbers of parameters, layers and its width."""
    import torch

    embeddings = [module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    return {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "embedding_parameters": sum(weight.numel() for weight in embeddings),
        "word_embedding_parameters": model.get_input_embeddings().weight.numel(),
        "layers": model.config.num_hidden_layers,
        "width": model.config.hidden_size,
    }


class Built(NamedTuple):
    """What a side trains with."""

    config: Any
    model: Any
    """On the device of `config`."""
    objective: Any
    train: Blocks
    validation: Blocks


def build(arguments: argparse.Namespace, config: Any) -> Built:
    """The shape's fresh model, and the blocks of arguments.scratch."""
    from stages.model.models import build_model
    from stages.model.objectives import make_objective

    vocabulary, scratch = vocabulary_of(arguments), Path(arguments.scratch)
    model = build_model(config.model, vocabulary, config.seed).to(config.hardware.device)
    objective = make_objective(config.objective.name, vocabulary, config.objective, model)
    return Built(config, model, objective, Blocks(scratch / "train"), Blocks(scratch / "validation"))


def train_side(arguments: argparse.Namespace) -> None:
    import torch

    from stages.model.models import prepare_torch

    input()
    config = training_config(arguments)
    if arguments.side.startswith("guide"):  # its script leaves memory to the C library
        torch.set_num_threads(config.hardware.num_threads)
    else:
        prepare_torch(config.hardware)
    built = build(arguments, config)
    clock = Clock(built.model, built.objective, built.validation, arguments.steps)
    sides = {"ours": train_ours, "plain": train_plainly, "keras": train_with_keras}
    sides |= {"guide": train_as_the_guide, "guide_bf16": train_as_the_guide}
    sides[arguments.side](arguments, *built, clock)
    print(REPORT + json.dumps(clock.report(arguments.batch_size * arguments.block_size)))


def training_config(arguments: argparse.Namespace, *more: str) -> Any:
    """The task's default configuration with the shape's model, for a number of steps without validation.

    Args:
        more: further overrides.
    """
    from stages.core.compose import compose, load
    from stages.train.stage import TrainConfig

    sizes = [f"block_size={arguments.block_size}", f"batch_size={arguments.batch_size}"]
    values = [*sizes, "seed=42", f"learning_rate={LEARNING_RATE}", "num_train_epochs=null"]
    switches = {"torch_compile": arguments.compile, "activation_checkpointing": arguments.gradient_checkpointing}
    trainer = [f"++trainer.{name}={value}" for name, value in {**switches, "max_steps": arguments.steps}.items()]
    shape = [f"++model.config.{key}={value}" for key, value in arguments.model.items()]
    if "n_positions" in arguments.model:
        shape.append(f"model.max_positions={arguments.model['n_positions']}")
    places = ["trainer.eval_strategy='no'", "tokens=-", "blocks=-", "out=-", f"report={arguments.scratch}/report"]
    groups = [
        f"task={arguments.task}",
        f"model={TINY[arguments.task]}",
        "adapter=none",
        "framework=trainer",
        f"hardware={arguments.hardware}",
    ]
    return load(TrainConfig, compose("train", [*groups, *values, *trainer, *shape, *places, *more]))


def clock_callback(clock: Clock) -> Any:
    from transformers import TrainerCallback

    class Steps(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.step()

    return Steps()


def train_ours(
    arguments: argparse.Namespace, config: Any, model: Any, objective: Any, train: Any, validation: Any, clock: Clock
) -> None:
    from stages.frameworks.trainer import make_trainer, prepare

    prepare(config)
    trainer = make_trainer(config, model, objective, train, validation, arguments.scratch)
    trainer.add_callback(clock_callback(clock))
    with work_timed(clock, trainer):
        trainer.train()


@contextlib.contextmanager
def work_timed(clock: Clock, trainer: Any) -> Iterator[None]:
    """Within, `clock` counts the work of the steps of `trainer`, however many layers of Python call it."""
    import torch

    works = [
        (trainer.model, "forward"),
        (trainer._loss, "sum"),
        (torch.Tensor, "backward"),
        (torch.nn.utils, "clip_grad_norm_"),
        (torch.optim.AdamW, "step"),
    ]
    originals = [(owner, name, vars(owner).get(name)) for owner, name in works]
    for owner, name in works:
        setattr(owner, name, clock.timed(getattr(owner, name)))
    try:
        yield
    finally:
        for owner, name, original in originals:
            delattr(owner, name) if original is None else setattr(owner, name, original)


def train_with_keras(
    arguments: argparse.Namespace, config: Any, model: Any, objective: Any, train: Any, validation: Any, clock: Clock
) -> None:
    from stages.frameworks import keras as framework
    from stages.shell.interruption import Request
    from stages.train.framework import Framework

    settings = {name: value for name, value in config.trainer.items() if value and name != "max_steps"}
    epochs = arguments.steps / -(-len(train) // config.batch_size)
    chosen = Framework(name="keras", backend="jax")
    config = dataclasses.replace(config, framework=chosen, trainer=settings, num_train_epochs=epochs)
    framework.prepare(config)
    from stages.frameworks.keras.models import to_torch
    from stages.frameworks.keras.training import Training

    training = Training(config, model, objective, train, validation, Path(arguments.scratch) / "keras", Request())
    training.handler.add_callback(clock_callback(clock))

    def refresh() -> None:
        training.built.jax_state_sync()
        to_torch(training.built, model)

    clock.refresh = refresh
    training.run()


def train_plainly(
    arguments: argparse.Namespace, config: Any, model: Any, objective: Any, train: Any, validation: Any, clock: Clock
) -> None:
    """What a step needs at least, on the batches of the pipeline."""
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
        batch = objective.batch(train[indices], indices, config.seed, 0)
        labels = batch.pop("labels")
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=config.trainer["bf16"]):
            with loss.hidden_outputs():
                outputs = model(**isolate_segments(batch, model)).logits
            nats = loss.sum(outputs, objective.targets(labels))
        (nats / (labels != IGNORED).sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.step()


def train_as_the_guide(
    arguments: argparse.Namespace, config: Any, model: Any, objective: Any, train: Any, validation: Any, clock: Clock
) -> None:
    from datasets import Dataset
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    blocks = train[range(len(train))].tolist()
    mlm = arguments.task == "mlm"
    given = TrainingArguments(
        output_dir=arguments.scratch,
        learning_rate=LEARNING_RATE,  # the guide's 2e-5 is for a trained model
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
        args=given,
        train_dataset=Dataset.from_dict(
            {"input_ids": blocks, "attention_mask": np.ones_like(blocks).tolist(), "labels": blocks}
        ),
        data_collator=DataCollatorForLanguageModeling(
            tokenizer=word_tokenizer(arguments), mlm=mlm, **({"mlm_probability": 0.15} if mlm else {})
        ),
        callbacks=[clock_callback(clock)],
    )
    trainer.train()


def word_tokenizer(arguments: argparse.Namespace) -> Any:
    """What the guide's collator needs: a tokenizer with these special tokens and this many words."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{index}": index for index in range(arguments.vocab_size)}
    special = {role: f"w{index}" for role, index in vocabulary_of(arguments).special.items()}
    if arguments.task == "causal":
        special["pad_token"] = special["eos_token"]  # as the guide does
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w3")), **special)


if __name__ == "__main__":
    train_side(parse()) if "--side" in sys.argv else main()
