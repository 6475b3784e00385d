"""Stage `group_texts@TASK`: documents of token ids -> blocks of block_size tokens.

Reads   data/tokens/TASK/SPLIT/, the sources of the records in data/raw/train.parquet
Writes  data/blocks/TASK/SPLIT/shard-*.arrow, with one ledger per split. Columns of a shard: input_ids
        fixed_size_list<uint16 or uint32>[block_size]; also marks fixed_size_list<uint8>[block_size] if the tokens have
        marks
Command python -m stages.group_texts task=causal
"""

import logging
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from stages.core.artifacts import (
    SPLITS,
    get_versions,
    list_shards,
    make_damage_error,
    write_checksums,
    write_directory,
    write_json,
)
from stages.core.config import Seed, config_view
from stages.core.errors import StageError, printable
from stages.group_texts.block_shards import (
    DocumentRun,
    count_document_tokens,
    count_tokens,
    plan_block_shards,
    read_record_numbers,
    write_blocks,
)
from stages.group_texts.schema import WeightedData
from stages.group_texts.weights import (
    check_weights,
    choose_sources,
    order_documents,
    repeat_documents,
    summarize_sources,
)
from stages.shell.tasks import run_jobs
from stages.tokens.texts import read_sources
from stages.tokens.vocabulary import Vocabulary

log = logging.getLogger(__name__)


@config_view
class GroupTextsConfig:
    block_size: Annotated[int, Field(ge=2)]
    """Tokens per block."""
    seed: Seed
    """Seed of the choice and the order of documents if sources are weighted."""
    data: WeightedData
    tokens: str
    """Directory with the shards of tokenize."""
    raw: str
    """Directory with the Parquet files of download."""
    out: str
    """Output directory."""


def main(config: GroupTextsConfig) -> None:
    tokens = Path(config.tokens)
    vocabulary = Vocabulary.read(tokens)
    with write_directory(config.out, [f"{split}/stats.json" for split in SPLITS]) as directory:
        for split in SPLITS:
            if split == "train":
                runs, num_documents, sources = _plan_training(config, vocabulary)
            else:
                (runs, num_documents), sources = plan_split(tokens / split), None
            ids_type = pa.from_numpy_dtype(vocabulary.dtype)
            ledger = group_split(runs, num_documents, config.block_size, ids_type, directory / split)
            if not ledger["blocks"]:
                raise StageError(
                    f"block_size={config.block_size}: the {split} split has only {ledger['tokens_in']} tokens,"
                    " fewer than one block; choose a smaller block_size or more text"
                )
            write_json(directory / split / "stats.json", ledger | ({"sources": sources} if sources else {}))
            log.info(
                "%s: %d tokens -> %d blocks, %d dropped",
                split,
                *(ledger[key] for key in ("tokens_in", "blocks", "dropped")),
            )
    log.info("-> %s", config.out)


def plan_split(tokens: Path) -> tuple[list[DocumentRun], int]:
    """Plan the packing of a split in the order of the data.

    Returns:
        One run per shard of `tokens`, and the number of documents.
    """
    shards = list_shards(tokens)
    counts = list(run_jobs(count_tokens, list(shards.items())))
    runs = [DocumentRun(file, num_tokens) for file, (_, num_tokens) in zip(shards, counts, strict=True)]
    return runs, sum(documents for documents, _ in counts)


def _plan_training(
    config: GroupTextsConfig, vocabulary: Vocabulary
) -> tuple[list[DocumentRun], int, dict[str, dict[str, Any]] | None]:
    """Plan the packing of the training split.

    Returns:
        The runs, the number of documents, and the ledger of each source. The last is None if there is only one source
        and it has no weight.
    """
    tokens, weights = Path(config.tokens) / "train", config.data.weights
    raw = Path(config.raw) / "train.parquet"
    shards = list_shards(tokens)
    names, sources = read_sources(raw)
    shares = None if weights is None else check_weights(weights, names)
    if (records := read_record_numbers(shards)) is not None:  # the task chooses sources
        if len(records) and records.max() >= len(sources):
            raise make_damage_error(raw, f"{len(sources):,} records, but {tokens} has record {records.max():,}")
        names, sources, shares = choose_sources(names, sources, shares, records)
    if shares is None and len(names) < 2:
        return *plan_split(tokens), None
    shard_lengths = list(run_jobs(count_document_tokens, list(shards.items())))
    lengths = np.concatenate(shard_lengths)
    if len(lengths) != len(sources):
        raise make_damage_error(raw, f"{len(sources):,} records, but {tokens} has {len(lengths):,} documents")
    lengths[0] -= len(vocabulary.lead)  # the lead belongs to the split, not to the first document
    if shares is None:
        runs, _ = plan_split(tokens)
        return runs, len(lengths), summarize_sources(names, sources, lengths, np.ones_like(lengths), None)
    copies = repeat_documents(lengths, sources, shares, config.seed)
    # starts[i]: index of the first document of shard i, [num_shards + 1].
    files, starts = list(shards), np.cumsum([0, *map(len, shard_lengths)])
    runs = [
        DocumentRun(
            files[shard], int(lengths[starts[shard] + rows].sum()), rows, len(vocabulary.lead) if not shard else 0
        )
        for shard, rows in order_documents(copies, starts[1:], config.seed)
    ]
    runs[0] = runs[0]._replace(lead=vocabulary.lead, num_tokens=runs[0].num_tokens + len(vocabulary.lead))
    summary = summarize_sources(names, sources, lengths, copies, shares)
    for name, source in summary.items():
        log.info("%s: %.3f of the tokens, repeated %.2f times", printable(name), source["share"], source["repetitions"])
    return runs, len(lengths), summary


def group_split(
    runs: list[DocumentRun], num_documents: int, block_size: int, ids_type: pa.DataType, directory: Path
) -> dict[str, Any]:
    """Write the blocks of a split, and return its ledger, which accounts for every token.

    Args:
        runs: documents to pack, in order.
        num_documents: number of documents, for the ledger.
        ids_type: type of the token ids, uint16 or uint32.
        directory: output directory of the split.
    """
    tokens_in = sum(run.num_tokens for run in runs)
    shards = list(plan_block_shards(runs, block_size, ids_type.bit_width // 8, directory))
    write = partial(write_blocks, block_size=block_size, ids_type=ids_type)
    write_checksums(directory, list(run_jobs(write, shards)))
    blocks = sum(shard.num_blocks for shard in shards)
    dropped = tokens_in - blocks * block_size
    assert 0 <= dropped < block_size  # only the end of the stream is dropped
    return {
        "block_size": block_size,
        "documents": num_documents,
        "tokens_in": tokens_in,
        "blocks": blocks,
        "dropped": dropped,
        "versions": get_versions("numpy", "pyarrow"),
    }
