"""A Ray cluster on this machine, in a network namespace that has the loopback alone; for tests and benchmarks."""

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


def missing() -> str:
    """Why there can be no cluster here; empty where there can."""
    if importlib.util.find_spec("ray") is None:
        return "Ray is not installed (`make ray`)"
    if subprocess.run(["unshare", "-rn", "ip", "link", "set", "lo", "up"], capture_output=True, check=False).returncode:
        return "no network namespace can be made here, and Ray would listen beyond it"
    return ""


class Cluster:
    """Runs commands where the cluster is."""

    def __init__(self, holder: int, cache: Path) -> None:
        self._enter = ["nsenter", "-t", str(holder), "-U", "-n", "--preserve-credentials"]
        self._environment = {
            **os.environ,
            "RAY_ADDRESS": ADDRESS,
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",  # several nodes on one address
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "disabled",  # else a token that the user has made is asked for
            "LM_REPRO_CACHE": str(cache),
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        }

    def start(self, *command: str, **environment: str) -> "subprocess.Popen[str]":
        """A command of the environment's python, begun."""
        return subprocess.Popen(
            [*self._enter, sys.executable, *command],
            cwd=ROOT,
            env={**self._environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *command: str, **environment: str) -> tuple[int, str]:
        """A command of the environment's python: its exit code, and what it printed."""
        process = self.start(*command, **environment)
        printed, _ = process.communicate(timeout=550)
        return process.returncode, printed


@contextlib.contextmanager
def nodes(number: int, cache: Path) -> Iterator[Cluster]:
    """A cluster of `number` nodes of a processor each, whose stages keep checkpoints in `cache`."""
    up = "ip link set lo up && echo up && exec sleep 3600"
    holder = subprocess.Popen(["unshare", "-rn", "sh", "-c", up], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "up\n"
        cluster = Cluster(holder.pid, cache)
        ray = ["-m", "ray.scripts.scripts"]
        place = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: the names of sockets have 107 characters at most
        head = ["--head", "--port=6379", "--node-ip-address=127.0.0.1", f"--temp-dir={place}"]
        try:
            for node in (head, *[[f"--address={ADDRESS}"]] * (number - 1)):
                code, printed = cluster.run(*ray, "start", *node, "--num-cpus=1", "--object-store-memory=100000000")
                assert code == 0, printed
            yield cluster
        finally:
            cluster.run(*ray, "stop", "--force")
            shutil.rmtree(place, ignore_errors=True)
    finally:
        holder.kill()
        holder.wait()
