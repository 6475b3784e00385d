"""What the pipeline does on a GPU: its speed and memory, and whether figures, resumption and sharding are right there.

Command python -m benchmarks.gpu [--device cuda] [--toy] [--parts NAME ...]

At most 8 minutes, without network, DVC or DVCLive. The parts, each of which may fail without ending the others:

evaluation      Metrics in fp32 of a briefly trained model on the device and on the CPU; they should be equal to 1e-5.
resume          A run that SIGKILL ended and that went on from its checkpoint, against uninterrupted runs: the same
                bytes.
fsdp            A model sharded over one GPU (conf/hardware/fsdp.yaml) trains. On a CPU it is not sharded.
gpt2            Training of GPT-2 124M at 1,024 tokens, with and without torch.compile, against the guide's script as
                it is (fp32) and with bf16=True (benchmarks/training.py).
distilroberta   The same for DistilRoBERTa's shape at 512 tokens.
loader          The rate at which batches of both shapes reach the device, with nothing that uses them.

A part that raises an error is {"error": "..."}; one for which no time is left, {"skipped": "..."}.

Model FLOPs utilization (`mfu`) is tokens/s times the model's operations per token, over the dense bf16 peak of the
card, for every side; null for a card that PEAK_BF16_FLOPS does not have. Operations per token are 6 N + 12 L H T (PaLM,
arXiv:2204.02311, appendix B): N parameters, L layers, H their width, T tokens in a sequence; a causal mask is not taken
into account. N leaves out embeddings that are looked up; the output embedding counts for the share of positions that
the objective predicts (1, or 0.15 in masked language modeling).

`--toy` takes tiny models, so that the command can be tried without a GPU. The last line printed is one JSON object.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import training
from benchmarks.training import REPORT, ROOT, WARM_UP, Built

TOTAL_SECONDS = 470.0
LEAST_SECONDS = 10.0  # a part that is left less is skipped
TOLERANCE = 1e-5  # relative, between the metrics of two devices
SHARE_PREDICTED = {"causal": 1.0, "mlm": 0.15}

# Dense bf16 operations per second with accumulation in fp32, by the name that torch gives the card, from NVIDIA's data
# sheets (which state twice as many for sparse matrices); RTX cards: appendices of the GA102 and Ada whitepapers.
PEAK_BF16_FLOPS = {
    "NVIDIA B200": 2250e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,  # SXM5
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
    "NVIDIA GeForce RTX 3090": 71e12,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A training: a shape of benchmarks/training.py, and how much of it is trained at once and in all."""

    shape: str
    batch_size: int
    """Sequences in a step."""
    block_size: int
    """Tokens in a sequence."""
    steps: int

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.block_size


CASES = {
    "gpt2": Case("gpt2", 16, 1024, 45),
    "distilroberta": Case("distilroberta", 32, 512, 45),
    "evaluation": Case("gpt2", 8, 512, 20),
    "resume": Case("distilgpt2", 4, 256, 8),
    "fsdp": Case("gpt2", 4, 512, 20),
}
TOY_CASES = {
    "gpt2": Case("tiny-gpt2", 4, 64, 12),
    "distilroberta": Case("tiny-roberta", 4, 64, 12),
    "evaluation": Case("tiny-gpt2", 4, 64, 8),
    "resume": Case("tiny-gpt2", 4, 64, 8),
    "fsdp": Case("tiny-gpt2", 4, 64, 8),
}
CHECKPOINT_STEPS, KILLED_AFTER_STEP = 3, 5  # of the resumed run, which goes on from step 3


