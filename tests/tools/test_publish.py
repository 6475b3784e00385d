"""Tests of tools.publish: refusals, the card, and uploads to a Hub on the loopback interface."""

import copy
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from data_helpers import read_contents
from dvc_project import edit_yaml, run_command
from hub_cases import TOKEN
from huggingface_hub import ModelCard
from leak_cases import SECRET, make_report
from upload_hub import UploadHub

from stages.core.artifacts import read_json, write_json
from stages.core.errors import StageError
from tools.leaks.report import get_examined_hashes
from tools.publish import read_recorded_run
from tools.verify.statement import build_statement

NAME = "someone/some-model"


def run_publish(project: Path, home: Path, url: str, *arguments: str, **more: str) -> str:
    """Run the command with a Hub at `url` and return "exit CODE: " and its output."""
    kept = {key: value for key, value in os.environ.items() if not key.upper().startswith(("HF_", "HUGGING"))}
    own = {"HF_HOME": str(home), "HF_ENDPOINT": url, "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_XET": "1", **more}
    done = subprocess.run(
        [sys.executable, "-m", "tools.publish", *arguments],
        cwd=project,
        env={**kept, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}", **own},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    output = f"exit {done.returncode}: {done.stdout}{done.stderr}"
    assert "Traceback" not in output, output
    return output


@pytest.fixture
def named_project(clean: Path) -> Path:
    """Project with a Hub repository for its causal model."""
    edit_yaml(clean / "conf/publish.yaml", causal__repository=NAME)
    return clean


# -- refusals ----------------------------------------------------------------------------------------------------------


def append(file: Path, text: str) -> None:
    content = file.read_text()
    file.unlink()  # DVC links it to its cache
    file.write_text(content + text)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("stages/train/stage.py", "# x\n", r"the card would be wrong: code: stages modified"),
        ("models/causal/config.json", " ", r"train@causal: models/causal modified.*evaluate@causal: models/causal"),
        ("models/causal/new.json", "{}", r"train@causal: models/causal modified"),
        ("metrics/causal.json", " ", r"evaluate@causal: metrics/causal\.json modified"),
        ("reports/samples/causal.md", "x", r"evaluate@causal: reports/samples/causal\.md modified"),
        ("data/sample/askscience.jsonl", " ", r"download: data/sample/askscience\.jsonl modified"),
        ("conf/task/causal.yaml", "# x\n", r"^not committed as in the workspace: conf/task/causal\.yaml: "),
        ("params.yaml", "# x\n", r"^not committed as in the workspace: params\.yaml: "),
        ("dvc.lock", "# x\n", r"^not committed as in the workspace: dvc\.lock: "),
        ("dvc.yaml", "# x\n", r"^not committed as in the workspace: dvc\.yaml: "),
    ],
)
def test_publish_workspace_that_differs_from_the_record_is_refused(
    inside: Path, file: str, text: str, message: str
) -> None:
    if not (inside / file).exists():
        (inside / file).write_text("")
    append(inside / file, text)
    with pytest.raises(StageError, match=message):
        read_recorded_run("causal")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("seed", 7, r"train@causal: params\.yaml seed changed"),
        ("tasks__causal__learning_rate", 0.5, r"train@causal: params\.yaml tasks\.causal\.learning_rate changed"),
    ],
)
def test_publish_changed_parameter_is_refused(inside: Path, key: str, value: float, message: str) -> None:
    edit_yaml(inside / "params.yaml", **{key: value})
    with pytest.raises(StageError, match=message):
        read_recorded_run("causal")


