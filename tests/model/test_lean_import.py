"""transformers without the packages that a run on a CPU does not use, each time in a process of its own."""

import subprocess
import sys

import pytest
from data_helpers import REPOSITORY

HARDWARE = """
import sys
from stages.model import lean_import
from stages.model.hardware import Hardware, Launch
def hardware(device="cpu", launch=None):
    return Hardware(
        device=device, num_threads=1, per_device_batch_size=None, evaluate_batch_tokens=1, launch=launch
    )
"""
MODEL = """
import torch
from stages.model.models import prepare_torch
from stages.model.block_loss import block_loss
from transformers import AutoConfig, AutoModelForMaskedLM
config = AutoConfig.for_model("modernbert", vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=3,
    num_attention_heads=2, pad_token_id=1)
torch.manual_seed(0)
model = AutoModelForMaskedLM.from_config(config).eval()
print("logits", float(model(torch.arange(2, 18)[None]).logits.double().sum()))
"""
LOADED = """
left_out = ["torch._dynamo", "torch.distributed.tensor", "sympy", "scipy.optimize", "datasets", "peft"]
print("loaded", *[name for name in left_out if name in sys.modules])
"""


def run(*parts: str) -> dict[str, str]:
    """What a program printed, by the first word of each line."""
    done = subprocess.run(
        [sys.executable, "-c", "".join((HARDWARE, *parts))], capture_output=True, text=True, cwd=REPOSITORY, check=False
    )
    assert done.returncode == 0, done.stderr
    return dict(line.partition(" ")[::2] for line in done.stdout.splitlines())


@pytest.fixture(scope="module")
def whole() -> dict[str, str]:
    return run(MODEL, LOADED)


def test_models_imported_lean_leave_out_what_a_cpu_does_not_use_and_compute_the_same(whole: dict[str, str]) -> None:
    assert "torch._dynamo" in whole["loaded"] and "scipy.optimize" in whole["loaded"]
    lean = run("lean_import.import_lean(hardware())\n", MODEL, LOADED)
    assert lean == {"logits": whole["logits"], "loaded": ""}


def test_trainer_imported_lean_leaves_out_the_packages_that_it_is_told(whole: dict[str, str]) -> None:
    given = 'lean_import.import_lean(hardware(), trainer=True, leave_out=["datasets", "peft"])\n'
    assert run(given, "import transformers\ntransformers.Trainer\n", LOADED)["loaded"] == ""


@pytest.mark.parametrize(
    "given",
    [
        'hardware("cuda")',
        "hardware(launch=Launch(processes_per_machine=2, machines=1, rendezvous=None))",
        'hardware(), "flex_attention"',
    ],
    ids=["gpu", "processes", "flex"],
)
def test_import_where_it_may_be_used_is_whole(given: str) -> None:
    found = run(f"lean_import.import_lean({given})\n", 'print("imported", "transformers" in sys.modules)\n')
    assert found["imported"] == "False"


@pytest.mark.parametrize("broken", ["_CLASS, 'torch._dynamo.of_another_version'", "LEFT_OUT, ('nothing',)"])
def test_import_of_versions_that_it_does_not_suit_is_whole_and_computes_the_same(
    whole: dict[str, str], broken: str
) -> None:
    name, value = broken.split(", ", 1)
    given = f"lean_import.{name} = {value}\nlean_import.import_lean(hardware())\n"
    assert run(given, MODEL, LOADED) == whole


def test_model_imported_lean_can_be_compiled_later(whole: dict[str, str]) -> None:
    compiled = """
model = torch.compile(model, backend="eager")
print("compiled", float(model(torch.arange(2, 18)[None]).logits.double().sum()))
"""
    found = run("lean_import.import_lean(hardware())\n", MODEL, compiled, LOADED)
    assert found["compiled"] == found["logits"] == whole["logits"]
    assert "torch._dynamo" in found["loaded"]
