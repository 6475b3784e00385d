"""What `dvc repro` would do with each stage now, and why: followed from stage to stage, without running any.

As DVC does, a stage runs if its command, values, inputs or outputs differ from its entry in dvc.lock, unless the run
cache has a run of the same command, values and inputs, which DVC then restores. What a stage writes that would run is
not known, except for `code`, which takes a second. So a stage that would only run because of another one may run.
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
from stages.core.config import MISSING, flat, validate
from stages.core.source_code import hash_code
from tools.code_changes import CodeChange, code_changes, committed_hashes
from tools.lock_history import LOCK, Entry, changed_files, hashes_in, parse_entry, read_lock

CODE = "code"


class Verdict(enum.Enum):
    UNCHANGED = enum.auto()
    RESTORED = enum.auto()
    """Its outputs come from DVC's cache: nothing is computed."""
    RUNS = enum.auto()
    MAY_RUN = enum.auto()
    """It runs if another stage, which runs before it, writes other bytes than the last time."""


class ParamChange(NamedTuple):
    """A value of a params file that differs from that of the last run."""

    file: str
    key: str
    old: Any
    """MISSING: it was not set."""
    new: Any


class PathChange(NamedTuple):
    """A file or directory that is not as at the last run."""

    path: str
    what: str


Change = ParamChange | PathChange | CodeChange


class Forecast(NamedTuple):
    """What would become of a stage."""

    name: str
    verdict: Verdict
    changes: list[Change]
    waits_for: dict[str, list[str]]
    """Inputs of which it is not known what they will hold, each with the stages that write them."""
    params: dict[str, dict[str, Any]]
    """Params file to its tracked keys, with their values now."""
    inputs: dict[str, str | None]
    """Path to the hash that it will have; None: not known."""
    outs: list[str]
    """Paths that it writes."""


def forecast(repo: Repo, target: str | None = None) -> list[Forecast]:
    """What would become of each stage of `dvc repro TARGET`, in the order in which DVC comes to them.

    Raises:
        DvcException: as `dvc repro` would.
    """
    graph = get_active_graph(repo.index.graph)
    chosen = repo.stage.collect(target) if target else None
    stages = plan_repro(graph, chosen)
    following = _Following(repo, list(graph))
    return [following.follow(stage) for stage in stages]


