"""Isolation of the documents in a block: positions and attention restart at each segment.

A batch has segment ids [batch, length], equal for tokens of the same document. They are converted to the inputs of the
model on its device, right before the forward pass, since a mask [batch, 1, length, length] is `length` times as large.
"""

from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionMaskInterface
from transformers.utils.generic import is_flash_attention_requested

from stages.model.schema import ISOLATION_PROVEN


def compute_segment_positions(segment_ids: torch.Tensor) -> torch.Tensor:
    """Compute the position of each token in its segment, from 0.

    Args:
        segment_ids: [..., length], any integer dtype; a segment is a run of equal ids.

    Returns:
        [..., length] int64.
    """
    index = torch.arange(segment_ids.shape[-1], device=segment_ids.device)  # [length]
    # True at the first token of each segment: the first token, and all that differ from the one before. [..., length]
    starts = F.pad(segment_ids.diff(dim=-1) != 0, (1, 0), value=True)
    # The running maximum of the starts' indices is the index at which the current segment began.
    return index - torch.where(starts, index, 0).cummax(-1).values


def get_first_position(config: Any) -> int:
    """Return the position id of the first token of a sequence in a model with this configuration."""
    # RoBERTa numbers positions from pad_token_id + 1 on.
    return int(config.pad_token_id) + 1 if config.model_type == "roberta" else 0


def isolate_segments(batch: dict[str, Any], model: Any) -> dict[str, Any]:
    """Replace the segment_ids of a batch by the position_ids and mask that isolate its segments in `model`.

    The form of the mask depends on the attention implementation of the model:

    - SDPA: bool [batch, 1, length, length], true for the keys that a query attends to.
    - eager: model.dtype [batch, 1, length, length], added to the scores.
    - FlexAttention: a BlockMask.
    - FlashAttention: no mask, but the bounds of the segments (`_build_varlen_arguments`).

    Causal architectures get no mask: transformers derives it from the position_ids.

    Args:
        batch: input_ids [batch, length] int64 on the device of the model, and optionally segment_ids, integers of the
            same shape.
        model: an architecture of ISOLATION_PROVEN, not wrapped by DistributedDataParallel or torch.compile.

    Returns:
        The model's inputs, among them position_ids [batch, length] int64; `batch` if it has no segment_ids.
    """
    if "segment_ids" not in batch:
        return batch
    config, inputs = model.config, dict(batch)
    segment_ids = inputs.pop("segment_ids")
    inputs["position_ids"] = compute_segment_positions(segment_ids) + get_first_position(config)
    if is_flash_attention_requested(config):
        return inputs | _build_varlen_arguments(inputs["position_ids"] == get_first_position(config))
    if config.model_type not in ISOLATION_PROVEN["mlm"]:
        return inputs  # transformers' causal masks follow from position_ids
    if config.model_type != "modernbert":
        return inputs | {"attention_mask": _build_mask(segment_ids, model)}
    # These masks replace those that ModernBERT would build; its local layers need one with a window.
    masks = {"full_attention": None, "sliding_attention": config.sliding_window}
    inputs["attention_mask"] = {name: _build_mask(segment_ids, model, window) for name, window in masks.items()}
    return inputs


def _build_mask(segment_ids: torch.Tensor, model: Any, window: int | None = None) -> Any:
    """Build the mask that restricts each token to its segment, in the form of the model's attention implementation.

    Args:
        segment_ids: [batch, length], integers.
        window: if not None, a token also attends to at most this many tokens on either side.

    Returns:
        A tensor [batch, 1, length, length] or a BlockMask, as described at `isolate_segments`.
    """

    def is_attended(batch: Any, head: Any, query: Any, key: Any) -> Any:
        # Each argument is an index tensor; all broadcast to the shape of the mask.
        is_same_segment = segment_ids[batch, query] == segment_ids[batch, key]
        return is_same_segment if window is None else is_same_segment & ((query - key).abs() <= window)

    num_rows, length = segment_ids.shape
    make_mask = AttentionMaskInterface()[model.config._attn_implementation]
    return make_mask(
        batch_size=num_rows,
        q_length=length,
        kv_length=length,
        mask_function=is_attended,
        allow_is_causal_skip=False,
        dtype=model.dtype,
        config=model.config,
        device=segment_ids.device,
    )


def _build_varlen_arguments(starts: torch.Tensor) -> dict[str, Any]:
    """Build FlashAttention's variable-length arguments, which treat the batch as one row of segments.

    Args:
        starts: [batch, length] bool, true at the first token of each segment.

    Returns:
        cu_seq_lens_q and cu_seq_lens_k, the bounds of the segments, [num_segments + 1] int32; max_length_q and
        max_length_k, an upper bound of their lengths.
    """
    # Indices of the starts in the flattened batch, followed by the number of tokens.
    bounds = F.pad(starts.flatten().nonzero()[:, 0].int(), (0, 1), value=starts.numel())
    length = starts.shape[
        -1
    ]  # an upper bound: the length of the longest segment would cost another wait for the device
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": length, "max_length_k": length}
