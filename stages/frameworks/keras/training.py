"""Keras `fit` on blocks, with the Trainer's rules for logging, validation and saving."""

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
from stages.frameworks.keras.models import build_keras_model, copy_to_torch, has_weight_decay
from stages.model.block_loss import compute_block_loss
from stages.model.isolation import compute_segment_positions, get_first_position
from stages.model.masking import IGNORED
from stages.model.objectives import Objective
from stages.shell.interruption import StopRequest
from stages.train.checkpoints import Checkpoints
from stages.train.trainer_arguments import resolve_merged
from stages.train.training import CheckpointSchedule, EpochSampler, TrainingBlocks, TrainingProgress
from stages.train.watchers import create_watchers

if TYPE_CHECKING:
    from stages.train.stage import TrainConfig

log = logging.getLogger(__name__)

_WEIGHTS = "variables.safetensors"
_LOSS_FILE = "loss_since_log.json"
# The number of logits per row of a masked model is rounded up to a multiple of block_size / N, since each size is
# compiled separately. N is 1 on TensorFlow, where `fit` assumes that all batches have the shape of the first ones.
_POSITION_STEPS = {"jax": 4, "tensorflow": 1}


class KerasTraining:
    """Training of a model on blocks with Keras, with its state and checkpoints."""

    def __init__(
        self,
        config: "TrainConfig",
        model: Any,
        objective: Objective,
        train: Blocks,
        validation: Blocks,
        directory: Path,
        request: StopRequest,
    ) -> None:
        assert config.num_train_epochs is not None  # rules.py refuses trainer.max_steps
        self.model, self.objective, self.validation = model, objective, validation
        self.evaluate_batch_tokens = config.hardware.evaluate_batch_tokens
        self.arguments = arguments = TrainingArguments(
            **{"save_strategy": "no", **resolve_merged(config.trainer)},
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
        keras.utils.set_random_seed(config.seed)  # the seeds of dropout are drawn from it
        self.built = build_keras_model(model)
        self.schedule = _LinearSchedule(arguments.learning_rate, arguments.get_warmup_steps(max_steps), max_steps)
        self.optimizer = AdamW(arguments, self.schedule)
        self.optimizer.exclude_from_weight_decay(
            [variable for variable in self.built.trainable_variables if not has_weight_decay(variable.path)]
        )
        self.optimizer.build(self.built.trainable_variables)
        self.built.compile(
            self.optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum")
        )
        self._restore_checkpoint()
        callbacks = [
            DefaultFlowCallback(),
            TrainingProgress(config.batch_size * config.block_size),
            *create_watchers(config, str(directory)),
            CheckpointSchedule(request, 60.0 * config.checkpoints.minutes),
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

    def train_or_resume(self) -> None:
        """Train to the end, from the newest checkpoint if there is one; copy the weights to the torch model.

        Raises:
            Interrupted: if a stop was requested; a checkpoint has then been written.
        """
        if len(self.batches):
            self.built.fit(self.batches, shuffle=False, verbose=0, callbacks=[TrainerFlow(self)])
        copy_to_torch(self.built, self.model)

    def save_checkpoint(self) -> None:
        """Write a checkpoint."""
        step = self.state.global_step
        with self.checkpoints.write_checkpoint(step, None) as aside:
            checkpoint = aside / self.checkpoints.get_path(step).name
            checkpoint.mkdir()
            save_file(
                {name: np.array(variable.value) for name, variable in self._list_variables()}, checkpoint / _WEIGHTS
            )
            (checkpoint / _LOSS_FILE).write_text(json.dumps(self.loss), encoding="utf-8")
            self.state.save_to_json(str(checkpoint / TRAINER_STATE_NAME))

    def _restore_checkpoint(self) -> None:
        """Load the newest checkpoint, if there is one."""
        step = self.checkpoints.find_newest()
        if step is None:
            return
        log.info("resuming from step %d", step)
        checkpoint = self.checkpoints.get_path(step)
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        self.loss = json.loads((checkpoint / _LOSS_FILE).read_text(encoding="utf-8"))
        saved = load_file(checkpoint / _WEIGHTS)
        for name, variable in self._list_variables():
            variable.assign(saved[name])

    def _list_variables(self) -> list[tuple[str, Any]]:
        """Return the variables that training changes: weights, seeds of dropout, moments and step of the optimizer."""
        variables = [*self.built.variables, *self.optimizer.variables]
        return [(f"{index}:{variable.name}", variable) for index, variable in enumerate(variables)]


class _Batches(keras.utils.PyDataset):  # type: ignore[misc]
    """Remaining batches of a training as Keras inputs, with the order and masks of the Trainer."""

    def __init__(
        self,
        blocks: TrainingBlocks,
        sampler: EpochSampler,
        batch_size: int,
        state: TrainerState,
        objective: Objective,
        config: Any,
    ) -> None:
        """
        Args:
            state: its global_step is the step of the first batch.
            config: configuration of the torch model.
        """
        super().__init__()
        self._config = config
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
        return build_arrays(batch, self._objective.get_targets(batch["labels"]), self._config)


def build_arrays(
    batch: dict[str, torch.Tensor], targets: torch.Tensor, config: Any
) -> tuple[dict[str, npt.NDArray[np.int32]], npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Convert a batch of an objective to Keras inputs, targets and sample weights.

    Args:
        batch: input_ids [batch, length] int64, and optionally segment_ids of that shape, integers.
        targets: [batch, length] int64, from `Objective.get_targets`.
        config: configuration of the torch model.

    Returns:
        The inputs of `build_keras_model`, int32; the targets, [batch, length or num_positions] int32, 0 if IGNORED; and
        their weights of that shape, fp32. With these weights the sum of the losses is the mean over the predicted
        tokens, or 0 if there is none.
    """
    ids, wanted = batch["input_ids"], targets.numpy()
    segments = batch.get("segment_ids", torch.zeros_like(ids))
    positions = compute_segment_positions(segments) + get_first_position(config)
    inputs = {"input_ids": ids.numpy(), "position_ids": positions.numpy(), "segments": segments.numpy()}
    if config.model_type != "gpt2":
        # A stable sort by "is ignored" puts the predicted positions of each row first, in order. Keep as many columns
        # as the row with most predictions needs, rounded up to a multiple of `step`: [batch, num_positions].
        length, most = ids.shape[1], int((wanted != IGNORED).sum(axis=1).max())
        step = -(-length // _POSITION_STEPS[keras.backend.backend()])
        chosen = np.argsort(wanted == IGNORED, axis=1, kind="stable")[:, : max(1, -(-most // step)) * step]
        inputs["mask_positions"], wanted = chosen, np.take_along_axis(wanted, chosen, axis=1)
    is_predicted = wanted != IGNORED
    weights = is_predicted.astype(np.float32) / max(1, int(is_predicted.sum()))
    inputs = {name: value.astype(np.int32) for name, value in inputs.items()}
    return inputs, np.where(is_predicted, wanted, 0).astype(np.int32), weights


class TrainerFlow(keras.callbacks.Callback):  # type: ignore[misc]
    """Logs, validates and saves after a step, as the Trainer does, when the Trainer's callbacks request it."""

    def __init__(self, training: KerasTraining) -> None:
        super().__init__()
        self._training, self._control = training, TrainerControl()

    def _notify_callbacks(self, event: str, *more: Any) -> None:
        training = self._training
        control = getattr(training.handler, event)(training.arguments, training.state, self._control, *more)
        self._control = control or self._control

    def on_train_begin(self, logs: Any = None) -> None:
        self._notify_callbacks("on_train_begin")

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._notify_callbacks("on_step_begin")

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        training, state = self._training, self._training.state
        training.loss["sum"] += float(logs["step_loss"])
        epoch, done = divmod(state.global_step, training.steps_per_epoch)
        state.global_step += 1
        state.epoch = epoch + (done + 1) / training.steps_per_epoch
        self._notify_callbacks("on_step_end")
        self._log_and_validate()
        if done + 1 == training.steps_per_epoch or state.global_step == state.max_steps:
            self._notify_callbacks("on_epoch_end")
            self._log_and_validate()
        if self._control.should_save:
            self._sync_variables()
            training.save_checkpoint()
            self._notify_callbacks("on_save")

    def on_train_end(self, logs: Any = None) -> None:
        if steps := self._count_steps_since_log():
            self._log({"train_loss": self._training.loss["sum"] / steps})  # reveals a divergence after the last log
        self._notify_callbacks("on_train_end")

    def _count_steps_since_log(self) -> int:
        return int(self._training.state.global_step - self._training.loss["since_step"])

    def _log_and_validate(self) -> None:
        training, state = self._training, self._training.state
        steps = self._count_steps_since_log()
        if self._control.should_log and steps:
            self._sync_variables()
            rate = float(training.schedule(state.global_step - 1))
            norm = float(training.optimizer.norm.value)
            self._log({"loss": training.loss["sum"] / steps, "grad_norm": norm, "learning_rate": rate})
            training.loss = {"sum": 0.0, "since_step": state.global_step}
        if self._control.should_evaluate:
            self._sync_variables()
            copy_to_torch(training.built, training.model)
            loss = compute_block_loss(
                training.model, training.objective, training.validation, training.evaluate_batch_tokens
            )
            metrics = {"eval_loss": loss}
            self._log(metrics)
            self._notify_callbacks("on_evaluate", metrics)

    def _log(self, logs: dict[str, float]) -> None:
        state = self._training.state
        state.log_history.append({**logs, "epoch": state.epoch, "step": state.global_step})
        self._notify_callbacks("on_log", logs)

    def _sync_variables(self) -> None:
        """Update the model's variables from the state that JAX passes from step to step."""
        if keras.backend.backend() == "jax":
            self.model.jax_state_sync()


class AdamW(keras.optimizers.AdamW):  # type: ignore[misc]
    """AdamW with the same computation as torch's, and with gradients clipped as by torch."""

    def __init__(self, arguments: TrainingArguments, schedule: "_LinearSchedule") -> None:
        super().__init__(
            schedule,
            weight_decay=arguments.weight_decay,
            beta_1=arguments.adam_beta1,
            beta_2=arguments.adam_beta2,
            epsilon=arguments.adam_epsilon,
        )
        self._max_norm = arguments.max_grad_norm
        self.norm = self.add_variable(shape=(), name="norm")  # gradient norm of the last step, before clipping

    @property
    def epsilon(self) -> Any:
        """Epsilon of the current step.

        Keras adds epsilon to the root of the second moment before bias correction, torch after it. The factor converts
        one into the other.
        """
        step = ops.cast(self.iterations + 1, "float32")
        return self._epsilon * ops.sqrt(1 - ops.power(ops.cast(self.beta_2, "float32"), step))

    @epsilon.setter
    def epsilon(self, value: float) -> None:
        self._epsilon = value

    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        if keras.backend.backend() == "tensorflow":
            import tensorflow

            # The gradient of an embedding is sparse and may contain a row several times; the norm needs their sum.
            grads = [tensorflow.convert_to_tensor(grad) for grad in grads]
        norm = ops.sqrt(sum(ops.sum(ops.square(grad)) for grad in grads))
        self.norm.assign(norm)
        if self._max_norm > 0:
            scale = ops.minimum(1.0, self._max_norm / (norm + 1e-6))  # as in torch.nn.utils.clip_grad_norm_
            grads = [grad * scale for grad in grads]
        super().apply(grads, trainable_variables)


class _LinearSchedule(keras.optimizers.schedules.LearningRateSchedule):  # type: ignore[misc]
    """transformers' linear schedule: up to `peak` over `warmup` steps, then down to 0 at step `end`."""

    def __init__(self, peak: float, warmup: int, end: int) -> None:
        self._peak, self._warmup, self._end = peak, warmup, end

    def __call__(self, step: Any) -> Any:
        step = ops.cast(step, "float32")
        falling = ops.maximum(0.0, (self._end - step) / max(1, self._end - self._warmup))
        return self._peak * ops.where(step < self._warmup, step / max(1, self._warmup), falling)
