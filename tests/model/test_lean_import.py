"""Import of transformers without the packages that a CPU run does not use; each test uses a new process."""

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
from stages.model.block_loss import compute_block_loss
from transformers import AutoConfig, AutoModelForMaskedLM
config = AutoConfig.for_model("modernbert", vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=3,
    num_attention_heads=2, pad_token_id=1)
torch.manual_seed(0)
model = AutoModelForMaskedLM.from_config(config).eval()
print("logits", float(model(torch.arange(2, 18)[None]).logits.double().sum()))
"""
LOADED = """
left_out = ["torch._dynamo.utils", "torch.distributed.tensor", "sympy", "scipy.optimize", "datasets", "peft"]
print("loaded", *[name for name in left_out if name in sys.modules])
"""


def run(*parts: str) -> dict[str, str]:
    """Run a program; return its output, by the first word of each line."""
    done = subprocess.run(
        [sys.executable, "-c", "".join((HARDWARE, *parts))], capture_output=True, text=True, cwd=REPOSITORY, check=False
    )
    assert done.returncode == 0, done.stderr
    return dict(line.partition(" ")[::2] for line in done.stdout.splitlines())


@pytest.fixture(scope="module")
def whole() -> dict[str, str]:
    return run(MODEL, LOADED)


def test_models_imported_lean_leave_out_what_a_cpu_does_not_use_and_compute_the_same(whole: dict[str, str]) -> None:
    assert "torch._dynamo.utils" in whole["loaded"] and "scipy.optimize" in whole["loaded"]
    lean = run("lean_import.import_lean(hardware())\n", MODEL, LOADED)
    assert lean == {"logits": whole["logits"], "loaded": ""}


def test_trainer_imported_lean_leaves_out_what_it_does_not_use(whole: dict[str, str]) -> None:
    given = "lean_import.import_lean(hardware(), trainer=True)\n"
    assert run(given, "import transformers\ntransformers.Trainer\n", LOADED)["loaded"] == ""


@pytest.mark.slow
def test_trainer_imported_lean_for_an_adapter_knows_one() -> None:
    check = """
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.trainer_utils import _is_peft_model
small = AutoConfig.for_model("gpt2", vocab_size=9, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0)
lora = LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)
model = get_peft_model(AutoModelForCausalLM.from_config(small), lora)
print("known", _is_peft_model(model), bool(model(torch.zeros(1, 3, dtype=torch.int64)).logits.isfinite().all()))
"""
    assert run("lean_import.import_lean(hardware(), trainer=True, adapter=True)\n", check)["known"] == "True True"
    # As evaluate loads a model with an adapter.
    assert run("lean_import.import_lean(hardware())\n", check)["known"].endswith("True")


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


@pytest.mark.slow
def test_import_of_a_transformers_that_it_does_not_suit_is_whole_and_computes_the_same(whole: dict[str, str]) -> None:
    given = "lean_import.HIDDEN_PACKAGES = ('nothing',)\nlean_import.import_lean(hardware())\n"
    assert run(given, MODEL, LOADED) == whole


@pytest.mark.slow
def test_import_of_a_torch_that_it_does_not_suit_computes_the_same(whole: dict[str, str]) -> None:
    given = "lean_import._INDEPENDENT_SUBMODULE = 'of_another_version'\nlean_import.import_lean(hardware())\n"
    assert run(given, MODEL)["logits"] == whole["logits"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "use",
    [
        "import torch._dynamo.utils\nfound = torch._dynamo.utils",
        "from torch._dynamo import utils as found",
        "import torch\nfound = torch._dynamo.utils",
        "import sys\nstand_in = sys.modules['torch._dynamo']\nfound = stand_in.utils",
    ],
    ids=["module", "from", "attribute", "kept"],
)
def test_dynamo_of_a_lean_import_is_the_package_when_it_is_used(use: str) -> None:
    said = """
import torch._dynamo
print("same", found is sys.modules["torch._dynamo.utils"] is torch._dynamo.utils)
print("spec", found.__spec__.name, type(found.__spec__.loader).__name__)
print("package", torch._dynamo.__file__ is not None, torch._dynamo._trace_wrapped_higher_order_op is not None)
print("compiled", float(torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1))))
"""
    found = run("lean_import.import_lean(hardware())\n", f"{use}\n", said)
    assert found == {
        "same": "True",
        "spec": "torch._dynamo.utils SourceFileLoader",
        "package": "True True",
        "compiled": "2.0",
    }


@pytest.mark.slow
def test_model_imported_lean_trains_without_dynamo(whole: dict[str, str]) -> None:
    trained = """
optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
model(torch.arange(2, 18)[None]).logits.sum().backward()
optimizer.step()
optimizer.zero_grad()
print("trained", float(model(torch.arange(2, 18)[None]).logits.double().sum()))
print("present", "torch._dynamo.utils" in sys.modules)
"""
    lean = run("lean_import.import_lean(hardware())\n", MODEL, trained)
    assert lean["present"] == "False"
    assert lean["trained"] == run(MODEL, trained)["trained"] != lean["logits"]


@pytest.mark.slow
def test_model_imported_lean_can_be_compiled_later(whole: dict[str, str]) -> None:
    compiled = """
model = torch.compile(model, backend="eager")
print("compiled", float(model(torch.arange(2, 18)[None]).logits.double().sum()))
"""
    found = run("lean_import.import_lean(hardware())\n", MODEL, compiled, LOADED)
    assert found["compiled"] == found["logits"] == whole["logits"]
    assert "torch._dynamo.utils" in found["loaded"]
