"""Tests of the in-toto statement of tools.verify: its structure by the specifications, its summary, and the card.

The structure is checked by code that shares nothing with the writer, from the specifications of in-toto: Statement v1,
ResourceDescriptor, DigestSet, and the predicate test-result v0.1.
"""

import hashlib
import json
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from dvc_project import run_command

from stages.core.artifacts import write_json
from stages.core.errors import StageError
from tools.card import make_card
from tools.publish import find_statement, read_recorded_run
from tools.verify.compare import Difference, MetricChange
from tools.verify.report import Verification, describe_verification, make_statement
from tools.verify.segments import Segment, SegmentReplay, SegmentsResult
from tools.verify.stages import StageResult, Verdict
from tools.verify.statement import get_statement_path, read_statement, summarize_statement

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LOCK = "schema: '2.0'\nstages: {}\n"
STARTED = datetime(2026, 3, 1, 23, 59, 1, 5000, tzinfo=UTC)


def make_stage(name: str, verdict: Verdict = Verdict.VERIFIED, **more: Any) -> StageResult:
    values = {"problem": "", "differences": [], "metric_changes": [], "outs": {f"out/{name}": "a" * 32}, "files": {}}
    if verdict is Verdict.VERIFIED:
        values["files"] = {f"out/{name}": hashlib.sha256(name.encode()).hexdigest()}
    return StageResult(name, verdict, 1.25, **{**values, **more})


def make_segments(num_segments: int = 4, replayed: tuple[int, ...] = (1, 3), **more: Any) -> SegmentsResult:
    segments = [Segment(10 * number, 10 * number + 10) for number in range(num_segments)]
    replays = [SegmentReplay(segments[number]) for number in replayed]
    return SegmentsResult(10 * num_segments, segments, 99, replays, 5.0, **more)


def make_verification(*stages: StageResult, commit: str = COMMIT) -> Verification:
    return Verification(commit, LOCK, list(stages), [], [], STARTED, STARTED + timedelta(seconds=90))


VERIFICATIONS = {
    "all": make_verification(make_stage("code"), make_stage("train@causal")),
    "segments": make_verification(make_stage("code"), make_stage("train@causal", segments=make_segments())),
    "differs": make_verification(
        make_stage("code"),
        make_stage(
            "train@causal",
            Verdict.DIFFERS,
            differences=[Difference("outs", "out/train@causal", "changed")],
            metric_changes=[MetricChange("m.json", "loss", 0.0, float("inf"))],
        ),
        make_stage("evaluate@causal", Verdict.NOT_REPLAYED, problem="its input is not available"),
    ),
    "segment differs": make_verification(
        make_stage(
            "train@causal",
            Verdict.DIFFERS,
            segments=make_segments()._replace(replays=[SegmentReplay(Segment(10, 20), first_difference=13)]),
        )
    ),
}


# -- structure ---------------------------------------------------------------------------------------------------------

DIGEST_LENGTHS = {"sha256": 64, "gitCommit": 40}


def find_descriptor_problems(value: Any) -> list[str]:
    """Check a ResourceDescriptor: it has at least one of uri, digest and content, and lowercase hexadecimal digests."""
    problems = [] if {"uri", "digest", "content"} & set(value) else ["neither uri, digest nor content"]
    known = {"name", "uri", "digest", "content", "downloadLocation", "mediaType", "annotations"}
    problems += [f"unknown field {key}" for key in set(value) - known]
    for algorithm, digest in value.get("digest", {}).items():
        if not re.fullmatch(rf"[0-9a-f]{{{DIGEST_LENGTHS[algorithm]}}}", digest):
            problems.append(f"{algorithm}: {digest}")
    return problems


