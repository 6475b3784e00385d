"""A Ray cluster on this machine for tests and benchmarks, in a network namespace with only the loopback interface."""

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ADDRESS = "127.0.0.1:6379"


def find_obstacle() -> str:
    """Return the reason why this machine cannot run a cluster; empty if it can."""
    if importlib.util.find_spec("ray") is None:
        return "Ray is not installed (`make ray`)"
    if subprocess.run(["unshare", "-rn", "ip", "link", "set", "lo", "up"], capture_output=True, check=False).returncode:
        return "cannot create a network namespace, without which Ray would listen on the network"
    return ""


class Cluster:
    """Runner of commands in the cluster's network namespace."""

    def __init__(self, holder: int, cache: Path) -> None:
        self._enter = ["nsenter", "-t", str(holder), "-U", "-n", "--preserve-credentials"]
        self._environment = {
            **os.environ,
            "RAY_ADDRESS": ADDRESS,
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",  # several nodes on one address
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "disabled",  # otherwise Ray requires the user's token, if there is one
            "LM_REPRO_CACHE": str(cache),
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        }

    def start(self, *command: str, **environment: str) -> "subprocess.Popen[str]":
        """Start a command with the environment's Python."""
        return subprocess.Popen(
            [*self._enter, sys.executable, *command],
            cwd=ROOT,
            env={**self._environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *command: str, **environment: str) -> tuple[int, str]:
        """Run a command with the environment's Python and return its exit code and output."""
        process = self.start(*command, **environment)
        printed, _ = process.communicate(timeout=550)
        return process.returncode, printed


@contextlib.contextmanager
def start_cluster(num_nodes: int, cache: Path) -> Iterator[Cluster]:
    """Start a cluster of `num_nodes` nodes with one processor each; stages save checkpoints in `cache`."""
    up = "ip link set lo up && echo up && exec sleep 3600"
    holder = subprocess.Popen(["unshare", "-rn", "sh", "-c", up], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "up\n"
        cluster = Cluster(holder.pid, cache)
        ray = ["-m", "ray.scripts.scripts"]
        temporary = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: socket paths have at most 107 characters
        head = ["--head", "--port=6379", "--node-ip-address=127.0.0.1", f"--temp-dir={temporary}"]
        try:
            for node in (head, *[[f"--address={ADDRESS}"]] * (num_nodes - 1)):
                code, printed = cluster.run(*ray, "start", *node, "--num-cpus=1", "--object-store-memory=100000000")
                assert code == 0, printed
            yield cluster
        finally:
            cluster.run(*ray, "stop", "--force")
            shutil.rmtree(temporary, ignore_errors=True)
    finally:
        holder.kill()
        holder.wait()
