"""torch's attention (SDPA) on a CPU, in memory that does not grow with the square of the length.

The SDPA kernel converts a bool mask to fp32, saves it for the backward pass of every layer, and computes every pair of
tokens: 268 MB per layer for a row of 8,192 tokens. This module splits the queries of a long row into parts, and passes
each part only the keys that its queries attend to.
"""

import functools
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

# Rows of at most this length go to torch's kernel whole. The kernel groups queries by 256 in rows of at least 768.
QUERIES_PER_PART = 1024


def use_attention_in_parts() -> None:
    """Replace the `sdpa` attention of all transformers models by `attend_in_parts`. Use it if they run on a CPU."""
    AttentionInterface.register("sdpa", attend_in_parts)


def attend_in_parts(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention with the signature that transformers' AttentionInterface requires.

    Args:
        query: [batch, heads, length, head_size], floating point.
        key: [batch, key_heads, key_length, head_size], of the same dtype.
        value: shape and dtype of `key`.
        attention_mask: [batch or 1, heads or 1, length, key_length]. A bool mask is true for the keys that a query
            attends to. Long rows are split only if the mask is bool; any other mask is added to the scores.
        dropout: probability of dropping an attention weight; rows are not split if it is above 0.
        others: passed on to transformers' `sdpa_attention_forward`.

    Returns:
        [batch, length, heads, head_size] in the dtype of `query`; and None, in place of the attention weights.
    """
    # The keys to compute depend on the values of the mask, which are unknown while torch.compile traces.
    whole_only = dropout or others.get("position_bias") is not None or torch.compiler.is_compiling()
    if attention_mask is None or attention_mask.dtype != torch.bool or query.shape[2] <= QUERIES_PER_PART or whole_only:
        whole: torch.Tensor = sdpa_attention_forward(module, query, key, value, attention_mask, dropout, **others)[0]
        return whole, None
    return _attend_part_by_part(module, query, key, value, attention_mask, others), None


def _attend_part_by_part(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    others: dict[str, Any],
) -> torch.Tensor:
    """Compute attention for QUERIES_PER_PART queries at a time; shapes as in `attend_in_parts`, `mask` is bool."""
    outputs = []
    for part, part_mask in zip(
        torch.split(query, QUERIES_PER_PART, 2), torch.split(mask, QUERIES_PER_PART, 2), strict=True
    ):
        # Keys that any query of the part attends to: [batch, heads, queries, keys] -> [batch, heads, keys] ->
        # [batch * heads, keys] -> [keys] -> indices [num_attended, 1].
        attended = part_mask.any(dim=2).flatten(0, 1).any(dim=0).nonzero()
        keys = slice(int(attended[0]), int(attended[-1]) + 1)  # one contiguous range, so that slices are views
        inputs = (module, part, key[:, :, keys], value[:, :, keys], part_mask[..., keys])
        # Checkpointing repeats the forward pass in the backward pass, so that no fp32 mask is saved.
        attend = functools.partial(sdpa_attention_forward, **others)
        outputs.append(checkpoint(attend, *inputs, use_reentrant=False, preserve_rng_state=False)[0])
    return torch.cat(outputs, dim=1)  # of [batch, queries, heads, head_size]