@pytest.mark.parametrize(
    ("text", "task", "message"),
    [
        ("causal: {repository: null}", "casual", "casual is not a task of params.yaml: did you mean causal?"),
        ("causal: {repository: null}", "prefix", "prefix is not a task of params.yaml: there are causal, mlm"),
        (
            "mlm: {repository: null}",
            "causal",
            "no section causal: add `causal:` with the keys repository, license, language, private",
        ),
        ("causal: 3", "causal", "conf/publish.yaml has no section causal"),
        ("causal: {repository: x}", "causal", "conf/publish.yaml: causal.license is missing"),
        (
            "causal: {repository: '${oc.env:HF_TOKEN}'}",
            "causal",
            "causal.repository=${oc.env:HF_TOKEN}: ",
        ),
        ("causal: {language: [en, '${oc.env:HF_TOKEN}']}", "causal", "causal.language=${oc.env:HF_TOKEN}: "),
        ("causal: {repository: &a x, license: *a}", "causal", "aliases (*name) and tags (!name) are not allowed"),
    ],
)
def test_publish_invalid_settings_are_refused_by_name(
    clean: Path, tmp_path: Path, text: str, task: str, message: str
) -> None:
    (clean / "conf/publish.yaml").write_text(text)
    output = run_publish(clean, tmp_path, "http://127.0.0.1:1", task, "--dry-run", HF_TOKEN=TOKEN)
    assert output.startswith("exit 1") and message in output
    assert TOKEN not in output


def test_publish_changed_key_of_conf_is_named(inside: Path) -> None:
    edit_yaml(inside / "conf/task/causal.yaml", trainer__weight_decay=0.5)
    with pytest.raises(StageError, match=r"train@causal: conf/task/causal\.yaml trainer changed"):
        read_recorded_run("causal")


def test_publish_file_that_git_ignores_is_named(inside: Path) -> None:
    run_command(inside, "git", "rm", "-q", "--cached", "conf/model/tiny-gpt2.yaml")
    with pytest.raises(StageError, match=r"not committed as in the workspace: conf/model/tiny-gpt2\.yaml: "):
        read_recorded_run("causal")


@pytest.mark.parametrize("size", [0, 500])
def test_publish_truncated_or_missing_lock_is_refused(inside: Path, size: int) -> None:
    lock = inside / "dvc.lock"
    lock.write_bytes(lock.read_bytes()[:size])
    with pytest.raises(StageError, match=r"dvc\.lock"):
        read_recorded_run("causal")
    lock.unlink()
    with pytest.raises(StageError, match="the card would be wrong"):
        read_recorded_run("causal")


def test_publish_changes_of_unrelated_files_are_allowed(inside: Path) -> None:
    for file in ("conf/publish.yaml", "README.md", "docs/new.md"):
        (inside / file).touch()
        append(inside / file, "# x\n")
    edit_yaml(inside / "conf/task/mlm.yaml", trainer__weight_decay=0.5)
    run_command(inside, "git", "commit", "-qam", "other task")
    try:
        assert read_recorded_run("causal")[0].task == "causal"
        with pytest.raises(StageError, match="train@mlm"):
            read_recorded_run("mlm")
    finally:
        run_command(inside, "git", "reset", "-q", "--hard", "HEAD~1")


def test_publish_pickled_weights_are_never_uploaded(inside: Path) -> None:
    (inside / "models/causal/training_args.bin").write_bytes(b"pickle")
    run_command(inside, "dvc", "commit", "--force", "train@causal")
    run_command(inside, "dvc", "commit", "--force", "evaluate@causal")
    run_command(inside, "git", "commit", "-qam", "pickle")
    try:
        with pytest.raises(StageError, match=r"models/causal/training_args\.bin is never published"):
            read_recorded_run("causal")
    finally:
        run_command(inside, "git", "reset", "-q", "--hard", "HEAD~1")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("causal__repository", None, "conf/publish.yaml: causal.repository is null: write OWNER/NAME"),
        ("causal__repository", "name", 'causal.repository="name": '),
        ("causal__license", "Apache 2.0", 'causal.license="Apache 2.0": '),
        ("causal__licence", "mit", "causal.licence is not a key that conf/publish.yaml knows"),
        ("mlm__private", "no", 'conf/publish.yaml: mlm.private="no": '),
        ("mlm__leaks__max_membership_auc", 1.5, "conf/publish.yaml: mlm.leaks.max_membership_auc=1.5: "),
        ("causal__leaks__max_verbatim", 0.5, "causal.leaks.max_verbatim is not a key that conf/publish.yaml knows"),
    ],
)
def test_publish_invalid_configuration_is_named(
    clean: Path, tmp_path: Path, key: str, value: Any, message: str
) -> None:
    edit_yaml(clean / "conf/publish.yaml", **{key: value})
    output = run_publish(clean, tmp_path, "http://127.0.0.1:9", key.partition("__")[0])
    assert output.startswith("exit 1") and message in output


