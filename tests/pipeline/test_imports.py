"""Stages import only the libraries that they use: data stages no torch, transformers, datasets or DVC.

pyarrow imports pandas, which takes half a second, when it converts Python objects to arrays and scalars. Stages avoid
this conversion as long as all records are regular.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from data_helpers import REPOSITORY, make_questions, write_jsonl

from stages.core.source_code import list_stages

HEAVY = ["torch", "transformers", "datasets", "pandas", "dvc", "peft", "scipy.optimize", "torch._dynamo.utils", "sympy"]
# A stage ends with os._exit; replaced here, so that the script can print the imported modules.
RUN_SCRIPT = f"""
import os, runpy, sys
os._exit = lambda code: None
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
print([name for name in {HEAVY} if name in sys.modules])
"""


@pytest.fixture(scope="module")
def heavy_imports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Map of each stage to the heavy modules that it imports in a run with data=files."""
    directory = tmp_path_factory.mktemp("imports")
    source = write_jsonl(directory / "records.jsonl", make_questions(60))
    flat = ["data=files", "data.flatten.columns=[title,selftext,answers.text]"]
    overrides = {
        "download": ["data=files", f"data.path={source}", f"out={directory}/raw"],
        "tokenize": [*flat, "task=causal", "model=tiny-gpt2", f"raw={directory}/raw", f"out={directory}/tokens"],
        "group_texts": [
            "block_size=16",
            f"tokens={directory}/tokens",
            f"raw={directory}/raw",
            f"out={directory}/blocks",
        ],
        "baseline": [
            *flat,
            *(
                "task=causal",
                "model=tiny-gpt2",
                "seed=0",
                f"raw={directory}/raw",
                f"tokens={directory}/tokens",
                "hardware=cpu",
            ),
            *(f"out={directory}/baseline.json", f"report={directory}/baseline", f"sources={directory}/sources"),
        ],
    }
    printed = {}
    for stage, stage_overrides in overrides.items():
        command = [sys.executable, "-c", RUN_SCRIPT, f"stages.{stage}", *stage_overrides]
        run = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
        assert run.returncode == 0, run.stderr
        printed[stage] = run.stdout.strip()
    assert (Path(directory) / "blocks/train").is_dir()
    return printed


@pytest.mark.parametrize("stage", ["download", "tokenize", "group_texts"])
def test_imports_of_a_data_stage_are_light(heavy_imports: dict[str, str], stage: str) -> None:
    assert heavy_imports[stage] == "[]"


@pytest.mark.parametrize("stage", [*list_stages(), "code"])
def test_imports_of_a_config_class_are_light(stage: str) -> None:
    # `make check` imports the config classes of all stages.
    code = f"import sys, stages.{stage}.stage; print([name for name in {HEAVY} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert run.stdout.strip() == "[]"


def test_imports_of_a_model_stage_are_those_of_its_model(heavy_imports: dict[str, str]) -> None:
    assert heavy_imports["baseline"] == "['torch', 'transformers']"
