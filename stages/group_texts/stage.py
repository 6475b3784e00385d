"""Stage `group_texts@TASK`: documents of token ids -> blocks of block_size tokens.

Reads   data/tokens/TASK/SPLIT/, the sources of the records in data/raw/train.parquet
Writes  data/blocks/TASK/SPLIT/shard-*.arrow (input_ids: fixed_size_list<uint16 or uint32>[block_size]; marks, the same
        of uint8, where the tokens have them), a ledger each
Command python -m stages.group_texts task=causal
"""

import logging
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from stages.core.artifacts import SPLITS, damaged, shard_files, staged, versions, write_checksums, write_json
from stages.core.config import Seed, part
from stages.core.errors import StageError, printable
from stages.group_texts.block_shards import Run, count_tokens, measure_documents, pieces, read_records, write_blocks
from stages.group_texts.schema import WeightedData
from stages.group_texts.weights import (
    check_weights,
    choose_sources,
    describe_sources,
    order_documents,
    repeat_documents,
)
from stages.shell.tasks import run_pieces
from stages.tokens.texts import read_sources
from stages.tokens.vocabulary import Vocabulary

log = logging.getLogger(__name__)


@part
class GroupTextsConfig:
    block_size: Annotated[int, Field(ge=2)]
    """Tokens in a block."""
    seed: Seed
    """Draws the documents and their order where sources are weighted."""
    data: WeightedData
    tokens: str
    """Directory of tokenize's shards."""
    raw: str
    """Directory of download's Parquet files."""
    out: str
    """Directory to write."""


def main(config: GroupTextsConfig) -> None:
    tokens = Path(config.tokens)
    vocabulary = Vocabulary.read(tokens)
    with staged(config.out, [f"{split}/stats.json" for split in SPLITS]) as directory:
        for split in SPLITS:
            if split == "train":
                runs, documents, sources = _plan_training(config, vocabulary)
            else:
                (runs, documents), sources = plan_split(tokens / split), None
            ids_type = pa.from_numpy_dtype(vocabulary.dtype)
            ledger = group_split(runs, documents, config.block_size, ids_type, directory / split)
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


def plan_split(tokens: Path) -> tuple[list[Run], int]:
    """The runs of a split whose documents are packed as they come, and the number of its documents."""
    shards = shard_files(tokens)
    counts = list(run_pieces(count_tokens, list(shards.items())))
    runs = [Run(file, num_tokens) for file, (_, num_tokens) in zip(shards, counts, strict=True)]
    return runs, sum(documents for documents, _ in counts)


def _plan_training(
    config: GroupTextsConfig, vocabulary: Vocabulary
) -> tuple[list[Run], int, dict[str, dict[str, Any]] | None]:
    """The runs of the training split, the number of its documents, and what its sources have of it.

    The last is None where there is a single source without a weight, of which nothing is to be said.
    """
    tokens, weights = Path(config.tokens) / "train", config.data.weights
    raw = Path(config.raw) / "train.parquet"
    shards = shard_files(tokens)
    names, sources = read_sources(raw)
    shares = None if weights is None else check_weights(weights, names)
    if (records := read_records(shards)) is not None:  # those of the task's sources
        if len(records) and records.max() >= len(sources):
            raise damaged(raw, f"{len(sources):,} records, where {tokens} has record {records.max():,}")
        names, sources, shares = choose_sources(names, sources, shares, records)
    if shares is None and len(names) < 2:
        return *plan_split(tokens), None
    shard_lengths = list(run_pieces(measure_documents, list(shards.items())))
    lengths = np.concatenate(shard_lengths)
    if len(lengths) != len(sources):
        raise damaged(raw, f"{len(sources):,} records, where {tokens} has {len(lengths):,} documents")
    lengths[0] -= len(vocabulary.lead)
    if shares is None:
        runs, _ = plan_split(tokens)
        return runs, len(lengths), describe_sources(names, sources, lengths, np.ones_like(lengths), None)
    copies = repeat_documents(lengths, sources, shares, config.seed)
    files, starts = list(shards), np.cumsum([0, *map(len, shard_lengths)])
    runs = [
        Run(files[shard], int(lengths[starts[shard] + rows].sum()), rows, len(vocabulary.lead) if not shard else 0)
        for shard, rows in order_documents(copies, starts[1:], config.seed)
    ]
    runs[0] = runs[0]._replace(lead=vocabulary.lead, tokens=runs[0].tokens + len(vocabulary.lead))
    described = describe_sources(names, sources, lengths, copies, shares)
    for name, source in described.items():
        log.info("%s: %.3f of the tokens, repeated %.2f times", printable(name), source["share"], source["repetitions"])
    return runs, len(lengths), described


def group_split(
    runs: list[Run], documents: int, block_size: int, ids_type: pa.DataType, directory: Path
) -> dict[str, Any]:
    """Write the blocks of a split of so many documents, and return its ledger, which accounts for every token."""
    tokens_in = sum(run.tokens for run in runs)
    planned = list(pieces(runs, block_size, ids_type.bit_width // 8, directory))
    write = partial(write_blocks, block_size=block_size, ids_type=ids_type)
    write_checksums(directory, list(run_pieces(write, planned)))
    blocks = sum(piece.num_blocks for piece in planned)
    dropped = tokens_in - blocks * block_size
    assert 0 <= dropped < block_size  # only the end of the stream
    return {
        "block_size": block_size,
        "documents": documents,
        "tokens_in": tokens_in,
        "blocks": blocks,
        "dropped": dropped,
        "versions": versions("numpy", "pyarrow"),
    }
