"""The process: its environment variables, in which libraries find settings that DVC cannot see, and its memory."""

import ctypes
import logging
import os
import sys
from collections.abc import Mapping

log = logging.getLogger(__name__)

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt(3)


def drop_environment_variables(prefixes: tuple[str, ...], ours: Mapping[str, str | None]) -> None:
    """Remove the variables that begin with one of `prefixes`, and say so; one that has its value in `ours` stays.

    Args:
        ours: values by name; None: whatever it is.
    """
    for name in [name for name in os.environ if name.startswith(prefixes)]:
        if name not in ours or ours[name] not in (None, os.environ[name]):
            log.warning("%s is ignored: what trains a model stands in conf/", name)
            del os.environ[name]


def keep_freed_memory() -> None:
    """Have glibc reuse freed memory: given back, it comes anew page by page, which takes a tenth of a training step.

    A process holds its peak until it ends. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
