"""Forecast of `dvc repro`: which stages it would run now, and why, without running any.

The rules are DVC's. A stage runs if its command, values, inputs or outputs differ from its entry in dvc.lock. If the
run cache has a run with the same command, values and inputs, DVC restores that run instead. The outputs of a stage that
would run are unknown, except those of `code`, which takes a second to run. A stage whose only changes are such unknown
inputs therefore gets the verdict MAY_RUN.
"""

import enum
import json
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dvc.repo import Repo
from dvc.repo.reproduce import get_active_graph, plan_repro
from dvc.stage.cache import _get_cache_hash
from dvc.stage.serialize import to_single_stage_lockfile
from dvc_data.hashfile.build import build
from dvc_data.hashfile.hash import file_md5

from stages.code.stage import CodeConfig
from stages.code.stage import main as write_code
from stages.core.config import MISSING, flatten_values, validate_values
from stages.core.source_code import hash_code
from tools.code_changes import CodeChange, find_code_changes, hash_committed_modules
from tools.lock_history import LOCK, Entry, get_hashes, list_changed_files, parse_entry, read_lock
from tools.yaml_edit import is_same_value

CODE = "code"


class Verdict(enum.Enum):
    UNCHANGED = enum.auto()
    RESTORED = enum.auto()
    """The outputs come from DVC's cache, without computing anything."""
    RUNS = enum.auto()
    MAY_RUN = enum.auto()
    """Runs only if an earlier stage writes different bytes than in the last run."""


class ParamChange(NamedTuple):
    """Value of a params file that changed since the last run."""

    file: str
    key: str
    old: Any
    """Value in the last run; MISSING if the key was not set."""
    new: Any


class PathChange(NamedTuple):
    """File or directory that changed since the last run."""

    path: str
    description: str


Change = ParamChange | PathChange | CodeChange


class Forecast(NamedTuple):
    """Forecast for one stage."""

    name: str
    verdict: Verdict
    changes: list[Change]
    waits_for: dict[str, list[str]]
    """Inputs whose future content is unknown, mapped to the stages that write them."""
    params: dict[str, dict[str, Any]]
    """Current values of the tracked keys, by params file."""
    inputs: dict[str, str | None]
    """Future hash of each input path; None if unknown."""
    outs: list[str]
    """Paths that the stage writes."""


def forecast_stages(repo: Repo, target: str | None = None) -> list[Forecast]:
    """Forecast each stage of `dvc repro TARGET`, in DVC's order of execution.

    Raises:
        DvcException: in the same cases as `dvc repro`.
    """
    graph = get_active_graph(repo.index.graph)
    chosen = repo.stage.collect(target) if target else None
    stages = plan_repro(graph, chosen)
    forecaster = _Forecaster(repo, list(graph))
    return [forecaster.forecast_stage(stage) for stage in stages]


