"""The two training objectives: what a batch is, what its loss is, and which windows score a document.

All that tells causal from masked language modeling apart in code stands here, behind one interface.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from stages.core.artifacts import COUNTED, SEGMENT_START, Blocks, Marks, TokenIds
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


class Text(NamedTuple):
    """The text of a document."""

    ids: TokenIds
    """[num_tokens], without the tokens that wrap a document."""
    num_bytes: int
    """In UTF-8, of the tokens that are predicted."""
    is_predicted: npt.NDArray[np.bool_] | None = None
    """[num_tokens]; None: all are."""


class Objective(Protocol):
    """What stages ask of a training objective."""

    document_metric: str
    """Name of the block-independent metric."""
    loss_metrics: tuple[str, str]
    """Names of the loss per block and its perplexity."""

    def batch(
        self, blocks: TokenIds, indices: Sequence[int], seed: int, epoch: int, marks: Marks | None = None
    ) -> dict[str, Any]:
        """Inputs and labels, both [num_blocks, block_size] int64, for the blocks numbered `indices`.

        Where documents are isolated also segment_ids, int32 of the same shape, for `stages.model.isolation`.

        Args:
            blocks: [num_blocks, block_size] token ids.
            marks: [num_blocks, block_size]; labels are IGNORED where a token does not count. None: all count.
        """

    def targets(self, labels: torch.Tensor) -> torch.Tensor:
        """The token that the model's output at each position predicts, or IGNORED, of labels [..., block_size]."""

    def windows(self, documents: Iterable[Text], context: int) -> Iterator[Window]:
        """Windows of at most `context` tokens in which every token that is to be predicted is predicted once."""


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
    return Causal(vocabulary, config) if name == "causal" else Masked(vocabulary, config)


def number_segments(blocks: TokenIds, first: int, marks: Marks | None) -> torch.Tensor:
    """Number of each token's segment in its block, int32 [num_blocks, block_size].

    A segment begins where `marks` say so; without marks, at each token `first`.
    """
    starts = blocks == first if marks is None else (marks & SEGMENT_START) > 0
    return torch.from_numpy(starts.cumsum(axis=-1, dtype=np.int32))


class Causal:
    """Predict the next token. Labels are the inputs; the model's output at position i predicts the token at i + 1."""

    document_metric = "bits_per_byte"
    loss_metrics = ("loss", "perplexity")

    def __init__(self, vocabulary: Vocabulary, config: ObjectiveConfig | None) -> None:
        self._isolate = config is not None and config.isolate_documents
        self._end, self._lead = vocabulary.special["eos_token"], vocabulary.lead

    def batch(
        self, blocks: TokenIds, indices: Sequence[int], seed: int, epoch: int, marks: Marks | None = None
    ) -> dict[str, Any]:
        input_ids = torch.from_numpy(blocks.astype(np.int64))
        labels = input_ids.clone()
        if marks is not None:
            labels[torch.from_numpy((marks & COUNTED) == 0)] = IGNORED
        labels[:, 0] = IGNORED  # nothing stands before it; so counted, the labels are the tokens predicted
        batch = {"input_ids": input_ids, "labels": labels}
        if self._isolate:
            batch["segment_ids"] = number_segments(blocks, self._end, marks)
        return batch

    def targets(self, labels: torch.Tensor) -> torch.Tensor:
        return F.pad(labels[..., 1:], (0, 1), value=IGNORED)

    def windows(self, documents: Iterable[Text], context: int) -> Iterator[Window]:
        step = context // 2
        for document, text in enumerate(documents):
            # The end-of-sequence token stands before the document, so that its first token is predicted too. (A chat
            # template puts its own tokens there.)
            lead = self._lead
            stream = np.concatenate([lead, text.ids]).astype(np.int64)
            predicted = 1  # tokens of the stream predicted; nothing stands before the first
            for start in range(0, len(stream), step):
                if predicted >= len(stream):
                    break
                end = min(start + context, len(stream))
                places = np.arange(predicted, end) - len(lead)
                if text.is_predicted is not None:
                    places = places[text.is_predicted[places]]
                if len(places):
                    # The window's last token predicts nothing in it, and under causal attention nothing sees it.
                    window = stream[start : end - 1]
                    yield Window(document, window, places + len(lead) - start - 1, stream[places + len(lead)], places)
                predicted = end


class Masked:
    """Predict masked tokens from both sides."""

    document_metric = "pseudo_bits_per_byte"
    loss_metrics = ("masked_loss", "masked_perplexity")

    def __init__(self, vocabulary: Vocabulary, config: ObjectiveConfig | None) -> None:
        self._vocabulary, self._config = vocabulary, config
        self._mask = vocabulary.special["mask_token"]

    def batch(
        self, blocks: TokenIds, indices: Sequence[int], seed: int, epoch: int, marks: Marks | None = None
    ) -> dict[str, Any]:
        config = self._config
        assert config is not None  # stages that make batches give one
        input_ids, labels = mask_blocks(blocks, indices, self._vocabulary, config, seed, epoch, marks)
        batch: dict[str, Any] = {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}
        if config.isolate_documents:
            batch["segment_ids"] = number_segments(blocks, self._vocabulary.prefix[0], marks)
        return batch

    def targets(self, labels: torch.Tensor) -> torch.Tensor:
        return labels

    def windows(self, documents: Iterable[Text], context: int) -> Iterator[Window]:
        prefix, suffix = self._vocabulary.prefix, self._vocabulary.suffix
        size = context - len(prefix) - len(suffix)
        for document, text in enumerate(documents):
            for start in range(0, len(text.ids), size):
                tokens = text.ids[start : start + size].astype(np.int64)
                for number in range(NUM_PASSES):
                    chosen = np.arange((number - start) % NUM_PASSES, len(tokens), NUM_PASSES)
                    if text.is_predicted is not None:
                        chosen = chosen[text.is_predicted[start + chosen]]
                    if len(chosen):
                        masked = tokens.copy()
                        masked[chosen] = self._mask
                        input_ids = np.concatenate([prefix, masked, suffix]).astype(np.int64)
                        yield Window(document, input_ids, chosen + len(prefix), tokens[chosen], chosen + start)


def evaluation_batch(objective: Objective, blocks: Blocks, indices: Sequence[int]) -> dict[str, Any]:
    """A batch of the blocks numbered `indices`, with the masks that are the same in every evaluation."""
    return objective.batch(blocks[indices], indices, EVALUATION_SEED, EVALUATION_EPOCH, blocks.marks(indices))
