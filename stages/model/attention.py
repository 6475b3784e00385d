"""torch's attention (SDPA) on a CPU, of which the memory does not grow with the square of the length.

Its kernel turns a bool mask into fp32, keeps that for the backward pass of every layer, and looks at every pair of
tokens: for a row of 8,192 tokens 268 MB a layer. Here, long rows are taken some queries at a time, with the keys that
these see.
"""

import functools
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

# At once; shorter rows are torch's own. The kernel groups queries by 256 in rows of at least 768.
QUERIES = 1024


def use_parts_on_cpu() -> None:
    """Have all models with SDPA, which are to run on a CPU, take long rows in parts."""
    AttentionInterface.register("sdpa", sdpa_in_parts)


def sdpa_in_parts(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention [batch, length, heads, head_size] of query [batch, heads, length, head_size], as transformers asks.

    Args:
        attention_mask: [batch or 1, heads or 1, length, length]; bool, true for a key seen, if a row is to be taken in
            parts.
    """
    # Which keys are seen is known from the mask's values alone, which a compiler does not see.
    whole_only = dropout or others.get("position_bias") is not None or torch.compiler.is_compiling()
    if attention_mask is None or attention_mask.dtype != torch.bool or query.shape[2] <= QUERIES or whole_only:
        whole: torch.Tensor = sdpa_attention_forward(module, query, key, value, attention_mask, dropout, **others)[0]
        return whole, None
    return _in_parts(module, query, key, value, attention_mask, others), None


def _in_parts(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    others: dict[str, Any],
) -> torch.Tensor:
    """[batch, length, heads, head_size]"""
    outputs = []
    for some, sees in zip(torch.split(query, QUERIES, 2), torch.split(mask, QUERIES, 2), strict=True):
        seen = sees.any(dim=2).flatten(0, 1).any(dim=0).nonzero()  # of the keys, by any of the queries
        keys = slice(int(seen[0]), int(seen[-1]) + 1)
        inputs = (module, some, key[:, :, keys], value[:, :, keys], sees[..., keys])
        # Once more in the backward pass, so that no mask in fp32 is kept.
        attend = functools.partial(sdpa_attention_forward, **others)
        outputs.append(checkpoint(attend, *inputs, use_reentrant=False, preserve_rng_state=False)[0])
    return torch.cat(outputs, dim=1)
