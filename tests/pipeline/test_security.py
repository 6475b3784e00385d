"""Configs, data sets and models never run code, and no secret appears in logs, errors or files."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from data_helpers import (
    CAUSAL_TOKENS,
    REPOSITORY,
    make_questions,
    read_contents,
    serve_files,
    write_bpe,
    write_jsonl,
    write_raw,
)
from dvc_project import edit_yaml, mark_rest_slow, run_command
from hostile import run_stage_for_error
from hub_cases import TOKEN
from mini_hub import MiniHub

from stages.core.artifacts import SPLITS
from stages.core.errors import StageError
from stages.download.hub_data import read_hub, resolve_commit
from stages.download.schema import HubData, mask_credentials
from stages.hub.files import find_weights_files
from stages.tokens.schema import TokenizerSource
from tools.pin_model import pin_directory

SOURCES = sorted(file for name in ("stages", "tools", "benchmarks") for file in (REPOSITORY / name).rglob("*.py"))

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def list_calls(file: Path) -> Iterator[tuple[str, ast.Call]]:
    """Yield the dotted name and the node of each call in a source file."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def list_imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


# -- no code from data, configs or models ------------------------------------------------------------------------------

UNPICKLING_MODULES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
ARCHIVE_MODULES = {"tarfile", "zipfile", "py7zr", "rarfile"}
EXECUTING_CALLS = {"eval", "exec", "compile", "os.system", "os.popen"}
# This module evaluates annotations from the source of transformers, restricted to names of types.
EXCEPTIONS = {("trainer_arguments.py", "eval"), ("trainer_arguments.py", "compile")}


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_security_source_never_unpickles_unpacks_or_runs_text(file: Path) -> None:
    names = {name.partition(".")[0] for name in list_imports(file)}
    assert names.isdisjoint(UNPICKLING_MODULES | ARCHIVE_MODULES)
    assert "shutil.unpack_archive" not in list_imports(file)
    for name, call in list_calls(file):
        assert name not in EXECUTING_CALLS or (file.name, name) in EXCEPTIONS
        assert not name.endswith(("unpack_archive", "extractall"))
        arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert arguments.get("shell", "False") == "False"
        assert arguments.get("allow_pickle", "False") == "False"
        if name in ("torch.load", "yaml.load", "yaml.unsafe_load"):
            assert "weights_only" in arguments or "SafeLoader" in ast.unparse(call)


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_security_source_never_trusts_remote_code_or_instantiates_with_hydra(file: Path) -> None:
    assert not any(name.startswith(("hydra.utils", "hydra._internal.instantiate")) for name in list_imports(file))
    for name, call in list_calls(file):
        assert name.rpartition(".")[2] not in ("instantiate", "get_class", "get_method", "get_object")
        arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert arguments.get("trust_remote_code", "False") == "False"
        # PeftModel is exempt: it loads adapters for an existing model; other tests check that they are safetensors.
        if file.parent.name == "stages" and name.endswith(".from_pretrained") and not name.startswith("PeftModel."):
            assert arguments.get("trust_remote_code") == "False"
            if "Config" not in name and "Tokenizer" not in name:
                assert arguments.get("use_safetensors") == "True"


# Values and files that once ran code, or sent or wrote something. Each has its file, dotted key, value or content, the
# stage that uses it, and a part of the expected error.
ATTACKS = {
    "command in a number": ("params.yaml", "seed", "42; touch TOUCHED", "baseline@causal", "seed="),
    "command in quotes": ("params.yaml", "block_size", "'; touch TOUCHED; '", "group_texts@mlm", "block_size="),
    "overrides in a number": (
        *("params.yaml", "tasks__causal__learning_rate", "0.002 trainer.weight_decay=0.5", "train@causal"),
        "learning_rate=",
    ),
    "command in a name": ("params.yaml", "hardware", "cpu$(touch TOUCHED)", "evaluate@mlm", "a name has letters"),
    "path in a name": ("params.yaml", "data__name", "../../elsewhere/e", "download", "a name has letters"),
    "variable in a path": (
        *("params.yaml", "data__path", "${oc.env:HF_TOKEN}.jsonl", "download"),
        "interpolations are not resolved",
    ),
    "variable in a text that is published": (
        *("conf/task/causal.yaml", "samples__prompts", ["${oc.env:HF_TOKEN}"], "evaluate@causal"),
        "interpolations are not resolved",
    ),
    "callback": (
        *("conf/task/mlm.yaml", "hydra__callbacks", {"x": {"_target_": "os.system"}}, "train@mlm"),
        "Hydra's own settings cannot be changed",
    ),
    "log file": (
        *("conf/hardware/cpu.yaml", "hydra__job_logging__handlers"),
        *({"f": {"class": "logging.FileHandler", "filename": "README.md", "mode": "w"}}, "baseline@mlm"),
        "Hydra's own settings cannot be changed",
    ),
    "target": ("conf/model/tiny-gpt2.yaml", "config__x", {"_target_": "os.system"}, "train@causal", "_target_"),
    "tag": (
        "conf/data/sample.yaml",
        "",
        "source: !!python/object/apply:os.system ['touch TOUCHED']",
        "download",
        "tags",
    ),
    "aliases": ("conf/adapter/none.yaml", "", "adapter: &a {x: *a}", "train@causal", "aliases"),
    "package": (
        *("conf/framework/trainer.yaml", "", "# @package hydra.job_logging\nformatters: {x: {(): os.system}}"),
        *("train@causal", "it should have no `# @package`"),
    ),
}


