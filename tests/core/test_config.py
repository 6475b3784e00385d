"""The files of conf/ against the schemas, and the errors for invalid values."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from configs import GROUPS, STAGES, make_config

from stages.core.compose import compose_config, load_config
from stages.core.config import CONF, find_value, flatten_values, read_yaml
from stages.core.errors import ConfigError
from stages.core.pins import get_pin
from stages.tokens.schema import TokenizerSource, TrainedTokenizer
from tools.check import get_config_class

DEFUNCT = "data/eli5"  # which explains itself
FILES = sorted(
    file.relative_to(CONF).with_suffix("").as_posix() for file in CONF.glob("*/*.yaml") if file.parent.name != "base"
)


def task_of(model: str) -> str:
    return str(yaml.safe_load((CONF / f"model/{model}.yaml").read_text(encoding="utf-8"))["task"])


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("stage", STAGES)
def test_config_every_file_composes_in_every_stage_that_has_its_group(stage: str, file: str) -> None:
    group, name = file.split("/")
    groups = {group: name}
    if group not in GROUPS[stage] or (stage, file) == ("download", DEFUNCT):
        if (stage, group) != ("group_texts", "task"):  # which has a task, and no configuration of it
            with pytest.raises(ConfigError, match=group):
                make_config(stage, f"{group}={name}")
        return
    if group == "model" and "task" in GROUPS[stage]:
        groups["task"] = task_of(name)
    if group == "task" and "model" in GROUPS[stage]:
        objective = read_yaml(CONF / f"task/{name}.yaml")["objective"]["name"]
        groups["model"] = {"causal": "tiny-gpt2", "mlm": "tiny-roberta"}[objective]
    assert isinstance(make_config(stage, **groups), get_config_class(stage))


@pytest.mark.parametrize("group", ["data", "model", "task"])
def test_config_files_of_a_group_that_dvc_tracks_by_key_have_the_same_keys(group: str) -> None:
    keys = {file.stem: set(yaml.safe_load(file.read_text(encoding="utf-8"))) for file in (CONF / group).glob("*.yaml")}
    assert len({frozenset(names) for names in keys.values()}) == 1, keys


@pytest.mark.parametrize("file", sorted((CONF / "hardware").glob("*.yaml")), ids=lambda file: file.stem)
def test_config_hardware_file_has_the_key_that_baseline_and_evaluate_track_and_repeats_nothing(file: Path) -> None:
    values, base = read_yaml(file), read_yaml(CONF / "base/hardware.yaml")
    assert "hardware" in values
    assert [key for key, value in flatten_values(values) if find_value(base, key) == value] == []


@pytest.mark.parametrize(
    ("stage", "overrides", "message"),
    [
        ("group_texts", ["block_size=0"], "block_size=0: it should be greater than or equal to 2"),
        ("group_texts", ["block_size=abc"], 'block_size="abc": it should be a valid integer'),
        ("group_texts", ["block_size=1.5"], "block_size=1.5: it should be a valid integer"),
        ("group_texts", ["block_size=true"], "block_size=true: it should be a valid integer"),
        ("train", ["block_size=513"], "block_size=513 is above the model's positions, 512"),
        ("train", ["seed=-1"], "seed=-1: it should be greater than or equal to 0"),
        ("train", ["learning_rate=0"], "learning_rate=0: it should be greater than 0"),
        ("train", ["num_train_epochs=-1"], "num_train_epochs=-1: it should be greater than 0"),
        ("train", ["batch_size=10", "hardware.per_device_batch_size=4"], "batch_size=10 is not a multiple of 4"),
        (
            "train",
            ["+trainer.load_best_model_at_end=true"],
            "load_best_model_at_end needs the same save_strategy and eval_strategy",
        ),
        ("train", ["learning_rate=.inf"], "learning_rate"),
        ("train", ["trainer.eval_strategy=false"], "quote it: in YAML, a bare no means false"),
        ("train", ["model.config.model_type=bloom"], "objective.isolate_documents=true is not proven for bloom"),
        ("tokenize", ["~model.tokenizer.train.special_tokens.eos_token"], "special_tokens has no eos_token"),
        ("evaluate", ["samples.max_new_tokens=null"], "samples.max_new_tokens is missing for objective.name=causal"),
        ("evaluate", ["task=mlm", "samples.prompts=[no mask]"], "'no mask' needs exactly one {mask}"),
        ("train", ["+trainer.weight_decai=0.1"], "did you mean weight_decay?"),
        ("train", ["+trainer.output_dir=x"], "trainer.output_dir cannot be set: checkpoints live outside"),
        ("train", ["trainer.weight_decay=much"], "trainer.weight_decay='much': it should be a valid number"),
        ("train", ["early_stopping={patience: 2, threshold: 0.0}"], "early_stopping needs trainer.load_best_model"),
        ("train", ["model=tiny-roberta"], "model.task=mlm: this model cannot be trained with objective.name=causal"),
        ("train", ["+objective.mlm_probability=0.1"], "objective.mlm_probability has no meaning"),
        ("train", ["+hardware.gpus=2"], "hardware.gpus is not a key that train knows"),
        ("train", ["++model.config=3"], "model.config=3: "),
        ("baseline", ["evaluate.context=1024"], "evaluate.context=1024 is above the model's positions, 512"),
        ("baseline", ["evaluate.context=2"], "evaluate.context=2: it should be greater than or equal to 4"),
        ("download", ["data.split.train=0.9"], "split.train + split.validation + split.test = 1.1"),
        ("download", ["data.split.train=0.9", "data.split.test=0"], "must each be above 0"),
        ("download", ["data.path=other.jsonl"], "set data.name=files for your own text"),
        ("download", ["data=hub", "data.hub=null"], "data.hub is missing"),
        ("download", ["data=hub", "data.source=files"], "data.hub has no meaning for data.source=files"),
        ("download", ["data=eli5"], "is defunct"),
        ("download", ["data=eli5"], "data.name=eli5_category"),
        ("download", ["data=hub", "data.hub.id=eli5"], "data.name=eli5_parquet"),
        ("download", ["data=hub", "+data.filter.subreddit=askscience"], "data.filter.subreddit"),
        ("download", ["data=hub", "+data.filter.subreddit=[]"], "data.filter.subreddit"),
        ("download", ["data.columns.texts=[]"], "data.columns.texts"),
        ("tokenize", ["++model.tokenizer.path=x"], "model.tokenizer: give one of `train`, `path` and `from`"),
        ("tokenize", ["+model.tokenizer.train.special_tokens.end=x"], "special_tokens.end is not a role"),
        (
            "tokenize",
            ["~model.tokenizer.train", "++model.tokenizer.path=a/b"],
            "model.tokenizer.path=a/b is not pinned",
        ),
        ("evaluate", ["evaluate.max_documents=0"], "evaluate.max_documents=0: it should be greater than or equal to 1"),
    ],
)
def test_config_wrong_value_is_refused_by_name(stage: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        make_config(stage, *overrides)
    assert message in str(error.value)


def test_config_all_problems_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        make_config(
            "train", "seed=-1", "block_size=9999", "batch_size=0", "+trainer.weight_decai=1", "learning_rate=-1"
        )
    assert len(error.value.problems) == 5


def test_config_without_a_task_names_the_tasks_and_nothing_that_depends_on_one() -> None:
    with pytest.raises(ConfigError) as error:
        load_config(get_config_class("train"), compose_config("train"))
    assert error.value.problems == ["task is not chosen: add task=NAME; there are causal, mlm"]


def test_config_origin_names_what_a_source_is_pinned_to_and_not_where_it_stands() -> None:
    assert get_pin(TokenizerSource(path="o/n", revision="0f")) == {"path": "o/n", "revision": "0f"}
    assert get_pin(TokenizerSource(path="/here/n", files={"a": "0f"})) == {"path": "n", "files": {"a": "0f"}}
    trained = TrainedTokenizer(vocab_size=300, special_tokens={})
    assert get_pin(TokenizerSource(train=trained)) is None


def test_config_warmup_ratio_is_taken_as_the_library_once_did() -> None:
    assert make_config("train", "+trainer.warmup_ratio=0.1").trainer["warmup_ratio"] == 0.1


@pytest.mark.parametrize("stage", STAGES)
def test_config_stage_shows_its_config_without_arguments(stage: str) -> None:
    command = [sys.executable, "-m", f"stages.{stage}", "--cfg", "job"]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=CONF.parent, check=False)
    assert shown.returncode == 0, shown.stderr
    assert yaml.safe_load(shown.stdout).keys() >= yaml.safe_load((CONF / f"{stage}.yaml").read_text()).keys() - {
        "defaults"
    }


def test_config_stage_with_unknown_names_ends_in_one_message_and_exit_code_1() -> None:
    command = [sys.executable, "-m", "stages.train", "model=none", "~hardware.num_threads", "task=prefix"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=CONF.parent, check=False)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert "there is no conf/model/none.yaml" in ended.stderr
    assert "there is no conf/task/prefix.yaml" in ended.stderr
    assert "params.yaml has no tasks.prefix; there are causal, mlm" in ended.stderr


@pytest.mark.parametrize("text", ["a: {b: VALUE}", "a: {b: [1, VALUE]}", "a:\n  b: -VALUE"])
@pytest.mark.parametrize("value", [2**63 + 1, 10**23, 10**300])
def test_config_whole_number_beyond_64_bits_in_a_file_is_named(tmp_path: Path, text: str, value: int) -> None:
    file = tmp_path / "params.yaml"
    file.write_text(text.replace("VALUE", str(value)))
    with pytest.raises(ConfigError, match=rf"params\.yaml: a\.b: a whole number of {value.bit_length()} bits"):
        read_yaml(file)
    file.write_text(text.replace("VALUE", str(2**63 - 1)))
    assert find_value(read_yaml(file), "a.b") is not None


@pytest.mark.parametrize("digits", ["0x" + "F" * 6000, "1" + "0" * 6000])
def test_config_whole_number_that_python_does_not_print_is_named(tmp_path: Path, digits: str) -> None:
    file = tmp_path / "params.yaml"
    file.write_text(f"seed: {digits}")
    with pytest.raises(ConfigError, match=r"params\.yaml: .*a whole number of"):
        read_yaml(file)


@pytest.mark.parametrize(
    ("stage", "key"),
    [
        ("train", "++seed"),
        ("train", "++model.config.n_embd"),
        ("train", "++trainer.warmup_steps"),
        ("download", "data.max_records"),
        ("evaluate", "samples.max_new_tokens"),
    ],
)
def test_config_whole_number_beyond_64_bits_on_the_command_line_is_named(stage: str, key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key.lstrip('+')}: a whole number of 77 bits"):
        make_config(stage, f"{key}={10**23}")
