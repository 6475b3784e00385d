"""Continuous integration, the container and dependency updates: what their files name must exist."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from docs_commands import read_make_targets
from small_repository import run_shell

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def list_scripts(workflow: dict[str, Any]) -> list[str]:
    """Shell scripts of all steps of a workflow, in order."""
    return [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]


def find_make_targets(script: str) -> list[str]:
    """Targets of each `make` in a shell script; `make` without a target is `all`."""
    found = []
    for line in script.splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["make"]:
            found += words[1:] or ["all"]
    return found


def find_missing_targets(script: str) -> list[str]:
    return [target for target in find_make_targets(script) if target not in read_make_targets()]


def find_unknown_dvc_options(script: str) -> list[str]:
    """The `dvc` commands in a shell script whose subcommand or options DVC does not know."""
    wrong = []
    for command in re.findall(r"\bdvc ((?:[\"$\w{}./@=-]+ ?)+)", script):
        words = shlex.split(command)
        names = [word for word in words if re.fullmatch(r"[a-z]+", word)][:2]
        options = [word for word in words if word.startswith("-")]
        done = subprocess.run(
            [sys.executable, "-m", "dvc", *names, "--help"], capture_output=True, text=True, check=False
        )
        known = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", done.stdout))
        if done.returncode or not set(options) <= known:
            wrong.append(command.strip())
    return wrong


def parse_jsonc(text: str) -> Any:
    """Value of JSON with comments on lines of their own."""
    return json.loads(re.sub(r"^\s*//.*$", "", text, flags=re.MULTILINE))


def list_versions() -> list[str]:
    """Python versions that the classifiers of pyproject.toml name, in order."""
    return re.findall(r"Python :: (\d+\.\d+)", "\n".join(PROJECT["classifiers"]))


# -- continuous integration --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schema", "file"),
    [*(("github-workflows", file) for file in WORKFLOWS), ("renovate", ROOT / "renovate.json")],
    ids=lambda value: getattr(value, "name", value),
)
def test_configuration_of_a_service_follows_its_schema(schema: str, file: Path) -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_workflow_with_a_misspelt_key_is_refused_by_the_schema(tmp_path: Path) -> None:
    text = WORKFLOWS[0].read_text(encoding="utf-8")
    (tmp_path / "ci.yml").write_text(text.replace("timeout-minutes", "timeout-minute"), encoding="utf-8")
    with pytest.raises(AssertionError, match="timeout-minute"):
        test_configuration_of_a_service_follows_its_schema("github-workflows", tmp_path / "ci.yml")


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
def test_workflow_calls_make_targets_and_dvc_options_that_exist(file: Path) -> None:
    script = "\n".join(list_scripts(yaml.safe_load(file.read_text(encoding="utf-8"))))
    assert find_make_targets(script)
    assert find_missing_targets(script) == []
    assert find_unknown_dvc_options(script) == []


def test_workflow_check_finds_unknown_targets_and_options() -> None:
    assert find_missing_targets("make && true\nmake tset # comment") == ["&&", "true", "tset"]
    assert find_unknown_dvc_options("dvc pull --run-cache\ndvc pull --no-such\ndvc metrics dif") == [
        "pull --no-such",
        "metrics dif",
    ]


def test_workflow_runs_the_make_targets_of_ci_run() -> None:
    ours = find_make_targets((ROOT / ".ci/run").read_text(encoding="utf-8"))
    theirs = [
        target
        for script in list_scripts({"jobs": {"": WORKFLOW["jobs"]["pipeline"]}})
        for target in find_make_targets(script)
    ]
    assert [target for target in theirs if target != "env"] == ours


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
def test_workflow_can_only_read_and_pins_each_action_to_a_commit(file: Path) -> None:
    workflow = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert "permissions" not in job
        assert job["timeout-minutes"] <= (360 if file.name == "slow.yml" else 120)
        for step in job["steps"]:
            if "uses" in step:
                assert re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", step["uses"])
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False
            # A value of the event in a script would be code: it has to be passed in `env`.
            assert "${{" not in step.get("run", "")


def test_workflow_of_a_pull_request_stops_when_it_is_updated() -> None:
    assert WORKFLOW["concurrency"]["cancel-in-progress"] is True


def test_workflow_and_container_use_the_python_versions_of_pyproject() -> None:
    used = []
    for job in WORKFLOW["jobs"].values():
        for step in job["steps"]:
            if version := step.get("with", {}).get("python-version"):
                matrix = job.get("strategy", {}).get("matrix", {}).get("python-version")
                used += matrix if "matrix" in version else [version]
    assert used == list_versions()
    assert PROJECT["requires-python"] == f">={list_versions()[0]}"
    base = re.search(r"^FROM python:([\d.]+)-slim$", DOCKERFILE, flags=re.MULTILINE)
    assert base is not None and base[1] in list_versions()


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    """A DVC repository of two commits with one parameter and one metric, and .ci/summary."""
    (tmp_path / "dvc.yaml").write_text("params: [params.yaml]\nmetrics: [metrics.json]\n")
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/summary", tmp_path / ".ci/summary")
    run_shell(tmp_path, "git init -q -b main && dvc init -q && git add -A && git commit -q -m first")
    (tmp_path / "params.yaml").write_text("learning_rate: 0.1\n")
    (tmp_path / "metrics.json").write_text('{"loss": 3.5}\n')
    run_shell(tmp_path, "git add -A && git commit -q -m second")
    return tmp_path


def test_ci_summary_shows_the_metrics_and_parameters_that_changed(experiment: Path) -> None:
    (experiment / "params.yaml").write_text("learning_rate: 0.2\n")
    (experiment / "metrics.json").write_text('{"loss": 3.0}\n')
    summary = run_shell(experiment, ".ci/summary", BASE="main")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in summary.splitlines() if "|" in line]
    assert ["metrics.json", "loss", "3.5", "3.0", "-0.5"] in rows
    assert ["params.yaml", "learning_rate", "0.1", "0.2"] in rows


def test_ci_summary_of_an_unchanged_workspace_says_so(experiment: Path) -> None:
    assert run_shell(experiment, ".ci/summary", BASE="HEAD").count("Unchanged.") == 2


@pytest.mark.parametrize("base", ["HEAD^^", "0" * 40], ids=["parent of the first commit", "new branch"])
def test_ci_summary_without_a_base_is_no_error(experiment: Path, base: str) -> None:
    assert run_shell(experiment, ".ci/summary", BASE=base).startswith(f"There is no commit {base} ")


# -- dependency updates ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", sorted(ROOT.glob("requirements*.txt")), ids=lambda file: file.name)
def test_requirements_begin_with_a_command_that_renovate_can_repeat(file: Path) -> None:
    managed = json.loads((ROOT / "renovate.json").read_text(encoding="utf-8"))["pip-compile"]["managerFilePatterns"]
    assert any(re.search(pattern.strip("/"), file.name) for pattern in managed)
    header, command = file.read_text(encoding="utf-8").splitlines()[:2]
    assert header == "# This file was autogenerated by uv via the following command:"
    # What Renovate's manager pip-compile accepts of uv: long options, with `=` before their values.
    flags, valued = ["--universal", "--generate-hashes"], ["python-version", "extra", "constraint", "output-file"]
    known = [*flags, *(rf"--{name}=\S+" for name in valued)]
    assert re.fullmatch(rf"#    uv pip compile( ({'|'.join(known)}))+ pyproject\.toml", command)
    assert f"--output-file={file.name}" in command


def test_requirements_pin_what_pyproject_names() -> None:
    pinned = set(re.findall(r"^([\w.-]+)==", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.MULTILINE))
    named = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]
    names = {match[0] for name in named if (match := re.match(r"[\w.-]+", name))}
    assert names - pinned == set()


# -- the container -----------------------------------------------------------------------------------------------------


def list_instructions(name: str) -> list[str]:
    """Arguments of each instruction `name` of the Dockerfile, in order."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ")
    return re.findall(rf"^{name} (.+)$", text, flags=re.MULTILINE)