@dataclasses.dataclass
class Session:
    """One run of the benchmark."""

    device: str
    toy: bool
    scratch: Path
    """An empty directory."""
    peak_flops: float | None = None
    """Dense bf16 operations per second of the device; None: unknown."""
    deadline: float = float("inf")
    """time.monotonic() at which the current part has to be done."""
    results: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Of the parts so far, by name."""

    def case(self, name: str) -> Case:
        return (TOY_CASES if self.toy else CASES)[name]

    def hardware(self) -> str:
        return {"cuda": "gpu", "cpu": "cpu"}[self.device]


def main() -> None:
    arguments = parse()
    if arguments.work is not None:
        print(REPORT + json.dumps(WORK[arguments.work](training.parse(arguments.options), arguments)))
        return
    started = time.monotonic()
    name = device_name(arguments.device)
    with tempfile.TemporaryDirectory() as scratch:
        session = Session(arguments.device, arguments.toy, Path(scratch), peak_flops_of(name))
        run_parts(arguments.parts, session)
    from stages.core.artifacts import versions

    report = {
        "device": name,
        "toy": arguments.toy,
        "peak_bf16_flops_per_second": session.peak_flops,
        "versions": versions("torch", "transformers", "accelerate"),
        "seconds": round(time.monotonic() - started, 1),
        **session.results,
    }
    print(json.dumps(report))


def parse(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--toy", action="store_true", help="tiny models, to try the command")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS), metavar="NAME")
    parser.add_argument("--work", choices=tuple(WORK), help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--kill-after", type=int, help=argparse.SUPPRESS)
    parser.add_argument("options", nargs="*", help=argparse.SUPPRESS)
    return parser.parse_args(given)


def device_name(device: str) -> str:
    """The name that torch gives the GPU; `cpu` for a processor. Ends the command if there is no GPU."""
    if device == "cpu":
        return "cpu"
    import torch

    if not torch.cuda.is_available():
        sys.exit("torch finds no GPU here; `python -m benchmarks.gpu --device cpu --toy` tries the command without one")
    return torch.cuda.get_device_name()


def run_parts(names: Sequence[str], session: Session) -> None:
    """Run the parts called `names`, in the order of PARTS and in TOTAL_SECONDS; add their outcomes to the results."""
    end = time.monotonic() + TOTAL_SECONDS
    for name, (part, seconds) in PARTS.items():
        if name not in names:
            continue
        started = time.monotonic()
        if end - started < LEAST_SECONDS:
            session.results[name] = {"skipped": f"no time left of {TOTAL_SECONDS:.0f} s"}
        else:
            session.deadline = min(end, started + seconds)
            session.results[name] = outcome(part, session)
        print(f"{name} ({time.monotonic() - started:.0f} s): {json.dumps(session.results[name])}", flush=True)


def outcome(measure: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What `measure` returns, or the error that it raises."""
    try:
        return measure(*arguments)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


# -- model FLOPs utilization -------------------------------------------------------------------------------------------


def peak_flops_of(name: str) -> float | None:
    """Dense bf16 operations per second of the card called `name`; None: unknown, as for a slice of a card (MIG)."""
    known = [card for card in PEAK_BF16_FLOPS if f"{name} ".startswith((f"{card} ", f"{card}-"))]
    return None if "MIG" in name or not known else PEAK_BF16_FLOPS[max(known, key=len)]


def training_flops_per_token(sizes: dict[str, int], block_size: int, share_predicted: float) -> float:
    """Operations of the forward and backward pass per token: 6 N + 12 L H T, as the module's docstring has it.

    Args:
        sizes: `training.model_sizes` of a model whose output embedding is its word embedding.
        block_size: tokens in a sequence.
        share_predicted: of the positions, those whose logits are needed.
    """
    in_products = sizes["parameters"] - sizes["embedding_parameters"]
    in_products += share_predicted * sizes["word_embedding_parameters"]
    return 6.0 * in_products + 12.0 * sizes["layers"] * sizes["width"] * block_size


# -- processes ---------------------------------------------------------------------------------------------------------


class ChildError(Exception):
    """A process that the benchmark started failed."""


