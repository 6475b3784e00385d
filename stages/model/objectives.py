"""The two training objectives: how to build a batch, which tokens it predicts, and which windows score a document.

All code that differs between causal and masked language modeling is in this module, behind one interface.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from stages.core.artifacts import COUNTED, SEGMENT_START, Blocks, Marks, TokenIds
from stages.core.errors import StageError
from stages.model.masking import EVALUATION_EPOCH, EVALUATION_SEED, IGNORED, mask_blocks
from stages.model.schema import ObjectiveConfig, check_isolation
from stages.tokens.vocabulary import Vocabulary

if TYPE_CHECKING:
    from stages.tokens.encoding import DocumentText

NUM_PASSES = 7  # masked passes of pseudo_bits_per_byte: close to 1 / 0.15, and the same for all runs


@dataclass(frozen=True)
class Window:
    """Input of a model for a piece of a document, and the tokens to predict."""

    document_index: int
    """Index of the document among those given."""
    input_ids: npt.NDArray[np.int64]
    """[length] token ids."""
    positions: npt.NDArray[np.int64]
    """[num_predicted] positions in the window whose output predicts a target."""
    targets: npt.NDArray[np.int64]
    """[num_predicted] token ids to predict."""
    document_positions: npt.NDArray[np.int64]
    """[num_predicted] positions of the targets in the document."""


class Objective(Protocol):
    """Interface of a training objective."""

    document_metric: str
    """Name of the metric that does not depend on block_size."""
    loss_metrics: tuple[str, str]
    """Names of the metrics for the loss over blocks and its perplexity."""

    def build_batch(
        self, blocks: TokenIds, indices: Sequence[int], seed: int, epoch: int, marks: Marks | None = None
    ) -> dict[str, Any]:
        """Build the batch of the given blocks.

        Args:
            blocks: [num_blocks, block_size] token ids, uint16 or uint32.
            indices: [num_blocks] indices of the blocks in the split.
            marks: [num_blocks, block_size] uint8; the label of a token without the flag COUNTED is IGNORED. None: all
                tokens count.

        Returns:
            input_ids and labels, both [num_blocks, block_size] int64. If documents are isolated, also segment_ids,
            int32 of the same shape, for `stages.model.isolation`.
        """

    def get_targets(self, labels: torch.Tensor) -> torch.Tensor:
        """Return the token that the model's output at each position predicts, or IGNORED.

        Args:
            labels: [..., block_size] int64, from `build_batch`.

        Returns:
            [..., block_size] int64.
        """

    def build_windows(self, documents: "Iterable[DocumentText]", context: int) -> Iterator[Window]:
        """Split documents into windows of at most `context` tokens that together predict every token once.

        Tokens with a false `is_predicted` are not predicted. The windows are in order of the documents.
        """


def make_objective(
    name: str, vocabulary: Vocabulary, config: ObjectiveConfig | None = None, model: Any = None
) -> Objective:
    """Create the objective `name`.

    Args:
        config: masking and isolation of `build_batch`; `build_windows` does not need it.
        model: the model for the batches; if not None, check that its architecture supports config.isolate_documents.

    Raises:
        StageError: if isolation is not proven for the architecture, or impossible with the tokenizer.
    """
    if config is not None:
        try:
            check_isolation(config, model.config.model_type if model is not None else None)
        except ValueError as error:
            raise StageError(str(error)) from None
    if config is not None and config.isolate_documents and name == "mlm" and not vocabulary.prefix:
        raise StageError(
            "objective.isolate_documents=true: the tokenizer puts no token (cls_token) before a document, so a block"
            " does not show where a document begins: set isolate_documents: false in conf/task/mlm.yaml"
        )
    return CausalObjective(vocabulary, config) if name == "causal" else MaskedObjective(vocabulary, config)


def number_segments(blocks: TokenIds, first: int, marks: Marks | None) -> torch.Tensor:
    """Number the segments of each block.

    Args:
        blocks: [num_blocks, block_size] token ids.
        first: the token at which a segment begins, if `marks` is None.
        marks: [num_blocks, block_size] uint8; a segment begins at each token with the flag SEGMENT_START.

    Returns:
        [num_blocks, block_size] int32, the segment number of each token, counted from the start of its block.
    """
    starts = blocks == first if marks is None else (marks & SEGMENT_START) > 0  # [num_blocks, block_size] bool
    return torch.from_numpy(starts.cumsum(axis=-1, dtype=np.int32))


class CausalObjective:
    """Predict the next token. Labels are the inputs; the output at position i predicts the token at i + 1."""

    document_metric = "bits_per_byte"
    loss_metrics = ("loss", "perplexity")

    def __init__(self, vocabulary: Vocabulary, config: ObjectiveConfig | None) -> None:
        self._isolate = config is not None and config.isolate_documents
        self._document_end, self._lead = vocabulary.special["eos_token"], vocabulary.lead

    def build_batch(
        self, blocks: TokenIds, indices: Sequence[int], seed: int, epoch: int, marks: Marks | None = None
    ) -> dict[str, Any]:
        input_ids = torch.from_numpy(blocks.astype(np.int64))
        labels = input_ids.clone()
        if marks is not None:
            labels[torch.from_numpy((marks & COUNTED) == 0)] = IGNORED
        labels[:, 0] = IGNORED  # no output predicts it; now the labels that count are the predicted tokens
        batch = {"input_ids": input_ids, "labels": labels}
        if self._isolate:
            batch["segment_ids"] = number_segments(blocks, self._document_end, marks)
        return batch

    def get_targets(self, labels: torch.Tensor) -> torch.Tensor:
        return F.pad(labels[..., 1:], (0, 1), value=IGNORED)  # shifted left by one; the last output predicts nothing

    def build_windows(self, documents: "Iterable[DocumentText]", context: int) -> Iterator[Window]:
        step = context // 2
        for document_index, text in enumerate(documents):
            # The end-of-sequence token precedes the document, so that its first token is predicted too. (With a chat
            # template, the template's own tokens precede it.)
            lead = self._lead
            stream = np.concatenate([lead, text.ids]).astype(np.int64)  # [num_lead + num_tokens]
            num_done = 1  # tokens of the stream that earlier windows predict; no output predicts the first
            for start in range(0, len(stream), step):
                if num_done >= len(stream):
                    break
                end = min(start + context, len(stream))
                # Each window predicts the tokens after those of the window before: [num_predicted] document positions.
                places = np.arange(num_done, end) - len(lead)
                if text.is_predicted is not None:
                    places = places[text.is_predicted[places]]
                if len(places):
                    # The last token is omitted: no target needs its output, and causal attention hides it.
                    input_ids = stream[start : end - 1]
                    # The output at position i predicts the token at i + 1.
                    positions = places + len(lead) - start - 1
                    yield Window(document_index, input_ids, positions, stream[places + len(lead)], places)
                num_done = end


class MaskedObjective:
    """Predict masked tokens from the tokens on both sides."""

    document_metric = "pseudo_bits_per_byte"
    loss_metrics = ("masked_loss", "masked_perplexity")

    def __init__(self, vocabulary: Vocabulary, config: ObjectiveConfig | None) -> None:
        self._vocabulary, self._config = vocabulary, config
        self._mask = vocabulary.special["mask_token"]

    def build_batch(
        self, blocks: TokenIds, indices: Sequence[int], seed: int, epoch: int, marks: Marks | None = None
    ) -> dict[str, Any]:
        config = self._config
        assert config is not None  # required for batches
        input_ids, labels = mask_blocks(blocks, indices, self._vocabulary, config, seed, epoch, marks)
        batch: dict[str, Any] = {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}
        if config.isolate_documents:
            batch["segment_ids"] = number_segments(blocks, self._vocabulary.prefix[0], marks)
        return batch

    def get_targets(self, labels: torch.Tensor) -> torch.Tensor:
        return labels

    def build_windows(self, documents: "Iterable[DocumentText]", context: int) -> Iterator[Window]:
        prefix, suffix = self._vocabulary.prefix, self._vocabulary.suffix
        size = context - len(prefix) - len(suffix)
        for document_index, text in enumerate(documents):
            for start in range(0, len(text.ids), size):
                tokens = text.ids[start : start + size].astype(np.int64)  # [length]
                for number in range(NUM_PASSES):
                    # Pass `number` predicts the tokens whose document position is `number` modulo NUM_PASSES:
                    # [num_predicted] positions in `tokens`.
                    chosen = np.arange((number - start) % NUM_PASSES, len(tokens), NUM_PASSES)
                    if text.is_predicted is not None:
                        chosen = chosen[text.is_predicted[start + chosen]]
                    if len(chosen):
                        masked = tokens.copy()
                        masked[chosen] = self._mask
                        input_ids = np.concatenate([prefix, masked, suffix]).astype(np.int64)
                        yield Window(document_index, input_ids, chosen + len(prefix), tokens[chosen], chosen + start)


def build_evaluation_batch(objective: Objective, blocks: Blocks, indices: Sequence[int]) -> dict[str, Any]:
    """Build a batch of the blocks `indices`, as `Objective.build_batch`, with the fixed masks of evaluation."""
    return objective.build_batch(blocks[indices], indices, EVALUATION_SEED, EVALUATION_EPOCH, blocks.get_marks(indices))
