"""Every value and module, changed: exactly the stages that use it run again, and none for a change of words."""

import ast
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.repo import Repo
from dvc_project import ALL, ONCE, PER_TASK, TASKS, edit, environment, run, stages_run

ROOT = Path(__file__).parents[2]


def both(*stages: str) -> set[str]:
    return {f"{stage}@{task}" for stage in stages for task in TASKS}


def one(task: str, *stages: str) -> set[str]:
    return {f"{stage}@{task}" for stage in stages}


# What uses a value, by the longest prefix of its name; written down here, not read from dvc.yaml.
USERS: dict[str, dict[str, set[str]]] = {
    "params.yaml": {
        "data.name": {"download", *both("tokenize", "baseline", "evaluate")},
        "data.path": {"download"},
        "hardware": both("baseline", "train", "evaluate"),
        "framework": both("train"),
        "block_size": both("group_texts", "train"),
        "seed": both("baseline", "train"),
        **{f"tasks.{task}.model": one(task, "tokenize", "baseline", "train") for task in TASKS},
        **{f"tasks.{task}": one(task, "train") for task in TASKS},
    },
    "conf/data/sample.yaml": {"": {"download"}, "flatten": both("tokenize", "baseline", "evaluate")},
    "conf/hardware/cpu.yaml": {
        "hardware": both("baseline", "train", "evaluate"),
    },
    "conf/base/hardware.yaml": {
        "hardware": both("baseline", "train", "evaluate"),
        **dict.fromkeys(("checkpoints", "trainer"), both("train")),
    },
    **{
        f"conf/model/{name}.yaml": {"": one(task, "baseline", "train"), "tokenizer": one(task, "tokenize")}
        for name, task in {"tiny-gpt2": "causal", "tiny-modernbert": "mlm"}.items()
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
    **{f"conf/{stage}.yaml": {"": {stage}} for stage in ONCE},
    **{f"conf/{stage}.yaml": {"": both(stage)} for stage in PER_TASK},
}
# Names of configurations: another one that exists, so that DVC can read it.
ANOTHER = {
    "data.name": "files",
    "hardware": "other",
    "framework": "keras",
    "tasks.causal.model": "other-gpt2",
    "tasks.mlm.model": "other-modernbert",
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


COPIES = {
    "hardware/cpu": "hardware/other",
    "model/tiny-gpt2": "model/other-gpt2",
    "model/tiny-modernbert": "model/other-modernbert",
}


@pytest.fixture(scope="module")
def others(project: Path) -> Iterator[Path]:
    """The project, with configurations under other names to choose instead."""
    for old, new in COPIES.items():
        text = (project / f"conf/{old}.yaml").read_text(encoding="utf-8")
        (project / f"conf/{new}.yaml").write_text(text, encoding="utf-8")
    yield project
    for new in COPIES.values():
        (project / f"conf/{new}.yaml").unlink(missing_ok=True)  # a later test may have cleaned up


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
def test_soundness_changed_sample_changes_download_alone(others: Path) -> None:
    path = others / "data/sample/askscience.jsonl"
    text = path.read_text(encoding="utf-8")
    try:
        path.write_text(text + "\n", encoding="utf-8")
        assert changed_stages(others) == {"download"}
    finally:
        path.write_text(text, encoding="utf-8")


# -- code --------------------------------------------------------------------------------------------------------------

MODULES = sorted(file.relative_to(ROOT).with_suffix("").as_posix() for file in (ROOT / "stages").rglob("*.py"))


def reworded(text: str) -> str:
    """The source `text` with other comments, docstrings, log lines and errors: a line more or a word more in each."""
    edits: list[tuple[int, int]] = []  # line and column of strings, both from 0

    def strings(node: ast.AST) -> Iterator[ast.expr]:
        if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str)):
            yield node
        else:
            for child in ast.iter_child_nodes(node):
                yield from strings(child)

    for node in ast.walk(ast.parse(text)):
        found: list[ast.expr] = []
        match node:
            case ast.Expr(value=ast.Constant(value=str()) as docstring):
                found = [docstring]
            case ast.Raise(exc=ast.Call(args=arguments)):
                found = [string for argument in arguments for string in strings(argument)]
            case ast.Call(func=ast.Attribute(value=ast.Name(id="log")), args=[first, *_]):
                found = list(strings(first))
        edits += [(string.lineno - 1, string.col_offset) for string in found]
    lines = text.splitlines()
    for line, column in sorted(set(edits), reverse=True):
        before, after = lines[line].encode()[:column].decode(), lines[line].encode()[column:].decode()
        prefix, quote, rest = re.fullmatch(r"([a-zA-Z]*)(\"\"\"|'''|\"|')(.*)", after, re.DOTALL).groups()  # type: ignore[union-attr]
        lines[line] = f"{before}{prefix}{quote}Reworded: {rest}"
    return "\n".join([*lines, "# A comment more."]) + "\n"


