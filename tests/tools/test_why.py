"""tools.why: what `dvc repro` would run, and why, down to the key, function or file."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dvc_project import ALL, edit, run, stages_run

from stages.core.config import MISSING
from tools import code_changes, lock_history, why
from tools.code_changes import CodeChange, describe_parts
from tools.forecast import Forecast, ParamChange, PathChange, Verdict, list_names, param_changes
from tools.lock_history import Revision, hashes_in, parse_entry, value_in

LOCK = """\
schema: '2.0'
stages:
  train@causal:
    cmd: python -m stages.train
    deps:
    - path: data/blocks/causal
      hash: md5
      md5: 1234.dir
      size: 3
      nfiles: 2
    params:
      params.yaml:
        seed: 42
        tasks.causal.model: tiny-gpt2
      conf/model/tiny-gpt2.yaml:
        config:
          n_embd: 128
          n_layer: 2
  train@causal2:
    cmd: another
"""
ENTRY = parse_entry(LOCK, "train@causal")


@pytest.fixture(autouse=True)
def _nothing_read_before() -> Iterator[None]:
    lock_history.read_revisions.cache_clear()
    yield
    lock_history.read_revisions.cache_clear()


# -- dvc.lock ----------------------------------------------------------------------------------------------------------


def test_lock_entry_of_a_stage_is_parsed_alone() -> None:
    assert ENTRY["cmd"] == "python -m stages.train"
    assert hashes_in(ENTRY, "deps") == {"data/blocks/causal": "1234.dir"}
    assert parse_entry(LOCK, "train@causal2") == {"cmd": "another"}


@pytest.mark.parametrize("stage", ["train", "train@mlm", "schema", "train@causal."])
def test_lock_entry_of_a_stage_that_never_ran_is_empty(stage: str) -> None:
    assert parse_entry(LOCK, stage) == {}


@pytest.mark.parametrize("length", range(0, len(LOCK), 7))
def test_lock_cut_short_anywhere_has_an_entry_or_none(length: int) -> None:
    assert isinstance(parse_entry(LOCK[:length], "train@causal"), dict)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("params.yaml", "tasks.causal.model", "tiny-gpt2"),
        ("conf/model/tiny-gpt2.yaml", "config.n_layer", 2),
        ("conf/model/tiny-gpt2.yaml", "config.n_head", MISSING),
        ("conf/model/tiny-gpt2.yaml", "configuration", MISSING),
        ("conf/model/gpt2.yaml", "config.n_layer", MISSING),
    ],
)
def test_lock_value_of_a_dotted_key_is_found_inside_a_tracked_one(file: str, key: str, value: Any) -> None:
    assert value_in(ENTRY, file, key) == value


def test_revisions_are_commits_and_experiments_with_another_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run(tmp_path, "git", "init", "-q", "-b", "main")
    assert lock_history.read_revisions() == ()
    lock_history.read_revisions.cache_clear()
    for text in ("one", "two"):
        (tmp_path / "dvc.lock").write_text(text)
        run(tmp_path, "git", "add", "-A")
        run(tmp_path, "git", "commit", "-q", "-m", text)
    first = run(tmp_path, "git", "rev-parse", "HEAD~").strip()
    for name in (f"refs/exps/{first[:2]}/{first[2:]}/wide", "refs/exps/exec/EXEC_HEAD"):
        (tmp_path / "dvc.lock").write_text(f"of {name}")
        run(tmp_path, "git", "commit", "-q", "-a", "-m", name)
        run(tmp_path, "git", "update-ref", name, "HEAD")
        run(tmp_path, "git", "reset", "-q", "--hard", "HEAD~")
    found = [(revision.name.split()[0], revision.lock[:3]) for revision in lock_history.read_revisions()]
    assert found == [("commit", "two"), ("commit", "one"), ("experiment", "of ")]
    assert lock_history.read_revisions()[2].name == "experiment wide"


# -- values and code ---------------------------------------------------------------------------------------------------


def params(**changes: Any) -> dict[str, dict[str, Any]]:
    """The params of ENTRY, with some of params.yaml changed."""
    values = {"seed": 42, "tasks.causal.model": "tiny-gpt2", **changes}
    return {"params.yaml": values, "conf/model/tiny-gpt2.yaml": {"config": {"n_embd": 128, "n_layer": 2}}}


def test_params_that_are_as_in_the_lock_are_no_change() -> None:
    assert list(param_changes(ENTRY, params())) == []


@pytest.mark.parametrize(
    ("new", "old"),
    [({"seed": 43}, 42), ({"seed": 42.0}, 42), ({"seed": None}, 42), ({"lr": 1}, MISSING)],
    ids=["another", "a float", "null", "a new key"],
)
def test_params_that_changed_are_told_with_both_values(new: dict[str, Any], old: Any) -> None:
    ((key, value),) = new.items()
    assert list(param_changes(ENTRY, params(**new))) == [ParamChange("params.yaml", key, old, value)]


def test_params_nested_in_a_tracked_key_are_told_by_their_own_key() -> None:
    now = params()
    now["conf/model/tiny-gpt2.yaml"] = {"config": {"n_embd": 64}}
    assert list(param_changes(ENTRY, now)) == [
        ParamChange("conf/model/tiny-gpt2.yaml", "config.n_embd", 128, 64),
        ParamChange("conf/model/tiny-gpt2.yaml", "config.n_layer", 2, MISSING),
    ]


def test_params_of_a_configuration_chosen_instead_of_another_are_told_in_a_line() -> None:
    now = params()
    now["conf/model/gpt2.yaml"] = {**now.pop("conf/model/tiny-gpt2.yaml"), "path": "gpt2"}
    said = "chosen instead of conf/model/tiny-gpt2.yaml; other values: path"
    assert list(param_changes(ENTRY, now)) == [PathChange("conf/model/gpt2.yaml", said)]


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ("X = 1\ndef f(): return 2\n", "f"),
        ("X = 2\ndef f(): return 1\n", "X"),
        ("X = 1\ndef g(): return 1\n", "g (new), f (removed)"),
        ("def f(): return 1\nX = 1\n", "the order of its parts"),
    ],
)
def test_parts_of_a_module_that_changed_are_named(now: str, said: str) -> None:
    assert describe_parts("X = 1\ndef f(): return 1\n", now) == said


def test_code_is_compared_with_the_committed_version_of_the_last_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run(tmp_path, "git", "init", "-q", "-b", "main")
    (tmp_path / "stages").mkdir()
    file, versions = tmp_path / "stages/m.py", [f"X = {number}\nY = 0\n" for number in range(3)]
    for text in versions[:2]:
        file.write_text(text)
        run(tmp_path, "git", "add", "-A")
        run(tmp_path, "git", "commit", "-q", "-m", "a version")
    file.write_text("X = 0\nY = 1\n")
    hashes = {text: code_changes.hash_of(text) for text in (*versions, file.read_text())}
    now = {"stages.m": hashes[file.read_text()], "stages.new": ""}

    def told(text: str) -> list[CodeChange]:
        return list(code_changes.code_changes({"stages.m": hashes[text], "stages.gone": ""}, now))

    assert told(versions[0]) == [
        CodeChange("stages/gone.py", "not imported any more"),
        CodeChange("stages/m.py", "Y"),
        CodeChange("stages/new.py", "imported now"),
    ]
    assert told(versions[1])[1].what == "X, Y"
    assert told(versions[2])[1].what == "changed (no commit has the version of the last run)"
    assert code_changes.committed_hashes(now) == {"stages.m": hashes[versions[1]]}


# -- words -------------------------------------------------------------------------------------------------------------


def found(verdict: Verdict, *changes: Any, **more: Any) -> Forecast:
    values: dict[str, Any] = {
        "outs": [],
        "waits_for": {},
        "params": params(seed=43),
        "inputs": {"data/blocks/causal": "1234.dir"},
    }
    return Forecast("train@causal", verdict, list(changes), **{**values, **more})


def history(monkeypatch: pytest.MonkeyPatch, **locks: str) -> None:
    revisions = tuple(Revision(name.replace("_", " "), lock) for name, lock in locks.items())
    monkeypatch.setattr(why, "read_revisions", lambda: revisions)
    monkeypatch.setattr(why, "read_lock", lambda: LOCK)


def test_why_names_the_last_run_and_who_has_the_new_value_and_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    other = LOCK.replace("seed: 42", "seed: 43")
    history(monkeypatch, commit_1=LOCK, experiment_a=other, experiment_b=other.replace("1234", "12"))
    assert list(why.describe(found(Verdict.RUNS, ParamChange("params.yaml", "seed", 42, 43)))) == [
        "",
        "train@causal runs (last run: commit 1)",
        "  params.yaml: seed: 42 -> 43",
        "      43 also in experiment a, experiment b",
        "  same values, code and inputs: experiment a",
    ]


def test_why_says_that_the_last_run_was_never_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    history(monkeypatch)
    lines = list(why.describe(found(Verdict.RUNS, PathChange("data", "changed"))))
    assert lines[1] == "train@causal runs (last run: the workspace, not committed)"


def test_why_says_on_what_a_stage_that_may_run_depends(monkeypatch: pytest.MonkeyPatch) -> None:
    history(monkeypatch)
    waits = {"data/blocks/causal": ["group_texts@causal"]}
    assert " ".join(" ".join(why.describe(found(Verdict.MAY_RUN, waits_for=waits))).split()) == (
        "train@causal may run data/blocks/causal: will be written again by group_texts@causal; if that comes out the"
        " same, it does not run"
    )


@pytest.mark.parametrize(
    "change",
    [
        ParamChange("params.yaml", "seed", "\x1b[31m" * 50, "x" * 10_000),
        ParamChange("params.yaml", "a\nb", MISSING, ["word " * 9] * 9),
        PathChange("data/" + "long/" * 9, "new: " + ", ".join(f"file{number}" for number in range(99))),
        CodeChange("stages/x.py", "a, " * 500),
    ],
    ids=lambda change: type(change).__name__,
)
def test_why_fits_80_columns_and_prints_no_control_character(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    history(monkeypatch)
    for line in why.describe(found(Verdict.RUNS, change)):
        assert line.isprintable()
        assert len(line) <= why.WIDTH or " " not in line.strip()


@pytest.mark.parametrize(
    ("verdicts", "target", "said"),
    [
        ([Verdict.UNCHANGED] * 3, None, "`dvc repro` would run nothing: the outputs of 3 stages are up to date."),
        ([Verdict.RUNS], "train", "`dvc repro train` would run 1 stage."),
        (
            [Verdict.RUNS, Verdict.RUNS, Verdict.RESTORED, Verdict.MAY_RUN, Verdict.UNCHANGED],
            None,
            "`dvc repro` would run 2 stages and restore 1 from the cache; 1 more depends on what these write.",
        ),
    ],
)
def test_why_begins_with_how_many_stages_run(verdicts: list[Verdict], target: str | None, said: str) -> None:
    assert why.summarize([found(verdict) for verdict in verdicts], target) == said


@pytest.mark.parametrize(
    ("number", "said"), [(0, ""), (1, "0"), (3, "0, 1, 2"), (4, "0, 1, 2 and 1 more"), (9, "0, 1, 2 and 6 more")]
)
def test_list_of_names_shows_the_first_and_the_number_of_others(number: int, said: str) -> None:
    assert list_names([str(index) for index in range(number)]) == said


# -- a project ---------------------------------------------------------------------------------------------------------


def ask(project: Path, *stage: str) -> str:
    """What why prints, in one line."""
    return " ".join(run(project, "python", "-m", "tools.why", *stage).split())


@pytest.mark.slow
def test_why_of_a_project_tells_each_change_to_its_key_function_or_file(clean: Path) -> None:
    head = run(clean, "git", "rev-parse", "--short", "HEAD").strip()
    assert f"would run nothing: the outputs of {len(ALL)} stages are up to date" in ask(clean)

    edit(clean / "params.yaml", tasks__causal__learning_rate=0.5)
    said = ask(clean)
    assert "would run 1 stage; 1 more depends on what these write." in said
    assert f"train@causal runs (last run: commit {head}) params.yaml: tasks.causal.learning_rate: 0.002 -> 0.5" in said
    assert "evaluate@causal may run models/causal: will be written again by train@causal; if" in said
    assert "would run nothing" in ask(clean, "train@mlm")
    run(clean, "git", "checkout", "-q", "params.yaml")

    file = clean / "stages/figures/metrics.py"
    text = file.read_text()
    file.write_text(text.replace('"""Indices of', '"""Numbers of'))
    said = ask(clean)
    assert "would run 1 stage. code runs" in said and "stages: figures/metrics.py" in said
    assert "Only comments, docstrings or messages of the code changed" in said
    file.write_text(text.replace("* total // max(number, 1)", "* total // max(1, number)"))
    said = ask(clean, "train@causal")
    assert "would run 1 stage." in said and "Only comments" in said
    said = ask(clean, "evaluate@mlm")
    assert "baseline@mlm runs" in said and "stages/figures/metrics.py: choose_documents" in said
    assert "train@mlm" not in said
    file.write_text(text)

    with (clean / "data/sample/askscience.jsonl").open("a") as lines:
        lines.write('{"title": "?", "answers": {"text": ["!"]}}\n')
    said = ask(clean, "download")
    assert "download runs" in said and "data/sample/askscience.jsonl: changed (" in said
    run(clean, "git", "checkout", "-q", ".")
    more = clean / "data/sources/more.md"  # which git ignores
    more.write_text("x")
    said = ask(clean, "baseline@mlm")
    more.unlink()
    assert "data/sources: more.md (2 files, 1 at the last run)" in said


@pytest.mark.slow
def test_why_of_values_that_an_experiment_has_says_that_nothing_is_computed(clean: Path) -> None:
    run(clean, "dvc", "exp", "run", "-n", "short", "-S", "tasks.causal.learning_rate=0.5")
    said = ask(clean)
    assert "would run nothing" in said
    run(clean, "git", "reset", "-q", "--hard")
    run(clean, "dvc", "checkout", "-q", "--force")
    edit(clean / "params.yaml", tasks__causal__learning_rate=0.5)
    said = ask(clean)
    assert "would restore 2 from the cache." in said
    assert "0.5 also in experiment short" in said and "same values, code and inputs: experiment short" in said
    output = run(clean, "dvc", "repro")
    assert stages_run(output) == set() and output.count("is cached - skipping run") == 2


@pytest.mark.slow
def test_why_of_outputs_that_are_gone_says_whether_the_cache_has_them(clean: Path) -> None:
    run(clean, "rm", "-r", "models/causal")
    said = ask(clean, "train@causal")
    assert "train@causal is restored from DVC's cache" in said and "models/causal: does not exist" in said
    run(clean, "mv", ".dvc/cache", "cache-aside")
    try:
        said = ask(clean, "train@causal")
    finally:
        run(clean, "rm", "-rf", ".dvc/cache")
        run(clean, "mv", "cache-aside", ".dvc/cache")
    assert "DVC's cache does not have it (`dvc pull` fetches it where it was pushed)" in said
    assert "restored" not in said


@pytest.mark.slow
def test_why_of_a_lock_with_a_conflict_or_an_unknown_stage_ends_in_a_line(clean: Path) -> None:
    printed = run(clean, "python", "-m", "tools.why", "trian@causal", check=False)
    assert "why: trian@causal is no stage of dvc.yaml; did you mean train@causal?" in printed
    lock = clean / "dvc.lock"
    lock.write_text("<<<<<<< ours\n" + lock.read_text())
    printed = run(clean, "python", "-m", "tools.why", check=False)
    assert "why: dvc.lock:1: a merge conflict: run `git checkout HEAD -- dvc.lock`" in printed
    assert "Traceback" not in printed


@pytest.mark.slow
def test_why_imports_no_torch(clean: Path) -> None:
    program = "import sys; sys.argv = ['why']; from tools.why import main; main(); print('torch' in sys.modules)"
    done = subprocess.run(["python", "-c", program], cwd=clean, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "False"
