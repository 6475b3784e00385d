"""Sharded weights: two gloo processes with Accelerate's wrapping take the same steps as one process."""

import copy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from toys import MODEL_TASKS, make_toy_blocks, make_toy_model, make_toy_objective
from training_cases import ProcessConfig

from stages.core.artifacts import Blocks
from stages.core.errors import StageError
from stages.launch.torchrun import run_in_processes
from stages.model.block_loss import compute_block_loss
from stages.model.isolation import isolate_segments
from stages.model.loss import TokenLoss
from stages.model.processes import get_rank, get_world_size
from stages.train.sharding import check_sharded, find_layers_to_shard, gather_weights, remove_duplicate_bias

STEPS = 5


def wrap(model):
    """Shard `model` with Accelerate's code, which Accelerate only runs for GPUs."""
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=find_layers_to_shard(model),
        reshard_after_forward=True,
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="no", is_main_process=True, device="cpu"
    )
    return fsdp2_prepare_model(accelerator, remove_duplicate_bias(model))


def steps(model, objective, blocks):
    """Losses of some AdamW steps on batches of eight blocks, split among the processes."""
    model.train()
    loss, optimizer = TokenLoss(model), torch.optim.AdamW(model.parameters(), lr=0.01)
    found = []
    for step in range(STEPS):
        indices = list(range(8 * step, 8 * step + 8))
        batch = objective.build_batch(blocks[indices], indices, 3, 0)
        targets = objective.get_targets(batch.pop("labels"))
        number = (targets >= 0).sum()
        mine = slice(get_rank(), None, get_world_size())
        with loss.hidden_outputs():
            share = {key: value[mine] for key, value in batch.items()}
            outputs = model(**isolate_segments(share, model)).logits
            nats = loss.sum_nats(outputs, targets[mine]) / number
        (nats * get_world_size()).backward()  # the gradients of processes are averaged
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        torch.distributed.is_initialized() and torch.distributed.all_reduce(nats.detach())
        found.append(float(nats.detach()))
    return found


def train_sharded(config):
    model_type, place = config.work
    model = make_toy_model(model_type)
    like, objective, blocks = copy.deepcopy(model), make_toy_objective(model), Blocks(place / "blocks")
    with pytest.raises(StageError, match="are not sharded"):
        check_sharded(model)
    sharded = wrap(model)
    check_sharded(sharded)
    found = steps(sharded, objective, blocks)
    validation = compute_block_loss(sharded, objective, blocks, 3 * blocks.block_size)
    whole = gather_weights(sharded, like)
    if not get_rank():
        whole.save_pretrained(place / "model")
        np.save(place / "losses.npy", [*found, validation])


class Work(ProcessConfig):
    def __init__(self, *work):
        super().__init__(2)
        self.work = work


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["gpt2", "roberta", "llama"])
def test_sharded_training_has_the_steps_and_the_weights_of_whole(tmp_path: Path, model_type: str) -> None:
    blocks = make_toy_blocks(tmp_path / "blocks", MODEL_TASKS[model_type], 41, 16)
    run_in_processes("train", train_sharded, Work(model_type, tmp_path))
    model = make_toy_model(model_type)
    objective = make_toy_objective(model)
    expected = steps(model, objective, blocks)
    *found, validation = np.load(tmp_path / "losses.npy")
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert expected[-1] < expected[0]
    assert validation == pytest.approx(compute_block_loss(model, objective, blocks, 3 * 16), rel=1e-5)
    saved = type(model).from_pretrained(tmp_path / "model")
    assert saved.config.architectures == [type(model).__name__]
    ids = torch.from_numpy(
        blocks[range(4)].astype(np.int64)
    )  # compare outputs: AdamW amplifies noise in weights without a gradient
    torch.testing.assert_close(saved.eval()(ids).logits, model.eval()(ids).logits, atol=1e-3, rtol=1e-3)
