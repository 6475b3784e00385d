"""transformers' Trainer with this project's order of blocks, batches, loss and validation."""

import contextlib
import json
import logging
import math
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import SaveStrategy

from stages.core.artifacts import Blocks
from stages.core.errors import StageError
from stages.model.block_loss import compute_block_loss
from stages.model.isolation import isolate_segments
from stages.model.loss import TokenLoss
from stages.model.masking import IGNORED
from stages.model.objectives import Objective
from stages.model.processes import broadcast_from_first, get_rank, get_world_size, max_over_processes, wait_for_all
from stages.shell.interruption import Interrupted, StopRequest
from stages.shell.progress import Progress
from stages.train.attention import use_fast_kernels
from stages.train.branches import Branches
from stages.train.checkpoints import Checkpoints, find_damage, remove_path
from stages.train.schema import CheckpointSettings
from stages.train.state_chain import StateChain, read_state_chain, write_state_chain

log = logging.getLogger(__name__)

_KEYS_PER_CHUNK = 2**16
LOSS_FILE = "loss_since_log-{}.json"  # one per process, by rank

_Batch = dict[str, torch.Tensor]


class EpochSampler(Sampler[int]):
    """Yields the keys `epoch * num_blocks + block` of an epoch in an order that only depends on (seed, epoch).

    Filler keys `~key` follow, until the number of keys is a multiple of `rows_per_batch`. A filler key stands for a row
    without predicted tokens. All batches then have the same shape (another shape would compile the model again), and
    Accelerate does not repeat rows to fill the last batch.
    """

    def __init__(self, num_blocks: int, seed: int, rows_per_batch: int) -> None:
        """
        Args:
            rows_per_batch: rows that all processes together take per forward pass.
        """
        self._num_blocks, self._seed, self._num_fillers = num_blocks, seed, -num_blocks % rows_per_batch
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return self._num_blocks + self._num_fillers

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed * 2**20 + self._epoch)
        keys = self._epoch * self._num_blocks + torch.randperm(self._num_blocks, generator=generator)
        # [num_blocks] int64, converted to Python integers chunk by chunk: a list of all takes five times the memory.
        for chunk in torch.split(keys, _KEYS_PER_CHUNK):
            yield from chunk.tolist()
        yield from [~int(keys[0])] * self._num_fillers


class TrainingBlocks(Dataset[_Batch]):
    """Data set that builds whole batches from the keys of EpochSampler.

    It has no state: the epoch is part of the key, so any worker process builds the same batch.
    """

    def __init__(self, blocks: Blocks, objective: Objective, seed: int) -> None:
        self._blocks, self._objective, self._seed = blocks, objective, seed

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitems__(self, keys: list[int]) -> _Batch:
        """Build the batch for `keys`, as `Objective.build_batch`; all labels of a filler key's row are IGNORED."""
        block_keys = [max(key, ~key) for key in keys]  # a filler key ~key has the tokens of `key`
        epoch = block_keys[0] // len(self)  # a batch never spans epochs
        indices = [key % len(self) for key in block_keys]
        batch = self._objective.build_batch(
            self._blocks[indices], indices, self._seed, epoch, self._blocks.get_marks(indices)
        )
        batch["labels"][torch.tensor(keys) < 0] = IGNORED
        return batch


def _return_batch(batch: _Batch) -> _Batch:
    """Collate nothing: TrainingBlocks already returns a batch."""
    return batch


