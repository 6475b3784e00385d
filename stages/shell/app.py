"""What makes a module a stage: a Hydra application that checks its config, logs, and ends clearly on error."""

import errno
import gc
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import hydra
import psutil
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig

from stages.core.config import CONF, choices, load
from stages.core.errors import StageError
from stages.shell.interruption import Interrupted, end_on_signals
from stages.shell.terminal import help_text, show_error

Schema = TypeVar("Schema")

# A stage writes its outs and nothing else, so Hydra gets no run directory and no log files.
WRITE_NOTHING = ("hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none")

log = logging.getLogger("stage")

# What makes a stage need half the memory, by stage.
_AT_ONCE = "halve hardware.evaluate_batch_tokens (conf/hardware; changes no figure)"
HALVE_MEMORY = {
    "train": "halve hardware.per_device_batch_size (conf/hardware; null is the whole batch_size; gradients add up to"
    " the same step), or set trainer.activation_checkpointing: true (conf/task); framework: keras has neither, there"
    " halve batch_size; if it was in validation, " + _AT_ONCE,
    "evaluate": _AT_ONCE,
    "baseline": _AT_ONCE,
    "download": "a .json array is read whole: give it as .jsonl; data.count_near_duplicates: false (conf/data) holds no"
    " document in memory",
    "": "run it on a machine with more memory, or give it fewer or shorter documents (max_records in conf/data)",
}

# As torch, JAX and TensorFlow say it.
NO_MEMORY = ("out of memory", "can't allocate memory", "resource_exhausted", "oom when allocating")
# Libraries raise errors of their own where the disk is full: safetensors, tokenizers, SQLite.
NO_SPACE = ("No space left on device", "os error 28", "database or disk is full")
FREE_SPACE = (
    "free some (`dvc gc --workspace` keeps the workspace's artifacts alone; TMPDIR and LM_REPRO_CACHE move temporary"
    " files), then run the same command again"
)
REMEDIES = {
    errno.EACCES: ": this user may not read or write there: change its owner or mode (chown, chmod)",
    errno.EROFS: ": nothing can be written there: run in a workspace on a writable disk",
    errno.ELOOP: ": a symbolic link that leads to itself",
}


def run(stage: str, schema: type[Schema], main: Callable[[Schema], None]) -> None:
    """Run `main` on the config that Hydra composes for `stage` from conf/ and the command line; exit 1 on an error."""
    if place := names_a_target(sys.argv[1:]):
        show_error(stage, f"{place} would have Hydra call code, which none of this project's may: take it out")
        sys.exit(1)
    if {"--help", "-h"} & set(sys.argv[1:]):
        document(stage, schema, sys.modules[main.__module__].__doc__ or "")
        return
    sys.argv[1:1] = WRITE_NOTHING
    # Importing torch and transformers makes millions of objects that stay: looking through them again and again at the
    # usual threshold, and once more at the end, took 2.2 of evaluate's 12.4 s.
    gc.set_threshold(100_000, 20, 20)

    def job(composed: DictConfig) -> None:
        start_logging(stage)
        end_on_signals()
        threading.Thread(target=end_with_dvc, daemon=True).start()
        started = time.monotonic()
        try:
            main(load(schema, composed, stage, unchosen_groups()))
        except Interrupted as interrupted:
            log.error("%s", interrupted)
            sys.exit(interrupted.exit_code)
        except Exception as error:
            if os.environ.get("LM_REPRO_DEBUG") == "1":
                raise
            show_error(stage, describe(error, stage))
            sys.exit(1)
        log.info("done in %.1f s", time.monotonic() - started)

    hydra.main(version_base="1.3", config_path=str(CONF), config_name=stage)(job)()
    logging.shutdown()
    sys.stdout.flush()
    os._exit(0)


