"""Writing of the records of a split to Parquet, in row groups that only depend on the records."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

# Maximum number of records per row group, and the number of characters after which a row group ends. Later stages read
# whole row groups into memory.
ROW_GROUP, ROW_GROUP_CHARACTERS = 1024, 8 * 2**20


class SplitWriter:
    """Writer of a Parquet file. The file only depends on the records, not on their division into tables."""

    def __init__(self, file: Path, schema: pa.Schema) -> None:
        # No dictionary: texts rarely repeat, and it slows down writing and reading. No statistics: no reader selects a
        # range of texts. Checksums: zstd without them decodes some flipped bits to other text.
        self._writer = pq.ParquetWriter(
            file,
            schema,
            compression="zstd",
            use_dictionary=False,
            write_statistics=False,
            write_page_checksum=True,
        )
        self._waiting: list[pa.Table] = []
        self._thread = ThreadPoolExecutor(1)  # compresses a row group while the next one is collected
        self._written: Future[None] | None = None
        self._num_rows = self._num_characters = 0

    def write(self, table: pa.Table, num_characters: npt.NDArray[np.int64]) -> None:
        """Add records.

        Args:
            table: [num_records].
            num_characters: number of characters in the texts of each record, [num_records], int64.
        """
        ends = np.cumsum(num_characters)  # characters up to the end of each record, [num_records]
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
        # As a single chunk, since a page of a column would end at every chunk.
        row_group = pa.concat_tables(self._waiting).combine_chunks()
        self._wait()
        self._written = self._thread.submit(self._writer.write_table, row_group)
        self._waiting.clear()
        self._num_rows = self._num_characters = 0

    def close(self) -> None:
        """Write the remaining records, and close the file."""
        if self._waiting:
            self._flush()
        self._wait()
        self._thread.shutdown()
        self._writer.close()

    def _wait(self) -> None:
        """Wait until the previous row group is written, and raise its error if there was one."""
        if self._written is not None:
            self._written.result()
