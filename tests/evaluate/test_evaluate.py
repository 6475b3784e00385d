"""Stages baseline and evaluate: figures before and after, equal at any block_size, and samples."""

import json
import math
import re

import pytest
import torch
import transformers

from stages.core.artifacts import Documents, read_json
from stages.core.errors import ConfigError, StageError, without_controls
from stages.evaluate.samples import make_samples
from stages.evaluate.schema import Samples
from stages.figures.metrics import document_metrics
from stages.figures.schema import Evaluate
from stages.model.objectives import make_objective
from stages.model.trained import load_trained
from stages.tokens.vocabulary import Vocabulary, load_tokenizer

TASKS = ("causal", "mlm")
SPLITS = ("validation", "test")
METRIC = {"causal": "bits_per_byte", "mlm": "pseudo_bits_per_byte"}
LOSS = {"causal": "loss", "mlm": "masked_loss"}
PERPLEXITY = {"causal": "perplexity", "mlm": "masked_perplexity"}


def metrics_of(root, task):
    return read_json(root / "evaluation/metrics.json")[task]


# -- baseline ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_baseline_of_an_untrained_model_is_near_uniform_over_the_vocabulary(trained, corpus, task):
    figures = read_json(trained[task] / "baseline.json")[task]
    assert list(figures) == list(SPLITS)
    for split in SPLITS:
        stats = read_json(corpus / "tokens" / task / split / "stats.json")
        assert {key: figures[split][key] for key in ("documents", "tokens", "bytes")} == {
            "documents": stats["documents"],
            "tokens": stats["text_tokens"],
            "bytes": stats["bytes"],
        }
        uniform = stats["text_tokens"] * math.log2(300) / stats["bytes"]
        assert figures[split][METRIC[task]] == pytest.approx(uniform, rel=0.05)
        assert 0.0 < figures[split][f"{METRIC[task]}_se"] < 0.2 * uniform


@pytest.mark.parametrize("task", TASKS)
def test_baseline_run_twice_gives_the_same_bytes(trained, run_toy, tmp_path, task):
    run_toy("baseline", task, tmp_path)
    assert (tmp_path / "baseline.json").read_bytes() == (trained[task] / "baseline.json").read_bytes()


def test_baseline_with_another_seed_differs(trained, run_toy, tmp_path):
    run_toy("baseline", "causal", tmp_path, "seed=43")
    assert (tmp_path / "baseline.json").read_bytes() != (trained["causal"] / "baseline.json").read_bytes()


def test_baseline_of_a_context_above_the_models_positions_is_a_config_error(compose_stage, overrides, tmp_path):
    with pytest.raises(ConfigError, match=r"evaluate\.context=65 is above the model's positions, 64"):
        compose_stage("baseline", *overrides("baseline", "causal", tmp_path, "evaluate.context=65"))


# -- evaluate ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_evaluate_of_a_trained_model_gives_the_figures_of_both_splits_with_the_same_keys(trained, task):
    metrics, before = metrics_of(trained[task], task), read_json(trained[task] / "baseline.json")[task]
    name = METRIC[task]
    keys = [name, f"{name}_se", f"base_{name}", LOSS[task], PERPLEXITY[task], "documents", "tokens", "bytes"]
    assert list(metrics) == list(SPLITS)
    for split in SPLITS:
        assert list(metrics[split]) == keys
        assert metrics[split][f"base_{name}"] == before[split][name]
        assert metrics[split][PERPLEXITY[task]] == pytest.approx(math.exp(metrics[split][LOSS[task]]), rel=1e-12)


@pytest.mark.parametrize("task", TASKS)
def test_evaluate_after_training_is_better_than_before(trained, task):
    metrics = metrics_of(trained[task], task)
    assert metrics["test"][METRIC[task]] < metrics["test"][f"base_{METRIC[task]}"]


@pytest.mark.parametrize("task", TASKS)
def test_evaluate_run_twice_gives_the_same_bytes(trained, run_toy, tmp_path, task):
    root = trained[task]
    again = [f"out={tmp_path}/metrics.json", f"samples_out={tmp_path}/samples.md", f"report={tmp_path}/evaluation"]
    run_toy("evaluate", task, root, *again)
    assert (tmp_path / "metrics.json").read_bytes() == (root / "metrics.json").read_bytes()
    assert (tmp_path / "samples.md").read_bytes() == (root / "samples.md").read_bytes()