@pytest.mark.parametrize("attack", mark_rest_slow(ATTACKS, num_fast=2))
def test_security_attack_by_a_value_or_a_file_is_refused_by_check_and_stage(clean: Path, attack: str) -> None:
    file, key, value, stage, message = ATTACKS[attack]
    if key:
        set_yaml_value(clean / file, key, value)
    else:
        header = "# @package _global_\n" if "adapter" in file else ""
        (clean / file).write_text(header + str(value) + "\n", encoding="utf-8")
    before = read_contents(clean)
    checked = run_command(clean, "env", f"HF_TOKEN={TOKEN}", "python", "-m", "tools.check", check=False)
    assert message in checked and "Traceback" not in checked
    name = stage.partition("@")[0]
    ran = run_command(
        clean, "env", f"HF_TOKEN={TOKEN}", f"DVC_STAGE={stage}", "python", "-m", f"stages.{name}", check=False
    )
    assert ran.startswith(f"{name}: error: ") and message in ran and "Traceback" not in ran
    if "a number" in attack:
        reproduced = run_command(clean, "dvc", "repro", "--single-item", "--force", stage, check=False)
        assert f"{name}: error: " in reproduced and message in reproduced
    assert TOKEN not in checked + ran
    assert not (clean / "TOUCHED").exists()
    assert (clean / "README.md").read_bytes() == before["README.md"]


