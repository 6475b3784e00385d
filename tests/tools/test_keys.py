"""keys: the keys of every stage, each with its type, meaning and composed value."""

import subprocess
import sys

import pytest

from stages.core.compose import read_root
from stages.core.config import CONF
from stages.core.source_code import list_stages
from tools.check import get_config_class
from tools.keys import list_keys

STAGES = [*list_stages(), "code"]


def run_keys(*arguments: str, columns: int = 80) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "tools.keys", *arguments],
        capture_output=True,
        text=True,
        cwd=CONF.parent,
        env={"PATH": "/usr/bin:/bin", "COLUMNS": str(columns)},
        check=False,
    )


@pytest.mark.parametrize("stage", STAGES)
def test_list_keys_gives_every_key_a_meaning(stage: str) -> None:
    assert [key.name for key in list_keys(get_config_class(stage)) if not key.meaning] == []


@pytest.mark.parametrize("stage", STAGES)
def test_keys_names_all_groups_and_keys_within_the_width_of_the_terminal(stage: str) -> None:
    done = run_keys(stage)
    assert done.returncode == 0, done.stderr
    for group in read_root(stage).groups:
        for name in (file.stem for file in (CONF / group).glob("*.yaml")):
            assert name in done.stdout
    assert {key.name for key in list_keys(get_config_class(stage))} <= set(done.stdout.split())
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_keys_shows_the_values_of_the_chosen_configurations_and_their_range() -> None:
    shown = run_keys("train", "hardware=cpu", "block_size=64", columns=200).stdout
    assert "hardware.num_threads = 2  (whole number from 1)" in shown
    assert "block_size = 64  (whole number from 1)" in shown
    assert "seed = 42  (whole number from 0 to below 4294967296)" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "hardware=abacus"], "there is no conf/hardware/abacus.yaml; did you mean cpu?"),
        (["trian"], "invalid choice: 'trian'"),
        (["train", "task=absent"], "absent"),
    ],
)
def test_keys_of_an_unknown_name_fails_with_one_message(arguments: list[str], message: str) -> None:
    done = run_keys(*arguments)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
