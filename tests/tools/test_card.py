"""Tests of the model card: its contents match the artifacts, and its code runs."""

import contextlib
import html
import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc_project import TASKS, run_command
from hub_cases import TOKEN
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from upload_hub import find_metadata_problems

from stages.core.artifacts import write_json
from stages.core.config import flatten_values
from stages.core.errors import printable
from stages.tokens.prompts import build_prompt_template
from stages.tokens.texts import Flatten
from tools.card import (
    METRIC_MEANINGS,
    RecordedRun,
    describe_metric,
    get_locked_params,
    make_card,
    redact_values,
    render_group_tables,
    render_reproduction,
)
from tools.publish import find_public_remote, read_recorded_run

NAME = "someone/some-model"
MEMORIZATION = "Nothing was remembered."
HOSTILE_VALUES = [
    "<img src=x onerror=alert(1)>",
    "a | b",
    "[a](javascript:x)",
    "`",
    "``a`b",
    "line\nline",
    "\x1b[2J",
    "**a**",
    "a\\",
    "| ` |",
    " ",
    "https://example.org",
]


def build_card(task: str, license: str | None = "mit", language: list[str] | None = None) -> ModelCard:
    return make_card(read_recorded_run(task)[0], NAME, license, language, MEMORIZATION)


@pytest.mark.parametrize("task", TASKS)
def test_card_metadata_has_the_measured_metrics(inside: Path, tmp_path: Path, task: str) -> None:
    build_card(task, language=["en"]).save(tmp_path / "README.md")
    assert find_metadata_problems((tmp_path / "README.md").read_text()) == []
    data = ModelCard.load(tmp_path / "README.md").data
    measured = json.loads((inside / f"reports/evaluate/{task}/metrics.json").read_text())[task]
    found = {(result.dataset_split, result.metric_type): result.metric_value for result in data.eval_results}
    assert {split for split, _ in found} == {"validation", "test"}
    assert all(measured[split][metric] == value for (split, metric), value in found.items())
    assert {"causal": "bits_per_byte", "mlm": "pseudo_bits_per_byte"}[task] in {metric for _, metric in found}
    assert (data.license, data.language, data.model_name) == ("mit", ["en"], "some-model")
    assert data.pipeline_tag == {"causal": "text-generation", "mlm": "fill-mask"}[task]


@pytest.mark.parametrize("task", TASKS)
def test_card_contains_every_metric_parameter_sample_and_md5(inside: Path, task: str) -> None:
    text = str(build_card(task))
    assert text == str(build_card(task))
    assert run_command(inside, "git", "rev-parse", "HEAD").strip() in text
    measured = json.loads((inside / f"reports/evaluate/{task}/metrics.json").read_text())[task]["test"]
    assert measured.pop("groups").keys() == {"source"} and "| By " not in text  # one source: no table by source
    for key, value in measured.items():
        shown = f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
        assert f"| {key} | {shown} | " in text
    assert (inside / f"reports/samples/{task}.md").read_text().partition("\n")[2].strip() in text
    locked = yaml.safe_load((inside / "dvc.lock").read_text())["stages"]
    used = {}
    for stage in (stage for name, stage in locked.items() if name.partition("@")[2] in ("", task)):
        for item in [*stage["deps"], *stage["outs"]]:
            assert text.count(f"\n{item['md5']:36}  {item['path']}\n") == 1
        used |= stage.get("params", {}).get("params.yaml", {})
    shown = re.search(r"`params\.yaml`\n\n```yaml\n(.*?)```", text, flags=re.DOTALL)
    assert shown is not None and dict(flatten_values(yaml.safe_load(shown[1]))) == used
    assert "num_train_epochs: 0.05" in text and "weight_decay: 0.01" in text and "max_records: 80" in text
    assert {"causal", "mlm"} - {task} <= set(TASKS) and f"  {({*TASKS} - {task}).pop()}:\n" not in text
    assert f"torch {json.loads(Path(f'reports/train/{task}/stats.json').read_text())['versions']['torch']}" in text
    assert str(inside) not in text


@pytest.fixture
def scored_run(inside: Path) -> Iterator[RecordedRun]:
    """Run of the causal model with results of a score stage: one item, in a group with a hostile name."""
    found, _ = read_recorded_run("causal")
    items = {"items": 1, "chance": 0.5, "ties": 0}
    items["accuracy"] = {"sum": {"correct": 1, "share": 1.0, "low": 0.25, "high": 1.0}}
    figures = {"method": "log_likelihood", "digest": "d", **items, "groups": {"a|b": {"`c`": items}}}
    write_json("reports/score/causal/metrics.json", {"causal": figures})
    yield found._replace(stages={**found.stages, "score@causal": {"deps": [], "outs": []}})
    shutil.rmtree("reports/score")


