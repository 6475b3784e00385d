"""Run every command of README.md and docs/ in a small copy of the project, except those listed in NOT_RUN.

The commands of a page run as a reader would type them: in order, in one shell, until the first failure. A section
(`##`) starts with the workspace restored to the last commit.
`pytest tests/docs/test_docs_commands.py -m slow -s` runs them and prints their number.
"""

import contextlib
import itertools
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from docs_commands import (
    FENCE,
    PAGES,
    Command,
    find_code_spans,
    find_problems,
    parse_commands,
    read_page,
    split_words,
    strip_comment,
)
from dvc_project import ALL, ROOT, TASKS, build_environment, edit_yaml, parse_stages_run, run_command
from hub_cases import COMMIT, encode_parquet, make_blimp_files, make_guide_questions, make_small_model
from mini_hub import MiniHub
from upload_hub import UploadHub

from tools import summary

# Name of a command (its first line without comment) to the reason for not running it.
NOT_RUN = {
    '"""Stage `lengths@TASK`: documents of token ids -> their number in each split.': "module of a stage, added by"
    " test_docs_stage_added_as_contributing_says_runs_once",
    '"""Command line of stage `lengths`."""': "the same",
    "make keras": "installs three gigabytes of packages; tested by .ci/run",
    "make ray": "installs the packages of Ray; tested by .ci/run",
    "make optuna": "installs the packages of Optuna; tested by .ci/run",
    "python -m tools.search --space depth.yaml --budget 1h": "test_search_space.py checks the file above it",
    "python -m benchmarks.search --budget 20m": "takes twice the budget",
    "python -m tools.ladder ladders/tiny.yaml": "trains 16 models; tests/tools/test_ladder.py trains small ones",
}
# Commands that need an optional package, and its module.
NEED_PACKAGES = {
    "dvc exp run -n keras -S framework=keras -S tasks.mlm.model=tiny-roberta": "keras_hub",
    "python -m tools.search --budget 20m": "optuna",
    "python -m tools.search --show": "optuna",
}
NOT_RUN |= {name: f"{module} is not installed" for name, module in NEED_PACKAGES.items() if find_spec(module) is None}
# Regular expression of a command to its replacement, for resources that a test does not have and commands that would
# take hours. $OUTSIDE is the parent directory of the project.
REDUCTIONS = {
    r"^make test(-all)?$": r"PYTEST_ADDOPTS='-k packing' make test\1",
    r"^git clone URL lm-repro && cd lm-repro$": r"true",
    r"OWNER/NAME": r"dany0407/eli5_category",
    r"=COMMIT$": rf"={COMMIT}",
    r"^(python -m tools.publish \w+)$": r"HF_ENDPOINT=$UPLOAD_HUB HF_TOKEN=hf_none \1",
    r"^(python -m benchmarks\.(compare|gpu|imports|plan))$": r"\1 --help",
    r"^(python benchmarks/preprocessing.py)$": r"\1 --documents 200 --guide-documents 200 --rounds 1",
    r"( --files-only) \[--before CHECKOUT\]$": r"\1 --documents 200 --rounds 1",
    r"^(python benchmarks/engines.py)$": r"\1 --documents 200 --rounds 1",
    r"^(python -m benchmarks.scale)$": r"\1 --documents 200 --shards 2",
    r"^(python -m tools.search --budget) 20m$": r"\1 2trials",
    r"'DIR'": r"'models/causal'",
    r"^mutmut run$": r"mutmut run 'stages.group_texts.packing*'",
}
MARK = "=== command"

COMMANDS = {page: list(parse_commands(page, read_page(page))) for page in PAGES}
ALL_COMMANDS = [command for page in PAGES for command in COMMANDS[page]]


def reduce_command(text: str) -> str:
    """Return a command line with its comment removed and REDUCTIONS applied."""
    text = strip_comment(text)
    for pattern, replacement in REDUCTIONS.items():
        text = re.sub(pattern, replacement, text)
    return text