def find_statement_problems(text: str) -> list[str]:
    """Check a Statement v1 with a test-result predicate."""
    statement = json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))
    problems = [f"unknown field {key}" for key in set(statement) - {"_type", "subject", "predicateType", "predicate"}]
    if statement["_type"] != "https://in-toto.io/Statement/v1":
        problems.append("_type")
    if not isinstance(statement["subject"], list) or not statement["subject"]:
        problems.append("subject")
    for subject in statement["subject"]:
        problems += find_descriptor_problems(subject)
        problems += [] if subject.get("digest") else ["a subject without digest"]
    names = [subject["name"] for subject in statement["subject"]]
    problems += ["names of subjects are not unique"] if len(set(names)) != len(names) else []
    if statement["predicateType"] != "https://in-toto.io/attestation/test-result/v0.1":
        problems.append("predicateType")
    predicate = statement["predicate"]
    if predicate["result"] not in ("PASSED", "WARNED", "FAILED"):
        problems.append("result")
    for descriptor in predicate["configuration"]:
        problems += find_descriptor_problems(descriptor)
    for key in ("passedTests", "failedTests"):
        if not all(isinstance(name, str) for name in predicate[key]):
            problems.append(key)
    if (predicate["result"] == "PASSED") == bool(predicate["failedTests"]):
        problems.append("result and failedTests")
    return problems


@pytest.mark.parametrize("name", VERIFICATIONS)
def test_statement_has_the_structure_of_the_specifications(tmp_path: Path, name: str) -> None:
    write_json(tmp_path / "statement.json", make_statement(VERIFICATIONS[name]))
    assert find_statement_problems((tmp_path / "statement.json").read_text()) == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda statement: statement.update(_type="https://in-toto.io/Statement/v0.1"),
        lambda statement: statement["subject"][1]["digest"].update(sha256="ABC"),
        lambda statement: statement["subject"].append(dict(statement["subject"][0])),
        lambda statement: statement["subject"][0].pop("digest"),
        lambda statement: statement["predicate"].update(result="OK"),
        lambda statement: statement["predicate"]["failedTests"].append("code"),
        lambda statement: statement.update(other=1),
    ],
)
def test_statement_check_of_this_test_finds_damage(damage: Callable[[dict[str, Any]], object]) -> None:
    statement = make_statement(VERIFICATIONS["all"])
    damage(statement)
    assert find_statement_problems(json.dumps(statement)) != []


def test_statement_subjects_are_the_commit_and_the_verified_files_only() -> None:
    subjects = {item["name"]: item["digest"] for item in make_statement(VERIFICATIONS["differs"])["subject"]}
    assert subjects == {
        "commit": {"gitCommit": COMMIT},
        "out/code": {"sha256": hashlib.sha256(b"code").hexdigest()},
    }


def test_statement_names_passed_and_failed_stages_and_segments() -> None:
    tests = {
        name: (predicate["result"], predicate["passedTests"], predicate["failedTests"])
        for name, predicate in ((name, make_statement(found)["predicate"]) for name, found in VERIFICATIONS.items())
    }
    parts = ["train@causal: steps 11 to 20", "train@causal: steps 31 to 40"]
    assert tests == {
        "all": ("PASSED", ["code", "train@causal"], []),
        "segments": ("PASSED", ["code", *parts], []),  # not `train@causal`, which was not replayed as a whole
        "differs": ("FAILED", ["code"], ["train@causal", "evaluate@causal"]),
        "segment differs": ("FAILED", [], ["train@causal", parts[0]]),
    }


def test_statement_states_time_machine_versions_seed_and_probability() -> None:
    statement = make_statement(VERIFICATIONS["segments"])
    details = statement["predicate"]["lmRepro"]
    assert (details["timeStarted"], details["timeFinished"]) == ("2026-03-01T23:59:01Z", "2026-03-02T00:00:31Z")
    assert details["machine"].keys() == {"system", "machine", "processor", "python"}
    assert {"torch", "transformers", "numpy", "dvc"} <= details["versions"].keys()
    part = details["segments"]["train@causal"]
    assert (part["seed"], part["probability"], part["stepsReplayed"], part["steps"]) == (99, 0.5, 20, 40)
    assert [replay["firstStep"] for replay in part["replays"]] == [11, 31]
    lock = statement["predicate"]["configuration"][0]
    assert lock == {"name": "dvc.lock", "digest": {"sha256": hashlib.sha256(LOCK.encode()).hexdigest()}}


