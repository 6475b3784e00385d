"""The two training objectives: what a batch is, what its loss is, and which windows score a document.

All that tells causal from masked language modeling apart in code stands here, behind one interface.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from stages.core.artifacts import TokenIds
from stages.core.errors import StageError
from stages.model.masking import EVALUATION_EPOCH, EVALUATION_SEED, IGNORED, mask_blocks
from stages.model.schema import ObjectiveConfig, check_isolation
from stages.tokens.vocabulary import Vocabulary

NUM_PASSES = 7  # of pseudo_bits_per_byte: near 1 / 0.15, and the same for all runs


@dataclass(frozen=True)
class Window:
    """A piece of a document as a model sees it."""

    document: int
    """Index of the document."""
    input_ids: npt.NDArray[np.int64]
    """[length]"""
    positions: npt.NDArray[np.int64]
    """[num_predicted] where in the window the model's output predicts a token."""
    targets: npt.NDArray[np.int64]
    """[num_predicted] the tokens predicted."""
    places: npt.NDArray[np.int64]
    """[num_predicted] where in the document they are."""


class Objective(Protocol):
    """What stages ask of a training objective."""

    document_metric: str
    """Name of the block-independent metric."""
    loss_metrics: tuple[str, str]
    """Names of the loss per block and its perplexity."""

    def batch(self, blocks: TokenIds, indices: Sequence[int], seed: int, epoch: int) -> dict[str, Any]:
        """Inputs and labels [num_blocks, block_size] int64 for the blocks numbered `indices`, with the masks needed."""

    def targets(self, labels: torch.Tensor) -> torch.Tensor:
        """The token that the model's output at each position predicts, or IGNORED, of labels [..., block_size]."""

    def windows(self, documents: Iterator[TokenIds], context: int) -> Iterator[Window]:
        """Windows of at most `context` tokens in which every text token of every document is predicted once."""


def make_objective(
    name: str, vocabulary: Vocabulary, config: ObjectiveConfig | None = None, model: Any = None
) -> Objective:
    """The objective called `name`; `config` and `model` are what its batches need, its windows do without them.

    Raises:
        StageError: if documents are to be isolated in an architecture for which that is not proven.
    """
    if config is not None:
        try:
            check_isolation(config, model.config.model_type if model is not None else None)
        except ValueError as error:
            raise StageError(str(error)) from None
    if config is not None and config.isolate_documents and name == "mlm" and not vocabulary.prefix:
        raise StageError(
            "objective.isolate_documents=true: the tokenizer puts no token before a document (cls_token), so that its"
            " beginning is lost in a block: set isolate_documents: false in conf/task/mlm.yaml"
        )
    return Causal(vocabulary, config) if name == "causal" else Masked(vocabulary, config, model)


