"""Connection of this process to a Ray cluster.

The user starts the cluster. No stage does so, because Ray listens on every network interface without authentication;
docs/cluster.md explains how to secure it.
"""

import logging
import os
import socket
from pathlib import Path
from typing import Any

from stages.core.errors import StageError, format_cause

_PACKAGE = Path(__file__).resolve().parents[1]


def connect_to_cluster() -> Any:
    """Connect to the Ray cluster at RAY_ADDRESS, by default that of this machine, and return the module `ray`.

    Raises:
        StageError: if Ray is not installed, or if there is no cluster.
    """
    try:
        import ray
    except ImportError:
        raise StageError("Ray is not installed: `make ray` adds it to the environment") from None
    if not ray.is_initialized():
        # The workers import the project from the same directory as this process.
        path = os.pathsep.join([str(_PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        passed = {name: value for name, value in os.environ.items() if name.startswith("LM_REPRO_")}
        address = os.environ.get("RAY_ADDRESS") or "auto"
        if address == "local":
            raise StageError("RAY_ADDRESS=local would make this stage start Ray: name a cluster, HOST:PORT")
        try:
            _check_reachable(address)
            ray.init(
                address=address,
                runtime_env={"env_vars": {"PYTHONPATH": path, **passed}},
                logging_level=logging.ERROR,
            )
        except (OSError, ValueError) as error:
            raise StageError(
                f"no Ray cluster at {address}: {format_cause(error, 200)}\n  start one on this machine"
                " (`ray start --head`; docs/cluster.md explains how to secure it) or set RAY_ADDRESS; a cluster that"
                " requires a token also needs RAY_AUTH_MODE=token here"
            ) from None
    return ray


def _check_reachable(address: str) -> None:
    """Check that a server accepts connections at an address HOST:PORT; Ray itself would retry for minutes.

    Raises:
        OSError: if none does.
    """
    host, _, port = address.rpartition(":")
    if "/" not in address and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
