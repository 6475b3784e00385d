"""`fit` on the project's blocks, with the Trainer's own rules of when to log, validate and save."""

import json
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import numpy.typing as npt
import torch
from keras import ops
from safetensors.numpy import load_file, save_file
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

from stages.core.artifacts import Blocks
from stages.frameworks.keras.models import build, decays, to_torch
from stages.model.block_loss import block_loss
from stages.model.isolation import first_position, segment_positions
from stages.model.masking import IGNORED
from stages.model.objectives import Objective
from stages.shell.interruption import Request
from stages.train.checkpoints import Checkpoints
from stages.train.trainer_arguments import resolve
from stages.train.training import EpochSampler, Saving, TrainingBlocks, TrainingProgress
from stages.train.watchers import watchers

if TYPE_CHECKING:
    from stages.train.stage import TrainConfig

log = logging.getLogger(__name__)

_WEIGHTS = "variables.safetensors"
_LOSS_FILE = "loss_since_log.json"
# The logits that a masked model makes are so many quarters of a block: each size is compiled once. On TensorFlow, where
# `fit` takes the first batches' shape for that of all, they are those of the whole block.
_POSITION_STEPS = {"jax": 4, "tensorflow": 1}


class Training:
    """A model, what it is trained on, and how far it is."""

    def __init__(
        self,
        config: "TrainConfig",
        model: Any,
        objective: Objective,
        train: Blocks,
        validation: Blocks,
        directory: Path,
        request: Request,
    ) -> None:
        assert config.num_train_epochs is not None  # keras_refusals: there is no trainer.max_steps
        self.model, self.objective, self.validation = model, objective, validation
        self.evaluate_batch_tokens = config.hardware.evaluate_batch_tokens
        self.arguments = arguments = TrainingArguments(
            **{"save_strategy": "no", **resolve(config.trainer)},
            output_dir=str(directory),
            learning_rate=config.learning_rate,
            num_train_epochs=config.num_train_epochs,
            report_to="none",
            use_cpu=True,
        )
        sampler = EpochSampler(len(train), config.seed, config.batch_size)
        self.steps_per_epoch = len(sampler) // config.batch_size
        max_steps = math.ceil(config.num_train_epochs * self.steps_per_epoch)
        self.checkpoints = Checkpoints(directory, config.checkpoints.keep)
        self.state, self.loss = TrainerState(max_steps=max_steps), {"sum": 0.0, "since_step": 0}
        self.state.compute_steps(arguments, max_steps)
        keras.utils.set_random_seed(config.seed)  # from which the seeds of dropout are drawn
        self.built = build(model)
        self.schedule = _Linear(arguments.learning_rate, arguments.get_warmup_steps(max_steps), max_steps)
        self.optimizer = AdamW(arguments, self.schedule)
        self.optimizer.exclude_from_weight_decay(
            [variable for variable in self.built.trainable_variables if not decays(variable.path)]
        )
        self.optimizer.build(self.built.trainable_variables)
        self.built.compile(
            self.optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum")
        )
        self._restore()
        callbacks = [
            DefaultFlowCallback(),
            TrainingProgress(config.batch_size * config.block_size),
            *watchers(config, str(directory)),
            Saving(request, 60.0 * config.checkpoints.minutes),
        ]
        self.handler = CallbackHandler(callbacks, model, None, None, None)
        self.batches = _Batches(
            TrainingBlocks(train, objective, config.seed),
            sampler,
            config.batch_size,
            self.state,
            objective,
            model.config,
        )

    def run(self) -> None:
        """Train to the end; `model` then has the weights, and `state` the record.

        Raises:
            Interrupted: when the end was asked for; a checkpoint has then been written.
        """
        if len(self.batches):
            self.built.fit(self.batches, shuffle=False, verbose=0, callbacks=[Flow(self)])
        to_torch(self.built, self.model)

    def save(self) -> None:
        """Write a checkpoint."""
        step = self.state.global_step
        with self.checkpoints.writing(step, None) as aside:
            place = aside / self.checkpoints.path(step).name
            place.mkdir()
            save_file({name: np.array(variable.value) for name, variable in self._variables()}, place / _WEIGHTS)
            (place / _LOSS_FILE).write_text(json.dumps(self.loss), encoding="utf-8")
            self.state.save_to_json(str(place / TRAINER_STATE_NAME))

    def _restore(self) -> None:
        step = self.checkpoints.newest()
        if step is None:
            return
        log.info("resuming from step %d", step)
        place = self.checkpoints.path(step)
        self.state = TrainerState.load_from_json(str(place / TRAINER_STATE_NAME))
        self.loss = json.loads((place / _LOSS_FILE).read_text(encoding="utf-8"))
        saved = load_file(place / _WEIGHTS)
        for name, variable in self._variables():
            variable.assign(saved[name])

    def _variables(self) -> list[tuple[str, Any]]:
        """All that changes in training, by name: weights, the seeds of dropout, the optimizer's moments and step."""
        variables = [*self.built.variables, *self.optimizer.variables]
        return [(f"{index}:{variable.name}", variable) for index, variable in enumerate(variables)]


