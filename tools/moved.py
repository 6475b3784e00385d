"""What moved most between two models of a task: the documents and groups that decide a difference in bits per byte.

A document or group moves the difference by its bits: long documents move it more than short ones that change as much.
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
from stages.figures.groups import group_columns, rows_by_value
from stages.tokens.vocabulary import rust_errors
from tools.compare_pairs import Evaluation, Line
from tools.outs import Outs
from tools.paired import Difference, compare_models
from tools.report_data import token_bits_file, tokenizer_file

MOST_DOCUMENTS = 3
"""Documents shown of those that got better, and of those that got worse."""
MOST_GROUPS = 10
_MOST_SEGMENTS, _MOST_CHARACTERS = 160, 1200  # of a document


class Segment(NamedTuple):
    """A piece of text that ends where tokens of both models end."""

    text: str
    bits: float
    """Difference of the bits that it takes: negative where the first model predicts it better."""


class Excerpt(NamedTuple):
    """The part of a document that differs most."""

    segments: list[Segment]
    begins_late: bool
    """Whether text of the document comes before it."""
    ends_early: bool


class MovedDocument(NamedTuple):
    record: int
    """Its number in the split."""
    q_id: str
    """Empty where records have none."""
    source: str
    num_bytes: int
    bits: float
    """Difference of the document's bits."""
    excerpt: Excerpt | None
    """None where the bits of its tokens could not be read, or where the two tokenizers spell it differently."""


class MovedGroup(NamedTuple):
    group: str
    value: str
    bits: float
    """Difference of the bits of its documents."""
    difference: Difference


class Moved(NamedTuple):
    """What moved most in one comparison."""

    better: list[MovedDocument]
    worse: list[MovedDocument]
    groups: list[MovedGroup]


def find_moved(line: Line, task: str, split: str, outs: Outs) -> Moved:
    """What moved most in a comparison that has a difference.

    Args:
        split: its full name.
    """
    bits = _mean_bits(line.evaluations) - _mean_bits(line.others)
    order = np.argsort(bits, kind="stable")
    better = [row for row in order[:MOST_DOCUMENTS].tolist() if bits[row] < 0]
    worse = [row for row in order[::-1][:MOST_DOCUMENTS].tolist() if bits[row] > 0]
    excerpts = read_excerpts(line, task, split, [*better, *worse], outs)
    documents = [_describe(line, row, float(bits[row]), excerpts.get(row)) for row in [*better, *worse]]
    return Moved(documents[: len(better)], documents[len(better) :], find_moved_groups(line))


def _mean_bits(evaluations: Sequence[Evaluation]) -> npt.NDArray[np.float64]:
    """Bits of each document, averaged over seeds, [num_documents]."""
    mean: npt.NDArray[np.float64] = np.mean([evaluation.scores.bits for evaluation in evaluations], axis=0)
    return mean


def _describe(line: Line, row: int, bits: float, excerpt: Excerpt | None) -> MovedDocument:
    table = line.others[0].table
    values = table.slice(row, 1).to_pylist()[0]
    q_id = values.get("q_id") or ""
    return MovedDocument(values["record"], q_id, values["source"], values["bytes"], bits, excerpt)


def find_moved_groups(line: Line) -> list[MovedGroup]:
    """The values of groups that moved most, of the groups that have several values."""
    num_bytes, found = line.others[0].scores.num_bytes, []
    for group, values in group_columns(line.others[0].table).items():
        parts = list(rows_by_value(values, num_bytes))
        for value, rows, _ in parts if len(parts) > 1 else []:
            if num_bytes[rows].any():
                ours, others = (
                    {item.seed: item.scores.bits[rows] for item in model} for model in (line.evaluations, line.others)
                )
                difference = compare_models(ours, others, num_bytes[rows])
                found.append(MovedGroup(group, value, difference.value * int(num_bytes[rows].sum()), difference))
    return sorted(found, key=lambda moved: -abs(moved.bits))[:MOST_GROUPS]


