"""A split in several shards gives the same bytes as in one shard, from the tokens to the metrics."""

from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import MODELS, run_stage
from data_helpers import read_contents

from stages.core.artifacts import SPLITS, list_shards
from stages.group_texts import block_shards
from stages.tokenize import stage as tokenize

SHARD_BYTES = 500
TASKS = ("causal", "mlm")


@pytest.fixture(scope="module")
def cut(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens and blocks of the toy corpus in shards of 500 bytes, from records in row groups of three."""
    root = tmp_path_factory.mktemp("cut")
    (root / "raw").mkdir()
    for split in SPLITS:
        table = pq.read_table(corpus / f"raw/{split}.parquet")
        pq.write_table(table, root / f"raw/{split}.parquet", row_group_size=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize, "SHARD_BYTES", SHARD_BYTES)
        patch.setattr(block_shards, "SHARD_BYTES", SHARD_BYTES)
        patch.setattr(block_shards, "TOKENS_PER_BATCH", 50)
        for task in TASKS:
            own = ["data=files", MODELS[task][0], "model.tokenizer.train.vocab_size=300"]
            run_stage("tokenize", f"task={task}", *own, f"raw={root}/raw", f"out={root}/tokens/{task}")
            grouped = [f"tokens={root}/tokens/{task}", f"raw={root}/raw", f"out={root}/blocks/{task}"]
            run_stage("group_texts", "block_size=16", *grouped)
    return root


@pytest.mark.parametrize("task", TASKS)
def test_several_shards_train_and_evaluate_to_the_bytes_of_one_shard(
    corpus: Path, cut: Path, trained: dict[str, Path], run_toy: Callable[..., None], tmp_path: Path, task: str
) -> None:
    tokens, blocks = cut / "tokens" / task, cut / "blocks" / task
    assert len(list_shards(tokens / "train")) > 2 < len(list_shards(blocks / "train"))
    assert len(list_shards(corpus / f"tokens/{task}/train")) == 1
    for stage in ("baseline", "train", "evaluate"):
        more = [] if stage == "baseline" else [f"blocks={blocks}"]
        run_toy(stage, task, tmp_path, f"tokens={tokens}", *more)
    assert read_contents(tmp_path) == read_contents(trained[task])