def test_statement_has_no_name_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    import platform

    text = json.dumps(make_statement(VERIFICATIONS["all"]))
    assert platform.node() == "" or f'"{platform.node()}"' not in text


# -- summary, card and publication -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "all",
            "Verified by replay on 2026-03-02: a clean clone of this commit computed the 2 stages again, and every md5"
            " sum of `dvc.lock` was the same.",
        ),
        (
            "segments",
            "Verified by replay on 2026-03-02: a clean clone of this commit computed the 2 stages again, except"
            " train@causal, and every md5 sum of `dvc.lock` was the same. Of train@causal, 2 of 4 random segments were"
            " replayed (20 of 40 steps): a change of one step would have been caught with a probability of 50%.",
        ),
        (
            "differs",
            "A replay of this commit in a clean clone on 2026-03-02 did not give the same results: train@causal,"
            " evaluate@causal.",
        ),
    ],
)
def test_statement_summary_says_what_was_verified(name: str, expected: str) -> None:
    assert summarize_statement(make_statement(VERIFICATIONS[name])) == expected


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"_type": "https://in-toto.io/Statement/v1"}', "null"],
)
def test_statement_file_that_is_damaged_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_statement(COMMIT) is None
    file = get_statement_path(COMMIT)
    file.parent.mkdir(parents=True)
    file.write_text(text)
    with pytest.raises(StageError, match=f"reports/verify/{COMMIT}.json is not a statement on this commit"):
        read_statement(COMMIT)


def test_statement_on_another_commit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_json(get_statement_path("f" * 40), make_statement(VERIFICATIONS["all"]))
    with pytest.raises(StageError, match="it is about something else"):
        read_statement("f" * 40)


def write_statement(project: Path, name: str) -> Path:
    """Write a statement on the project's commit."""
    commit = run_command(project, "git", "rev-parse", "HEAD").strip()
    file = project / get_statement_path(commit)
    write_json(file, make_statement(VERIFICATIONS[name]._replace(commit=commit)))
    return file


def test_card_says_how_the_commit_was_verified(inside: Path) -> None:
    run, _ = read_recorded_run("causal")
    without = str(make_card(run, None, "mit", None, ""))
    file = write_statement(inside, "segments")
    try:
        text = str(make_card(run, None, "mit", None, ""))
    finally:
        file.unlink()
    assert "verification.json" not in without and "Verified by" not in without
    assert "\n\nVerified by replay on 2026-03-02: a clean clone of this commit computed the 2 stages again" in text
    assert "[verification.json](verification.json) is the statement of `python -m tools.verify`" in text


def test_failed_verification_is_in_the_card_but_not_published(inside: Path) -> None:
    run, _ = read_recorded_run("causal")
    file = write_statement(inside, "differs")
    try:
        text = str(make_card(run, None, "mit", None, ""))
        published = find_statement(run.commit)
    finally:
        file.unlink()
    assert "did not give the same results: train@causal, evaluate@causal." in text
    assert "verification.json" not in text and published == {}


def test_given_seed_is_said_in_the_report_the_statement_and_the_card() -> None:
    segments = make_segments()._replace(is_seed_given=True)
    verification = make_verification(make_stage("train@causal", segments=segments))
    statement = make_statement(verification)
    texts = ["\n".join(describe_verification(verification)), summarize_statement(statement)]
    assert all("if the given seed" in text and "was not known before" in text for text in texts)
    assert statement["predicate"]["lmRepro"]["segments"]["train@causal"]["seedSource"] == "given"
    assert "given seed" not in summarize_statement(make_statement(VERIFICATIONS["segments"]))
