"""Attention while training on a CPU, in fp32 and without keeping the scores, and dropout.

torch's own attention (SDPA) has a kernel that keeps no scores, but none for dropout on a CPU: with it, every layer
keeps several arrays [batch, heads, length, length]. Its backward pass in bf16 is half as fast as in fp32.
"""

from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.activations import NewGELUActivation
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import sdpa_mask

from stages.model.attention import sdpa_in_parts

_NAME = "sdpa_on_cpu"


def use_fast_kernels(model: Any, device: str) -> None:
    """Have `model`, which is to train on `device`, compute the same functions by faster means.

    Neither its weights nor the configuration that is saved change.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):  # eight passes over memory, of which each keeps its result
                setattr(module, name, torch.nn.GELU(approximate="tanh"))
            if device == "cpu" and type(child) is torch.nn.Dropout:
                setattr(module, name, Dropout(child.p))
    if device == "cpu" and model.config._attn_implementation == "sdpa":
        AttentionInterface.register(_NAME, attend)
        AttentionMaskInterface.register(_NAME, sdpa_mask)
        model.set_attn_implementation(_NAME)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention [batch, length, heads, head_size] of query [batch, heads, length, head_size], as transformers asks.

    Args:
        attention_mask: [batch or 1, heads or 1, length, length], true for a key seen, or what its score gains.
    """
    with torch.autocast("cpu", enabled=False):
        if dropout == 0.0 or others.get("position_bias") is not None:
            dtype = query.dtype
            query, key, value = (tensor.float() for tensor in (query, key, value))
            output, _ = sdpa_in_parts(module, query, key, value, attention_mask, dropout, scaling=scaling, **others)
            return output.to(dtype), None
        groups = query.shape[1] // key.shape[1]
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
        is_causal = others.get("is_causal")
        if attention_mask is None and (module.is_causal if is_causal is None else is_causal):
            length = query.shape[2]
            attention_mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return _dropped_attention(query, key, value, attention_mask, dropout, scale), None


@torch.compiler.disable  # type: ignore[untyped-decorator]  # compiled, it would be torch's own again, and keep scores
def _dropped_attention(*arguments: Any) -> torch.Tensor:
    """[batch, length, heads, head_size]"""
    attended: torch.Tensor = DroppedAttention.apply(*arguments)
    return attended.transpose(1, 2).contiguous()


class DroppedAttention(torch.autograd.Function):
    """Attention with dropout of its shares, which are made anew in the backward pass; a row of the batch at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        dropout: float,
        scale: float,
    ) -> torch.Tensor:
        """[batch, heads, length, head_size] in the dtype of `query`, computed in fp32."""
        is_kept, ctx.share_kept = dropout_mask((*query.shape[:3], key.shape[2]), dropout)
        ctx.save_for_backward(query, key, value, mask, is_kept)
        ctx.scale = scale
        output = torch.empty_like(query)
        for row in range(len(query)):
            shares = _shares_of(query[row], key[row], mask, row, scale).mul_(is_kept[row])
            output[row] = (shares @ value[row].float()).div_(ctx.share_kept)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, mask, is_kept = ctx.saved_tensors
        grads = [torch.empty_like(tensor) for tensor in (query, key, value)]
        with torch.autocast("cpu", enabled=False):
            for row in range(len(query)):
                shares = _shares_of(query[row], key[row], mask, row, ctx.scale)
                grad = grad_output[row].float().div(ctx.share_kept)
                grads[2][row] = (shares * is_kept[row]).mT @ grad
                grad_shares = (grad @ value[row].float().mT).mul_(is_kept[row])
                # Of softmax; kept in one array of scores.
                grad_scores = torch._softmax_backward_data(grad_shares, shares, -1, torch.float32).mul_(ctx.scale)
                grads[0][row] = grad_scores @ key[row].float()
                grads[1][row] = grad_scores.mT @ query[row].float()
        return *grads, None, None, None


def _shares_of(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, row: int, scale: float
) -> torch.Tensor:
    """What each query [heads, length, head_size] of a row of the batch gives to each key: fp32, adding up to 1."""
    scores = (query.float() @ key.float().mT).mul_(scale)
    if mask is not None:
        seen = mask[row if len(mask) > 1 else 0]
        scores = scores.masked_fill_(~seen, float("-inf")) if seen.dtype == torch.bool else scores.add_(seen)
    return scores.softmax(-1)


class Dropout(torch.nn.Dropout):
    """torch's dropout with draws of `dropout_mask`: torch's own takes a thirtieth of a training step of DistilGPT2."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p in (0.0, 1.0):
            return F.dropout(input, self.p, self.training)
        output: torch.Tensor = _Dropped.apply(input, self.p)
        return output


class _Dropped(torch.autograd.Function):
    """What dropout keeps of its input, over the share that it keeps; the backward pass is left a byte for each."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, dropout: float) -> torch.Tensor:
        is_kept, ctx.share_kept = dropout_mask(tuple(input.shape), dropout)
        ctx.save_for_backward(is_kept)
        return (input * is_kept).div_(ctx.share_kept)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, None]:
        (is_kept,) = ctx.saved_tensors
        return (grad_output * is_kept).div_(ctx.share_kept), None


def dropout_mask(shape: tuple[int, ...], dropout: float) -> tuple[torch.Tensor, float]:
    """What dropout keeps, bool of `shape`, and its expected share: 1 - dropout to 2^-16.

    Drawn as 16-bit numbers, four from each of torch's: in a sixth of the time of its own `bernoulli_`.
    """
    size = torch.Size(shape).numel()
    numbers = torch.empty(-(-size // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[:size]
    threshold = round((1.0 - dropout) * 2**16) - 2**15
    return (numbers < threshold).view(shape), (threshold + 2**15) / 2**16
