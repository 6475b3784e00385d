"""Speed and memory of the pipeline on a GPU, and checks of its metrics, resumption and sharding there.

Command python -m benchmarks.gpu [--device cuda] [--toy] [--parts NAME ...]

It takes at most 8 minutes and needs no network, DVC or DVCLive. If a part fails, the others still run. The parts are:

evaluation      Metrics in fp32 of a briefly trained model on the device and on the CPU; they should agree to 1e-5.
resume          A run that is killed with SIGKILL and resumed from its checkpoint; its weights should have the same
                bytes as those of uninterrupted runs.
fsdp            Training of a model that is sharded over one GPU (conf/hardware/fsdp.yaml); not sharded on a CPU.
gpt2            Training of GPT-2 124M at 1,024 tokens, with and without torch.compile, compared with the guide's
                unchanged script (fp32) and with bf16=True (benchmarks/training.py).
distilroberta   The same comparison for DistilRoBERTa's shape at 512 tokens.
loader          The rate at which batches of both shapes are loaded onto the device, without training.

The result of a part that raises an error is {"error": "..."}; without enough time left, it is {"skipped": "..."}.

Model FLOPs utilization (`mfu`) of a side is its tokens/s times the model's operations per token, divided by the card's
dense bf16 peak. It is null for a card that is not in PEAK_BF16_FLOPS. Operations per token are 6 N + 12 L H T (PaLM,
arXiv:2204.02311, appendix B) for N parameters, L layers of width H and sequences of T tokens; the causal mask is
ignored. N excludes embeddings that are only looked up. The output embedding is weighted by the share of positions that
the objective predicts (1, or 0.15 in masked language modeling).

`--toy` uses tiny models, to try the command without a GPU. The last line printed is one JSON object.
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
from benchmarks.training import REPORT_PREFIX, ROOT, WARM_UP, TrainingSetup

TOTAL_SECONDS = 470.0
MIN_PART_SECONDS = 10.0  # a part with less time left is skipped
TOLERANCE = 1e-5  # relative, between the metrics of two devices
SHARE_PREDICTED = {"causal": 1.0, "mlm": 0.15}

# Dense bf16 operations per second with fp32 accumulation, keyed by torch's name of the card. Sources: NVIDIA's data
# sheets (which state twice as many for sparse matrices); for RTX cards, appendices of the GA102 and Ada whitepapers.
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
    """Shape (of benchmarks/training.py), batch size and length of one training."""

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
CHECKPOINT_STEPS, KILLED_AFTER_STEP = 3, 5  # the killed run resumes from step 3


@dataclasses.dataclass
class Session:
    """One run of the benchmark."""

    device: str
    toy: bool
    scratch: Path
    """An empty directory."""
    peak_flops: float | None = None
    """Dense bf16 operations per second of the device, or None if unknown."""
    deadline: float = float("inf")
    """Value of time.monotonic() by which the current part must finish."""
    results: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Results of the finished parts, by name."""

    def get_case(self, name: str) -> Case:
        return (TOY_CASES if self.toy else CASES)[name]

    def get_hardware(self) -> str:
        return {"cuda": "gpu", "cpu": "cpu"}[self.device]


