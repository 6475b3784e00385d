"""Replay of some steps of a training, for `python -m tools.verify --segments`."""

import csv
import filecmp
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from stages.core.artifacts import Blocks, read_json
from stages.core.errors import StageError
from stages.train.batches import count_steps
from stages.train.fingerprints import import_framework

if TYPE_CHECKING:
    from stages.train.branches import Branches
    from stages.train.schema import EarlyStopping
    from stages.train.stage import PreparedTraining, TrainConfig
    from stages.train.training import BlockTrainer

_VALIDATION_LOSS = "validation/loss"


class Replay(NamedTuple):
    """Result of the replay of some steps."""

    links: list[str]
    """Links of the state chain for these steps."""
    difference: str | None
    """What differs besides the links; None if nothing does. Compared are the curves, the state after the last step with
    the kept checkpoint of this step, from which the next steps are replayed, and the weights with the trained model, if
    it is that of one of these steps."""


def list_kept_steps(config: "TrainConfig") -> list[int]:
    """Return the steps of a training whose checkpoints were kept, in ascending order.

    Raises:
        StageError: if the training cannot be replayed in parts.
    """
    _check_replayable(config)
    branches = _find_branches(config)
    return [] if branches is None else branches.list_steps()


def replay_steps(config: "TrainConfig", first: int, last: int) -> Replay:
    """Train from step `first` to step `last` again, and compare the result with the outputs of the training.

    Args:
        first: 0, or one of `list_kept_steps(config)`.

    Raises:
        StageError: if the training cannot be replayed in parts, or a kept checkpoint is damaged.
    """
    _check_replayable(config)
    from stages.train.stage import prepare_training

    prepared = prepare_training(config)
    model_step = _get_model_step(config, read_json(Path(config.report) / "stats.json"))
    with tempfile.TemporaryDirectory() as directory:
        trainer = _make_trainer(config, prepared, directory)
        recorder = _make_recorder(model_step)
        trainer.add_callback(recorder)
        links = trainer.replay_steps(first, last)
    differences = (
        _find_state_difference(config, trainer, last, recorder.random_state),
        _find_curve_difference(Path(config.report), trainer.state.log_history, first, last),
        _find_weight_difference(config, recorder.weights),
    )
    return Replay(links, next(filter(None, differences), None))


def _make_trainer(config: "TrainConfig", prepared: "PreparedTraining", directory: str) -> "BlockTrainer":
    """Create the Trainer of a training, with its checkpoints in `directory`."""
    trainer: BlockTrainer = prepared.framework.make_trainer(
        config, prepared.model, prepared.objective, prepared.training, prepared.validation, directory
    )
    return trainer


def find_model_difference(config: "TrainConfig", chain: Sequence[str]) -> str | None:
    """Describe why the trained model in `config.out` is not that of the state chain; None if it is.

    The number of steps must be that of the config, the weights must have the link of the last or the best step, and all
    files of the model must be those that train writes for these weights.

    Args:
        chain: links of all steps of the training.
    """
    _check_replayable(config)
    from stages.model.trained import load_trained_model
    from stages.train.stage import prepare_training, write_model
    from stages.train.state_chain import StateChain

    ledger = read_json(Path(config.report) / "stats.json")
    if (difference := _find_length_difference(config, ledger, len(chain))) is not None:
        return difference
    step = _get_model_step(config, ledger)
    prepared = prepare_training(config)
    with tempfile.TemporaryDirectory() as directory:  # the Trainer changes the configuration of the model
        model = _make_trainer(config, prepared, directory).model
    try:
        model.load_state_dict(load_trained_model(config.model.task, config.out).state_dict())
    except RuntimeError:
        return "its weights do not fit the model of the config"
    recomputed = StateChain()
    recomputed.links = list(chain[: step - 1])
    recomputed.on_step_end(None, None, None, model=model)
    if recomputed.links != list(chain[:step]):
        return f"it does not have the weights of step {step:,} of the state chain"
    with tempfile.TemporaryDirectory() as directory:
        write_model(config, model, prepared.use_cache, Path(directory))
        names = sorted({file.name for path in (directory, config.out) for file in Path(path).iterdir()})
        _, changed, missing = filecmp.cmpfiles(directory, config.out, names, shallow=False)
    other = sorted([*changed, *missing])
    return f"{', '.join(other)}: not what train writes for these weights" if other else None


def _find_length_difference(config: "TrainConfig", ledger: dict[str, Any], num_links: int) -> str | None:
    """Compare the numbers of steps, and the best step, with the config and the validation curve."""
    num_steps = count_steps(config, len(Blocks(Path(config.blocks) / "train")))
    rows = _read_curves(Path(config.report))
    losses = {step: float(text) for (name, step), text in rows.items() if name == _VALIDATION_LOSS and step > 0}
    if config.early_stopping is not None:
        num_steps = _find_early_stop(losses, config.early_stopping) or num_steps
    for holder, number in (("ledger", ledger["steps"]), ("state chain", num_links)):
        if number != num_steps:
            return f"the training should have {num_steps:,} steps, but its {holder} has {number:,}"
    best = min(losses, key=lambda step: (losses[step], step)) if losses else None
    if _loads_best_model(config) and ledger["best_step"] != best:
        return f"the best step of the validation curve is {best}, but that of the ledger {ledger['best_step']}"
    return None