def run_child(session: Session, *command: str, expected: int = 0) -> dict[str, Any]:
    """Run `python -m *command` to its end and return what it reports; ended with its own children at the deadline.

    Args:
        expected: its exit code; of one that is expected to be killed, which reports nothing, {} is returned.

    Raises:
        ChildError: if it ends with another exit code, or not in time.
    """
    environment = {**os.environ, "LM_REPRO_CACHE": str(session.scratch / "cache"), "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
        )
        try:
            # A side of benchmarks/training.py trains for a turn for every line.
            output, _ = process.communicate("\n" * 1000, timeout=max(0.0, session.deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise ChildError("not done in the time of this part") from None
        finally:
            with contextlib.suppress(ProcessLookupError):  # what it started, too
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if process.returncode != expected:
            errors.seek(0)
            said = [line for line in errors.read().splitlines() if line.strip()]
            raise ChildError(f"exit code {process.returncode}: {' | '.join(said[-3:])[-600:]}")
    reports = [line.removeprefix(REPORT) for line in output.splitlines() if line.startswith(REPORT)]
    return json.loads(reports[-1]) if reports else {}


def options(case: Case, hardware: str, scratch: Path, *more: str) -> list[str]:
    """The arguments of benchmarks/training.py for `case`, on the blocks in `scratch`."""
    sizes = {"steps": case.steps, "batch-size": case.batch_size, "block-size": case.block_size}
    numbers = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    return ["--shape", case.shape, "--hardware", hardware, *numbers, "--scratch", str(scratch), *more]


def with_blocks(session: Session, name: str) -> Path:
    """The directory of the blocks for the case called `name`, written where they are not yet: all in one epoch."""
    case, directory = session.case(name), session.scratch / f"blocks-{name}"
    if not directory.exists():
        num_blocks = case.steps * case.batch_size + training.VALIDATION_BLOCKS
        training.write_blocks(training.parse(options(case, "cpu", directory)), directory, num_blocks)
    return directory


def run_work(session: Session, work: str, case: str, *more: str, hardware: str = "", expected: int = 0) -> Any:
    """Run one of WORK on `case` in a process of its own and return what it reports."""
    given = options(session.case(case), hardware or session.hardware(), with_blocks(session, case))
    return run_child(session, "benchmarks.gpu", "--work", work, *more, "--", *given, expected=expected)


# -- the parts ---------------------------------------------------------------------------------------------------------


def measure_training(name: str, session: Session) -> dict[str, Any]:
    """Speed and memory of each side of the case called `name`, and ours over the guide's."""
    case, scratch = session.case(name), with_blocks(session, name)
    share = SHARE_PREDICTED[training.SHAPES[case.shape][0]]

    def measure(*more: str) -> dict[str, Any]:
        found = run_child(session, "benchmarks.training", *options(case, session.hardware(), scratch, *more))
        rate = found["tokens_per_second"]
        operations = training_flops_per_token(found["sizes"], case.block_size, share)
        return {
            "tokens_per_second": round(rate),
            "mfu": None if session.peak_flops is None else round(rate * operations / session.peak_flops, 4),
            "peak_bytes": found["peak_gpu_bytes"] or found["peak_rss_bytes"],
            "warm_up_seconds": round(found["warm_up_seconds"], 1),
            "validation_loss": round(found["losses"][-1], 4),
            "flops_per_token": operations,
        }

    sides = {
        "ours": outcome(measure, "--side", "ours"),
        "guide": outcome(measure, "--side", "guide"),
        "guide_bf16": outcome(measure, "--side", "guide_bf16"),
        "ours_compiled": outcome(measure, "--side", "ours", "--compile"),
    }
    ratios = {
        f"{one}_over_{other}": round(sides[one]["tokens_per_second"] / sides[other]["tokens_per_second"], 3)
        for one in ("ours", "ours_compiled")
        for other in ("guide", "guide_bf16")
        if "error" not in sides[one] and "error" not in sides[other]
    }
    return {**dataclasses.asdict(case), **sides, **ratios}


def measure_loader(session: Session) -> dict[str, Any]:
    """Tokens/s at which the batches of each shape are loaded, and their ratio to the fastest training's."""

    def measure(name: str) -> dict[str, Any]:
        rate = run_work(session, "loader", name)["tokens_per_second"]
        trained = [session.results.get(name, {}).get(side, {}) for side in ("ours", "ours_compiled")]
        fastest = max((side.get("tokens_per_second", 0) for side in trained), default=0)
        return {"tokens_per_second": round(rate), "over_training": round(rate / fastest, 2) if fastest else None}

    return {name: outcome(measure, name) for name in ("gpt2", "distilroberta")}


def compare_evaluation(session: Session) -> dict[str, Any]:
    """The metrics of one model on the device and on the CPU, and their largest relative difference."""
    found = run_work(session, "evaluation", "evaluation", "--directory", str(session.scratch / "evaluated"))
    there, here = found[session.device], found["cpu"]
    differences = {key: abs(there[key] - here[key]) / abs(here[key]) for key in here}
    return {
        "device": there,
        "cpu": here,
        "relative_difference": max(differences.values()),
        "equal": max(differences.values()) <= TOLERANCE,
    }


def compare_resumed(session: Session) -> dict[str, Any]:
    """The hashes of the weights of two uninterrupted runs and of one that was killed and went on.

    Where the uninterrupted ones differ from each other, the device's own operations do not repeat, and `identical`
    says nothing of resumption.
    """
    with_blocks(session, "resume")

    def run(name: str, *more: str, expected: int = 0) -> Any:
        directory = str(session.scratch / f"resume-{name}")
        return run_work(session, "resume", "resume", "--directory", directory, *more, expected=expected)

    with ThreadPoolExecutor(3) as pool:
        uninterrupted, again = pool.submit(run, "uninterrupted"), pool.submit(run, "again")
        killed = pool.submit(run, "killed", "--kill-after", str(KILLED_AFTER_STEP), expected=-signal.SIGKILL)
    killed.result()
    resumed = run("killed")
    expected, repeated = uninterrupted.result()["sha256"], again.result()["sha256"]
    return {
        "killed_after_step": KILLED_AFTER_STEP,
        "resumed_from_step": resumed["resumed_from_step"],
        "steps": session.case("resume").steps,
        "sha256": expected,
        "resumed_sha256": resumed["sha256"],
        "identical": resumed["sha256"] == expected,
        "uninterrupted_runs_identical": repeated == expected,
    }


def try_sharding(session: Session) -> dict[str, Any]:
    """Loss before and after training of a model that is sharded over one GPU; on a CPU, in one process of several."""
    hardware = {"cuda": "fsdp", "cpu": "multi_cpu"}[session.device]
    directory = session.scratch / "sharded"
    directory.mkdir()
    found: dict[str, Any] = run_work(session, "fsdp", "fsdp", "--directory", str(directory), hardware=hardware)
    return found


# Name to the part and the seconds that it may take.
PARTS: dict[str, tuple[Callable[[Session], dict[str, Any]], float]] = {
    "evaluation": (compare_evaluation, 60.0),
    "resume": (compare_resumed, 80.0),
    "fsdp": (try_sharding, 60.0),
    "gpt2": (functools.partial(measure_training, "gpt2"), 150.0),
    "distilroberta": (functools.partial(measure_training, "distilroberta"), 120.0),
    "loader": (measure_loader, 40.0),
}


# -- the work of a part, in its own process ----------------------------------------------------------------------------


def prepared(arguments: argparse.Namespace, *more: str) -> Built:
    """What is trained, as the stage `train` prepares it; `more` are overrides of its configuration."""
    from stages.frameworks.trainer import prepare
    from stages.model.models import prepare_torch

    config = training.training_config(arguments, *more)
    prepare(config)
    prepare_torch(config.hardware)
    return training.build(arguments, config)


def load_batches(arguments: argparse.Namespace, _: argparse.Namespace) -> dict[str, Any]:
    """Tokens/s of the Trainer's loader, after WARM_UP batches, in which its processes start."""
    import torch

    from stages.frameworks.trainer import make_trainer

    built = prepared(arguments)
    loader = make_trainer(*built, arguments.scratch).get_train_dataloader()
    started = 0.0
    for number, _batch in enumerate(loader, 1):
        if number == WARM_UP:
            started = time.perf_counter()
    if built.config.hardware.device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    return {"tokens_per_second": (number - WARM_UP) * arguments.batch_size * arguments.block_size / seconds}


def evaluate_on_both(arguments: argparse.Namespace, own: argparse.Namespace) -> dict[str, Any]:
    """Metrics, by device, of a model that is trained for some steps: a fresh one's would hide the effect of TF32."""
    import torch

    from stages.figures.metrics import document_nats
    from stages.frameworks.trainer import make_trainer
    from stages.model.block_loss import block_loss
    from stages.model.objectives import Text
    from stages.model.trained import load_trained

    built = prepared(arguments)
    trainer = make_trainer(*built, arguments.scratch)
    trainer.train()
    trainer.model.save_pretrained(own.directory)
    del trainer
    validation, found = built.validation, {}
    documents = [validation[[index]][0] for index in range(len(validation))]
    torch.set_num_threads(os.cpu_count() or 1)
    for device in dict.fromkeys((built.config.hardware.device, "cpu")):
        model = load_trained(arguments.task, own.directory).to(device)
        texts = (Text(ids, 0) for ids in documents)
        windows = built.objective.windows(texts, arguments.block_size // 2)
        nats, num_tokens = document_nats(model, windows, len(documents), 8192)
        found[device] = {
            "loss": block_loss(model, built.objective, validation, 8192),
            "document_nats_per_token": float(nats.sum() / num_tokens.sum()),
        }
    return found


def train_resumably(arguments: argparse.Namespace, own: argparse.Namespace) -> dict[str, Any]:
    """Train with checkpoints in own.directory, from the newest if there is one; the hash of the weights' file."""
    from transformers import TrainerCallback

    from stages.core.artifacts import sha256
    from stages.frameworks.trainer import make_trainer
    from stages.shell.interruption import Request
    from stages.train.checkpoints import Checkpoints

    class Kill(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == own.kill_after:
                os.kill(os.getpid(), signal.SIGKILL)

    built = prepared(arguments, "++trainer.save_strategy=steps", f"++trainer.save_steps={CHECKPOINT_STEPS}")
    resumed_from = Checkpoints(own.directory, 1).newest()
    trainer = make_trainer(*built, str(own.directory))
    trainer.add_callback(Kill())
    trainer.train_on(Request())
    trainer.model.save_pretrained(own.directory / "model")
    return {"resumed_from_step": resumed_from, "sha256": sha256(own.directory / "model" / "model.safetensors")}


def train_in_one_process_of_several(arguments: argparse.Namespace, own: argparse.Namespace) -> dict[str, Any]:
    """Start one process as conf/hardware/{fsdp,multi_cpu}.yaml do, and return what it wrote."""
    from benchmarks.gpu import train_sharded  # by this name the process finds it
    from stages.launch.torchrun import run_in_processes

    config = training.training_config(arguments, "hardware.launch.processes_per_machine=1")
    file = own.directory / "report.json"
    run_in_processes("train", functools.partial(train_sharded, arguments, file), config)
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def train_sharded(arguments: argparse.Namespace, file: Path, config: Any) -> None:
    """Train by `config`, sharded where it says so, and write the losses to `file`; in one of its processes."""
    import torch

    from stages.frameworks.trainer import fit, prepare
    from stages.model.block_loss import block_loss
    from stages.model.models import prepare_torch
    from stages.shell.interruption import Request

    prepare(config)
    prepare_torch(config.hardware)
    built = training.build(arguments, config)
    before = block_loss(built.model, built.objective, built.validation, 8192)
    built.model.to("cpu")  # where the stage `train` leaves it until it is sharded
    trained, state = fit(*built, str(file.parent), Request())  # which refuses to go on if a weight is not sharded
    on_gpu = config.hardware.device == "cuda"
    after = block_loss(trained.to(config.hardware.device), built.objective, built.validation, 8192)
    report = {
        "sharded": bool(config.trainer.get("fsdp")),
        "steps": state.global_step,
        "loss_before": before,
        "loss_after": after,
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
    }
    file.write_text(json.dumps(report), encoding="utf-8")


WORK = {
    "loader": load_batches,
    "evaluation": evaluate_on_both,
    "resume": train_resumably,
    "fsdp": train_in_one_process_of_several,
}

if __name__ == "__main__":
    main()
