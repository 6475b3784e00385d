"""Tests of tools.ladder: the file, the rungs that are run, and the result, in a DVC repository of one short stage."""

import functools
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from dvc_project import ROOT, mark_rest_slow, run_command
from safetensors import safe_open
from small_repository import run_shell, write_files

from stages.core.config import read_yaml
from stages.core.errors import ConfigError, StageError
from tools.experiments import WorkingTree
from tools.ladder.file import Ladder, Rung, read_ladder
from tools.ladder.result import LadderResult, analyze, describe_result, make_points, read_results, write_result
from tools.ladder.rungs import MeasuredRung, RungState, State, count_parameters, find_states, read_measured
from tools.report_ladder import build_ladder_parts
from tools.scaling_law import Law

# Writes what the training of a rung writes, and bits per byte of a known law; three epochs fail.
STAGE = """\
import json, yaml
from pathlib import Path

epochs = yaml.safe_load(Path("params.yaml").read_text())["tasks"]["causal"]["num_train_epochs"]
config = yaml.safe_load(Path("conf/model/tiny.yaml").read_text())["config"]
assert epochs != 3
width, num_blocks = config["n_embd"], 500
size = 12 * width**2 + 13 * width + 2 * width + 332 * width
bits = 1.0 + 20 * size**-0.3 + 30 * (32 * num_blocks * epochs) ** -0.4
files = {
    "models/causal/config.json": {"n_layer": 1, "n_head": 1, "vocab_size": 300, "n_positions": 32, **config},
    "reports/train/causal/stats.json": {"blocks": num_blocks, "epochs": epochs, "steps": 100, "best_step": None},
    "data/blocks/causal/train/stats.json": {"block_size": 32},
    "scores/causal/metrics.json": {"causal": {"validation": {"bits_per_byte": bits, "bits_per_byte_se": 0.02}}},
    "scores/causal/headline.json": {"causal": {"val": {"bpb": bits}}},
}
for name, value in files.items():
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(json.dumps(value))
"""
EVALUATION = """\
mkdir -p reports/evaluate/causal metrics
cp validation.parquet scores/causal/metrics.json reports/evaluate/causal
cp scores/causal/headline.json metrics/causal.json
"""
PIPELINE = """\
stages:
  train:
    foreach: ${tasks}
    do:
      cmd: python stage.py
      deps: [stage.py]
      params: ['tasks.${key}.num_train_epochs', conf/model/tiny.yaml: [config]]
      outs: ['models/${key}', 'reports/train/${key}', 'data/blocks/${key}', 'scores/${key}']
  evaluate:
    foreach: ${tasks}
    do:
      cmd: bash evaluate.sh
      deps: ['scores/${key}', evaluate.sh, validation.parquet]
      outs: ['reports/evaluate/${key}']
      metrics: ['metrics/${key}.json': {cache: false}]
"""
WIDTH, EPOCHS = "conf/model/tiny.yaml:config.n_embd", "tasks.causal.num_train_epochs"
LADDER = {
    "task": "causal",
    "sizes": {f"w{width}": {WIDTH: width} for width in (8, 16, 32)},
    "lengths": {f"e{number}": {EPOCHS: epochs} for number, epochs in enumerate((0.5, 1.0, 2.0))},
}


def dump(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False)


FILES = {
    "stage.py": STAGE,
    "evaluate.sh": EVALUATION,
    "dvc.yaml": PIPELINE,
    "params.yaml": "seed: 1\ntasks:\n  causal: {num_train_epochs: 1.0}\n",
    "conf/model/tiny.yaml": "config: {model_type: gpt2, n_embd: 8}\n",
    ".gitignore": "/models/\n/reports/\n/data/\n/scores/\n",
    "ladders/small.yaml": dump(LADDER),
}


def write_ladder_files(directory: Path) -> None:
    write_files(directory, FILES)
    (directory / "validation.parquet").write_bytes(make_documents([100, 200]))


def make_documents(num_bytes: list[int]) -> bytes:
    """Return a table of scores of documents with these numbers of bytes."""
    content = io.BytesIO()
    columns = {"record": range(len(num_bytes)), "source": ["s"] * len(num_bytes), "bytes": num_bytes}
    pq.write_table(pa.table({name: list(values) for name, values in columns.items()}), content)
    return content.getvalue()


