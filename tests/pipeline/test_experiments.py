"""The experiment workflow with the real DVC: run, queue, compare, go back, share, shrink."""

import getpass
import json
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from dvc_project import ALL, TASKS, edit_yaml, flatten_revisions, parse_stages_run, run_command


def list_experiments(project: Path) -> set[str]:
    """Return the names of the experiments that have results."""
    rows = flatten_revisions(json.loads(run_command(project, "dvc", "exp", "show", "--json")))
    return {row["name"] for row in rows if row.get("name") and (row.get("data") or {}).get("metrics")}


@pytest.mark.slow
def test_experiments_grid_in_the_queue_finishes_with_two_parallel_jobs(clean: Path) -> None:
    grid = ("-S", "tasks.causal.learning_rate=0.001,0.01", "-S", "seed=1,2")
    assert run_command(clean, "dvc", "exp", "run", "--queue", *grid).count("Queued experiment") == 4
    before = list_experiments(clean)
    run_command(clean, "dvc", "queue", "start", "-j", "2")
    for _ in range(300):
        status = run_command(clean, "dvc", "queue", "status")
        if "Running" not in status and "Queued" not in status:
            break
        time.sleep(2)
    assert "Failed" not in status, status
    assert len(list_experiments(clean) - before) == 4
    run_command(clean, "dvc", "queue", "stop", check=False)
    compared = run_command(clean, "python", "-m", "tools.compare")
    assert "(seeds 1, 2)" in compared or "(seeds 2, 1)" in compared
    assert " +- " in compared
    assert all(len(line) <= 120 for line in compared.splitlines())


@pytest.mark.slow
def test_experiments_in_a_temporary_directory_do_not_change_the_workspace(clean: Path) -> None:
    run_command(clean, "dvc", "exp", "run", "--temp", "-n", "aside", "-S", "tasks.mlm.learning_rate=0.01")
    assert run_command(clean, "git", "status", "--porcelain") == ""
    assert "aside" in list_experiments(clean)


@pytest.mark.slow
def test_experiments_are_compared_applied_and_branched(clean: Path) -> None:
    run_command(clean, "dvc", "exp", "run", "-n", "other", "-S", "tasks.causal.learning_rate=0.02")
    assert "tasks.causal.learning_rate" in run_command(clean, "dvc", "params", "diff")
    assert "causal.test.bpb" in run_command(clean, "dvc", "metrics", "diff")
    run_command(clean, "git", "reset", "-q", "--hard")
    run_command(clean, "dvc", "checkout", "-q")
    difference = run_command(clean, "dvc", "exp", "diff", "main", "other")
    assert "tasks.causal.learning_rate" in difference and "causal.test.bpb" in difference
    assert "mlm.test" not in difference
    assert "learning_rate" in run_command(
        clean, "env", "COLUMNS=900", "dvc", "exp", "show", "--no-pager", "--only-changed"
    )
    page = run_command(clean, "dvc", "plots", "diff", "main", "other", "--out", "plots").strip()
    assert "causal: training loss" in Path(page.removeprefix("file://")).read_text(encoding="utf-8")
    shutil.rmtree(clean / "plots")
    run_command(clean, sys.executable, "-m", "tools.report")
    report = (clean / "reports/report.html").read_text(encoding="utf-8")
    pieces = re.findall(r'<span class="(better|worse)-[1-4]" title="([+-])[0-9.]+ bits">', report)
    assert pieces and all((kind == "better") == (sign == "-") for kind, sign in pieces)
    drawing = ("reports/compare/causal.json", "--template", "difference", "--out", "plots")
    plot = run_command(clean, "dvc", "plots", "show", *drawing).strip()
    drawn = Path(plot.removeprefix("file://")).read_text(encoding="utf-8")
    assert '"experiment": "other"' in drawn and "bits per byte more than the baseline" in drawn
    shutil.rmtree(clean / "plots")
    run_command(clean, "dvc", "exp", "apply", "other")
    assert "0.02" in (clean / "params.yaml").read_text(encoding="utf-8")
    assert parse_stages_run(run_command(clean, "dvc", "repro")) == set()
    run_command(clean, "git", "reset", "-q", "--hard")
    run_command(clean, "dvc", "exp", "branch", "other", "kept")
    assert "kept" in run_command(clean, "git", "branch")