def test_container_copies_files_that_exist_and_are_not_ignored() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    for arguments in list_instructions("COPY"):
        *sources, _ = [word for word in arguments.split() if not word.startswith("--")]
        assert [source for source in sources if not (ROOT / source).exists() or source in ignored] == []
    assert ".git" not in ignored  # DVC needs it


def test_container_context_leaves_out_what_git_ignores() -> None:
    ours = set((ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines())
    assert {".venv", ".dvc/cache", ".dvc/config.local", ".dvc/tmp", "reports", "data/raw"} <= ours
    for line in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines():
        name = line.strip("/")
        # Subdirectories of data/ that are in git need not be excluded again.
        if re.fullmatch(r"/[\w.-]+/", line):
            assert name in ours


def test_container_installs_by_hash_and_runs_as_another_user_than_root() -> None:
    assert any(re.search(r"\bmake env$", command) for command in list_instructions("RUN"))
    rule = re.search(r"^\.venv/ready:.*\n((?:\t.*\n)+)", MAKEFILE, flags=re.MULTILINE)
    assert rule is not None and "--require-hashes" in rule[1]
    assert list_instructions("USER") and list_instructions("USER")[-1] not in ("root", "0")
    assert f" {list_instructions('USER')[-1]}" in list_instructions("RUN")[0]  # useradd


def test_devcontainer_uses_the_image_and_its_user_and_the_extensions_of_the_project() -> None:
    file = ROOT / ".devcontainer/devcontainer.json"
    settings = parse_jsonc(file.read_text(encoding="utf-8"))
    assert (file.parent / settings["build"]["dockerfile"]).resolve() == ROOT / "Dockerfile"
    assert (file.parent / settings["build"]["context"]).resolve() == ROOT
    assert settings["remoteUser"] == list_instructions("USER")[-1]
    assert settings["workspaceFolder"] == list_instructions("WORKDIR")[-1]
    assert find_missing_targets(settings["postCreateCommand"]) == []
    recommended = json.loads((ROOT / ".vscode/extensions.json").read_text(encoding="utf-8"))["recommendations"]
    assert settings["customizations"]["vscode"]["extensions"] == recommended


def has_docker() -> bool:
    docker = shutil.which("docker")
    return docker is not None and subprocess.run([docker, "info"], capture_output=True, check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_container_builds_and_checks_the_configuration() -> None:
    if not has_docker():
        pytest.skip("no Docker daemon")
    subprocess.run(["docker", "build", "--tag", "lm-repro-test", str(ROOT)], check=True)
    subprocess.run(["docker", "run", "--rm", "lm-repro-test", "make", "check"], check=True)