def run_ladder(directory: Path, options: str = "", file: str = "ladders/small.yaml") -> tuple[int, str]:
    """Run the command; return its exit status and output."""
    output = run_shell(directory, f"python -m tools.ladder {file} {options}; echo STATUS $?", PYTHONPATH=str(ROOT))
    text, _, status = output.rpartition("STATUS ")
    return int(status), text


def list_runs(output: str) -> list[str]:
    """Return the experiments that a run of the command ran."""
    return re.findall(r"^ladder: \[\d+/\d+\] ([\w-]+)", output, flags=re.MULTILINE)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository after a run of the ladder, whose output is in ladder.log."""
    directory = tmp_path_factory.mktemp("ladder")
    write_ladder_files(directory)
    run_shell(directory, "git init -q -b main && dvc init -q && dvc repro -q && git add -A && git commit -q -m all")
    status, output = run_ladder(directory)
    assert status == 0, output
    (directory / ".git/ladder.log").write_text(output)
    return directory


@pytest.fixture
def restored(repository: Path) -> Path:
    """The repository with the files as committed."""
    run_shell(repository, "git checkout -q . && dvc checkout -q --force")
    return repository


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Current directory with the files of the repository, without git and DVC."""
    write_ladder_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# -- states of rungs ---------------------------------------------------------------------------------------------------


class FakeOuts:
    """dvc.lock and outs of revisions, as `Outs` reads them."""

    def __init__(self, locks: dict[str, Any], outs: dict[tuple[str, str], Any] | None = None) -> None:
        self.read_lock = locks.__getitem__
        self._outs = outs or {}

    def read_out(self, rev: str, path: str) -> bytes | None:
        content = self._outs.get((rev, path), self._outs.get(("", path)))
        return content if content is None or isinstance(content, bytes) else json.dumps(content).encode()


class FakeTree(WorkingTree):
    """Working tree with the values of the current directory and these hashes."""

    def __init__(self, **hashes: str) -> None:
        self.stages, self.whole_groups = {"tokenize@causal", "evaluate@causal"}, set()
        self.read_values = lambda file: read_yaml(Path(file)) if Path(file).is_file() else {}
        self.hash_path = ({"text.jsonl": "t0", "code/evaluate.json": "c0"} | hashes).__getitem__


def make_lock(width: int, epochs: float, code: str = "c0") -> dict[str, Any]:
    """Return the entries of a run; those of another task have other values."""
    causal = {"params.yaml": {EPOCHS: epochs}}
    return {
        "tokenize@causal": {
            "deps": [{"path": "text.jsonl", "md5": "t0"}],
            "params": {"conf/model/tiny.yaml": {"config": {"model_type": "gpt2", "n_embd": width}}},
            "outs": [{"path": "data/tokens"}],
        },
        "evaluate@causal": {
            "deps": [{"path": "code/evaluate.json", "md5": code}, {"path": "data/tokens", "md5": f"{width}"}],
            "params": causal,
        },
        "evaluate@mlm": {"params": {"params.yaml": {EPOCHS: 99}}},
    }


def make_shown(locks: dict[str, Any], **executors: str) -> list[dict[str, Any]]:
    """Return the output of `dvc exp show --json` with experiments named `ladder-small-NAME`."""
    experiments = [
        {
            "revs": [{"rev": name, "name": f"ladder-small-{name}"}],
            "executor": executors.get(name) and {"state": executors[name]},
        }
        for name in [*locks, *executors]
    ]
    return [{"rev": "workspace"}, {"rev": "f" * 40, "name": "ladder-small-w8-e2", "experiments": experiments}]


def find_small_states(locks: dict[str, Any], **executors: str) -> dict[str, tuple[State, str]]:
    outs: Any = FakeOuts(locks)
    found = find_states(read_ladder(Path("ladders/small.yaml")), make_shown(locks, **executors), outs, FakeTree())
    return {state.rung.experiment.removeprefix("ladder-small-"): (state.state, state.reason) for state in found}


def test_states_of_rungs_follow_from_their_experiments(workplace: Path) -> None:
    locks = {"w8-e0": make_lock(8, 0.5), "w8-e1": make_lock(8, 2.0), "w16-e0": make_lock(8, 0.5), "w32-e0": {}}
    states = find_small_states(locks, **{"w32-e1": "running", "w32-e2": "failed"})
    assert states["w8-e0"] == (State.DONE, "")
    assert states["w8-e1"] == (State.STALE, "params.yaml:tasks.causal.num_train_epochs was 2.0, now 1.0")
    assert states["w16-e0"][0] is State.STALE and states["w16-e0"][1].startswith("conf/model/tiny.yaml:config was")
    assert states["w32-e0"] == (State.STALE, "its dvc.lock has no evaluate@causal")
    assert states["w32-e1"] == (State.PENDING, "running") and states["w32-e2"] == (State.MISSING, "failed")
    assert states["w8-e2"] == (State.MISSING, "")  # a branch of this name is no experiment