def set_yaml_value(file: Path, key: str, value: object) -> None:
    """Set a dotted key (a__b for a.b) of a YAML file and create missing sections."""
    text = file.read_text(encoding="utf-8")
    values = yaml.safe_load(text)
    *sections, last = key.split("__")
    node = values
    for section in sections:
        node = node.setdefault(section, {})
    node[last] = value
    header = "# @package _global_\n" if text.startswith("# @package _global_") else ""
    file.write_text(header + yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def test_security_unselected_file_stops_no_stage(clean: Path) -> None:
    for group in ("data", "model", "task", "hardware"):
        (clean / f"conf/{group}/own.yaml").write_text("a: &a [*a]\n", encoding="utf-8")
        (clean / f"conf/{group}/date.yaml").write_text("a: 2020-99-99\n", encoding="utf-8")
    assert "is in order" in run_command(clean, "python", "-m", "tools.check")


def test_security_name_of_a_task_that_is_a_command_is_refused_and_not_run(clean: Path) -> None:
    params = yaml.safe_load((clean / "params.yaml").read_text(encoding="utf-8"))
    params["tasks"]["a;touch TOUCHED"] = dict(params["tasks"]["causal"])
    (clean / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    assert "a;touch TOUCHED" in run_command(clean, "python", "-m", "tools.check", check=False)
    run_command(clean, "dvc", "repro", check=False)
    assert not (clean / "TOUCHED").exists()


@pytest.mark.parametrize(
    "name", ["it's mine.jsonl", 'a "b" $(touch TOUCHED).jsonl', "a;touch TOUCHED;.jsonl", "a\\b.jsonl"]
)
def test_security_file_with_shell_characters_in_its_name_is_read_and_nothing_is_run(clean: Path, name: str) -> None:
    write_jsonl(clean / name, make_questions(60))
    edit_yaml(clean / "params.yaml", data__name="files", data__path=name)
    edit_yaml(clean / "conf/data/files.yaml", count_near_duplicates=False)
    assert "60 records -> data/raw" in run_command(clean, "dvc", "repro", "download")
    assert not (clean / "TOUCHED").exists()


def test_security_url_with_shell_characters_is_read_and_nothing_is_run(clean: Path) -> None:
    write_jsonl(clean / "served/a.jsonl", make_questions(60))
    edit_yaml(clean / "conf/data/files.yaml", count_near_duplicates=False)
    with serve_files(clean / "served") as url:
        edit_yaml(clean / "params.yaml", data__name="files", data__path=f"{url}/a.jsonl?x=';touch TOUCHED;'")
        ran = run_command(clean, "env", "NO_PROXY=127.0.0.1", "python", "-m", "stages.download", "out=elsewhere")
        reproduced = run_command(clean, "env", "NO_PROXY=127.0.0.1", "dvc", "repro", "download", check=False)
    assert "60 records -> elsewhere" in ran
    assert "Running stage 'download'" in reproduced
    assert not (clean / "TOUCHED").exists()


def test_security_value_in_a_command_of_dvc_yaml_is_refused_by_check(clean: Path) -> None:
    text = (clean / "dvc.yaml").read_text(encoding="utf-8")
    (clean / "dvc.yaml").write_text(text.replace("python -m stages.download", "python -m stages.download seed=${seed}"))
    checked = run_command(clean, "python", "-m", "tools.check", check=False)
    assert "dvc.yaml: download.cmd=python -m stages.download seed=${seed}: DVC passes it to a shell" in checked


def test_security_data_set_with_a_script_is_refused_and_the_script_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set/set.py").write_text(f"open({str(tmp_path / 'TOUCHED')!r}, 'w')\n")
    hub = HubData(id=str(tmp_path / "set"), config=None, revision="main", splits=["train"])
    with pytest.raises(StageError, match=f"the data set {tmp_path}/set .* could not be read"):
        list(read_hub(hub, "main", whole=False))
    assert not (tmp_path / "TOUCHED").exists()


def test_security_hub_data_set_is_never_read_from_a_directory_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "owner/name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StageError, match=r"hub\.id=owner/name is a local path: set data\.name=files"):
        resolve_commit(HubData(id="owner/name", config=None, revision="main", splits=["train"]))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_security_pickled_weights_are_refused_with_the_way_to_convert_them(tmp_path: Path, name: str) -> None:
    write_bpe(tmp_path, CAUSAL_TOKENS)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_positions": 64}')
    torch.save({}, tmp_path / name)
    words = rf"only {tmp_path}/{re.escape(name)}: pickled weights can run code .* convert them with .*save_pretrained"
    with pytest.raises(StageError, match=words):
        find_weights_files("model", TokenizerSource(path=str(tmp_path), files={"config.json": "sha256:0"}))
    with pytest.raises(ValueError, match=words):
        pin_directory(tmp_path, None, False, None)


@pytest.mark.parametrize(
    ("line", "refused"), [("key = 'AKIAIOSFODNN7EXAMPLQ'", 1), ("COMMIT = '" + "0a" * 20 + "'", 0)]
)
def test_security_secret_in_a_commit_is_refused(tmp_path: Path, line: str, refused: int) -> None:
    hooks = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    scanner = next(hook for hook in hooks if hook["id"] == "detect-secrets")
    program = Path(sys.executable).parent / Path(scanner["entry"]).name
    (tmp_path / "module.py").write_text(f"{line}\n")
    assert subprocess.run([program, *scanner["args"], "module.py"], cwd=tmp_path, check=False).returncode == refused


# -- no secret anywhere ------------------------------------------------------------------------------------------------


def build_hub_environment(cache: Path, url: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.upper().startswith(("HF_", "HUGGING"))}
    own = {"HF_HOME": str(cache), "HF_ENDPOINT": url, "NO_PROXY": "127.0.0.1", "HF_TOKEN": TOKEN, "LM_REPRO_DEBUG": "0"}
    return {**kept, **own}


def run_stage_process(stage: str, environment: dict[str, str], *overrides: str) -> str:
    command = [sys.executable, "-m", f"stages.{stage}", *overrides]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False, timeout=100
    )
    return f"exit {done.returncode}: {done.stdout}{done.stderr}"


def find_files_with_token(directory: Path) -> list[str]:
    """Return the files in `directory` that contain the token."""
    files = (file for file in directory.rglob("*") if file.is_file())
    return [str(file) for file in files if TOKEN.encode() in file.read_bytes()]


@pytest.mark.parametrize("refusal", [None, 401, 403])
def test_security_token_sent_to_the_hub_is_in_no_log_error_or_file(tmp_path: Path, refusal: int | None) -> None:
    source = write_bpe(tmp_path / "source", CAUSAL_TOKENS)
    files = {file.name: file.read_bytes() for file in source.iterdir()}
    raw = write_raw(tmp_path / "raw", {name: ["Rain falls."] for name in SPLITS})
    hub = MiniHub({"o/n": {COMMIT: files}}, ("tokenizer.json", "api") if refusal else (), refusal or 403)
    with hub.serve() as url:
        pinned = ["+model.tokenizer.path=o/n", f"+model.tokenizer.revision='{COMMIT}'", "~model.tokenizer.train"]
        choices = ["task=causal", "data=files", "model=tiny-gpt2", *pinned]
        ran = run_stage_process(
            "tokenize", build_hub_environment(tmp_path / "hf", url), *choices, f"raw={raw}", f"out={tmp_path}/tokens"
        )
    assert ran.startswith("exit 0" if refusal is None else "exit 1"), ran
    assert f"Bearer {TOKEN}" in hub.authorizations  # the token was sent, so it could have leaked
    assert TOKEN not in ran
    assert find_files_with_token(tmp_path) == []
    assert (tmp_path / "tokens").exists() == (refusal is None)


def test_security_token_is_not_in_the_error_of_download_for_a_refused_data_set(tmp_path: Path) -> None:
    hub = MiniHub({}, ("api",), 401)
    with hub.serve() as url:
        ran = run_stage_process(
            "download", build_hub_environment(tmp_path / "hf", url), "data=hub", "data.path=-", f"out={tmp_path}/raw"
        )
    assert ran.startswith("exit 1"), ran
    assert "the data set dany0407/eli5_category cannot be read at revision main: access is refused (HTTP 401)" in ran
    assert f"Bearer {TOKEN}" in hub.authorizations
    assert TOKEN not in ran
    assert find_files_with_token(tmp_path) == []


def test_security_token_is_not_sent_to_other_servers_and_is_in_no_file_of_download(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "served/a.jsonl", make_questions(60))
    with serve_files(tmp_path / "served") as url:
        path = [f"data.path={url}/a.jsonl", "data.count_near_duplicates=false"]
        ran = run_stage_process(
            "download", build_hub_environment(tmp_path / "hf", url), "data=files", *path, f"out={tmp_path}/raw"
        )
    assert ran.startswith("exit 0"), ran
    assert TOKEN not in ran
    assert find_files_with_token(tmp_path) == []


def test_security_token_is_in_no_model_report_or_metrics(
    run_toy: Callable[..., None],
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for stage in ("baseline", "train", "evaluate"):
        run_toy(stage, "causal", tmp_path)
    assert {"baseline", "baseline.json", "evaluation", "metrics.json", "model", "report", "samples.md"} == {
        p.name for p in tmp_path.iterdir()
    }
    assert find_files_with_token(tmp_path) == []
    assert TOKEN not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("https://me:MARKED@host/a.jsonl", "https://me:***@host/a.jsonl"),
        ("ftp://me:MARKED@host:21/a.jsonl", "ftp://me:***@host:21/a.jsonl"),
        ("simplecache::https://me:MARKED@host/a.jsonl", "simplecache::https://me:***@host/a.jsonl"),
        ("https://host/a.jsonl?x=1&X-Amz-Signature=MARKED", "https://host/a.jsonl?x=1&X-Amz-Signature=***"),
        ("https://host/a.jsonl?token=MARKED&x=1", "https://host/a.jsonl?token=***&x=1"),
    ],
)
def test_security_credentials_in_a_path_are_refused_and_not_shown(tmp_path: Path, path: str, shown: str) -> None:
    error = run_stage_for_error("download", "data=files", f"data.path='{path}'", f"out={tmp_path}/raw")
    assert error.startswith(f"data.path={shown}: credentials in a path would be written to dvc.lock")
    assert "FSSPEC_HTTPS" in error
    assert "MARKED" not in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "path",
    ["/data/a:b@c.jsonl", "ssh://me@host/a.jsonl", "https://host/a@b:c.jsonl?x=1", "s3://bucket/a"],
)
def test_security_path_without_credentials_is_not_masked(path: str) -> None:
    assert mask_credentials(path) is None


def test_security_credentials_given_to_fsspec_are_used_and_not_shown(tmp_path: Path) -> None:
    """The remedy that the error recommends works and leaves no trace."""
    hub = MiniHub({"o/n": {COMMIT: {"a.jsonl": write_jsonl(tmp_path / "a.jsonl", make_questions(60)).read_bytes()}}})
    with hub.serve() as url:
        own = build_hub_environment(tmp_path / "hf", url)
        del own["HF_TOKEN"]
        own["FSSPEC_HTTP"] = f'{{"client_kwargs": {{"headers": {{"Authorization": "Bearer {TOKEN}"}}}}}}'
        path = [f"data.path={url}/o/n/resolve/{COMMIT}/a.jsonl", "data.count_near_duplicates=false"]
        ran = run_stage_process("download", own, "data=files", *path, f"out={tmp_path}/raw")
    assert ran.startswith("exit 0"), ran
    assert f"Bearer {TOKEN}" in hub.authorizations
    assert TOKEN not in ran
    assert find_files_with_token(tmp_path) == []
