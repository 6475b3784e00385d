"""Every value and source file, changed: `dvc status` names exactly the stages that use it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.repo import Repo
from dvc_project import PER_TASK, TASKS, edit
from test_dvc_yaml import project_imports

ROOT = Path(__file__).parents[2]


def both(*stages: str) -> set[str]:
    return {f"{stage}@{task}" for stage in stages for task in TASKS}


def one(task: str, *stages: str) -> set[str]:
    return {f"{stage}@{task}" for stage in stages}


# What uses a value, by the longest prefix of its name; written down here, not read from dvc.yaml.
USERS: dict[str, dict[str, set[str]]] = {
    "params.yaml": {
        "data.name": {"download", *both("tokenize")},
        "data.path": {"download"},
        "hardware": both("baseline", "train", "evaluate"),
        "framework": both("train"),
        "block_size": both("group_texts", "train"),
        "seed": both("baseline", "train"),
        **{f"{task}.model": one(task, "tokenize", "baseline", "train") for task in TASKS},
        **{task: one(task, "train") for task in TASKS},
    },
    "conf/data/sample.yaml": {"": {"download"}, "flatten": both("tokenize")},
    "conf/hardware/cpu.yaml": {
        "hardware": both("baseline", "train", "evaluate"),
        **dict.fromkeys(("checkpoints", "trainer"), both("train")),
    },
    **{
        f"conf/model/{name}.yaml": {"": one(task, "baseline", "train"), "tokenizer": one(task, "tokenize")}
        for name, task in {"tiny-gpt2": "causal", "tiny-roberta": "mlm"}.items()
    },
    **{
        f"conf/task/{task}.yaml": {
            "tokenize": one(task, "tokenize"),
            "objective": one(task, "train", "evaluate"),
            "objective.name": one(task, "baseline", "train", "evaluate"),
            "trainer": one(task, "train"),
            "early_stopping": one(task, "train"),
            "evaluate": one(task, "baseline", "evaluate"),
            "samples": one(task, "evaluate"),
        }
        for task in TASKS
    },
    "conf/framework/trainer.yaml": {"": both("train")},
    "conf/download.yaml": {"": {"download"}},
    **{f"conf/{stage}.yaml": {"": both(stage)} for stage in PER_TASK},
}
# Names of configurations: another one that exists, so that DVC can read it.
ANOTHER = {
    "data.name": "files",
    "hardware": "other",
    "framework": "keras",
    "causal.model": "other-gpt2",
    "mlm.model": "other-roberta",
}


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of every leaf; lists, empty mappings and nulls are leaves."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from leaves(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def changed(value: Any) -> Any:
    """Another value of the same type."""
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case str():
            return value + "x"
        case list():
            return [*value, "x"]
    return "x"


def mutations() -> Iterator[tuple[str, str]]:
    """File and dotted key of all values of params.yaml and the chosen files of conf/."""
    for file in USERS:
        for key, _ in leaves(yaml.safe_load((ROOT / file).read_text(encoding="utf-8"))):
            yield file, key


def changed_stages(project: Path) -> set[str]:
    """The stages that DVC would run first."""
    with Repo(str(project)) as repo:
        return {name.rpartition(":")[2] for name in repo.status()}  # path/dvc.yaml:train@mlm


def users_of(file: str, key: str) -> set[str]:
    prefixes = [name for name in USERS[file] if name in ("", key) or key.startswith(f"{name}.")]
    return USERS[file][max(prefixes, key=len)]


SOURCES = sorted(
    file.relative_to(ROOT / "stages").as_posix()
    for file in (ROOT / "stages").rglob("*.py")
    if file.name != "__init__.py"
)
COPIES = {
    "hardware/cpu": "hardware/other",
    "model/tiny-gpt2": "model/other-gpt2",
    "model/tiny-roberta": "model/other-roberta",
}


@pytest.fixture(scope="module")
def others(project: Path) -> Iterator[Path]:
    """The project, with configurations under other names to choose instead."""
    for old, new in COPIES.items():
        text = (project / f"conf/{old}.yaml").read_text(encoding="utf-8")
        (project / f"conf/{new}.yaml").write_text(text, encoding="utf-8")
    yield project
    for new in COPIES.values():
        (project / f"conf/{new}.yaml").unlink()


@pytest.mark.slow
@pytest.mark.parametrize(("file", "key"), list(mutations()))
def test_soundness_changed_value_changes_exactly_the_stages_that_use_it(others: Path, file: str, key: str) -> None:
    path = others / file
    text = path.read_text(encoding="utf-8")
    value = yaml.safe_load(text)
    for step in key.split("."):
        value = value[step]
    try:
        edit(
            path,
            **{key.replace(".", "__"): ANOTHER[key] if key in ANOTHER and file == "params.yaml" else changed(value)},
        )
        assert changed_stages(others) == users_of(file, key)
    finally:
        path.write_text(text, encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
def test_soundness_changed_source_file_changes_exactly_the_stages_that_import_it(others: Path, source: str) -> None:
    if source.startswith("frameworks/"):  # the chosen one alone
        importing = ["train"] if source.startswith("frameworks/trainer/") else []
    else:
        stages = ("download", *PER_TASK)
        importing = [stage for stage in stages if f"stages/{source}" in project_imports(ROOT / f"stages/{stage}.py")]
        assert importing
    expected = {name for stage in importing for name in ({"download"} if stage == "download" else both(stage))}
    path = others / "stages" / source
    text = path.read_text(encoding="utf-8")
    try:
        path.write_text(text + "# changed\n", encoding="utf-8")
        assert changed_stages(others) == expected
    finally:
        path.write_text(text, encoding="utf-8")


@pytest.mark.slow
def test_soundness_changed_sample_changes_download_alone(others: Path) -> None:
    path = others / "data/sample/askscience.jsonl"
    text = path.read_text(encoding="utf-8")
    try:
        path.write_text(text + "\n", encoding="utf-8")
        assert changed_stages(others) == {"download"}
    finally:
        path.write_text(text, encoding="utf-8")