@pytest.mark.parametrize(
    ("file", "text", "reason"),
    [
        ("conf/model/tiny.yaml", "config: {model_type: bert, n_embd: 8}\n", "conf/model/tiny.yaml:config was"),
        ("conf/model/other.yaml", "config: {}\n", ""),
        ("params.yaml", "seed: 2\ntasks:\n  causal: {num_train_epochs: 9}\n", ""),  # not read, and set by the ladder
    ],
)
def test_state_of_a_rung_depends_on_the_values_that_it_reads(
    workplace: Path, file: str, text: str, reason: str
) -> None:
    locks = {"w8-e0": make_lock(8, 0.5)}
    Path(file).write_text(text)
    state, found = find_small_states(locks)["w8-e0"]
    assert (state is State.STALE, found[: len(reason)]) == (bool(reason), reason)


def test_state_of_a_rung_of_other_code_is_stale_and_that_of_other_tokens_is_not(workplace: Path) -> None:
    states = find_small_states({"w8-e0": make_lock(8, 0.5), "w16-e0": make_lock(16, 0.5, code="c1")})
    assert states["w8-e0"] == (State.DONE, "")
    assert states["w16-e0"] == (State.STALE, "the code of evaluate changed")


def make_outs(**ledger: Any) -> dict[tuple[str, str], Any]:
    """Return the outs of every rung."""
    config = {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 1, "vocab_size": 300, "n_positions": 32}
    return {
        ("", "models/causal/config.json"): config,
        ("", "reports/train/causal/stats.json"): {
            "blocks": 500,
            "epochs": 4.0,
            "steps": 200,
            "best_step": None,
            **ledger,
        },
        ("", "data/blocks/causal/train/stats.json"): {"block_size": 32},
        ("", "reports/evaluate/causal/metrics.json"): {
            "causal": {"validation": {"bits_per_byte": 2.0, "bits_per_byte_se": 0.02}}
        },
        ("", "reports/evaluate/causal/validation.parquet"): make_documents([100, 200]),
    }


def read_small(outs: dict[tuple[str, str], Any], **trainer: Any) -> list[MeasuredRung]:
    """Return the rungs w8-e0 and w8-e1."""
    ladder = read_ladder(Path("ladders/small.yaml"))
    training = {"params": {"params.yaml": {}, "conf/task/causal.yaml": {"trainer": trainer}}}
    locks = {f"w8-e{number}": {"train@causal": training} for number in range(2)}
    found: Any = FakeOuts(locks, outs)
    states = [RungState(rung, State.DONE, "", f"w8-{rung.length}") for rung in ladder.rungs[:2]]
    return read_measured(ladder, states, found)


@pytest.mark.parametrize(
    ("trainer", "best_step", "passes"),
    [
        ({}, 50, 4),
        ({"load_best_model_at_end": False}, 50, 4),
        ({"load_best_model_at_end": True}, 50, 1),
        ({"load_best_model_at_end": True}, None, 4),
    ],
)
def test_tokens_of_a_rung_are_those_until_the_step_whose_weights_the_model_has(
    workplace: Path, trainer: dict[str, Any], best_step: int | None, passes: int
) -> None:
    measured = read_small(make_outs(best_step=best_step), **trainer)
    assert {rung.num_tokens for rung in measured} == {passes * 500 * 32}


def test_rungs_with_different_validation_documents_are_refused(workplace: Path) -> None:
    other = {("w8-e1", "reports/evaluate/causal/validation.parquet"): make_documents([100, 201])}
    with pytest.raises(StageError, match="ladder-small-w8-e0 and ladder-small-w8-e1 were evaluated on different"):
        read_small({**make_outs(), **other})


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ladder_runs_each_rung_once_and_predicts_the_largest(repository: Path) -> None:
    output = (repository / ".git/ladder.log").read_text()
    assert len(list_runs(output)) == 9 and "ladder-small-w32-e2" in list_runs(output)
    assert "within the interval: yes" in output
    assert run_shell(repository, "git status --porcelain") == ""
    result = json.loads((repository / "reports/ladder/small.json").read_text())
    assert [point["size"] for point in result["points"]][-1] == "w32" and result["back_test"]["within"]
    (size,) = {point["num_parameters"] for point in result["points"] if point["size"] == "w8"}
    assert size == 12 * 64 + 13 * 8 + 2 * 8 + 332 * 8
    assert {point["num_tokens"] for point in result["points"]} == {8000, 16000, 32000}


