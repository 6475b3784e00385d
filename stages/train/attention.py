"""Attention and dropout for training on a CPU, in fp32 and without saving attention scores.

torch's attention (SDPA) has a CPU kernel that saves no scores, but it does not support dropout: with dropout, every
layer saves several arrays [batch, heads, length, length]. Its backward pass in bf16 is half as fast as in fp32.
"""

from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.activations import NewGELUActivation
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import sdpa_mask

from stages.model.attention import attend_in_parts

_ATTENTION_NAME = "sdpa_on_cpu"


def use_fast_kernels(model: Any, device: str) -> None:
    """Replace modules and attention of `model` by faster implementations of the same functions on `device`.

    The weights and the saved configuration do not change.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):  # eight passes over memory, and each saves its result
                setattr(module, name, torch.nn.GELU(approximate="tanh"))
            if device == "cpu" and type(child) is torch.nn.Dropout:
                setattr(module, name, Dropout(child.p))
    if device == "cpu" and model.config._attn_implementation == "sdpa":
        AttentionInterface.register(_ATTENTION_NAME, attend_in_fp32)
        AttentionMaskInterface.register(_ATTENTION_NAME, sdpa_mask)
        model.set_attn_implementation(_ATTENTION_NAME)


def attend_in_fp32(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention in fp32 with the signature that transformers' AttentionInterface requires.

    Args:
        query: [batch, heads, length, head_size], fp32 or bf16.
        key: [batch, key_heads, length, head_size], of the same dtype; `heads` is a multiple of `key_heads`.
        value: shape and dtype of `key`.
        attention_mask: [batch or 1, heads or 1, length, length]; bool, true for the keys that a query attends to, or
            floating point, added to the scores. None: causal, if the module is.
        dropout: probability of dropping an attention weight.
        scaling: factor of the scores; None: head_size ** -0.5.

    Returns:
        [batch, length, heads, head_size] in the dtype of `query`; and None, in place of the attention weights.
    """
    with torch.autocast("cpu", enabled=False):
        if dropout == 0.0 or others.get("position_bias") is not None:
            dtype = query.dtype
            query, key, value = (tensor.float() for tensor in (query, key, value))
            output, _ = attend_in_parts(module, query, key, value, attention_mask, dropout, scaling=scaling, **others)
            return output.to(dtype), None
        groups = query.shape[1] // key.shape[1]  # query heads per key head
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)  # [batch, heads, length, head_size]
        is_causal = others.get("is_causal")
        if attention_mask is None and (module.is_causal if is_causal is None else is_causal):
            length = query.shape[2]
            attention_mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return _attend_with_dropout(query, key, value, attention_mask, dropout, scale), None


@torch.compiler.disable  # type: ignore[untyped-decorator]  # compiled, it would save scores again
def _attend_with_dropout(*arguments: Any) -> torch.Tensor:
    """Apply DropoutAttention; return [batch, length, heads, head_size] in the dtype of the query."""
    attended: torch.Tensor = DropoutAttention.apply(*arguments)
    return attended.transpose(1, 2).contiguous()


class DropoutAttention(torch.autograd.Function):
    """Attention with dropout of the attention weights, one row of the batch at a time.

    The backward pass computes the attention weights again, and only the dropout mask is saved: 1 byte per weight.
    """

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
        """Compute the output in fp32.

        Args:
            query, key, value: [batch, heads, length, head_size], fp32 or bf16.
            mask: as the attention_mask of `attend_in_fp32`; None: every query attends to every key.
            dropout: probability of dropping an attention weight, below 1.
            scale: factor of the scores.

        Returns:
            [batch, heads, length, head_size] in the dtype of `query`.
        """
        # Mask [batch, heads, length, length] bool.
        is_kept, ctx.keep_rate = draw_dropout_mask((*query.shape[:3], key.shape[2]), dropout)
        ctx.save_for_backward(query, key, value, mask, is_kept)
        ctx.scale = scale
        output = torch.empty_like(query)
        for row in range(len(query)):
            # [heads, length, length] @ [heads, length, head_size], in fp32; stored in the dtype of `query`.
            weights = _compute_attention_weights(query[row], key[row], mask, row, scale).mul_(is_kept[row])
            output[row] = (weights @ value[row].float()).div_(ctx.keep_rate)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, mask, is_kept = ctx.saved_tensors
        grads = [torch.empty_like(tensor) for tensor in (query, key, value)]
        with torch.autocast("cpu", enabled=False):
            for row in range(len(query)):
                weights = _compute_attention_weights(query[row], key[row], mask, row, ctx.scale)
                grad = grad_output[row].float().div(ctx.keep_rate)  # [heads, length, head_size]
                grads[2][row] = (weights * is_kept[row]).mT @ grad
                grad_weights = (grad @ value[row].float().mT).mul_(is_kept[row])  # [heads, length, length]
                # The backward pass of softmax in one call, which allocates one array [heads, length, length].
                grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, torch.float32).mul_(ctx.scale)
                grads[0][row] = grad_scores @ key[row].float()
                grads[1][row] = grad_scores.mT @ query[row].float()
        return *grads, None, None, None


def _compute_attention_weights(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, row: int, scale: float
) -> torch.Tensor:
    """Compute the attention weights of one row of the batch, before dropout.

    Args:
        query, key: [heads, length, head_size], fp32 or bf16.
        mask: [batch or 1, heads or 1, length, length], bool or floating point.
        row: index of the row in the batch.

    Returns:
        [heads, length, length] fp32; the weights of each query sum to 1.
    """
    scores = (query.float() @ key.float().mT).mul_(scale)
    if mask is not None:
        row_mask = mask[row if len(mask) > 1 else 0]  # [heads or 1, length, length]
        is_bool = row_mask.dtype == torch.bool
        scores = scores.masked_fill_(~row_mask, float("-inf")) if is_bool else scores.add_(row_mask)
    return scores.softmax(-1)


class Dropout(torch.nn.Dropout):
    """torch's Dropout with masks of `draw_dropout_mask`.

    torch's own dropout takes a thirtieth of a training step of DistilGPT2.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p in (0.0, 1.0):
            return F.dropout(input, self.p, self.training)
        output: torch.Tensor = _DropoutFunction.apply(input, self.p)
        return output


class _DropoutFunction(torch.autograd.Function):
    """Dropout: zero some elements and divide the rest by the keep rate. Saves 1 byte per element."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, dropout: float) -> torch.Tensor:
        is_kept, ctx.keep_rate = draw_dropout_mask(tuple(input.shape), dropout)
        ctx.save_for_backward(is_kept)
        return (input * is_kept).div_(ctx.keep_rate)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, None]:
        (is_kept,) = ctx.saved_tensors
        return (grad_output * is_kept).div_(ctx.keep_rate), None


def draw_dropout_mask(shape: tuple[int, ...], dropout: float) -> tuple[torch.Tensor, float]:
    """Draw a dropout mask from torch's default generator.

    Each number of the generator yields four 16-bit draws, which takes a sixth of the time of torch's `bernoulli_`.

    Returns:
        The mask, bool of `shape`, true for elements to keep; and its keep rate, 1 - dropout rounded to 2^-16.
    """
    size = torch.Size(shape).numel()
    # Uniform int64 numbers over the whole range, viewed as 4 int16 each and cut to [size].
    numbers = torch.empty(-(-size // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[:size]
    # A draw is in [-2^15, 2^15): it is below the threshold with probability (threshold + 2^15) / 2^16.
    threshold = round((1.0 - dropout) * 2**16) - 2**15
    return (numbers < threshold).view(shape), (threshold + 2**15) / 2**16
