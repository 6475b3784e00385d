"""Write shards of token ids. Shards are independent of each other, so one or many machines can write them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stages.core.artifacts import COUNTED, Marks, TokenIds, to_arrow, write_shard
from stages.tokens.encoding import Decoder, EncodedDocuments, Engine, join_segments, refuse_control_tokens
from stages.tokens.texts import RowGroupRange, TextFile, prefetch
from stages.tokens.vocabulary import Vocabulary, mark_control_tokens

COUNT_NAMES = ("documents", "tokens", "text_tokens", "bytes", "documents_lossy", "counted_tokens", "counted_bytes")
"""Names of the counts of a shard."""


class TokenShard(NamedTuple):
    """A shard to write, and the row groups with its documents."""

    file: Path
    documents: RowGroupRange


class TokenShardWriter:
    """Writes the shards of a split's tokens. The same documents give the same bytes on every machine."""

    def __init__(
        self,
        texts: TextFile,
        encode: Engine,
        vocabulary: Vocabulary,
        decoder: Decoder | None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """
        Args:
            texts: documents of the split.
            encode: engine that encodes them.
            decoder: counts the documents that differ from their decoded ids; None: do not count them.
            progress: called after each batch with the number of documents done, counted from the start of the split.
        """
        self._texts, self._encode, self._vocabulary, self._decoder = texts, encode, vocabulary, decoder
        self._progress = progress

    def __call__(self, shard: TokenShard) -> tuple[str, dict[str, int]]:
        """Write `shard`, one record batch per row group, and return its checksum and its counts."""
        counts, records = dict.fromkeys(COUNT_NAMES, 0), self._texts.records
        fields = [("input_ids", pa.large_list(pa.from_numpy_dtype(self._vocabulary.dtype))), ("num_bytes", pa.int32())]
        if not self._texts.counts_all:
            fields += [("marks", pa.large_list(pa.uint8())), ("num_counted_bytes", pa.int32())]
        if records is not None:
            fields.append(("record", pa.int64()))
        schema = pa.schema(fields)

        def build_batches() -> Iterator[pa.RecordBatch]:
            # Reading, encoding and writing run in one thread each: pyarrow, numpy and the engines release the GIL.
            groups = self._texts.read_groups(shard.documents.groups)
            read = prefetch((segments, segments.texts.to_pylist()) for segments in groups)
            for segments, encoded in prefetch((segments, self._encode(strings)) for segments, strings in read):
                first = shard.documents.first_document + counts["documents"]
                numbers = (first + segments.get_document_numbers()).tolist()
                refuse_control_tokens(encoded, self._vocabulary, f"{shard.file.parent.name} document", numbers)
                documents = join_segments(encoded, segments, self._vocabulary, self._texts.counts_all)
                documents = _wrap_documents(documents, self._vocabulary, is_first=first == 0)
                ids, offsets, marks, num_bytes, num_counted_bytes = documents
                num_documents = len(num_bytes)
                counts["documents"] += num_documents
                counts["tokens"] += len(ids)
                counts["text_tokens"] += len(encoded.ids)
                counts["bytes"] += int(num_bytes.sum())
                if self._decoder is not None:
                    counts["documents_lossy"] += self._decoder.count_lossy_documents(segments, encoded)
                columns = [_build_lists(offsets, ids), to_arrow(num_bytes.astype(np.int32))]
                if marks is not None:
                    counts["counted_tokens"] += int((marks & COUNTED).sum())
                    counts["counted_bytes"] += int(num_counted_bytes.sum())
                    columns += [_build_lists(offsets, marks), to_arrow(num_counted_bytes.astype(np.int32))]
                if records is not None:
                    columns.append(to_arrow(records[first : first + num_documents]))
                yield pa.record_batch(columns, schema=schema)
                if self._progress is not None:
                    self._progress(first + num_documents)

        return write_shard(shard.file, schema, build_batches()), counts


def _wrap_documents(documents: EncodedDocuments, vocabulary: Vocabulary, is_first: bool) -> EncodedDocuments:
    """Insert the control tokens of each document into its ids and marks.

    Args:
        is_first: True if the documents are the first of the split; the split's lead is then inserted before them.
    """
    prefix, suffix = vocabulary.prefix, vocabulary.suffix
    num_documents = len(documents.offsets) - 1
    lead = vocabulary.lead if is_first and num_documents else []
    # The start and the end of each document: start_0, end_0, start_1, end_1, ..., [2 * num_documents].
    ends = np.stack([documents.offsets[:-1], documents.offsets[1:]], axis=1).ravel()
    # One insertion position per control token: the prefix goes to the start of its document, the suffix to the end, the
    # lead to 0. np.insert keeps the given order at equal positions. [num_lead + num_documents * num_wrapping]
    positions = np.repeat(ends, [len(prefix), len(suffix)] * num_documents)
    positions = np.concatenate([np.zeros(len(lead), np.int64), positions])
    ids = np.insert(documents.ids, positions, [*lead, *(prefix + suffix) * num_documents])
    # [num_documents + 1]: offset i moves by the control tokens of the i documents before it and the lead. The lead
    # belongs to the first document, so its offset stays 0.
    offsets = documents.offsets + np.arange(num_documents + 1) * len(prefix + suffix) + len(lead)
    offsets[0] = 0
    marks = documents.marks
    if marks is not None:
        wrapping = mark_control_tokens(prefix, suffix) * num_documents
        marks = np.insert(marks, positions, [*mark_control_tokens(lead), *wrapping])
    return documents._replace(ids=ids, offsets=offsets, marks=marks)


def _build_lists(offsets: npt.NDArray[np.int64], values: TokenIds | Marks) -> pa.LargeListArray:
    """Build the lists of the documents' values, [num_documents] large_list.

    Args:
        offsets: [num_documents + 1] int64.
        values: [num_tokens] ids or marks.
    """
    return pa.LargeListArray.from_arrays(to_arrow(offsets), to_arrow(values))
