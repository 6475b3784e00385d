"""Runs a stage from the command line: composes and checks its config, logs, and ends clearly on error."""

import argparse
import contextlib
import copy
import errno
import gc
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psutil
import yaml

from stages.core.compose import compose, load, read_root, stage_of
from stages.core.environment import restart_without_settings
from stages.core.errors import ConfigError, StageError, is_error, printable, printable_lines
from stages.shell.interruption import Interrupted, end_on_signals, end_this_process
from stages.shell.terminal import help_text, show_error

Schema = TypeVar("Schema")

log = logging.getLogger("stage")

# What makes a stage need half the memory, by stage.
_AT_ONCE = "halve hardware.evaluate_batch_tokens (conf/hardware; changes no figure)"
_HALVE_MEMORY = {
    "train": "halve hardware.per_device_batch_size (conf/hardware; null is the whole batch_size; gradients add up to"
    " the same step), or set trainer.activation_checkpointing: true (conf/task); framework: keras has neither, there"
    " halve batch_size; if it was in validation, " + _AT_ONCE,
    "evaluate": _AT_ONCE,
    "baseline": _AT_ONCE,
    "score": _AT_ONCE,
    "download": "a .json array is read whole: give it as .jsonl; data.count_near_duplicates: false (conf/data) holds no"
    " document in memory",
    "": "run it on a machine with more memory, or give it fewer or shorter documents (max_records in conf/data)",
}

# As torch, JAX and TensorFlow say it.
_NO_MEMORY = ("out of memory", "can't allocate memory", "resource_exhausted", "oom when allocating")
# Libraries raise errors of their own where the disk is full: safetensors, tokenizers.
_NO_SPACE = ("No space left on device", "os error 28")
_FREE_SPACE = (
    "free some (`dvc gc --workspace` keeps the workspace's artifacts alone; TMPDIR and LM_REPRO_CACHE move temporary"
    " files), then run the same command again"
)
_REMEDIES = {
    errno.EACCES: ": this user may not read or write there: change its owner or mode (chown, chmod)",
    errno.EROFS: ": nothing can be written there: run in a workspace on a writable disk",
    errno.ELOOP: ": a symbolic link that leads to itself",
}


def run(stage: str, schema: type[Schema], main: Callable[[Schema], None]) -> None:
    """Run `main` on the config of `stage` that its command line asks for; exit 1 if it fails."""
    arguments = _parse_arguments(stage)
    # Importing torch and transformers makes millions of objects that stay: looking through them again and again at the
    # usual threshold, and once more at the end, took 2.2 of evaluate's 12.4 s.
    gc.set_threshold(100_000, 20, 20)
    start_logging(stage)
    restart_without_settings()
    end_on_signals()
    end_with_dvc()
    started = time.monotonic()
    try:
        name, item = stage_of(stage, os.environ.get("DVC_STAGE", ""), arguments.overrides)
        composition = compose(name, arguments.overrides, item)
        if composition.item is not None:  # so that hardware.launch.started_by can repeat the command elsewhere
            sys.argv[1:] = [f"{read_root(name).each or 'task'}={composition.item}", *arguments.overrides]
        if composition.problems and (arguments.help or arguments.cfg):
            raise ConfigError(composition.problems)
        if arguments.help:
            documentation = sys.modules[main.__module__].__doc__ or ""
            sys.stdout.write(help_text(documentation, schema, composition.values, read_root(name).groups) + "\n")
        elif arguments.cfg:
            sys.stdout.write(yaml.safe_dump(composition.values, sort_keys=False, allow_unicode=True))
        else:
            main(load(schema, composition))
            log.info("done in %.1f s", time.monotonic() - started)
    except Interrupted as interrupted:
        log.error("%s", interrupted)
        sys.exit(interrupted.exit_code)
    except BaseException as error:
        if not is_error(error) or os.environ.get("LM_REPRO_DEBUG") == "1":
            raise
        show_error(stage, describe_error(error, stage))
        sys.exit(1)
    logging.shutdown()
    sys.stdout.flush()
    os._exit(0)


def _parse_arguments(stage: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m stages.{stage}",
        usage="%(prog)s [KEY=VALUE ...] [--cfg job] [--help]",
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--cfg", choices=("job",))
    parser.add_argument("--help", "-h", action="store_true")
    return parser.parse_intermixed_args()


def end_with_dvc() -> None:
    """Have this process end when the DVC that started it is gone; without one, do nothing.

    A killed `dvc repro` would leave its stage running, and the next one would run a second beside it. Training writes
    a checkpoint first, as after any SIGTERM.
    """
    ancestors = psutil.Process().parents()
    # DVC may have started the stage through a shell, and itself from one that may well end: `nohup dvc repro &`.
    dvc = next((process for process in ancestors if "dvc" in {Path(word).name for word in _words(process)}), None)
    if dvc is not None:
        threading.Thread(target=_end_after, args=[dvc], daemon=True).start()


def _end_after(dvc: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        while dvc.is_running() and dvc.status() != psutil.STATUS_ZOMBIE:
            time.sleep(1.0)
    log.error("the dvc that started this stage is gone: ending")
    end_this_process()


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()[:3]
    except psutil.Error:
        return []


def describe_error(error: BaseException, stage: str = "") -> str:
    """One or two lines for `error`: its own words where it was written for users, its type as well where it was not."""
    if isinstance(error, StageError):
        return str(error)
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or any(sign in text.lower() for sign in _NO_MEMORY):
        return f"out of memory{text and f' ({text})'}\n  {_HALVE_MEMORY.get(stage, _HALVE_MEMORY[''])}"
    if "DataLoader worker" in text:
        return (
            f"a process that loads batches was killed: out of memory, or of space in /dev/shm? ({text})\n"
            f"  {_HALVE_MEMORY.get(stage, _HALVE_MEMORY[''])}, or trainer.dataloader_num_workers: 0 (conf/hardware)"
        )
    if getattr(error, "errno", None) == errno.ENOSPC or any(sign in text for sign in _NO_SPACE):
        return f"no space left on the disk{_of(error)} ({text})\n  {_FREE_SPACE}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{_of(error)}{_REMEDIES.get(error.errno or 0, '')}"
    return f"{type(error).__name__}: {text} (LM_REPRO_DEBUG=1 shows where)"


def _of(error: BaseException) -> str:
    filename = getattr(error, "filename", None)
    return f": {printable(filename)}" if filename else ""


class _ToStderr(logging.Handler):
    """Writes lines to what stderr is now: a bar on a terminal takes its place, so that they come above the bar."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if isinstance(record.args, tuple):  # of which a name may hold a newline, to forge a line of the log
                shown = (printable(value, 2000) if isinstance(value, str | Path) else value for value in record.args)
                record = copy.copy(record)
                record.args = tuple(shown)
            sys.stderr.write(printable_lines(self.format(record)) + "\n")
        except Exception:  # as the handlers of logging do: a line that cannot be written ends no stage
            self.handleError(record)


def start_logging(stage: str) -> None:
    """Log lines `stage: text` to stderr, of the project's own modules from INFO up and of libraries from ERROR up."""
    handler = _ToStderr()
    handler.setFormatter(logging.Formatter(f"{stage}: %(message)s"))
    logging.basicConfig(level=logging.ERROR, handlers=[handler], force=True)
    # A stage's module is __main__, and __mp_main__ in the processes that it starts.
    for name in ("stage", "stages", "__main__", "__mp_main__"):
        logging.getLogger(name).setLevel(logging.INFO)