def test_card_of_scored_model_has_accuracy_and_command_to_reproduce_it(scored_run: RecordedRun) -> None:
    text = str(make_card(scored_run, NAME, "mit", None, MEMORIZATION))
    assert "Accuracy on minimal pairs and multiple-choice questions, by log-likelihood\n\n| items |" in text
    assert "| `all` | 100.0% | 25.0% to 100.0% | 1 |\n| `` a\\|b: `c` `` | 100.0% | 25.0% to 100.0% | 1 |" in text
    assert "$ dvc repro evaluate@causal score@causal\n" in text


def test_card_without_score_stage_ignores_accuracy_of_an_earlier_run(scored_run: RecordedRun) -> None:
    text = str(build_card("causal"))
    assert "minimal pairs" not in text and "score@" not in text


@pytest.mark.parametrize("task", TASKS)
def test_card_code_runs(inside: Path, task: str) -> None:
    code = re.search(r"```python\n(.*?)```", str(build_card(task)), flags=re.DOTALL)
    assert code is not None
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(code[1].replace(NAME, f"models/{task}"), {})
    assert {"causal": "The reason the sky is blue is", "mlm": "'score'"}[task] in output.getvalue()


def test_card_of_answers_only_states_counted_bytes_and_uses_chat_template(inside: Path) -> None:
    recorded, _ = read_recorded_run("causal")  # before the workspace changes
    form = build_prompt_template(Flatten(prompt=["title"], completion=["answers.text"]), None)
    tokens = inside / "data/tokens/causal"
    for file, values in [(tokens / "stats.json", {"chat_template": form})] + [
        (tokens / split / "stats.json", {"counted_tokens": 9, "counted_bytes": 1234})
        for split in ("train", "validation", "test")
    ]:
        changed = json.loads(file.read_text()) | values
        file.unlink()  # it may be a link to DVC's cache
        file.write_text(json.dumps(changed))
    (inside / "models/causal/chat_template.jinja").write_text(str(form))
    text = str(make_card(recorded, NAME, "mit", None, MEMORIZATION))
    assert "Only completions are trained on: 1,234 bytes of train, 1,234 bytes of validation" in text
    code = re.search(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert code is not None and '"role": "user"' in code[1]
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(code[1].replace(NAME, "models/causal"), {})
    assert output.getvalue().strip()


def test_card_has_the_section_on_memorization(inside: Path) -> None:
    assert f"## Memorization\n\n{MEMORIZATION}\n\n## Samples" in str(build_card("causal"))


def test_card_without_license_says_that_none_is_chosen(inside: Path) -> None:
    card = build_card("causal", license=None)
    assert card.data.license is None
    assert "## License\n\nNo license has been chosen for this model" in str(card)


def test_card_of_hub_data_set_and_checkpoint_names_both(inside: Path) -> None:
    found, _ = read_recorded_run("causal")
    stages = json.loads(json.dumps(found.stages))
    for stage in stages.values():
        if model := stage.get("params", {}).get("conf/model/tiny-gpt2.yaml"):
            model |= {"path": "owner/base", "revision": "abc", "from_scratch": False}
    ledger = inside / "data/raw/stats.json"
    stats = json.loads(ledger.read_text())
    stats["source"] = {"hub": "owner/set", "revision": "main", "commit": "def"}
    ledger.unlink()  # a link to DVC's cache
    ledger.write_text(json.dumps(stats))
    card = make_card(found._replace(stages=stages), None, None, None, MEMORIZATION)
    assert (card.data.base_model, card.data.datasets) == ("owner/base", ["owner/set"])
    assert {result.dataset_revision for result in card.data.eval_results} == {"def"}
    assert (
        "fine-tuned from `owner/base` on [owner/set](https://huggingface.co/datasets/owner/set) at commit `def`"
        in str(card)
    )
    assert find_metadata_problems(str(card)) == []


@pytest.mark.parametrize("task", TASKS)
def test_card_every_metric_has_a_meaning(clean: Path, task: str) -> None:
    measured = json.loads((clean / f"reports/evaluate/{task}/metrics.json").read_text())[task]["test"]
    for key in measured.keys() - {"groups"}:
        assert describe_metric(key, context=128, block_size=64)
    assert all(key in (clean / "docs/metrics.md").read_text() for key in METRIC_MEANINGS)


def make_figures_by_value(bits: dict[str, float], **more: Any) -> dict[str, Any]:
    return {
        value: {"bits_per_byte": found, "base_bits_per_byte": 4.0, "documents": 2, "bytes": 1500, **more}
        for value, found in bits.items()
    }


def test_card_shows_groups_with_several_values_and_evaluated_texts() -> None:
    groups = {"source": make_figures_by_value({"toy": 2.0}), "topic": make_figures_by_value({"why": 2.25, "how": 2.5})}
    validation = {"source": make_figures_by_value({"toy": 2.0}), "topic": make_figures_by_value({"why": 2.75})}
    texts = make_figures_by_value({"wiki": 3.0})
    metrics = {"test": {"groups": groups}, "validation": {"groups": validation}, "texts": texts}
    topic, text = render_group_tables(metrics)
    assert topic.splitlines()[1:] == [
        "| By `topic` | documents | bytes | bits_per_byte, test (before training)"
        " | bits_per_byte, validation (before training) |",
        "|---|---|---|---|---|",
        "| `why` | 2 | 1,500 | 2.2500 (4.0000) | 2.7500 (4.0000) |",
        "| `how` | 2 | 1,500 | 2.5000 (4.0000) |  |",
    ]
    assert text.splitlines()[-1] == "| `wiki` | 2 | 1,500 | 3.0000 (4.0000) |"


def test_card_group_with_many_values_shows_20_and_counts_the_others() -> None:
    groups = {"topic": make_figures_by_value({f"value {number}": 2.0 for number in range(30)})}
    (section,) = render_group_tables({"test": {"groups": groups}, "validation": {"groups": groups}})
    assert "`value 19`" in section and "`value 20`" not in section and "10 more values are in" in section


@pytest.mark.parametrize("value", HOSTILE_VALUES)
def test_card_hostile_group_value_stays_text_in_one_cell(value: str) -> None:
    groups = {"topic": make_figures_by_value({"why": 2.25, value: 2.5})}
    (section,) = render_group_tables({"test": {"groups": groups}, "validation": {"groups": groups}})
    page = MarkdownIt("gfm-like", {"linkify": False}).render(section)
    assert page.count("<tr>") == 3 and page.count("<td>") == 10
    assert set(re.findall(r"</?(\w+)", page)) == {"table", "thead", "tbody", "tr", "th", "td", "code"}
    found = html.unescape(re.findall(r"<code>(.*?)</code>", page)[2])
    assert found.strip() == printable(value).strip()


def test_redact_values_reduces_local_paths_to_last_part() -> None:
    values = {"data": {"path": "/home/me/secret/a.txt", "joiner": "/"}, "path": "~/b", "model": {"path": "owner/name"}}
    assert redact_values(values) == {
        "data": {"path": ".../a.txt", "joiner": "/"},
        "path": ".../b",
        "model": {"path": "owner/name"},
    }


def test_redact_values_masks_credentials_in_urls() -> None:
    values = {"ray": {"storage": f"s3://me:{TOKEN}@bucket/a"}, "started_by": ["run", f"--to=https://me:{TOKEN}@host"]}
    assert redact_values(values) == {
        "ray": {"storage": "s3://me:***@bucket/a"},
        "started_by": ["run", "--to=https://me:***@host"],
    }


def make_run(task: str, params: dict[str, Any]) -> RecordedRun:
    return RecordedRun(
        task, "0" * 40, None, {f"train@{task}": {"params": params}}, is_text_in_git=True, has_dvc_remote=False
    )


def test_get_locked_params_nests_dotted_keys_and_merges_sections() -> None:
    found = make_run(
        "prefix",
        {
            "params.yaml": {"data.name": "sample", "tasks.prefix.model": "tiny", "tasks.prefix.batch_size": 4},
            "conf/task/prefix.yaml": {"objective.name": "mlm", "filter": {"a.b": 1}},
        },
    )
    found.stages["evaluate@prefix"] = {"params": {"conf/task/prefix.yaml": {"objective": {"mlm_probability": 0.1}}}}
    assert get_locked_params(found) == {
        "params.yaml": {"data": {"name": "sample"}, "tasks": {"prefix": {"model": "tiny", "batch_size": 4}}},
        "conf/task/prefix.yaml": {"objective": {"name": "mlm", "mlm_probability": 0.1}, "filter": {"a.b": 1}},
    }
    assert found.objective == "mlm"
    assert found.stages["evaluate@prefix"]["params"]["conf/task/prefix.yaml"]["objective"] == {"mlm_probability": 0.1}


@pytest.mark.parametrize(
    ("framework", "ray", "targets"),
    [("trainer", None, "env"), ("keras", None, "env keras"), ("trainer", {"workers": 2}, "env ray")],
)
def test_card_reproduction_installs_required_packages(framework: str, ray: dict[str, int] | None, targets: str) -> None:
    hardware = {"device": "cpu"} if ray is None else {"device": "cpu", "ray": ray}
    params = {
        "params.yaml": {"framework": framework, "hardware": "mine"},
        "conf/hardware/mine.yaml": {"hardware": hardware},
    }
    assert f"$ make {targets} && source" in render_reproduction(make_run("prefix", params), {"files": "a.txt"})


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (f"https://me:{TOKEN}@host/a/b.git", "https://host/a/b.git"),
        (f"https://{TOKEN}@host:8443/a/b", "https://host:8443/a/b"),
        (f"https://host/a/b?token={TOKEN}", "https://host/a/b"),
        ("git@github.com:a/b.git", "git@github.com:a/b.git"),
        ("ssh://git@host:22/a/b", "ssh://git@host:22/a/b"),
        ("/home/me/b", None),
        ("file:///home/me/b", None),
    ],
)
def test_find_public_remote_removes_credentials_and_local_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, shown: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    run_command(tmp_path, "git", "init", "-q")
    run_command(tmp_path, "git", "remote", "add", "origin", url)
    assert find_public_remote() == shown