# -- checks without running the commands -------------------------------------------------------------------------------


def test_docs_commands_are_found_with_continuations_and_without_output() -> None:
    text = "a\n\n```console\n$ dvc repro  # all\nIt ran\n$ dvc exp run \\\n    -S seed='# 1'\n```\n"
    text += "```python\nx = 1\n```\n```\n$ no\n```\n"
    found = list(parse_commands("page", text))
    assert [(command.line, command.name, command.answered) for command in found] == [
        (4, "dvc repro", True),
        (6, "dvc exp run \\", False),
        (10, "x = 1", False),
    ]
    assert split_words(found[1].text) == [["dvc", "exp", "run", "-S", "seed=# 1"]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rm -rf x", "rm is no known program"),
        ("make && make tset", "no target tset"),
        ("python -m tools.sumary", "no module tools.sumary"),
        ("python benchmarks/x.py", "no file benchmarks/x.py"),
        ("dvc exp run -S conf/task/clm.yaml:a=1", "no file conf/task/clm.yaml"),
        ("dvc exp run -S conf/task/mlm.yaml:trainer.decay=1", "conf/task/mlm.yaml:trainer.decay: no such key"),
        ("dvc exp run -S blok_size=1", "blok_size: no such key"),
        ("X=1 dvc exp run -S tasks.causal.model=gtp2", "no file conf/model/gtp2.yaml"),
        ("dvc exp shwo", "shwo"),
        ("dvc repro --no-such-option", "--no-such-option"),
    ],
)  # fmt: skip
def test_docs_command_with_a_missing_name_is_reported(text: str, expected: str) -> None:
    assert [problem for problem in find_problems(text) if expected in problem]


@pytest.mark.parametrize("page", PAGES)
def test_docs_commands_name_existing_things(page: str) -> None:
    text = read_page(page)
    lines = text.split("\n")
    wrong = {
        f"{page}:{command.line}": problem
        for command in COMMANDS[page]
        if command.language == "console"
        for problem in find_problems(command.text, made="\n".join(lines[: command.line - 1]))
    }
    for span in find_code_spans(text):
        with contextlib.suppress(ValueError):  # an apostrophe, not a command
            if any(re.match(rf"{program} |make$", span) for program in ("dvc", "make", "python")):
                wrong |= {f"{page}: `{span}`": problem for problem in find_problems(span, made=text)}
    assert wrong == {}


def test_docs_tables_of_this_test_match_existing_commands() -> None:
    names = {command.name for command in ALL_COMMANDS}
    run_somewhere = names - (NOT_RUN.keys() - NEED_PACKAGES.keys())  # on a machine with all packages
    texts = [strip_comment(command.text) for command in ALL_COMMANDS if command.name in run_somewhere]
    assert [name for name in NOT_RUN | NEED_PACKAGES if name not in names] == []
    assert [pattern for pattern in REDUCTIONS if not any(re.search(pattern, text) for text in texts)] == []


def test_docs_readme_shows_the_output_of_make(capsys: Any, inside: Path) -> None:
    def normalize(text: str) -> str:
        return " ".join(re.sub(r"\d+", "0", text.replace("─", "")).split())

    summary.main()
    assert normalize(capsys.readouterr().out) in normalize(read_page("README.md"))


def test_docs_diagram_of_the_pipeline_has_the_edges_of_dvc_dag() -> None:
    picture = re.search(r"```mermaid\nflowchart LR\n(.*?)```", read_page("README.md"), flags=re.DOTALL)
    assert picture is not None
    drawn = set()
    for line in picture[1].strip().splitlines():
        columns = [[name.strip() for name in column.split("&")] for column in line.split("-->")]
        for before, after in itertools.pairwise(columns):
            drawn |= {(start, end) for start in before for end in after}
    edges = re.findall(r'"([^"]+)" -> "([^"]+)"', run_command(ROOT, "dvc", "dag", "--dot"))
    of_tasks = {
        task: {
            (start.removesuffix(task), end.removesuffix(task))
            for start, end in edges
            if end.endswith(task) and start != "code"
        }
        for task in ("@causal", "@mlm")
    }
    assert of_tasks == {"@causal": drawn, "@mlm": drawn}


