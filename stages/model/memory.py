"""Memory allocation settings of the process."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt(3)


def keep_freed_memory() -> None:
    """Make glibc reuse freed memory instead of returning it to the system.

    Returned memory has to be mapped again page by page, which takes a tenth of a training step. The process keeps its
    peak memory until it ends. Does nothing with other C libraries.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
