"""A changed value or module runs exactly the stages that use it, and changed wording runs none."""

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
from dvc_project import ALL, ONCE, PER_TASK, TASKS, build_environment, edit_yaml, parse_stages_run, run_command

ROOT = Path(__file__).parents[2]


def for_all_tasks(*stages: str) -> set[str]:
    return {f"{stage}@{task}" for stage in stages for task in TASKS}


def for_task(task: str, *stages: str) -> set[str]:
    return {f"{stage}@{task}" for stage in stages}


# Stages that use a value, by the longest matching prefix of its name; deliberately not read from dvc.yaml.
EXPECTED_STAGES: dict[str, dict[str, set[str]]] = {
    "params.yaml": {
        "data.name": {"download", *for_all_tasks("tokenize", "group_texts", "baseline", "evaluate")},
        "data.path": {"download"},
        "hardware": for_all_tasks("baseline", "train", "evaluate"),
        "framework": for_all_tasks("train"),
        "block_size": for_all_tasks("group_texts", "train"),
        "seed": for_all_tasks("group_texts", "baseline", "train"),
        **{f"tasks.{task}.model": for_task(task, "tokenize", "baseline", "train") for task in TASKS},
        **{f"tasks.{task}.start": for_task(task, "tokenize", "baseline", "train") for task in TASKS},
        **{f"tasks.{task}.sources": for_task(task, "tokenize") for task in TASKS},
        **{f"tasks.{task}": for_task(task, "train") for task in TASKS},
    },
    "conf/data/sample.yaml": {
        "": {"download"},
        "flatten": for_all_tasks("tokenize", "baseline", "evaluate"),
        "weights": for_all_tasks("group_texts"),
    },
    "conf/hardware/cpu.yaml": {
        "hardware": for_all_tasks("baseline", "train", "evaluate"),
    },
    "conf/base/hardware.yaml": {
        "hardware": for_all_tasks("baseline", "train", "evaluate"),
        **dict.fromkeys(("checkpoints", "trainer"), for_all_tasks("train")),
    },
    **{
        f"conf/model/{name}.yaml": {"": for_task(task, "baseline", "train"), "tokenizer": for_task(task, "tokenize")}
        for name, task in {"tiny-gpt2": "causal", "tiny-modernbert": "mlm"}.items()
    },
    **{
        f"conf/task/{task}.yaml": {
            "flatten": for_task(task, "tokenize", "baseline", "evaluate"),
            "tokenize": for_task(task, "tokenize"),
            "objective": for_task(task, "train", "evaluate"),
            "objective.name": for_task(task, "baseline", "train", "evaluate"),
            "trainer": for_task(task, "train"),
            "early_stopping": for_task(task, "train"),
            "evaluate": for_task(task, "baseline", "evaluate"),
            "samples": for_task(task, "baseline", "evaluate"),
        }
        for task in TASKS
    },
    "conf/framework/trainer.yaml": {"": for_all_tasks("train")},
    **{f"conf/{stage}.yaml": {"": {stage}} for stage in ONCE},
    **{f"conf/{stage}.yaml": {"": for_all_tasks(stage)} for stage in PER_TASK},
}
# For values that name a configuration: another existing configuration, because DVC reads its file.
OTHER_NAMES = {
    "data.name": "files",
    "hardware": "other",
    "framework": "keras",
    "tasks.causal.model": "other-gpt2",
    "tasks.mlm.model": "other-modernbert",
}


def iterate_leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and value of every leaf; lists, empty mappings and nulls are leaves."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from iterate_leaves(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def change_value(value: Any) -> Any:
    """Return a different value of the same type."""
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


def list_values() -> Iterator[tuple[str, str]]:
    """Yield the file and dotted key of all values in params.yaml and the selected files of conf/.

    `sources` and `pairs` are omitted: each of their entries adds a stage (test_source_stages, test_score_pipeline).
    """
    for file in EXPECTED_STAGES:
        for key, _ in iterate_leaves(yaml.safe_load((ROOT / file).read_text(encoding="utf-8"))):
            if key not in ("sources", "pairs") or file != "params.yaml":
                yield file, key