@pytest.mark.slow
def test_docs_stage_added_as_contributing_says_runs_once(clean: Path) -> None:
    module, main, conf, stage = (
        textwrap.dedent(fence[3]) for fence in FENCE.finditer(read_page("CONTRIBUTING.md")) if fence[2] != "console"
    )
    package = clean / "stages/lengths"
    package.mkdir()
    for name, text in (("__init__", '"""Stage `lengths`."""\n'), ("stage", module), ("__main__", main)):
        (package / f"{name}.py").write_text(text)
    (clean / "conf/lengths.yaml").write_text(conf)
    pipeline = (clean / "dvc.yaml").read_text()
    (clean / "dvc.yaml").write_text(pipeline.replace("\n  baseline:", f"\n{textwrap.indent(stage, '  ')}\n  baseline:"))
    assert f"{len(ALL) + len(TASKS)} stages is in order" in run_command(clean, "python", "-m", "tools.check")
    assert parse_stages_run(run_command(clean, "dvc", "repro", "lengths@causal")) == {"code", "lengths@causal"}
    assert parse_stages_run(run_command(clean, "dvc", "repro")) == {"lengths@mlm"}
    assert parse_stages_run(run_command(clean, "dvc", "repro")) == set()


@pytest.mark.slow
def test_docs_refactored_code_is_committed_as_contributing_says(clean: Path) -> None:
    section = next(c.section for c in COMMANDS["CONTRIBUTING.md"] if c.text == "dvc commit --force")
    repro, status, commit = (c.text for c in COMMANDS["CONTRIBUTING.md"] if c.section == section)
    metrics = (clean / "metrics/causal.json").read_text(encoding="utf-8")
    file = clean / "stages/model/loss.py"
    file.write_text(file.read_text(encoding="utf-8") + "\nUNUSED = 1\n", encoding="utf-8")
    assert parse_stages_run(run_command(clean, *shlex.split(repro))) == {"code"}
    changes = re.findall(r"^\s*(\w+):\s+(\S+)$", run_command(clean, *shlex.split(status)), flags=re.MULTILINE)
    expected = [f"code/{name}.json" for name in ("baseline", "evaluate", "train-trainer") for _ in TASKS]
    assert sorted(changes) == [("modified", name) for name in expected]
    run_command(clean, *shlex.split(commit))
    assert parse_stages_run(run_command(clean, "dvc", "repro")) == set()
    assert (clean / "metrics/causal.json").read_text(encoding="utf-8") == metrics


