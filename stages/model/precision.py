"""Precision: figures are in true fp32 on any device; bf16 trains where a processor computes in it."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch

from stages.core.errors import StageError

log = logging.getLogger(__name__)

# Of torch.cpu.get_capabilities(): x86 (Cooper Lake, Zen 4 and later; AMX since Sapphire Rapids) and ARM.
NATIVE_BF16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")


def check_bf16(device: str, bf16: bool) -> None:
    """Recommend bf16 where a CPU computes in it and is not asked to.

    Raises:
        StageError: if bf16 is asked of a CPU that has to emulate it, which is slower than fp32.
    """
    if device != "cpu":
        return
    capabilities = torch.cpu.get_capabilities()
    native = any(capabilities.get(name, False) for name in NATIVE_BF16)
    if bf16 and not native:
        raise StageError(
            f"trainer.bf16=true: this processor ({capabilities.get('cpu_name', 'of unknown name')}) has no bf16"
            " instructions, so that it would be slower than fp32: set hardware: cpu in params.yaml"
        )
    if native and not bf16:
        log.info("this processor computes in bf16: hardware=cpu_bf16 trains faster (docs/performance.md)")


_BACKENDS: Any = torch.backends  # whose annotations do not know fp32_precision


@contextlib.contextmanager
def full_precision(model: Any) -> Iterator[None]:
    """Run `model` in evaluation mode, without gradients, in true fp32 on any device."""
    training, fp32_precision = model.training, _BACKENDS.fp32_precision
    # With a cache, GPT-2 and Llama take reset position_ids for a continuation, and do not isolate documents.
    use_cache = getattr(model.config, "use_cache", None)
    # A Trainer in bf16 wraps `forward` in an autocast of its own, which none around it turns off.
    forward, original = model.forward, getattr(model, "_original_forward", None)
    # FlashAttention has no fp32.
    attention = getattr(model.config, "_attn_implementation", None)
    model.eval()
    _BACKENDS.fp32_precision = "ieee"  # not TF32; the older functions refuse to work beside this one
    if original is not None:
        model.forward = original
    if use_cache is not None:
        model.config.use_cache = False
    if attention is not None and "flash" in attention:
        model.config._attn_implementation = "sdpa"
    # What a sharded model gathers in inference mode could not be trained with afterwards, and what it has gathered
    # without gradients stays in the place of its parameters.
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
