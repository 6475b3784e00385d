"""Replay of some steps of a training, for `python -m tools.verify --segments`."""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from stages.core.artifacts import Blocks, read_json
from stages.core.errors import StageError
from stages.train.fingerprints import import_framework

if TYPE_CHECKING:
    from stages.train.branches import Branches
    from stages.train.stage import TrainConfig
    from stages.train.training import BlockTrainer


class Replay(NamedTuple):
    """Result of the replay of some steps."""

    links: list[str]
    """Links of the state chain for these steps."""
    state_difference: str | None
    """Part of the training's state after the last step that differs; None if nothing does. The state is compared with
    the kept checkpoint of this step, from which the next steps are replayed, and with the trained model of this step,
    as far as they exist."""


def list_kept_steps(config: "TrainConfig") -> list[int]:
    """Return the steps of a training whose checkpoints were kept, in ascending order.

    Raises:
        StageError: if the training cannot be replayed in parts.
    """
    _check_replayable(config)
    branches = _find_branches(config)
    return [] if branches is None else branches.list_steps()


def replay_steps(config: "TrainConfig", first: int, last: int) -> Replay:
    """Train from step `first` to step `last` again.

    Args:
        first: 0, or one of `list_kept_steps(config)`.

    Raises:
        StageError: if the training cannot be replayed in parts, or a kept checkpoint is damaged.
    """
    _check_replayable(config)
    from stages.train.stage import prepare_training

    prepared = prepare_training(config)
    with tempfile.TemporaryDirectory() as directory:
        trainer: BlockTrainer = prepared.framework.make_trainer(
            config, prepared.model, prepared.objective, prepared.training, prepared.validation, directory
        )
        recorder = _make_random_state_recorder()
        trainer.add_callback(recorder)
        links = trainer.replay_steps(first, last)
    difference = _find_state_difference(config, trainer, last, recorder.state)
    return Replay(links, difference or _find_weight_difference(config, trainer, last))


def find_model_difference(config: "TrainConfig", chain: Sequence[str]) -> str | None:
    """Describe why the trained model in `config.out` is not that of the state chain; None if it is.

    Args:
        chain: links of all steps of the training.
    """
    from stages.model.trained import load_trained_model
    from stages.train.state_chain import StateChain

    ledger = read_json(Path(config.report) / "stats.json")
    step = _get_model_step(config, ledger)
    if ledger["steps"] != len(chain):
        return f"the training had {ledger['steps']:,} steps, but its state chain has {len(chain):,}"
    model = load_trained_model(config.model.task, config.out)
    recomputed = StateChain()
    recomputed.links = list(chain[: step - 1])
    recomputed.on_step_end(None, None, None, model=model)
    if recomputed.links == list(chain[:step]):
        return None
    return f"it does not have the weights of step {step:,} of the state chain"


def _get_model_step(config: "TrainConfig", ledger: dict[str, Any]) -> int:
    """Return the step whose weights the trained model has, from the ledger of the training."""
    step: int = ledger["best_step"] if config.trainer.get("load_best_model_at_end") is True else ledger["steps"]
    return step


def _find_weight_difference(config: "TrainConfig", trainer: "BlockTrainer", step: int) -> str | None:
    """Compare the weights of `trainer` after `step` with the trained model; None if it is not that of this step.

    This is exact, unlike the checksum of the state chain.
    """
    from stages.model.trained import load_trained_model

    ledger = Path(config.report) / "stats.json"
    if not ledger.is_file() or _get_model_step(config, read_json(ledger)) != step:
        return None
    trained = load_trained_model(config.model.task, config.out).state_dict()
    same = _is_equal(dict(trainer.model.state_dict()), dict(trained))
    return None if same else "the weights of the trained model"


def _find_branches(config: "TrainConfig") -> "Branches | None":
    branches: Branches | None = import_framework(config).find_branches(
        config, len(Blocks(Path(config.blocks) / "train"))
    )
    return branches


def _make_random_state_recorder() -> Any:
    """Return a callback with the state of the random numbers after the last step. (They are used after it as well.)"""
    import torch
    from transformers import TrainerCallback

    class RandomStateRecorder(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.state = {"cpu": torch.get_rng_state()}
            if torch.cuda.is_available():
                self.state["cuda"] = torch.cuda.get_rng_state()

    return RandomStateRecorder()


def _find_state_difference(
    config: "TrainConfig", trainer: "BlockTrainer", step: int, random_state: dict[str, Any]
) -> str | None:
    """Compare the state of `trainer` after `step` with the kept checkpoint of this step."""
    from stages.train.checkpoints import Checkpoints

    branches = _find_branches(config)
    if branches is None or step not in branches.list_steps():
        return None
    with tempfile.TemporaryDirectory() as directory:
        checkpoints = Checkpoints(Path(directory), keep=1)
        if branches.fetch_checkpoint(checkpoints, [step]) is None:
            raise StageError(f"the kept checkpoint of step {step} is missing or damaged")
        return next(_compare_state(trainer, random_state, checkpoints.get_path(step)), None)


def _compare_state(trainer: "BlockTrainer", random_state: dict[str, Any], checkpoint: Path) -> Iterator[str]:
    """Yield each part of the state that determines the next steps and differs from a checkpoint."""
    import torch
    from safetensors.torch import load_file
    from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
    from transformers.trainer_pt_utils import safe_globals

    def load(name: str) -> Any:
        return torch.load(checkpoint / name, map_location="cpu", weights_only=True)

    weights = trainer.model.state_dict()
    saved = {name: tensor for file in checkpoint.glob("model*.safetensors") for name, tensor in load_file(file).items()}
    # Of tied weights, only one is saved.
    for pointer in {tensor.data_ptr() for tensor in weights.values()}:
        names = [name for name, tensor in weights.items() if tensor.data_ptr() == pointer]
        if not any(name in saved and torch.equal(weights[name].cpu(), saved[name]) for name in names):
            yield f"the weight {names[0]}"
    own, other = trainer.optimizer.state_dict(), load(OPTIMIZER_NAME)
    if not _is_equal(own["state"], other["state"]):
        yield "the state of the optimizer"
    for group in (*own["param_groups"], *other["param_groups"]):
        del group["lr"]  # set by the schedule of the run, which may not be that of the run that kept the checkpoint
    if not _is_equal(own["param_groups"], other["param_groups"]):
        yield "the settings of the optimizer"
    if trainer.lr_scheduler.last_epoch != load(SCHEDULER_NAME)["last_epoch"]:
        yield "the step of the learning rate"
    with safe_globals():
        saved = load("rng_state.pth")
    if not _is_equal(random_state, {name: saved.get(name) for name in random_state}):
        yield "the state of the random numbers"


def _is_equal(one: Any, other: Any) -> bool:
    """Compare nested values that may contain tensors on different devices."""
    import torch

    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one.cpu(), other.cpu())
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_is_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_is_equal, one, other))
    return bool(one == other)


def _check_replayable(config: "TrainConfig") -> None:
    if config.framework.name != "trainer":
        raise StageError(f"framework={config.framework.name} writes no state chain: verify the whole training (--all)")
    if config.hardware.launch is not None or config.hardware.ray is not None:
        raise StageError("a training in several processes cannot be replayed in parts: verify all of it (--all)")
    if config.adapter is not None:
        raise StageError("the model of a training with an adapter is not that of the state chain: verify it with --all")
