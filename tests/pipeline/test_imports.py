"""A data stage imports what it uses: not torch, transformers, datasets or DVC; nor a model stage what it does not use.

pyarrow imports pandas, half a second's work, where it turns objects of Python into arrays and scalars: nothing does
that while all records are regular.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from data_helpers import REPOSITORY, questions, write_jsonl

# A stage ends without the interpreter's own end: here, it comes back.
RUN = """
import os, runpy, sys
os._exit = lambda code: None
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
heavy = {"torch", "transformers", "datasets", "pandas", "dvc", "peft", "scipy.optimize", "torch._dynamo.utils", "sympy"}
print(sorted(heavy & set(sys.modules)))
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Stage to the heavy modules that it imported in a run over files."""
    place = tmp_path_factory.mktemp("imports")
    source = write_jsonl(place / "records.jsonl", questions(60))
    flat = ["data=files", "data.flatten.columns=[title,selftext,answers.text]"]
    overrides = {
        "download": ["data=files", f"data.path={source}", f"out={place}/raw"],
        "tokenize": [*flat, "task=causal", "model=tiny-gpt2", f"raw={place}/raw", f"out={place}/tokens"],
        "group_texts": ["block_size=16", f"tokens={place}/tokens", f"raw={place}/raw", f"out={place}/blocks"],
        "baseline": [
            *flat,
            *("task=causal", "model=tiny-gpt2", "seed=0", f"raw={place}/raw", f"tokens={place}/tokens", "hardware=cpu"),
            *(f"out={place}/baseline.json", f"report={place}/baseline", f"sources={place}/sources"),
        ],
    }
    printed = {}
    for stage, given in overrides.items():
        command = [sys.executable, "-c", RUN, f"stages.{stage}", *given]
        run = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
        assert run.returncode == 0, run.stderr
        printed[stage] = run.stdout.strip()
    assert (Path(place) / "blocks/train").is_dir()
    return printed


@pytest.mark.parametrize("stage", ["download", "tokenize", "group_texts"])
def test_imports_of_a_data_stage_are_light(done: dict[str, str], stage: str) -> None:
    assert done[stage] == "[]"


def test_imports_of_a_model_stage_are_those_of_its_model(done: dict[str, str]) -> None:
    assert done["baseline"] == "['torch', 'transformers']"