# -- running them ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment variables of local Hubs: one serves the guide's data set and models, the other accepts uploads."""
    directory = tmp_path_factory.mktemp("hub")
    repositories = {
        "datasets/dany0407/eli5_category": {COMMIT: {"data/train.parquet": encode_parquet(make_guide_questions())}}
    }
    blimp = yaml.safe_load((ROOT / "conf/pairs/blimp.yaml").read_text(encoding="utf-8"))["hub"]
    files = make_blimp_files("anaphor_number_agreement", "wh_island")
    repositories[f"datasets/{blimp['path']}"] = {blimp["revision"]: files}
    for task, name in (("causal", "distilgpt2"), ("mlm", "distilroberta")):
        pin = yaml.safe_load((ROOT / f"conf/model/{name}.yaml").read_text(encoding="utf-8"))
        repositories[pin["path"]] = {pin["revision"]: make_small_model(task, directory / task)}
    with MiniHub(repositories, branches={"main": COMMIT}).serve() as url, UploadHub().serve() as upload:
        own = {"HF_ENDPOINT": url, "UPLOAD_HUB": upload, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        yield {**own, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}


@pytest.fixture
def reader_project(
    clean: Path, tmp_path: Path, hub_environment: dict[str, str]
) -> Iterator[tuple[Path, dict[str, str]]]:
    """Clone of the project with an installed environment, and the environment variables of a shell in it."""
    project, origin = tmp_path / "lm-repro", tmp_path / "origin.git"
    shutil.copytree(clean, project, symlinks=True)
    (project / ".venv").mkdir()
    for entry in Path(sys.prefix).iterdir():
        if entry.name != "ready":
            (project / ".venv" / entry.name).symlink_to(entry)
    (project / ".venv/ready").touch()
    edit_yaml(project / "conf/publish.yaml", causal__repository="someone/some-model")
    run_command(project, "git", "commit", "-q", "-a", "-m", "Say where to publish")
    run_command(project, "git", "init", "-q", "--bare", "-b", "main", str(origin))
    run_command(project, "git", "remote", "add", "origin", str(origin))
    run_command(project, "git", "push", "-q", "-u", "origin", "main")
    (tmp_path / "home").mkdir()
    variables = {"HOME": str(tmp_path / "home"), "HF_HOME": str(tmp_path / "home/hf"), "COLUMNS": "120"}
    yield (
        project,
        build_environment(project) | hub_environment | variables | {"OUTSIDE": str(tmp_path), "ORIGIN": str(origin)},
    )
    for process in psutil.process_iter():  # DVC's queue leaves idle workers behind
        with contextlib.suppress(psutil.Error):
            if Path(process.cwd()).is_relative_to(tmp_path):
                process.kill()


@pytest.fixture(scope="module")
def executed_commands() -> Iterator[list[Command]]:
    """Commands that have run; their number is printed at the end."""
    executed: list[Command] = []
    yield executed
    pages = len({command.page for command in executed})
    print(f"\n{len(executed)} commands executed from {pages} pages; {len(NOT_RUN)} listed as not run")  # noqa: T201


def build_script(commands_to_run: list[Command], directory: Path) -> str:
    """Return a shell script that prints a mark before each command and stops at the first failure."""
    lines, section = ["set -o pipefail"], commands_to_run[0].section
    for number, command in enumerate(commands_to_run):
        if command.section != section:
            section = command.section
            lines.append(f"cd {shlex.quote(str(directory))} && git restore . && dvc checkout -q --force || exit")
        typed = (
            reduce_command(command.text) if command.language == "console" else f"python -c {shlex.quote(command.text)}"
        )
        lines += [f"echo '{MARK} {number}'", f"{{ {typed}\n}} || exit"]
    return "\n".join(lines)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any(c.name not in NOT_RUN for c in COMMANDS[page])])
def test_docs_commands_of_a_page_run_in_order(
    page: str, reader_project: tuple[Path, dict[str, str]], executed_commands: list[Command]
) -> None:
    directory, variables = reader_project
    commands_to_run = [command for command in COMMANDS[page] if command.name not in NOT_RUN]
    log = directory.parent / "log"  # not a pipe, which background processes would keep open
    with log.open("wb") as stream:
        completed = subprocess.run(
            ["bash", "-c", build_script(commands_to_run, directory)],
            cwd=directory,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            check=False,
        )
    outputs = re.split(rf"^{MARK} \d+\n", log.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    last = commands_to_run[len(outputs) - 1]
    assert completed.returncode == 0, f"{page}:{last.line}: {last.text}\n{outputs[-1]}"
    assert len(outputs) == len(commands_to_run)
    outputs_by_command = dict(zip(commands_to_run, outputs, strict=True))
    assert [
        command.name for command in commands_to_run if command.answered and not outputs_by_command[command].strip()
    ] == []
    executed_commands += commands_to_run
