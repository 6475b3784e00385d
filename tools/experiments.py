"""DVC experiments that are run outside the workspace: their commands, and whether a result is still current.

Settings are written in Hydra's grammar of overrides.
"""

import functools
import hashlib
import io
import json
import re
import subprocess
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow.parquet as pq
from dvc.repo import Repo
from dvc.utils.hydra import apply_overrides
from dvc.utils.serialize import load_path
from dvc_data.hashfile.build import build

from stages.core.compose import PARAMS
from stages.core.config import MISSING, find_numbers_beyond_64_bits, find_value
from stages.core.dvc_cache import DvcCache, is_directory_md5
from stages.core.errors import ConfigError, StageError, printable
from tools.forecast import CODE, hash_code_outs, paths_overlap
from tools.lock_history import get_hashes, parse_mapping, read_lock
from tools.outs import Outs
from tools.report_data import get_scores_path
from tools.yaml_edit import format_flow, is_same_value, load_yaml, merge_values, nest_value

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


# -- results -----------------------------------------------------------------------------------------------------------


class WorkingTree:
    """Pipeline, values, code and source data of the working tree. Each is read once."""

    def __init__(self, repo: Repo) -> None:
        stages = list(repo.index.stages)
        self.stages = {stage.addressing for stage in stages}
        """Names of the stages of the pipeline."""
        self.whole_groups = {
            (stage.addressing, str(Path(dep.def_path).parent))
            for stage in stages
            for dep in stage.params
            if not dep.params
        }
        """Stages and the groups of conf/ of which they read whole files."""
        # As DVC reads them for dvc.lock, by YAML 1.2: for Hydra, `no` is false.
        self.read_values = functools.cache(lambda file: (Path(file).is_file() and load_path(file, repo.fs)) or {})
        self.hash_path = functools.cache(self._hash_path)
        self._hash_code = functools.cache(lambda: hash_code_outs(CODE))
        # Data of `dvc add`: the .dvc file decides what a run reads, also if the data are not in the working tree.
        self._added = {out.def_path: out.hash_info.value for stage in stages if not stage.cmd for out in stage.outs}
        self._repo = repo

    def hash_sources(self, target: str) -> dict[str, str]:
        """Return the md5 sum of each path that the stages of `dvc repro TARGET` read and none writes, sorted by path.

        The stage `code` is left out, since it reads comments and the code of all stages.
        """
        stages = [stage for stage in self._repo.stage.collect(target, with_deps=True) if stage.cmd]
        outs = [out.def_path for stage in stages for out in stage.outs]
        readers = [stage for stage in stages if stage.addressing != CODE]
        paths = {dep.def_path for stage in readers for dep in stage.deps if dep not in stage.params}
        sources = sorted(path for path in paths if not any(paths_overlap(path, out) for out in outs))
        return {path: self.hash_path(path) for path in sources}

    def _hash_path(self, path: str) -> str:
        """Return the md5 sum of a path that no stage but `code` writes; empty if it does not exist."""
        if path.startswith(f"{CODE}/"):
            return self._hash_code().get(path, "")
        if path in self._added:
            return str(self._added[path])
        full = Path(self._repo.root_dir, path)
        if not full.exists():
            return ""
        cache, ignore = self._repo.cache.local, self._repo.dvcignore
        _, _, tree = build(cache, str(full), self._repo.fs, "md5", ignore=ignore, dry_run=True)
        return str(tree.hash_info.value)


def find_differences(
    lock: Mapping[str, Any], target: str, settings: Mapping[str, Any], tree: WorkingTree
) -> Iterator[str]:
    """Yield the differences between a run and a run of the working tree with `settings`: values, code, source data.

    Values of `checkpoints` are left out, because they do not change a result, and so are data at a URL, of which
    dvc.lock has no md5 sum.

    Args:
        lock: entries of the run's dvc.lock by stage.
        target: last stage of the run.
    """
    if target not in lock:
        yield f"its dvc.lock has no {target}"
        return
    files: dict[str, Any] = {}
    for text, value in settings.items():
        file, name, _ = parse_key(text)
        files[file] = merge_values(files.get(file, tree.read_values(file)), nest_value(tuple(name.split(".")), value))
    stages = list_upstream(lock, target, tree.stages)
    for stage in stages:
        for file, before in (lock[stage].get("params") or {}).items():
            now = files.get(file, tree.read_values(file))
            is_whole = (stage, str(Path(file).parent)) in tree.whole_groups
            for key in dict.fromkeys([*(before or {}), *(now if is_whole else ())]):
                values = (before or {}).get(key, MISSING), find_value(now, key)
                if not is_same_value(*values) and key.partition(".")[0] != "checkpoints":
                    old, new = ("not set" if value is MISSING else printable(json.dumps(value), 60) for value in values)
                    yield f"{printable(file)}:{printable(key)} was {old}, now {new}"
    written = [path for name in stages for path in get_hashes(lock[name], "outs")]
    for path, md5 in (item for name in stages for item in get_hashes(lock[name], "deps").items()):
        if md5 and not any(paths_overlap(path, out) for out in written) and tree.hash_path(path) != md5:
            is_code = path.startswith(f"{CODE}/")
            yield f"the code of {Path(path).stem} changed" if is_code else f"{printable(path)} changed"


def list_upstream(lock: Mapping[str, Any], target: str, known: Collection[str]) -> list[str]:
    """Return `target` and the stages whose outs it needs, directly or through others, without the stage `code`.

    Args:
        known: stages of the pipeline; dvc.lock may have others, which were removed from it.
    """
    writers = {path: name for name in lock if name in known and name != CODE for path in get_hashes(lock[name], "outs")}
    found = [target]
    for name in found:  # grows while it is read
        deps = get_hashes(lock[name], "deps")
        needed = (stage for out, stage in writers.items() if any(paths_overlap(out, path) for path in deps))
        found += dict.fromkeys(stage for stage in needed if stage not in found)
    return found


def hash_evaluated_documents(outs: Outs, rev: str, task: str) -> str | None:
    """Return a hash that tells whether two runs were evaluated on the same documents of the validation split.

    It covers the number, id, source and bytes of each document, and not its tokens, so it is the same for all
    tokenizers. None if the table of documents cannot be read.
    """
    content = outs.read_out(rev, get_scores_path(task, "validation"))
    if content is None:
        return None
    table = pq.read_table(io.BytesIO(content))
    identity = table.select([name for name in ("record", "q_id", "source", "bytes") if name in table.column_names])
    return hashlib.sha256(json.dumps(identity.to_pydict()).encode()).hexdigest()[:16]
