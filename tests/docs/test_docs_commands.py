"""README.md and docs/: every command is run in a small copy of the project, or listed here with the reason why not.

A page is read as its reader would type it: its commands run in one shell, in order, and the first that fails ends it.
A section (`##`) begins with the workspace as the commit has it.
`pytest tests/docs/test_docs_commands.py -m slow -s` runs them and says how many they were.
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
from docs_commands import FENCE, PAGES, Command, commands, complaints, page_text, spans, without_comment, words_of
from dvc_project import ALL, ROOT, TASKS, edit, environment, run, stages_run
from hub_cases import COMMIT, blimp_files, guide_questions, parquet, small_model
from mini_hub import MiniHub
from upload_hub import UploadHub

from tools import summary

# Commands that are not run, by name (the first line, without comment), and why.
NOT_RUN = {
    '"""Stage `lengths@TASK`: documents of token ids -> their number in each split.': "a module of a stage, which"
    " test_docs_stage_added_as_contributing_says_runs_once adds",
    '"""Command line of stage `lengths`."""': "the same",
    "make keras": "three gigabytes of packages: .ci/run does it",
    "make ray": "the packages of Ray: .ci/run does it",
}
if find_spec("keras_hub") is None:
    NOT_RUN["dvc exp run -n keras -S framework=keras -S tasks.mlm.model=tiny-roberta"] = "Keras is not installed"
# What is put in the place of what a reader has and a test has not, or of what would take hours: a regular expression of
# the command, and its replacement. $OUTSIDE is a directory beside the project's.
REDUCTIONS = {
    r"^make test(-all)?$": r"PYTEST_ADDOPTS='-k packing' make test\1",
    r"s3://bucket/path": r"$OUTSIDE/remote",
    r"^git clone URL && cd lm-repro && make env": r"cd $OUTSIDE && git clone -q $ORIGIN elsewhere && cd elsewhere",
    r"OWNER/NAME": r"dany0407/eli5_category",
    r"=COMMIT$": rf"={COMMIT}",
    r"^(python -m tools.publish \w+)$": r"HF_ENDPOINT=$UPLOAD_HUB HF_TOKEN=hf_none \1",
    r"^(python benchmarks/preprocessing.py)$": r"\1 --documents 200 --guide-documents 200 --rounds 1",
    r"^(python benchmarks/engines.py)$": r"\1 --documents 200 --rounds 1",
    r"^(python -m benchmarks.scale)$": r"\1 --documents 200 --shards 2",
    r"'DIR'": r"'models/causal'",
    r"^mutmut run$": r"mutmut run 'stages.group_texts.packing*'",
}
MARK = "=== command"

COMMANDS = {page: list(commands(page, page_text(page))) for page in PAGES}
ALL_COMMANDS = [command for page in PAGES for command in COMMANDS[page]]


def reduced(text: str) -> str:
    """A command line as it is run."""
    text = without_comment(text)
    for pattern, replacement in REDUCTIONS.items():
        text = re.sub(pattern, replacement, text)
    return text


# -- what can be said without running anything -------------------------------------------------------------------------


def test_docs_commands_are_found_with_continuations_and_without_output() -> None:
    text = "a\n\n```console\n$ dvc repro  # all\nIt ran\n$ dvc exp run \\\n    -S seed='# 1'\n```\n"
    text += "```python\nx = 1\n```\n```\n$ no\n```\n"
    found = list(commands("page", text))
    assert [(command.line, command.name, command.answered) for command in found] == [
        (4, "dvc repro", True),
        (6, "dvc exp run \\", False),
        (10, "x = 1", False),
    ]
    assert words_of(found[1].text) == [["dvc", "exp", "run", "-S", "seed=# 1"]]


