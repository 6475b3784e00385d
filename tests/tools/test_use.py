"""Tests of tools.use: composition of every preset, output, refusals, and YAML edits that keep comments."""

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc_project import ROOT, commit_working_tree, run_command
from hypothesis import given, settings
from hypothesis import strategies as st

import stages.core.compose
import stages.core.config
from stages.core.compose import compose_config, load_config
from stages.core.config import find_value, read_yaml
from stages.core.errors import StageError
from tools import use
from tools.check import get_config_class
from tools.yaml_edit import edit_yaml
from tools.yaml_edit import load_yaml as load_text

PRESETS = sorted(file.stem for file in (ROOT / "presets").glob("*.yaml"))
STAGES = ("tokenize", "group_texts", "baseline", "train", "evaluate")


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Current directory with a copy of the configuration, without git and DVC."""
    for name in ("conf", "presets"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    for module in (stages.core.config, stages.core.compose, use):
        monkeypatch.setattr(module, "CONF", tmp_path / "conf")
    monkeypatch.setattr(stages.core.compose, "PARAMS", tmp_path / "params.yaml")
    monkeypatch.setattr(use, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tool(workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Function that runs the command without the check and returns its output; SystemExit on a refusal."""

    def write(before: dict[str, str], after: dict[str, str], needs_path: bool) -> None:
        for file, text in after.items():
            Path(file).write_text(text, encoding="utf-8")

    def run_tool(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["use", *arguments])
        monkeypatch.setattr(use, "write_checked", write)
        use.main()
        return capsys.readouterr().out

    return run_tool


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Git repository with the working tree as its only commit."""
    directory = tmp_path_factory.mktemp("clone")
    commit_working_tree(directory)
    return directory


@pytest.fixture
def committed(clone: Path) -> Path:
    """The clone without any uncommitted changes."""
    run_command(clone, "git", "reset", "-q", "--hard")
    run_command(clone, "git", "clean", "-qfd")
    return clone


def run_refused(tool: Callable[..., str], *arguments: str) -> str:
    """Run the command, which must fail, and return its error."""
    with pytest.raises(SystemExit) as exit_:
        tool(*arguments)
    return str(exit_.value)


def write_preset_values(name: str) -> None:
    """Write the values of a preset without checking for uncommitted changes."""
    for file, text in use.edit_files(use.read_preset(name))[1].items():
        Path(file).write_text(text, encoding="utf-8")


def write_preset(text: str) -> None:
    Path("presets/mine.yaml").write_text(text, encoding="utf-8")


def load_stage_config(stage: str, task: str | None) -> Any:
    return load_config(get_config_class(stage), compose_config(stage, item=task))


def list_preset_tasks(name: str) -> list[str]:
    return list(use.read_preset(name).files["params.yaml"]["tasks"])


# -- the presets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_use_preset_composes_in_every_stage(workplace: Path, name: str) -> None:
    write_preset_values(name)
    tasks = list(read_yaml(workplace / "params.yaml")["tasks"])
    assert isinstance(load_stage_config("download", None), get_config_class("download"))
    for task in tasks:
        for stage in STAGES:
            assert isinstance(load_stage_config(stage, task), get_config_class(stage))


@pytest.mark.parametrize("name", PRESETS)
def test_use_preset_after_any_other_gives_the_same_configuration(workplace: Path, name: str) -> None:
    def configs() -> list[Any]:
        stages_of_tasks = [(stage, task) for stage in ("tokenize", "train") for task in list_preset_tasks(name)]
        return [compose_config(stage, item=task).values for stage, task in [("download", None), *stages_of_tasks]]

    start = {file: file.read_text() for file in [workplace / "params.yaml", *(workplace / "conf").rglob("*.yaml")]}
    write_preset_values(name)
    expected = configs()
    for other in PRESETS:
        for file, text in start.items():
            file.write_text(text)
        write_preset_values(other)
        write_preset_values(name)
        assert configs() == expected, other


def test_use_modernbert_sets_its_own_masking_probabilities(workplace: Path) -> None:
    write_preset_values("modernbert")
    objective = load_stage_config("train", "mlm").objective
    assert (objective.mlm_probability, objective.mask_replace_prob, objective.random_replace_prob) == (0.3, 0.8, 0.1)
    assert read_yaml(workplace / "params.yaml")["tasks"]["mlm"]["model"] == "modernbert"
    write_preset_values("guide")
    objective = load_stage_config("train", "mlm").objective
    assert (objective.mlm_probability, objective.mask_replace_prob, objective.random_replace_prob) == (0.15, 0.8, 0.1)


def test_use_guide_sets_the_values_of_the_guide(workplace: Path) -> None:
    write_preset_values("guide")
    params = read_yaml(workplace / "params.yaml")
    assert (params["data"]["name"], params["block_size"]) == ("eli5_category", 128)
    expected = {
        "start": "none",
        "sources": None,
        "adapter": "none",
        "learning_rate": 2e-5,
        "num_train_epochs": 3,
        "batch_size": 8,
    }
    assert params["tasks"]["causal"] == {"model": "distilgpt2", **expected}
    assert params["tasks"]["mlm"] == {"model": "distilroberta", **expected}


def test_use_support_splits_by_customer(workplace: Path) -> None:
    write_preset_values("support")
    data = load_stage_config("download", None).data
    assert (data.split.key, data.columns.texts) == ("customer", ["body", "reply"])


@pytest.mark.parametrize("name", PRESETS)
def test_use_preset_comment_states_audience_and_needs(name: str) -> None:
    head = "\n".join(use.read_preset(name).head)
    assert re.search(r"^For whom: .*^Needs: ", head, flags=re.MULTILINE | re.DOTALL)


# -- output and written files ------------------------------------------------------------------------------------------


def test_use_without_a_name_lists_every_preset(tool: Callable[..., str]) -> None:
    lines = tool().splitlines()
    assert [line.split()[0] for line in lines[: len(PRESETS)]] == PRESETS


def test_use_without_a_name_lists_invalid_presets_too(tool: Callable[..., str]) -> None:
    write_preset("# x\nblok_size: 1\n")
    lines = tool().splitlines()
    assert any(line.startswith("mine ") and "blok_size is not a key" in line for line in lines)
    assert all(any(line.startswith(name) for line in lines) for name in PRESETS)


def test_use_prints_the_diff_and_keeps_comments(tool: Callable[..., str]) -> None:
    before = Path("params.yaml").read_text()
    output = tool("modernbert", "--force")
    after = Path("params.yaml").read_text()
    assert re.findall("#.*", after) == re.findall("#.*", before)
    assert "-block_size: 128 " in output and "+block_size: 512 " in output
    assert "+  mlm_probability: 0.3             # share of the text tokens to predict" in output
    assert "dvc exp run -n modernbert evaluate@mlm" in output
    changed = [line for line, old in zip(after.splitlines(), before.splitlines(), strict=True) if line != old]
    assert len(changed) == 6


def test_use_a_second_time_changes_nothing(tool: Callable[..., str]) -> None:
    tool("modernbert", "--force")
    files = [Path("params.yaml"), Path("conf/task/mlm.yaml")]
    before = [file.read_bytes() for file in files]
    assert "params.yaml and conf/task/mlm.yaml: nothing changes" in tool("modernbert")
    assert [file.read_bytes() for file in files] == before


def test_use_dry_run_writes_nothing(tool: Callable[..., str]) -> None:
    before = Path("params.yaml").read_bytes()
    assert "+  name: eli5_category" in tool("guide", "--dry-run")
    assert Path("params.yaml").read_bytes() == before


def test_use_path_sets_the_users_own_file(tool: Callable[..., str]) -> None:
    tool("novel", "--path", "my book: #1.txt", "--force")
    assert read_yaml(Path("params.yaml").resolve())["data"] == {"name": "novel", "path": "my book: #1.txt"}
    assert "the preset guide reads no file of your own" in run_refused(tool, "guide", "--path", "x")
    assert "interpolations are not resolved" in run_refused(tool, "novel", "--path", "${oc.env:HOME}")


def test_use_section_that_was_removed_is_added_again(tool: Callable[..., str]) -> None:
    params = Path("params.yaml").read_text()
    Path("params.yaml").write_text(params[: params.index("  mlm:")])
    tool("guide", "--force")
    assert load_stage_config("train", "mlm").learning_rate == 2e-5


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["giude", "../presets/guide", "guide.yaml", "", "/etc/passwd", "\x1b[31m"])
def test_use_unknown_name_is_refused_with_a_list_of_presets(tool: Callable[..., str], name: str) -> None:
    output = run_refused(tool, name)
    assert "is not a preset" in output and "\x1b" not in output
    assert all(other in output for other in PRESETS)


def test_use_misspelled_name_gets_a_suggestion(tool: Callable[..., str]) -> None:
    assert "did you mean guide?" in run_refused(tool, "giude")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# x\nblok_size: 1\n", "presets/mine.yaml: blok_size is not a key of params.yaml; did you mean block_size?"),
        ("# x\ntasks: {mlm: {modle: x}}\n", "tasks.mlm.modle is not a key of params.yaml"),
        ("# x\ntasks: {../x: {model: x}}\n", "tasks.../x.model is not a key of params.yaml"),
        ("# x\nconf/task/mlm.yaml: {objectiv: 1}\n", "presets/mine.yaml: objectiv is not a key of conf/task/mlm.yaml"),
        ("# x\nconf/task/mml.yaml: {objective: 1}\n", "conf/task/mml.yaml is not a file"),
        ("# x\nconf/task/../../x.yaml: {a: 1}\n", "conf/task/../../x.yaml is not a file"),
        ("# x\nstages/x.yaml: {a: 1}\n", "stages/x.yaml is not a file"),
        ("# x\nparams.yaml: {seed: 1}\nseed: 2\n", "presets/mine.yaml: params.yaml.seed is not a key of params.yaml"),
        ("# x\ndata: {path: '${oc.env:HOME}'}\n", "interpolations are not resolved"),
        ("# x\nseed: &a 1\nblock_size: *a\n", "presets/mine.yaml:3: aliases"),
        ("# x\nseed: !!python/object:os.system 1\n", "presets/mine.yaml:2"),
        ("# x\n- seed\n", "presets/mine.yaml: it should be a mapping of keys to values"),
        ("# x\n", "presets/mine.yaml: it sets nothing"),
        ("seed: 1\n", "presets/mine.yaml: its first line should be a comment"),
        ("# x\nseed: [\n", "presets/mine.yaml: "),
    ],
)  # fmt: skip
def test_use_invalid_preset_is_refused_by_file_and_key(tool: Callable[..., str], text: str, message: str) -> None:
    write_preset(text)
    before = Path("params.yaml").read_bytes()
    assert message in run_refused(tool, "mine", "--force")
    assert Path("params.yaml").read_bytes() == before


def test_use_without_git_says_how_to_proceed(tool: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(Path.cwd().parent))
    assert "git cannot say whether edits of params.yaml and conf/task/mlm.yaml would be lost" in run_refused(
        tool, "guide"
    )
    monkeypatch.setenv("PATH", "/nowhere")
    assert "use --force" in run_refused(tool, "guide")


@pytest.mark.slow
def test_use_with_uncommitted_edits_is_refused_unless_forced(committed: Path) -> None:
    params = committed / "params.yaml"
    edited = params.read_text().replace("seed: 42", "seed: 43")
    params.write_text(edited)
    (committed / "presets/mine.yaml").write_text("# x\nblock_size: 64\n")
    output = run_command(committed, sys.executable, "-m", "tools.use", "mine", check=False)
    assert "uncommitted edits of params.yaml would be lost" in output and "git checkout HEAD -- params.yaml" in output
    assert params.read_text() == edited
    output = run_command(committed, sys.executable, "-m", "tools.use", "mine", "--force")
    assert "is in order" in output and "Wrote params.yaml." in output
    assert yaml.safe_load(params.read_text())["seed"] == 43


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# x\ntasks: {causal: {model: ../../secret}}\n", "a name has letters"),
        ("# x\ndata: {name: novel, path: nowhere.txt}\n", "Set your own file with --path FILE."),
    ],
)
def test_use_result_that_fails_the_check_is_reverted(committed: Path, text: str, message: str) -> None:
    (committed / "presets/mine.yaml").write_text(text)
    output = run_command(committed, sys.executable, "-m", "tools.use", "mine", check=False)
    assert message in output and "nothing was changed" in output and "Traceback" not in output
    assert run_command(committed, "git", "status", "--porcelain", "params.yaml", "conf") == ""


@pytest.mark.slow
def test_use_own_text_passes_the_check(committed: Path) -> None:
    (committed / "book.txt").write_text("One.\n\nTwo.\n")
    assert "is in order" in run_command(committed, sys.executable, "-m", "tools.use", "novel", "--path", "book.txt")


# -- editing YAML ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "values", "expected"),
    [
        ("a: 1   # one\n", {"a": 22}, "a: 22  # one\n"),
        ("a: 1 # one\n", {"a": 22}, "a: 22 # one\n"),
        ("a:\n", {"a": 1}, "a: 1\n"),
        ("a: # none\nb: 2\n", {"a": 1}, "a: 1 # none\nb: 2\n"),
        ("a: 1", {"b": {"c": 2}}, "a: 1\nb:\n  c: 2\n"),
        ("a: {}  # none\n", {"a": {"b": 1}}, "a: {b: 1} # none\n"),
        ("a: {b: 1, c: 2}\n", {"a": {"b": 3}}, "a: {b: 3, c: 2}\n"),
        ("a:\n    b: 1\n\n# end\nc: 2\n", {"a": {"d": "x: y"}}, 'a:\n    b: 1\n    d: "x: y"\n\n# end\nc: 2\n'),
        ("a: |\n  text\n  more\nb: 1\n", {"a": "x"}, "a: x\nb: 1\n"),
        ("a:\n- 1\n- 2 # two\nb: 1\n", {"a": [3]}, "a: [3] # two\nb: 1\n"),
        ("a:\n  b: 1\n  c: 2\nd: 1\n", {"a": {}}, "a: {}\nd: 1\n"),
        ("a: 1\r\nb: 2\r\n", {"b": 3}, "a: 1\r\nb: 3\r\n"),
        ("a: 1\n", {"a": 1.0}, "a: 1.0\n"),
        ("a: 0.1\n", {"a": 2e-05}, "a: 0.00002\n"),
        ("a: 'x' # it's\n", {"a": None}, "a: null # it's\n"),
        ("a: é 🙂 # x\n", {"a": "yes"}, 'a: "yes" # x\n'),
    ],
)  # fmt: skip
def test_edit_yaml_changes_only_the_value(text: str, values: dict[str, Any], expected: str) -> None:
    assert edit_yaml(text, values, "x").replace("  #", " #") == expected.replace("  #", " #")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=8).filter(lambda text: "$" not in text),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abcd"), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from("abcd"), VALUES, max_size=4))
def test_edit_yaml_sets_any_value_or_raises(values: dict[str, Any]) -> None:
    text = "# head\na: 1     # one\nb:\n  c: [1]\n  d:\n    a: null\n# end\n"
    try:
        edited = edit_yaml(text, values, "x")
    except StageError:
        return
    assert edited.startswith("# head\n") and "# end\n" in edited
    for key, value in values.items():
        if not isinstance(value, dict):
            assert find_value(load_text(edited), key) == value


def test_edit_yaml_in_flow_style_is_refused() -> None:
    with pytest.raises(StageError, match="set a by hand"):
        edit_yaml("{a: 1}\n", {"a": 2}, "x")
