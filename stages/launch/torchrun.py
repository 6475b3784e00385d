"""Starts the processes of a stage that works in several, by torch's own launcher."""

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

from stages.core.config import flat
from stages.core.errors import StageError
from stages.model.hardware import Launch, find_device
from stages.shell.app import describe_error, end_with_dvc, start_logging
from stages.shell.interruption import ENDED_BY_SIGNAL, GRACE_SECONDS, Interrupted, end_on_signals

_LOOPBACK = "127.0.0.1"


class _ProcessError(Exception):
    """What ended the work of one of several processes, in words for users."""


def run_in_processes(
    stage: str,
    work: Callable[[Any], None],
    config: Any,
    checkpoint_name: Callable[[Any], contextlib.AbstractContextManager[str]] | None = None,
) -> None:
    """Do `work(config)` in the processes that config.hardware describes; in this one where it describes none.

    `work` must be a function of the stage's module.

    Args:
        checkpoint_name: gives the name by which the checkpoints of a config's run are found again, and which no other
            run has meanwhile; None: the stage makes no checkpoints.

    Raises:
        StageError: the error of the first process that failed; the others have then been ended.
        Interrupted: if a signal ended them.
    """
    launch = config.hardware.launch
    if config.hardware.ray is not None:
        from stages.launch.ray import run_on_ray

        with contextlib.nullcontext() if checkpoint_name is None else checkpoint_name(config) as name:
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

    here = launch.processes_per_machine or torch.cuda.device_count()
    if not here:
        raise StageError(
            "hardware.launch.processes_per_machine: null means one a GPU, and there is none here: give a number"
        )
    find_device(config.hardware)
    alone = launch.machines == 1
    if alone:
        # Nothing listens beyond the loopback: gloo would where the machine's name leads, and torch's stores everywhere,
        # which unpickle what they are sent.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _loopback_interface())
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    for name in ("torch.distributed", "torch.multiprocessing"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # they would tell what this function tells
    with tempfile.TemporaryDirectory() if alone else contextlib.nullcontext() as meeting:
        description = LaunchConfig(
            min_nodes=launch.machines,
            max_nodes=launch.machines,
            nproc_per_node=here,
            rdzv_backend="c10d",
            rdzv_endpoint=f"{meeting}/launcher" if alone else str(launch.rendezvous),
            rdzv_configs={"store_type": "file" if alone else "tcp"},
            run_id=stage,
            local_addr=_LOOPBACK if alone else None,
            max_restarts=0,
            shutdown_timeout=int(GRACE_SECONDS),
            signals_to_handle="",  # those of end_on_signals: torch's own handlers end the wait at the next signal
        )
        _start_resource_tracker()
        try:
            elastic_launch(description, _worker_main)(
                stage, work, config, f"file://{meeting}/processes" if alone else "env://"
            )
        except RendezvousError as error:
            reason = describe_error(error.__cause__ if isinstance(error.__cause__, Exception) else error)[:200]
            raise StageError(
                f"hardware.launch.rendezvous={launch.rendezvous}: the machines do not meet there: {reason}"
            ) from None
        except ChildFailedError as error:
            raise _child_error(error, here * launch.machines) from None


def _start_resource_tracker() -> None:
    """Start multiprocessing's tracker of semaphores, without SIGHUP; SIGINT and SIGTERM it ignores by itself.

    It lives until the processes have ended, and complains with a traceback where it cannot.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})  # which the tracker inherits
    try:
        resource_tracker.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _child_error(error: Any, number: int) -> BaseException:
    """What the first of `number` processes to fail ended with, of a ChildFailedError."""
    rank, failure = error.get_first_failure()
    if failure.exitcode in ENDED_BY_SIGNAL:
        return Interrupted(failure.exitcode - 128)
    said = failure.message["message"] if isinstance(failure.message, dict) else failure.message
    said = said.removeprefix(f"{_ProcessError.__name__}: ")
    return StageError(f"process {rank} of {number}: {said}")


def _start_everywhere(stage: str, launch: Launch) -> None:
    """Start this stage's command on every machine by launch.started_by, where each starts its processes; wait for all.

    Raises:
        StageError: if it fails on one; it has said why.
        Interrupted: if a signal ended them.
    """
    words = [word.replace("{machines}", str(launch.machines)) for word in launch.started_by or ()]
    meeting = launch.rendezvous or f"{socket.gethostname()}:{_free_port()}"
    own = ["hardware.launch.started_by=null", f"hardware.launch.rendezvous='{meeting}'"]
    command = [*words, sys.executable, "-m", f"stages.{stage}", *sys.argv[1:], *own]
    try:
        process = subprocess.Popen(command, preexec_fn=_end_with_parent if sys.platform == "linux" else None)
    except (OSError, subprocess.SubprocessError) as error:
        raise StageError(f"hardware.launch.started_by: {words[0]}: {describe_error(error)}") from None
    try:
        code = process.wait()
    except Interrupted:
        process.send_signal(signal.SIGTERM)  # what srun passes on; of SIGINT, it tells how its tasks do
        process.wait()
        raise
    if code in ENDED_BY_SIGNAL:
        raise Interrupted(code - 128)
    if code:
        raise StageError(f"{words[0]} ended with exit code {code}; the error stands above")


def _end_with_parent() -> None:
    """Have Linux send this process SIGTERM when the one that started it is gone, however it went."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as one:
        one.bind(("", 0))
        return int(one.getsockname()[1])


def _worker_main(stage: str, work: Callable[[Any], None], config: Any, meeting: str) -> None:
    """What each process does; it meets the others at `meeting`, as torch's init_process_group has it."""
    import torch
    import torch.distributed as dist

    if int(os.environ["RANK"]) > 0:
        logging.disable(logging.INFO)
        os.environ["NO_COLOR"] = "1"  # no bar of its own
    os.environ["OMP_NUM_THREADS"] = str(config.hardware.num_threads)  # else Accelerate chooses
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
            _check_alike(config)
        work(config)
        dist.destroy_process_group()
    except Interrupted as interrupted:
        if os.environ["RANK"] == "0":
            logging.getLogger("stage").error("%s", interrupted)
        raise SystemExit(interrupted.exit_code) from None
    except Exception as error:
        if os.environ.get("LM_REPRO_DEBUG") == "1":
            raise
        raise _ProcessError(describe_error(error, stage)) from None


def _check_alike(config: Any) -> None:
    """Raise StageError, in every process, unless all were started with the same config.

    Each of several machines has a command of its own, and what they trained together with two would be nobody's.
    """
    from stages.model.processes import of_all, of_the_first

    values = dict(flat(TypeAdapter(type(config)).dump_python(config, mode="json")))
    for own in ("rendezvous", "started_by"):
        values.pop(f"hardware.launch.{own}", None)
    first = of_the_first(values)
    differing = of_all(sorted(key for key in first | values if first.get(key) != values.get(key)))
    for number, keys in enumerate(differing):
        if keys:
            raise StageError(f"process {number} was started with other values than process 0: {', '.join(keys)}")


def _loopback_interface() -> str:
    """The name of the network interface that leads to this machine alone."""
    addresses = psutil.net_if_addrs()
    return next(name for name in addresses if any(one.address == _LOOPBACK for one in addresses[name]))
