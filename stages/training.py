"""transformers' Trainer with the project's own order, batches, loss and validation."""

import logging
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from stages.artifacts import Blocks
from stages.errors import StageError
from stages.loss import TokenLoss
from stages.masking import IGNORED
from stages.metrics import block_loss
from stages.objectives import Objective
from stages.progress import Progress

log = logging.getLogger(__name__)

Batch = dict[str, torch.Tensor]


class EpochSampler(Sampler[int]):
    """Keys `epoch * num_blocks + block` in the order of an epoch, a function of (seed, epoch) alone."""

    def __init__(self, num_blocks: int, seed: int) -> None:
        self._num_blocks, self._seed = num_blocks, seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return self._num_blocks

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed * 2**20 + self._epoch)
        for block in torch.randperm(self._num_blocks, generator=generator).tolist():
            yield self._epoch * self._num_blocks + block


class TrainingBlocks(Dataset[Batch]):
    """Whole batches by their keys. Stateless: the epoch comes with the key, so it is right in any worker or process.

    The last batch of an epoch is filled up with rows of which nothing is predicted, so that all have one shape (another
    one compiles the model anew).
    """

    def __init__(self, blocks: Blocks, objective: Objective, seed: int, batch_size: int) -> None:
        self._blocks, self._objective, self._seed, self._batch_size = blocks, objective, seed, batch_size

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitems__(self, keys: list[int]) -> Batch:
        epoch = keys[0] // len(self)  # a batch never spans epochs
        indices = [key % len(self) for key in keys]
        indices += indices[:1] * (self._batch_size - len(keys))
        batch = self._objective.batch(self._blocks[indices], indices, self._seed, epoch)
        batch["labels"][len(keys) :] = IGNORED
        return batch


def identity(batch: Batch) -> Batch:
    return batch


class BlockTrainer(Trainer):  # type: ignore[misc]
    """A Trainer on blocks: token-weighted loss, validation by the metric's own code."""

    def __init__(
        self,
        model: Any,
        arguments: TrainingArguments,
        objective: Objective,
        train: Blocks,
        validation: Blocks,
        evaluate_batch_tokens: int,
        callbacks: list[TrainerCallback],
    ) -> None:
        def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | None = None) -> torch.Tensor:
            # Sum over tokens / tokens of the whole step: right under accumulation and several processes, where the
            # stock losses of RoBERTa, BERT and GPT-2 are not. A step without a masked token has loss 0.
            assert num_items_in_batch is not None
            nats = self._loss.sum(outputs.logits, objective.targets(labels))
            return nats / torch.clamp(num_items_in_batch, min=1)

        super().__init__(
            model=model,
            args=arguments,
            train_dataset=TrainingBlocks(train, objective, arguments.seed, arguments.train_batch_size),
            eval_dataset=validation,
            data_collator=identity,
            compute_loss_func=loss,
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)
        self._loss = TokenLoss(model)
        self._objective, self._validation, self._evaluate_batch_tokens = objective, validation, evaluate_batch_tokens

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        return EpochSampler(len(self.train_dataset), self.args.seed)

    def compute_loss(self, *arguments: Any, **named: Any) -> Any:
        # The Trainer's own autocast ends with the model's forward pass; the output embedding is part of the loss here.
        with self.accelerator.autocast(), self._loss.hidden_outputs():
            return super().compute_loss(*arguments, **named)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The validation loss as evaluate reports it: the Trainer's own weights batches, not tokens."""
        metrics = {"eval_loss": block_loss(self.model, self._objective, self._validation, self._evaluate_batch_tokens)}
        self.log(dict(metrics))
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class TrainingProgress(TrainerCallback):  # type: ignore[misc]
    """Steps, loss, tokens per second and time to go, while training runs."""

    def __init__(self, tokens_per_step: int) -> None:
        self._tokens_per_step = tokens_per_step
        self._progress: Progress | None = None
        self._loss = ""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._progress = Progress("training", state.max_steps, unit="steps")
        self._started, self._first_step = time.monotonic(), state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        assert self._progress is not None
        seconds = time.monotonic() - self._started
        rate = (state.global_step - self._first_step) * self._tokens_per_step / seconds
        self._progress.update(state.global_step, f"{self._loss}{rate:,.0f} tokens/s")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        for name in ("loss", "eval_loss"):
            if logs and not math.isfinite(logs.get(name, 0.0)):
                raise StageError(
                    f"{name} is {logs[name]} at step {state.global_step}: training has diverged; lower learning_rate"
                )
        if logs and "loss" in logs:
            self._loss = f"loss {float(logs['loss']):.4f}, "
        if logs and "eval_loss" in logs:
            log.info("step %d/%d: validation loss %.4f", state.global_step, state.max_steps, logs["eval_loss"])

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        assert self._progress is not None
        self._progress.close()
