"""The Ray cluster that this process works with.

It has been started by its user: Ray listens on every network interface without asking who comes, so that no stage
starts it by itself. docs/cluster.md says how to close it.
"""

import logging
import os
import socket
from pathlib import Path
from typing import Any

from stages.core.errors import StageError

_PACKAGE = Path(__file__).resolve().parents[1]


def connected() -> Any:
    """The module `ray`, in a process that is connected to the cluster of RAY_ADDRESS, or to that of this machine.

    Raises:
        StageError: if Ray is not installed, or if there is no cluster.
    """
    try:
        import ray
    except ImportError:
        raise StageError("Ray is not installed: `make ray` adds it to the environment") from None
    if not ray.is_initialized():
        # Its workers import the project from where this process does.
        path = os.pathsep.join([str(_PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        passed = {name: value for name, value in os.environ.items() if name.startswith("LM_REPRO_")}
        address = os.environ.get("RAY_ADDRESS") or "auto"
        if address == "local":
            raise StageError("RAY_ADDRESS=local would have this stage start Ray: name a cluster, HOST:PORT")
        try:
            _knock(address)
            ray.init(
                address=address,
                runtime_env={"env_vars": {"PYTHONPATH": path, **passed}},
                logging_level=logging.ERROR,
            )
        except (OSError, ValueError) as error:
            raise StageError(
                f"no Ray cluster at {address}: {' '.join(str(error).split())[:200]}\n  start one on this machine"
                " (`ray start --head`; docs/cluster.md says how to close it) or name one by RAY_ADDRESS; one that asks"
                " for a token wants RAY_AUTH_MODE=token here as well"
            ) from None
    return ray


def _knock(address: str) -> None:
    """Raise OSError if nobody answers at an address HOST:PORT, which Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if "/" not in address and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
