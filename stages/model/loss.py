"""-ln p of tokens from the hidden states that enter a model's output embedding, a chunk of positions at a time.

Logits of a batch over 50,257 words are most of the memory and much of the time of a small model. Here the model hands
out what enters its output embedding, and logits are made for the predicted positions alone, of one chunk at a time.
"""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from stages.model.masking import IGNORED
from stages.model.precision import full_precision

log = logging.getLogger(__name__)

# Logits of a chunk: 256 MiB in fp32. With fewer, the matrix products of a large vocabulary are slower.
CHUNK_ELEMENTS = 2**26
# Of these a CPU turns so many into probabilities at a time: they stay in its cache.
CACHED_ELEMENTS = 2**20
# Products with a large vocabulary are faster where each row begins a cache line, and by so many words at a time.
_ALIGNED_WORDS = 64
WORDS_AT_ONCE = 99 * _ALIGNED_WORDS


class TokenLoss:
    """-ln p of tokens by the outputs of `model`.

    An architecture whose logits are more than its output embedding of the hidden states (scaled or capped, say) keeps
    its own logits, whole.
    """

    def __init__(self, model: Any) -> None:
        self._head = _separable_head(model)

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
        loss: torch.Tensor = _ChunkedSum.apply(outputs, self._head.weight, self._head.bias, targets, dtype)
        return loss

    def each(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """-ln p in fp32 of each of `targets` [num_tokens] by `outputs` [num_tokens, width], without gradients."""
        if self._head is None:
            return F.cross_entropy(outputs.float(), targets, reduction="none")
        weight, bias = self._head.weight, self._head.bias
        rows = max(1, CHUNK_ELEMENTS // len(weight))
        chunks = zip(torch.split(outputs, rows), torch.split(targets, rows), strict=True)
        return torch.cat([_nats_of(_logits_of(hidden, weight, bias), tokens) for hidden, tokens in chunks])


class _ChunkedSum(torch.autograd.Function):
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
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None  # not where an adapter is trained
        grad_bias = torch.empty_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
        rows = max(1, CHUNK_ELEMENTS // len(weight))
        for start in range(0, max(1, len(hidden)), rows):  # of no token too: its gradients are zeros
            chunk = slice(start, start + rows)
            inputs = hidden[chunk].to(dtype)
            logits = _logits_of(inputs, embedding, shift)
            total += _to_gradient_(logits, targets[chunk])
            grad_hidden[chunk] = logits @ embedding
            put = torch.Tensor.add_ if start else torch.Tensor.copy_  # to add to zeros takes a pass over memory more
            if grad_weight is not None:
                for first in range(0, len(weight), WORDS_AT_ONCE):
                    words = slice(first, first + WORDS_AT_ONCE)
                    put(grad_weight[words], logits[:, words].t() @ inputs)
            if grad_bias is not None:
                put(grad_bias, logits.sum(0))
            del logits  # before the next chunk's are made
        ctx.gradients = (grad_hidden, grad_weight, grad_bias)
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # as large as the weights: scaled in place, hence only once
        return *(None if gradient is None else gradient.mul_(grad_output) for gradient in gradients), None, None


def _logits_of(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Logits [num_tokens, vocab_size], of which the rows are aligned, of hidden [num_tokens, width]."""
    stride = -(-len(weight) // _ALIGNED_WORDS) * _ALIGNED_WORDS
    logits = hidden.new_empty(len(hidden), stride)[:, : len(weight)]
    if bias is None:
        return torch.mm(hidden, weight.t(), out=logits)
    return torch.addmm(bias, hidden, weight.t(), out=logits)


class _Part(NamedTuple):
    """Some rows of logits, and what follows from them."""

    logits: torch.Tensor
    """[num_tokens, vocab_size]"""
    targets: torch.Tensor
    """[num_tokens]"""
    shares: torch.Tensor
    """[num_tokens, vocab_size] the probabilities, fp32."""
    nats: torch.Tensor
    """[num_tokens] -ln p(target), fp32."""


def _parts_of(logits: torch.Tensor, targets: torch.Tensor) -> Iterator[_Part]:
    """Logits [num_tokens, vocab_size] and targets [num_tokens] in parts that stay in a CPU's cache."""
    rows = max(1, CACHED_ELEMENTS // logits.shape[-1] if logits.device.type == "cpu" else len(logits))
    for part, tokens in zip(torch.split(logits, rows), torch.split(targets, rows), strict=True):
        shares = F.softmax(part, dim=-1, dtype=torch.float32)
        # By the largest share, of which the logarithm is always finite: one pass fewer than by log_softmax.
        below = part.amax(-1).float() - part.gather(-1, tokens[:, None])[:, 0].float()
        yield _Part(part, tokens, shares, below - shares.amax(-1).log())


def _nats_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-ln p in fp32 of each of `targets` [num_tokens] by logits [num_tokens, vocab_size]."""
    return torch.cat([part.nats for part in _parts_of(logits, targets)])


def _to_gradient_(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Turn logits [num_tokens, vocab_size] in place into the gradient of the sum in fp32 that is returned."""
    total = torch.zeros((), device=logits.device)
    for part in _parts_of(logits, targets):
        total += part.nats.sum()
        part.shares[torch.arange(len(part.targets), device=targets.device), part.targets] -= 1.0
        part.logits.copy_(part.shares)
    return total


def _separable_head(model: Any) -> torch.nn.Linear | None:
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
    vars(head)["forward"] = _identity  # before the class's own
    try:
        yield
    finally:
        del vars(head)["forward"]


def _identity(hidden: torch.Tensor) -> torch.Tensor:
    return hidden
