"""Tests of tools.verify on a repository of two short stages: what replays exactly, and what is caught."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml
from dvc.repo import Repo
from dvc_project import mark_rest_slow
from small_repository import make_repository, run_shell, write_files

from stages.core.errors import StageError
from tools.verify.command import run_verification, verify_commit
from tools.verify.replay import Clone, open_clone
from tools.verify.report import Verification, describe_verification
from tools.verify.segments import Segment, SegmentReplay, SegmentsResult
from tools.verify.stages import StageResult, Verdict
from tools.verify.training import CloneTraining

ROOT = Path(__file__).parents[2]
STAGE = """\
import json, sys
from pathlib import Path
import yaml

def write(path, text):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)

params = yaml.safe_load(Path("params.yaml").read_text())
if sys.argv[1] == "prepare":
    words = Path("data/text.txt").read_text().split() + Path(params["extra"]).read_text().split()
    write("data/words/train.txt", " ".join(words))
    write("data/words/stats.json", json.dumps({"words": len(words), "versions": {"pyyaml": yaml.__version__}}))
else:
    words = Path("data/words/train.txt").read_text().split()
    loss = params["rate"] / len(words)
    write("models/toy/weights.txt", str(loss))
    write("models/toy/figures.json", json.dumps({"loss": loss, "steps": 10}))
    write("metrics/toy.json", json.dumps({"toy": {"loss": loss}}))
"""
FILES = {
    "stage.py": STAGE,
    "dvc.yaml": """\
stages:
  prepare:
    cmd: python stage.py prepare
    deps: [stage.py, data/text.txt, '${extra}']
    params: [extra]
    outs: [data/words]
  fit:
    cmd: python stage.py fit
    deps: [stage.py, data/words]
    params: [rate]
    outs: [models/toy]
    metrics: [metrics/toy.json: {cache: false}]
""",
    "params.yaml": "rate: 0.5\nextra: data/extra.txt\n",
    "data/text.txt": "one two three\n",
    "data/extra.txt": "four\n",
    ".gitignore": "/data/words\n/data/extra.txt\n/models/\n/reports/\n",
}


@pytest.fixture(scope="module")
def committed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Repository of two stages, whose results are committed; data/extra.txt is not in git."""
    directory = tmp_path_factory.mktemp("committed")
    write_files(directory, FILES)
    run_shell(directory, "git init -q -b main && dvc init -q && dvc repro -q && git add -A && git commit -q -m all")
    return directory