# -- memorization ------------------------------------------------------------------------------------------------------


@pytest.fixture
def leaking_project(named_project: Path) -> Iterator[Path]:
    """Project with a report that its causal model continues 30 % of the documents."""
    stages = yaml.safe_load((named_project / "dvc.lock").read_text())["stages"]
    file = named_project / "reports/leaks/causal.json"
    write_json(file, make_report(share=0.3, examined=get_examined_hashes(stages, "causal")))
    yield named_project
    file.unlink()


def test_publish_model_above_a_limit_is_refused(
    leaking_project: Path, tmp_path: Path, hub: tuple[UploadHub, str]
) -> None:
    server, url = hub
    output = run_publish(leaking_project, tmp_path, url, "causal", HF_TOKEN=TOKEN)
    assert output.startswith("exit 1") and "max_verbatim_share: 0.3 is above 0.01" in output
    assert "(causal.leaks)" in output and "raise the limit" in output and SECRET not in output
    assert server.repositories == {}


def test_publish_dry_run_above_a_limit_writes_the_card_and_says_so(leaking_project: Path, tmp_path: Path) -> None:
    output = run_publish(leaking_project, tmp_path, "http://127.0.0.1:9", "causal", "--dry-run")
    assert output.startswith("exit 0") and "publish: would be refused: models/causal gives away" in output
    card = (leaking_project / "reports/cards/causal.md").read_text()
    assert "| near-verbatim continuations | 30.0% |" in card and "1.0% (exceeded)" in card and SECRET not in card


@pytest.mark.parametrize("limit", [0.3, None])
def test_publish_with_a_raised_limit_uploads_a_card_with_the_figure(
    leaking_project: Path, tmp_path: Path, hub: tuple[UploadHub, str], limit: float | None
) -> None:
    server, url = hub
    edit_yaml(leaking_project / "conf/publish.yaml", causal__leaks__max_verbatim_share=limit)
    output = run_publish(leaking_project, tmp_path, url, "causal", HF_TOKEN=TOKEN)
    assert output.startswith("exit 0: published"), output
    card = server.repositories[NAME]["files"]["README.md"].decode()
    assert "| near-verbatim continuations | 30.0% |" in card and "exceeded" not in card


def test_publish_with_a_stale_report_examines_the_model(leaking_project: Path, tmp_path: Path) -> None:
    file = leaking_project / "reports/leaks/causal.json"
    write_json(file, make_report(share=0.3, examined={"models/causal": "another"}))
    output = run_publish(leaking_project, tmp_path, "http://127.0.0.1:9", "causal", "--dry-run")
    assert output.startswith("exit 0") and "is about another model or other data: examining models/causal" in output
    assert "would be refused" not in output and read_json(file)["examined"]["models/causal"] != "another"
    assert "examining" not in run_publish(leaking_project, tmp_path, "http://127.0.0.1:9", "causal", "--dry-run")


def test_publish_with_missing_canaries_is_refused(named_project: Path, tmp_path: Path) -> None:
    edit_yaml(named_project / "conf/publish.yaml", causal__leaks__canaries="no.jsonl")
    output = run_publish(named_project, tmp_path, "http://127.0.0.1:9", "causal", "--dry-run")
    assert output.startswith("exit 1") and "leaks.canaries=no.jsonl (conf/publish.yaml) cannot be read" in output


def test_publish_without_limits_examines_nothing(named_project: Path, tmp_path: Path) -> None:
    (named_project / "reports/leaks/causal.json").unlink(missing_ok=True)
    none = {f"causal__leaks__max_{key}": None for key in ("verbatim_share", "membership_auc", "exposure")}
    edit_yaml(named_project / "conf/publish.yaml", **none)
    output = run_publish(named_project, tmp_path, "http://127.0.0.1:9", "causal", "--dry-run")
    assert output.startswith("exit 0") and "examining" not in output
    assert "Not examined" in (named_project / "reports/cards/causal.md").read_text()


