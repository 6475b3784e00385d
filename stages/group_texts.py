"""Stage `group_texts@TASK`: documents of token ids -> blocks of block_size tokens.

Reads   data/tokens/TASK/SPLIT/
Writes  data/blocks/TASK/SPLIT/shard-*.arrow (input_ids: fixed_size_list<uint16 or uint32>[block_size]), a ledger each
Command python -m stages.group_texts block_size=128 tokens=data/tokens/causal out=data/blocks/causal
"""

import logging
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
from pydantic import Field

from stages.app import run
from stages.artifacts import SPLITS, ShardWriter, shard_batches, staged, to_arrow, to_numpy, versions, write_json
from stages.config import part
from stages.errors import StageError
from stages.packing import pack
from stages.vocabulary import Vocabulary

log = logging.getLogger(__name__)

TOKENS_AT_ONCE = 2**20  # of an Arrow batch: fixed, so that the bytes follow from the tokens alone


@part
class GroupTextsConfig:
    block_size: Annotated[int, Field(ge=2)]
    """Tokens in a block."""
    tokens: str
    """Directory of tokenize's shards."""
    out: str
    """Directory to write."""


def main(config: GroupTextsConfig) -> None:
    tokens = Path(config.tokens)
    dtype = Vocabulary.read(tokens).dtype
    with staged(config.out) as directory:
        for split in SPLITS:
            ledger = group_split(tokens / split, config.block_size, pa.from_numpy_dtype(dtype), directory / split)
            if not ledger["blocks"]:
                raise StageError(
                    f"block_size={config.block_size}: the {split} split has only {ledger['tokens_in']} tokens,"
                    " fewer than one block; choose a smaller block_size or more text"
                )
            write_json(directory / split / "stats.json", ledger)
            log.info(
                "%s: %d tokens -> %d blocks, %d dropped",
                split,
                *(ledger[key] for key in ("tokens_in", "blocks", "dropped")),
            )
    log.info("-> %s", config.out)


def group_split(tokens: Path, block_size: int, ids_type: pa.DataType, directory: Path) -> dict[str, Any]:
    """Write the blocks of a split and return its ledger, which accounts for every token."""
    schema = pa.schema([("input_ids", pa.list_(ids_type, block_size))])
    ledger = {"block_size": block_size, "documents": 0, "tokens_in": 0, "blocks": 0}

    def stream() -> Any:
        for batch in shard_batches(tokens):
            column = batch.column("input_ids")
            ids = to_numpy(column.flatten())
            ledger["documents"] += len(column)
            ledger["tokens_in"] += len(ids)
            yield ids

    with ShardWriter(directory, schema) as writer:
        for blocks in pack(stream(), block_size, max(1, TOKENS_AT_ONCE // block_size)):
            input_ids = pa.FixedSizeListArray.from_arrays(to_arrow(blocks.reshape(-1)), block_size)
            writer.write(pa.record_batch([input_ids], schema=schema))
            ledger["blocks"] += len(blocks)
    dropped = ledger["tokens_in"] - ledger["blocks"] * block_size
    assert 0 <= dropped < block_size  # only the end of the stream
    return {**ledger, "dropped": dropped, "versions": versions("numpy", "pyarrow")}


if __name__ == "__main__":
    run("group_texts", GroupTextsConfig, main)