class _Forecaster:
    """Forecasts stages one after the other and remembers the expected hashes of their outputs."""

    def __init__(self, repo: Repo, stages: Iterable[Any]) -> None:
        self._repo, self._lock = repo, read_lock()
        self._writers = {out.def_path: stage.addressing for stage in stages for out in stage.outs}
        self._out_hashes: dict[str, str | None] = {}  # by out; None if unknown
        self._changing_stages: set[str] = set()  # stages whose outs may end up different from those in dvc.lock

    def forecast_stage(self, stage: Any) -> Forecast:
        """Return the forecast of a stage; its predecessors must have been forecast before."""
        entry, name = parse_entry(self._lock, stage.addressing), stage.addressing
        deps = [dep for dep in stage.deps if dep not in stage.params]
        inputs = {dep.def_path: self._predict_hash(dep) for dep in deps}
        params = {dep.def_path: dep.read_params() for dep in stage.params}
        waits = {path: self._find_pending_writers(path) for path, known in inputs.items() if known is None}
        changes = list(self._find_changes(stage, entry, params, inputs))
        if stage.frozen:  # by `dvc freeze`: DVC only checks its outs
            changes, waits = [], {}
        verdict, outs = self._decide_verdict(stage, changes, waits, params, inputs)
        if verdict is not Verdict.UNCHANGED and not changes and not waits:
            changes = list(_find_out_changes(stage, verdict))
        self._out_hashes |= outs
        if outs != get_hashes(entry, "outs"):
            self._changing_stages.add(name)
        if name == CODE and verdict is not Verdict.UNCHANGED:
            self._out_hashes |= hash_code_outs(stage.outs[0].def_path)
        return Forecast(name, verdict, changes, waits, params, inputs, [out.def_path for out in stage.outs])

    def _decide_verdict(
        self,
        stage: Any,
        changes: list[Change],
        waits: dict[str, list[str]],
        params: dict[str, dict[str, Any]],
        inputs: dict[str, str | None],
    ) -> tuple[Verdict, dict[str, str | None]]:
        """Return the verdict and the resulting hash of each out path."""
        unknown: dict[str, str | None] = {out.def_path: None for out in stage.outs}
        if waits:
            return (Verdict.RUNS if changes else Verdict.MAY_RUN), unknown
        if changes:
            cached = self._find_run_cache_entry(stage, params, inputs)
            return (Verdict.RUNS, unknown) if cached is None else (Verdict.RESTORED, {**get_hashes(cached, "outs")})
        locked: dict[str, str | None] = {out.def_path: out.hash_info.value for out in stage.outs}
        if not any(out.status() for out in stage.outs):
            return Verdict.UNCHANGED, locked
        cached = to_single_stage_lockfile(stage)
        return (Verdict.RESTORED, locked) if self._is_cached(stage, cached) else (Verdict.RUNS, unknown)

    def _find_changes(
        self, stage: Any, entry: Entry, params: dict[str, dict[str, Any]], inputs: dict[str, str | None]
    ) -> Iterator[Change]:
        """Yield the known differences from the stage's entry in dvc.lock."""
        if not entry:
            yield PathChange("dvc.lock", "it has no entry of this stage: it has never run here")
            return
        if entry.get("cmd") != stage.cmd:
            yield PathChange("dvc.yaml", f"cmd: {entry.get('cmd')} -> {stage.cmd}")
        if any(dep.workspace_status() for dep in stage.params):
            yield from find_param_changes(entry, params)
        before = get_hashes(entry, "deps")
        deps = {dep.def_path: dep for dep in stage.deps if dep not in stage.params}
        for path, now in inputs.items():
            if now is not None and now != before.get(path):
                if path.startswith(f"{CODE}/"):
                    yield from self._find_code_changes(path, before.get(path, ""))
                else:
                    yield self._describe_path_change(deps[path], before.get(path))

    # -- inputs ----------------------------------------------------------------------------------------------------

    def _find_pending_writers(self, path: str) -> list[str]:
        """Return the stages that write `path`, its content or a parent directory, and whose outs may change."""
        writers = [stage for out, stage in self._writers.items() if paths_overlap(out, path)]
        return sorted(set(writers) & self._changing_stages)

    def _predict_hash(self, dep: Any) -> str | None:
        """Return the hash that an input will have when its stage is checked; None if unknown, empty if missing."""
        if dep.def_path in self._out_hashes:
            return self._out_hashes[dep.def_path]
        if self._find_pending_writers(dep.def_path):
            return None
        return str(dep.get_hash().value) if dep.exists else ""

    def _describe_path_change(self, dep: Any, before: str | None) -> PathChange:
        path = dep.def_path
        if before is None:
            return PathChange(path, "a new input")
        if path in self._out_hashes:
            return PathChange(path, f"other content than in the last run, from {self._writers.get(path)}")
        if not dep.exists:
            return PathChange(path, "does not exist")
        if not dep.isdir():
            sizes = [f"{meta.size:,} bytes" for meta in (dep.meta, dep.get_meta()) if meta and meta.size is not None]
            return PathChange(path, f"changed ({' -> '.join(dict.fromkeys(sizes))})")
        return PathChange(path, self._describe_directory_change(dep, before))

    def _describe_directory_change(self, dep: Any, before: str) -> str:
        """Describe how the files of a directory changed, according to DVC's cache or, if it lacks them, to git."""
        _, _, tree = build(dep.cache, dep.fs_path, dep.fs, dep.hash_name, ignore=dep.dvcignore, dry_run=True)
        now = {"/".join(key): info.value for key, _, info in tree}
        cached_files = self._read_cached(before)
        if cached_files is None:
            names = [name.removeprefix(f"{dep.def_path}/") for name in list_changed_files(dep.def_path)]
            names = names or _find_newer_files(Path(dep.fs_path), now)  # files that git ignores
            counts = "" if len(now) == dep.meta.nfiles else f" ({len(now)} files, {dep.meta.nfiles} at the last run)"
            return f"{list_names(names) or 'other content'}{counts}"
        old = {item["relpath"]: item["md5"] for item in cached_files}
        kinds = {
            "changed": [name for name in now if name in old and now[name] != old[name]],
            "new": [name for name in now if name not in old],
            "removed": [name for name in old if name not in now],
        }
        return "; ".join(f"{len(names)} {kind}: {list_names(names)}" for kind, names in kinds.items() if names)

    def _find_code_changes(self, path: str, before: str) -> Iterator[Change]:
        """Yield the modules that changed since code/NAME.json had the hash `before`; in a fresh clone, since HEAD."""
        now, old = hash_code(Path(path).stem), self._read_cached(before)
        changes: list[Change] = list(find_code_changes(hash_committed_modules(now) if old is None else old, now))
        yield from changes or [
            PathChange(path, "changed; DVC's cache lacks the version of the last run to compare with")
        ]

    # -- caches ----------------------------------------------------------------------------------------------------

    def _read_cached(self, md5: str) -> Any:
        """Return the JSON of an object in DVC's cache (the file list of a directory, for example), or None."""
        for cache in (self._repo.cache.local, self._repo.cache.legacy):
            file = Path(cache.oid_to_path(md5)) if md5 else Path()
            if file.is_file():
                return json.loads(file.read_text(encoding="utf-8"))
        return None

    def _find_run_cache_entry(
        self, stage: Any, params: dict[str, dict[str, Any]], inputs: dict[str, str | None]
    ) -> Entry | None:
        """Return a run with the same command, values and inputs if DVC's cache has all of its outputs."""
        if not all(inputs.values()):
            return None
        # The entry that dvc.lock would get after the run. Only the paths of outs affect the key.
        wanted = to_single_stage_lockfile(stage)
        wanted["deps"] = [{"path": path, "hash": "md5", "md5": md5} for path, md5 in inputs.items()]
        wanted |= {"params": params} if params else {}
        key = _get_cache_hash(wanted, key=True)
        runs = Path(self._repo.stage_cache.cache_dir, key[:2], key)
        newest = max(runs.iterdir(), key=lambda file: file.stat().st_mtime, default=None) if runs.is_dir() else None
        entry = newest and self._repo.stage_cache._load_cache(key, newest.name)
        return entry if entry and self._is_cached(stage, entry) else None

    def _is_cached(self, stage: Any, entry: Entry) -> bool:
        return bool(self._repo.stage_cache._create_stage(entry, wdir=stage.wdir).outs_cached())