@pytest.mark.slow
def test_ladder_with_all_results_runs_nothing_and_repeats_the_result(restored: Path) -> None:
    before = (restored / "reports/ladder/small.json").read_bytes()
    status, output = run_ladder(restored)
    assert status == 0 and list_runs(output) == [] and "Running stage" not in output
    assert (restored / "reports/ladder/small.json").read_bytes() == before


@pytest.mark.slow
def test_ladder_with_a_removed_experiment_runs_only_its_rung(restored: Path) -> None:
    run_shell(restored, "dvc exp remove ladder-small-w16-e1")
    status, output = run_ladder(restored)
    assert status == 0 and list_runs(output) == ["ladder-small-w16-e1"]


@pytest.mark.slow
def test_ladder_with_another_value_runs_the_rungs_that_use_it_again(restored: Path) -> None:
    changed = {**LADDER, "lengths": {**LADDER["lengths"], "e1": {EPOCHS: 1.5}}}
    (restored / "ladders/small.yaml").write_text(dump(changed))
    status, output = run_ladder(restored, "--dry-run")
    assert status == 0 and output.count("params.yaml:tasks.causal.num_train_epochs was 1.0, now 1.5") == 3
    assert len(re.findall(r"^dvc --wait-for-lock exp run --temp --name ladder", output, flags=re.MULTILINE)) == 3


@pytest.mark.slow
def test_ladder_in_an_edited_working_tree_runs_the_rungs_again(restored: Path) -> None:
    (restored / "conf/model/tiny.yaml").write_text("config: {model_type: gpt2, n_embd: 8, n_inner: 16}\n")
    (restored / "params.yaml").write_text(FILES["params.yaml"].replace("seed: 1", "seed: 2"))  # no stage reads it
    assert run_ladder(restored, "--dry-run")[1].count("to run again: conf/model/tiny.yaml:config was") == 9


@pytest.mark.slow
def test_ladder_with_a_setting_that_no_stage_reads_says_so(restored: Path) -> None:
    (restored / "ladders/small.yaml").write_text(dump({**LADDER, "set": {"seed": 1}}))
    output = run_ladder(restored, "--dry-run")[1]
    assert output.count("no stage of evaluate@causal reads params.yaml:seed") == 9


@pytest.mark.slow
def test_ladder_with_failing_rungs_runs_the_others_and_reports_the_failure(restored: Path) -> None:
    changed = {**LADDER, "lengths": {**LADDER["lengths"], "broken": {EPOCHS: 3.0}}}
    (restored / "ladders/small.yaml").write_text(dump(changed))
    status, output = run_ladder(restored)
    assert list_runs(output) == [f"ladder-small-w{width}-broken" for width in (8, 16, 32)]
    assert status == 1 and "within the interval: yes" in output
    assert "Without results, and not in the fit: ladder-small-w8-broken, ladder-small-w16-broken" in output
    assert "ladder: 3 of 12 rungs have no results" in output


@pytest.mark.slow
def test_ladder_with_changed_code_or_source_data_runs_all_rungs_again(restored: Path) -> None:
    for file, text in (("stage.py", STAGE + "# changed\n"), ("evaluate.sh", "# changed\n" + EVALUATION)):
        (restored / file).write_text(text)
        assert run_ladder(restored, "--dry-run")[1].count(f"to run again: {file} changed") == 9
        run_shell(restored, "git checkout -q .")


@pytest.mark.slow
def test_ladder_in_the_queue_waits_for_it(restored: Path) -> None:
    run_shell(restored, "dvc exp remove ladder-small-w8-e0")
    status, output = run_ladder(restored, "--queue")
    assert status == 0 and list_runs(output) == ["ladder-small-w8-e0"] and "dvc queue start" in output
    assert re.search(r"^ladder-small-w8-e0 +in the queue: queued$", run_ladder(restored, "--dry-run")[1], re.MULTILINE)
    run_shell(restored, "dvc queue remove --all")
    assert run_ladder(restored)[0] == 0


