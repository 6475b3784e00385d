"""Composition of a stage's config, and values that are refused."""

import copy
import itertools
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from data_helpers import REPOSITORY
from dvc_project import edit_yaml

from stages.core import compose as composing
from stages.core import config as configuring
from stages.core.compose import compose_config, identify_stage, load_config, read_root
from stages.core.config import find_value, read_yaml
from stages.core.errors import ConfigError
from stages.core.source_code import list_stages
from stages.core.starts import follow_starts
from stages.train.stage import TrainConfig

GLOBAL = "# @package _global_\n"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of params.yaml, with pairs for each task, and of conf/, from which the configs are composed."""
    shutil.copytree(REPOSITORY / "conf", tmp_path / "conf")
    shutil.copy(REPOSITORY / "params.yaml", tmp_path)
    edit_yaml(
        tmp_path / "params.yaml", pairs={task: {"name": "files", "path": f"{task}.jsonl"} for task in ("causal", "mlm")}
    )
    monkeypatch.setattr(configuring, "CONF", tmp_path / "conf")
    monkeypatch.setattr(composing, "CONF", tmp_path / "conf")
    monkeypatch.setattr(composing, "PARAMS", tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def problems_of(stage: str, *overrides: str, task: str | None = "causal") -> str:
    """Return the problems of the composed config, one per line."""
    try:
        composition = compose_config(stage, overrides, task)
    except ConfigError as error:
        return "\n".join(error.problems)
    return "\n".join([*composition.problems, *composition.missing])


# -- where values come from --------------------------------------------------------------------------------------------


def test_compose_takes_choices_and_values_from_params_yaml(place: Path) -> None:
    edit_yaml(place / "params.yaml", block_size=64, tasks__causal__learning_rate=0.5, tasks__causal__model="gpt2")
    composition = compose_config("train", item="causal")
    assert composition.problems == composition.missing == []
    assert (composition.values["block_size"], composition.values["learning_rate"]) == (64, 0.5)
    assert composition.chosen["model"] == "gpt2"
    assert compose_config("train", item="mlm").chosen["model"] == "tiny-modernbert"


def test_compose_override_by_hand_wins_over_params_yaml(place: Path) -> None:
    values = compose_config("train", ["block_size=32", "model=gpt2", "hardware.num_threads=7"], "causal").values
    assert (values["block_size"], values["model"]["path"]) == (32, "openai-community/gpt2")
    assert values["hardware"]["num_threads"] == 7


@pytest.mark.parametrize("stage", list_stages())
@pytest.mark.parametrize("task", ["causal", "mlm"])
def test_compose_names_exactly_the_keys_of_params_yaml_that_it_depends_on(place: Path, stage: str, task: str) -> None:
    read = set(compose_config(stage, item=task).params)
    values = read_yaml(place / "params.yaml")
    for key in read:
        changed = copy.deepcopy(values)
        *sections, last = key.split(".")
        node = changed
        for section in sections:
            node = node[section]
        del node[last]
        (place / "params.yaml").write_text(yaml.safe_dump(changed), encoding="utf-8")
        assert last.removesuffix("name") in problems_of(stage, task=task) != ""
        (place / "params.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    kept = {"data": {}, "tasks": {task: {}}}
    for key in read:
        *sections, last = key.split(".")
        node = kept
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = find_value(values, key)
    (place / "params.yaml").write_text(yaml.safe_dump(kept), encoding="utf-8")
    assert problems_of(stage, task=task) == ""


def test_compose_takes_pairs_from_the_entry_of_the_task(place: Path) -> None:
    composition = compose_config("score", item="mlm")
    assert composition.values["pairs"]["path"] == "mlm.jsonl"
    assert {"pairs.mlm.name", "pairs.mlm.path"} <= set(composition.params)
    edit_yaml(place / "params.yaml", pairs={"causal": {"name": "files", "path": "causal.jsonl"}})
    assert "params.yaml has no pairs.mlm.name" in problems_of("score", task="mlm")
    assert problems_of("score", "pairs=english", "pairs.path=here.jsonl", task="mlm") == ""


def test_compose_of_a_stage_of_one_task_replaces_the_task_in_its_paths(place: Path) -> None:
    assert compose_config("group_texts", item="mlm").values["tokens"] == "data/tokens/mlm"
    assert compose_config("group_texts", ["tokens=here"], "mlm").values["tokens"] == "here"
    assert problems_of("group_texts", "tokens=a", "out=b", task=None) == ""
    assert problems_of("group_texts", task=None) == "task is not chosen: add task=NAME; there are causal, mlm"


SEVERAL = {"books": {"name": "files", "path": "books.jsonl"}, "web": {"name": "hub", "path": "conf"}}


@pytest.mark.parametrize("name", SEVERAL)
def test_compose_of_a_source_takes_its_configuration_and_path(place: Path, name: str) -> None:
    edit_yaml(place / "params.yaml", sources=SEVERAL)
    composition = compose_config("source", item=name)
    assert composition.problems == composition.missing == []
    assert composition.chosen["data"] == SEVERAL[name]["name"]
    values = composition.values
    assert (values["data"]["path"], values["source"]) == (SEVERAL[name]["path"], name)
    assert values["out"] == f"data/sources/{name}"
    assert set(composition.params) == {f"sources.{name}.name", f"sources.{name}.path"}


def test_compose_of_the_only_source_files_records_under_its_configuration(place: Path) -> None:
    composition = compose_config("download")
    assert (composition.values["source"], composition.values["out"]) == ("sample", "data/raw")
    assert set(composition.params) == {"data.name", "data.path"}


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("book", "source=book: params.yaml has no sources.book; there are books, web"),
        ("a.b", "the name of a source has letters, digits, _ and - only"),
        ("../x", "the name of a source has letters, digits, _ and - only"),
        (None, "source is not chosen: add source=NAME; there are books, web"),
    ],
)
def test_compose_of_a_source_that_is_not_there_names_those_that_are(
    place: Path, name: str | None, problem: str
) -> None:
    edit_yaml(place / "params.yaml", sources=SEVERAL)
    assert problem in problems_of("source", task=name)


@pytest.mark.parametrize(
    ("dvc_stage", "overrides", "expected"),
    [
        ("source@books", [], ("source", "books")),
        ("sub/dvc.yaml:source@books", [], ("source", "books")),
        ("download", [], ("download", None)),
        ("train@causal", [], ("download", None)),  # another stage's
        ("", ["source=web"], ("source", None)),
        ("", ["data.path=source=web"], ("download", None)),
    ],
)
def test_stage_of_the_command_line_is_dvcs_or_the_one_that_an_override_asks_for(
    dvc_stage: str, overrides: list[str], expected: tuple[str, str | None]
) -> None:
    assert identify_stage("download", dvc_stage, overrides) == expected


def test_compose_value_set_at_the_top_and_in_the_task_is_refused(place: Path) -> None:
    edit_yaml(place / "params.yaml", tasks__causal__seed=1)
    assert problems_of("train") == "tasks.causal.seed and seed are both set in params.yaml: keep one of them"
    assert problems_of("train", task="mlm") == ""


@pytest.mark.parametrize("key", ["optim", "bf16", "lr_scheduler_type"])
def test_compose_key_of_trainer_that_task_and_hardware_set_has_the_tasks_value(place: Path, key: str) -> None:
    edit_yaml(place / "conf/task/causal.yaml", **{f"trainer__{key}": "of the task"})
    (place / "conf/hardware/cpu.yaml").write_text(
        f"{GLOBAL}hardware: {{device: cpu, num_threads: 1}}\ntrainer: {{{key}: of the hardware}}\n", encoding="utf-8"
    )
    assert compose_config("train", item="causal").values["trainer"][key] == "of the task"
    assert compose_config("train", item="mlm").values["trainer"][key] == "of the hardware"


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../tiny-gpt2", "/etc/passwd", "a/b", "tiny-gpt2;touch P", "$(touch P)", "'x'", " ", "é"]
)
@pytest.mark.parametrize(
    "key", ["data__name", "hardware", "framework", "tasks__causal__model", "tasks__causal__adapter"]
)
def test_compose_name_that_is_not_plain_is_refused(place: Path, key: str, name: str) -> None:
    edit_yaml(place / "params.yaml", **{key: name})
    stage = "download" if key == "data__name" else "train"
    assert f"{key.replace('__', '.')}={name!r}: a name has letters, digits, dots, _ and - only" in problems_of(stage)


@pytest.mark.parametrize("name", [None, 3, True, ["cpu"]])
def test_compose_name_that_is_no_text_is_refused(place: Path, name: object) -> None:
    edit_yaml(place / "params.yaml", hardware=name)
    assert f"hardware={name}: it should be the name of a configuration" in problems_of("train")


@pytest.mark.parametrize("name", ["null", "true", "1", "no", "off"])
def test_compose_name_that_looks_like_another_value_is_a_name(place: Path, name: str) -> None:
    (place / f"conf/hardware/{name}.yaml").write_bytes((place / "conf/hardware/cpu.yaml").read_bytes())
    edit_yaml(place / "params.yaml", hardware=name)
    assert problems_of("train") == ""
    assert compose_config("train", item="causal").chosen["hardware"] == name


@pytest.mark.parametrize("task", ["a;touch P", "../causal", "causal.2", "", "$(touch P)"])
def test_compose_task_that_is_not_plain_is_refused(place: Path, task: str) -> None:
    assert "the name of a task has letters, digits, _ and - only" in problems_of("train", task=task)


@pytest.mark.parametrize("override", ["model@x=gpt2", "data=files", "+data=files", "base=hardware"])
def test_compose_configuration_where_the_stage_has_none_is_refused(place: Path, override: str) -> None:
    assert "is not a group of train" in problems_of("train", override) or "cannot be moved" in problems_of(
        "train", override
    )


# -- values that are refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["${oc.env:HOME}", "a ${seed} b", "${hydra:runtime.cwd}", "${.model}", "${unclosed"])
@pytest.mark.parametrize(
    ("file", "key", "stage"),
    [
        ("params.yaml", "data__path", "download"),
        ("params.yaml", "seed", "train"),
        ("conf/task/causal.yaml", "samples__prompts", "evaluate"),
        ("conf/model/tiny-gpt2.yaml", "config__model_type", "train"),
        ("conf/data/sample.yaml", "columns__title", "download"),
        ("conf/base/hardware.yaml", "trainer__optim", "train"),
    ],
)
def test_compose_interpolation_is_never_resolved(
    place: Path, monkeypatch: pytest.MonkeyPatch, file: str, key: str, stage: str, value: str
) -> None:
    monkeypatch.setenv("HOME", "/secret-home")
    edit_yaml(place / file, **{key: [value] if key == "samples__prompts" else value})
    found = problems_of(stage)
    assert found and "/secret-home" not in found
    if value != "${unclosed":
        assert f"{value}: interpolations are not resolved" in found


def test_compose_interpolation_by_hand_is_refused(place: Path) -> None:
    assert "interpolations are not resolved" in problems_of("train", "seed=${oc.env:HOME}")


ALIASES = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{n}: &{n} [*{p}, *{p}, *{p}, *{p}]\n" for p, n in itertools.pairwise("abcdefghijklm")
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (ALIASES, "aliases (*name) and tags (!name) are not allowed"),
        ("a: &a [*a]\n", "aliases (*name)"),
        ("a: !!python/object/apply:os.system [touch P]\n", "tags (!name)"),
        ("a: !!python/object/apply:pathlib.Path [x]\n", "tags (!name)"),
        ("<<: {a: 1}\nb: [\n", "while parsing"),
        ("a: 1\na: 2\n", "duplicate key a"),
        ("- a\n- b\n", "it should be a mapping of keys to values"),
        ("\x00", "characters are not allowed"),
        ("defaults:\n  - /hydra/launcher: submitit\n", "defaults cannot be nested"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("file", ["conf/model/tiny-gpt2.yaml", "conf/task/causal.yaml", "conf/hardware/cpu.yaml"])
def test_compose_chosen_file_that_does_more_than_set_values_is_refused(
    place: Path, file: str, text: str, said: str
) -> None:
    (place / file).write_text(text if "model" in file else GLOBAL + text, encoding="utf-8")
    found = problems_of("train")
    assert said in found and file in found


def test_compose_file_that_nobody_chose_stops_nothing(place: Path) -> None:
    for group in ("data", "model", "task", "hardware"):
        (place / f"conf/{group}/bomb.yaml").write_text(ALIASES, encoding="utf-8")
        (place / f"conf/{group}/self.yaml").write_text("a: &a [*a]\n", encoding="utf-8")
        (place / f"conf/{group}/date.yaml").write_text("a: 2020-99-99\n", encoding="utf-8")
        (place / f"conf/{group}/latin.yaml").write_bytes(b"a: \xff\n")
        (place / f"conf/{group}/code.yaml").write_text("hydra: {callbacks: {x: {_target_: os.system}}}\n")
    assert all(problems_of(stage) == "" for stage in list_stages())


def test_compose_text_that_looks_like_a_date_is_text(place: Path) -> None:
    edit_yaml(place / "conf/data/sample.yaml", columns__title="2020-99-99")
    assert compose_config("download").values["data"]["columns"]["title"] == "2020-99-99"


@pytest.mark.parametrize(
    "settings",
    [
        {"callbacks": {"x": {"_target_": "os.system"}}},
        {"job_logging": {"formatters": {"x": {"()": "os.system"}}}},
        {"job_logging": {"handlers": {"f": {"class": "logging.FileHandler", "filename": "F", "mode": "w"}}}},
        {"launcher": {"_target_": "os.system"}},
        {"sweeper": {"_target_": "os.system"}},
        {"run": {"dir": "/elsewhere"}},
        {"searchpath": ["file:///elsewhere"]},
        {"job": {"env_set": {"HF_TOKEN": "x"}}},
        {"verbose": True},
    ],
)
@pytest.mark.parametrize("file", ["conf/task/causal.yaml", "conf/hardware/cpu.yaml", "conf/base/hardware.yaml"])
def test_compose_what_hydra_does_cannot_be_set_in_conf(place: Path, file: str, settings: dict[str, object]) -> None:
    edit_yaml(place / file, hydra=settings)
    assert "hydra." in problems_of("train")


@pytest.mark.parametrize(
    "override",
    ["hydra.run.dir=x", "+hydra.callbacks.x._target_=os.system", "hydra/job_logging=none", "hydra.verbose=true"],
)
def test_compose_what_hydra_does_cannot_be_set_by_hand(place: Path, override: str) -> None:
    assert "Hydra's own settings cannot be changed" in problems_of("train", override)


@pytest.mark.parametrize("package", ["hydra.job_logging", "hydra", "trainer", "_global_", "_group_"])
def test_compose_file_of_a_group_cannot_set_another_key(place: Path, package: str) -> None:
    file = place / "conf/model/tiny-gpt2.yaml"
    file.write_text(f"# @package {package}\n{file.read_text(encoding='utf-8')}", encoding="utf-8")
    assert "conf/model/tiny-gpt2.yaml: it should have no `# @package`" in problems_of("train")


def test_compose_file_of_a_global_group_without_its_package_is_refused(place: Path) -> None:
    file = place / "conf/task/causal.yaml"
    file.write_text(file.read_text(encoding="utf-8").removeprefix(GLOBAL), encoding="utf-8")
    assert "conf/task/causal.yaml: it should have `# @package _global_`" in problems_of("train")


@pytest.mark.parametrize("file", ["conf/task/causal.yaml", "conf/model/tiny-gpt2.yaml", "conf/data/sample.yaml"])
def test_compose_name_of_something_to_call_is_refused(place: Path, file: str) -> None:
    edit_yaml(place / file, extra={"deep": {"_target_": "os.system"}})
    assert "_target_" in problems_of("download" if "data" in file else "train")


@pytest.mark.parametrize("value", ["0.002 trainer.weight_decay=0.5", "0.1,0.2", "[1", "${seed}", "1; touch P", "\n0.1"])
def test_compose_value_of_params_yaml_is_a_value_and_no_override(place: Path, value: str) -> None:
    edit_yaml(place / "params.yaml", tasks__causal__learning_rate=value)
    with pytest.raises(ConfigError) as error:
        load_config(TrainConfig, compose_config("train", item="causal"))
    assert "learning_rate" in str(error.value)
    assert compose_config("train", item="causal").values["trainer"]["weight_decay"] == 0.01


@pytest.mark.parametrize("text", ["", "a: [", "\xff", "tasks: [causal]", "tasks: 3", "hardware: &a {x: *a}"])
def test_compose_params_yaml_that_cannot_be_read_is_named(place: Path, text: str) -> None:
    (place / "params.yaml").write_text(text, encoding="latin-1")
    assert "params.yaml" in problems_of("train")


@pytest.mark.parametrize("stage", list_stages())
def test_compose_root_config_names_groups_that_exist(stage: str) -> None:
    root = read_root(stage)
    assert all((REPOSITORY / "conf" / group).is_dir() for group in root.groups)


def test_compose_stage_takes_the_task_from_dvc_and_one_by_hand_wins() -> None:
    command = [sys.executable, "-m", "stages.group_texts", "--cfg", "job"]

    def out(dvc_stage: str, *more: str) -> str:
        environment = {"DVC_STAGE": dvc_stage, "PATH": "/usr/bin"}
        done = subprocess.run([*command, *more], cwd=REPOSITORY, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return str(yaml.safe_load(done.stdout)["out"])

    assert out("group_texts@mlm") == "data/blocks/mlm"
    assert out("sub/dvc.yaml:group_texts@mlm") == "data/blocks/mlm"
    assert out("group_texts@mlm", "task=causal") == "data/blocks/causal"
    assert out("train@mlm") == "data/blocks/{task}"  # another stage's


# -- tasks that start from another one ---------------------------------------------------------------------------------


@pytest.fixture
def chained(place: Path) -> Path:
    """The copy, with a task `answers` that starts from causal."""
    shutil.copy(place / "conf/task/causal.yaml", place / "conf/task/answers.yaml")
    tasks = read_yaml(place / "params.yaml")["tasks"]
    edit_yaml(
        place / "params.yaml", tasks=tasks | {"answers": {**tasks["causal"], "start": "causal", "sources": ["books"]}}
    )
    return place


def test_compose_of_a_task_with_a_start_reads_the_model_and_the_tokenizer_of_the_start(chained: Path) -> None:
    for stage, start in (
        ("tokenize", "data/tokens/causal/tokenizer"),
        ("baseline", "models/causal"),
        ("train", "models/causal"),
    ):
        assert problems_of(stage, task="answers") == ""
        composition = compose_config(stage, item="answers")
        assert composition.values["start"] == start and "tasks.answers.start" in composition.params
        assert compose_config(stage, item="causal").values["start"] is None
        assert compose_config(stage, ["start=null"], "answers").values["start"] is None
    assert compose_config("tokenize", item="answers").values["sources"] == ["books"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"answers__start": "cuasal"},
            "tasks.answers.start=cuasal: params.yaml has no such task; did you mean causal?",
        ),
        ({"answers__start": 3}, "tasks.answers.start=3: params.yaml has no such task"),
        ({"answers__start": None}, "tasks.answers.start=None: params.yaml has no such task"),
        ({"answers__start": "answers"}, "tasks.answers.start=answers: a task cannot start from itself"),
        ({"causal__start": "answers"}, "the tasks start from each other (answers from causal from answers)"),
        ({"answers__start": "mlm"}, "answers has objective.name=causal, mlm has mlm (conf/task)"),
        (
            {"answers__model": "gpt2"},
            "answers has the model gpt2 with the tokenizer of openai-community/gpt2, causal the model tiny-gpt2 with a"
            " tokenizer trained on its own text, but a task has both from its start: set tasks.answers.model: tiny",
        ),
    ],
)
@pytest.mark.parametrize("stage", ["tokenize", "baseline", "train"])
def test_compose_of_a_start_that_cannot_be_says_why(chained: Path, stage: str, changes: dict, told: str) -> None:
    edit_yaml(chained / "params.yaml", **{f"tasks__{key}": value for key, value in changes.items()})
    assert told in problems_of(stage, task="answers")


def test_compose_of_a_start_follows_a_chain_of_any_length(chained: Path) -> None:
    tasks = read_yaml(chained / "params.yaml")["tasks"]
    edit_yaml(chained / "params.yaml", tasks=tasks | {"last": {**tasks["causal"], "start": "answers"}})
    shutil.copy(chained / "conf/task/causal.yaml", chained / "conf/task/last.yaml")
    assert compose_config("train", item="last").values["start"] == "models/answers"
    assert follow_starts(read_yaml(chained / "params.yaml")["tasks"], "last") == ["last", "answers", "causal"]