class BlockTrainer(Trainer):  # type: ignore[misc]
    """Trainer on blocks, with a token-weighted loss, and validation by the code of the metrics."""

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
        saves_per_process: bool = False,
        branches: Branches | None = None,
        schedule_steps: int | None = None,
    ) -> None:
        """
        Args:
            train: training blocks.
            validation: validation blocks.
            evaluate_batch_tokens: tokens per forward pass in validation.
            saves_per_process: if True, each process writes its part of a checkpoint into its own directory; otherwise
                all processes share one directory.
            branches: kept checkpoints; None: none are kept or used.
            schedule_steps: number of steps that the schedule of the learning rate spans; None: those of the training.
        """

        def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | None = None) -> torch.Tensor:
            # Scalar: sum over tokens / number of predicted tokens of the whole step. Unlike the losses of RoBERTa, BERT
            # and GPT-2 in transformers, this is correct with gradient accumulation and several processes. The loss of a
            # step without a masked token is 0.
            assert num_items_in_batch is not None
            nats = self._loss.sum_nats(outputs.logits, objective.get_targets(labels))
            return nats / torch.clamp(num_items_in_batch, min=1)

        use_fast_kernels(model, arguments.device.type)  # the device to which the Trainer moves it
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=TrainingBlocks(train, objective, arguments.seed),
            eval_dataset=validation,
            data_collator=_return_batch,
            compute_loss_func=loss,
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)
        self._checkpoints = Checkpoints(Path(arguments.output_dir), checkpoints.keep)
        self._seconds_between_checkpoints = 60.0 * checkpoints.minutes
        self._saves_per_process = saves_per_process
        self._branches, self._schedule_steps = branches, schedule_steps
        self.state_chain = StateChain()
        self.add_callback(self.state_chain)
        self._loss = TokenLoss(model)
        self._objective, self._validation, self._evaluate_batch_tokens = objective, validation, evaluate_batch_tokens

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        rows_per_batch = self.args.train_batch_size * get_world_size()
        self._sampler = EpochSampler(len(self.train_dataset), self.args.seed, rows_per_batch)
        return self._sampler

    def compute_loss(self, model: Any, inputs: _Batch, *arguments: Any, **named: Any) -> Any:
        # The Trainer's autocast only covers the forward pass, but here the output embedding is part of the loss.
        with self.accelerator.autocast(), self._loss.hidden_outputs():
            return super().compute_loss(model, isolate_segments(inputs, self.model), *arguments, **named)

    def train_or_resume(self, request: StopRequest) -> None:
        """Train to the end, from the newest checkpoint if there is one.

        Raises:
            Interrupted: if a stop was requested; a checkpoint has then been written.
        """
        more_steps = self._branches.keep_steps if self._branches is not None else ()
        self.add_callback(CheckpointSchedule(request, self._seconds_between_checkpoints, more_steps))
        step = broadcast_from_first(None if get_rank() else self._find_resume_step())
        if step is None:
            if get_world_size() > 1:
                self.add_callback(ProcessSeed())
            self.train()
            return
        log.info("resuming from step %d", step)
        self._resume(step)

    def _resume(self, step: int) -> None:
        """Train from the checkpoint of `step` to the end."""
        self.args.eval_on_start = False  # the checkpoint has the result of that evaluation
        self.add_callback(_CheckpointRestorer(self, step))
        self.train(resume_from_checkpoint=str(self._checkpoints.get_path(step)))

    def replay_steps(self, first: int, last: int) -> list[str]:
        """Train from the kept checkpoint of step `first` to step `last`; return the links of steps first + 1 to last.

        Args:
            first: 0, or a step of a kept checkpoint.

        Raises:
            StageError: if the kept checkpoint is damaged.
        """
        self.args.load_best_model_at_end, self.args.save_strategy = False, SaveStrategy.NO
        self.add_callback(_StopAfterStep(last))
        if first == 0:
            self.train()
            return self.state_chain.links
        if self._branches is None or self._branches.fetch_checkpoint(self._checkpoints, [first]) is None:
            raise StageError(f"the kept checkpoint of step {first} is missing or damaged")
        self._resume(first)
        return self.state_chain.links[first:]

    def _find_resume_step(self) -> int | None:
        """Return the step to resume from, or None: that of the newest checkpoint, or of a kept one of a later step."""
        step = self._find_own_step()
        if self._branches is None:
            return step
        later_steps = [kept_step for kept_step in self._branches.list_steps() if kept_step > (step or 0)]
        kept_step = self._branches.fetch_checkpoint(self._checkpoints, later_steps)
        if kept_step is not None:
            log.info("the first %d steps are taken from a kept checkpoint", kept_step)
        return kept_step or step

    def _find_own_step(self) -> int | None:
        """Return the step of the newest checkpoint from which training can be resumed, or None.

        If the best model is needed at the end, its checkpoint must be intact too.
        """
        while (step := self._checkpoints.find_newest()) is not None:
            state = json.loads((self._checkpoints.get_path(step) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
            if not _would_train_too_far(state):
                break
            remove_path(self._checkpoints.get_path(step))
        else:
            return None
        best = state["best_global_step"]
        damage = find_damage(self._checkpoints.get_path(best)) if self.args.load_best_model_at_end and best else None
        if damage is not None:
            log.warning(
                "the checkpoint of the best step, %d, is damaged (%s): training starts again from scratch", best, damage
            )
            self._checkpoints.remove_all()  # their steps are higher than those of the next checkpoints
            return None
        return step

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step, best, directory = self.state.global_step, self.state.best_global_step, self.args.output_dir
        # Process 0 creates the directory and completes it after the others have written their files; several machines
        # need a shared disk. With saves_per_process, each process does this with its own directory.
        writes = self._saves_per_process or not get_rank()
        with self._checkpoints.write_checkpoint(step, best, get_rank()) if writes else contextlib.nullcontext() as mine:
            aside = Path(str(mine) if self._saves_per_process else broadcast_from_first(str(mine)))
            self.args.output_dir = str(aside)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.args.output_dir = directory
            # Part of the mean loss in the next log line, which the Trainer does not save.
            loss = {"sum": self._tr_loss.item(), "since_step": self._globalstep_last_logged}
            checkpoint = aside / f"checkpoint-{step}"
            (checkpoint / LOSS_FILE.format(get_rank())).write_text(json.dumps(loss), encoding="utf-8")
            if writes:
                write_state_chain(checkpoint, self.state_chain.links)
            wait_for_all()
        wait_for_all()
        stopped_early = self.control.should_training_stop and step < self.state.max_steps
        if self._branches is not None and step in self._branches.keep_steps and not stopped_early and not get_rank():
            self._branches.keep_checkpoint(self._checkpoints, step, best)
        if best:
            self.state.best_model_checkpoint = str(self._checkpoints.get_path(best))

    def restore_from_checkpoint(self, step: int) -> None:
        """Restore the state that the Trainer does not restore from the checkpoint of `step`."""
        loss = json.loads((self._checkpoints.get_path(step) / LOSS_FILE.format(get_rank())).read_text(encoding="utf-8"))
        self.state_chain.links = read_state_chain(self._checkpoints.get_path(step))
        if not self.state.global_step == len(self.state_chain.links) == step:
            raise StageError(f"the checkpoint of step {step} is damaged: it has the state of another step")
        self._restore_learning_rate()
        self._tr_loss.fill_(loss["sum"])
        self._globalstep_last_logged = loss["since_step"]
        # With several processes, Accelerate wraps the sampler once more than the Trainer's own call unwraps.
        self._sampler.set_epoch(int(self.state.epoch or 0))
        if self.state.best_global_step:  # the cache may have been moved since
            self.state.best_model_checkpoint = str(self._checkpoints.get_path(self.state.best_global_step))

    def _restore_learning_rate(self) -> None:
        """Set the learning rate of the next step by the schedule of this run.

        A checkpoint has the rate of the run that wrote it, whose schedule may differ from the next step on.
        """
        schedule = self.lr_scheduler
        if isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
            factors = [compute_factor(schedule.last_epoch) for compute_factor in schedule.lr_lambdas]
            schedule._last_lr = [base * factor for base, factor in zip(schedule.base_lrs, factors, strict=True)]
            for group, rate in zip(self.optimizer.param_groups, schedule._last_lr, strict=True):
                group["lr"] = rate

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        return super().create_scheduler(self._schedule_steps or num_training_steps, optimizer)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Compute the validation loss as stage evaluate does. (The Trainer would weight all batches equally.)"""
        metrics = {
            "eval_loss": compute_block_loss(self.model, self._objective, self._validation, self._evaluate_batch_tokens)
        }
        self.log(dict(metrics))
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def _would_train_too_far(state: Mapping[str, Any]) -> bool:
    """Return True if the Trainer would train more steps than an uninterrupted run if it resumed from a checkpoint.

    That is so for a checkpoint written after early stopping, or at a last step inside an epoch. At the end of the last
    epoch, no step is left.

    Args:
        state: content of the checkpoint's trainer_state.json.
    """
    had_ended: bool = state["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"]
    no_step_left = state["global_step"] >= state["max_steps"] and float(state["epoch"]).is_integer()
    return had_ended and not no_step_left


class TrainingProgress(TrainerCallback):  # type: ignore[misc]
    """Shows steps, loss, tokens per second and the remaining time during training."""

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
        for name in ("loss", "eval_loss", "train_loss"):  # train_loss includes the steps after the last log
            if logs and not math.isfinite(logs.get(name, 0.0)):
                saved_steps = Checkpoints(Path(args.output_dir), 1).list_steps()
                earlier = [step for step in saved_steps if step < state.global_step]
                raise StageError(
                    f"{name} is {logs[name]} at step {state.global_step}: training has diverged; lower learning_rate"
                    + (f" (the last checkpoint: {args.output_dir}/checkpoint-{earlier[-1]})" if earlier else "")
                )
        if logs and "loss" in logs:
            self._loss = f"loss {float(logs['loss']):.4f}, "
        if logs and "eval_loss" in logs:
            log.info("step %d/%d: validation loss %.4f", state.global_step, state.max_steps, logs["eval_loss"])

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        assert self._progress is not None
        self._progress.close()


class _CheckpointRestorer(TrainerCallback):  # type: ignore[misc]
    """Completes the resumption from a checkpoint after the Trainer has restored its part."""

    def __init__(self, trainer: BlockTrainer, step: int) -> None:
        self._trainer, self._step = trainer, step

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._trainer.restore_from_checkpoint(self._step)


class _StopAfterStep(TrainerCallback):  # type: ignore[misc]
    """Ends training after a step. Inside an epoch, nothing is then logged or evaluated as at its end."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step >= self._step:
            control.should_training_stop = True

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step < state.max_steps and not float(state.epoch or 0.0).is_integer():
            control.should_log = control.should_evaluate = False


class ProcessSeed(TrainerCallback):  # type: ignore[misc]
    """Seeds each process differently, so that their dropout differs. (The Trainer seeds all processes alike.)"""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        torch.manual_seed(args.seed * 2**20 + get_rank())


class CheckpointSchedule(TrainerCallback):  # type: ignore[misc]
    """Requests a checkpoint at regular intervals, and one before training stops on request."""

    def __init__(self, request: StopRequest, seconds: float, more_steps: Collection[int] = ()) -> None:
        """
        Args:
            seconds: interval between checkpoints.
            more_steps: steps that get a checkpoint in addition.
        """
        self._request, self._seconds, self._more_steps = request, seconds, more_steps
        self._last_saved = time.monotonic()
        self._postponed = False
        self._signal_number: int | None = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # A signal to any process counts for all, and so does the clock of any process.
        is_due, signal_number = max_over_processes(
            [time.monotonic() - self._last_saved >= self._seconds, self._request.number or 0]
        )
        self._signal_number = signal_number or None
        is_wanted = control.should_save or state.global_step in self._more_steps
        is_wanted = is_wanted or (max(is_due, signal_number) > 0 and state.global_step < state.max_steps)
        # At the end of an epoch, validation comes before the checkpoint: a run resumed in between would skip it.
        self._postponed = is_wanted and float(state.epoch or 0.0).is_integer()
        control.should_save = is_wanted and not self._postponed

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        control.should_save = control.should_save or self._postponed
        self._postponed = False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._last_saved = time.monotonic()
        if self._signal_number is not None and state.global_step < state.max_steps:
            message = f"stopped at step {state.global_step} of {state.max_steps}: `dvc repro` continues from there"
            raise Interrupted(self._signal_number, message)
