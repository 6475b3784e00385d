"""transformers' Trainer with the project's own order, batches, loss and validation."""

import contextlib
import json
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback

from stages.core.artifacts import Blocks
from stages.core.errors import StageError
from stages.model.block_loss import block_loss
from stages.model.isolation import isolate_segments
from stages.model.loss import TokenLoss
from stages.model.masking import IGNORED
from stages.model.objectives import Objective
from stages.model.processes import largest, of_the_first, rank, wait_for_all, world_size
from stages.shell.interruption import Interrupted, Request
from stages.shell.progress import Progress
from stages.train.attention import use_fast_kernels
from stages.train.checkpoints import Checkpoints, find_damage
from stages.train.schema import CheckpointSettings

log = logging.getLogger(__name__)

_AT_ONCE = 2**16  # keys
LOSS_FILE = "loss_since_log-{}.json"  # of each process

_Batch = dict[str, torch.Tensor]


class EpochSampler(Sampler[int]):
    """Keys `epoch * num_blocks + block` in the order of an epoch, a function of (seed, epoch) alone.

    At its end, keys that stand for rows of which nothing is predicted, `~key`, make their number a multiple of
    `at_once`, what all processes take at once: all batches have one shape (another one compiles the model anew), and no
    process is given rows a second time, as Accelerate would do.
    """

    def __init__(self, num_blocks: int, seed: int, at_once: int) -> None:
        self._num_blocks, self._seed, self._fill = num_blocks, seed, -num_blocks % at_once
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return self._num_blocks + self._fill

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed * 2**20 + self._epoch)
        keys = self._epoch * self._num_blocks + torch.randperm(self._num_blocks, generator=generator)
        for some in torch.split(keys, _AT_ONCE):  # as a list, all of many blocks would take five times their memory
            yield from some.tolist()
        yield from [~int(keys[0])] * self._fill


class TrainingBlocks(Dataset[_Batch]):
    """Whole batches by EpochSampler's keys. Stateless: the epoch comes with the key, so it is right in any process."""

    def __init__(self, blocks: Blocks, objective: Objective, seed: int) -> None:
        self._blocks, self._objective, self._seed = blocks, objective, seed

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitems__(self, keys: list[int]) -> _Batch:
        real = [max(key, ~key) for key in keys]
        epoch = real[0] // len(self)  # a batch never spans epochs
        indices = [key % len(self) for key in real]
        batch = self._objective.batch(self._blocks[indices], indices, self._seed, epoch, self._blocks.marks(indices))
        batch["labels"][torch.tensor(keys) < 0] = IGNORED
        return batch


