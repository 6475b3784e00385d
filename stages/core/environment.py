"""Environment variables in which libraries find settings that DVC cannot see, and that change the bytes of a result."""

import logging
import os
import sys
from collections.abc import Mapping

log = logging.getLogger(__name__)

# Prefixes of what the documentation of the libraries names. Most are read when a library is loaded.
_CHANGE_RESULTS = (
    # OpenMP: how many threads share a sum, and how.
    *("OMP_", "KMP_"),
    # Matrix products and instruction sets on the CPU: torch, MKL, oneDNN (formerly DNNL, MKL-DNN), BLAS, numpy.
    *("ATEN_", "MKL_", "ONEDNN_", "DNNL_", "MKLDNN_", "TORCH_MKLDNN_", "TORCH_LINEAR_"),
    *("BLIS_", "GOTO_NUM_THREADS", "OPENBLAS_", "VECLIB_", "NPY_DISABLE_CPU_FEATURES", "NPY_ENABLE_CPU_FEATURES"),
    # Precision and choice of kernels on GPUs: cuBLAS, ROCm, Metal.
    *("CUBLAS_", "CUBLASLT_", "HIPBLASLT_", "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"),
    *("TORCH_BLAS_", "TORCH_CUDNN_", "TORCH_LINALG_", "TORCH_ROCM_", "PYTORCH_MIOPEN_", "PYTORCH_TUNABLEOP_"),
    *("PYTORCH_MPS_FAST_MATH", "PYTORCH_MPS_PREFER_METAL"),
    # Compilation.
    *("PYTORCH_JIT", "PYTORCH_TENSOREXPR", "TORCHDYNAMO_", "TORCHINDUCTOR_", "TORCH_COMPILE", "TORCH_DYNAMO_"),
    # Kernels that transformers takes instead of torch's.
    *("TRANSFORMERS_DISABLE_DEEPGEMM", "TRANSFORMERS_SDPA_", "USE_HUB_KERNELS"),
)
# Of these prefixes, but only about speed, memory, places and what is printed.
_HARMLESS = dict.fromkeys(
    (
        *("OMP_AFFINITY_FORMAT", "OMP_DISPLAY_AFFINITY", "OMP_DISPLAY_ENV"),
        *("OMP_PLACES", "OMP_PROC_BIND", "OMP_STACKSIZE", "OMP_WAIT_POLICY"),
        *("KMP_AFFINITY", "KMP_BLOCKTIME", "KMP_DUPLICATE_LIB_OK", "KMP_SETTINGS", "KMP_STACKSIZE", "KMP_WARNINGS"),
        *("MKL_VERBOSE", "MKL_VERBOSE_OUTPUT_FILE", "ONEDNN_VERBOSE", "DNNL_VERBOSE"),
        *("TORCHINDUCTOR_CACHE_DIR", "TORCHINDUCTOR_COMPILE_THREADS", "TORCHINDUCTOR_WORKER_START"),
    )
)
# The order in which NCCL adds up gradients. Clusters may not work without these: part of what a run is known by.
_COLLECTIVES = (
    *("NCCL_ALGO", "NCCL_BUFFSIZE", "NCCL_COLLNET_", "NCCL_GRAPH_FILE", "NCCL_MAX_", "NCCL_MIN_", "NCCL_MNNVL_"),
    *("NCCL_NCHANNELS", "NCCL_NTHREADS", "NCCL_NVLS_", "NCCL_P2P_", "NCCL_PROTO", "NCCL_SHM_DISABLE"),
    *("NCCL_TOPO_FILE", "NCCL_TUNER_"),
)


def find_variables(prefixes: tuple[str, ...], ours: Mapping[str, str | None]) -> list[str]:
    """Names of the variables that begin with one of `prefixes`; one that has its value in `ours` is left out.

    Args:
        ours: values by name; None: any value.
    """
    found = [name for name in os.environ if name.startswith(prefixes)]
    return [name for name in found if name not in ours or ours[name] not in (None, os.environ[name])]


def drop_environment_variables(prefixes: tuple[str, ...], ours: Mapping[str, str | None]) -> list[str]:
    """Remove the variables that `find_variables` finds, with a warning for each; their names."""
    found = find_variables(prefixes, ours)
    for name in found:
        log.warning("%s is ignored: what trains a model stands in conf/", name)
        del os.environ[name]
    return found


def variables_that_change_results(*harmless: str) -> list[str]:
    """Names of the variables that are set and would change a result; those named in `harmless` are left out."""
    return find_variables(_CHANGE_RESULTS, {**_HARMLESS, **dict.fromkeys(harmless)})


def settings_of_collectives() -> dict[str, str]:
    """The variables that change what several GPUs compute together, with their values."""
    return {name: os.environ[name] for name in sorted(find_variables(_COLLECTIVES, {}))}


def restart_without_settings() -> None:
    """Start this program again in this process if variables that would change its results are set, without them.

    It is too late to remove them only: numpy has been loaded by now, with its BLAS.
    """
    if drop_environment_variables(_CHANGE_RESULTS, _HARMLESS):
        sys.stderr.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