def importers(module: str) -> set[str]:
    """The stages whose process may import `module`, followed through the sources' import statements as text."""
    found = set()
    for stage in (*ONCE, *PER_TASK):
        seen = set()
        waiting = [f"stages/{stage}/__main__"] + ["stages/frameworks/trainer/__init__"] * (stage == "train")
        while waiting:
            file = waiting.pop()
            if file in seen or file not in MODULES:
                continue
            seen.add(file)
            # What stands below `if TYPE_CHECKING:` never runs.
            source = re.sub(
                r"(?m)^if TYPE_CHECKING:\n(?:    .*\n|\n)+", "", (ROOT / f"{file}.py").read_text(encoding="utf-8")
            )
            for base, listed, in_a_line in re.findall(
                r"(?m)^ *from (stages[\w.]*) import (?:\(([^)]*)\)|([\w, ]+))", source
            ):
                path = base.replace(".", "/")
                names = re.findall(r"\w+", listed or in_a_line)
                waiting += [path, *(f"{path}/{name}" for name in names)]
                parts = path.split("/")
                waiting += ["/".join([*parts[:end], "__init__"]) for end in range(1, len(parts) + 1)]
            parts = file.split("/")
            waiting += ["/".join([*parts[:end], "__init__"]) for end in range(1, len(parts))]
        if module in seen:
            found.add(stage)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
def test_soundness_changed_behaviour_of_a_module_changes_exactly_the_stages_that_import_it(
    clean: Path, module: str
) -> None:
    file = clean / f"{module}.py"
    file.write_text(file.read_text(encoding="utf-8") + "\n_CHANGED = 1\n", encoding="utf-8")
    assert stages_run(run(clean, "dvc", "repro", "code")) == {"code"}
    importing = importers(module) - {"code"}
    assert changed_stages(clean) == {name for name in ALL if name.partition("@")[0] in importing}


@pytest.mark.slow
def test_soundness_behaviour_that_one_stage_uses_runs_that_stage(clean: Path) -> None:
    file = clean / "stages/evaluate/stage.py"
    file.write_text(file.read_text(encoding="utf-8") + "\n_CHANGED = 1\n", encoding="utf-8")
    assert stages_run(run(clean, "dvc", "repro")) == {"code", *both("evaluate")}


@pytest.mark.slow
def test_soundness_reworded_code_runs_nothing_but_code_and_a_killed_training_goes_on(clean: Path) -> None:
    out = [f"{name}={clean}/elsewhere/{name}" for name in ("out", "report")]
    saving = ["+trainer.save_strategy=steps", "+trainer.save_steps=1", "num_train_epochs=3"]
    command = [sys.executable, "-m", "stages.train", "task=causal", *saving, *out]
    cache = clean / ".lm-repro_cache"
    killed = subprocess.Popen(command, cwd=clean, env=environment(clean), stderr=subprocess.DEVNULL)
    while not list(cache.rglob("checkpoint-3")) and killed.poll() is None:
        time.sleep(0.05)
    assert killed.poll() is None, "it ended before it could be killed"
    killed.kill()
    killed.wait()
    for module in MODULES:
        file = clean / f"{module}.py"
        text = file.read_text(encoding="utf-8")
        file.write_text(reworded(text), encoding="utf-8")
        assert file.read_text(encoding="utf-8") != text
    ran = run(clean, "dvc", "repro")
    assert stages_run(ran) == {"code"}
    assert "Reworded: " in ran
    assert "Reworded: resuming from step" in run(clean, *command)
