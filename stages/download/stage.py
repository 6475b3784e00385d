"""Stage `download`: the records of a source, cleaned and split, in ELI5's schema.

Reads   the source that conf/data/NAME.yaml describes (files at data.path, a data set of the Hub, or several sources)
Writes  data/raw/{train,validation,test}.parquet (all.parquet where split is null) and the ledger data/raw/stats.json
Command python -m stages.download

If the source is large, several processes read, clean and hash parts of it. The main process puts the results in order,
leaves out duplicates and writes the files, so the output does not depend on the number of processes.
"""

import functools
import logging
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stages.core.artifacts import SPLITS, write_directory, write_json
from stages.core.config import config_view
from stages.core.errors import StageError
from stages.download.arrays import Ints, from_bools
from stages.download.batches import Batch, Rules
from stages.download.cleaning import SAMPLES_FILE, find_unmet_requirements
from stages.download.columns import count_characters
from stages.download.duplicates import ExactDuplicates, NearDuplicates, SignatureFile, Signatures
from stages.download.ledger import Ledger
from stages.download.parts import read_mixed_parts, read_part
from stages.download.records import FILTERED, KEPT, MALFORMED, assign_splits, record_schema
from stages.download.schema import SourceData
from stages.download.sources import Part, group_into_parts, iterate_batches, read_file_parts
from stages.download.writer import SplitWriter
from stages.shell.tasks import Workers

log = logging.getLogger(__name__)

ALL = "all"
"""Name of the file with all records, if data.split is null."""

# Maximum number of held-out documents to look for, if near duplicates are only counted.
_MAX_COUNTED_DOCUMENTS = 20_000


@config_view
class DownloadConfig:
    data: SourceData
    source: str
    """Name of the source, written to the column `source` of each record."""
    out: str
    """Directory to write."""


def main(config: DownloadConfig) -> None:
    data = config.data
    log.info("reading %s", data.hub.id if data.hub else data.path)
    splits = (ALL,) if data.split is None else SPLITS
    ledger = Ledger(splits, data.clean)
    if problem := next(find_unmet_requirements(data.clean), None):
        raise StageError(problem)
    parts, commit = _open_source(data)
    rules = Rules(data, None if data.source == "sources" else config.source)
    with (
        write_directory(config.out, ["stats.json", *(f"{split}.parquet" for split in splits)]) as directory,
        Workers() as workers,
        ExitStack() as stack,
    ):
        batches = workers.map(functools.partial(read_part, rules), parts)
        schema = record_schema(data.groups, data.columns.roles is not None)
        writers = {split: SplitWriter(directory / f"{split}.parquet", schema) for split in splits}
        signatures = {split: SignatureFile(stack.enter_context(TemporaryFile(dir=directory))) for split in splits}
        for batch in _drop_exact_duplicates(_take_first_records(batches, data, ledger), data, ledger):
            for split, records in _divide_by_split(batch, data, ledger):
                writers[split].write(records.table, records.num_characters)
                ledger.add_kept(split, records.table)
                if records.signatures is not None:
                    signatures[split].write(records.signatures)
        for writer in writers.values():
            writer.close()
        if data.needs_signatures:
            leaking = _find_near_duplicates(signatures, ledger, find_all=data.deduplicate == "near")
            if data.deduplicate == "near" and len(leaking):
                _rewrite_train(directory, leaking, ledger)
        ledger.check_counts(data)
        if data.clean:
            ledger.cleaning.write_samples(directory / SAMPLES_FILE)
        write_json(directory / "stats.json", ledger.as_json(data, commit))
    ledger.log_warnings(data)
    log.info("%d records -> %s (%s)", ledger.records_in, config.out, ledger.format_summary())


def _open_source(data: SourceData) -> tuple[Iterator[Part], str | None]:
    """Return the parts of the source in order, and its commit if it is a data set of the Hub."""
    if data.hub is None:
        return read_mixed_parts(data) if data.source == "sources" else read_file_parts(data), None
    from stages.download.hub_data import read_hub, resolve_commit

    commit = resolve_commit(data.hub)
    rows = read_hub(data.hub, commit, whole=data.max_records is None)
    # A part of more than max_records rows could be in several files, of which only the first has to be fetched.
    return group_into_parts(rows, data.max_records), commit