@pytest.mark.slow
def test_experiments_with_an_earlier_block_size_are_restored_without_running(clean: Path) -> None:
    lock = (clean / "dvc.lock").read_text(encoding="utf-8")
    edit_yaml(clean / "params.yaml", block_size=32)
    assert parse_stages_run(run_command(clean, "dvc", "repro"))
    edit_yaml(clean / "params.yaml", block_size=64)
    output = run_command(clean, "dvc", "repro")
    assert parse_stages_run(output) == set()
    assert output.count("is cached - skipping run, checking out outputs") == 6
    assert (clean / "dvc.lock").read_text(encoding="utf-8") == lock


def test_experiments_garbage_collection_of_the_workspace_keeps_repro_a_no_op(clean: Path) -> None:
    run_command(clean, "dvc", "gc", "--workspace", "--force")
    assert parse_stages_run(run_command(clean, "dvc", "repro")) == set()


def check_sharing(clean: Path, remote: str, tmp_path: Path, *configure: tuple[str, ...]) -> None:
    """Push to `remote`, clone and pull; check that the clone has the same state and `dvc repro` runs nothing."""
    clone = tmp_path / "clone"
    try:
        for repository in (clean, clone):
            if repository is clone:
                run_command(clean, "git", "clone", "-q", ".", str(clone))
            run_command(repository, "dvc", "remote", "add", "--local", "-d", "shared", remote)
            for options in configure:
                run_command(repository, "dvc", "remote", "modify", "--local", "shared", *options)
            run_command(repository, "dvc", "push" if repository is clean else "pull")
        assert parse_stages_run(run_command(clone, "dvc", "repro")) == set()
        assert run_command(clone, "dvc", "status") == run_command(clean, "dvc", "status")
        for task in TASKS:
            weights = f"models/{task}/model.safetensors"
            assert (clone / weights).read_bytes() == (clean / weights).read_bytes()
    finally:
        (clean / ".dvc/config.local").unlink(missing_ok=True)


def test_experiments_pushed_to_a_directory_and_pulled_elsewhere_run_nothing(clean: Path, tmp_path: Path) -> None:
    check_sharing(clean, str(tmp_path / "remote"), tmp_path)


@pytest.fixture
def ssh_server(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """Port and client key of a temporary SSH server on the loopback."""
    sshd = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/usr/bin")
    if sshd is None:
        pytest.skip("no sshd here (Debian: apt-get install openssh-server)")
    pytest.importorskip("dvc_ssh", reason="dvc-ssh is not installed (uv pip install dvc-ssh)")
    for name in ("host", "client"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)], check=True)
    shutil.copy(tmp_path / "client.pub", tmp_path / "authorized_keys")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    Path("/run/sshd").mkdir(exist_ok=True)
    settings = {
        "ListenAddress": f"127.0.0.1:{port}",
        "HostKey": tmp_path / "host",
        "AuthorizedKeysFile": tmp_path / "authorized_keys",
        "PidFile": tmp_path / "pid",
        "StrictModes": "no",
        "PasswordAuthentication": "no",
        "Subsystem": "sftp internal-sftp",
    }
    (tmp_path / "sshd_config").write_text("".join(f"{key} {value}\n" for key, value in settings.items()))
    server = subprocess.Popen([sshd, "-D", "-e", "-f", str(tmp_path / "sshd_config")], stderr=subprocess.DEVNULL)
    try:
        for _ in range(50):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield port, tmp_path / "client"
    finally:
        server.terminate()
        server.wait()


@pytest.mark.slow
def test_experiments_pushed_over_ssh_and_pulled_elsewhere_run_nothing(
    clean: Path, tmp_path: Path, ssh_server: tuple[int, Path]
) -> None:
    port, key = ssh_server
    options = [("port", str(port)), ("user", getpass.getuser()), ("keyfile", str(key)), ("allow_agent", "false")]
    check_sharing(clean, f"ssh://127.0.0.1{tmp_path / 'remote'}", tmp_path, *options)


@pytest.mark.slow
def test_experiments_two_clean_runs_write_the_same_lock(project: Path, tmp_path: Path) -> None:
    clone = tmp_path / "elsewhere"
    run_command(project, "git", "clone", "-q", ".", str(clone))
    lock = (clone / "dvc.lock").read_text(encoding="utf-8")
    (clone / "dvc.lock").unlink()
    shutil.rmtree(clone / "metrics")
    assert parse_stages_run(run_command(clone, "env", "PYTHONHASHSEED=7", "dvc", "repro")) == ALL
    assert (clone / "dvc.lock").read_text(encoding="utf-8") == lock