@pytest.mark.parametrize(
    ("text", "complaint"),
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
def test_docs_command_that_names_what_is_not_there_is_told(text: str, complaint: str) -> None:
    assert [said for said in complaints(text) if complaint in said]


@pytest.mark.parametrize("page", PAGES)
def test_docs_commands_name_what_is_there(page: str) -> None:
    text = page_text(page)
    lines = text.split("\n")
    wrong = {
        f"{page}:{command.line}": said
        for command in COMMANDS[page]
        if command.language == "console"
        for said in complaints(command.text, made="\n".join(lines[: command.line - 1]))
    }
    for span in spans(text):
        with contextlib.suppress(ValueError):  # an apostrophe, not a command
            if any(re.match(rf"{program} |make$", span) for program in ("dvc", "make", "python")):
                wrong |= {f"{page}: `{span}`": said for said in complaints(span, made=text)}
    assert wrong == {}


def test_docs_tables_of_this_test_name_commands_that_are_there() -> None:
    names = {command.name for command in ALL_COMMANDS}
    texts = [without_comment(command.text) for command in ALL_COMMANDS if command.name not in NOT_RUN]
    assert [name for name in NOT_RUN if name not in names] == []
    assert [pattern for pattern in REDUCTIONS if not any(re.search(pattern, text) for text in texts)] == []


def test_docs_readme_shows_what_make_prints(capsys: Any, inside: Path) -> None:
    def words(text: str) -> str:
        return " ".join(re.sub(r"\d+", "0", text.replace("─", "")).split())

    summary.main()
    assert words(capsys.readouterr().out) in words(page_text("README.md"))


def test_docs_picture_of_the_pipeline_has_the_edges_that_dvc_draws() -> None:
    picture = re.search(r"```mermaid\nflowchart LR\n(.*?)```", page_text("README.md"), flags=re.DOTALL)
    assert picture is not None
    drawn = set()
    for line in picture[1].strip().splitlines():
        columns = [[name.strip() for name in column.split("&")] for column in line.split("-->")]
        for before, after in itertools.pairwise(columns):
            drawn |= {(start, end) for start in before for end in after}
    edges = re.findall(r'"([^"]+)" -> "([^"]+)"', run(ROOT, "dvc", "dag", "--dot"))
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
        textwrap.dedent(fence[3]) for fence in FENCE.finditer(page_text("CONTRIBUTING.md")) if fence[2] != "console"
    )
    package = clean / "stages/lengths"
    package.mkdir()
    for name, text in (("__init__", '"""Stage `lengths`."""\n'), ("stage", module), ("__main__", main)):
        (package / f"{name}.py").write_text(text)
    (clean / "conf/lengths.yaml").write_text(conf)
    pipeline = (clean / "dvc.yaml").read_text()
    (clean / "dvc.yaml").write_text(pipeline.replace("\n  baseline:", f"\n{textwrap.indent(stage, '  ')}\n  baseline:"))
    assert f"{len(ALL) + len(TASKS)} stages is in order" in run(clean, "python", "-m", "tools.check")
    assert stages_run(run(clean, "dvc", "repro", "lengths@causal")) == {"code", "lengths@causal"}
    assert stages_run(run(clean, "dvc", "repro")) == {"lengths@mlm"}
    assert stages_run(run(clean, "dvc", "repro")) == set()


@pytest.mark.slow
def test_docs_refactored_code_is_committed_as_contributing_says(clean: Path) -> None:
    section = next(c.section for c in COMMANDS["CONTRIBUTING.md"] if c.text == "dvc commit --force")
    repro, status, commit = (c.text for c in COMMANDS["CONTRIBUTING.md"] if c.section == section)
    metrics = (clean / "metrics/causal.json").read_text(encoding="utf-8")
    file = clean / "stages/model/loss.py"
    file.write_text(file.read_text(encoding="utf-8") + "\nUNUSED = 1\n", encoding="utf-8")
    assert stages_run(run(clean, *shlex.split(repro))) == {"code"}
    changes = re.findall(r"^\s*(\w+):\s+(\S+)$", run(clean, *shlex.split(status)), flags=re.MULTILINE)
    expected = [f"code/{name}.json" for name in ("baseline", "evaluate", "train-trainer") for _ in TASKS]
    assert sorted(changes) == [("modified", name) for name in expected]
    run(clean, *shlex.split(commit))
    assert stages_run(run(clean, "dvc", "repro")) == set()
    assert (clean / "metrics/causal.json").read_text(encoding="utf-8") == metrics


