"""Stage `download`: the records of a source, cleaned and split, in ELI5's schema.

Reads   the source that conf/data/NAME.yaml describes (files at data.path, a data set of the Hub, or several sources)
Writes  data/raw/{train,validation,test}.parquet (all.parquet where split is null) and the ledger data/raw/stats.json
Command python -m stages.download

Parts of the source are read, cleaned and hashed by several processes where it is large; this one puts what they give
in order, leaves out duplicates and writes. So nothing depends on their number.
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

from stages.core.artifacts import SPLITS, staged, write_json
from stages.core.config import part
from stages.core.errors import StageError
from stages.download.arrays import Ints, from_bools
from stages.download.batches import Batch, Rules
from stages.download.cleaning import REMOVED, unmet
from stages.download.columns import count_characters
from stages.download.duplicates import ExactDuplicates, NearDuplicates, SignatureFile, Signatures
from stages.download.ledger import Ledger
from stages.download.parts import read_part, source_parts
from stages.download.records import FILTERED, KEPT, MALFORMED, assign_splits, record_schema
from stages.download.schema import SourceData
from stages.download.sources import Part, iterate_batches, read_parts, row_parts
from stages.download.writer import SplitWriter
from stages.shell.tasks import Workers

log = logging.getLogger(__name__)

ALL = "all"
"""The file of records that are in no split."""

# Held-out documents at most that are looked for where near duplicates are only counted.
_NEAR_DUPLICATES_OF = 20_000


@part
class DownloadConfig:
    data: SourceData
    source: str
    """Name under which the records are filed."""
    out: str
    """Directory to write."""


def main(config: DownloadConfig) -> None:
    data = config.data
    log.info("reading %s", data.hub.id if data.hub else data.path)
    splits = (ALL,) if data.split is None else SPLITS
    ledger = Ledger(splits, data.clean)
    if problem := next(unmet(data.clean), None):
        raise StageError(problem)
    parts, commit = _open_source(data)
    rules = Rules(data, None if data.source == "sources" else config.source)
    with (
        staged(config.out, ["stats.json", *(f"{split}.parquet" for split in splits)]) as directory,
        Workers() as workers,
        ExitStack() as stack,
    ):
        batches = workers.map(functools.partial(read_part, rules), parts)
        schema = record_schema(data.groups, data.columns.roles is not None)
        writers = {split: SplitWriter(directory / f"{split}.parquet", schema) for split in splits}
        signatures = {split: SignatureFile(stack.enter_context(TemporaryFile(dir=directory))) for split in splits}
        for batch in _distinct(_first_records(batches, data, ledger), data, ledger):
            for split, records in _by_split(batch, data, ledger):
                writers[split].write(records.table, records.num_characters)
                ledger.add_kept(split, records.table)
                if records.signatures is not None:
                    signatures[split].write(records.signatures)
        for writer in writers.values():
            writer.close()
        if data.needs_signatures:
            leaking = _find_near_duplicates(signatures, ledger, find_all=data.deduplicate == "near")
            if data.deduplicate == "near" and len(leaking):
                _drop_from_train(directory, leaking, ledger)
        ledger.check(data)
        if data.clean:
            ledger.cleaning.write_samples(directory / REMOVED)
        write_json(directory / "stats.json", ledger.as_json(data, commit))
    ledger.warn(data)
    log.info("%d records -> %s (%s)", ledger.records_in, config.out, ledger.summary())


def _open_source(data: SourceData) -> tuple[Iterator[Part], str | None]:
    """The source in parts, in order, and the commit that it is at if it is a data set of the Hub."""
    if data.hub is None:
        return source_parts(data) if data.source == "sources" else read_parts(data), None
    from stages.download.hub_data import read_hub, resolve_commit

    commit = resolve_commit(data.hub)
    return row_parts(read_hub(data.hub, commit, whole=data.max_records is None)), commit


def _first_records(batches: Iterator[Batch], data: SourceData, ledger: Ledger) -> Iterator[Batch]:
    """The batches up to data.max_records records that pass the filter, entered into the ledger.

    Raises:
        StageError: if one of these records is malformed and data.on_bad_record is `error`.
    """
    while data.max_records is None or ledger.num_passed < data.max_records:
        batch = next(batches, None)
        if batch is None:
            return
        if data.max_records is not None:
            passed = np.cumsum(batch.verdicts != FILTERED)
            batch = batch.until(int(np.searchsorted(passed, data.max_records - ledger.num_passed)) + 1)
        first_malformed = _first(batch, MALFORMED)
        if data.on_bad_record == "error" and first_malformed is not None:
            _check_own_split(batch.until(first_malformed), data)
            raise StageError(
                f"{batch.first[MALFORMED]} (in conf/data, columns, filter, groups and split.key name yours, and"
                " on_bad_record: skip leaves such records out)"
            )
        _check_own_split(batch, data)
        ledger.add(batch)
        yield batch


def _first(batch: Batch, verdict: int) -> int | None:
    """Number of the first record with this verdict."""
    found = np.flatnonzero(batch.verdicts == verdict)
    return int(found[0]) if len(found) else None


def _check_own_split(batch: Batch, data: SourceData) -> None:
    if data.split is not None and data.split.by == "source" and batch.own_split is None and len(batch.table):
        raise StageError(
            f"{batch.first[KEPT]}: split.by: source needs files or splits named train, validation and test"
        )


def _distinct(batches: Iterator[Batch], data: SourceData, ledger: Ledger) -> Iterator[Batch]:
    """The batches, without documents that came before where data.deduplicate says so."""
    seen = ExactDuplicates()
    for batch in batches:
        is_new = seen.add(batch.digests)
        ledger.num_exact_duplicates += int((~is_new).sum())
        if data.deduplicate == "none":
            yield batch
        else:
            ledger.skip_exact_duplicates(batch.select(~is_new).table)
            yield batch.select(is_new)


def _by_split(batch: Batch, data: SourceData, ledger: Ledger) -> list[tuple[str, Batch]]:
    """Splits, each with those kept records of `batch` that belong to it."""
    if data.split is None or data.split.by == "source":
        return [(ALL if data.split is None else str(batch.own_split), batch)] if len(batch.table) else []
    ledger.add_split_keys(batch.points)
    numbers = assign_splits(batch.points, data.split)
    return [(split, batch.select(numbers == number)) for number, split in enumerate(SPLITS)]


def _find_near_duplicates(signatures: dict[str, SignatureFile], ledger: Ledger, find_all: bool) -> Ints:
    """Enter into the ledger how many held-out documents have a near duplicate in train.

    Args:
        signatures: of the documents of each split.
        find_all: look for all held-out documents; else for _NEAR_DUPLICATES_OF, evenly spaced.

    Returns:
        numbers of those documents of train, [num_near_duplicates] in ascending order.
    """
    held_out = ledger.records_out["validation"] + ledger.records_out["test"]
    step = 1 if find_all else max(1, -(-held_out // _NEAR_DUPLICATES_OF))
    index = NearDuplicates(list(_every(chain(signatures["validation"].read(), signatures["test"].read()), step)))
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


def _every(batches: Iterator[Signatures], step: int) -> Iterator[Signatures]:
    """The first of all items of `batches`, and each `step` items behind it."""
    first = 0
    for batch in batches:
        yield batch[-first % step :: step]
        first += len(batch)


def _drop_from_train(directory: Path, numbers: Ints, ledger: Ledger) -> None:
    """Leave the records with these numbers, [num_dropped] in ascending order, out of train."""
    whole, file = directory / "whole.parquet", directory / "train.parquet"
    file.rename(whole)
    writer, first = SplitWriter(file, pq.read_schema(whole)), 0
    for batch in iterate_batches(pq.ParquetFile(whole)):
        table = pa.Table.from_batches([batch])
        is_kept = np.isin(np.arange(first, first + len(table)), numbers, invert=True)
        dropped, kept = table.filter(from_bools(~is_kept)), table.filter(from_bools(is_kept))
        ledger.drop_near_duplicates(dropped)
        writer.write(kept, count_characters(kept))
        first += len(table)
    writer.close()
    whole.unlink()
