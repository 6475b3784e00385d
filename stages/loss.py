"""-ln p of tokens from the hidden states that enter a model's output embedding, a chunk of positions at a time.

Logits of a batch over 50,257 words are most of the memory and much of the time of a small model. Here the model hands
out what enters its output embedding, and logits are made for the predicted positions alone, of one chunk at a time.
"""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from stages.masking import IGNORED
from stages.precision import full_precision

log = logging.getLogger(__name__)

# Logits of a chunk: 256 MiB in fp32. With fewer, the matrix products of a large vocabulary are slower.
CHUNK_ELEMENTS = 2**26
# Of these a CPU turns so many into probabilities at a time: they stay in its cache.
CACHED_ELEMENTS = 2**20


class TokenLoss:
    """-ln p of tokens by the outputs of `model`.

    An architecture whose logits are more than its output embedding of the hidden states (scaled or capped, say) keeps
    its own logits, whole.
    """

    def __init__(self, model: Any) -> None:
        self._head = separable_head(model)

    @contextlib.contextmanager
    def hidden_outputs(self) -> Iterator[None]:
        """Within, the model's `logits` are the outputs that this loss takes: its hidden states, where that is right."""
        with contextlib.nullcontext() if self._head is None else without(self._head):
            yield

    def sum(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Sum in fp32 of -ln p over the targets that are not IGNORED, with gradients.

        Under autocast the matrix products are in its dtype, and what is done to their results in fp32.

        Args:
            outputs: [..., width], from within `hidden_outputs`.
            targets: [...] int64, the token that the output at each place predicts.
        """
        predicted = targets != IGNORED
        outputs, targets = outputs[predicted], targets[predicted]
        if self._head is None:
            return F.cross_entropy(outputs.float(), targets, reduction="sum")
        device = outputs.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else outputs.dtype
        loss: torch.Tensor = ChunkedSum.apply(outputs, self._head.weight, self._head.bias, targets, dtype)
        return loss

    def each(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """-ln p in fp32 of each of `targets` [num_tokens] by `outputs` [num_tokens, width], without gradients."""
        if self._head is None:
            return F.cross_entropy(outputs.float(), targets, reduction="none")
        weight, bias = self._head.weight, self._head.bias
        rows = max(1, CHUNK_ELEMENTS // len(weight))
        return torch.cat(
            [
                F.cross_entropy(F.linear(hidden, weight, bias).float(), tokens, reduction="none")
                for hidden, tokens in zip(torch.split(outputs, rows), torch.split(targets, rows), strict=True)
            ]
        )


class ChunkedSum(torch.autograd.Function):
    """Sum of -ln p(target), and its gradients made in the forward pass, while the logits of a chunk are there."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """Sum in fp32 for hidden [num_tokens, width], weight [vocab_size, width], bias [vocab_size], targets int64.

        Matrix products are in `dtype`; gradients are in their tensor's own.
        """
        total = torch.zeros((), device=hidden.device)
        embedding, shift = weight.to(dtype), None if bias is None else bias.to(dtype)
        grad_hidden = torch.empty_like(hidden)
        grad_weight: torch.Tensor | None = None
        grad_bias: torch.Tensor | None = None
        rows = max(1, CHUNK_ELEMENTS // len(weight))
        for start in range(0, max(1, len(hidden)), rows):  # of no token too: its gradients are zeros
            chunk = slice(start, start + rows)
            inputs = hidden[chunk].to(dtype)
            logits = F.linear(inputs, embedding, shift)
            total += to_gradient_(logits, targets[chunk])
            grad_hidden[chunk] = logits @ embedding
            if ctx.needs_input_grad[1]:  # not where an adapter is trained in its place
                grad_weight = added(grad_weight, logits.t() @ inputs, weight)
            if bias is not None and ctx.needs_input_grad[2]:
                grad_bias = added(grad_bias, logits.sum(0), bias)
        ctx.gradients = (grad_hidden, grad_weight, grad_bias)
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # as large as the weights: scaled in place, hence only once
        return *(None if gradient is None else gradient.mul_(grad_output) for gradient in gradients), None, None


def added(total: torch.Tensor | None, part: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`total` + `part` in the dtype of `like`; without the passes over memory that a start from zeros costs."""
    return part.to(like.dtype) if total is None else total.add_(part)


def to_gradient_(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Turn logits [num_tokens, vocab_size] in place into the gradient of the sum in fp32 that is returned."""
    total = torch.zeros((), device=logits.device)
    rows = max(1, CACHED_ELEMENTS // logits.shape[-1]) if logits.device.type == "cpu" else len(logits)
    for part, tokens in zip(torch.split(logits, rows), torch.split(targets, rows), strict=True):
        shares = F.log_softmax(part, dim=-1, dtype=torch.float32)
        total -= shares.gather(-1, tokens[:, None]).sum()
        shares.exp_()
        shares[torch.arange(len(tokens), device=tokens.device), tokens] -= 1.0
        part.copy_(shares)
    return total


def separable_head(model: Any) -> torch.nn.Linear | None:
    """The output embedding of `model` if its logits are just that of the hidden states, as tried on a few tokens."""
    head = model.get_output_embeddings()
    if isinstance(head, torch.nn.Linear):
        tokens = torch.arange(8, device=model.device)[None]
        with full_precision(model):
            logits = model(tokens).logits
            with without(head), contextlib.suppress(RuntimeError):  # a bias added to the logits does not fit
                hidden = model(tokens).logits
                # To the last bit: a cap on the small logits of fresh weights shows in the last ones alone.
                if torch.equal(F.linear(hidden, head.weight, head.bias), logits):
                    return head
    log.warning(
        "%s does more with its logits than embed hidden states: they are made whole, which takes memory",
        type(model).__name__,
    )
    return None


@contextlib.contextmanager
def without(head: torch.nn.Linear) -> Iterator[None]:
    """Within, `head` returns its input."""
    vars(head)["forward"] = identity  # before the class's own
    try:
        yield
    finally:
        del vars(head)["forward"]


def identity(hidden: torch.Tensor) -> torch.Tensor:
    return hidden
