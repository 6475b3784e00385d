"""Stage score: accuracy of trained toys on pairs and questions, from a file or a data set of the Hub."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import TASKS, run_stage
from data_helpers import REPOSITORY, read_contents, write_jsonl
from hub_cases import COMMIT, Client, make_blimp_files
from mini_hub import MiniHub

from stages.core.artifacts import read_json
from stages.core.errors import ConfigError, StageError
from stages.score.accuracy import SCORES

LINES = [
    {"good": "Rain falls when air cools.", "bad": "Rain when falls air cools.", "field": "order"},
    {"good": "The Moon moves while light bends.", "bad": "The Moon moves light while bends.", "field": "order"},
    {"good": "Salt melts if water warms up.", "bad": "Salt melts if water <|endoftext|><mask></s>.", "field": "tokens"},
    {"prompt": "A magnet moves", "choices": ["while", "while air cools.", "zebra"], "answer": 1},
    {"prompt": "", "choices": ["日本 tea 🙂", "naïve"], "answer": 0, "field": "unicode"},
    {"good": "Rain falls when air cools.", "bad": "Rain when falls air cools.", "field": "order"},
    {"good": "The field turns. " * 30, "bad": "The turns field. " * 30, "field": "long"},
]


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    """A file of items."""
    return write_jsonl(tmp_path_factory.mktemp("pairs") / "items.jsonl", LINES)


@pytest.fixture(scope="module")
def score(trained, corpus, items):
    """`score(task, out, *more)` runs the stage on the toy corpus; `score.command` returns the command line."""

    def command(task, out, *more):
        groups = [f"task={task}", "pairs=files", "hardware=cpu", "hardware.num_threads=1"]
        paths = [f"trained={trained[task]}/model", f"tokens={corpus}/tokens/{task}", f"out={out}"]
        return [*groups, *paths, f"pairs.path={items}", "pairs.groups=[field]", "pairs.context=32", *more]

    def run(task, out, *more):
        run_stage("score", *command(task, out, *more))
        return read_json(Path(out) / "metrics.json")[task]

    run.command = command
    return run


@pytest.fixture(scope="module")
def scored(score, tmp_path_factory):
    """Maps each task to its figures and its output directory."""
    roots = {task: tmp_path_factory.mktemp(f"scored-{task}") / "out" for task in TASKS}
    return {task: (score(task, root), root) for task, root in roots.items()}


@pytest.mark.parametrize("task", TASKS)
def test_score_of_items_has_figures_that_follow_from_the_table(scored, task):
    figures, root = scored[task]
    table = pq.read_table(root / "items.parquet").to_pylist()
    assert figures["method"] == {"causal": "log_likelihood", "mlm": "pseudo_log_likelihood"}[task]
    assert [row["row"] for row in table] == list(range(1, len(LINES) + 1))
    for name in SCORES:
        correct = []
        for row in table:
            per = {"sum": [1] * 3, "per_token": row["tokens"], "per_byte": row["bytes"]}[name]
            scores = [nats / number for nats, number in zip(row["log_likelihood"], per, strict=False)]
            answer = scores.pop(row["answer"])
            correct.append(answer > max(scores))
        assert [row["correct"][name] for row in table] == correct
        assert figures["accuracy"][name]["correct"] == sum(correct)
        assert figures["accuracy"][name]["share"] == sum(correct) / len(LINES)
    assert figures["items"] == len(LINES)
    assert list(figures["groups"]["field"]) == ["order", "(none)", "long", "tokens", "unicode"]


@pytest.mark.parametrize("task", TASKS)
def test_score_of_trained_toys_is_right_where_tokens_were_never_seen(scored, task):
    assert scored[task][0]["groups"]["field"]["tokens"]["accuracy"]["sum"]["share"] == 1.0


def test_score_of_a_trained_causal_toy_is_right_where_the_order_of_words_decides(scored):
    assert scored["causal"][0]["groups"]["field"]["order"]["accuracy"]["sum"]["share"] == 1.0


@pytest.mark.parametrize("task", TASKS)
def test_score_of_duplicate_lines_is_the_same_to_the_last_digit(scored, task):
    table = pq.read_table(scored[task][1] / "items.parquet").to_pylist()
    assert table[0] | {"row": 6} == table[5]


@pytest.mark.parametrize("task", TASKS)
def test_score_run_twice_gives_the_same_bytes(score, scored, tmp_path, task):
    score(task, tmp_path / "out")
    assert read_contents(tmp_path / "out") == read_contents(scored[task][1])


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("batch_tokens", [1, 200])
def test_score_at_another_batch_size_gives_equal_scores_and_figures(score, scored, tmp_path, task, batch_tokens):
    figures = score(task, tmp_path / "out", f"hardware.evaluate_batch_tokens={batch_tokens}")
    assert figures == scored[task][0]
    tables = [pq.read_table(root / "items.parquet") for root in (tmp_path / "out", scored[task][1])]
    found, expected = (table.column("log_likelihood").combine_chunks().flatten() for table in tables)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_score_of_texts_that_the_tokenizer_cannot_tell_apart_warns_of_a_tie(score, trained, corpus, tmp_path, caplog):
    lossy = tmp_path / "tokens"
    for name, content in read_contents(corpus / "tokens/causal").items():
        if not name.endswith(".arrow"):
            (lossy / name).parent.mkdir(parents=True, exist_ok=True)
            (lossy / name).write_bytes(content)
    file = lossy / "tokenizer/tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"normalizer": {"type": "Lowercase"}}))
    path = write_jsonl(tmp_path / "items.jsonl", [{"good": "Rain falls.", "bad": "rain falls."}])
    figures = score("causal", tmp_path / "out", f"tokens={lossy}", f"pairs.path={path}", "pairs.groups=[]")
    assert (figures["ties"], figures["accuracy"]["sum"]["correct"]) == (1, 0)
    assert "1 items are ties" in caplog.text


# -- errors ------------------------------------------------------------------------------------------------------------


def test_score_of_a_context_above_the_models_positions_is_an_error(score, tmp_path):
    with pytest.raises(StageError, match=r"pairs\.context=65 is above the model's positions, 64"):
        score("causal", tmp_path / "out", "pairs.context=65")
    assert not (tmp_path / "out").exists()


def test_score_of_a_malformed_line_ends_before_torch_is_imported(score, tmp_path):
    path = write_jsonl(tmp_path / "items.jsonl", [LINES[0], {"good": "a"}])
    command = score.command("causal", tmp_path / "out", f"pairs.path={path}")
    code = "import runpy, sys\ntry:\n    runpy.run_module('stages.score', run_name='__main__', alter_sys=True)\n"
    code += "finally:\n    print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *command], cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "False\n")
    assert f"{path}:2: bad=null: it should be a string" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["pairs.path=s3://bucket/a"], "pairs.path=s3://bucket/a: give the path of a local file"),
        (["pairs.path='~/a'"], "pairs.path=~/a: give the path of a local file"),
        (["pairs.groups=[a,a]"], "pairs.groups names a more than once"),
        (["pairs.context=3"], "pairs.context=3"),
        (["pairs=nothing"], "there is no conf/pairs/nothing.yaml"),
        (["pairs=blimp", "pairs.hub.revision=main"], 'pairs.hub.revision="main"'),
        (["pairs=blimp", "pairs.hub.configs=[a,a]"], "pairs.hub.configs names a more than once"),
        (["pairs=blimp", "pairs.hub.file=a.parquet"], "pairs.hub.file=a.parquet needs {config}"),
        (["pairs=blimp", "pairs.hub.configs=[]"], "pairs.hub.configs=[]"),
    ],
)
def test_score_config_with_a_wrong_value_is_an_error_that_names_the_key(compose_stage, overrides, message):
    given = {override.partition("=")[0] for override in overrides}
    defaults = [f"{key}={value}" for key, value in {"pairs": "files", "pairs.path": "a"}.items() if key not in given]
    with pytest.raises(ConfigError, match=re.escape(message)):
        compose_stage("score", "task=causal", "hardware=cpu", *defaults, *overrides)


def test_score_config_of_a_task_without_pairs_names_the_key_in_params(compose_stage):
    with pytest.raises(ConfigError, match=re.escape("params.yaml has no pairs.causal.name")):
        compose_stage("score", "task=causal")


# -- the Hub -----------------------------------------------------------------------------------------------------------


BLIMP = yaml.safe_load((REPOSITORY / "conf/pairs/blimp.yaml").read_text(encoding="utf-8"))
NAMES = ("adjunct_island", "wh_island")


def make_blimp_hub(**changes):
    """Make a Hub with two of BLiMP's configurations at the pinned commit."""
    hub = BLIMP["hub"]
    return MiniHub({f"datasets/{hub['path']}": {hub["revision"]: make_blimp_files(*NAMES)}}, **changes)