def read_excerpts(line: Line, task: str, split: str, rows: Sequence[int], outs: Outs) -> dict[int, Excerpt]:
    """Excerpts of the documents in `rows` of the tables of scores, as far as they can be read and spelt."""
    models = []
    for model in (line.evaluations, line.others):
        spelling = outs.read(model[0].rev, tokenizer_file(task))
        read = [_read_tokens(outs.read(item.rev, token_bits_file(task, split)), rows) for item in model]
        if spelling is None or not all(read):
            return {}
        with rust_errors("the tokenizer of a compared model"):
            tokenizer = Tokenizer.from_buffer(spelling)
        tokens = {row: (read[0][row][0], np.mean([of[row][1] for of in read], axis=0)) for row in rows}
        models.append({row: _spell(tokenizer, *tokens[row]) for row in rows})
    ours, others = models
    return {row: cut(found) for row in rows if (found := align(ours[row], others[row])) is not None}


def _read_tokens(
    content: bytes | None, rows: Sequence[int]
) -> dict[int, tuple[npt.NDArray[np.integer], npt.NDArray[np.float32]]]:
    """Token ids and bits of the documents in `rows`, from a file of evaluate's; nothing where there is none."""
    if content is None:
        return {}
    found = {}
    with pq.ParquetFile(BytesIO(content)) as file:
        sizes = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
        ends = np.cumsum(sizes)
        for number in np.unique(np.searchsorted(ends, rows, side="right")).tolist():
            table = file.read_row_group(number, columns=["input_ids", "bits"])
            first = int(ends[number]) - sizes[number]
            for row in rows:
                if first <= row < ends[number]:
                    ids, bits = (table.column(name)[row - first].values for name in ("input_ids", "bits"))
                    found[row] = to_numpy(ids), to_numpy(bits)
    return found


class Spelt(NamedTuple):
    """The text of a document's tokens."""

    text: str
    ends: npt.NDArray[np.int64]
    """[num_pieces] characters of the text up to the end of each piece: of a token, or of several that share one."""
    bits: npt.NDArray[np.float64]
    """[num_pieces] of the tokens up to that end."""


def _spell(tokenizer: Tokenizer, ids: npt.NDArray[np.integer], bits: npt.NDArray[np.floating]) -> Spelt:
    stream, pieces, ends = DecodeStream(skip_special_tokens=False), [], []
    for number, token in enumerate(ids.tolist()):
        piece = stream.step(tokenizer, token)
        if piece is not None:  # else the token ends within a character
            pieces.append(piece)
            ends.append(number)
    return Spelt("".join(pieces), np.cumsum([*map(len, pieces)], dtype=np.int64), np.cumsum(bits, dtype=float)[ends])


def align(ours: Spelt, others: Spelt) -> list[Segment] | None:
    """The shortest pieces that end where tokens of both end, and the differences of their bits.

    None where the tokens do not spell the same text.
    """
    if ours.text != others.text:
        return None
    ends, of_ours, of_others = np.intersect1d(ours.ends, others.ends, return_indices=True)
    bits = np.diff(ours.bits[of_ours] - others.bits[of_others], prepend=0)
    starts = [0, *ends.tolist()]
    return [
        Segment(ours.text[start:end], value)
        for start, end, value in zip(starts, ends.tolist(), bits.tolist(), strict=False)
    ]


def cut(segments: list[Segment]) -> Excerpt:
    """The part of at most some segments and characters whose bits differ most, taken without their signs."""
    # [num_segments + 1] of the segments before each: so many characters, and so much difference.
    characters = np.cumsum([0, *(len(segment.text) for segment in segments)])
    moved = np.cumsum([0, *(abs(segment.bits) for segment in segments)])
    starts = np.arange(len(segments))
    ends = np.searchsorted(characters, characters[:-1] + _MOST_CHARACTERS, side="right") - 1
    ends = np.minimum(np.maximum(ends, starts + 1), starts + _MOST_SEGMENTS).clip(max=len(segments))
    start = int(np.argmax(moved[ends] - moved[starts]))
    end = int(ends[start])
    return Excerpt(segments[start:end], start > 0, end < len(segments))
