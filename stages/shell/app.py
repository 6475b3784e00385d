"""Command line of a stage: compose and check its config, log, and report errors."""

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

from stages.core.compose import compose_config, identify_stage, load_config, read_root
from stages.core.environment import restart_without_settings
from stages.core.errors import ConfigError, StageError, is_error, printable, printable_lines
from stages.shell.interruption import Interrupted, end_on_signals, end_this_process
from stages.shell.terminal import show_error

Schema = TypeVar("Schema")

log = logging.getLogger("stage")

# Stage to how its memory can be halved.
_HALVE_EVALUATION = "halve hardware.evaluate_batch_tokens (conf/hardware; results stay the same)"
_HALVE_MEMORY = {
    "train": "halve hardware.per_device_batch_size (conf/hardware; null means batch_size; gradients accumulate to the"
    " same step), or set trainer.activation_checkpointing: true (conf/task); with framework: keras, which has"
    " neither, halve batch_size; if it happened during validation, " + _HALVE_EVALUATION,
    "evaluate": _HALVE_EVALUATION,
    "baseline": _HALVE_EVALUATION,
    "score": _HALVE_EVALUATION,
    "download": "a .json array is read as a whole: convert it to .jsonl; data.count_near_duplicates: false (conf/data)"
    " keeps no document in memory",
    "": "run it on a machine with more memory, or with fewer or shorter documents (max_records in conf/data)",
}

# Parts of the messages of torch, JAX and TensorFlow.
_NO_MEMORY = ("out of memory", "can't allocate memory", "resource_exhausted", "oom when allocating")
# Parts of the messages of safetensors and tokenizers, which do not raise OSError.
_NO_SPACE = ("No space left on device", "os error 28")
_FREE_SPACE = (
    "free some (`dvc gc --workspace` only keeps the artifacts of the workspace; TMPDIR and LM_REPRO_CACHE move"
    " temporary files), then run the same command again"
)
_REMEDIES = {
    errno.EACCES: ": this user may not read or write it: change its owner or mode (chown, chmod)",
    errno.EROFS: ": the file system is read-only: run in a workspace on a writable disk",
    errno.ELOOP: ": a symbolic link that points to itself",
}


def run(stage: str, schema: type[Schema], main: Callable[[Schema], None]) -> None:
    """Run `main` on the config of `stage`, composed with the overrides of the command line; exit 1 on error."""
    arguments = _parse_arguments(stage, sys.modules[main.__module__].__doc__ or "")
    # Importing torch and transformers creates millions of objects that live until the end. Collecting at the default
    # threshold, and once more at exit, took 2.2 of evaluate's 12.4 s.
    gc.set_threshold(100_000, 20, 20)
    start_logging(stage)
    restart_without_settings()
    end_on_signals()
    end_with_dvc()
    started = time.monotonic()
    try:
        name, item = identify_stage(stage, os.environ.get("DVC_STAGE", ""), arguments.overrides)
        composition = compose_config(name, arguments.overrides, item)
        if composition.item is not None:  # so that hardware.launch.started_by can repeat the command on other machines
            sys.argv[1:] = [f"{read_root(name).item_kind or 'task'}={composition.item}", *arguments.overrides]
        if arguments.cfg:
            if composition.problems:
                raise ConfigError(composition.problems)
            sys.stdout.write(yaml.safe_dump(composition.values, sort_keys=False, allow_unicode=True))
        else:
            main(load_config(schema, composition))
            log.info("done in %.1f s", time.monotonic() - started)
    except Interrupted as interrupted:
        log.error("%s", interrupted)
        sys.exit(interrupted.exit_code)
    except BaseException as error:
        if not is_error(error) or os.environ.get("LM_REPRO_DEBUG") == "1":
            raise
        show_error(stage, format_error(error, stage))
        sys.exit(1)
    logging.shutdown()
    sys.stdout.flush()
    os._exit(0)


def _parse_arguments(stage: str, documentation: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m stages.{stage}",
        usage="%(prog)s [KEY=VALUE ...] [--cfg job]",
        description=documentation,
        epilog=f"`python -m tools.keys {stage}` describes each key.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="override of a value, or GROUP=NAME")
    parser.add_argument("--cfg", choices=("job",), help="print the composed configuration and exit")
    return parser.parse_intermixed_args()


def end_with_dvc() -> None:
    """Terminate this process when the DVC process that started it is gone; do nothing if DVC did not start it.

    Otherwise a killed `dvc repro` would leave its stage running, and the next one would start a second process.
    Training writes a checkpoint first, as after any SIGTERM.
    """
    ancestors = psutil.Process().parents()
    # DVC may start the stage through a shell, and its own parent may end before it: `nohup dvc repro &`.
    names = ({Path(word).name for word in _read_command_line(process)} for process in ancestors)
    dvc = next((process for process, words in zip(ancestors, names, strict=True) if "dvc" in words), None)
    if dvc is not None:
        threading.Thread(target=_watch_dvc, args=[dvc], daemon=True).start()


def _watch_dvc(dvc: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        while dvc.is_running() and dvc.status() != psutil.STATUS_ZOMBIE:
            time.sleep(1.0)
    log.error("the dvc that started this stage is gone: ending")
    end_this_process()


def _read_command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()[:3]
    except psutil.Error:
        return []


def format_error(error: BaseException, stage: str = "") -> str:
    """Return one or two lines about `error`: its message, and also its type if the message is not meant for users."""
    if isinstance(error, StageError):
        return str(error)
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or any(sign in text.lower() for sign in _NO_MEMORY):
        return f"out of memory{text and f' ({text})'}\n  {_HALVE_MEMORY.get(stage, _HALVE_MEMORY[''])}"
    if "DataLoader worker" in text:
        return (
            f"a process that loads batches was killed: is memory or /dev/shm full? ({text})\n"
            f"  {_HALVE_MEMORY.get(stage, _HALVE_MEMORY[''])}, or trainer.dataloader_num_workers: 0 (conf/hardware)"
        )
    if getattr(error, "errno", None) == errno.ENOSPC or any(sign in text for sign in _NO_SPACE):
        return f"no space left on the disk{_format_file_name(error)} ({text})\n  {_FREE_SPACE}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{_format_file_name(error)}{_REMEDIES.get(error.errno or 0, '')}"
    return f"{type(error).__name__}: {text} (LM_REPRO_DEBUG=1 shows the traceback)"


def _format_file_name(error: BaseException) -> str:
    filename = getattr(error, "filename", None)
    return f": {printable(filename)}" if filename else ""


class _StderrHandler(logging.Handler):
    """Writes to the current sys.stderr: a progress bar replaces it, so that lines appear above the bar."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if isinstance(record.args, tuple):  # a name may contain a newline, to forge a log line
                shown = (printable(value, 2000) if isinstance(value, str | Path) else value for value in record.args)
                record = copy.copy(record)
                record.args = tuple(shown)
            sys.stderr.write(printable_lines(self.format(record)) + "\n")
        except Exception:  # as in logging's own handlers: a failing log line does not end the stage
            self.handleError(record)


def start_logging(stage: str) -> None:
    """Log to stderr as `stage: text`: INFO and above of the project's modules, ERROR and above of libraries."""
    handler = _StderrHandler()
    handler.setFormatter(logging.Formatter(f"{stage}: %(message)s"))
    logging.basicConfig(level=logging.ERROR, handlers=[handler], force=True)
    # The module of a stage is __main__, and __mp_main__ in the processes that it starts.
    for name in ("stage", "stages", "__main__", "__mp_main__"):
        logging.getLogger(name).setLevel(logging.INFO)