def run_blimp(score, root, url, *more, configs=NAMES):
    """Run the stage in a process with its cache below `root`; return the finished process."""
    overrides = ["pairs=blimp", f"pairs.hub.configs=[{','.join(configs)}]", "pairs.groups=[field,UID]", *more]
    command = [item for item in score.command("causal", root / "out") if not item.startswith("pairs=")]
    return Client(root, url).process("-m", "stages.score", *command, *overrides)


def test_score_of_blimp_reads_the_pinned_files_once_and_reports_by_paradigm(score, tmp_path):
    with make_blimp_hub().serve() as url:
        done = run_blimp(score, tmp_path, url)
        assert done.returncode == 0, done.stderr
    figures = read_json(tmp_path / "out/metrics.json")["causal"]
    assert figures["items"] == 6
    assert {name: group["items"] for name, group in figures["groups"]["UID"].items()} == dict.fromkeys(NAMES, 3)
    table = pq.read_table(tmp_path / "out/items.parquet")
    assert table.column("source").to_pylist() == [name for name in NAMES for _ in range(3)]
    assert table.column("row").to_pylist() == [1, 2, 3] * 2
    again = run_blimp(score, tmp_path, url, "pairs.groups=[absent]")  # without the server: the files are cached
    assert "pairs.groups: no item has the column absent" in again.stderr