# -- to the Hub --------------------------------------------------------------------------------------------------------


def test_publish_dry_run_writes_the_card_without_contacting_the_hub(clean: Path, tmp_path: Path) -> None:
    output = run_publish(clean, tmp_path, "http://127.0.0.1:9", "mlm", "--dry-run", HF_TOKEN=TOKEN)
    assert output.startswith("exit 0: reports/cards/mlm.md: the card")
    assert "no license is chosen (conf/publish.yaml: mlm.license)" in output
    assert run_command(clean, "git", "status", "--porcelain") == ""
    run_publish(clean, tmp_path, "http://127.0.0.1:9", "mlm", "--dry-run", str(tmp_path / "card.md"))
    written = (tmp_path / "card.md").read_text()
    assert written == (clean / "reports/cards/mlm.md").read_text()
    assert ModelCard(written).data.license is None and TOKEN not in written + output


@pytest.mark.slow
def test_publish_custom_task_has_a_card_for_its_objective(clean: Path, tmp_path: Path) -> None:
    for file, name in (("params.yaml", "tasks"), ("conf/publish.yaml", None)):
        values = yaml.safe_load((clean / file).read_text())
        sections = values[name] if name else values
        sections["prefix"] = copy.deepcopy(sections["mlm"])
        (clean / file).write_text(yaml.safe_dump(values, sort_keys=False))
    edit_yaml(clean / "conf/publish.yaml", prefix__repository=NAME)
    shutil.copy(clean / "conf/task/mlm.yaml", clean / "conf/task/prefix.yaml")
    run_command(clean, "dvc", "repro", "evaluate@prefix")
    run_command(clean, "git", "add", "-A")
    run_command(clean, "git", "commit", "-qm", "a task")
    try:
        output = run_publish(clean, tmp_path, "http://127.0.0.1:9", "prefix", "--dry-run")
        assert output.startswith("exit 0: reports/cards/prefix.md: the card")
        card = ModelCard((clean / "reports/cards/prefix.md").read_text())
        assert (card.data.pipeline_tag, card.data.model_name) == ("fill-mask", "some-model")
        assert {"pseudo_bits_per_byte", "masked_loss"} <= {result.metric_type for result in card.data.eval_results}
        assert "dvc repro evaluate@prefix" in card.text and "  prefix:\n" in card.text
        assert "conf/task/mlm.yaml" not in card.text and "data/tokens/mlm" not in card.text
    finally:
        run_command(clean, "git", "reset", "-q", "--hard", "HEAD~1")


@pytest.fixture
def hub() -> Iterator[tuple[UploadHub, str]]:
    """Hub server and its URL."""
    hub = UploadHub()
    with hub.serve() as url:
        yield hub, url


def test_publish_uploads_the_model_and_its_card_in_one_commit(
    named_project: Path, tmp_path: Path, hub: tuple[UploadHub, str]
) -> None:
    server, url = hub
    output = run_publish(named_project, tmp_path, url, "causal", HF_TOKEN=TOKEN)
    assert output.startswith(f"exit 0: published at {url}/{NAME}\n"), output
    repository = server.repositories[NAME]
    card = repository["files"].pop("README.md").decode()
    assert repository == {"private": True, "files": read_contents(named_project / "models/causal")}
    assert len(server.commits) == 1
    assert "POST /api/validate-yaml" in server.requests
    run_publish(named_project, tmp_path, url, "causal", "--dry-run")
    assert card == (named_project / "reports/cards/causal.md").read_text()
    assert f'model="{NAME}"' in card
    assert f"Bearer {TOKEN}" in server.authorizations  # makes sure that the token was in use
    written = [*tmp_path.rglob("*"), *(named_project / "reports").rglob("*")]
    assert TOKEN not in output + card and not [f for f in written if f.is_file() and TOKEN.encode() in f.read_bytes()]


