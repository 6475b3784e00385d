"""Stage `group_texts@TASK`: documents of token ids -> blocks of block_size tokens.

Reads   data/tokens/TASK/SPLIT/
Writes  data/blocks/TASK/SPLIT/shard-*.arrow (input_ids: fixed_size_list<uint16 or uint32>[block_size]), a ledger each
Command python -m stages.group_texts task=causal
"""

import logging
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
from pydantic import Field

from stages.core.artifacts import SPLITS, shard_files, staged, versions, write_checksums, write_json
from stages.core.config import part
from stages.core.errors import StageError
from stages.group_texts.block_shards import counted, pieces, write_blocks
from stages.shell.tasks import run_pieces
from stages.tokens.vocabulary import Vocabulary

log = logging.getLogger(__name__)


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
    with staged(config.out, [f"{split}/stats.json" for split in SPLITS]) as directory:
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
    shards = list(run_pieces(counted, list(shard_files(tokens).items())))
    documents, tokens_in = (sum(counts) for counts in zip(*(shard[1:] for shard in shards), strict=True))
    planned = list(pieces(shards, block_size, ids_type.bit_width // 8, directory))
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
