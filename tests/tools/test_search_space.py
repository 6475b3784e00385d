"""Tests of search spaces: malformed files, values as arguments of `dvc exp run -S`, and checks against the stages."""

import json
from pathlib import Path
from typing import Any

import pytest
from dvc_project import ROOT

from stages.core.compose import Composition
from stages.core.errors import ConfigError
from stages.model.objectives import CausalObjective, MaskedObjective
from tools.search import check
from tools.search.check import KEEP_FOR_BRANCHES_KEY, CheckedSpace, check_space
from tools.search.space import (
    Choices,
    Range,
    Space,
    read_space,
)

STAGES = [
    "download",
    *(f"{stage}@causal" for stage in ("tokenize", "group_texts", "baseline", "train", "evaluate")),
]
RATE = "tasks.causal.learning_rate"
DECAY = "conf/task/causal.yaml:trainer.weight_decay"
SPACE: dict[str, Any] = {
    "task": "causal",
    "halving": {"epochs": [1, 3], "factor": 2},
    "keys": {RATE: {"low": 0.001, "high": 0.01, "log": True}},
}


def write_space(directory: Path, **changes: Any) -> Path:
    """Write SPACE with `changes` of its sections; a change to None removes a section."""
    content = {key: value for key, value in {**SPACE, **changes}.items() if value is not None}
    # JSON is YAML, and says which values are texts; YAML has other names for two numbers.
    text = json.dumps(content).replace("NaN", ".nan").replace("Infinity", ".inf")
    (directory / "space.yaml").write_text(text, encoding="utf-8")
    return directory / "space.yaml"


def read_changed(directory: Path, **changes: Any) -> Space:
    return read_space(write_space(directory, **changes))


def check_changed(directory: Path, **changes: Any) -> CheckedSpace:
    return check_space(read_changed(directory, **changes), STAGES)


# -- the file ----------------------------------------------------------------------------------------------------------


def test_search_space_of_the_repository_is_valid_for_its_task() -> None:
    space = read_space(ROOT / "conf/search.yaml")
    checked = check_space(space, STAGES)
    assert space.task == "causal"
    assert checked.notice == ""  # runs go on from shorter ones
    assert checked.fingerprints.keys() == set(STAGES)


def test_search_space_of_the_documentation_is_valid_for_its_task(tmp_path: Path) -> None:
    page = (ROOT / "docs/search.md").read_text(encoding="utf-8")
    (tmp_path / "depth.yaml").write_text(page.partition("```yaml\n")[2].partition("```")[0])
    space = read_space(tmp_path / "depth.yaml")
    assert space.task == "mlm"
    stages = [stage.replace("@causal", "@mlm") for stage in STAGES]
    assert check_space(space, stages).fingerprints.keys() == set(stages)