def _identity(batch: _Batch) -> _Batch:
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
        checkpoints: CheckpointSettings,
        callbacks: list[TrainerCallback],
        each_saves: bool = False,
    ) -> None:
        """
        Args:
            each_saves: whether each of several processes has a directory of checkpoints of its own, with its part.
        """

        def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | None = None) -> torch.Tensor:
            # Sum over tokens / tokens of the whole step: right under accumulation and several processes, where the
            # stock losses of RoBERTa, BERT and GPT-2 are not. A step without a masked token has loss 0.
            assert num_items_in_batch is not None
            nats = self._loss.sum(outputs.logits, objective.targets(labels))
            return nats / torch.clamp(num_items_in_batch, min=1)

        use_fast_kernels(model, arguments.device.type)  # where the Trainer will put it
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=TrainingBlocks(train, objective, arguments.seed),
            eval_dataset=validation,
            data_collator=_identity,
            compute_loss_func=loss,
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)
        self._checkpoints = Checkpoints(Path(arguments.output_dir), checkpoints.keep)
        self._seconds_between_checkpoints = 60.0 * checkpoints.minutes
        self._each_saves = each_saves
        self._loss = TokenLoss(model)
        self._objective, self._validation, self._evaluate_batch_tokens = objective, validation, evaluate_batch_tokens

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        at_once = self.args.train_batch_size * world_size()
        self._sampler = EpochSampler(len(self.train_dataset), self.args.seed, at_once)
        return self._sampler

    def compute_loss(self, model: Any, inputs: _Batch, *arguments: Any, **named: Any) -> Any:
        # The Trainer's own autocast ends with the model's forward pass; the output embedding is part of the loss here.
        with self.accelerator.autocast(), self._loss.hidden_outputs():
            return super().compute_loss(model, isolate_segments(inputs, self.model), *arguments, **named)

    def train_on(self, request: Request) -> None:
        """Train to the end, from the newest checkpoint if there is one.

        Raises:
            Interrupted: when `request` asked for the end; a checkpoint has then been written.
        """
        self.add_callback(Saving(request, self._seconds_between_checkpoints))
        step = of_the_first(None if rank() else self._to_go_on_from())
        if step is None:
            if world_size() > 1:
                self.add_callback(OwnDraws())
            self.train()
            return
        log.info("resuming from step %d", step)
        self.add_callback(_Restoring(self, step))
        self.train(resume_from_checkpoint=str(self._checkpoints.path(step)))

    def _to_go_on_from(self) -> int | None:
        """The step of the newest whole checkpoint, if the best model so far is there as well where it is asked for."""
        step = self._checkpoints.newest()
        if step is None:
            return None
        state = json.loads((self._checkpoints.path(step) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        best = state["best_global_step"]
        damage = find_damage(self._checkpoints.path(best)) if self.args.load_best_model_at_end and best else None
        if damage is not None:
            log.warning("the checkpoint of the best step, %d, is damaged (%s): training starts anew", best, damage)
            self._checkpoints.clear()  # those of the run before would be newer than the next ones
            return None
        return step

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step, best, place = self.state.global_step, self.state.best_global_step, self.args.output_dir
        # One process makes the directory and seals it, behind the others' files; on several machines it is on a disk
        # that they share. Or each does so with its own.
        writes = self._each_saves or not rank()
        with self._checkpoints.writing(step, best, rank()) if writes else contextlib.nullcontext() as mine:
            aside = Path(str(mine) if self._each_saves else of_the_first(str(mine)))
            self.args.output_dir = str(aside)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.args.output_dir = place
            # Of the mean that the next log line shows, which the Trainer starts anew.
            loss = {"sum": self._tr_loss.item(), "since_step": self._globalstep_last_logged}
            (aside / f"checkpoint-{step}" / LOSS_FILE.format(rank())).write_text(json.dumps(loss), encoding="utf-8")
            wait_for_all()
        wait_for_all()
        if best:
            self.state.best_model_checkpoint = str(self._checkpoints.path(best))

    def restore(self, step: int) -> None:
        """Take from the checkpoint of `step` what the Trainer leaves out of a resumption."""
        loss = json.loads((self._checkpoints.path(step) / LOSS_FILE.format(rank())).read_text(encoding="utf-8"))
        self._tr_loss.fill_(loss["sum"])
        self._globalstep_last_logged = loss["since_step"]
        # Within an epoch, several processes skip what is done by one wrapper more than the Trainer looks through.
        self._sampler.set_epoch(int(self.state.epoch or 0))
        if self.state.best_global_step:  # the cache may have been moved since
            self.state.best_model_checkpoint = str(self._checkpoints.path(self.state.best_global_step))

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
        for name in ("loss", "eval_loss", "train_loss"):  # train_loss: of all steps, those after the last log too
            if logs and not math.isfinite(logs.get(name, 0.0)):
                before = [step for step in Checkpoints(Path(args.output_dir), 1).steps() if step < state.global_step]
                raise StageError(
                    f"{name} is {logs[name]} at step {state.global_step}: training has diverged; lower learning_rate"
                    + (f" (the last checkpoint: {args.output_dir}/checkpoint-{before[-1]})" if before else "")
                )
        if logs and "loss" in logs:
            self._loss = f"loss {float(logs['loss']):.4f}, "
        if logs and "eval_loss" in logs:
            log.info("step %d/%d: validation loss %.4f", state.global_step, state.max_steps, logs["eval_loss"])

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        assert self._progress is not None
        self._progress.close()


class _Restoring(TrainerCallback):  # type: ignore[misc]
    """Completes the resumption from a checkpoint once the Trainer has done its part."""

    def __init__(self, trainer: BlockTrainer, step: int) -> None:
        self._trainer, self._step = trainer, step

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._trainer.restore(self._step)


class OwnDraws(TrainerCallback):  # type: ignore[misc]
    """Gives each of several processes dropout of its own: the Trainer seeds all alike."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        torch.manual_seed(args.seed * 2**20 + rank())


class Saving(TrainerCallback):  # type: ignore[misc]
    """Asks for a checkpoint now and then, and for one before a requested end."""

    def __init__(self, request: Request, seconds: float) -> None:
        self._request, self._seconds = request, seconds
        self._saved = time.monotonic()
        self._postponed = False
        self._asked: int | None = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # What any of the processes was told, and what any clock says.
        late, asked = largest([time.monotonic() - self._saved >= self._seconds, self._request.number or 0])
        self._asked = asked or None
        wanted = control.should_save or (max(late, asked) > 0 and state.global_step < state.max_steps)
        # At the end of an epoch its validation comes first: a run resumed from between them would leave it out.
        self._postponed = wanted and float(state.epoch or 0.0).is_integer()
        control.should_save = wanted and not self._postponed

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        control.should_save = control.should_save or self._postponed
        self._postponed = False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._saved = time.monotonic()
        if self._asked is not None:
            message = f"stopped at step {state.global_step} of {state.max_steps}: `dvc repro` goes on from there"
            raise Interrupted(self._asked, message)