@pytest.mark.parametrize("task", TASKS)
def test_evaluate_on_blocks_of_another_size_gives_the_same_document_metric_to_all_digits(
    trained, corpus, run_toy, tmp_path, task
):
    more = [
        f"blocks={corpus}/blocks-8/{task}",
        f"out={tmp_path}/metrics.json",
        f"samples_out={tmp_path}/samples.md",
        f"report={tmp_path}/evaluation",
    ]
    run_toy("evaluate", task, trained[task], *more)
    at_16, at_8 = metrics_of(trained[task], task), metrics_of(tmp_path, task)
    for split in SPLITS:
        assert at_8[split][METRIC[task]] == at_16[split][METRIC[task]]
        assert at_8[split][f"{METRIC[task]}_se"] == at_16[split][f"{METRIC[task]}_se"]
        assert at_8[split][LOSS[task]] != at_16[split][LOSS[task]]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("batch_tokens", [16, 200])
def test_evaluate_at_another_batch_size_gives_equal_figures(trained, run_toy, tmp_path, task, batch_tokens):
    more = [
        f"hardware.evaluate_batch_tokens={batch_tokens}",
        f"out={tmp_path}/metrics.json",
        f"samples_out={tmp_path}/samples.md",
        f"report={tmp_path}/evaluation",
    ]
    run_toy("evaluate", task, trained[task], *more)
    for split in SPLITS:
        assert metrics_of(tmp_path, task)[split] == pytest.approx(metrics_of(trained[task], task)[split], rel=1e-6)


@pytest.mark.parametrize("task", TASKS)
def test_evaluate_gives_the_document_metric_of_the_saved_model(trained, corpus, task):
    tokens, vocabulary = corpus / "tokens" / task, Vocabulary.read(corpus / "tokens" / task)
    model, config = load_trained(task, trained[task] / "model"), Evaluate(context=16, max_documents=None)
    found = document_metrics(
        model, make_objective(task, vocabulary), Documents(tokens / "test"), vocabulary, config, 4096
    )
    assert found[METRIC[task]] == metrics_of(trained[task], task)["test"][METRIC[task]]


def test_evaluate_with_max_documents_counts_those_alone(trained, run_toy, tmp_path):
    run_toy("baseline", "causal", tmp_path, "evaluate.max_documents=3")
    more = ["evaluate.max_documents=3", f"trained={trained['causal']}/model"]
    run_toy("evaluate", "causal", tmp_path, *more)
    metrics = metrics_of(tmp_path, "causal")
    assert [metrics[split]["documents"] for split in SPLITS] == [3, 3]
    assert metrics["test"]["bits_per_byte_se"] > metrics_of(trained["causal"], "causal")["test"]["bits_per_byte_se"]


def test_evaluate_with_a_context_above_block_size_warns(trained, corpus, run_toy, tmp_path, caplog):
    more = [
        f"blocks={corpus}/blocks-8/causal",
        f"out={tmp_path}/metrics.json",
        f"samples_out={tmp_path}/samples.md",
        f"report={tmp_path}/evaluation",
    ]
    with caplog.at_level("WARNING", logger="stages.evaluate.stage"):
        run_toy("evaluate", "causal", trained["causal"], *more)
    assert "evaluate.context=16 is above block_size=8" in caplog.text


def test_evaluate_of_damaged_weights_is_an_error_that_names_the_directory(trained, run_toy, tmp_path):
    damaged = tmp_path / "model"
    damaged.mkdir()
    for file in (trained["causal"] / "model").iterdir():
        (damaged / file.name).write_bytes(file.read_bytes()[: -100 if file.suffix == ".safetensors" else None])
    with pytest.raises(StageError, match=f"{damaged}"):
        run_toy("evaluate", "causal", trained["causal"], f"trained={damaged}", f"out={tmp_path}/metrics.json")
    assert not (tmp_path / "metrics.json").exists()


def test_metrics_file_is_json_that_reads_well(trained):
    for name in ("metrics.json", "evaluation/metrics.json"):
        text = (trained["causal"] / name).read_text()
        assert text == json.dumps(json.loads(text), indent=2) + "\n"


@pytest.mark.parametrize(("task", "short"), [("causal", "bpb"), ("mlm", "pseudo_bpb")])
def test_metrics_file_holds_the_headline_metrics_of_the_report_under_the_tasks_name(trained, task, short):
    report = metrics_of(trained[task], task)
    headline = {"val": {short: report["validation"][METRIC[task]]}, "test": {short: report["test"][METRIC[task]]}}
    assert read_json(trained[task] / "metrics.json") == {task: headline}


# -- samples -----------------------------------------------------------------------------------------------------------


def sample_page(trained, corpus, task, **settings):
    defaults = {
        "causal": {"seed": 0, "max_new_tokens": 10, "temperature": 1.0, "top_k": 20, "prompts": ["Rain falls"]},
        "mlm": {"seed": 0, "top_k": 5, "prompts": ["Rain falls when {mask} cools."]},
    }
    tokens = corpus / "tokens" / task
    model = load_trained(task, trained[task] / "model")
    config = Samples(**{**defaults[task], **settings})
    return make_samples(config, task, model, tokens / "tokenizer", Vocabulary.read(tokens))


