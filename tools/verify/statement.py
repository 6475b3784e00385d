"""in-toto statement of a verification by replay: what was verified, how, and the probability of catching a change.

The statement has the predicate type of test results (https://in-toto.io/attestation/test-result/v0.1): a stage is a
test. What that type has no field for is in the extension field `lmRepro`. It is not signed (docs/verify.md).
"""

from pathlib import Path
from typing import Any

from stages.core.artifacts import read_json
from stages.core.errors import StageError, printable

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://in-toto.io/attestation/test-result/v0.1"
EXTENSION = "lmRepro"
PUBLISHED_NAME = "verification.json"
"""Name of the statement in the repository of a published model."""


def get_statement_path(commit: str) -> Path:
    """Return the default path of the statement on a commit."""
    return Path("reports/verify") / f"{commit}.json"


def build_statement(
    commit: str, lock_sha256: str, tests: dict[str, bool], files: dict[str, str], details: dict[str, Any]
) -> dict[str, Any]:
    """Build the statement on a commit.

    Args:
        commit: full hash of the commit.
        lock_sha256: hexadecimal SHA-256 of its dvc.lock.
        tests: name of each stage, or of each replayed part of it, to True if it was verified.
        files: path of each verified file to its hexadecimal SHA-256.
        details: content of the extension field.
    """
    subject = [{"name": "commit", "digest": {"gitCommit": commit}}]
    subject += [{"name": path, "digest": {"sha256": sha256}} for path, sha256 in files.items()]
    return {
        "_type": STATEMENT_TYPE,
        "subject": subject,
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "result": "PASSED" if all(tests.values()) else "FAILED",
            "configuration": [{"name": "dvc.lock", "digest": {"sha256": lock_sha256}}],
            "passedTests": [name for name, passed in tests.items() if passed],
            "failedTests": [name for name, passed in tests.items() if not passed],
            EXTENSION: {"commit": commit, **details},
        },
    }


def read_statement(commit: str) -> dict[str, Any] | None:
    """Read the statement on a commit from its default path; None if there is none.

    Raises:
        StageError: if the file is not a statement on this commit.
    """
    file = get_statement_path(commit)
    if not file.is_file():
        return None
    try:
        statement: dict[str, Any] = read_json(file)
        predicate = statement["predicate"]
        known = (statement["_type"], statement["predicateType"]) == (STATEMENT_TYPE, PREDICATE_TYPE)
        if not known or predicate[EXTENSION]["commit"] != commit or predicate["result"] not in ("PASSED", "FAILED"):
            raise StageError("it is about something else")
        summarize_statement(statement)
    except (StageError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise StageError(
            f"{file} is not a statement on this commit ({printable(error)}): remove it, or write it again with"
            f" `python -m tools.verify {commit}`"
        ) from None
    return statement


def is_passed(statement: dict[str, Any]) -> bool:
    """Return True if everything was verified."""
    return bool(statement["predicate"]["result"] == "PASSED")


def summarize_statement(statement: dict[str, Any]) -> str:
    """Summarize a statement in one sentence for a model card, in Markdown."""
    predicate = statement["predicate"]
    details = predicate[EXTENSION]
    day, num_stages = str(details["timeFinished"])[:10], len(details["stages"])
    if not is_passed(statement):
        failed = ", ".join(map(printable, predicate["failedTests"]))
        return f"A replay of this commit in a clean clone on {day} did not give the same results: {failed}."
    text = f"Verified by replay on {day}: a clean clone of this commit computed the {num_stages} stages again"
    partly = details.get("segments", {})
    if partly:
        text += f", except {', '.join(map(printable, partly))}"
    text += ", and every md5 sum of `dvc.lock` was the same."
    for stage, part in partly.items():
        text += (
            f" Of {printable(stage)}, {part['numReplayed']:,} of {part['numSegments']:,} random segments were replayed"
            f" ({part['stepsReplayed']:,} of {part['steps']:,} steps): a change of one step would have been caught with"
            f" a probability of {part['probability']:.0%}"
            + (", if the given seed of the choice was not known before." if part.get("seedSource") == "given" else ".")
        )
    return text