def test_search_space_range_of_whole_numbers_gives_whole_numbers(tmp_path: Path) -> None:
    keys = read_changed(tmp_path, keys={"block_size": {"low": 64, "high": 256, "step": 64}, **SPACE["keys"]}).keys
    sizes, rates = keys["block_size"], keys[RATE]
    assert isinstance(sizes, Range) and isinstance(sizes.round_value(128), int)
    assert isinstance(rates, Range) and rates.round_value(0.00123456) == 0.001235
    assert rates.round_value(0.0099999999) == 0.01


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1e-3", 0.001), ("1.e-3", 0.001), (".001", 0.001), ("1E-3", 0.001), ("0.001", 0.001)],
)
def test_search_space_number_in_any_form_of_yaml_is_a_number(tmp_path: Path, text: str, expected: float) -> None:
    file = tmp_path / "space.yaml"
    file.write_text(f"task: causal\nhalving: {{epochs: [1]}}\nkeys:\n  {RATE}: {{low: {text}, high: 1e-2}}\n")
    spec = read_space(file).keys[RATE]
    assert isinstance(spec, Range) and (spec.low, spec.high) == (expected, 0.01)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": None}, "task is missing"),
        ({"task": 3}, "task=3"),
        ({"keys": None}, "keys is missing"),
        ({"keys": {}}, "keys={}"),
        ({"keys": [RATE]}, "keys="),
        ({"halving": None}, "halving is missing"),
        ({"halving": {"epochs": []}}, "halving.epochs=[]"),
        ({"halving": {"epochs": [3, 1]}}, "should be above 0 and increase"),
        ({"halving": {"epochs": [0, 1]}}, "should be above 0 and increase"),
        ({"halving": {"epochs": [1, 1]}}, "should be above 0 and increase"),
        ({"halving": {"epochs": ["one"]}}, "it should be a finite number"),
        ({"halving": {"epochs": [1], "factor": 1}}, "halving.factor=1"),
        ({"metric": "accuracy"}, 'metric="accuracy"'),
        ({"kyes": {}}, "kyes is not a key that a search space knows"),
        ({"keys": {RATE: 0.1}}, f"{RATE}=0.1: it should be {{low: ..., high: ...}}"),
        ({"keys": {RATE: None}}, f"{RATE}=null: it should be"),
        ({"keys": {RATE: {}}}, f"{RATE}: low is missing"),
        ({"keys": {RATE: {"low": 0.1}}}, f"{RATE}: high is missing"),
        ({"keys": {RATE: {"low": 0.1, "hihg": 1}}}, "hihg is not a key"),
        ({"keys": {RATE: {"low": 1, "high": 1}}}, "low=1 should be below high=1"),
        ({"keys": {RATE: {"low": 2.0, "high": 1.0}}}, "low=2.0 should be below high=1.0"),
        ({"keys": {RATE: {"low": "1e-3", "high": 1.0}}}, 'low="1e-3": it should be a finite number'),
        ({"keys": {RATE: {"low": True, "high": 2}}}, "low=true: it should be a finite number"),
        ({"keys": {RATE: {"low": float("nan"), "high": 1.0}}}, "low=NaN: it should be a finite number"),
        ({"keys": {RATE: {"low": 0.0, "high": float("inf")}}}, "high=Infinity: it should be a finite number"),
        ({"keys": {RATE: {"low": 0.0, "high": 1.0, "log": True}}}, "above 0 with log: true"),
        ({"keys": {RATE: {"low": 1, "high": 9, "log": True, "step": 2}}}, "log: true and step cannot be combined"),
        ({"keys": {RATE: {"low": 1, "high": 9, "step": 0}}}, "step=0"),
        ({"keys": {RATE: {"low": 1, "high": 9, "step": 20}}}, "step=20"),
        ({"keys": {RATE: {"low": 1, "high": 9, "step": 3}}}, "high=9: it should be low plus a multiple of step"),
        ({"keys": {RATE: {"choices": []}}}, "at least two values, all different"),
        ({"keys": {RATE: {"choices": [1]}}}, "at least two values, all different"),
        ({"keys": {RATE: {"choices": [1, 2, 1]}}}, "at least two values, all different"),
        ({"keys": {RATE: {"choices": "abc"}}}, f'{RATE}: choices="abc"'),
        ({"keys": {RATE: {"choices": [1, 2], "low": 1}}}, "low is not a key"),
        ({"keys": {RATE: {"choices": ["${oc.env:HOME}", "a"]}}}, "interpolations are not resolved"),
        ({"keys": {RATE: {"choices": [2**70, 1]}}}, "a whole number of 71 bits"),
        ({"keys": {RATE: {"choices": ["no", "yes please"]}}}, f'{RATE}="no": this value cannot be passed'),
        ({"keys": {RATE: {"choices": [["off"], []]}}}, f'{RATE}=["off"]: this value cannot be passed'),
        ({"fixed": {DECAY: {"a b}": 1}}}, "cannot be passed to `dvc exp run -S`"),
        ({"keys": {"tasks.causal.num_train_epochs": {"low": 1, "high": 9}}}, "halving.epochs sets it"),
        ({"fixed": {"tasks.causal.num_train_epochs": 3}}, "halving.epochs sets it"),
        ({"keys": {"conf/task/causal.yaml:evaluate.context": {"low": 64, "high": 128}}}, "changes the metric"),
        ({"fixed": {RATE: 0.1}}, f"{RATE}: {RATE} already sets it"),
        ({"keys": {DECAY: {"low": 0, "high": 9}}, "fixed": {DECAY.replace(":", ":+"): 1}}, "already sets it"),
        ({"keys": {"": {"low": 1, "high": 2}}}, "'' is not a key as in"),
        ({"keys": {"conf/../x.yaml:a": {"low": 1, "high": 2}}}, "is not a key as in"),
        ({"keys": {"/etc/x.yaml:a": {"low": 1, "high": 2}}}, "is not a key as in"),
        ({"keys": {"seed; touch x": {"low": 1, "high": 2}}}, "is not a key as in"),
        ({"keys": {"+block_size": {"low": 1, "high": 2}}}, "is not a key as in"),
        ({"keys": {"\u202eseed": {"low": 1, "high": 2}}}, "\\u202eseed"),
    ],
)
def test_search_space_that_is_malformed_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_changed(tmp_path, **changes)
    assert message in str(refused.value)
    assert "space.yaml: " in str(refused.value)