def document(stage: str, schema: Any, documentation: str) -> None:
    """Print help for `stage`, with the values of the configurations that the command line chooses."""
    overrides = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            composed = hydra.compose(stage, overrides)
    except HydraException as error:
        show_error(stage, str(error))
        sys.exit(1)
    root = yaml.safe_load((CONF / f"{stage}.yaml").read_text(encoding="utf-8"))
    groups = [group for entry in root["defaults"] if isinstance(entry, dict) for group in entry]
    choices_of = {group: choices(group) for group in groups}
    sys.stdout.write(help_text(documentation, schema, composed, choices_of) + "\n")


def names_a_target(arguments: list[str], conf: Path = CONF) -> str:
    """The argument or the file of `conf` that names something for Hydra to call; empty where none does.

    Stages call nothing by names in a config, but Hydra does before they begin: its callbacks, launcher and sweeper. Its
    own list of what it calls is wider than what a conf/ that one was sent should be able to.
    """
    for argument in arguments:
        if "_target_" in argument or argument.lstrip("+").startswith(("hydra.callbacks", "hydra/callbacks")):
            return argument
    for file in sorted(conf.rglob("*.yaml")):
        try:
            keys = set(_keys(yaml.load(file.read_text(encoding="utf-8"), yaml.SafeLoader)))
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            continue  # Hydra says so of a file that is chosen
        if found := keys & {"_target_", "hydra"}:
            return f"{min(found)} in {file}"
    return ""


def _keys(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from _keys(item)
    elif isinstance(value, list):
        for item in value:
            yield from _keys(item)


def unchosen_groups() -> list[str]:
    """The config groups of the running stage for which the command line names no configuration."""
    choices = HydraConfig.get().runtime.choices
    return [group for group, choice in choices.items() if choice is None and not group.startswith("hydra/")]


def end_with_dvc() -> None:
    """End this process when the DVC that started it is gone; without one, do nothing.

    A killed `dvc repro` would leave its stage running, and the next one would run a second beside it.
    """
    ancestors = psutil.Process().parents()
    # DVC may have started the stage through a shell, and itself from one that may well end: `nohup dvc repro &`.
    dvc = next((process for process in ancestors if "dvc" in {Path(word).name for word in _words(process)}), None)
    while dvc is not None and dvc.is_running() and dvc.status() != psutil.STATUS_ZOMBIE:
        time.sleep(1.0)
    if dvc is not None:
        log.error("the dvc that started this stage is gone: ending")
        os.kill(os.getpid(), signal.SIGKILL)


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()[:3]
    except psutil.Error:
        return []


def describe(error: Exception, stage: str = "") -> str:
    """One or two lines for `error`: its own words where it was written for users, its type as well where it was not."""
    if isinstance(error, StageError):
        return str(error)
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or any(sign in text.lower() for sign in NO_MEMORY):
        return f"out of memory{text and f' ({text})'}\n  {HALVE_MEMORY.get(stage, HALVE_MEMORY[''])}"
    if getattr(error, "errno", None) == errno.ENOSPC or any(sign in text for sign in NO_SPACE):
        return f"no space left on the disk{_of(error)} ({text})\n  {FREE_SPACE}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{_of(error)}{REMEDIES.get(error.errno or 0, '')}"
    return f"{type(error).__name__}: {text} (LM_REPRO_DEBUG=1 shows where)"


def _of(error: Exception) -> str:
    filename = getattr(error, "filename", None)
    return f": {filename}" if filename else ""


class ToStderr(logging.Handler):
    """Writes lines to what stderr is now: a bar on a terminal takes its place, so that they come above the bar."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(self.format(record) + "\n")
        except Exception:  # as the handlers of logging do: a line that cannot be written ends no stage
            self.handleError(record)


def start_logging(stage: str) -> None:
    """Log lines `stage: text` to stderr, of the project's own modules from INFO up and of libraries from ERROR up."""
    handler = ToStderr()
    handler.setFormatter(logging.Formatter(f"{stage}: %(message)s"))
    logging.basicConfig(level=logging.ERROR, handlers=[handler], force=True)
    # A stage's module is __main__, and __mp_main__ in the processes that it starts.
    for name in ("stage", "stages", "__main__", "__mp_main__"):
        logging.getLogger(name).setLevel(logging.INFO)
