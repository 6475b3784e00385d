"""Environment variables that change the computation of libraries do not reach a stage."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from data_helpers import REPOSITORY, read_contents

from stages.core.environment import find_result_variables, read_collective_settings
from stages.core.errors import StageError
from stages.launch.ray import _worker_main
from stages.train.fingerprints import compute_run_fingerprint

# No value is the default on a machine with AVX2 and several cores.
CHANGE_RESULTS = {
    "OMP_DYNAMIC": "true",
    "OMP_THREAD_LIMIT": "1",
    "OMP_NUM_THREADS": "3",
    "OMP_MAX_ACTIVE_LEVELS": "0",
    "OMP_SCHEDULE": "dynamic,1",
    "OMP_NUM_THREADS_ALL": "3",  # OpenMP 6.0
    "KMP_LIBRARY": "serial",
    "KMP_DETERMINISTIC_REDUCTION": "1",
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "MKL_DYNAMIC": "TRUE",
    "MKL_NUM_THREADS": "1",
    "MKL_DOMAIN_NUM_THREADS": "MKL_DOMAIN_ALL=1",
    "MKL_NUM_STRIPES": "1",
    "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    "MKL_DISABLE_FAST_MM": "1",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "ONEDNN_CPU_ISA_HINTS": "PREFER_YMM",
    "DNNL_MAX_CPU_ISA": "SSE41",
    "ONEDNN_DEFAULT_FPMATH_MODE": "BF16",
    "DNNL_DEFAULT_FPMATH_MODE": "BF16",
    "TORCH_MKLDNN_MATMUL_MIN_DIM": "0",
    "OPENBLAS_CORETYPE": "Prescott",
    "NPY_DISABLE_CPU_FEATURES": "AVX2",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1",
    "NVIDIA_TF32_OVERRIDE": "1",
    "CUBLAS_WORKSPACE_CONFIG": ":16:8",
    "CUBLAS_EMULATE_SINGLE_PRECISION": "1",
    "TORCH_BLAS_PREFER_CUBLASLT": "1",
    "PYTORCH_TUNABLEOP_ENABLED": "1",
    "PYTORCH_MPS_FAST_MATH": "1",
    "TORCH_COMPILE_DISABLE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "TORCHINDUCTOR_MAX_AUTOTUNE": "1",
    "TORCHINDUCTOR_CPP_ENABLE_UNSAFE_MATH_OPT_FLAG": "1",
    "TRANSFORMERS_SDPA_FORCE_GQA": "1",
}
HARMLESS = {
    "OMP_WAIT_POLICY": "passive",
    "OMP_PROC_BIND": "true",
    "OMP_PLACES": "{0}",
    "GOMP_CPU_AFFINITY": "0",
    "GOMP_SPINCOUNT": "1000",
    "KMP_BLOCKTIME": "0",
    "KMP_AFFINITY": "compact",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONHASHSEED": "5",
    "MALLOC_ARENA_MAX": "1",
}
SHOW = """
import os, sys
from stages.core.environment import restart_without_settings
restart_without_settings()
print(sys.argv[1:], os.getpid(), *(f"{name}={value}" for name, value in os.environ.items()), sep="\\n")
"""


def train(overrides: list[str], out: Path, given: dict[str, str]) -> tuple[dict[str, bytes], str]:
    """Run train with the environment variables `given`; return its outs and its output."""
    clean = {name: value for name, value in os.environ.items() if name not in CHANGE_RESULTS | HARMLESS}
    command = [sys.executable, "-m", "stages.train", *overrides]
    run = subprocess.run(command, cwd=REPOSITORY, env=clean | given, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return read_contents(out), run.stderr


@pytest.fixture(scope="module")
def command(overrides, cache):
    """`command(out)`: command line of a training on two threads."""
    more = ["hardware.num_threads=2", "batch_size=36", "num_train_epochs=1"]
    return lambda out: overrides("train", "causal", out, *more)


@pytest.fixture(scope="module")
def undisturbed(command, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    return train(command(out), out, {})[0]


def test_variables_that_are_dropped_leave_the_same_process_with_its_arguments():
    given = {**os.environ, **CHANGE_RESULTS, **HARMLESS}
    process = subprocess.Popen(
        [sys.executable, "-c", SHOW, "task=a b"],
        cwd=REPOSITORY,
        env=given,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    shown, warned = process.communicate(timeout=60)
    arguments, number, *variables = shown.splitlines()
    assert (arguments, int(number)) == ("['task=a b']", process.pid), warned
    names = {line.partition("=")[0] for line in variables}
    assert names.isdisjoint(CHANGE_RESULTS)
    assert {f"{name}={value}" for name, value in HARMLESS.items()} <= set(variables)


def test_training_with_every_variable_has_the_bytes_of_one_without_and_names_them(command, undisturbed, tmp_path):
    outs, said = train(command(tmp_path), tmp_path, CHANGE_RESULTS | HARMLESS)
    assert outs == undisturbed
    assert [name for name in CHANGE_RESULTS if f"{name} is ignored" not in said] == []
    assert [name for name in HARMLESS if name in said] == []


@pytest.mark.slow  # one process with torch per case
@pytest.mark.parametrize("name", [*CHANGE_RESULTS, *HARMLESS])
def test_training_with_a_variable_has_the_bytes_of_one_without(command, undisturbed, tmp_path, name):
    value = (CHANGE_RESULTS | HARMLESS)[name]
    assert train(command(tmp_path), tmp_path, {name: value})[0] == undisturbed


def test_variable_of_a_ray_worker_that_changes_results_is_an_error(monkeypatch):
    for name in find_result_variables():  # set where the tests run
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # set by Ray
    monkeypatch.setenv("OMP_DYNAMIC", "true")
    with pytest.raises(StageError, match=r"^OMP_DYNAMIC: set when Ray was started"):
        _worker_main({})


def test_run_is_known_by_what_decides_how_several_gpus_add_up(compose_stage, command, tmp_path, monkeypatch):
    config = compose_stage("train", *command(tmp_path))
    before = compute_run_fingerprint(config)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth0")
    assert compute_run_fingerprint(config) == before
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    assert read_collective_settings() == {"NCCL_ALGO": "Tree"}
    assert compute_run_fingerprint(config) != before