@pytest.mark.parametrize(
    "text", ["", "- a\n", "task: &a causal\nmetric: *a\n", "task: !!python/name:os\n", "{", "\x00"]
)
def test_search_space_that_is_no_plain_mapping_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "space.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"space\.yaml"):
        read_space(tmp_path / "space.yaml")


def test_search_space_with_several_problems_reports_all(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        read_changed(tmp_path, keys={RATE: {"low": 1}, "a b": {"choices": [1, 1]}}, fixed={DECAY: "no"})
    assert len(refused.value.problems) == 4


def test_search_space_file_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        read_space(tmp_path / "nowhere.yaml")


# -- checks against the stages -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keys": {"tasks.causal.lerning_rate": {"low": 0.1, "high": 1.0}}}, f"did you mean {RATE}?"),
        ({"keys": {"tasks.mlm.learning_rate": {"low": 0.1, "high": 1.0}}}, "no such key that a stage of causal reads"),
        ({"keys": {"conf/task/mlm.yaml:trainer.weight_decay": {"low": 0.1, "high": 1.0}}}, "no stage of causal reads"),
        ({"keys": {"conf/model/gpt2.yaml:config.n_layer": {"low": 1, "high": 2}}}, "no stage of causal reads"),
        ({"keys": {"conf/task/causal.yaml:trainer.wd": {"low": 0.1, "high": 1.0}}}, "trainer.weight_decay"),
        ({"keys": {"conf/task/causal.yaml:+trainer.wd": {"low": 0.1, "high": 1.0}}}, "trainer.wd is not an argument"),
        ({"keys": {RATE: {"low": -0.1, "high": 1.0}}}, "learning_rate=-0.1"),
        ({"keys": {RATE: {"choices": [0.1, "fast"]}}}, 'learning_rate="fast"'),
        ({"keys": {"tasks.causal.model": {"choices": ["tiny-gpt2", "tiny-gpt3"]}}}, "did you mean tiny-gpt2?"),
        ({"fixed": {"conf/task/causal.yaml:+trainer.seed": 3}}, "trainer.seed cannot be set"),
        ({"fixed": {"conf/task/causal.yaml:+trainer.lr_scheduler_type": "lineer"}}, "trainer.lr_scheduler_type"),
        ({"metric": "masked_loss"}, "metric=masked_loss: causal has bits_per_byte and loss"),
    ],
)
def test_search_space_that_the_stages_refuse_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_changed(tmp_path, **changes)
    assert message in str(refused.value)


def test_search_space_key_of_a_chosen_model_is_accepted(tmp_path: Path) -> None:
    keys = {
        "tasks.causal.model": {"choices": ["tiny-gpt2", "gpt2"]},
        "conf/model/tiny-gpt2.yaml:config.n_layer": {"low": 1, "high": 4},
        "conf/model/gpt2.yaml:+config.resid_pdrop": {"low": 0.0, "high": 0.2},
        "conf/base/hardware.yaml:trainer.bf16": {"choices": [True, False]},
        "block_size": {"choices": [64, 128]},
    }
    assert check_changed(tmp_path, keys=keys).fingerprints.keys() == set(STAGES)


