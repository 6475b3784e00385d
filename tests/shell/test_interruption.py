"""Signals, and the end of the parent dvc: first a request to end, SIGKILL only after a grace period."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from data_helpers import REPOSITORY

pytestmark = pytest.mark.timeout(60)

# Signal handling of a stage without torch: it runs until it is asked to end, and then needs `seconds` to end.
LOOP = """
import sys, time
from stages.shell import interruption
from stages.shell.app import end_with_dvc
from stages.shell.interruption import Interrupted, end_on_signals, defer_signals
interruption.GRACE_SECONDS = float(sys.argv[1])
end_on_signals()
end_with_dvc()
try:
    with defer_signals() as request:
        print("ready", flush=True)
        while request.number is None:
            time.sleep(0.05)
        print("asked by", int(request.number), flush=True)
        time.sleep(float(sys.argv[2]))
    print("checkpoint", flush=True)
    raise Interrupted(request.number)
except Interrupted as interrupted:
    time.sleep(float(sys.argv[2]))  # to clean up
    print("ended by", int(interrupted.number), flush=True)
    sys.exit(interrupted.exit_code)
"""
# Waits for the stage that it runs; `dvc` is the name of its file.
DVC = "import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:]).returncode)"


def start(*prefix: str, grace: float = 30.0, seconds: float = 0.2) -> "subprocess.Popen[str]":
    """Start LOOP in a process, and wait until it is ready."""
    process = subprocess.Popen(
        [*prefix, sys.executable, "-c", LOOP, str(grace), str(seconds)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # the tests may run under nohup
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def start_by_dvc(tmp_path: Path, *prefix: str, **named: float) -> "subprocess.Popen[str]":
    (tmp_path / "dvc").write_text(DVC)
    return start(*prefix, sys.executable, str(tmp_path / "dvc"), **named)


def read_lines(process: "subprocess.Popen[str]") -> list[str]:
    """Return the lines that LOOP prints until it ends, which closes the pipe even if its parent has ended."""
    assert process.stdout is not None
    return process.stdout.read().splitlines()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_is_a_request_and_then_the_exit_code(number):
    process = start()
    process.send_signal(number)
    assert read_lines(process) == [f"asked by {number}", "checkpoint", f"ended by {number}"]
    assert process.wait(10) == 128 + number


@pytest.mark.parametrize(("first", "second"), [(signal.SIGTERM, signal.SIGTERM), (signal.SIGHUP, signal.SIGTERM)])
@pytest.mark.parametrize("line", ["asked by", "checkpoint"])
def test_second_signal_that_is_no_ctrl_c_changes_nothing(first, second, line):
    process = start(seconds=2)
    process.send_signal(first)
    lines: list[str] = []
    while not (lines and lines[-1].startswith(line)):
        lines.append(process.stdout.readline().strip())
    try:
        process.wait(1.2)  # later than a signal that comes twice
    except subprocess.TimeoutExpired:
        process.send_signal(second)
    assert [*lines, *read_lines(process)] == [f"asked by {first}", "checkpoint", f"ended by {first}"]
    assert process.wait(10) == 128 + first


def test_second_ctrl_c_ends_at_once():
    process = start(seconds=3)
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == f"asked by {signal.SIGTERM}\n"
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1.2)
    process.send_signal(signal.SIGINT)
    assert read_lines(process) == [f"ended by {signal.SIGINT}"]


def test_hangup_that_is_ignored_at_the_start_stays_ignored():
    process = start("nohup")
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1.0)
    process.send_signal(signal.SIGTERM)
    assert read_lines(process) == [f"asked by {signal.SIGTERM}", "checkpoint", f"ended by {signal.SIGTERM}"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_stage_whose_dvc_is_gone_writes_a_checkpoint_and_ends(tmp_path, number):
    dvc = start_by_dvc(tmp_path)
    dvc.send_signal(number)
    assert read_lines(dvc) == [f"asked by {signal.SIGTERM}", "checkpoint", f"ended by {signal.SIGTERM}"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signal_to_dvc_and_its_stage_is_one_request(tmp_path, number):
    dvc = start_by_dvc(tmp_path, seconds=1.5)
    os.killpg(dvc.pid, number)
    assert read_lines(dvc) == [f"asked by {number}", "checkpoint", f"ended by {number}"]


def test_stage_that_does_not_end_in_the_grace_is_killed(tmp_path):
    dvc = start_by_dvc(tmp_path, grace=1.0, seconds=3600)
    dvc.kill()
    assert read_lines(dvc) == [f"asked by {signal.SIGTERM}"]
