"""Environment variables that change the results of libraries. DVC does not track them."""

import logging
import os
import sys
from collections.abc import Mapping

log = logging.getLogger(__name__)

# Prefixes of variables in the documentation of the libraries. Most are read when a library is loaded.
_RESULT_PREFIXES = (
    # OpenMP: the number of threads that share a sum, and their schedule.
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
    # Kernels that transformers uses instead of torch's.
    *("TRANSFORMERS_DISABLE_DEEPGEMM", "TRANSFORMERS_SDPA_", "USE_HUB_KERNELS"),
)
# Variables with these prefixes that only affect speed, memory, thread placement or output.
_HARMLESS = dict.fromkeys(
    (
        *("OMP_AFFINITY_FORMAT", "OMP_DISPLAY_AFFINITY", "OMP_DISPLAY_ENV"),
        *("OMP_PLACES", "OMP_PROC_BIND", "OMP_STACKSIZE", "OMP_WAIT_POLICY"),
        *("KMP_AFFINITY", "KMP_BLOCKTIME", "KMP_DUPLICATE_LIB_OK", "KMP_SETTINGS", "KMP_STACKSIZE", "KMP_WARNINGS"),
        *("MKL_VERBOSE", "MKL_VERBOSE_OUTPUT_FILE", "ONEDNN_VERBOSE", "DNNL_VERBOSE"),
        *("TORCHINDUCTOR_CACHE_DIR", "TORCHINDUCTOR_COMPILE_THREADS", "TORCHINDUCTOR_WORKER_START"),
    )
)
# Variables that affect the order in which NCCL adds gradients. A cluster may need them, so they are not refused but are
# part of a run's fingerprint.
_COLLECTIVE_PREFIXES = (
    *("NCCL_ALGO", "NCCL_BUFFSIZE", "NCCL_COLLNET_", "NCCL_GRAPH_FILE", "NCCL_MAX_", "NCCL_MIN_", "NCCL_MNNVL_"),
    *("NCCL_NCHANNELS", "NCCL_NTHREADS", "NCCL_NVLS_", "NCCL_P2P_", "NCCL_PROTO", "NCCL_SHM_DISABLE"),
    *("NCCL_TOPO_FILE", "NCCL_TUNER_"),
)


def find_variables(prefixes: tuple[str, ...], ours: Mapping[str, str | None]) -> list[str]:
    """Return the names of the set variables that begin with one of `prefixes`, except those allowed by `ours`.

    Args:
        ours: allowed value by name; None: any value is allowed.
    """
    found = [name for name in os.environ if name.startswith(prefixes)]
    return [name for name in found if name not in ours or ours[name] not in (None, os.environ[name])]


def drop_environment_variables(prefixes: tuple[str, ...], ours: Mapping[str, str | None]) -> list[str]:
    """Remove the variables that `find_variables` finds, with a warning for each, and return their names."""
    found = find_variables(prefixes, ours)
    for name in found:
        log.warning("%s is ignored: settings of training belong in conf/", name)
        del os.environ[name]
    return found


def find_result_variables(*harmless: str) -> list[str]:
    """Return the names of the set variables that change results, except those in `harmless`."""
    return find_variables(_RESULT_PREFIXES, {**_HARMLESS, **dict.fromkeys(harmless)})


def read_collective_settings() -> dict[str, str]:
    """Return the set variables that change the results of collective operations of GPUs, with their values."""
    return {name: os.environ[name] for name in sorted(find_variables(_COLLECTIVE_PREFIXES, {}))}


def restart_without_settings() -> None:
    """If variables that change results are set, replace this process by the same program without them.

    Removing them from the environment is too late: numpy and its BLAS are already loaded.
    """
    if drop_environment_variables(_RESULT_PREFIXES, _HARMLESS):
        sys.stderr.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
