"""Verification of the project's own pipeline: all stages, and trainings by segments; changed steps are caught."""

import json
import re
from pathlib import Path

import pytest
from dvc_project import ALL, edit_yaml, run_command

VERIFY = ("python", "-m", "tools.verify")
# Enough steps for several segments.
STEPS = {f"tasks__{task}__num_train_epochs": 0.4 for task in ("causal", "mlm")}


@pytest.fixture(scope="module")
def kept(project: Path) -> str:
    """Commit of the project whose trainings kept checkpoints, as a branch."""
    run_command(project, "git", "switch", "-q", "-c", "kept")
    keep = {"every_steps": 20, "gigabytes": 1.0, "directory": None}
    edit_yaml(project / "conf/base/hardware.yaml", checkpoints__keep_for_branches=keep)
    edit_yaml(project / "params.yaml", **STEPS)
    run_command(project, "dvc", "repro")
    run_command(project, "git", "commit", "-q", "-a", "-m", "Keep checkpoints")
    commit = run_command(project, "git", "rev-parse", "HEAD").strip()
    run_command(project, "git", "switch", "-q", "main")
    run_command(project, "dvc", "checkout", "-q", "--force")
    return commit


def read_details(project: Path, commit: str) -> dict:
    """Return what this project adds to the statement on a commit."""
    return json.loads((project / f"reports/verify/{commit}.json").read_text())["predicate"]["lmRepro"]


@pytest.mark.slow
def test_verify_all_replays_each_stage_of_the_pipeline(kept: str, clean: Path) -> None:
    output = run_command(clean, *VERIFY, kept, "--all")
    assert f"{len(ALL)} of {len(ALL)} stages verified" in output
    assert read_details(clean, kept)["stages"].keys() == ALL


@pytest.mark.slow
def test_verify_segments_replays_random_segments_of_each_training(kept: str, clean: Path) -> None:
    output = run_command(clean, *VERIFY, kept, "--segments", "2", "--seed", "1")
    assert f"{len(ALL)} of {len(ALL)} stages verified" in output
    assert output.count("replayed 2 of ") == 2 and "(seed 1)" in output
    parts = read_details(clean, kept)["segments"]
    assert parts.keys() == {"train@causal", "train@mlm"}
    for part in parts.values():
        assert part["numSegments"] > 2 and part["numReplayed"] == 2
        assert part["probability"] == 2 / part["numSegments"]


@pytest.mark.slow
def test_verify_segments_of_a_chain_that_was_edited_finds_the_step(kept: str, clean: Path) -> None:
    run_command(clean, "git", "switch", "-q", "--detach", kept)
    run_command(clean, "dvc", "checkout", "-q", "--force")
    chain = clean / "reports/train/causal/state_chain.txt"
    links = chain.read_text().split()
    chain.unlink()  # it may be a link to DVC's cache
    chain.write_text("\n".join([*links[:4], "0" * 16, *links[5:]]) + "\n")
    run_command(clean, "dvc", "commit", "-q", "-f", "train@causal")
    run_command(clean, "git", "commit", "-q", "-a", "-m", "tampered")
    output = run_command(clean, *VERIFY, "--segments", "99", check=False)
    run_command(clean, "git", "switch", "-q", "main")
    assert re.search(r"train@causal +DIFFERS", output)
    assert "steps 1 to 20: DIFFERS from step 5 on" in output
    assert re.search(r"train@mlm +verified", output)


@pytest.mark.slow
def test_verify_training_with_a_changed_step_is_caught(clean: Path) -> None:
    file = clean / "stages/train/state_chain.py"
    code = file.read_text()
    hook = "        previous = self.links[-1]"
    assert hook in code
    change = "        if len(self.links) == 2:\n            next(model.parameters()).data.view(-1)[0] += 0.001\n"
    file.write_text(code.replace(hook, change + hook))
    edit_yaml(clean / "params.yaml", **STEPS)
    run_command(clean, "dvc", "repro")
    file.write_text(code)
    run_command(clean, "dvc", "repro", "code")
    run_command(clean, "dvc", "commit", "-q", "-f")  # the record of the honest code, with the results of the other
    run_command(clean, "git", "switch", "-q", "-c", "changed")
    run_command(clean, "git", "commit", "-q", "-a", "-m", "changed")
    output = run_command(clean, *VERIFY, "--segments", "1", check=False)
    run_command(clean, "git", "switch", "-q", "main")
    assert output.count("DIFFERS from step 3 on") == 2
    assert "with a probability of 100.0% (1 / 1" in output
    assert re.search(r"tokenize@causal +verified", output)