def segment_positions(starts: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Position of each token in its segment, [..., block_size], where a segment begins at each true of `starts`."""
    index = np.arange(starts.shape[-1])
    return index - np.maximum.accumulate(np.where(starts, index, 0), axis=-1)


class Causal:
    """Predict the next token. Labels are the inputs; the model's output at position i predicts the token at i + 1."""

    document_metric = "bits_per_byte"
    loss_metrics = ("loss", "perplexity")

    def __init__(self, vocabulary: Vocabulary, config: ObjectiveConfig | None) -> None:
        self._isolate = config is not None and config.isolate_documents
        self._end = vocabulary.special["eos_token"]

    def batch(self, blocks: TokenIds, indices: Sequence[int], seed: int, epoch: int) -> dict[str, Any]:
        input_ids = torch.from_numpy(blocks.astype(np.int64))
        labels = input_ids.clone()
        labels[:, 0] = IGNORED  # nothing stands before it; so counted, the labels are the tokens predicted
        batch = {"input_ids": input_ids, "labels": labels}
        if self._isolate:
            batch["position_ids"] = torch.from_numpy(segment_positions(blocks == self._end))
        return batch

    def targets(self, labels: torch.Tensor) -> torch.Tensor:
        return F.pad(labels[..., 1:], (0, 1), value=IGNORED)

    def windows(self, documents: Iterator[TokenIds], context: int) -> Iterator[Window]:
        step = context // 2
        for document, ids in enumerate(documents):
            # The end-of-sequence token stands before the document, so that its first token is predicted too.
            stream = np.concatenate([[self._end], ids]).astype(np.int64)
            predicted = 1  # tokens of the stream predicted, the end-of-sequence token not being asked for
            for start in range(0, len(stream), step):
                if predicted == len(stream):
                    break
                end = min(start + context, len(stream))
                targets = stream[predicted:end]
                positions = np.arange(predicted, end) - start - 1
                # The window's last token predicts nothing in it, and under causal attention nothing sees it.
                places = np.arange(predicted, end) - 1
                yield Window(document, stream[start : end - 1], positions, targets, places)
                predicted = end


class Masked:
    """Predict masked tokens from both sides."""

    document_metric = "pseudo_bits_per_byte"
    loss_metrics = ("masked_loss", "masked_perplexity")

    def __init__(self, vocabulary: Vocabulary, config: ObjectiveConfig | None, model: Any) -> None:
        self._vocabulary, self._config = vocabulary, config
        self._mask = vocabulary.special["mask_token"]
        # RoBERTa numbers positions from pad_token_id + 1 on.
        roberta = model is not None and model.config.model_type == "roberta"
        self._first_position = model.config.pad_token_id + 1 if roberta else 0
        # ModernBERT's local layers see so many tokens to either side; a mask of ours takes the place of theirs.
        modernbert = model is not None and model.config.model_type == "modernbert"
        self._window = model.config.sliding_window if modernbert else None

    def batch(self, blocks: TokenIds, indices: Sequence[int], seed: int, epoch: int) -> dict[str, Any]:
        config = self._config
        assert config is not None  # stages that make batches give one
        input_ids, labels = mask_blocks(blocks, indices, self._vocabulary, config, seed, epoch)
        batch: dict[str, Any] = {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}
        if config.isolate_documents:
            starts = blocks == self._vocabulary.prefix[0]
            batch["position_ids"] = torch.from_numpy(segment_positions(starts) + self._first_position)
            segments = torch.from_numpy(starts.cumsum(axis=-1))
            apart = segments[:, None, :, None] != segments[:, None, None, :]
            batch["attention_mask"] = _additive(apart)
            if self._window is not None:
                index = torch.arange(apart.shape[-1])
                far = (index[:, None] - index).abs() > self._window
                batch["attention_mask"] = {
                    "full_attention": _additive(apart),
                    "sliding_attention": _additive(apart | far),
                }
        return batch

    def targets(self, labels: torch.Tensor) -> torch.Tensor:
        return labels

    def windows(self, documents: Iterator[TokenIds], context: int) -> Iterator[Window]:
        prefix, suffix = self._vocabulary.prefix, self._vocabulary.suffix
        size = context - len(prefix) - len(suffix)
        for document, ids in enumerate(documents):
            for start in range(0, len(ids), size):
                text = ids[start : start + size].astype(np.int64)
                for number in range(NUM_PASSES):
                    chosen = np.arange((number - start) % NUM_PASSES, len(text), NUM_PASSES)
                    if len(chosen):
                        masked = text.copy()
                        masked[chosen] = self._mask
                        input_ids = np.concatenate([prefix, masked, suffix]).astype(np.int64)
                        yield Window(document, input_ids, chosen + len(prefix), text[chosen], chosen + start)


def _additive(apart: torch.Tensor) -> torch.Tensor:
    """What attention scores gain where they are not `apart`: boolean masks of this shape fail on eager attention."""
    return torch.zeros(apart.shape).masked_fill_(apart, torch.finfo(torch.float32).min)


def move_batch(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """`batch` on `device`. Its attention_mask is a dict where layers differ in what they see."""
    return {
        key: move_batch(value, device) if isinstance(value, dict) else value.to(device) for key, value in batch.items()
    }


def evaluation_batch(objective: Objective, blocks: TokenIds, indices: Sequence[int]) -> dict[str, Any]:
    """A batch with the masks that are the same in every evaluation."""
    return objective.batch(blocks, indices, EVALUATION_SEED, EVALUATION_EPOCH)