def _find_early_stop(losses: dict[int, float], settings: "EarlyStopping") -> int | None:
    """Return the step at which transformers' EarlyStoppingCallback ends a training; None if it does not.

    Args:
        losses: step to validation loss, in ascending order of the steps.
    """
    best, count = float("inf"), 0
    for step, loss in losses.items():
        count = 0 if loss < best and best - loss > settings.threshold else count + 1
        if count >= settings.patience:
            return step
        best = min(best, loss)
    return None


def _loads_best_model(config: "TrainConfig") -> bool:
    return config.trainer.get("load_best_model_at_end") is True


def _get_model_step(config: "TrainConfig", ledger: dict[str, Any]) -> int:
    """Return the step whose weights the trained model has, from the ledger of the training."""
    step: int = ledger["best_step"] if _loads_best_model(config) else ledger["steps"]
    return step


def _find_weight_difference(config: "TrainConfig", weights: dict[str, Any] | None) -> str | None:
    """Compare the weights of a step with the trained model, exactly, unlike the checksum of the state chain.

    Args:
        weights: name to tensor; None if the step of the trained model was not replayed.
    """
    from stages.model.trained import load_trained_model

    if weights is None:
        return None
    trained = load_trained_model(config.model.task, config.out).state_dict()
    return None if _is_equal(weights, dict(trained)) else "the weights of the trained model"


def _find_curve_difference(report: Path, history: list[dict[str, float]], first: int, last: int) -> str | None:
    """Compare the curves of the steps first + 1 to last with those that the training wrote; for step 0, also step 0."""
    from stages.train.stage import write_curves

    with tempfile.TemporaryDirectory() as directory:
        write_curves(history, Path(directory))
        curves = [_read_curves(path) for path in (report, Path(directory))]
    old, new = (
        {key: text for key, text in rows.items() if first < key[1] <= last or key[1] == first == 0} for rows in curves
    )
    different = [key for key in sorted({*old, *new}, key=lambda key: key[1]) if old.get(key) != new.get(key)]
    return f"{different[0][0]} of step {different[0][1]:,}" if different else None


def _read_curves(directory: Path) -> dict[tuple[str, int], str]:
    """Read the curves that `write_curves` wrote: name and step to the text of the value."""
    rows = {}
    for file in sorted((directory / "plots/metrics").rglob("*.tsv")):
        name = file.relative_to(directory / "plots/metrics").with_suffix("").as_posix()
        with file.open(encoding="utf-8", newline="") as stream:
            for row in csv.DictReader(stream, delimiter="\t"):
                rows[name, int(row["step"])] = row[file.stem]
    return rows


def _find_branches(config: "TrainConfig") -> "Branches | None":
    branches: Branches | None = import_framework(config).find_branches(
        config, len(Blocks(Path(config.blocks) / "train"))
    )
    return branches


def _make_recorder(model_step: int) -> Any:
    """Return a callback with the state of the random numbers after the last step, and the weights after `model_step`.

    (Random numbers are used after the last step as well.)
    """
    import torch
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

    class Recorder(TrainerCallback):  # type: ignore[misc]
        weights: dict[str, Any] | None = None

        def on_step_end(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
        ) -> None:
            self.random_state = {"cpu": torch.get_rng_state()}
            if torch.cuda.is_available():
                self.random_state["cuda"] = torch.cuda.get_rng_state()
            if state.global_step == model_step:
                self.weights = {name: weight.clone() for name, weight in model.state_dict().items()}

    return Recorder()


def _find_state_difference(
    config: "TrainConfig", trainer: "BlockTrainer", step: int, random_state: dict[str, Any]
) -> str | None:
    """Compare the state of `trainer` after `step` with the kept checkpoint of this step, if steps follow."""
    from stages.train.checkpoints import Checkpoints

    branches = _find_branches(config)
    if branches is None or step not in branches.list_steps() or step >= trainer.state.max_steps:
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
    from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
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
    if (checkpoint / SCALER_NAME).is_file() and not _is_equal(
        trainer.accelerator.scaler.state_dict(), load(SCALER_NAME)
    ):
        yield "the scale of the gradients"
    state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    if trainer.state.log_history[:-1] != state["log_history"]:  # without the summary at the end of a training
        yield "the history of losses"
    for name in ("global_step", "epoch", "best_metric"):
        if getattr(trainer.state, name) != state[name]:
            yield f"the {name.replace('_', ' ')} of the training"
    for callback in trainer.callback_handler.callbacks:
        saved_callback = state["stateful_callbacks"].get(type(callback).__name__)
        if saved_callback is not None and callback.state() != saved_callback:
            yield f"the state of the {type(callback).__name__}"


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