def test_publish_uploads_the_statement_of_a_verification_and_deletes_that_of_an_earlier_model(
    named_project: Path, tmp_path: Path, hub: tuple[UploadHub, str]
) -> None:
    server, url = hub
    commit = run_command(named_project, "git", "rev-parse", "HEAD").strip()
    details = {"timeFinished": "2026-03-02T00:00:31Z", "stages": {"code": {}}}
    file = named_project / f"reports/verify/{commit}.json"
    write_json(file, build_statement(commit, "0" * 64, {"code": True}, {}, details))
    try:
        output = run_publish(named_project, tmp_path, url, "causal", HF_TOKEN=TOKEN)
        assert output.startswith("exit 0"), output
        published = dict(server.repositories[NAME]["files"])
        assert published["verification.json"] == file.read_bytes()
        assert b"Verified by replay on 2026-03-02" in published["README.md"]
    finally:
        file.unlink()
    output = run_publish(named_project, tmp_path, url, "causal", HF_TOKEN=TOKEN)
    assert "left from an earlier model: verification.json" in output
    assert set(server.repositories[NAME]["files"]) == published.keys() - {"verification.json"}


def test_publish_again_deletes_stale_files_of_an_earlier_model(
    named_project: Path, tmp_path: Path, hub: tuple[UploadHub, str]
) -> None:
    server, url = hub
    theirs = {"model-00001-of-00002.safetensors": b"", "pytorch_model.bin": b"", "LICENSE": b"l", "onnx/a.json": b"a"}
    server.repositories[NAME] = {"private": True, "files": dict(theirs)}
    output = run_publish(named_project, tmp_path, url, "causal", HF_TOKEN=TOKEN)
    assert (
        "deleted from the repository, left from an earlier model: model-00001-of-00002.safetensors, pytorch_model.bin"
        in output
    )
    kept = {"README.md", "LICENSE", "onnx/a.json"}
    assert set(server.repositories[NAME]["files"]) == kept | set(read_contents(named_project / "models/causal"))
    assert len(server.commits) == 1


def test_publish_private_model_to_a_public_repository_is_refused(
    named_project: Path, tmp_path: Path, hub: tuple[UploadHub, str]
) -> None:
    server, url = hub
    server.repositories[NAME] = {"private": False, "files": {}}
    output = run_publish(named_project, tmp_path, url, "causal", HF_TOKEN=TOKEN)
    assert output.startswith("exit 1") and "exists and is public" in output
    assert server.repositories[NAME]["files"] == {}


def test_publish_card_refused_by_the_hub_creates_no_repository(
    named_project: Path, tmp_path: Path, hub: tuple[UploadHub, str]
) -> None:
    server, url = hub
    edit_yaml(named_project / "conf/publish.yaml", causal__license="no-such-license")
    output = run_publish(named_project, tmp_path, url, "causal", HF_TOKEN=TOKEN)
    assert output.startswith("exit 1") and "license" in output and "must be one of apache-2.0" in output
    assert server.repositories == {}


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, "run `hf auth login`, or set HF_TOKEN"), (403, f"the token cannot write to {NAME} (403)")],
)
def test_publish_refused_token_is_reported_without_showing_it(
    named_project: Path, tmp_path: Path, status: int, message: str
) -> None:
    server = UploadHub(refusal=status)
    with server.serve() as url:
        output = run_publish(named_project, tmp_path, url, "causal", HF_TOKEN=TOKEN)
    assert output.startswith("exit 1") and message in output
    assert f"Bearer {TOKEN}" in server.authorizations and TOKEN not in output
    assert output.count("\n") <= 4  # with the notes on license and remote


def test_publish_without_token_says_how_to_log_in(named_project: Path, tmp_path: Path) -> None:
    assert "run `hf auth login`" in run_publish(named_project, tmp_path, "http://127.0.0.1:9", "causal")


@pytest.mark.parametrize("listens", [False, True])
def test_publish_without_network_fails_within_seconds(named_project: Path, tmp_path: Path, listens: bool) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if listens:
            server.listen()  # and never answers
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        started = time.monotonic()
        output = run_publish(named_project, tmp_path, url, "causal", HF_TOKEN=TOKEN)
    assert time.monotonic() - started < 15
    assert output.startswith("exit 1") and f"the Hub cannot be reached: {url}: " in output and TOKEN not in output
