"""Starts the processes of a stage that works in several, by torch's own launcher."""

import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import psutil
from hydra.core.hydra_config import HydraConfig

from stages.app import describe, end_with_dvc, start_logging
from stages.errors import StageError
from stages.hardware_config import Launch
from stages.interruption import Interrupted, end_on_signals

SECONDS_TO_END = 60  # for a process that was told to, its checkpoint included
LOOPBACK = "127.0.0.1"


class ProcessError(Exception):
    """What ended the work of one of several processes, in words for users."""


def run_in_processes(
    stage: str, work: Callable[[Any], None], config: Any, name_of: Callable[[Any], str] | None = None
) -> None:
    """Do `work(config)` in the processes that config.hardware describes; in this one where it describes none.

    `work` must be a function of the stage's module.

    Args:
        name_of: gives the name of a config's run, by which its checkpoints are found again; None: it makes none.

    Raises:
        StageError: the error of the first process that failed; the others have then been ended.
        Interrupted: if a signal ended them.
    """
    launch = config.hardware.launch
    if config.hardware.ray is not None:
        from stages.ray_launch import run_on_ray

        run_on_ray(stage, work, config, None if name_of is None else name_of(config))
        return
    if launch is None:
        work(config)
        return
    if launch.started_by:
        start_everywhere(stage, launch)
        return
    import torch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    here = launch.processes_per_machine or torch.cuda.device_count()
    if not here:
        raise StageError(
            "hardware.launch.processes_per_machine: null means one a GPU, and there is none here: give a number"
        )
    alone = launch.machines == 1
    if alone:  # else gloo listens where the machine's name leads
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback_interface())
    for name in ("torch.distributed", "torch.multiprocessing"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # they would tell what this function tells
    description = LaunchConfig(
        min_nodes=launch.machines,
        max_nodes=launch.machines,
        nproc_per_node=here,
        rdzv_backend="c10d",
        rdzv_endpoint=f"{LOOPBACK}:0" if launch.rendezvous is None else launch.rendezvous,
        run_id=stage,
        local_addr=LOOPBACK if alone else None,
        max_restarts=0,
        shutdown_timeout=SECONDS_TO_END,
    )
    try:
        elastic_launch(description, do)(stage, work, config)
    except SignalException as signalled:
        raise Interrupted(int(signalled.sigval)) from None
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode in (130, 143):
            raise Interrupted(failure.exitcode - 128) from None
        said = failure.message["message"] if isinstance(failure.message, dict) else failure.message
        said = said.removeprefix(f"{ProcessError.__name__}: ")
        raise StageError(f"process {rank} of {here * launch.machines}: {said}") from None


def start_everywhere(stage: str, launch: Launch) -> None:
    """Start this stage's command on every machine by launch.started_by, where each starts its processes; wait for all.

    Raises:
        StageError: if it fails on one; it has said why.
        Interrupted: if a signal ended them.
    """
    words = [word.format(machines=launch.machines) for word in launch.started_by or ()]
    meeting = launch.rendezvous or f"{socket.gethostname()}:{free_port()}"
    own = ["hardware.launch.started_by=null", f"hardware.launch.rendezvous='{meeting}'"]
    command = [*words, sys.executable, "-m", f"stages.{stage}", *HydraConfig.get().overrides.task, *own]
    try:
        process = subprocess.Popen(command)
    except OSError as error:
        raise StageError(f"hardware.launch.started_by: {words[0]}: {error.strerror}") from None
    try:
        code = process.wait()
    except Interrupted as interrupted:
        process.send_signal(interrupted.number)
        process.wait()
        raise
    if code in (130, 143):
        raise Interrupted(code - 128)
    if code:
        raise StageError(f"{words[0]} ended with exit code {code}; the error stands above")


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as one:
        one.bind(("", 0))
        return int(one.getsockname()[1])


def do(stage: str, work: Callable[[Any], None], config: Any) -> None:
    """What each process does."""
    import torch
    import torch.distributed as dist

    if int(os.environ["RANK"]) > 0:
        logging.disable(logging.INFO)
        os.environ["NO_COLOR"] = "1"  # no bar of its own
    os.environ["OMP_NUM_THREADS"] = str(config.hardware.num_threads)  # else Accelerate chooses
    start_logging(stage)
    end_on_signals()
    threading.Thread(target=end_with_dvc, daemon=True).start()
    try:
        if config.hardware.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if config.hardware.device == "cuda" else "gloo")
        work(config)
        dist.destroy_process_group()
    except Interrupted as interrupted:
        if os.environ["RANK"] == "0":
            logging.getLogger("stage").error("%s", interrupted)
        raise SystemExit(interrupted.exit_code) from None
    except Exception as error:
        if os.environ.get("LM_REPRO_DEBUG") == "1":
            raise
        raise ProcessError(describe(error, stage)) from None


def loopback_interface() -> str:
    """The name of the network interface that leads to this machine alone."""
    addresses = psutil.net_if_addrs()
    return next(name for name in addresses if any(one.address == LOOPBACK for one in addresses[name]))