@pytest.mark.slow
def test_ladder_without_results_says_so(restored: Path) -> None:
    (restored / "ladders/other.yaml").write_text(dump(LADDER))
    status, output = run_ladder(restored, "--fit-only", "ladders/other.yaml")
    (restored / "ladders/other.yaml").unlink()
    assert (status, output.strip()) == (1, "ladder: none of the 9 rungs has results")


def test_ladder_that_dvc_could_not_save_runs_no_rung(workplace: Path) -> None:
    Path("dvc.yaml").write_text(f"{PIPELINE}plots: [reports/train/mlm/loss.tsv]\n")
    training = {"cmd": "x", "outs": [{"path": "reports/train/mlm", "md5": f"{'0' * 32}.dir"}]}
    Path("dvc.lock").write_text(dump({"schema": "2.0", "stages": {"train@mlm": training}}))
    run_shell(workplace, "git init -q -b main && dvc init -q && git add -A && git commit -q -m all")
    status, output = run_ladder(workplace)
    assert status == 1 and output.startswith("ladder: reports/train/mlm: not in DVC's cache") and not list_runs(output)


def test_ladder_outside_a_repository_is_an_error_of_one_line(workplace: Path) -> None:
    status, output = run_ladder(workplace)
    assert status == 1 and output.startswith("ladder: ") and len(output.splitlines()) == 1


# -- the file ----------------------------------------------------------------------------------------------------------


def read_changed(**changes: Any) -> Any:
    Path("ladders/small.yaml").write_text(dump({**LADDER, **changes}))
    return read_ladder(Path("ladders/small.yaml"))


def test_file_lists_all_combinations_with_their_settings(workplace: Path) -> None:
    ladder = read_changed(set={"seed": 3})
    assert (ladder.name, ladder.task, ladder.target, len(ladder.rungs)) == ("small", "causal", "evaluate@causal", 9)
    assert ladder.rungs[1].experiment == "ladder-small-w8-e1"
    assert list(ladder.rungs[1].settings.items()) == [("seed", 3), (WIDTH, 8), (EPOCHS, 1)]


def test_file_with_seeds_lists_each_seed(workplace: Path) -> None:
    rungs = read_changed(seeds=[1, 2]).rungs
    assert [rung.experiment for rung in rungs[:2]] == ["ladder-small-w8-e0-seed1", "ladder-small-w8-e0-seed2"]
    assert len(rungs) == 18 and rungs[1].settings["seed"] == 2


