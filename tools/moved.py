"""Largest changes between two models of a task: the documents and groups that decide a difference in bits per byte.

Changes are measured in bits, so a long document counts for more than a short one with the same bits per byte.
"""

from collections.abc import Sequence
from io import BytesIO
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from stages.core.artifacts import to_numpy
from stages.figures.groups import get_group_columns, split_rows_by_value
from stages.tokens.vocabulary import convert_rust_errors
from tools.compare_pairs import BaselineComparison, Evaluation
from tools.outs import Outs
from tools.paired import Difference, compare_models
from tools.report_data import get_token_bits_path, get_tokenizer_path

MAX_DOCUMENTS = 3
"""Number of improved documents shown, and of documents that got worse."""
MAX_GROUPS = 10
_MAX_SEGMENTS, _MAX_CHARACTERS = 160, 1200  # of an excerpt


class Segment(NamedTuple):
    """Piece of text that ends at a token boundary of both models."""

    text: str
    bits: float
    """Difference in bits; negative if the first model predicts the text better."""


class Excerpt(NamedTuple):
    """Part of a document with the largest changes."""

    segments: list[Segment]
    begins_late: bool
    """True if the document has text before the excerpt."""
    ends_early: bool


class MovedDocument(NamedTuple):
    record: int
    """Record number within the split."""
    q_id: str
    """Empty if records have none."""
    source: str
    num_bytes: int
    bits: float
    """Difference in bits over the document."""
    excerpt: Excerpt | None
    """None if the bits per token could not be read, or the two tokenizers decode the document differently."""


class MovedGroup(NamedTuple):
    group: str
    value: str
    bits: float
    """Difference in bits over the documents of the group."""
    difference: Difference


class Moved(NamedTuple):
    """Largest changes of one comparison."""

    better: list[MovedDocument]
    worse: list[MovedDocument]
    groups: list[MovedGroup]


def find_moved(comparison: BaselineComparison, task: str, split: str, outs: Outs) -> Moved:
    """Find the documents and groups with the largest changes in a comparison that has a difference.

    Args:
        split: full name of the split.
    """
    bits = _average_bits(comparison.evaluations) - _average_bits(comparison.baselines)
    order = np.argsort(bits, kind="stable")
    better = [row for row in order[:MAX_DOCUMENTS].tolist() if bits[row] < 0]
    worse = [row for row in order[::-1][:MAX_DOCUMENTS].tolist() if bits[row] > 0]
    excerpts = read_excerpts(comparison, task, split, [*better, *worse], outs)
    documents = [
        _build_moved_document(comparison, row, float(bits[row]), excerpts.get(row)) for row in [*better, *worse]
    ]
    return Moved(documents[: len(better)], documents[len(better) :], find_moved_groups(comparison))


def _average_bits(evaluations: Sequence[Evaluation]) -> npt.NDArray[np.float64]:
    """Average the bits of each document over seeds: `[num_documents]`, float64."""
    mean: npt.NDArray[np.float64] = np.mean([evaluation.scores.bits for evaluation in evaluations], axis=0)
    return mean


def _build_moved_document(
    comparison: BaselineComparison, row: int, bits: float, excerpt: Excerpt | None
) -> MovedDocument:
    table = comparison.baselines[0].table
    values = table.slice(row, 1).to_pylist()[0]
    q_id = values.get("q_id") or ""
    return MovedDocument(values["record"], q_id, values["source"], values["bytes"], bits, excerpt)


def find_moved_groups(comparison: BaselineComparison) -> list[MovedGroup]:
    """Return the group values with the largest changes, considering only groups with several values."""
    num_bytes, found = comparison.baselines[0].scores.num_bytes, []
    for group, values in get_group_columns(comparison.baselines[0].table).items():
        parts = list(split_rows_by_value(values, num_bytes))
        for value, rows, _ in parts if len(parts) > 1 else []:
            if num_bytes[rows].any():
                ours, others = (
                    {item.seed: item.scores.bits[rows] for item in model}
                    for model in (comparison.evaluations, comparison.baselines)
                )
                difference = compare_models(ours, others, num_bytes[rows])
                found.append(MovedGroup(group, value, difference.value * int(num_bytes[rows].sum()), difference))
    return sorted(found, key=lambda moved: -abs(moved.bits))[:MAX_GROUPS]


