"""Writes the records of a split to Parquet, in row groups that the records alone decide."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

# A row group, which later stages read whole, ends after so many records or after the record that takes its texts past
# so many characters.
ROW_GROUP, ROW_GROUP_CHARACTERS = 1024, 8 * 2**20


class SplitWriter:
    """Writes records to a Parquet file; the same records give the same file, whatever tables they come in."""

    def __init__(self, file: Path, schema: pa.Schema) -> None:
        # Texts hardly repeat: a dictionary of them costs time in writing and in reading. Nobody looks for a range of
        # texts. Checksums: zstd alone lets some flipped bits through as other text.
        self._writer = pq.ParquetWriter(
            file,
            schema,
            compression="zstd",
            use_dictionary=False,
            write_statistics=False,
            write_page_checksum=True,
        )
        self._waiting: list[pa.Table] = []
        self._thread = ThreadPoolExecutor(1)  # compresses a row group while the next one is put together
        self._written: Future[None] | None = None
        self._num_rows = self._num_characters = 0

    def write(self, table: pa.Table, num_characters: npt.NDArray[np.int64]) -> None:
        """Add the records of `table`, whose texts have so many characters, [num_records]."""
        ends = np.cumsum(num_characters)  # [num_records]
        start = characters_before = 0
        while start < len(table):
            by_characters = np.searchsorted(ends, ROW_GROUP_CHARACTERS - self._num_characters + characters_before) + 1
            end = min(len(table), start + ROW_GROUP - self._num_rows, int(by_characters))
            self._waiting.append(table[start:end])
            self._num_rows += end - start
            self._num_characters += int(ends[end - 1]) - characters_before
            start, characters_before = end, int(ends[end - 1])
            if self._num_rows == ROW_GROUP or self._num_characters >= ROW_GROUP_CHARACTERS:
                self._flush()

    def _flush(self) -> None:
        # In one piece: the pages of a column would end where its pieces do.
        row_group = pa.concat_tables(self._waiting).combine_chunks()
        self._wait()
        self._written = self._thread.submit(self._writer.write_table, row_group)
        self._waiting.clear()
        self._num_rows = self._num_characters = 0

    def close(self) -> None:
        """Write what is left, and end the file."""
        if self._waiting:
            self._flush()
        self._wait()
        self._thread.shutdown()
        self._writer.close()

    def _wait(self) -> None:
        """Raise what went wrong with the row group before, once that is written."""
        if self._written is not None:
            self._written.result()