def test_settings_of_a_size_override_those_of_all_rungs(workplace: Path) -> None:
    assert read_changed(set={WIDTH: 5}).rungs[0].settings[WIDTH] == 8


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"task": "mlm"}, "task=mlm is not a task of params.yaml; there are causal"),
        ({"task": 3}, "task=3: it should be a valid string"),
        ({"tasks": "causal"}, "tasks is not a key that a ladder knows"),
        ({"sizes": {"a": {WIDTH: 1}, "b": {WIDTH: 2}}}, "sizes has 2: a law needs at least 3"),
        ({"lengths": {}}, "lengths has 0: a law needs at least 3"),
        ({"lengths": {"a": {}, "b": {}, "c": {}}}, "two of lengths have the same settings"),
        ({"sizes": {"a b": {}}}, "string should match pattern"),
        ({"sizes": {"--temp": {}}}, "string should match pattern"),
        ({"sizes": {"x" * 41: {}}}, "string should have at most 40 characters"),
        ({"sizes": [1]}, "should be"),
        (
            {"sizes": {"a": {WIDTH: 1}, "a-b": {WIDTH: 2}, "c": {WIDTH: 3}},
             "lengths": {"b-c": {EPOCHS: 1}, "c": {EPOCHS: 2}, "d": {EPOCHS: 3}}},
            "two rungs would have the name a-b-c: rename a size or a length",
        ),
        ({"seeds": []}, "list should have at least 1 item"),
        ({"seeds": [1, 1]}, "seeds has a seed twice"),
        ({"seeds": [1], "set": {"seed": 1}}, "seed is set both by `seeds` and as a setting"),
        ({"set": {"sed": 1}}, "set: sed: params.yaml has no key sed"),
        ({"set": {"+new": 1}}, "set: '+new' is not a key as in `dvc exp run -S`"),
        ({"set": {"conf/model/tyni.yaml:config": 1}}, "there is no conf/model/tyni.yaml"),
        ({"set": {"conf/model/tiny.yaml:config.new": 1}}, "to add it, write conf/model/tiny.yaml:+config.new"),
        ({"set": {"../x.yaml:a": 1}}, "set: '../x.yaml:a' is not a key"),
        ({"set": {"seed=1 -S x": 1}}, "is not a key as in `dvc exp run -S`"),
        ({"set": {"seed\x1b[2J": 1}}, "set: 'seed\\x1b[2J' is not a key"),
        ({"set": {"seed": "off"}}, 'seed="off": this value cannot be passed to `dvc exp run -S`'),
        ({"set": {"seed": "${oc.env:HOME}"}}, "interpolations are not resolved"),
        ({"set": {"seed": [1, 2]}}, "set.seed"),
        ({"set": {"seed": float("inf")}}, "set.seed"),
        ({"sizes": {**LADDER["sizes"], "w8": {WIDTH: 8, EPOCHS: 1}}}, f"sizes.w8 and lengths.e0 both set {EPOCHS}"),
    ],
)  # fmt: skip
def test_file_with_a_mistake_is_refused(workplace: Path, changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_changed(**changes)
    assert problem in str(error.value) and str(error.value).isascii()
    assert all(line.strip().startswith(("ladders/small.yaml: ", "the config")) for line in str(error.value).split("\n"))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "task is missing"),
        ("- 1\n", "it should be a mapping"),
        ("task: [\n", "ladders/small.yaml: "),
        ("task: &a x\nset: *a\n", "aliases"),
        ("\x00", "ladders/small.yaml: "),
    ],
)
def test_file_that_is_no_ladder_is_refused(workplace: Path, text: str, problem: str) -> None:
    Path("ladders/small.yaml").write_text(text)
    with pytest.raises(ConfigError, match=problem):
        read_ladder(Path("ladders/small.yaml"))


@pytest.mark.parametrize("name", ["a b.yaml", "x.y.yaml", "ü.yaml", "$(id).yaml", "-n.yaml"])
def test_file_with_a_name_that_cannot_name_experiments_is_refused(workplace: Path, name: str) -> None:
    Path(name).write_text(FILES["ladders/small.yaml"])
    with pytest.raises(ConfigError, match="experiments are named after the file"):
        read_ladder(Path(name))


def test_missing_file_suggests_an_existing_one(workplace: Path) -> None:
    with pytest.raises(ConfigError, match=r"did you mean ladders/small\.yaml\?"):
        read_ladder(Path("ladders/smal.yaml"))


