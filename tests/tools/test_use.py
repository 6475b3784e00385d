"""use: presets that compose in every stage, what is written, shown and refused, and YAML edits that keep comments."""

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc_project import ROOT, commit_working_tree, run
from hypothesis import given, settings
from hypothesis import strategies as st

import stages.core.compose
import stages.core.config
from stages.core.compose import compose, load
from stages.core.config import find, read_yaml
from stages.core.errors import StageError
from tools import use
from tools.check import schema_of
from tools.yaml_edit import edit_yaml
from tools.yaml_edit import load as load_text

PRESETS = sorted(file.stem for file in (ROOT / "presets").glob("*.yaml"))
STAGES = ("tokenize", "group_texts", "baseline", "train", "evaluate")


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the configuration, without git and DVC, as the current directory."""
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
    """`tool(*arguments)`: what the command prints, without its check; `SystemExit` where it refuses."""

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
    """A copy of the working tree as a commit."""
    directory = tmp_path_factory.mktemp("clone")
    commit_working_tree(directory)
    return directory


@pytest.fixture
def committed(clone: Path) -> Path:
    """The clone as committed."""
    run(clone, "git", "reset", "-q", "--hard")
    run(clone, "git", "clean", "-qfd")
    return clone


def refused(tool: Callable[..., str], *arguments: str) -> str:
    """The words of the refusal."""
    with pytest.raises(SystemExit) as exit_:
        tool(*arguments)
    return str(exit_.value)


def apply(name: str) -> None:
    """Write the values of a preset, without asking git."""
    for file, text in use.edited_files(use.read_preset(name))[1].items():
        Path(file).write_text(text, encoding="utf-8")


def preset(text: str) -> None:
    Path("presets/mine.yaml").write_text(text, encoding="utf-8")


def config(stage: str, task: str | None) -> Any:
    return load(schema_of(stage), compose(stage, item=task))


def tasks_of(name: str) -> list[str]:
    return list(use.read_preset(name).files["params.yaml"]["tasks"])


# -- the presets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_use_preset_composes_in_every_stage(workplace: Path, name: str) -> None:
    apply(name)
    tasks = list(read_yaml(workplace / "params.yaml")["tasks"])
    assert isinstance(config("download", None), schema_of("download"))
    for task in tasks:
        for stage in STAGES:
            assert isinstance(config(stage, task), schema_of(stage))


@pytest.mark.parametrize("name", PRESETS)
def test_use_preset_gives_the_same_configuration_after_any_other(workplace: Path, name: str) -> None:
    def configs() -> list[Any]:
        each = [(stage, task) for stage in ("tokenize", "train") for task in tasks_of(name)]
        return [compose(stage, item=task).values for stage, task in [("download", None), *each]]

    start = {file: file.read_text() for file in [workplace / "params.yaml", *(workplace / "conf").rglob("*.yaml")]}
    apply(name)
    alone = configs()
    for other in PRESETS:
        for file, text in start.items():
            file.write_text(text)
        apply(other)
        apply(name)
        assert configs() == alone, other


def test_use_modernbert_masks_the_share_of_its_own_training(workplace: Path) -> None:
    apply("modernbert")
    objective = config("train", "mlm").objective
    assert (objective.mlm_probability, objective.mask_replace_prob, objective.random_replace_prob) == (0.3, 0.8, 0.1)
    assert read_yaml(workplace / "params.yaml")["tasks"]["mlm"]["model"] == "modernbert"
    apply("guide")
    objective = config("train", "mlm").objective
    assert (objective.mlm_probability, objective.mask_replace_prob, objective.random_replace_prob) == (0.15, 0.8, 0.1)


def test_use_guide_is_what_the_guide_does(workplace: Path) -> None:
    apply("guide")
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


def test_use_support_keeps_the_tickets_of_a_customer_together(workplace: Path) -> None:
    apply("support")
    data = config("download", None).data
    assert (data.split.key, data.columns.texts) == ("customer", ["body", "reply"])


@pytest.mark.parametrize("name", PRESETS)
def test_use_preset_says_whom_it_is_for_and_what_it_needs(name: str) -> None:
    head = "\n".join(use.read_preset(name).head)
    assert re.search(r"^For whom: .*^Needs: ", head, flags=re.MULTILINE | re.DOTALL)


# -- what it prints and writes -----------------------------------------------------------------------------------------


def test_use_without_a_name_lists_every_preset(tool: Callable[..., str]) -> None:
    lines = tool().splitlines()
    assert [line.split()[0] for line in lines[: len(PRESETS)]] == PRESETS


def test_use_lists_a_wrong_preset_with_the_others(tool: Callable[..., str]) -> None:
    preset("# x\nblok_size: 1\n")
    lines = tool().splitlines()
    assert any(line.startswith("mine ") and "blok_size is no key" in line for line in lines)
    assert all(any(line.startswith(name) for line in lines) for name in PRESETS)


def test_use_shows_the_difference_and_keeps_comments(tool: Callable[..., str]) -> None:
    before = Path("params.yaml").read_text()
    said = tool("modernbert", "--force")
    after = Path("params.yaml").read_text()
    assert re.findall("#.*", after) == re.findall("#.*", before)
    assert "-block_size: 128 " in said and "+block_size: 512 " in said
    assert "+  mlm_probability: 0.3             # share of the text tokens to predict" in said
    assert "dvc exp run -n modernbert evaluate@mlm" in said
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


def test_use_path_is_the_users_own_file(tool: Callable[..., str]) -> None:
    tool("novel", "--path", "my book: #1.txt", "--force")
    assert read_yaml(Path("params.yaml").resolve())["data"] == {"name": "novel", "path": "my book: #1.txt"}
    assert "the preset guide reads no file of your own" in refused(tool, "guide", "--path", "x")
    assert "interpolations are not resolved" in refused(tool, "novel", "--path", "${oc.env:HOME}")


def test_use_section_that_was_removed_is_added_again(tool: Callable[..., str]) -> None:
    params = Path("params.yaml").read_text()
    Path("params.yaml").write_text(params[: params.index("  mlm:")])
    tool("guide", "--force")
    assert config("train", "mlm").learning_rate == 2e-5


# -- what it refuses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["giude", "../presets/guide", "guide.yaml", "", "/etc/passwd", "\x1b[31m"])
def test_use_unknown_name_is_refused_with_all_presets(tool: Callable[..., str], name: str) -> None:
    said = refused(tool, name)
    assert "is no preset" in said and "\x1b" not in said
    assert all(other in said for other in PRESETS)


def test_use_unknown_name_near_a_preset_is_told_so(tool: Callable[..., str]) -> None:
    assert "did you mean guide?" in refused(tool, "giude")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# x\nblok_size: 1\n", "presets/mine.yaml: blok_size is no key of params.yaml; did you mean block_size?"),
        ("# x\ntasks: {mlm: {modle: x}}\n", "tasks.mlm.modle is no key of params.yaml"),
        ("# x\ntasks: {../x: {model: x}}\n", "tasks.../x.model is no key of params.yaml"),
        ("# x\nconf/task/mlm.yaml: {objectiv: 1}\n", "presets/mine.yaml: objectiv is no key of conf/task/mlm.yaml"),
        ("# x\nconf/task/mml.yaml: {objective: 1}\n", "conf/task/mml.yaml is no file"),
        ("# x\nconf/task/../../x.yaml: {a: 1}\n", "conf/task/../../x.yaml is no file"),
        ("# x\nstages/x.yaml: {a: 1}\n", "stages/x.yaml is no file"),
        ("# x\nparams.yaml: {seed: 1}\nseed: 2\n", "presets/mine.yaml: params.yaml.seed is no key of params.yaml"),
        ("# x\ndata: {path: '${oc.env:HOME}'}\n", "interpolations are not resolved"),
        ("# x\nseed: &a 1\nblock_size: *a\n", "presets/mine.yaml:3: aliases"),
        ("# x\nseed: !!python/object:os.system 1\n", "presets/mine.yaml:2"),
        ("# x\n- seed\n", "presets/mine.yaml: it should hold keys and values"),
        ("# x\n", "presets/mine.yaml: it sets nothing"),
        ("seed: 1\n", "presets/mine.yaml: its first line should be a comment"),
        ("# x\nseed: [\n", "presets/mine.yaml: "),
    ],
)  # fmt: skip
def test_use_wrong_preset_is_refused_by_file_and_key(tool: Callable[..., str], text: str, message: str) -> None:
    preset(text)
    before = Path("params.yaml").read_bytes()
    assert message in refused(tool, "mine", "--force")
    assert Path("params.yaml").read_bytes() == before


def test_use_without_git_says_how_to_proceed(tool: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(Path.cwd().parent))
    assert "git cannot say whether edits of params.yaml and conf/task/mlm.yaml would be lost" in refused(tool, "guide")
    monkeypatch.setenv("PATH", "/nowhere")
    assert "use --force" in refused(tool, "guide")


@pytest.mark.slow
def test_use_uncommitted_edits_are_kept_unless_forced(committed: Path) -> None:
    params = committed / "params.yaml"
    edited = params.read_text().replace("seed: 42", "seed: 43")
    params.write_text(edited)
    (committed / "presets/mine.yaml").write_text("# x\nblock_size: 64\n")
    said = run(committed, sys.executable, "-m", "tools.use", "mine", check=False)
    assert "uncommitted edits of params.yaml would be lost" in said and "git restore params.yaml" in said
    assert params.read_text() == edited
    said = run(committed, sys.executable, "-m", "tools.use", "mine", "--force")
    assert "is in order" in said and "Wrote params.yaml." in said
    assert yaml.safe_load(params.read_text())["seed"] == 43


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# x\ntasks: {causal: {model: ../../secret}}\n", "a name holds letters"),
        ("# x\ndata: {name: novel, path: nowhere.txt}\n", "Name your own file with --path FILE."),
    ],
)
def test_use_result_that_fails_the_check_is_undone(committed: Path, text: str, message: str) -> None:
    (committed / "presets/mine.yaml").write_text(text)
    said = run(committed, sys.executable, "-m", "tools.use", "mine", check=False)
    assert message in said and "nothing was changed" in said and "Traceback" not in said
    assert run(committed, "git", "status", "--porcelain", "params.yaml", "conf") == ""


@pytest.mark.slow
def test_use_own_text_passes_the_check(committed: Path) -> None:
    (committed / "book.txt").write_text("One.\n\nTwo.\n")
    assert "is in order" in run(committed, sys.executable, "-m", "tools.use", "novel", "--path", "book.txt")


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
def test_use_edit_of_yaml_changes_the_value_only(text: str, values: dict[str, Any], expected: str) -> None:
    assert edit_yaml(text, values, "x").replace("  #", " #") == expected.replace("  #", " #")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=8).filter(lambda text: "$" not in text),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abcd"), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from("abcd"), VALUES, max_size=4))
def test_use_edit_of_yaml_sets_any_value_or_says_that_it_cannot(values: dict[str, Any]) -> None:
    text = "# head\na: 1     # one\nb:\n  c: [1]\n  d:\n    a: null\n# end\n"
    try:
        edited = edit_yaml(text, values, "x")
    except StageError:
        return
    assert edited.startswith("# head\n") and "# end\n" in edited
    for key, value in values.items():
        if not isinstance(value, dict):
            assert find(load_text(edited), key) == value


def test_use_edit_of_yaml_in_flow_style_is_refused() -> None:
    with pytest.raises(StageError, match="set a by hand"):
        edit_yaml("{a: 1}\n", {"a": 2}, "x")