def find_changed_stages(project: Path) -> set[str]:
    """Return the stages with a changed input, without their downstream stages."""
    with Repo(str(project)) as repo:
        return {name.rpartition(":")[2] for name in repo.status()}  # path/dvc.yaml:train@mlm


def get_expected_stages(file: str, key: str) -> set[str]:
    prefixes = [name for name in EXPECTED_STAGES[file] if name in ("", key) or key.startswith(f"{name}.")]
    return EXPECTED_STAGES[file][max(prefixes, key=len)]


COPIES = {
    "hardware/cpu": "hardware/other",
    "model/tiny-gpt2": "model/other-gpt2",
    "model/tiny-modernbert": "model/other-modernbert",
}


@pytest.fixture(scope="module")
def project_with_copies(project: Path) -> Iterator[Path]:
    """Project with copies of configurations under the names in OTHER_NAMES."""
    for old, new in COPIES.items():
        text = (project / f"conf/{old}.yaml").read_text(encoding="utf-8")
        (project / f"conf/{new}.yaml").write_text(text, encoding="utf-8")
    yield project
    for new in COPIES.values():
        (project / f"conf/{new}.yaml").unlink(missing_ok=True)  # a later test may have cleaned up


@pytest.mark.slow
@pytest.mark.parametrize(("file", "key"), list(list_values()))
def test_soundness_changed_value_changes_exactly_the_stages_that_use_it(
    project_with_copies: Path, file: str, key: str
) -> None:
    path = project_with_copies / file
    text = path.read_text(encoding="utf-8")
    value = yaml.safe_load(text)
    for step in key.split("."):
        value = value[step]
    try:
        edit_yaml(
            path,
            **{
                key.replace(".", "__"): OTHER_NAMES[key]
                if key in OTHER_NAMES and file == "params.yaml"
                else change_value(value)
            },
        )
        assert find_changed_stages(project_with_copies) == get_expected_stages(file, key)
    finally:
        path.write_text(text, encoding="utf-8")


@pytest.mark.slow
def test_soundness_changed_sample_changes_only_download(project_with_copies: Path) -> None:
    path = project_with_copies / "data/sample/askscience.jsonl"
    text = path.read_text(encoding="utf-8")
    try:
        path.write_text(text + "\n", encoding="utf-8")
        assert find_changed_stages(project_with_copies) == {"download"}
    finally:
        path.write_text(text, encoding="utf-8")


# -- code --------------------------------------------------------------------------------------------------------------

MODULES = sorted(file.relative_to(ROOT).with_suffix("").as_posix() for file in (ROOT / "stages").rglob("*.py"))


def reword_source(text: str) -> str:
    """Return the source `text` with a word added to each docstring, log line and error, and a comment at the end."""
    edits: list[tuple[int, int]] = []  # line and column of strings, both from 0

    def iterate_strings(node: ast.AST) -> Iterator[ast.expr]:
        if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str)):
            yield node
        else:
            for child in ast.iter_child_nodes(node):
                yield from iterate_strings(child)

    for node in ast.walk(ast.parse(text)):
        found: list[ast.expr] = []
        match node:
            case ast.Expr(value=ast.Constant(value=str()) as docstring):
                found = [docstring]
            case ast.Raise(exc=ast.Call(args=arguments)):
                found = [string for argument in arguments for string in iterate_strings(argument)]
            case ast.Call(func=ast.Attribute(value=ast.Name(id="log")), args=[first, *_]):
                found = list(iterate_strings(first))
        edits += [(string.lineno - 1, string.col_offset) for string in found]
    lines = text.splitlines()
    for line, column in sorted(set(edits), reverse=True):
        before, after = lines[line].encode()[:column].decode(), lines[line].encode()[column:].decode()
        prefix, quote, rest = re.fullmatch(r"([a-zA-Z]*)(\"\"\"|'''|\"|')(.*)", after, re.DOTALL).groups()  # type: ignore[union-attr]
        lines[line] = f"{before}{prefix}{quote}Reworded: {rest}"
    return "\n".join([*lines, "# A comment more."]) + "\n"


