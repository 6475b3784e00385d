"""What `make plan` expects of a training: remembered in the user's cache directory, for the training's log.

Nothing of it reaches an output, and a training that was not planned takes no notice.
"""

import dataclasses
import json
import logging
import resource
import sys
import time
from pathlib import Path

import psutil
from pydantic import TypeAdapter, ValidationError

from stages.shell.cache import cache_directory

log = logging.getLogger(__name__)


@dataclasses.dataclass
class Plan:
    """What a training takes on this machine."""

    seconds: float
    """From the start of its process to the end."""
    peak_bytes: int
    """Memory of its process at most."""


def write_plan(name: str, plan: Plan) -> None:
    """Remember the plan of the run called `name`, by its fingerprint."""
    file = _file(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(dataclasses.asdict(plan)), encoding="utf-8")


def log_against_plan(name: str) -> None:
    """Log what the run called `name` was planned to take and what this process, which is about to end, took."""
    try:
        plan = TypeAdapter(Plan).validate_json(_file(name).read_bytes())
    except (OSError, ValidationError):
        return
    planned = f"{show_seconds(plan.seconds)} and {show_bytes(plan.peak_bytes)}"
    took = f"{show_seconds(time.time() - psutil.Process().create_time())} and {show_bytes(peak_bytes())}"
    log.info("planned %s of memory, took %s", planned, took)


def peak_bytes() -> int:
    """Memory of this process at most, so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def show_seconds(seconds: float) -> str:
    """A duration as one says it: `8.5 s`, `147 s`, `12 min`, `3 h 20 min`."""
    if seconds < 300:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60:,} h {minutes % 60} min"


def show_bytes(size: float) -> str:
    """A size as one says it: `940 kB`, `12 MB`, `1.4 GB`."""
    for unit, bound in (("kB", 1e6), ("MB", 1e9), ("GB", 1e12)):
        if size < bound:
            value = size / (bound / 1e3)
            return f"{value:.1f} {unit}" if value < 10 else f"{value:.0f} {unit}"
    return f"{size / 1e12:.1f} TB"


def _file(name: str) -> Path:
    return cache_directory() / "plans" / f"{name}.json"