class _Following:
    """What is known of the outputs of the stages that were followed so far."""

    def __init__(self, repo: Repo, stages: Iterable[Any]) -> None:
        self._repo, self._lock = repo, read_lock()
        self._writers = {out.def_path: stage.addressing for stage in stages for out in stage.outs}
        self._hashes: dict[str, str | None] = {}  # of outs, None where it is not known
        self._moved: set[str] = set()  # stages whose outs may become others than dvc.lock has

    def follow(self, stage: Any) -> Forecast:
        """The forecast of a stage whose predecessors were followed."""
        entry, name = parse_entry(self._lock, stage.addressing), stage.addressing
        deps = [dep for dep in stage.deps if dep not in stage.params]
        inputs = {dep.def_path: self._hash_after(dep) for dep in deps}
        params = {dep.def_path: dep.read_params() for dep in stage.params}
        waits = {path: self._unsettled(path) for path, known in inputs.items() if known is None}
        changes = list(self._changes(stage, entry, params, inputs))
        if stage.frozen:  # by `dvc freeze`: DVC only looks at its outs
            changes, waits = [], {}
        verdict, outs = self._verdict(stage, changes, waits, params, inputs)
        if verdict is not Verdict.UNCHANGED and not changes and not waits:
            changes = list(_out_changes(stage, verdict))
        self._hashes |= outs
        if outs != hashes_in(entry, "outs"):
            self._moved.add(name)
        if name == CODE and verdict is not Verdict.UNCHANGED:
            self._hashes |= _code_hashes(stage.outs[0].def_path)
        return Forecast(name, verdict, changes, waits, params, inputs, [out.def_path for out in stage.outs])

    def _verdict(
        self,
        stage: Any,
        changes: list[Change],
        waits: dict[str, list[str]],
        params: dict[str, dict[str, Any]],
        inputs: dict[str, str | None],
    ) -> tuple[Verdict, dict[str, str | None]]:
        """The verdict, and path to hash of the outs that follow from it."""
        unknown: dict[str, str | None] = {out.def_path: None for out in stage.outs}
        if waits:
            return (Verdict.RUNS if changes else Verdict.MAY_RUN), unknown
        if changes:
            cached = self._run_cache_entry(stage, params, inputs)
            return (Verdict.RUNS, unknown) if cached is None else (Verdict.RESTORED, {**hashes_in(cached, "outs")})
        locked: dict[str, str | None] = {out.def_path: out.hash_info.value for out in stage.outs}
        if not any(out.status() for out in stage.outs):
            return Verdict.UNCHANGED, locked
        cached = to_single_stage_lockfile(stage)
        return (Verdict.RESTORED, locked) if self._is_cached(stage, cached) else (Verdict.RUNS, unknown)

    def _changes(
        self, stage: Any, entry: Entry, params: dict[str, dict[str, Any]], inputs: dict[str, str | None]
    ) -> Iterator[Change]:
        """What differs from the stage's entry in dvc.lock, of what is known."""
        if not entry:
            yield PathChange("dvc.lock", "it has no entry of this stage: it has never run here")
            return
        if entry.get("cmd") != stage.cmd:
            yield PathChange("dvc.yaml", f"cmd: {entry.get('cmd')} -> {stage.cmd}")
        if any(dep.workspace_status() for dep in stage.params):
            yield from param_changes(entry, params)
        before = hashes_in(entry, "deps")
        deps = {dep.def_path: dep for dep in stage.deps if dep not in stage.params}
        for path, now in inputs.items():
            if now is not None and now != before.get(path):
                if path.startswith(f"{CODE}/"):
                    yield from self._code_changes(path, before.get(path, ""))
                else:
                    yield self._path_change(deps[path], before.get(path))

    # -- inputs ----------------------------------------------------------------------------------------------------

    def _unsettled(self, path: str) -> list[str]:
        """The stages that write `path`, something in it or around it, and whose outs may become others."""
        writers = [stage for out, stage in self._writers.items() if _overlap(out, path)]
        return sorted(set(writers) & self._moved)

    def _hash_after(self, dep: Any) -> str | None:
        """The hash that an input has when its stage is come to; None: not known; empty: it does not exist."""
        if dep.def_path in self._hashes:
            return self._hashes[dep.def_path]
        if self._unsettled(dep.def_path):
            return None
        return str(dep.get_hash().value) if dep.exists else ""

    def _path_change(self, dep: Any, before: str | None) -> PathChange:
        path = dep.def_path
        if before is None:
            return PathChange(path, "a new input")
        if path in self._hashes:
            return PathChange(path, f"other content than in the last run, from {self._writers.get(path)}")
        if not dep.exists:
            return PathChange(path, "does not exist")
        if not dep.isdir():
            sizes = [f"{meta.size:,} bytes" for meta in (dep.meta, dep.get_meta()) if meta and meta.size is not None]
            return PathChange(path, f"changed ({' -> '.join(dict.fromkeys(sizes))})")
        return PathChange(path, self._directory_change(dep, before))

    def _directory_change(self, dep: Any, before: str) -> str:
        """How the files of a directory changed, by DVC's cache if it knows what they were, else by git."""
        _, _, tree = build(dep.cache, dep.fs_path, dep.fs, dep.hash_name, ignore=dep.dvcignore, dry_run=True)
        now = {"/".join(key): info.value for key, _, info in tree}
        listed = self._read_cached(before)
        if listed is None:
            names = [name.removeprefix(f"{dep.def_path}/") for name in changed_files(dep.def_path)]
            names = names or _newer_files(Path(dep.fs_path), now)  # git ignores some
            counts = "" if len(now) == dep.meta.nfiles else f" ({len(now)} files, {dep.meta.nfiles} at the last run)"
            return f"{list_names(names) or 'other content'}{counts}"
        old = {item["relpath"]: item["md5"] for item in listed}
        kinds = {
            "changed": [name for name in now if name in old and now[name] != old[name]],
            "new": [name for name in now if name not in old],
            "removed": [name for name in old if name not in now],
        }
        return "; ".join(f"{len(names)} {kind}: {list_names(names)}" for kind, names in kinds.items() if names)

    def _code_changes(self, path: str, before: str) -> Iterator[Change]:
        """The modules of a stage that changed since code/NAME.json had the hash `before`; in a clone, since HEAD."""
        now, old = hash_code(Path(path).stem), self._read_cached(before)
        changes: list[Change] = list(code_changes(committed_hashes(now) if old is None else old, now))
        yield from changes or [PathChange(path, "changed; DVC's cache lacks that of the last run, to compare with")]

    # -- caches ----------------------------------------------------------------------------------------------------

    def _read_cached(self, md5: str) -> Any:
        """The JSON of an object in DVC's cache, such as the list of a directory's files; None if it is not there."""
        for cache in (self._repo.cache.local, self._repo.cache.legacy):
            file = Path(cache.oid_to_path(md5)) if md5 else Path()
            if file.is_file():
                return json.loads(file.read_text(encoding="utf-8"))
        return None

    def _run_cache_entry(
        self, stage: Any, params: dict[str, dict[str, Any]], inputs: dict[str, str | None]
    ) -> Entry | None:
        """A run with the same command, values and inputs, all of whose outputs DVC's cache has."""
        if not all(inputs.values()):
            return None
        # What dvc.lock would have after the run; outs count by their paths alone.
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