def main() -> None:
    arguments = parse_arguments()
    if arguments.work is not None:
        print(REPORT_PREFIX + json.dumps(WORK[arguments.work](training.parse_arguments(arguments.options), arguments)))
        return
    started = time.monotonic()
    name = get_device_name(arguments.device)
    with tempfile.TemporaryDirectory() as scratch:
        session = Session(arguments.device, arguments.toy, Path(scratch), get_peak_flops(name))
        run_parts(arguments.parts, session)
    from stages.core.artifacts import get_versions

    report = {
        "device": name,
        "toy": arguments.toy,
        "peak_bf16_flops_per_second": session.peak_flops,
        "versions": get_versions("torch", "transformers", "accelerate"),
        "seconds": round(time.monotonic() - started, 1),
        **session.results,
    }
    print(json.dumps(report))


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--toy", action="store_true", help="tiny models, to try the command")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS), metavar="NAME")
    parser.add_argument("--work", choices=tuple(WORK), help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--kill-after", type=int, help=argparse.SUPPRESS)
    parser.add_argument("options", nargs="*", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def get_device_name(device: str) -> str:
    """Return torch's name of the GPU, or `cpu`. Exit if the device is `cuda` and there is no GPU."""
    if device == "cpu":
        return "cpu"
    import torch

    if not torch.cuda.is_available():
        sys.exit("torch finds no GPU here; `python -m benchmarks.gpu --device cpu --toy` tries the command without one")
    return torch.cuda.get_device_name()


def run_parts(names: Sequence[str], session: Session) -> None:
    """Run the parts in `names`, in the order of PARTS and within TOTAL_SECONDS; add their results to the session."""
    end = time.monotonic() + TOTAL_SECONDS
    for name, (part, seconds) in PARTS.items():
        if name not in names:
            continue
        started = time.monotonic()
        if end - started < MIN_PART_SECONDS:
            session.results[name] = {"skipped": f"no time left of {TOTAL_SECONDS:.0f} s"}
        else:
            session.deadline = min(end, started + seconds)
            session.results[name] = capture_outcome(part, session)
        print(f"{name} ({time.monotonic() - started:.0f} s): {json.dumps(session.results[name])}", flush=True)


def capture_outcome(measure: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Call `measure` and return its result, or {"error": "..."} if it raises."""
    try:
        return measure(*arguments)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


# -- model FLOPs utilization -------------------------------------------------------------------------------------------


def get_peak_flops(name: str) -> float | None:
    """Return the dense bf16 operations per second of a card; None if unknown, also for a slice of a card (MIG)."""
    known = [card for card in PEAK_BF16_FLOPS if f"{name} ".startswith((f"{card} ", f"{card}-"))]
    return None if "MIG" in name or not known else PEAK_BF16_FLOPS[max(known, key=len)]


def compute_training_flops_per_token(sizes: dict[str, int], block_size: int, share_predicted: float) -> float:
    """Return the operations of the forward and backward pass per token, 6 N + 12 L H T (see the module's docstring).

    Args:
        sizes: `training.get_model_sizes` of a model with tied input and output embeddings.
        block_size: tokens in a sequence.
        share_predicted: fraction of the positions that the objective predicts.
    """
    in_products: float = sizes["parameters"] - sizes["embedding_parameters"]
    in_products += share_predicted * sizes["word_embedding_parameters"]
    return 6.0 * in_products + 12.0 * sizes["layers"] * sizes["width"] * block_size


# -- processes ---------------------------------------------------------------------------------------------------------


class ChildError(Exception):
    """Failure of a process that the benchmark started."""


def run_child(session: Session, *command: str, expected: int = 0) -> dict[str, Any]:
    """Run `python -m *command` and return its report; at the deadline, it is killed with its children.

    Args:
        expected: expected exit code. A process that is expected to be killed reports nothing; {} is returned.

    Raises:
        ChildError: if it exits with another code or does not finish in time.
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
            # A side of benchmarks/training.py trains for one turn per line of input.
            output, _ = process.communicate("\n" * 1000, timeout=max(0.0, session.deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise ChildError("not done in the time of this part") from None
        finally:
            with contextlib.suppress(ProcessLookupError):  # its children too
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if process.returncode != expected:
            errors.seek(0)
            lines = [line for line in errors.read().splitlines() if line.strip()]
            raise ChildError(f"exit code {process.returncode}: {' | '.join(lines[-3:])[-600:]}")
    reports = [line.removeprefix(REPORT_PREFIX) for line in output.splitlines() if line.startswith(REPORT_PREFIX)]
    return json.loads(reports[-1]) if reports else {}


def build_options(case: Case, hardware: str, scratch: Path, *more: str) -> list[str]:
    """Return the command-line arguments of benchmarks/training.py for `case`, with the blocks in `scratch`."""
    sizes = {"steps": case.steps, "batch-size": case.batch_size, "block-size": case.block_size}
    numbers = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    return ["--shape", case.shape, "--hardware", hardware, *numbers, "--scratch", str(scratch), *more]


def ensure_blocks(session: Session, name: str) -> Path:
    """Return the directory with the blocks of a case, one epoch of its steps; write them if it does not exist."""
    case, directory = session.get_case(name), session.scratch / f"blocks-{name}"
    if not directory.exists():
        num_blocks = case.steps * case.batch_size + training.VALIDATION_BLOCKS
        training.write_blocks(training.parse_arguments(build_options(case, "cpu", directory)), directory, num_blocks)
    return directory


def run_work(session: Session, work: str, case: str, *more: str, hardware: str = "", expected: int = 0) -> Any:
    """Run a function of WORK on `case` in a new process and return its report."""
    options = build_options(session.get_case(case), hardware or session.get_hardware(), ensure_blocks(session, case))
    return run_child(session, "benchmarks.gpu", "--work", work, *more, "--", *options, expected=expected)


# -- the parts ---------------------------------------------------------------------------------------------------------


def measure_training(name: str, session: Session) -> dict[str, Any]:
    """Return the speed and memory of each side of a case, and the ratios of our speed to the guide's."""
    case, scratch = session.get_case(name), ensure_blocks(session, name)
    share = SHARE_PREDICTED[training.SHAPES[case.shape][0]]

    def measure_side(*more: str) -> dict[str, Any]:
        report = run_child(session, "benchmarks.training", *build_options(case, session.get_hardware(), scratch, *more))
        rate = report["tokens_per_second"]
        operations = compute_training_flops_per_token(report["sizes"], case.block_size, share)
        return {
            "tokens_per_second": round(rate),
            "mfu": None if session.peak_flops is None else round(rate * operations / session.peak_flops, 4),
            "peak_bytes": report["peak_gpu_bytes"] or report["peak_rss_bytes"],
            "warm_up_seconds": round(report["warm_up_seconds"], 1),
            "validation_loss": round(report["losses"][-1], 4),
            "flops_per_token": operations,
        }

    sides = {
        "ours": capture_outcome(measure_side, "--side", "ours"),
        "guide": capture_outcome(measure_side, "--side", "guide"),
        "guide_bf16": capture_outcome(measure_side, "--side", "guide_bf16"),
        "ours_compiled": capture_outcome(measure_side, "--side", "ours", "--compile"),
    }
    ratios = {
        f"{one}_over_{other}": round(sides[one]["tokens_per_second"] / sides[other]["tokens_per_second"], 3)
        for one in ("ours", "ours_compiled")
        for other in ("guide", "guide_bf16")
        if "error" not in sides[one] and "error" not in sides[other]
    }
    return {**dataclasses.asdict(case), **sides, **ratios}


def measure_loader(session: Session) -> dict[str, Any]:
    """Return the tokens/s of loading the batches of each shape, and its ratio to our fastest training."""

    def measure_case(name: str) -> dict[str, Any]:
        rate = run_work(session, "loader", name)["tokens_per_second"]
        trained = [session.results.get(name, {}).get(side, {}) for side in ("ours", "ours_compiled")]
        fastest = max((side.get("tokens_per_second", 0) for side in trained), default=0)
        return {"tokens_per_second": round(rate), "over_training": round(rate / fastest, 2) if fastest else None}

    return {name: capture_outcome(measure_case, name) for name in ("gpt2", "distilroberta")}


def compare_evaluation(session: Session) -> dict[str, Any]:
    """Compare the metrics of one model on the device and on the CPU; return their largest relative difference."""
    metrics = run_work(session, "evaluation", "evaluation", "--directory", str(session.scratch / "evaluated"))
    on_device, on_cpu = metrics[session.device], metrics["cpu"]
    differences = {key: abs(on_device[key] - on_cpu[key]) / abs(on_cpu[key]) for key in on_cpu}
    return {
        "device": on_device,
        "cpu": on_cpu,
        "relative_difference": max(differences.values()),
        "equal": max(differences.values()) <= TOLERANCE,
    }


def compare_resumed(session: Session) -> dict[str, Any]:
    """Compare the hashes of the weights of two uninterrupted runs and of one that was killed and resumed.

    If the uninterrupted runs differ, operations of the device are nondeterministic, and `identical` says nothing about
    resumption.
    """
    ensure_blocks(session, "resume")

    def run_training(name: str, *more: str, expected: int = 0) -> Any:
        directory = str(session.scratch / f"resume-{name}")
        return run_work(session, "resume", "resume", "--directory", directory, *more, expected=expected)

    with ThreadPoolExecutor(3) as pool:
        uninterrupted, repeated_run = pool.submit(run_training, "uninterrupted"), pool.submit(run_training, "again")
        killed = pool.submit(run_training, "killed", "--kill-after", str(KILLED_AFTER_STEP), expected=-signal.SIGKILL)
    killed.result()
    resumed = run_training("killed")
    expected, repeated = uninterrupted.result()["sha256"], repeated_run.result()["sha256"]
    return {
        "killed_after_step": KILLED_AFTER_STEP,
        "resumed_from_step": resumed["resumed_from_step"],
        "steps": session.get_case("resume").steps,
        "sha256": expected,
        "resumed_sha256": resumed["sha256"],
        "identical": resumed["sha256"] == expected,
        "uninterrupted_runs_identical": repeated == expected,
    }


def try_sharding(session: Session) -> dict[str, Any]:
    """Train in one launched process and return the loss before and after; on a GPU, the model is sharded."""
    hardware = {"cuda": "fsdp", "cpu": "multi_cpu"}[session.device]
    directory = session.scratch / "sharded"
    directory.mkdir()
    report: dict[str, Any] = run_work(session, "fsdp", "fsdp", "--directory", str(directory), hardware=hardware)
    return report


# Name of a part to its function and its time limit in seconds.
PARTS: dict[str, tuple[Callable[[Session], dict[str, Any]], float]] = {
    "evaluation": (compare_evaluation, 60.0),
    "resume": (compare_resumed, 80.0),
    "fsdp": (try_sharding, 60.0),
    "gpt2": (functools.partial(measure_training, "gpt2"), 150.0),
    "distilroberta": (functools.partial(measure_training, "distilroberta"), 120.0),
    "loader": (measure_loader, 40.0),
}


# -- the work of a part, in a new process ------------------------------------------------------------------------------


def build_setup(arguments: argparse.Namespace, *more: str) -> TrainingSetup:
    """Build the model and data as the train stage does; `more` are overrides of its configuration."""
    from stages.frameworks.trainer import prepare_framework
    from stages.model.models import prepare_torch

    config = training.make_training_config(arguments, *more)
    prepare_framework(config)
    prepare_torch(config.hardware)
    return training.make_setup(arguments, config)


def time_loader(arguments: argparse.Namespace, _: argparse.Namespace) -> dict[str, Any]:
    """Return the tokens/s of the Trainer's loader after WARM_UP batches, during which its processes start."""
    import torch

    from stages.frameworks.trainer import make_trainer

    setup = build_setup(arguments)
    loader = make_trainer(*setup, arguments.scratch).get_train_dataloader()
    started = 0.0
    for number, _batch in enumerate(loader, 1):
        if number == WARM_UP:
            started = time.perf_counter()
    if setup.config.hardware.device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    return {"tokens_per_second": (number - WARM_UP) * arguments.batch_size * arguments.block_size / seconds}


def evaluate_on_both_devices(arguments: argparse.Namespace, work_arguments: argparse.Namespace) -> dict[str, Any]:
    """Train a model for some steps, as a fresh one would hide the effect of TF32; return its metrics by device."""
    import torch

    from stages.figures.metrics import compute_document_nats
    from stages.frameworks.trainer import make_trainer
    from stages.model.block_loss import compute_block_loss
    from stages.model.trained import load_trained_model
    from stages.tokens.encoding import DocumentText

    setup = build_setup(arguments)
    trainer = make_trainer(*setup, arguments.scratch)
    trainer.train()
    trainer.model.save_pretrained(work_arguments.directory)
    del trainer
    validation, metrics = setup.validation, {}
    documents = [validation[[index]][0] for index in range(len(validation))]
    torch.set_num_threads(os.cpu_count() or 1)
    for device in dict.fromkeys((setup.config.hardware.device, "cpu")):
        model = load_trained_model(arguments.task, work_arguments.directory).to(device)
        texts = (DocumentText(ids, 0) for ids in documents)
        windows = setup.objective.build_windows(texts, arguments.block_size // 2)
        nats, num_tokens = compute_document_nats(model, windows, len(documents), 8192)
        metrics[device] = {
            "loss": compute_block_loss(model, setup.objective, validation, 8192),
            "document_nats_per_token": float(nats.sum() / num_tokens.sum()),
        }
    return metrics


def train_resumably(arguments: argparse.Namespace, work_arguments: argparse.Namespace) -> dict[str, Any]:
    """Train with checkpoints in the working directory, from the newest if any; return the hash of the weights."""
    from transformers import TrainerCallback

    from stages.core.artifacts import compute_sha256
    from stages.frameworks.trainer import make_trainer
    from stages.shell.interruption import StopRequest
    from stages.train.checkpoints import Checkpoints

    class Kill(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == work_arguments.kill_after:
                os.kill(os.getpid(), signal.SIGKILL)

    setup = build_setup(arguments, "++trainer.save_strategy=steps", f"++trainer.save_steps={CHECKPOINT_STEPS}")
    resumed_from = Checkpoints(work_arguments.directory, 1).find_newest()
    trainer = make_trainer(*setup, str(work_arguments.directory))
    trainer.add_callback(Kill())
    trainer.train_or_resume(StopRequest())
    trainer.model.save_pretrained(work_arguments.directory / "model")
    return {
        "resumed_from_step": resumed_from,
        "sha256": compute_sha256(work_arguments.directory / "model" / "model.safetensors"),
    }


def train_in_launched_process(arguments: argparse.Namespace, work_arguments: argparse.Namespace) -> dict[str, Any]:
    """Launch one process as conf/hardware/{fsdp,multi_cpu}.yaml do, and return its report."""
    from benchmarks.gpu import train_sharded  # the process imports it by this name, not from __main__
    from stages.launch.torchrun import run_in_processes

    config = training.make_training_config(arguments, "hardware.launch.processes_per_machine=1")
    file = work_arguments.directory / "report.json"
    run_in_processes("train", functools.partial(train_sharded, arguments, file), config)
    report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return report


def train_sharded(arguments: argparse.Namespace, file: Path, config: Any) -> None:
    """Train with `config`, sharded if it says so, and write the losses to `file`; runs in the launched process."""
    import torch

    from stages.frameworks.trainer import fit, prepare_framework
    from stages.model.block_loss import compute_block_loss
    from stages.model.models import prepare_torch
    from stages.shell.interruption import StopRequest

    prepare_framework(config)
    prepare_torch(config.hardware)
    setup = training.make_setup(arguments, config)
    before = compute_block_loss(setup.model, setup.objective, setup.validation, 8192)
    setup.model.to("cpu")  # the train stage also keeps it there until it is sharded
    trained, state, _ = fit(*setup, str(file.parent), StopRequest())  # raises if a weight is not sharded
    on_gpu = config.hardware.device == "cuda"
    after = compute_block_loss(trained.to(config.hardware.device), setup.objective, setup.validation, 8192)
    report = {
        "sharded": bool(config.trainer.get("fsdp")),
        "steps": state.global_step,
        "loss_before": before,
        "loss_after": after,
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
    }
    file.write_text(json.dumps(report), encoding="utf-8")


WORK = {
    "loader": time_loader,
    "evaluation": evaluate_on_both_devices,
    "resume": train_resumably,
    "fsdp": train_in_launched_process,
}

if __name__ == "__main__":
    main()