@pytest.mark.parametrize("task", TASKS)
def test_samples_of_the_default_prompts_hold_each_of_them(trained, compose_stage, overrides, task):
    page = (trained[task] / "samples.md").read_text()
    prompts = compose_stage("evaluate", *overrides("evaluate", task, trained[task])).samples.prompts
    assert prompts
    assert all(prompt.replace("{mask}", r"\_\_\_") in page for prompt in prompts)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("hostile", ["\x1b[2J", "a\rb", "\x9b31m", "\u202e", "\x07"])
def test_samples_of_a_prompt_with_control_characters_hold_none(trained, corpus, task, hostile):
    prompt = f"Rain {hostile} falls" + (" {mask}" if task == "mlm" else "")
    page = sample_page(trained, corpus, task, prompts=[prompt])
    assert without_controls(page) == page
    assert f"Rain {without_controls(hostile)} falls" in page


def test_samples_of_a_causal_model_depend_on_the_seed_alone(trained, corpus):
    first = sample_page(trained, corpus, "causal")
    torch.rand(3)
    assert sample_page(trained, corpus, "causal") == first
    assert sample_page(trained, corpus, "causal", seed=1) != first


def test_samples_of_the_likeliest_token_alone_are_transformers_greedy_completion(trained, corpus):
    tokens = corpus / "tokens" / "causal"
    tokenizer, end = load_tokenizer(tokens / "tokenizer"), Vocabulary.read(tokens).special["eos_token"]
    model = load_trained("causal", trained["causal"] / "model")
    given = torch.tensor([[end, *tokenizer.encode("Rain falls").ids]])
    settings = transformers.GenerationConfig(max_new_tokens=10, do_sample=False, eos_token_id=end, pad_token_id=end)
    greedy = model.generate(given, attention_mask=torch.ones_like(given), generation_config=settings)[0, 1:].tolist()
    completed = tokenizer.decode(greedy, skip_special_tokens=True).removeprefix("Rain falls")
    (line,) = sample_page(trained, corpus, "causal", top_k=1).splitlines()[2:]
    assert line == f"> **Rain falls**{completed}"


def test_samples_longer_than_the_models_positions_end_there(trained, corpus):
    # The model has 64 positions, and at this temperature all tokens are alike, so that it rarely ends by itself.
    settings = {"temperature": 1e6, "top_k": 300, "seed": 1}
    at_64, beyond = (sample_page(trained, corpus, "causal", max_new_tokens=number, **settings) for number in (60, 500))
    assert len(beyond) >= len(at_64) > 60


def test_samples_of_a_masked_model_are_its_likeliest_tokens_in_order(trained, corpus):
    page = sample_page(trained, corpus, "mlm", top_k=4)
    shares = [float(share) for share in re.findall(r"\| ([\d.]+)% \|", page)]
    assert len(shares) == 4
    assert shares == sorted(shares, reverse=True)
    assert 0.0 < sum(shares) <= 100.0


def test_samples_of_a_masked_model_agree_with_the_fill_mask_pipeline(trained, corpus):
    fill = transformers.pipeline("fill-mask", model=str(trained["mlm"] / "model"), device="cpu")
    expected = [f"{item['score']:.1%}" for item in fill("Rain falls when <mask> cools.", top_k=5)]
    page = sample_page(trained, corpus, "mlm", prompts=["Rain falls when {mask} cools."])
    assert [f"{share}%" for share in re.findall(r"\| ([\d.]+)% \|", page)] == expected


@pytest.mark.parametrize("prompt", ["no mask", "{mask} and {mask}"])
def test_evaluate_config_of_a_masked_prompt_without_exactly_one_mask_is_an_error(
    compose_stage, overrides, tmp_path, prompt
):
    more = [f"samples.prompts=['{prompt}']"]
    with pytest.raises(ConfigError, match=re.escape(repr(prompt))):
        compose_stage("evaluate", *overrides("evaluate", "mlm", tmp_path, *more))


def test_evaluate_of_a_context_above_the_models_positions_is_an_error(trained, run_toy, tmp_path):
    more = [
        "evaluate.context=4096",
        f"out={tmp_path}/metrics.json",
        f"samples_out={tmp_path}/samples.md",
        f"report={tmp_path}/evaluation",
    ]
    with pytest.raises(StageError, match=r"evaluate\.context=4096 is above the model's positions, 64"):
        run_toy("evaluate", "causal", trained["causal"], *more)