def find_param_changes(entry: Entry, params: dict[str, dict[str, Any]]) -> Iterator[Change]:
    """Yield the values that differ from those in an entry of dvc.lock."""
    locked = entry.get("params") or {}
    removed = [file for file in locked if file not in params]
    for file, values in params.items():
        # A configuration chosen instead of another one of the same group is compared with that one.
        old_file = (
            next((old for old in removed if Path(old).parent == Path(file).parent), file)
            if file not in locked
            else file
        )
        new_values, old_values = dict(flatten_values(values)), dict(flatten_values(locked.get(old_file) or {}))
        keys = [
            key
            for key in dict.fromkeys([*new_values, *old_values])
            if not is_same_value(old_values.get(key, MISSING), new_values.get(key, MISSING))
        ]
        if old_file != file:
            yield PathChange(file, f"chosen instead of {old_file}; other values: {list_names(keys) or 'none'}")
        else:
            yield from (
                ParamChange(file, key, old_values.get(key, MISSING), new_values.get(key, MISSING)) for key in keys
            )


def _find_out_changes(stage: Any, verdict: Verdict) -> Iterator[PathChange]:
    """Yield the reasons to write or restore the outputs of a stage in which nothing else changed."""
    descriptions = {
        "deleted": "does not exist",
        "modified": "changed since the stage wrote it",
        "not in cache": "exists",
    }
    for out in stage.outs:
        for status in out.status().values():
            not_cached = "; DVC's cache does not have it (`dvc pull` fetches it if it was pushed)"
            yield PathChange(
                out.def_path, descriptions.get(status, status) + (not_cached if verdict is Verdict.RUNS else "")
            )


def hash_code_outs(directory: str) -> dict[str, str]:
    """Return the hash of each file path that the stage `code` would write now."""
    with tempfile.TemporaryDirectory() as scratch:
        written = Path(scratch, CODE)
        write_code(validate_values(CodeConfig, {"out": str(written)}, CODE))
        return {f"{directory}/{file.name}": file_md5(str(file)) for file in written.iterdir()}


def _find_newer_files(directory: Path, names: Iterable[str]) -> list[str]:
    """Return the `names` in `directory` that were written after dvc.lock."""
    lock = Path(LOCK).stat().st_mtime
    return [name for name in names if (directory / name).stat().st_mtime > lock]


def paths_overlap(one: str, other: str) -> bool:
    """Return True if the paths are equal or one contains the other."""
    return one == other or one.startswith(f"{other}/") or other.startswith(f"{one}/")


def writes_inputs(one: Forecast, other: Forecast) -> bool:
    """Return True if stage `one` writes an input of stage `other`."""
    return any(paths_overlap(out, path) for out in one.outs for path in other.inputs)


def list_names(names: list[str], max_names: int = 3) -> str:
    """Join the first `max_names` of `names` and say how many more there are."""
    more = f" and {len(names) - max_names} more" if len(names) > max_names else ""
    return ", ".join(names[:max_names]) + more
