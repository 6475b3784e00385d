"""Cross-entropy of tokens from the hidden states before a model's output embedding, one chunk of positions at a time.

The logits of a batch over a vocabulary of 50,257 tokens take most of the memory and much of the time of a small model.
Here the model returns the hidden states before its output embedding, and logits are computed for predicted positions
only, one chunk at a time.
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

# Elements of a chunk of logits: 256 MiB in fp32. Smaller chunks slow down matrix products with a large vocabulary.
CHUNK_ELEMENTS = 2**26
# Elements that a CPU turns into probabilities at a time, so that they stay in its cache.
CACHED_ELEMENTS = 2**20
# Matrix products with a large vocabulary are faster if each row starts at a cache line, and in slices of this width.
_ALIGNED_TOKENS = 64
VOCABULARY_SLICE = 99 * _ALIGNED_TOKENS


class TokenLoss:
    """Cross-entropy (-ln p, in nats) of tokens under a model.

    An architecture whose logits are more than the output embedding of its hidden states, for example scaled or capped,
    keeps computing its own logits for all positions.
    """

    def __init__(self, model: Any) -> None:
        self._head = _find_separable_head(model)

    @contextlib.contextmanager
    def hidden_outputs(self) -> Iterator[None]:
        """Make the model return what this class expects as `logits`: hidden states if its head is separable."""
        with contextlib.nullcontext() if self._head is None else bypass_head(self._head):
            yield

    def sum_nats(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the sum of -ln p over the targets that are not IGNORED, a scalar in fp32, with gradients.

        Under autocast, matrix products are in its dtype; all other operations are in fp32.

        Args:
            outputs: [..., width], computed within `hidden_outputs`.
            targets: [...] int64, the token that each output predicts, or IGNORED.
        """
        predicted = targets != IGNORED
        outputs, targets = outputs[predicted], targets[predicted]
        if self._head is None:
            return F.cross_entropy(outputs.float(), targets, reduction="sum")
        device = outputs.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else outputs.dtype
        loss: torch.Tensor = _ChunkedSum.apply(outputs, self._head.weight, self._head.bias, targets, dtype)
        return loss

    def compute_nats(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return -ln p of each target, without gradients.

        Args:
            outputs: [num_tokens, width], computed within `hidden_outputs`.
            targets: [num_tokens] int64.

        Returns:
            [num_tokens] fp32.
        """
        if self._head is None:
            return F.cross_entropy(outputs.float(), targets, reduction="none")
        weight, bias = self._head.weight, self._head.bias
        rows = max(1, CHUNK_ELEMENTS // len(weight))
        chunks = zip(torch.split(outputs, rows), torch.split(targets, rows), strict=True)
        return torch.cat([_compute_nats(_compute_logits(hidden, weight, bias), tokens) for hidden, tokens in chunks])


class _ChunkedSum(torch.autograd.Function):
    """Sum of -ln p(target). Gradients are computed in the forward pass, while the logits of a chunk are in memory."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """Return the sum, a scalar in fp32.

        Args:
            hidden: [num_tokens, width].
            weight: [vocab_size, width].
            bias: [vocab_size], or None.
            targets: [num_tokens] int64.
            dtype: of the matrix products; each gradient has the dtype of its tensor.
        """
        total = torch.zeros((), device=hidden.device)
        embedding, shift = weight.to(dtype), None if bias is None else bias.to(dtype)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None  # False for an adapter
        grad_bias = torch.empty_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
        rows = max(1, CHUNK_ELEMENTS // len(weight))
        for start in range(0, max(1, len(hidden)), rows):  # at least one chunk: without tokens, the gradients are zeros
            chunk = slice(start, start + rows)
            inputs = hidden[chunk].to(dtype)
            logits = _compute_logits(inputs, embedding, shift)
            total += _replace_by_gradient_(logits, targets[chunk])
            grad_hidden[chunk] = logits @ embedding  # [num_rows, vocab_size] @ [vocab_size, width]
            accumulate = torch.Tensor.add_ if start else torch.Tensor.copy_  # no pass over zeros
            if grad_weight is not None:
                for first in range(0, len(weight), VOCABULARY_SLICE):
                    words = slice(first, first + VOCABULARY_SLICE)
                    # [slice, num_rows] @ [num_rows, width]
                    accumulate(grad_weight[words], logits[:, words].t() @ inputs)
            if grad_bias is not None:
                accumulate(grad_bias, logits.sum(0))
            del logits  # before those of the next chunk are allocated
        ctx.gradients = (grad_hidden, grad_weight, grad_bias)
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # large, so scaled in place, which works once
        return *(None if gradient is None else gradient.mul_(grad_output) for gradient in gradients), None, None


def _compute_logits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return logits [num_tokens, vocab_size] with aligned rows, of hidden [num_tokens, width]."""
    stride = -(-len(weight) // _ALIGNED_TOKENS) * _ALIGNED_TOKENS
    logits = hidden.new_empty(len(hidden), stride)[:, : len(weight)]
    if bias is None:
        return torch.mm(hidden, weight.t(), out=logits)
    return torch.addmm(bias, hidden, weight.t(), out=logits)


class _Part(NamedTuple):
    """Some rows of logits, with their probabilities."""

    logits: torch.Tensor
    """[num_tokens, vocab_size]"""
    targets: torch.Tensor
    """[num_tokens]"""
    probabilities: torch.Tensor
    """[num_tokens, vocab_size] probabilities, fp32."""
    nats: torch.Tensor
    """[num_tokens] -ln p(target), fp32."""


def _split_into_parts(logits: torch.Tensor, targets: torch.Tensor) -> Iterator[_Part]:
    """Split logits [num_tokens, vocab_size] and targets [num_tokens] into parts that fit into a CPU's cache."""
    rows = max(1, CACHED_ELEMENTS // logits.shape[-1] if logits.device.type == "cpu" else len(logits))
    for part, tokens in zip(torch.split(logits, rows), torch.split(targets, rows), strict=True):
        probabilities = F.softmax(part, dim=-1, dtype=torch.float32)
        # -ln p = (largest logit - logit of the target) - ln(largest probability), whose log is always finite. This
        # takes one pass over memory less than log_softmax.
        gap = part.amax(-1).float() - part.gather(-1, tokens[:, None])[:, 0].float()
        yield _Part(part, tokens, probabilities, gap - probabilities.amax(-1).log())


def _compute_nats(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return -ln p, [num_tokens] fp32, of `targets` [num_tokens] under logits [num_tokens, vocab_size]."""
    return torch.cat([part.nats for part in _split_into_parts(logits, targets)])


def _replace_by_gradient_(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the sum of -ln p, a scalar in fp32, and replace logits [num_tokens, vocab_size] by its gradient."""
    total = torch.zeros((), device=logits.device)
    for part in _split_into_parts(logits, targets):
        total += part.nats.sum()
        part.probabilities[torch.arange(len(part.targets), device=targets.device), part.targets] -= 1.0
        part.logits.copy_(part.probabilities)
    return total


def _find_separable_head(model: Any) -> torch.nn.Linear | None:
    """Return the output embedding of `model` if it turns hidden states into logits, tested on 8 tokens."""
    head = model.get_output_embeddings()
    if isinstance(head, torch.nn.Linear):
        tokens = torch.arange(8, device=model.device)[None]
        with full_precision(model):
            logits = model(tokens).logits
            with bypass_head(head), contextlib.suppress(RuntimeError):  # a bias added to the logits does not fit
                hidden = model(tokens).logits
                # Equal to the last bit: a cap on the small logits of fresh weights only changes the last bits.
                if torch.equal(F.linear(hidden, head.weight, head.bias), logits):
                    return head
    log.warning(
        "the logits of %s are more than an embedding of its hidden states: they are computed for all positions, which"
        " takes memory",
        type(model).__name__,
    )
    return None


@contextlib.contextmanager
def bypass_head(head: torch.nn.Linear) -> Iterator[None]:
    """Make `head` return its input."""
    vars(head)["forward"] = _return_input  # takes precedence over the method of the class
    try:
        yield
    finally:
        del vars(head)["forward"]


def _return_input(hidden: torch.Tensor) -> torch.Tensor:
    return hidden