def read_excerpts(
    comparison: BaselineComparison, task: str, split: str, rows: Sequence[int], outs: Outs
) -> dict[int, Excerpt]:
    """Return excerpts of the documents at `rows` of the score tables, except those that cannot be decoded."""
    models = []
    for model in (comparison.evaluations, comparison.baselines):
        tokenizer_json = outs.read_out(model[0].rev, get_tokenizer_path(task))
        seeds = [_read_tokens(outs.read_out(item.rev, get_token_bits_path(task, split)), rows) for item in model]
        if tokenizer_json is None or not all(seeds):
            return {}
        with convert_rust_errors("the tokenizer of a compared model"):
            tokenizer = Tokenizer.from_buffer(tokenizer_json)
        # Token ids of the first seed, which all seeds share, and bits averaged over seeds: both [num_tokens].
        tokens = {row: (seeds[0][row][0], np.mean([seed[row][1] for seed in seeds], axis=0)) for row in rows}
        models.append({row: _decode_text(tokenizer, *tokens[row]) for row in rows})
    ours, others = models
    return {row: cut_excerpt(found) for row in rows if (found := align_texts(ours[row], others[row])) is not None}


def _read_tokens(
    content: bytes | None, rows: Sequence[int]
) -> dict[int, tuple[npt.NDArray[np.integer], npt.NDArray[np.float32]]]:
    """Read the documents at `rows` from the content of a token-bits file of evaluate; empty if it is None.

    Returns:
        Row to token ids `[num_tokens]`, uint16 or uint32, and bits `[num_tokens]`, float32.
    """
    if content is None:
        return {}
    found = {}
    with pq.ParquetFile(BytesIO(content)) as file:
        sizes = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
        ends = np.cumsum(sizes)  # [num_row_groups], number of rows up to the end of each
        for number in np.unique(np.searchsorted(ends, rows, side="right")).tolist():
            table = file.read_row_group(number, columns=["input_ids", "bits"])
            first = int(ends[number]) - sizes[number]
            for row in rows:
                if first <= row < ends[number]:
                    ids, bits = (table.column(name)[row - first].values for name in ("input_ids", "bits"))
                    found[row] = to_numpy(ids), to_numpy(bits)
    return found


class DecodedText(NamedTuple):
    """Text of a document, decoded from its tokens."""

    text: str
    ends: npt.NDArray[np.int64]
    """`[num_pieces]`, characters up to the end of each piece, which is one token or several that share a character."""
    bits: npt.NDArray[np.float64]
    """`[num_pieces]`, sum of the bits of all tokens up to the end of each piece."""


def _decode_text(tokenizer: Tokenizer, ids: npt.NDArray[np.integer], bits: npt.NDArray[np.floating]) -> DecodedText:
    """Decode the tokens of a document; `ids` and `bits` are `[num_tokens]`."""
    stream, pieces, ends = DecodeStream(skip_special_tokens=False), [], []
    for number, token in enumerate(ids.tolist()):
        piece = stream.step(tokenizer, token)
        if piece is not None:  # otherwise the token ends inside a character
            pieces.append(piece)
            ends.append(number)
    return DecodedText(
        "".join(pieces), np.cumsum([*map(len, pieces)], dtype=np.int64), np.cumsum(bits, dtype=float)[ends]
    )


def align_texts(ours: DecodedText, others: DecodedText) -> list[Segment] | None:
    """Split the text at the token boundaries that both models share, with the difference in bits of each piece.

    Returns None if the tokens of the two models decode to different texts.
    """
    if ours.text != others.text:
        return None
    # Shared ends and their indices in both models; differences of the cumulative bits give the bits of each piece.
    ends, our_indices, other_indices = np.intersect1d(ours.ends, others.ends, return_indices=True)  # [num_segments]
    bits = np.diff(ours.bits[our_indices] - others.bits[other_indices], prepend=0)  # [num_segments]
    starts = [0, *ends.tolist()]
    return [
        Segment(ours.text[start:end], value)
        for start, end, value in zip(starts, ends.tolist(), bits.tolist(), strict=False)
    ]


def cut_excerpt(segments: list[Segment]) -> Excerpt:
    """Return the part with the largest sum of absolute changes, limited in segments and in characters."""
    # [num_segments + 1], prefix sums of the characters and absolute changes of the segments.
    characters = np.cumsum([0, *(len(segment.text) for segment in segments)])
    moved = np.cumsum([0, *(abs(segment.bits) for segment in segments)])
    # [num_segments], the end of the longest excerpt from each start; it has at least one segment.
    starts = np.arange(len(segments))
    ends = np.searchsorted(characters, characters[:-1] + _MAX_CHARACTERS, side="right") - 1
    ends = np.minimum(np.maximum(ends, starts + 1), starts + _MAX_SEGMENTS).clip(max=len(segments))
    start = int(np.argmax(moved[ends] - moved[starts]))
    end = int(ends[start])
    return Excerpt(segments[start:end], start > 0, end < len(segments))