class _Batches(keras.utils.PyDataset):  # type: ignore[misc]
    """The batches that are still to come, in the Trainer's order and with its masks, as Keras takes them."""

    def __init__(
        self,
        blocks: TrainingBlocks,
        sampler: EpochSampler,
        batch_size: int,
        state: TrainerState,
        objective: Objective,
        model: Any,
    ) -> None:
        super().__init__()
        self._model = model
        self._blocks, self._sampler, self._batch_size, self._objective = blocks, sampler, batch_size, objective
        self._first: int = state.global_step
        self._num_steps: int = state.max_steps - state.global_step
        self._epoch, self._keys = -1, list[int]()

    def __len__(self) -> int:
        return self._num_steps

    def __getitem__(self, index: int) -> tuple[dict[str, npt.NDArray[np.int32]], Any, Any]:
        epoch, number = divmod(self._first + index, len(self._sampler) // self._batch_size)
        if epoch != self._epoch:
            self._sampler.set_epoch(epoch)
            self._epoch, self._keys = epoch, list(self._sampler)
        start = number * self._batch_size
        batch = self._blocks.__getitems__(self._keys[start : start + self._batch_size])
        return arrays(batch, self._objective.targets(batch["labels"]), self._model)


def arrays(
    batch: dict[str, torch.Tensor], targets: torch.Tensor, config: Any
) -> tuple[dict[str, npt.NDArray[np.int32]], npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """A batch of an objective as the inputs of models.build, its targets and their weights.

    With these weights the sum of the losses is the mean over the tokens predicted; 0 where there is none.

    Args:
        config: of transformers' model.
    """
    ids, wanted = batch["input_ids"], targets.numpy()
    segments = batch.get("segment_ids", torch.zeros_like(ids))
    positions = segment_positions(segments) + first_position(config)
    inputs = {"input_ids": ids.numpy(), "position_ids": positions.numpy(), "segments": segments.numpy()}
    if config.model_type != "gpt2":
        length, most = ids.shape[1], int((wanted != IGNORED).sum(axis=1).max())
        step = -(-length // _POSITION_STEPS[keras.backend.backend()])
        chosen = np.argsort(wanted == IGNORED, axis=1, kind="stable")[:, : max(1, -(-most // step)) * step]
        inputs["mask_positions"], wanted = chosen, np.take_along_axis(wanted, chosen, axis=1)
    predicted = wanted != IGNORED
    weights = predicted.astype(np.float32) / max(1, int(predicted.sum()))
    values = {name: value.astype(np.int32) for name, value in inputs.items()}
    return values, np.where(predicted, wanted, 0).astype(np.int32), weights


class Flow(keras.callbacks.Callback):  # type: ignore[misc]
    """Does after each step what the Trainer does: logs, validates and saves when its callbacks say so."""

    def __init__(self, training: Training) -> None:
        super().__init__()
        self._training, self._control = training, TrainerControl()

    def _tell(self, event: str, *more: Any) -> None:
        training = self._training
        told = getattr(training.handler, event)(training.arguments, training.state, self._control, *more)
        self._control = told or self._control

    def on_train_begin(self, logs: Any = None) -> None:
        self._tell("on_train_begin")

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._tell("on_step_begin")

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        training, state = self._training, self._training.state
        training.loss["sum"] += float(logs["step_loss"])
        epoch, done = divmod(state.global_step, training.steps_per_epoch)
        state.global_step += 1
        state.epoch = epoch + (done + 1) / training.steps_per_epoch
        self._tell("on_step_end")
        self._log_and_validate()
        if done + 1 == training.steps_per_epoch or state.global_step == state.max_steps:
            self._tell("on_epoch_end")
            self._log_and_validate()
        if self._control.should_save:
            self._sync()
            training.save()
            self._tell("on_save")

    def on_train_end(self, logs: Any = None) -> None:
        if steps := self._steps_since_log():
            self._log({"train_loss": self._training.loss["sum"] / steps})  # where it diverged behind the last log
        self._tell("on_train_end")

    def _steps_since_log(self) -> int:
        return int(self._training.state.global_step - self._training.loss["since_step"])

    def _log_and_validate(self) -> None:
        training, state = self._training, self._training.state
        steps = self._steps_since_log()
        if self._control.should_log and steps:
            self._sync()
            rate = float(training.schedule(state.global_step - 1))
            norm = float(training.optimizer.norm.value)
            self._log({"loss": training.loss["sum"] / steps, "grad_norm": norm, "learning_rate": rate})
            training.loss = {"sum": 0.0, "since_step": state.global_step}
        if self._control.should_evaluate:
            self._sync()
            to_torch(training.built, training.model)
            loss = block_loss(training.model, training.objective, training.validation, training.evaluate_batch_tokens)
            metrics = {"eval_loss": loss}
            self._log(metrics)
            self._tell("on_evaluate", metrics)

    def _log(self, logs: dict[str, float]) -> None:
        state = self._training.state
        state.log_history.append({**logs, "epoch": state.epoch, "step": state.global_step})
        self._tell("on_log", logs)

    def _sync(self) -> None:
        """Have the model's variables hold what JAX carries from step to step."""
        if keras.backend.backend() == "jax":
            self.model.jax_state_sync()


class AdamW(keras.optimizers.AdamW):  # type: ignore[misc]
    """AdamW as torch computes it, its gradients clipped as torch clips them."""

    def __init__(self, arguments: TrainingArguments, schedule: "_Linear") -> None:
        super().__init__(
            schedule,
            weight_decay=arguments.weight_decay,
            beta_1=arguments.adam_beta1,
            beta_2=arguments.adam_beta2,
            epsilon=arguments.adam_epsilon,
        )
        self._max_norm = arguments.max_grad_norm
        self.norm = self.add_variable(shape=(), name="norm")  # of the gradients of the last step, before clipping

    @property
    def epsilon(self) -> Any:
        """Of the step: Keras adds it to the second moment's root before the correction for its start, torch after."""
        step = ops.cast(self.iterations + 1, "float32")
        return self._epsilon * ops.sqrt(1 - ops.power(ops.cast(self.beta_2, "float32"), step))

    @epsilon.setter
    def epsilon(self, value: float) -> None:
        self._epsilon = value

    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        if keras.backend.backend() == "tensorflow":
            import tensorflow

            # An embedding's gradient comes as rows, some of them several times, of which each would be squared alone.
            grads = [tensorflow.convert_to_tensor(grad) for grad in grads]
        norm = ops.sqrt(sum(ops.sum(ops.square(grad)) for grad in grads))
        self.norm.assign(norm)
        if self._max_norm > 0:
            scale = ops.minimum(1.0, self._max_norm / (norm + 1e-6))  # as torch.nn.utils.clip_grad_norm_
            grads = [grad * scale for grad in grads]
        super().apply(grads, trainable_variables)


class _Linear(keras.optimizers.schedules.LearningRateSchedule):  # type: ignore[misc]
    """transformers' linear schedule: up to `peak` in `warmup` steps, then down to 0 at `end`."""

    def __init__(self, peak: float, warmup: int, end: int) -> None:
        self._peak, self._warmup, self._end = peak, warmup, end

    def __call__(self, step: Any) -> Any:
        step = ops.cast(step, "float32")
        falling = ops.maximum(0.0, (self._end - step) / max(1, self._end - self._warmup))
        return self._peak * ops.where(step < self._warmup, step / max(1, self._warmup), falling)
