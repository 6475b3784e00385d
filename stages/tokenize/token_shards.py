"""A shard of token ids from some documents: what tokenize does piece by piece, on one machine or on many."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stages.core.artifacts import COUNTED, Marks, TokenIds, to_arrow, write_shard
from stages.tokens.encoding import Decoder, EncodedDocuments, Engine, join_segments, refuse_control_tokens
from stages.tokens.texts import Rows, TextFile, prefetch
from stages.tokens.vocabulary import Vocabulary, mark_control_tokens

COUNTS = ("documents", "tokens", "text_tokens", "bytes", "documents_lossy", "counted_tokens", "counted_bytes")
"""What is counted in a shard."""


class Shard(NamedTuple):
    """A shard to write, and the documents that it holds."""

    file: Path
    documents: Rows


class TokenShards:
    """Writes shards of a split's tokens; the same bytes for the same documents, wherever it does."""

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
            decoder: counts the documents that decoding does not give back; None: they are not counted.
            progress: is told the number of the last document done in the split.
        """
        self._texts, self._encode, self._vocabulary, self._decoder = texts, encode, vocabulary, decoder
        self._progress = progress

    def __call__(self, shard: Shard) -> tuple[str, dict[str, int]]:
        """Write `shard`, a batch a row group, and return its checksum and its counts."""
        counts, records = dict.fromkeys(COUNTS, 0), self._texts.records
        fields = [("input_ids", pa.large_list(pa.from_numpy_dtype(self._vocabulary.dtype))), ("num_bytes", pa.int32())]
        if not self._texts.counts_all:
            fields += [("marks", pa.large_list(pa.uint8())), ("num_counted_bytes", pa.int32())]
        if records is not None:
            fields.append(("record", pa.int64()))
        schema = pa.schema(fields)

        def batches() -> Iterator[pa.RecordBatch]:
            # Reading, encoding and writing are a thread each: pyarrow, numpy and the engines all work without the lock.
            groups = self._texts.groups(shard.documents.groups)
            read = prefetch((segments, segments.texts.to_pylist()) for segments in groups)
            for segments, encoded in prefetch((segments, self._encode(strings)) for segments, strings in read):
                first = shard.documents.first + counts["documents"]
                where = f"{shard.file.parent.name} document"
                refuse_control_tokens(encoded, self._vocabulary, where, (first + segments.owners()).tolist())
                documents = join_segments(encoded, segments, self._vocabulary, self._texts.counts_all)
                ids, offsets, marks, num_bytes, num_counted_bytes = wrap(documents, self._vocabulary, first=first == 0)
                num_documents = len(num_bytes)
                counts["documents"] += num_documents
                counts["tokens"] += len(ids)
                counts["text_tokens"] += len(encoded.ids)
                counts["bytes"] += int(num_bytes.sum())
                if self._decoder is not None:
                    counts["documents_lossy"] += self._decoder.count_lossy(segments, encoded)
                columns = [_as_lists(offsets, ids), to_arrow(num_bytes.astype(np.int32))]
                if marks is not None:
                    counts["counted_tokens"] += int((marks & COUNTED).sum())
                    counts["counted_bytes"] += int(num_counted_bytes.sum())
                    columns += [_as_lists(offsets, marks), to_arrow(num_counted_bytes.astype(np.int32))]
                if records is not None:
                    columns.append(to_arrow(records[first : first + num_documents]))
                yield pa.record_batch(columns, schema=schema)
                if self._progress is not None:
                    self._progress(first + num_documents)

        return write_shard(shard.file, schema, batches()), counts


def wrap(documents: EncodedDocuments, vocabulary: Vocabulary, first: bool) -> EncodedDocuments:
    """Each document with its control tokens, the split's lead before the first."""
    prefix, suffix = vocabulary.prefix, vocabulary.suffix
    num_documents = len(documents.offsets) - 1
    lead = vocabulary.lead if first and num_documents else []
    # Of each document: where its prefix goes, where its suffix goes.
    ends = np.stack([documents.offsets[:-1], documents.offsets[1:]], axis=1).ravel()
    places = np.repeat(ends, [len(prefix), len(suffix)] * num_documents)
    places = np.concatenate([np.zeros(len(lead), np.int64), places])
    ids = np.insert(documents.ids, places, [*lead, *(prefix + suffix) * num_documents])
    offsets = documents.offsets + np.arange(num_documents + 1) * len(prefix + suffix) + len(lead)
    offsets[0] = 0
    marks = documents.marks
    if marks is not None:
        wrapping = mark_control_tokens(prefix, suffix) * num_documents
        marks = np.insert(marks, places, [*mark_control_tokens(lead), *wrapping])
    return documents._replace(ids=ids, offsets=offsets, marks=marks)


def _as_lists(offsets: npt.NDArray[np.int64], values: TokenIds | Marks) -> pa.LargeListArray:
    """The values of each document."""
    return pa.LargeListArray.from_arrays(to_arrow(offsets), to_arrow(values))