def _take_first_records(batches: Iterator[Batch], data: SourceData, ledger: Ledger) -> Iterator[Batch]:
    """Yield the batches up to data.max_records records that pass the filter, and add them to the ledger.

    Raises:
        StageError: if one of these records is malformed and data.on_bad_record is `error`.
    """
    while data.max_records is None or ledger.num_passed < data.max_records:
        batch = next(batches, None)
        if batch is None:
            return
        if data.max_records is not None:
            passed = np.cumsum(batch.verdicts != FILTERED)
            batch = batch.take_first(int(np.searchsorted(passed, data.max_records - ledger.num_passed)) + 1)
        first_malformed = _find_first(batch, MALFORMED)
        if data.on_bad_record == "error" and first_malformed is not None:
            _check_own_split(batch.take_first(first_malformed), data)
            raise StageError(
                f"{batch.first_messages[MALFORMED]} (in conf/data, columns, filter, groups, split.key name the columns;"
                " on_bad_record: skip leaves malformed records out)"
            )
        _check_own_split(batch, data)
        ledger.add_batch(batch)
        yield batch


def _find_first(batch: Batch, verdict: int) -> int | None:
    """Return the index of the first record with this verdict, or None if there is none."""
    found = np.flatnonzero(batch.verdicts == verdict)
    return int(found[0]) if len(found) else None


def _check_own_split(batch: Batch, data: SourceData) -> None:
    """Raise StageError if the source's own splits are asked for, but the kept records have none."""
    if data.split is not None and data.split.by == "source" and batch.own_split is None and len(batch.table):
        raise StageError(
            f"{batch.first_messages[KEPT]}: split.by: source needs files or splits named train, validation and test"
        )


def _drop_exact_duplicates(batches: Iterator[Batch], data: SourceData, ledger: Ledger) -> Iterator[Batch]:
    """Count exact duplicates, and drop them from the batches unless data.deduplicate is `none`."""
    seen = ExactDuplicates()
    for batch in batches:
        is_new = seen.add(batch.digests)
        ledger.num_exact_duplicates += int((~is_new).sum())
        if data.deduplicate == "none":
            yield batch
        else:
            ledger.skip_exact_duplicates(batch.select(~is_new).table)
            yield batch.select(is_new)


def _divide_by_split(batch: Batch, data: SourceData, ledger: Ledger) -> list[tuple[str, Batch]]:
    """Return each split with the kept records of `batch` that belong to it."""
    if data.split is None or data.split.by == "source":
        return [(ALL if data.split is None else str(batch.own_split), batch)] if len(batch.table) else []
    ledger.add_split_keys(batch.split_hashes)
    numbers = assign_splits(batch.split_hashes, data.split)
    return [(split, batch.select(numbers == number)) for number, split in enumerate(SPLITS)]


def _find_near_duplicates(signatures: dict[str, SignatureFile], ledger: Ledger, find_all: bool) -> Ints:
    """Count the held-out documents that have a near duplicate in train, and add the counts to the ledger.

    Args:
        signatures: split to the signatures of its documents.
        find_all: if True, look for all held-out documents; otherwise for at most _MAX_COUNTED_DOCUMENTS of them, evenly
            spaced.

    Returns:
        Indices of the near duplicates in train, [num_near_duplicates], int64, in ascending order.
    """
    held_out = ledger.records_out["validation"] + ledger.records_out["test"]
    step = 1 if find_all else max(1, -(-held_out // _MAX_COUNTED_DOCUMENTS))
    index = NearDuplicates(list(_take_every(chain(signatures["validation"].read(), signatures["test"].read()), step)))
    leaked, leaking = set[int](), set[int]()
    first = 0
    for batch in signatures["train"].read():
        numbers, held_out_numbers = index.find(batch)
        leaking.update((numbers + first).tolist())
        leaked.update((held_out_numbers * step).tolist())
        first += len(batch)
    in_validation = sum(number < ledger.records_out["validation"] for number in leaked)
    ledger.near_duplicates = {
        "validation": in_validation,
        "test": len(leaked) - in_validation,
        "looked_for": len(range(0, held_out, step)),
    }
    return np.array(sorted(leaking), np.int64)


def _take_every(batches: Iterator[Signatures], step: int) -> Iterator[Signatures]:
    """Take every `step`-th item, starting with the first and counting across `batches`."""
    first = 0
    for batch in batches:
        yield batch[-first % step :: step]
        first += len(batch)


def _rewrite_train(directory: Path, numbers: Ints, ledger: Ledger) -> None:
    """Rewrite the file of train without the records at the indices `numbers`, [num_dropped], int64, ascending."""
    complete, file = directory / "whole.parquet", directory / "train.parquet"
    file.rename(complete)
    writer, first = SplitWriter(file, pq.read_schema(complete)), 0
    for batch in iterate_batches(pq.ParquetFile(complete)):
        table = pa.Table.from_batches([batch])
        is_kept = np.isin(np.arange(first, first + len(table)), numbers, invert=True)
        dropped, kept = table.filter(from_bools(~is_kept)), table.filter(from_bools(is_kept))
        ledger.drop_near_duplicates(dropped)
        writer.write(kept, count_characters(kept))
        first += len(table)
    writer.close()
    complete.unlink()