@pytest.mark.parametrize(
    ("hub", "more", "configs", "message"),
    [
        ({}, (), ("adjunct_island", "absent"), "pairs.hub.path=nyu-mll/blimp has none of absent/train-00000"),
        ({}, (f"pairs.hub.revision={COMMIT}",), NAMES, "it has no such revision"),
        ({}, ("pairs.hub.path=o/absent",), NAMES, "/datasets/o/absent"),
        ({"failing": (f"{NAMES[0]}/train-00000-of-00001.parquet",)}, (), NAMES, "access is refused (HTTP 403)"),
    ],
)
def test_score_with_a_hub_failure_is_an_error_with_the_reason(score, tmp_path, hub, more, configs, message):
    with make_blimp_hub(**hub).serve() as url:
        done = run_blimp(score, tmp_path, url, *more, configs=configs)
    assert done.returncode == 1
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_score_with_an_unreachable_hub_names_a_local_file_as_remedy(score, tmp_path):
    with make_blimp_hub().serve() as url:
        pass
    done = run_blimp(score, tmp_path, url)
    assert done.returncode == 1
    assert "the Hub cannot be reached" in done.stderr
    assert "Use a local file with the same records" in done.stderr
    assert "Traceback" not in done.stderr


def test_blimp_configuration_names_its_67_paradigms():
    assert len(set(BLIMP["hub"]["configs"])) == 67
