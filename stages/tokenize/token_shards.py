"""A shard of token ids from some documents: what tokenize does piece by piece, on one machine or on many."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stages.core.artifacts import TokenIds, to_arrow, write_shard
from stages.tokens.encoding import Decoder, Encoded, Engine, refuse_control_tokens
from stages.tokens.texts import Rows, TextFile, prefetch
from stages.tokens.vocabulary import Vocabulary


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
        counts = {"documents": 0, "tokens": 0, "text_tokens": 0, "bytes": 0, "documents_lossy": 0}
        ids_type, records = pa.from_numpy_dtype(self._vocabulary.dtype), self._texts.records
        fields = [("input_ids", pa.large_list(ids_type)), ("num_bytes", pa.int32())]
        schema = pa.schema([*fields, *([] if records is None else [("record", pa.int64())])])

        def batches() -> Iterator[pa.RecordBatch]:
            # Reading, encoding and writing are a thread each: pyarrow, numpy and the engines all work without the lock.
            read = prefetch((texts, texts.to_pylist()) for texts in self._texts.groups(shard.documents.groups))
            for texts, encoded in prefetch((texts, self._encode(strings)) for texts, strings in read):
                first = shard.documents.first + counts["documents"]
                numbers = range(first, first + len(texts))
                refuse_control_tokens(encoded, self._vocabulary, f"{shard.file.parent.name} document", numbers)
                ids, offsets = wrap(encoded, self._vocabulary, first=first == 0)
                num_bytes = pc.binary_length(texts)
                counts["documents"] += len(texts)
                counts["tokens"] += len(ids)
                counts["text_tokens"] += len(encoded.ids)
                counts["bytes"] += pc.sum(num_bytes, min_count=0).as_py()
                if self._decoder is not None:
                    counts["documents_lossy"] += self._decoder.num_lossy(texts, encoded)
                input_ids = pa.LargeListArray.from_arrays(to_arrow(offsets), to_arrow(ids))
                record = [] if records is None else [to_arrow(records[first : first + len(texts)])]
                yield pa.record_batch([input_ids, num_bytes, *record], schema=schema)
                if self._progress is not None:
                    self._progress(first + len(texts))

        return write_shard(shard.file, schema, batches()), counts


def wrap(encoded: Encoded, vocabulary: Vocabulary, first: bool) -> tuple[TokenIds, npt.NDArray[np.int64]]:
    """Each document with its control tokens, the split's lead before the first: ids and where the documents begin."""
    prefix, suffix = vocabulary.prefix, vocabulary.suffix
    lead = vocabulary.lead if first and len(encoded.offsets) > 1 else []
    num_documents = len(encoded.offsets) - 1
    # Of each document: where its prefix goes, where its suffix goes.
    ends = np.stack([encoded.offsets[:-1], encoded.offsets[1:]], axis=1).ravel()
    places = np.repeat(ends, [len(prefix), len(suffix)] * num_documents)
    ids = encoded.ids.astype(vocabulary.dtype)
    ids = np.insert(
        ids, np.concatenate([np.zeros(len(lead), np.int64), places]), [*lead, *(prefix + suffix) * num_documents]
    )
    offsets = encoded.offsets + np.arange(num_documents + 1) * len(prefix + suffix) + len(lead)
    offsets[0] = 0
    return ids, offsets