def find_importing_stages(module: str) -> set[str]:
    """Return the stages that may import `module`, found by matching import statements in the source text."""
    found = set()
    for stage in (*ONCE, *PER_TASK):
        visited = set()
        pending = [f"stages/{stage}/__main__"] + ["stages/frameworks/trainer/__init__"] * (stage == "train")
        while pending:
            file = pending.pop()
            if file in visited or file not in MODULES:
                continue
            visited.add(file)
            # Imports below `if TYPE_CHECKING:` never run.
            source = re.sub(
                r"(?m)^if TYPE_CHECKING:\n(?:    .*\n|\n)+", "", (ROOT / f"{file}.py").read_text(encoding="utf-8")
            )
            for base, listed, on_one_line in re.findall(
                r"(?m)^ *from (stages[\w.]*) import (?:\(([^)]*)\)|([\w, ]+))", source
            ):
                path = base.replace(".", "/")
                names = re.findall(r"\w+", listed or on_one_line)
                pending += [path, *(f"{path}/{name}" for name in names)]
                parts = path.split("/")
                pending += ["/".join([*parts[:end], "__init__"]) for end in range(1, len(parts) + 1)]
            parts = file.split("/")
            pending += ["/".join([*parts[:end], "__init__"]) for end in range(1, len(parts))]
        if module in visited:
            found.add(stage)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
def test_soundness_changed_behavior_of_a_module_changes_exactly_the_stages_that_import_it(
    clean: Path, module: str
) -> None:
    file = clean / f"{module}.py"
    file.write_text(file.read_text(encoding="utf-8") + "\n_CHANGED = 1\n", encoding="utf-8")
    assert parse_stages_run(run_command(clean, "dvc", "repro", "code")) == {"code"}
    importing = find_importing_stages(module) - {"code"}
    assert find_changed_stages(clean) == {name for name in ALL if name.partition("@")[0] in importing}


@pytest.mark.slow
def test_soundness_behavior_that_one_stage_uses_runs_that_stage(clean: Path) -> None:
    file = clean / "stages/evaluate/stage.py"
    # Another value than in the test above, whose run of `code` DVC would restore.
    file.write_text(file.read_text(encoding="utf-8") + "\n_CHANGED = 2\n", encoding="utf-8")
    assert parse_stages_run(run_command(clean, "dvc", "repro")) == {"code", *for_all_tasks("evaluate")}


@pytest.mark.slow
def test_soundness_reworded_code_runs_only_code_and_a_killed_training_resumes(clean: Path) -> None:
    out = [f"{name}={clean}/elsewhere/{name}" for name in ("out", "report")]
    saving = ["+trainer.save_strategy=steps", "+trainer.save_steps=1", "num_train_epochs=3"]
    command = [sys.executable, "-m", "stages.train", "task=causal", *saving, *out]
    cache = clean / ".lm-repro_cache"
    killed = subprocess.Popen(command, cwd=clean, env=build_environment(clean), stderr=subprocess.DEVNULL)
    while not list(cache.rglob("checkpoint-3")) and killed.poll() is None:
        time.sleep(0.05)
    assert killed.poll() is None, "it ended before it could be killed"
    killed.kill()
    killed.wait()
    for module in MODULES:
        file = clean / f"{module}.py"
        text = file.read_text(encoding="utf-8")
        file.write_text(reword_source(text), encoding="utf-8")
        assert file.read_text(encoding="utf-8") != text
    ran = run_command(clean, "dvc", "repro")
    assert parse_stages_run(ran) == {"code"}
    assert "Reworded: " in ran
    assert "Reworded: resuming from step" in run_command(clean, *command)