@pytest.fixture
def toy(committed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy of the repository as the current directory, and an empty directory for temporary files."""
    shutil.copytree(committed, tmp_path / "toy", symlinks=True)
    (tmp_path / "tmp").mkdir()
    monkeypatch.chdir(tmp_path / "toy")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("DVC_NO_ANALYTICS", "true")
    return tmp_path / "toy"


def verify(rev: str = "HEAD") -> Verification:
    with Repo() as repo:
        return verify_commit(repo, rev)


def list_temporary_files() -> list[Path]:
    return list(Path(tempfile.gettempdir()).iterdir())


def commit(directory: Path) -> None:
    run_shell(directory, "git commit -q -a -m changed")


def edit_lock(change: Callable[[dict[str, dict]], object]) -> None:
    """Apply `change` to the entries of dvc.lock, and commit it."""
    lock = yaml.safe_load(Path("dvc.lock").read_text())
    change(lock["stages"])
    Path("dvc.lock").write_text(yaml.safe_dump(lock))
    commit(Path())


def list_verdicts(verification: Verification) -> list[tuple[str, str]]:
    return [(stage.name, stage.verdict.value) for stage in verification.stages]


def list_differences(verification: Verification) -> set[tuple[str, str, str]]:
    """Return stage, kind and path of each difference."""
    return {
        (stage.name, difference.kind, difference.path)
        for stage in verification.stages
        for difference in stage.differences
    }


def describe(verification: Verification) -> str:
    return "\n".join(describe_verification(verification))


# -- what is verified --------------------------------------------------------------------------------------------------


def test_verify_unchanged_commit_is_verified_and_workspace_stays_as_it_was(
    toy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {
        path: path.stat().st_mtime_ns for path in toy.rglob("*") if path.is_file() and ".dvc/tmp" not in str(path)
    }
    assert run_verification("HEAD", None, None) == 0
    output = capsys.readouterr().out
    assert "2 of 2 stages verified" in output
    written = {path for path in toy.rglob("*") if path.is_file() and ".dvc/tmp" not in str(path)} - before.keys()
    sha = run_shell(toy, "git rev-parse HEAD").strip()
    assert written == {toy / f"reports/verify/{sha}.json"}
    del before[toy / ".git/index"]  # git status refreshes it
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert list_temporary_files() == []
    assert run_shell(toy, "git status --porcelain") == ""


def test_verify_runs_every_command_although_caches_have_the_results(toy: Path) -> None:
    (toy / "stage.py").write_text("raise SystemExit(3)\n")
    edit_lock(lambda stages: None)
    verification = verify()
    assert list_verdicts(verification) == [("prepare", "not replayed"), ("fit", "not replayed")]
    assert "its command failed with exit code" in verification.stages[0].problem
    assert verification.stages[1].problem == "its input data/words is not available"


def test_verify_earlier_commit_and_tag_are_verified_from_a_later_workspace(
    toy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_shell(toy, "git tag -a first -m first")
    (toy / "params.yaml").write_text("rate: 0.25\nextra: data/extra.txt\n")
    run_shell(toy, "dvc repro -q && git commit -q -a -m second")
    verification = verify("first")
    assert verification.verified
    assert verification.commit == run_shell(toy, "git rev-parse HEAD~1").strip()
    assert "the workspace is at another commit" in capsys.readouterr().err


def test_verify_experiment_is_verified(toy: Path) -> None:
    run_shell(toy, "dvc exp run -q -n wide -S rate=0.125")
    verification = verify("wide")
    assert verification.verified
    assert "rate: 0.125" in verification.lock


def test_verify_dirty_workspace_verifies_the_commit_and_says_so(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (toy / "params.yaml").write_text("rate: 3\nextra: data/extra.txt\n")
    (toy / "stage.py").write_text("broken")
    assert verify().verified
    found = re.search(r"the workspace has changes that are not committed \((.*)\), which", capsys.readouterr().err)
    assert found is not None and {"params.yaml", "stage.py"} <= set(found[1].split(", "))


def test_verify_without_workspace_files_and_cache_is_verified(toy: Path) -> None:
    shutil.rmtree(toy / ".dvc/cache")
    shutil.rmtree(toy / "models")
    assert verify().verified


# -- inputs that are not in git ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", mark_rest_slow(["../notes/extra.txt", "/ABSOLUTE/extra.txt"], 1))
def test_verify_input_outside_the_repository_is_found(toy: Path, tmp_path: Path, path: str) -> None:
    path = path.replace("/ABSOLUTE", str(tmp_path / "absolute"))
    (toy / path).parent.mkdir()
    (toy / path).write_text("five six\n")
    (toy / "params.yaml").write_text(f"rate: 0.5\nextra: {path}\n")
    run_shell(toy, "dvc repro -q && git commit -q -a -m outside")
    assert verify().verified


def test_verify_input_that_dvc_tracks_is_taken_from_its_cache(toy: Path) -> None:
    run_shell(toy, "dvc add -q data/extra.txt && git add -A . && git commit -q -m tracked")
    (toy / "data/extra.txt").unlink()
    assert verify().verified


@pytest.mark.parametrize(("change", "reason"), [("gone", "neither in git nor in the workspace"), ("new", "differs")])
def test_verify_input_that_is_not_as_in_the_lock_is_named_and_not_used(toy: Path, change: str, reason: str) -> None:
    (toy / "data/extra.txt").unlink()
    if change == "new":
        (toy / "data/extra.txt").write_text("other\n")
    verification = verify()
    assert not verification.verified
    assert len(verification.missing_inputs) == 1 and reason in verification.missing_inputs[0]
    assert verification.stages[0].problem == "its input data/extra.txt is not available"


def test_verify_damaged_input_in_the_cache_is_refused(toy: Path) -> None:
    run_shell(toy, "dvc add -q data/extra.txt && git add -A . && git commit -q -m tracked")
    md5 = yaml.safe_load((toy / "data/extra.txt.dvc").read_text())["outs"][0]["md5"]
    (toy / "data/extra.txt").unlink()
    overwrite(toy / f".dvc/cache/files/md5/{md5[:2]}/{md5[2:]}", "fine\n")
    verification = verify()
    assert verification.missing_inputs == ["data/extra.txt: its copy in DVC's cache is damaged"]
    assert verification.stages[0].verdict is Verdict.NOT_REPLAYED


# -- what is caught ----------------------------------------------------------------------------------------------------


def overwrite(file: Path, text: str) -> None:
    file.chmod(0o644)
    file.write_text(text)


def find_cached_model(toy: Path, name: str) -> Path:
    """Return the path in DVC's cache of a file of models/toy."""
    with Repo(str(toy)) as repo:
        from stages.core.dvc_cache import DvcCache

        cache = DvcCache(repo)
        md5 = yaml.safe_load((toy / "dvc.lock").read_text())["stages"]["fit"]["outs"][1]["md5"]
        listed = cache.list_files(md5)
        assert listed is not None
        return cache.get_path(listed[name])


def test_verify_tampered_model_in_the_workspace_is_caught(toy: Path) -> None:
    weights = toy / "models/toy/weights.txt"
    stat = weights.stat()
    overwrite(weights, "0.9999"[: stat.st_size].ljust(stat.st_size, "9"))
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # DVC, which trusts time and size, sees no change
    verification = verify()
    assert list_verdicts(verification) == [("prepare", "verified"), ("fit", "differs")]
    assert list_differences(verification) == {("fit", "copy", "models/toy")}
    assert "weights.txt changed" in describe(verification)


def test_verify_tampered_model_in_the_cache_is_caught(toy: Path) -> None:
    overwrite(find_cached_model(toy, "weights.txt"), "7")
    verification = verify()
    assert list_differences(verification) == {("fit", "copy", "models/toy")}
    assert "weights.txt: its file in DVC's cache is damaged" in describe(verification)


@pytest.mark.parametrize("ignored", mark_rest_slow([True, False], 1))
def test_verify_metrics_that_were_not_committed_are_caught(toy: Path, ignored: bool) -> None:
    if ignored:
        (toy / ".gitignore").write_text((toy / ".gitignore").read_text() + "/metrics/\n")
    run_shell(toy, "git rm -q --cached metrics/toy.json && git add .gitignore && git commit -q -m removed")
    verification = verify()
    assert list_differences(verification) == {("fit", "git", "metrics/toy.json")}
    assert "metrics/toy.json: it was not committed" in describe(verification)


def test_verify_damaged_listing_in_the_cache_is_caught(toy: Path) -> None:
    listing = next((toy / ".dvc/cache").rglob("*.dir"))
    overwrite(listing, "{")
    assert [kind for _, kind, _ in list_differences(verify())] == ["copy"]


def test_verify_model_of_another_lock_in_the_workspace_is_no_difference(toy: Path) -> None:
    first = run_shell(toy, "git rev-parse HEAD").strip()
    (toy / "params.yaml").write_text("rate: 2\nextra: data/extra.txt\n")
    run_shell(toy, "dvc repro -q")
    assert verify(first).verified


OTHER_MD5 = "0123456789abcdef0123456789abcdef"


@pytest.mark.parametrize(
    ("change", "expected"),
    mark_rest_slow(
        [
            (lambda stages: stages["fit"]["outs"][1].update(md5=f"{OTHER_MD5}.dir"), ("fit", "outs", "models/toy")),
            (lambda stages: stages["fit"]["outs"][0].update(size=1), ("fit", "outs", "metrics/toy.json")),
            (lambda stages: stages["fit"]["deps"][1].update(md5=OTHER_MD5), ("fit", "deps", "stage.py")),
            (lambda stages: stages["fit"]["params"]["params.yaml"].update(rate=0.6), ("fit", "params", "params.yaml")),
            (lambda stages: stages["fit"]["params"]["params.yaml"].update(more=1), ("fit", "params", "params.yaml")),
            (lambda stages: stages["fit"].update(cmd="python other.py"), ("fit", "cmd", "")),
        ],
        4,
    ),
    ids=["md5 of an out", "size", "md5 of a dependency", "value", "key", "command"],
)
def test_verify_tampered_lock_is_caught(
    toy: Path, change: Callable[[dict[str, dict]], object], expected: tuple[str, str, str]
) -> None:
    edit_lock(change)
    verification = verify()
    assert list_verdicts(verification) == [("prepare", "verified"), ("fit", "differs")]
    # The md5 sums of outs also differ from those of the workspace's files.
    assert list_differences(verification) - {("fit", "copy", "models/toy")} == {expected}


def test_verify_model_and_lock_tampered_together_are_caught_by_the_replay(toy: Path) -> None:
    overwrite(toy / "models/toy/weights.txt", "0.9")
    run_shell(toy, "dvc commit -q -f fit && git commit -q -a -m tampered")
    verification = verify()
    assert list_differences(verification) == {("fit", "outs", "models/toy")}
    assert "outs: models/toy: weights.txt changed" in describe(verification)


def test_verify_tampered_metrics_file_is_caught_with_its_relative_difference(toy: Path) -> None:
    figures = json.loads((toy / "metrics/toy.json").read_text())
    (toy / "metrics/toy.json").write_text(json.dumps({"toy": {"loss": figures["toy"]["loss"] / 2}}))
    commit(toy)
    verification = verify()
    assert list_differences(verification) == {("fit", "git", "metrics/toy.json"), ("fit", "copy", "metrics/toy.json")}
    assert "1 number differs by 1 of its value: metrics/toy.json, toy.loss: 0.0625 -> 0.125" in describe(verification)


def test_verify_last_digits_are_told_from_other_values_by_the_numbers(toy: Path) -> None:
    changed = STAGE.replace('params["rate"] / len(words)', 'params["rate"] / len(words) * (1 + 1e-7)')
    (toy / "stage.py").write_text(changed)
    commit(toy)
    verification = verify()
    assert {change.key for change in verification.stages[1].metric_changes} == {"loss", "toy.loss"}
    assert all(change.relative < 2e-7 for change in verification.stages[1].metric_changes)
    assert "the most by 1e-07 of its value" in describe(verification)


def test_verify_code_that_changed_after_the_lock_is_caught(toy: Path) -> None:
    (toy / "stage.py").write_text(STAGE + "# a comment\n")
    commit(toy)
    verification = verify()
    assert list_differences(verification) == {("prepare", "deps", "stage.py"), ("fit", "deps", "stage.py")}
    assert "The commit has other values, code or inputs than its dvc.lock was written with." in describe(verification)


def test_verify_first_stage_with_other_outputs_is_named(toy: Path) -> None:
    shown = describe_after_lock_change(lambda stages: stages["prepare"]["outs"][0].update(md5=f"{OTHER_MD5}.dir"))
    assert "prepare is the first stage with other outputs for the same values, code and inputs" in shown


def describe_after_lock_change(change: Callable[[dict[str, dict]], object]) -> str:
    edit_lock(change)
    return describe(verify())


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda stages: stages.pop("fit"), ("fit", "dvc.lock has no entry of it")),
        (lambda stages: stages.update(old=stages["fit"]), ("old", "dvc.yaml has no such stage")),
    ],
    ids=["without entry", "without stage"],
)
def test_verify_stage_that_is_not_in_both_files_is_not_verified(
    toy: Path, change: Callable[[dict[str, dict]], object], expected: tuple[str, str]
) -> None:
    edit_lock(change)
    found = {stage.name: stage for stage in verify().stages}
    assert found[expected[0]].verdict is Verdict.NOT_REPLAYED
    assert expected[1] in found[expected[0]].problem


