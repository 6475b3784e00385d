"""Keeps the documents of a block apart: positions and attention that restart at each of its segments.

A batch says which tokens belong together by segment ids, [batch, length]. The model's own inputs are made of them where
the model is, right before its forward pass: a mask [batch, 1, length, length] is `length` times as large as they are.
"""

from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionMaskInterface
from transformers.utils.generic import is_flash_attention_requested

from stages.model.schema import ISOLATION_PROVEN


def segment_positions(segment_ids: torch.Tensor) -> torch.Tensor:
    """Position of each token in its segment, int64 of the shape of `segment_ids` [..., length]."""
    index = torch.arange(segment_ids.shape[-1], device=segment_ids.device)
    starts = F.pad(segment_ids.diff(dim=-1) != 0, (1, 0), value=True)
    return index - torch.where(starts, index, 0).cummax(-1).values


def first_position(config: Any) -> int:
    """The position id of a sequence's first token in a model of this configuration."""
    # RoBERTa numbers positions from pad_token_id + 1 on.
    return int(config.pad_token_id) + 1 if config.model_type == "roberta" else 0


def isolate_segments(batch: dict[str, Any], model: Any) -> dict[str, Any]:
    """`batch` as `model` takes it, with position_ids and a mask in place of segment_ids, where it has them.

    The mask has the form that the model's attention takes: bool [batch, 1, length, length] for SDPA, what is added to
    the scores for eager attention, a BlockMask for FlexAttention, and for FlashAttention none but the lengths of the
    segments, whose queries and keys it takes one after the other.

    Args:
        batch: input_ids [batch, length] on the device of the model, and segment_ids, int of the same shape.
        model: of an architecture of ISOLATION_PROVEN; not what DistributedDataParallel or torch.compile makes of it.
    """
    if "segment_ids" not in batch:
        return batch
    config, inputs = model.config, dict(batch)
    segment_ids = inputs.pop("segment_ids")
    inputs["position_ids"] = segment_positions(segment_ids) + first_position(config)
    if is_flash_attention_requested(config):
        return inputs | _lengths(inputs["position_ids"] == first_position(config))
    if config.model_type not in ISOLATION_PROVEN["mlm"]:
        return inputs  # transformers' causal masks follow from position_ids
    if config.model_type != "modernbert":
        return inputs | {"attention_mask": _mask(segment_ids, model)}
    # A mask of ours takes the place of ModernBERT's own, of which its local layers need another one.
    masks = {"full_attention": None, "sliding_attention": config.sliding_window}
    inputs["attention_mask"] = {name: _mask(segment_ids, model, window) for name, window in masks.items()}
    return inputs


def _mask(segment_ids: torch.Tensor, model: Any, window: int | None = None) -> Any:
    """What keeps each token to its segment and, if given, to `window` tokens on either side."""

    def attends(batch: Any, head: Any, query: Any, key: Any) -> Any:
        together = segment_ids[batch, query] == segment_ids[batch, key]
        return together if window is None else together & ((query - key).abs() <= window)

    num_rows, length = segment_ids.shape
    make_mask = AttentionMaskInterface()[model.config._attn_implementation]
    return make_mask(
        batch_size=num_rows,
        q_length=length,
        kv_length=length,
        mask_function=attends,
        allow_is_causal_skip=False,
        dtype=model.dtype,
        config=model.config,
        device=segment_ids.device,
    )


def _lengths(starts: torch.Tensor) -> dict[str, Any]:
    """FlashAttention's arguments for a batch as one row of segments, which begin at each true of `starts`."""
    bounds = F.pad(starts.flatten().nonzero()[:, 0].int(), (0, 1), value=starts.numel())
    length = starts.shape[-1]  # of the longest at most: to know it would take waiting for the device once more
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": length, "max_length_k": length}