# -- running them ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hubs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment in which the guide's data set and models come from a Hub on the loopback, and ours go to one."""
    directory = tmp_path_factory.mktemp("hub")
    repositories = {"datasets/dany0407/eli5_category": {COMMIT: {"data/train.parquet": parquet(guide_questions())}}}
    blimp = yaml.safe_load((ROOT / "conf/pairs/blimp.yaml").read_text(encoding="utf-8"))["hub"]
    files = blimp_files("anaphor_number_agreement", "wh_island")
    repositories[f"datasets/{blimp['path']}"] = {blimp["revision"]: files}
    for task, name in (("causal", "distilgpt2"), ("mlm", "distilroberta")):
        pin = yaml.safe_load((ROOT / f"conf/model/{name}.yaml").read_text(encoding="utf-8"))
        repositories[pin["path"]] = {pin["revision"]: small_model(task, directory / task)}
    with MiniHub(repositories, branches={"main": COMMIT}).serve() as url, UploadHub().serve() as upload:
        own = {"HF_ENDPOINT": url, "UPLOAD_HUB": upload, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        yield {**own, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}


@pytest.fixture
def reader(clean: Path, tmp_path: Path, hubs: dict[str, str]) -> Iterator[tuple[Path, dict[str, str]]]:
    """The project as its reader has it, cloned, with an environment, and the variables of a shell there."""
    place, origin = tmp_path / "lm-repro", tmp_path / "origin.git"
    shutil.copytree(clean, place, symlinks=True)
    (place / ".venv").mkdir()
    for entry in Path(sys.prefix).iterdir():
        if entry.name != "ready":
            (place / ".venv" / entry.name).symlink_to(entry)
    (place / ".venv/ready").touch()
    edit(place / "conf/publish.yaml", causal__repository="someone/some-model")
    run(place, "git", "commit", "-q", "-a", "-m", "Say where to publish")
    run(place, "git", "init", "-q", "--bare", "-b", "main", str(origin))
    run(place, "git", "remote", "add", "origin", str(origin))
    run(place, "git", "push", "-q", "-u", "origin", "main")
    (tmp_path / "home").mkdir()
    own = {"HOME": str(tmp_path / "home"), "HF_HOME": str(tmp_path / "home/hf"), "COLUMNS": "120"}
    yield place, environment(place) | hubs | own | {"OUTSIDE": str(tmp_path), "ORIGIN": str(origin)}
    for process in psutil.process_iter():  # DVC's queue leaves workers that wait for more
        with contextlib.suppress(psutil.Error):
            if Path(process.cwd()).is_relative_to(tmp_path):
                process.kill()


@pytest.fixture(scope="module")
def executed() -> Iterator[list[Command]]:
    """The commands that were run; how many they were is said at the end."""
    done: list[Command] = []
    yield done
    pages = len({command.page for command in done})
    print(f"\n{len(done)} commands executed from {pages} pages; {len(NOT_RUN)} listed as not run")  # noqa: T201


def script(wanted: list[Command], directory: Path) -> str:
    """One shell's work: each command after a mark, and no more after one that fails."""
    lines, section = ["set -o pipefail"], wanted[0].section
    for number, command in enumerate(wanted):
        if command.section != section:
            section = command.section
            lines.append(f"cd {shlex.quote(str(directory))} && git restore . && dvc checkout -q --force || exit")
        typed = reduced(command.text) if command.language == "console" else f"python -c {shlex.quote(command.text)}"
        lines += [f"echo '{MARK} {number}'", f"{{ {typed}\n}} || exit"]
    return "\n".join(lines)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any(c.name not in NOT_RUN for c in COMMANDS[page])])
def test_docs_commands_of_a_page_run_in_order(
    page: str, reader: tuple[Path, dict[str, str]], executed: list[Command]
) -> None:
    directory, variables = reader
    wanted = [command for command in COMMANDS[page] if command.name not in NOT_RUN]
    log = directory.parent / "log"  # a file, since what is left in the background would hold a pipe open
    with log.open("wb") as stream:
        done = subprocess.run(
            ["bash", "-c", script(wanted, directory)],
            cwd=directory,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            check=False,
        )
    outputs = re.split(rf"^{MARK} \d+\n", log.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    last = wanted[len(outputs) - 1]
    assert done.returncode == 0, f"{page}:{last.line}: {last.text}\n{outputs[-1]}"
    assert len(outputs) == len(wanted)
    said = dict(zip(wanted, outputs, strict=True))
    assert [command.name for command in wanted if command.answered and not said[command].strip()] == []
    executed += wanted