@pytest.mark.parametrize("file", sorted((ROOT / "ladders").glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_ladder_is_valid(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert read_ladder(file).rungs


# -- the result --------------------------------------------------------------------------------------------------------

TRUTH = Law(E=1.0, A=20.0, B=30.0, alpha=0.3, beta=0.4)


def make_rung(size: int, epochs: float, bits: float | None = None, name: str = "", **changes: Any) -> MeasuredRung:
    tokens = int(16000 * epochs)
    values = {
        "experiment": f"ladder-x-{size}-{epochs}",
        "rev": "a" * 40,
        "size": name or f"s{size}",
        "length": f"e{epochs:g}",
        "num_parameters": size,
        "num_non_embedding": size // 4,
        "num_tokens": tokens,
        "num_unique_tokens": 16000,
        "metric": "bits_per_byte",
        "bits": float(TRUTH.predict(size, tokens)) if bits is None else bits,
        "error": 0.02,
        "documents": "d",
    }
    return MeasuredRung(**(values | changes))


def make_rungs(**largest: Any) -> list[MeasuredRung]:
    """Return the rungs of 3 sizes and 3 lengths, with a little noise; `largest` changes the last."""
    rungs = [make_rung(size, epochs) for size in (4000, 9000, 26000) for epochs in (0.5, 1.0, 2.0)]
    rungs = [rung._replace(bits=rung.bits * (1 + 0.002 * (-1) ** number)) for number, rung in enumerate(rungs)]
    return [*rungs[:-1], rungs[-1]._replace(**largest)]


def make_two_lengths_and_the_largest() -> list[MeasuredRung]:
    """Return 11 rungs, of which only the largest has the third length."""
    sizes = (4000, 6000, 9000, 15000, 26000)
    return [*(make_rung(size, epochs) for size in sizes for epochs in (0.5, 1.0)), make_rung(26000, 2.0)]


@functools.cache
def analyze_tuple(rungs: tuple[MeasuredRung, ...], missing: tuple[str, ...], budget: float | None) -> LadderResult:
    names = [rung.experiment for rung in rungs] + [f"ladder-x-{name}" for name in missing]
    ladder = Ladder("x", "causal", [Rung(name, *name.split("-")[2:4], {}) for name in names])
    return analyze(ladder, "c" * 40, "bits_per_byte", make_points(rungs), budget)


def analyze_rungs(rungs: list[MeasuredRung], *missing: str, budget: float | None = None) -> LadderResult:
    """Analyze rungs, and those without results, SIZE-LENGTH each; the same rungs are only fitted once."""
    return analyze_tuple(tuple(rungs), missing, budget)


def test_result_of_a_law_predicts_the_largest_rung_and_extrapolates() -> None:
    result = analyze_rungs(make_rungs())
    assert (result.back_test.size, result.back_test.length, result.back_test.within) == ("s26000", "e2", True)
    assert result.extrapolation.compute == pytest.approx(10 * 6 * 26000 * 32000)
    assert result.extrapolation.predicted.value < result.back_test.measured
    assert 6 * result.extrapolation.num_parameters * result.extrapolation.num_tokens == pytest.approx(
        result.extrapolation.compute
    )


@pytest.mark.parametrize(
    ("factor", "reasons"),
    mark_rest_slow(
        [(1.3, ["sees each token 2 times", "learning rate"]), (0.7, ["the smaller rungs may be trained less well"])], 1
    ),
)
def test_result_outside_the_interval_says_so_and_why(factor: float, reasons: list[str]) -> None:
    rungs = make_rungs()
    result = analyze_rungs(make_rungs(bits=factor * rungs[-1].bits))
    text = "\n".join(describe_result(result))
    assert not result.back_test.within and "within the interval: no" in text
    assert all(reason in text for reason in reasons)


def test_points_average_over_seeds() -> None:
    rungs = [*make_rungs(), make_rung(4000, 0.5, bits=9.0, experiment="other")]
    point = next(point for point in make_points(rungs) if len(point.experiments) == 2)
    assert point.bits == pytest.approx((9.0 + rungs[0].bits) / 2)
    assert point.deviation_of_seeds == pytest.approx((9.0 - rungs[0].bits) / 2**0.5)


@pytest.mark.parametrize(
    ("rungs", "problem"),
    [
        (make_rungs()[:6], "5 of at least 8 rungs, 2 of at least 3 sizes"),
        ([rung._replace(num_tokens=1) for rung in make_rungs()], "1 of at least 3 token counts"),
        (make_two_lengths_and_the_largest(), "2 of at least 3 token counts"),
        ([], "0 of at least 8 rungs"),
    ],
)
def test_result_of_too_few_rungs_is_refused(rungs: list[MeasuredRung], problem: str) -> None:
    with pytest.raises(StageError, match=f"too few rungs with results to fit the law without the largest: {problem}"):
        analyze_rungs(rungs)


def test_result_lists_the_rungs_without_results_and_those_that_may_be_larger() -> None:
    rungs = [*make_rungs()[:-1], make_rung(6000, 0.5), make_rung(6000, 1.0)]
    larger = ["s26000-e2", "s90000-e0.5", "s4000-e9"]  # the size or length of the others has no results
    result = analyze_rungs(rungs, "s6000-e2", "s4000-e2-seed2", *larger)
    assert result.missing == [f"ladder-x-{name}" for name in ("s6000-e2", "s4000-e2-seed2", *larger)]
    assert result.back_test.larger == [f"ladder-x-{name}" for name in larger]
    text = "\n".join(describe_result(result))
    assert "10 rungs with results, of commit ccccccc." in text
    assert "Without results, and not in the fit: ladder-x-s6000-e2, " in text
    assert "  not the largest rung of the ladder: ladder-x-s26000-e2, " in text


def test_result_with_all_rungs_lists_none_as_missing() -> None:
    result = analyze_rungs(make_rungs())
    assert (result.missing, result.back_test.larger) == ([], [])
    assert "results, and not" not in "\n".join(describe_result(result))


def test_result_is_read_as_written_and_a_damaged_file_is_reported(workplace: Path) -> None:
    result = analyze_rungs(make_rungs())
    write_result(result)
    Path("reports/ladder/a.json").write_text("{}")
    Path("reports/ladder/b.json").write_text("{")
    damaged, truncated, found = read_results()
    assert found == result
    assert str(damaged).startswith("reports/ladder/a.json: ") and "reports/ladder/b.json" in str(truncated)


def test_result_outside_the_default_budget_is_for_the_given_one() -> None:
    result = analyze_rungs(make_rungs(), budget=1e12)
    assert result.extrapolation.compute == 1e12 and "1.00e+12 operations" in "\n".join(describe_result(result))


@pytest.mark.parametrize(("tied", "head"), [(True, 0), (False, 300 * 8)])
def test_count_parameters_counts_a_shared_embedding_once(tied: bool, head: int) -> None:
    config = {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 1, "vocab_size": 300, "n_positions": 32}
    blocks = 12 * 64 + 13 * 8 + 2 * 8
    found = count_parameters({**config, "tie_word_embeddings": tied}, "bits_per_byte")
    assert found == (332 * 8 + blocks + head, blocks + head)


# -- the report --------------------------------------------------------------------------------------------------------

HOSTILE = "<img/src=x/onerror=alert(1)>"


def test_report_draws_the_rungs_the_law_and_the_prediction() -> None:
    parts = build_ladder_parts(analyze_rungs(make_rungs()))
    traces = parts.figure.spec["data"]
    assert parts.figure.spec["layout"]["xaxis"]["type"] == "log"
    assert sum(len(trace["x"]) for trace in traces if trace.get("marker", {}).get("size") == 9) == 8
    (largest,) = [trace for trace in traces if trace.get("marker", {}).get("symbol") == "diamond-open"]
    assert largest["x"] == [6 * 26000 * 32000]
    assert sum(trace["mode"] == "lines" for trace in traces) == 3 + 2  # a curve per size and the limits of the band
    assert "is within it" in parts.figure.alt and len(parts.table.rows) == 9
    assert any("within the interval: yes" in sentence for sentence in parts.sentences)


def test_report_escapes_names(workplace: Path) -> None:
    from tools.report_page import render_page

    rungs = [rung._replace(size=HOSTILE) if rung.size == "s9000" else rung for rung in make_rungs()]
    page = render_page([], ladders=[analyze_rungs(rungs)])
    assert 'id="scaling"' in page and "<img/src" not in page
    assert 'id="scaling"' not in render_page([])


# -- the pipeline ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ladder_of_the_pipeline_trains_its_rungs_and_is_in_the_report(clean: Path) -> None:
    width, epochs = "conf/model/tiny-gpt2.yaml:config.n_embd", "tasks.causal.num_train_epochs"
    ladder = {
        "task": "causal",
        "set": {"conf/task/causal.yaml:+trainer.lr_scheduler_type": "constant", "tasks.causal.learning_rate": 0.01},
        "sizes": {f"w{value}": {width: value} for value in (8, 16, 32)},
        "lengths": {f"e{number}": {epochs: value} for number, value in enumerate((0.1, 0.3, 0.9))},
    }
    (clean / "ladders/pipeline.yaml").write_text(dump(ladder))
    output = run_command(clean, sys.executable, "-m", "tools.ladder", "ladders/pipeline.yaml")
    assert len(list_runs(output)) == 9 and "within the interval: " in output
    result = json.loads((clean / "reports/ladder/pipeline.json").read_text())
    sizes = {point["size"]: point["num_parameters"] for point in result["points"]}
    weights = clean / "models/causal/model.safetensors"
    run_command(clean, "dvc", "exp", "apply", "ladder-pipeline-w16-e1")
    with safe_open(weights, framework="np") as tensors:
        assert sizes["w16"] == sum(tensors.get_tensor(name).size for name in tensors.keys())  # noqa: SIM118
    ledger = json.loads((clean / "reports/train/causal/stats.json").read_text())
    (point,) = (found for found in result["points"] if (found["size"], found["length"]) == ("w16", "e1"))
    batch_tokens = 4 * 64  # sequences per step, tokens in each
    assert abs(point["num_tokens"] - ledger["steps"] * batch_tokens) < batch_tokens
    assert f"{point['bits']:.4f}" in output
    run_command(clean, sys.executable, "-m", "tools.report")
    assert "<h3>pipeline (causal)</h3>" in (clean / "reports/report.html").read_text(encoding="utf-8")