def test_search_fingerprint_depends_on_the_values_that_the_search_does_not_set(tmp_path: Path) -> None:
    first = check_changed(tmp_path).fingerprints
    fixed = check_changed(tmp_path, fixed={DECAY: 0.5}).fingerprints
    assert check_changed(tmp_path).fingerprints == first
    assert [stage for stage in STAGES if fixed[stage] != first[stage]] == ["train@causal"]


def test_search_fingerprint_depends_on_the_files_of_all_choices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"tasks.causal.model": {"choices": ["tiny-gpt2", "gpt2"]}}
    first = check_changed(tmp_path, keys=keys).fingerprints
    load = check.load_config

    def load_changed(schema: Any, composition: Composition) -> Any:
        """Load the config as if another revision were in conf/model/gpt2.yaml."""
        config = load(schema, composition)
        if composition.stage == "train" and composition.chosen["model"] == "gpt2":
            config.model.revision = "0" * 40
        return config

    monkeypatch.setattr(check, "load_config", load_changed)
    changed = check_changed(tmp_path, keys=keys).fingerprints
    assert [stage for stage in STAGES if changed[stage] != first[stage]] == ["train@causal"]


def test_search_metrics_are_those_of_the_objectives() -> None:
    classes = {"causal": CausalObjective, "mlm": MaskedObjective}
    assert {name: (found.document_metric, found.loss_metrics[0]) for name, found in classes.items()} == check.METRICS


WARMUP = {"lr_scheduler_type": "constant_with_warmup"}


@pytest.mark.parametrize(
    ("trainer", "epochs", "reason"),
    [
        ({"lr_scheduler_type": "linear"}, [1, 2], "trainer.lr_scheduler_type is linear"),
        ({"lr_scheduler_type": "cosine"}, [1, 2], "trainer.lr_scheduler_type is cosine"),
        ({"lr_scheduler_type": "linear"}, [2], ""),
        ({"lr_scheduler_type": "constant"}, [1, 2], ""),
        ({**WARMUP, "warmup_steps": 10}, [1, 2], ""),
        ({**WARMUP, "warmup_steps": 0.1}, [1, 2], "trainer.warmup_steps=0.1 is a fraction of all steps"),
        ({**WARMUP, "warmup_ratio": 0.1}, [1, 2], "trainer.warmup_ratio=0.1 is a fraction of all steps"),
        ({**WARMUP, "logging_steps": 0.5}, [1, 2], "trainer.logging_steps=0.5 is a fraction of all steps"),
    ],
)
def test_search_notice_says_when_rungs_share_no_training(
    tmp_path: Path, trainer: dict[str, Any], epochs: list[int], reason: str
) -> None:
    fixed = {f"conf/task/causal.yaml:+trainer.{name}": value for name, value in trainer.items()}
    checked = check_changed(tmp_path, halving={"epochs": epochs}, fixed=fixed)
    assert checked.notice.startswith(reason) and bool(checked.notice) == bool(reason)
    if reason:
        assert KEEP_FOR_BRANCHES_KEY not in checked.settings


def test_search_notice_says_when_rungs_of_some_trials_share_no_training(tmp_path: Path) -> None:
    keys = {"conf/task/causal.yaml:+trainer.lr_scheduler_type": {"choices": ["constant", "linear"]}}
    assert check_changed(tmp_path, keys=keys).notice.startswith("trainer.lr_scheduler_type is linear")


def test_search_choices_of_any_type_are_kept(tmp_path: Path) -> None:
    choices = [None, True, 1, "1", [1], {"a": 1}]
    spec = read_changed(tmp_path, keys={DECAY: {"choices": choices}}).keys[DECAY]
    assert isinstance(spec, Choices) and json.dumps(spec.choices) == json.dumps(choices)


@pytest.mark.parametrize("name", ["nothing.yaml", "."])
def test_space_that_is_not_a_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_space(tmp_path / name)
    assert caught.value.problems == [f"{tmp_path / name} is not a file: name a search space (docs/search.md)"]