def param_changes(entry: Entry, params: dict[str, dict[str, Any]]) -> Iterator[Change]:
    """The values that differ from those in an entry of dvc.lock."""
    locked = entry.get("params") or {}
    gone = [file for file in locked if file not in params]
    for file, values in params.items():
        # A configuration that was chosen instead of another one of its group.
        other = (
            next((old for old in gone if Path(old).parent == Path(file).parent), file) if file not in locked else file
        )
        now, before = dict(flat(values)), dict(flat(locked.get(other) or {}))
        keys = [
            key for key in dict.fromkeys([*now, *before]) if _differ(before.get(key, MISSING), now.get(key, MISSING))
        ]
        if other != file:
            yield PathChange(file, f"chosen instead of {other}; other values: {list_names(keys) or 'none'}")
        else:
            yield from (ParamChange(file, key, before.get(key, MISSING), now.get(key, MISSING)) for key in keys)


def _differ(one: Any, other: Any) -> bool:
    """Whether two values are different to YAML, to which 1 and true are."""
    return type(one) is not type(other) or bool(one != other)


def _out_changes(stage: Any, verdict: Verdict) -> Iterator[PathChange]:
    """Why the outputs of a stage of which nothing else changed are to be made or restored."""
    words = {"deleted": "does not exist", "modified": "changed since the stage wrote it", "not in cache": "exists"}
    for out in stage.outs:
        for status in out.status().values():
            lacks = "; DVC's cache does not have it (`dvc pull` fetches it where it was pushed)"
            yield PathChange(out.def_path, words.get(status, status) + (lacks if verdict is Verdict.RUNS else ""))


def _code_hashes(directory: str) -> dict[str, str]:
    """Path to hash of the files that the stage `code` would write now."""
    with tempfile.TemporaryDirectory() as scratch:
        written = Path(scratch, CODE)
        write_code(validate(CodeConfig, {"out": str(written)}, CODE))
        return {f"{directory}/{file.name}": file_md5(str(file)) for file in written.iterdir()}


def _newer_files(directory: Path, names: Iterable[str]) -> list[str]:
    """Those of `names` in `directory` that were written after dvc.lock."""
    lock = Path(LOCK).stat().st_mtime
    return [name for name in names if (directory / name).stat().st_mtime > lock]


def _overlap(one: str, other: str) -> bool:
    """Whether a path is another one, in it, or around it."""
    return one == other or one.startswith(f"{other}/") or other.startswith(f"{one}/")


def writes_inputs(one: Forecast, other: Forecast) -> bool:
    """Whether a stage writes what another one reads."""
    return any(_overlap(out, path) for out in one.outs for path in other.inputs)


def list_names(names: list[str], most: int = 3) -> str:
    """The first of `names`, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
