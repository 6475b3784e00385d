"""Runs a stage in several processes, through torch's launcher."""

import contextlib
import ctypes
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from multiprocessing import resource_tracker
from typing import Any

import psutil
from pydantic import TypeAdapter

from stages.core.config import flatten_values
from stages.core.errors import StageError
from stages.model.hardware import Launch, check_device
from stages.shell.app import end_with_dvc, format_error, start_logging
from stages.shell.interruption import GRACE_SECONDS, SIGNAL_EXIT_CODES, Interrupted, end_on_signals

_LOOPBACK = "127.0.0.1"


class _ProcessError(Exception):
    """Error of one of several processes, with a message for users."""


def run_in_processes(
    stage: str,
    work: Callable[[Any], None],
    config: Any,
    reserve_name: Callable[[Any], contextlib.AbstractContextManager[str]] | None = None,
) -> None:
    """Run `work(config)` in the processes that config.hardware describes, or in this process if it describes none.

    Args:
        work: a module-level function of the stage, so that it can be pickled.
        reserve_name: context manager that yields a name for the checkpoints of a run, stable across restarts and
            reserved for this run inside the block; None: the stage writes no checkpoints.

    Raises:
        StageError: the error of the first process that failed; the others have then been stopped.
        Interrupted: if a signal stopped the processes.
    """
    launch = config.hardware.launch
    if config.hardware.ray is not None:
        from stages.launch.ray import run_on_ray

        with contextlib.nullcontext() if reserve_name is None else reserve_name(config) as name:
            run_on_ray(stage, work, config, name)
        return
    if launch is None:
        work(config)
        return
    if launch.started_by:
        _start_everywhere(stage, launch)
        return
    import torch
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    num_local = launch.processes_per_machine or torch.cuda.device_count()
    if not num_local:
        raise StageError(
            "hardware.launch.processes_per_machine: null means one process per GPU, but this machine has no GPU; set a"
            " number"
        )
    check_device(config.hardware)
    is_single_machine = launch.machines == 1
    if is_single_machine:
        # Nothing may listen beyond the loopback interface. By default gloo listens on the interface of the machine's
        # name, and torch's TCP stores, which unpickle the messages that they receive, on all interfaces.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _find_loopback_interface())
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    for name in ("torch.distributed", "torch.multiprocessing"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # this function reports the same errors
    with tempfile.TemporaryDirectory() if is_single_machine else contextlib.nullcontext() as meeting:
        description = LaunchConfig(
            min_nodes=launch.machines,
            max_nodes=launch.machines,
            nproc_per_node=num_local,
            rdzv_backend="c10d",
            rdzv_endpoint=f"{meeting}/launcher" if is_single_machine else str(launch.rendezvous),
            rdzv_configs={"store_type": "file" if is_single_machine else "tcp"},
            run_id=stage,
            local_addr=_LOOPBACK if is_single_machine else None,
            max_restarts=0,
            shutdown_timeout=int(GRACE_SECONDS),
            signals_to_handle="",  # end_on_signals handles them; torch's handlers stop waiting at a second signal
        )
        _start_resource_tracker()
        try:
            elastic_launch(description, _worker_main)(
                stage, work, config, f"file://{meeting}/processes" if is_single_machine else "env://"
            )
        except RendezvousError as error:
            reason = format_error(error.__cause__ if isinstance(error.__cause__, Exception) else error)[:200]
            raise StageError(
                f"hardware.launch.rendezvous={launch.rendezvous}: the machines could not connect there: {reason}"
            ) from None
        except ChildFailedError as error:
            raise _convert_child_error(error, num_local * launch.machines) from None


def _start_resource_tracker() -> None:
    """Start multiprocessing's resource tracker with SIGHUP blocked. (It already ignores SIGINT and SIGTERM.)

    If a signal ended the tracker before the processes end, they would print a traceback.
    """
    previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})  # inherited by the tracker
    try:
        resource_tracker.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)


