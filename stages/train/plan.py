"""Estimates of `make plan` for a training, stored in the user's cache directory for the log of that training.

They do not affect any output. A training without an estimate logs nothing about it.
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

from stages.shell.cache import get_cache_directory

log = logging.getLogger(__name__)


@dataclasses.dataclass
class Plan:
    """Estimated cost of a training on this machine."""

    seconds: float
    """Duration from the start of the process to its end."""
    peak_bytes: int
    """Peak memory of the process."""


def write_plan(name: str, plan: Plan) -> None:
    """Store the plan of a run; `name` is the fingerprint of the run."""
    file = _get_plan_file(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(dataclasses.asdict(plan)), encoding="utf-8")


def log_against_plan(name: str) -> None:
    """Log the planned and actual cost of the run `name`, if it was planned. Call it at the end of the process."""
    try:
        plan = TypeAdapter(Plan).validate_json(_get_plan_file(name).read_bytes())
    except (OSError, ValidationError):
        return
    planned = f"{format_seconds(plan.seconds)} and {format_bytes(plan.peak_bytes)}"
    actual = f"{format_seconds(time.time() - psutil.Process().create_time())} and {format_bytes(measure_peak_bytes())}"
    log.info("planned %s of memory, took %s", planned, actual)


def measure_peak_bytes() -> int:
    """Return the peak memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def format_seconds(seconds: float) -> str:
    """Format a duration for people: `8.5 s`, `147 s`, `12 min`, `3 h 20 min`."""
    if seconds < 300:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60:,} h {minutes % 60} min"


def format_bytes(size: float) -> str:
    """Format a number of bytes for people: `940 kB`, `12 MB`, `1.4 GB`."""
    for unit, bound in (("kB", 1e6), ("MB", 1e9), ("GB", 1e12)):
        if size < bound:
            value = size / (bound / 1e3)
            return f"{value:.1f} {unit}" if value < 10 else f"{value:.0f} {unit}"
    return f"{size / 1e12:.1f} TB"


def _get_plan_file(name: str) -> Path:
    return get_cache_directory() / "plans" / f"{name}.json"