def test_verify_other_version_of_a_library_is_said_first(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (toy / "stage.py").write_text(STAGE.replace("yaml.__version__", "'1.2.3'"))
    run_shell(toy, "dvc repro -q && git commit -q -a -m older")
    verification = verify()
    assert [re.sub(r"but .* is", "but X is", text) for text in verification.environment_differences] == [
        "data/words was made with pyyaml 1.2.3, but X is installed: results may differ"
    ]
    messages = capsys.readouterr().err
    assert messages.index("pyyaml 1.2.3") < messages.index("stage 1 of 2")


# -- trainings by segments ---------------------------------------------------------------------------------------------


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Repository with a stage `train` as the current directory."""
    monkeypatch.chdir(make_repository(tmp_path))
    return tmp_path


def verify_segments(*replays: SegmentReplay, model_difference: str | None = None) -> StageResult:
    """Verify the training with these results of its segments, and check that its outs are in the clone."""

    def verify_training(clone: Clone, stage: str) -> SegmentsResult:
        assert stage == "train" and (clone.directory / "models/weights").read_text() == "32 2"
        segments = [Segment(0, 10), Segment(10, 15)]
        return SegmentsResult(15, segments, 7, list(replays), 0.5, model_difference=model_difference)

    with Repo() as repo:
        (stage,) = verify_commit(repo, "HEAD", verify_training).stages
    return stage


FIRST = Segment(0, 10)


@pytest.mark.parametrize(
    ("replay", "model_difference", "expected"),
    mark_rest_slow(
        [
            (SegmentReplay(FIRST), None, Verdict.VERIFIED),
            (SegmentReplay(FIRST, first_difference=3), None, Verdict.DIFFERS),
            (SegmentReplay(FIRST, difference="a weight"), None, Verdict.DIFFERS),
            (SegmentReplay(FIRST, problem="damaged"), None, Verdict.NOT_REPLAYED),
            (SegmentReplay(FIRST), "another model", Verdict.DIFFERS),
        ],
        2,
    ),
)
def test_verify_training_by_segments_has_their_verdict(
    trained: Path, replay: SegmentReplay, model_difference: str | None, expected: Verdict
) -> None:
    stage = verify_segments(replay, model_difference=model_difference)
    assert stage.verdict is expected
    assert bool(stage.files) == (expected is Verdict.VERIFIED)


def test_verify_training_by_segments_catches_a_tampered_lock(trained: Path) -> None:
    edit_lock(lambda stages: stages["train"]["params"]["params.yaml"].update(block_size=64))
    stage = verify_segments(SegmentReplay(FIRST))
    assert stage.verdict is Verdict.DIFFERS
    assert [(found.kind, found.description) for found in stage.differences] == [("params", "block_size: 64 -> 32")]


def test_verify_training_by_segments_catches_a_damaged_model_in_the_cache(trained: Path) -> None:
    md5 = yaml.safe_load(Path("dvc.lock").read_text())["stages"]["train"]["outs"][1]["md5"]
    overwrite(trained / f".dvc/cache/files/md5/{md5[:2]}/{md5[2:]}", "32 3")
    with Repo() as repo:
        (stage,) = verify_commit(repo, "HEAD", lambda *_: SegmentsResult(15, [FIRST], 7, [], 0.0)).stages
    assert {"outs", "copy"} <= {difference.kind for difference in stage.differences}


def test_verify_training_whose_model_is_not_in_the_cache_is_not_replayed(trained: Path) -> None:
    shutil.rmtree(trained / ".dvc/cache")
    stage = verify_segments()
    assert stage.verdict is Verdict.NOT_REPLAYED
    assert "is not in DVC's cache: run `dvc pull`, or verify with --all" in stage.problem


def test_verify_replays_without_the_kept_checkpoints_of_this_machine(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LM_REPRO_BRANCHES", "/shared/kept")
    with Repo() as repo, open_clone(repo, repo.scm.get_rev(), {}) as clone:
        directories = {clone.environment[name] for name in ("LM_REPRO_CACHE", "LM_REPRO_BRANCHES")}
        assert all(Path(name).is_relative_to(clone.directory.parent) for name in directories)
        assert CloneTraining(clone, "toy").environment["LM_REPRO_BRANCHES"] == "/shared/kept"


# -- refusals and interruptions ----------------------------------------------------------------------------------------


def run_command(directory: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tools.verify", *arguments],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    mark_rest_slow(
        [
            (["no-such-commit"], "verify: error: git knows no commit and no experiment no-such-commit"),
            (["HEAD\x1b[2J"], "git knows no commit and no experiment HEAD\\x1b[2J"),
            (["--segments", "0"], "--segments: a whole number from 1"),
            (["--seed", "3"], "--seed chooses segments: add --segments N"),
            (["--all", "--segments", "1"], "not allowed with argument --all"),
            (["--statement", "data"], "a directory of that name exists"),
        ],
        3,
    ),
)
def test_verify_wrong_argument_is_refused_in_one_line(toy: Path, arguments: list[str], message: str) -> None:
    done = run_command(toy, *arguments)
    assert done.returncode != 0 and done.stdout == ""
    assert message in done.stderr.splitlines()[-1]
    assert not (toy / "reports").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    mark_rest_slow(
        [
            (None, "it has no dvc.lock"),
            ("", "it has no dvc.lock"),
            ("schema: '2.0'\n", "its dvc.lock has no stages"),
            ("{", "its dvc.lock has no stages"),
            ("stages: {fit: 5}\n", "is damaged: fit is no entry of a stage"),
            ("stages: {fit: {outs: [{md5: a}]}}\n", "is damaged: fit is no entry of a stage"),
            ("stages: {fit: {params: {a: 1}}}\n", "is damaged: fit is no entry of a stage"),
        ],
        4,
    ),
)
def test_verify_commit_without_valid_lock_is_refused(toy: Path, text: str | None, message: str) -> None:
    (toy / "dvc.lock").unlink()
    if text is not None:
        (toy / "dvc.lock").write_text(text)
    commit(toy)
    with pytest.raises(StageError, match=re.escape(message)):
        verify()


def test_verify_outside_a_repository_is_refused(tmp_path: Path) -> None:
    done = run_command(tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("verify: error: ") and done.stderr.count("\n") == 1


def test_verify_commit_without_dvc_directory_is_refused(toy: Path) -> None:
    run_shell(toy, "git rm -q -r --cached .dvc && git commit -q -m gone")
    with pytest.raises(StageError, match=r"has no directory \.dvc"):
        verify()


def test_verify_broken_pipeline_is_refused(toy: Path) -> None:
    (toy / "dvc.yaml").write_text("stages: {fit: {comand: x}}\n")
    commit(toy)
    with pytest.raises(StageError, match="DVC cannot read the stages of commit"):
        verify()
    assert list_temporary_files() == []


def test_verify_in_a_git_hook_does_not_touch_the_repository(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_DIR", str(toy / ".git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(toy / ".git/index"))
    assert verify().verified
    assert run_shell(toy, "git status --porcelain --branch") == "## main\n"


def make_slow(toy: Path) -> None:
    """Make the first stage write its process id to the file PID and wait."""
    wait = "import os, time\nPath(os.environ['PID_FILE']).write_text(str(os.getpid()))\ntime.sleep(600)\n"
    (toy / "stage.py").write_text(STAGE.replace("params = ", wait + "params = ", 1))
    commit(toy)


@pytest.mark.parametrize("number", mark_rest_slow([signal.SIGTERM, signal.SIGKILL, signal.SIGINT], 2))
def test_verify_that_is_killed_leaves_no_statement_and_no_clone(
    toy: Path, tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_slow(toy)
    pid_file = tmp_path / "pid"
    own = {"PYTHONPATH": str(ROOT), "PID_FILE": str(pid_file), "TMPDIR": tempfile.gettempdir()}
    process = subprocess.Popen([sys.executable, "-m", "tools.verify"], cwd=toy, env={**os.environ, **own})
    deadline = time.monotonic() + 60
    while not (pid_file.is_file() and pid_file.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    stage = psutil.Process(int(pid_file.read_text()))
    process.send_signal(number)
    code = process.wait(timeout=60)
    assert not (toy / "reports").exists()
    if number == signal.SIGKILL:  # nothing can be removed then; the next verification does
        stage.kill()
        assert len(list_temporary_files()) == 1
        run_shell(toy, "git reset -q --hard HEAD~1")
        assert verify().verified
    else:
        assert code == 128 + number
        stage.wait(timeout=10)
    assert list_temporary_files() == []


def test_verify_clone_of_a_running_process_is_not_removed_by_another(toy: Path) -> None:
    from tools.verify.replay import _make_temporary_directory

    with _make_temporary_directory() as other:
        assert verify().verified
        assert other.is_dir()