def _convert_child_error(error: Any, num_processes: int) -> BaseException:
    """Convert a ChildFailedError to the exception of the first of `num_processes` processes that failed."""
    rank, failure = error.get_first_failure()
    if failure.exitcode in SIGNAL_EXIT_CODES:
        return Interrupted(failure.exitcode - 128)
    message = failure.message["message"] if isinstance(failure.message, dict) else failure.message
    message = message.removeprefix(f"{_ProcessError.__name__}: ")
    return StageError(f"process {rank} of {num_processes}: {message}")


def _start_everywhere(stage: str, launch: Launch) -> None:
    """Run this stage's command on every machine with launch.started_by, and wait until all of them have ended.

    Each command starts the processes of its machine.

    Raises:
        StageError: if the command failed on a machine; it has printed the error.
        Interrupted: if a signal stopped the commands.
    """
    words = [word.replace("{machines}", str(launch.machines)) for word in launch.started_by or ()]
    rendezvous = launch.rendezvous or f"{socket.gethostname()}:{_find_free_port()}"
    overrides = ["hardware.launch.started_by=null", f"hardware.launch.rendezvous='{rendezvous}'"]
    command = [*words, sys.executable, "-m", f"stages.{stage}", *sys.argv[1:], *overrides]
    try:
        process = subprocess.Popen(command, preexec_fn=_end_with_parent if sys.platform == "linux" else None)
    except (OSError, subprocess.SubprocessError) as error:
        raise StageError(f"hardware.launch.started_by: {words[0]}: {format_error(error)}") from None
    try:
        code = process.wait()
    except Interrupted:
        process.send_signal(signal.SIGTERM)  # srun forwards it to its tasks, but at SIGINT it only prints their state
        process.wait()
        raise
    if code in SIGNAL_EXIT_CODES:
        raise Interrupted(code - 128)
    if code:
        raise StageError(f"{words[0]} ended with exit code {code}; the error is above")


def _end_with_parent() -> None:
    """Make Linux send SIGTERM to this process when its parent ends for any reason."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _find_free_port() -> int:
    """Find a free TCP port on this machine."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _worker_main(stage: str, work: Callable[[Any], None], config: Any, meeting: str) -> None:
    """Entry point of each process; `meeting` is the init_method of torch's init_process_group."""
    import torch
    import torch.distributed as dist

    if int(os.environ["RANK"]) > 0:
        logging.disable(logging.INFO)
        os.environ["NO_COLOR"] = "1"  # no progress bar
    os.environ["OMP_NUM_THREADS"] = str(config.hardware.num_threads)  # otherwise Accelerate sets it
    start_logging(stage)
    end_on_signals()
    end_with_dvc()
    try:
        if config.hardware.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(
            config.hardware.backend,
            init_method=meeting,
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
        )
        if config.hardware.launch.machines > 1:
            _check_same_config(config)
        work(config)
        dist.destroy_process_group()
    except Interrupted as interrupted:
        if os.environ["RANK"] == "0":
            logging.getLogger("stage").error("%s", interrupted)
        raise SystemExit(interrupted.exit_code) from None
    except Exception as error:
        if os.environ.get("LM_REPRO_DEBUG") == "1":
            raise
        raise _ProcessError(format_error(error, stage)) from None


def _check_same_config(config: Any) -> None:
    """Raise StageError in every process if they were not all started with the same config.

    The commands of several machines can differ, and the result of training with two configs would match neither.
    """
    from stages.model.processes import broadcast_from_first, gather_from_all

    values = dict(flatten_values(TypeAdapter(type(config)).dump_python(config, mode="json")))
    for key in ("rendezvous", "started_by"):  # may differ
        values.pop(f"hardware.launch.{key}", None)
    first = broadcast_from_first(values)
    differing_keys = gather_from_all(sorted(key for key in first | values if first.get(key) != values.get(key)))
    for rank, keys in enumerate(differing_keys):
        if keys:
            raise StageError(f"process {rank} was started with other values than process 0: {', '.join(keys)}")


def _find_loopback_interface() -> str:
    """Return the name of the loopback network interface."""
    addresses = psutil.net_if_addrs()
    return next(name for name in addresses if any(item.address == _LOOPBACK for item in addresses[name]))
