"""Commands that run DVC experiments outside the workspace, with settings in Hydra's grammar of overrides."""

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dvc.repo import Repo
from dvc.utils.hydra import apply_overrides

from stages.core.compose import PARAMS
from stages.core.config import find_numbers_beyond_64_bits
from stages.core.dvc_cache import DvcCache, is_directory_md5
from stages.core.errors import ConfigError, StageError, printable
from tools.lock_history import parse_mapping, read_lock
from tools.yaml_edit import format_flow, is_same_value, load_yaml

_KEY = re.compile(
    r"(?:(conf/[a-z_]+/[A-Za-z0-9_-][A-Za-z0-9._-]*\.yaml):(\+{0,2}))?([A-Za-z0-9_][A-Za-z0-9_-]*(?:\.[A-Za-z0-9_-]+)*)"
)


class Key(NamedTuple):
    """A key as in `dvc exp run -S`."""

    file: str
    """params.yaml, or a file of conf/."""
    name: str
    """Dotted key in the file."""
    may_be_new: bool
    """True if the key need not be in the file: `conf/task/causal.yaml:+trainer.warmup_steps`."""

    @property
    def argument(self) -> str:
        """The key as DVC takes it; `++` sets a key whether or not it exists."""
        return self.name if self.file == PARAMS.name else f"{self.file}:{'++' if self.may_be_new else ''}{self.name}"


def parse_key(text: str) -> Key:
    """Parse a key as in `dvc exp run -S`.

    Raises:
        ConfigError: if it is malformed.
    """
    found = _KEY.fullmatch(text)
    if found is None:
        raise ConfigError(
            [
                f"{printable(repr(text))} is not a key as in `dvc exp run -S`: write block_size,"
                " tasks.causal.learning_rate, conf/task/causal.yaml:trainer.weight_decay or, for a key that the file"
                " does not have, conf/task/causal.yaml:+trainer.warmup_steps"
            ]
        )
    return Key(found[1] or PARAMS.name, found[3], bool(found[2]))


def format_override(key: str, value: Any) -> str:
    """Return `KEY=VALUE` in Hydra's grammar, as `dvc exp run -S` takes it."""
    return f"{key}={_format_value(value)}"


def _format_value(value: Any) -> str:
    if isinstance(value, str):
        # Hydra unescapes backslashes only before a quote, so only those need to be doubled.
        return "'" + re.sub(r"(\\*)'", lambda found: found[1] * 2 + "\\'", re.sub(r"(\\+)$", r"\1\1", value)) + "'"
    if isinstance(value, list):
        return f"[{', '.join(map(_format_value, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_format_value(item)}" for name, item in value.items()) + "}"
    return format_flow(value)  # numbers without an exponent: YAML 1.1 reads 1e-05 as text


def find_unpassable_values(text: str, value: Any) -> Iterator[str]:
    """Yield an error text if `dvc exp run -S` would not set exactly `value`.

    DVC writes YAML 1.2, in which the text `no` needs no quotes, and Hydra reads YAML 1.1, in which it is false.
    """
    if problems := list(find_numbers_beyond_64_bits(value, text)):
        yield from problems
        return
    try:
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory, "params.yaml")
            file.write_text("key: 0\n", encoding="utf-8")
            apply_overrides(file, [format_override("key", value)])
            written = load_yaml(file.read_text(encoding="utf-8"))["key"]
        arrived = is_same_value(written, value)
    except Exception:  # DVC and Hydra raise errors of several kinds
        arrived = False
    if not arrived:
        given = printable(json.dumps(value, ensure_ascii=False))
        yield f"{printable(text)}={given}: this value cannot be passed to `dvc exp run -S`"


def check_plots_are_cached(repo: Repo, task: str) -> None:
    """Check that every run can be saved: at its end, DVC opens the plots of dvc.yaml, also those of other tasks.

    Raises:
        StageError: if the cache lacks the directory of a plot, as in a clone in which only one task was run.
    """
    plots = parse_mapping(Path("dvc.yaml").read_text(encoding="utf-8")).get("plots") or []
    paths = [path for entry in plots for path in ([entry] if isinstance(entry, str) else entry)]
    stages, cache = parse_mapping(read_lock()).get("stages") or {}, DvcCache(repo)
    missing = [
        out["path"]
        for name, stage in stages.items()
        for out in (stage.get("outs") or [] if name != f"train@{task}" else [])
        if any(path.startswith(f"{out['path']}/") for path in paths)
        if is_directory_md5(md5 := str(out.get("md5", ""))) and cache.list_files(md5) is None
    ]
    if missing:
        raise StageError(
            f"{', '.join(missing)}: not in DVC's cache, so DVC could not save any run: run `dvc repro` or `dvc pull`"
        )


def make_run_command(
    name: str, settings: Mapping[str, Any], target: str, place: Literal["--temp", "--queue"] = "--temp"
) -> list[str]:
    """Return the command that runs an experiment outside the workspace, or queues it.

    Args:
        settings: keys as in `-S` to values.
        target: last stage to run.
    """
    overrides = [format_override(parse_key(key).argument, value) for key, value in settings.items()]
    # DVC otherwise waits only three seconds for another command.
    command = ["dvc", "--wait-for-lock", "exp", "run", place, "--name", name]
    return [*command, *(part for override in overrides for part in ("-S", override)), target]


def run_to_end(command: Sequence[str], **options: Any) -> int:
    """Run a command and return its exit status. After Ctrl-C, wait for its end before raising KeyboardInterrupt.

    Ctrl-C reaches the command as well, and a training then writes a checkpoint.

    Args:
        **options: arguments of subprocess.Popen.
    """
    process = subprocess.Popen(command, **options)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.wait()
        raise
