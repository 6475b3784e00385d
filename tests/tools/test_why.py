"""Tests of tools.why, which shows the stages that `dvc repro` would run and the keys, functions or files behind it."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dvc_project import ALL, edit_yaml, parse_stages_run, run_command

from stages.core.config import MISSING
from tools import code_changes, lock_history, why
from tools.code_changes import CodeChange, describe_changed_definitions
from tools.forecast import Forecast, ParamChange, PathChange, Verdict, find_param_changes, list_names
from tools.lock_history import Revision, find_param_value, get_hashes, parse_entry

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


def test_parse_entry_returns_only_that_stage() -> None:
    assert ENTRY["cmd"] == "python -m stages.train"
    assert get_hashes(ENTRY, "deps") == {"data/blocks/causal": "1234.dir"}
    assert parse_entry(LOCK, "train@causal2") == {"cmd": "another"}


@pytest.mark.parametrize("stage", ["train", "train@mlm", "schema", "train@causal."])
def test_parse_entry_of_a_stage_that_never_ran_is_empty(stage: str) -> None:
    assert parse_entry(LOCK, stage) == {}


@pytest.mark.parametrize("length", range(0, len(LOCK), 7))
def test_parse_entry_of_a_truncated_lock_returns_a_mapping(length: int) -> None:
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
def test_find_param_value_looks_inside_tracked_keys(file: str, key: str, value: Any) -> None:
    assert find_param_value(ENTRY, file, key) == value


def test_revisions_are_commits_and_experiments_with_different_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_command(tmp_path, "git", "init", "-q", "-b", "main")
    assert lock_history.read_revisions() == ()
    lock_history.read_revisions.cache_clear()
    for text in ("one", "two"):
        (tmp_path / "dvc.lock").write_text(text)
        run_command(tmp_path, "git", "add", "-A")
        run_command(tmp_path, "git", "commit", "-q", "-m", text)
    first = run_command(tmp_path, "git", "rev-parse", "HEAD~").strip()
    for name in (f"refs/exps/{first[:2]}/{first[2:]}/wide", "refs/exps/exec/EXEC_HEAD"):
        (tmp_path / "dvc.lock").write_text(f"of {name}")
        run_command(tmp_path, "git", "commit", "-q", "-a", "-m", name)
        run_command(tmp_path, "git", "update-ref", name, "HEAD")
        run_command(tmp_path, "git", "reset", "-q", "--hard", "HEAD~")
    found = [(revision.name.split()[0], revision.lock[:3]) for revision in lock_history.read_revisions()]
    assert found == [("commit", "two"), ("commit", "one"), ("experiment", "of ")]
    assert lock_history.read_revisions()[2].name == "experiment wide"


# -- values and code ---------------------------------------------------------------------------------------------------


def build_params(**changes: Any) -> dict[str, dict[str, Any]]:
    """Build the params of ENTRY with `changes` in params.yaml."""
    values = {"seed": 42, "tasks.causal.model": "tiny-gpt2", **changes}
    return {"params.yaml": values, "conf/model/tiny-gpt2.yaml": {"config": {"n_embd": 128, "n_layer": 2}}}


def test_params_equal_to_the_lock_are_no_change() -> None:
    assert list(find_param_changes(ENTRY, build_params())) == []


@pytest.mark.parametrize(
    ("new", "old"),
    [({"seed": 43}, 42), ({"seed": 42.0}, 42), ({"seed": None}, 42), ({"lr": 1}, MISSING)],
    ids=["another", "a float", "null", "a new key"],
)
def test_params_that_changed_have_old_and_new_value(new: dict[str, Any], old: Any) -> None:
    ((key, value),) = new.items()
    assert list(find_param_changes(ENTRY, build_params(**new))) == [ParamChange("params.yaml", key, old, value)]


def test_params_nested_in_a_tracked_key_have_their_full_key() -> None:
    now = build_params()
    now["conf/model/tiny-gpt2.yaml"] = {"config": {"n_embd": 64}}
    assert list(find_param_changes(ENTRY, now)) == [
        ParamChange("conf/model/tiny-gpt2.yaml", "config.n_embd", 128, 64),
        ParamChange("conf/model/tiny-gpt2.yaml", "config.n_layer", 2, MISSING),
    ]


def test_params_of_a_different_configuration_are_one_change() -> None:
    now = build_params()
    now["conf/model/gpt2.yaml"] = {**now.pop("conf/model/tiny-gpt2.yaml"), "path": "gpt2"}
    said = "chosen instead of conf/model/tiny-gpt2.yaml; other values: path"
    assert list(find_param_changes(ENTRY, now)) == [PathChange("conf/model/gpt2.yaml", said)]


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
    assert describe_changed_definitions("X = 1\ndef f(): return 1\n", now) == said


def test_code_is_compared_with_the_committed_version_of_the_last_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_command(tmp_path, "git", "init", "-q", "-b", "main")
    (tmp_path / "stages").mkdir()
    file, versions = tmp_path / "stages/m.py", [f"X = {number}\nY = 0\n" for number in range(3)]
    for text in versions[:2]:
        file.write_text(text)
        run_command(tmp_path, "git", "add", "-A")
        run_command(tmp_path, "git", "commit", "-q", "-m", "a version")
    file.write_text("X = 0\nY = 1\n")
    hashes = {text: code_changes.hash_valid_source(text) for text in (*versions, file.read_text())}
    now = {"stages.m": hashes[file.read_text()], "stages.new": ""}

    def find_changes(text: str) -> list[CodeChange]:
        return list(code_changes.find_code_changes({"stages.m": hashes[text], "stages.gone": ""}, now))

    assert find_changes(versions[0]) == [
        CodeChange("stages/gone.py", "not imported any more"),
        CodeChange("stages/m.py", "Y"),
        CodeChange("stages/new.py", "imported now"),
    ]
    assert find_changes(versions[1])[1].description == "X, Y"
    assert find_changes(versions[2])[1].description == "changed (no commit has the version of the last run)"
    assert code_changes.hash_committed_modules(now) == {"stages.m": hashes[versions[1]]}


# -- output ------------------------------------------------------------------------------------------------------------


def build_forecast(verdict: Verdict, *changes: Any, **more: Any) -> Forecast:
    values: dict[str, Any] = {
        "outs": [],
        "waits_for": {},
        "params": build_params(seed=43),
        "inputs": {"data/blocks/causal": "1234.dir"},
    }
    return Forecast("train@causal", verdict, list(changes), **{**values, **more})


def set_history(monkeypatch: pytest.MonkeyPatch, **locks: str) -> None:
    revisions = tuple(Revision(name.replace("_", " "), lock) for name, lock in locks.items())
    monkeypatch.setattr(why, "read_revisions", lambda: revisions)
    monkeypatch.setattr(why, "read_lock", lambda: LOCK)


def test_why_names_last_run_and_revisions_with_the_new_value(monkeypatch: pytest.MonkeyPatch) -> None:
    other = LOCK.replace("seed: 42", "seed: 43")
    set_history(monkeypatch, commit_1=LOCK, experiment_a=other, experiment_b=other.replace("1234", "12"))
    assert list(why.describe_forecast(build_forecast(Verdict.RUNS, ParamChange("params.yaml", "seed", 42, 43)))) == [
        "",
        "train@causal runs (last run: commit 1)",
        "  params.yaml: seed: 42 -> 43",
        "      43 also in experiment a, experiment b",
        "  same values, code and inputs: experiment a",
    ]


def test_why_with_uncommitted_last_run_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    set_history(monkeypatch)
    lines = list(why.describe_forecast(build_forecast(Verdict.RUNS, PathChange("data", "changed"))))
    assert lines[1] == "train@causal runs (last run: the workspace, not committed)"


def test_why_of_a_stage_that_may_run_names_the_input_and_its_writer(monkeypatch: pytest.MonkeyPatch) -> None:
    set_history(monkeypatch)
    waits = {"data/blocks/causal": ["group_texts@causal"]}
    assert " ".join(" ".join(why.describe_forecast(build_forecast(Verdict.MAY_RUN, waits_for=waits))).split()) == (
        "train@causal may run data/blocks/causal: will be written again by group_texts@causal; if it does not"
        " change, this stage does not run"
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
    set_history(monkeypatch)
    for line in why.describe_forecast(build_forecast(Verdict.RUNS, change)):
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
            "`dvc repro` would run 2 stages and restore 1 from the cache; 1 more depends on their outputs.",
        ),
    ],
)
def test_why_starts_with_the_number_of_stages(verdicts: list[Verdict], target: str | None, said: str) -> None:
    assert why.summarize([build_forecast(verdict) for verdict in verdicts], target) == said


@pytest.mark.parametrize(
    ("number", "said"), [(0, ""), (1, "0"), (3, "0, 1, 2"), (4, "0, 1, 2 and 1 more"), (9, "0, 1, 2 and 6 more")]
)
def test_list_names_shows_the_first_and_the_number_of_others(number: int, said: str) -> None:
    assert list_names([str(index) for index in range(number)]) == said


# -- a project ---------------------------------------------------------------------------------------------------------


def run_why(project: Path, *stage: str) -> str:
    """Run why and return its output on one line."""
    return " ".join(run_command(project, "python", "-m", "tools.why", *stage).split())


@pytest.mark.slow
def test_why_of_a_project_names_changed_keys_functions_and_files(clean: Path) -> None:
    head = run_command(clean, "git", "rev-parse", "--short", "HEAD").strip()
    assert f"would run nothing: the outputs of {len(ALL)} stages are up to date" in run_why(clean)

    edit_yaml(clean / "params.yaml", tasks__causal__learning_rate=0.5)
    said = run_why(clean)
    assert "would run 1 stage; 1 more depends on their outputs." in said
    assert f"train@causal runs (last run: commit {head}) params.yaml: tasks.causal.learning_rate: 0.004 -> 0.5" in said
    assert "evaluate@causal may run models/causal: will be written again by train@causal; if" in said
    assert "would run nothing" in run_why(clean, "train@mlm")
    run_command(clean, "git", "checkout", "-q", "params.yaml")

    file = clean / "stages/figures/metrics.py"
    text = file.read_text()
    file.write_text(text.replace('"""Return the indices of', '"""Return the numbers of'))
    said = run_why(clean)
    assert "would run 1 stage. code runs" in said and "stages: figures/metrics.py" in said
    assert "Only comments, docstrings or messages of the code changed" in said
    file.write_text(text.replace("max(num_chosen, 1)", "max(1, num_chosen)"))
    said = run_why(clean, "train@causal")
    assert "would run 1 stage." in said and "Only comments" in said
    said = run_why(clean, "evaluate@mlm")
    assert "baseline@mlm runs" in said and "stages/figures/metrics.py: choose_documents" in said
    assert "train@mlm" not in said
    file.write_text(text)

    with (clean / "data/sample/askscience.jsonl").open("a") as lines:
        lines.write('{"title": "?", "answers": {"text": ["!"]}}\n')
    said = run_why(clean, "download")
    assert "download runs" in said and "data/sample/askscience.jsonl: changed (" in said
    run_command(clean, "git", "checkout", "-q", ".")
    more = clean / "data/sources/more.md"  # ignored by git
    more.write_text("x")
    said = run_why(clean, "baseline@mlm")
    more.unlink()
    assert "data/sources: more.md (2 files, 1 at the last run)" in said


@pytest.mark.slow
def test_why_of_values_of_an_experiment_shows_restored_stages(clean: Path) -> None:
    run_command(clean, "dvc", "exp", "run", "-n", "short", "-S", "tasks.causal.learning_rate=0.5")
    said = run_why(clean)
    assert "would run nothing" in said
    run_command(clean, "git", "reset", "-q", "--hard")
    run_command(clean, "dvc", "checkout", "-q", "--force")
    edit_yaml(clean / "params.yaml", tasks__causal__learning_rate=0.5)
    said = run_why(clean)
    assert "would restore 2 from the cache." in said
    assert "0.5 also in experiment short" in said and "same values, code and inputs: experiment short" in said
    output = run_command(clean, "dvc", "repro")
    assert parse_stages_run(output) == set() and output.count("is cached - skipping run") == 2


@pytest.mark.slow
def test_why_of_missing_outputs_shows_whether_the_cache_has_them(clean: Path) -> None:
    run_command(clean, "rm", "-r", "models/causal")
    said = run_why(clean, "train@causal")
    assert "train@causal is restored from DVC's cache" in said and "models/causal: does not exist" in said
    run_command(clean, "mv", ".dvc/cache", "cache-aside")
    try:
        said = run_why(clean, "train@causal")
    finally:
        run_command(clean, "rm", "-rf", ".dvc/cache")
        run_command(clean, "mv", "cache-aside", ".dvc/cache")
    assert "DVC's cache does not have it (`dvc pull` fetches it if it was pushed)" in said
    assert "restored" not in said


@pytest.mark.slow
def test_why_of_a_conflicted_lock_or_unknown_stage_exits_with_one_line(clean: Path) -> None:
    printed = run_command(clean, "python", "-m", "tools.why", "trian@causal", check=False)
    assert "why: trian@causal is not a stage of dvc.yaml; did you mean train@causal?" in printed
    lock = clean / "dvc.lock"
    lock.write_text("<<<<<<< ours\n" + lock.read_text())
    printed = run_command(clean, "python", "-m", "tools.why", check=False)
    assert "why: dvc.lock:1: a merge conflict: run `git checkout HEAD -- dvc.lock`" in printed
    assert "Traceback" not in printed


@pytest.mark.slow
def test_why_imports_no_torch(clean: Path) -> None:
    program = "import sys; sys.argv = ['why']; from tools.why import main; main(); print('torch' in sys.modules)"
    done = subprocess.run(["python", "-c", program], cwd=clean, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "False"
