"""The process's environment variables, in which libraries find settings that DVC cannot see."""

import logging
import os
from collections.abc import Mapping

log = logging.getLogger(__name__)


def forget(prefixes: tuple[str, ...], ours: Mapping[str, str | None]) -> None:
    """Remove the variables that begin with one of `prefixes`, and say so; one that has its value in `ours` stays.

    Args:
        ours: values by name; None: whatever it is.
    """
    for name in [name for name in os.environ if name.startswith(prefixes)]:
        if name not in ours or ours[name] not in (None, os.environ[name]):
            log.warning("%s is ignored: what trains a model stands in conf/", name)
            del os.environ[name]
