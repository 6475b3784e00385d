"""Numerical precision: true fp32 for all figures, and bf16 training if the processor has bf16 instructions."""

import contextlib
import logging
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from stages.core.errors import StageError

log = logging.getLogger(__name__)

# Keys of torch.cpu.get_capabilities() for x86 (Cooper Lake, Zen 4 and later; AMX since Sapphire Rapids) and ARM.
NATIVE_BF16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")


def check_bf16(device: str, bf16: bool) -> None:
    """Check that a CPU supports bf16 if the run uses it, and log a recommendation if it does but the run does not.

    Raises:
        StageError: if the run uses bf16 and the CPU would have to emulate it, which is slower than fp32.
    """
    if device != "cpu":
        return
    capabilities = torch.cpu.get_capabilities()
    has_bf16 = any(capabilities.get(name, False) for name in NATIVE_BF16)
    if bf16 and not has_bf16:
        raise StageError(
            f"trainer.bf16=true: this processor ({capabilities.get('cpu_name', 'of unknown name')}) has no bf16"
            " instructions, so bf16 would be slower than fp32: set hardware: cpu in params.yaml"
        )
    if has_bf16 and not bf16:
        log.info("this processor has bf16 instructions: hardware=cpu_bf16 trains faster (docs/performance.md)")


def describe_processor(device: str) -> str:
    """Describe the processor that computes, as far as it determines the last digits of results."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return device if device != "cpu" else f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def read_cpu_model() -> str:
    """Return the model of the CPU, as far as the operating system says."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "CPU part")))
    return next(names, platform.processor())


_BACKENDS: Any = torch.backends  # its annotations lack fp32_precision


@contextlib.contextmanager
def full_precision(model: Any) -> Iterator[None]:
    """Put `model` into evaluation mode, without gradients and in true fp32 on any device, inside the `with` block."""
    training, fp32_precision = model.training, _BACKENDS.fp32_precision
    # With a cache, GPT-2 and Llama interpret restarted position_ids as a continuation and do not isolate documents.
    use_cache = getattr(model.config, "use_cache", None)
    # A Trainer in bf16 wraps `forward` in its own autocast, which an outer autocast(enabled=False) does not disable.
    forward, original = model.forward, getattr(model, "_original_forward", None)
    # FlashAttention does not support fp32.
    attention = getattr(model.config, "_attn_implementation", None)
    model.eval()
    _BACKENDS.fp32_precision = "ieee"  # not TF32; torch refuses to mix this with its older functions
    if original is not None:
        model.forward = original
    if use_cache is not None:
        model.config.use_cache = False
    if attention is not None and "flash" in attention:
        model.config._attn_implementation = "sdpa"
    # Weights that a sharded model gathers in inference mode cannot be used for training afterwards. Those gathered
    # under no_grad replace its parameters until `reshard`.
    shards = [module for module in model.modules() if hasattr(module, "unshard")]
    without_gradients = torch.no_grad() if shards else torch.inference_mode()
    try:
        with without_gradients, torch.autocast(model.device.type, enabled=False):
            yield
    finally:
        for module in shards:
            module.reshard()
        if original is not None:
            model.forward = forward
        if use_cache is not None:
            model.config.use_cache = use_cache
        if attention is not None:
            model.config._attn_implementation = attention
        model.train(training)
        _BACKENDS.fp32_precision = fp32_precision
