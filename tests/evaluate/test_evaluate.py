"""Stages baseline and evaluate: figures before and after, equal at any block_size, and samples."""

import json
import math
import re
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from conftest import EXTRA_TEXTS
from data_helpers import read_contents

from stages.core.artifacts import Documents, read_json
from stages.core.config import flatten_values
from stages.core.errors import ConfigError, StageError, escape_controls
from stages.figures.groups import NONE, compute_ratio_with_error
from stages.figures.metrics import score_documents
from stages.figures.samples import format_page, make_samples
from stages.figures.schema import Samples
from stages.figures.scores import get_scores, read_scores
from stages.figures.texts import SplitTexts
from stages.model.objectives import make_objective
from stages.model.trained import load_trained_model
from stages.tokenize.stage import tokenize_split
from stages.tokens.encoding import TokenizersEngine
from stages.tokens.texts import Flatten, TextFile
from stages.tokens.vocabulary import Vocabulary, load_tokenizer

TASKS = ("causal", "mlm")
FLATTEN = Flatten(columns=["answers.text"])
SPLITS = ("validation", "test")
METRIC = {"causal": "bits_per_byte", "mlm": "pseudo_bits_per_byte"}
LOSS = {"causal": "loss", "mlm": "masked_loss"}
PERPLEXITY = {"causal": "perplexity", "mlm": "masked_perplexity"}


def read_metrics(root, task):
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
    assert read_contents(tmp_path / "baseline") == read_contents(trained[task] / "baseline")


def test_baseline_with_another_seed_differs(trained, run_toy, tmp_path):
    run_toy("baseline", "causal", tmp_path, "seed=43")
    assert (tmp_path / "baseline.json").read_bytes() != (trained["causal"] / "baseline.json").read_bytes()


def test_baseline_of_a_context_above_the_models_positions_is_a_config_error(compose_stage, overrides, tmp_path):
    with pytest.raises(ConfigError, match=r"evaluate\.context=65 is above the model's positions, 64"):
        compose_stage("baseline", *overrides("baseline", "causal", tmp_path, "evaluate.context=65"))


# -- evaluate ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_evaluate_of_a_trained_model_gives_the_figures_of_both_splits_with_the_same_keys(trained, task):
    metrics, before = read_metrics(trained[task], task), read_json(trained[task] / "baseline.json")[task]
    name = METRIC[task]
    keys = [name, f"{name}_se", f"base_{name}", LOSS[task], PERPLEXITY[task], "documents", "tokens", "bytes", "groups"]
    assert list(metrics) == list(SPLITS)
    for split in SPLITS:
        assert list(metrics[split]) == keys
        assert metrics[split][f"base_{name}"] == before[split][name]
        assert metrics[split][PERPLEXITY[task]] == pytest.approx(math.exp(metrics[split][LOSS[task]]), rel=1e-12)


@pytest.mark.parametrize("task", TASKS)
def test_evaluate_after_training_is_better_than_before(trained, task):
    metrics = read_metrics(trained[task], task)
    assert metrics["test"][METRIC[task]] < metrics["test"][f"base_{METRIC[task]}"]


@pytest.mark.parametrize("task", TASKS)
def test_evaluate_run_twice_gives_the_same_bytes(trained, run_toy, tmp_path, task):
    root = trained[task]
    again = [f"out={tmp_path}/metrics.json", f"samples_out={tmp_path}/samples.md", f"report={tmp_path}/evaluation"]
    run_toy("evaluate", task, root, *again)
    assert (tmp_path / "metrics.json").read_bytes() == (root / "metrics.json").read_bytes()
    assert (tmp_path / "samples.md").read_bytes() == (root / "samples.md").read_bytes()
    assert read_contents(tmp_path / "evaluation") == read_contents(root / "evaluation")
    files = {f"{directory}{split}.parquet" for directory in ("", "tokens/") for split in SPLITS}
    assert read_contents(tmp_path / "evaluation").keys() == {"metrics.json", *files}


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
    at_16, at_8 = read_metrics(trained[task], task), read_metrics(tmp_path, task)
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
        found, expected = (dict(flatten_values(read_metrics(root, task)[split])) for root in (tmp_path, trained[task]))
        assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("task", TASKS)
def test_evaluate_gives_the_document_metric_of_the_saved_model(trained, corpus, task):
    tokens, vocabulary = corpus / "tokens" / task, Vocabulary.read(corpus / "tokens" / task)
    model, texts = load_trained_model(task, trained[task] / "model"), SplitTexts(Documents(tokens / "test"), vocabulary)
    scores, _ = score_documents(model, make_objective(task, vocabulary), texts, np.arange(len(texts)), 16, 4096)
    figure = compute_ratio_with_error(scores.bits, scores.num_bytes)[0]
    assert figure == read_metrics(trained[task], task)["test"][METRIC[task]]


def test_evaluate_with_max_documents_counts_only_those(trained, run_toy, tmp_path):
    run_toy("baseline", "causal", tmp_path, "evaluate.max_documents=3")
    more = ["evaluate.max_documents=3", f"trained={trained['causal']}/model"]
    run_toy("evaluate", "causal", tmp_path, *more)
    metrics = read_metrics(tmp_path, "causal")
    assert [metrics[split]["documents"] for split in SPLITS] == [3, 3]
    assert metrics["test"]["bits_per_byte_se"] > read_metrics(trained["causal"], "causal")["test"]["bits_per_byte_se"]


@pytest.mark.parametrize("task", TASKS)
def test_evaluate_scores_have_one_row_per_document_from_which_the_metrics_follow(trained, corpus, task):
    metrics, raw = read_metrics(trained[task], task), pq.read_table(corpus / "raw/test.parquet")
    table = read_scores(trained[task] / "evaluation/test.parquet")
    assert table.schema.names == ["record", "source", "groups", "bytes", "tokens", "bits_before", "bits_after"]
    assert table.column("record").to_pylist() == list(range(len(raw)))
    assert table.select(["source", "groups"]) == raw.select(["source", "groups"])
    for name, bits in ((METRIC[task], "bits_after"), (f"base_{METRIC[task]}", "bits_before")):
        scores = get_scores(table, bits)
        assert compute_ratio_with_error(scores.bits, scores.num_bytes)[0] == metrics["test"][name]
    sizes = [len(record["text"][0].encode()) for record in raw.column("answers").to_pylist()]
    assert table.column("bytes").to_pylist() == sizes


@pytest.mark.parametrize("task", TASKS)
def test_evaluate_keeps_the_bits_of_tokens_which_add_up_to_the_scores(trained, corpus, task):
    vocabulary, documents = Vocabulary.read(corpus / "tokens" / task), Documents(corpus / "tokens" / task / "test")
    table = read_scores(trained[task] / "evaluation/test.parquet")
    tokens = pq.read_table(trained[task] / "evaluation/tokens/test.parquet")
    assert tokens.column("record") == table.column("record")
    for row, (ids, bits) in enumerate(zip(*(tokens.column(name) for name in ("input_ids", "bits")), strict=True)):
        assert ids.as_py() == vocabulary.select_text_tokens(documents[row]).tolist()
        assert math.fsum(bits.as_py()) == pytest.approx(table.column("bits_after")[row].as_py(), rel=1e-6)


@pytest.mark.parametrize("task", TASKS)
def test_evaluate_groups_have_the_figures_of_their_documents(trained, task):
    for split in SPLITS:
        whole = read_metrics(trained[task], task)[split]
        assert whole["groups"].keys() == {"source", "verb", "number"}
        (everything,) = whole["groups"]["source"].values()
        assert everything[METRIC[task]] == whole[METRIC[task]]
        assert whole["groups"]["verb"].keys() == {NONE, "shines because", "melts if", "moves while"}
        for values in whole["groups"].values():
            for count in ("documents", "tokens", "bytes"):
                assert sum(figures[count] for figures in values.values()) == whole[count]
            for bits, name in (("bits", METRIC[task]), ("base_bits", f"base_{METRIC[task]}")):
                total = math.fsum(figures[bits] for figures in values.values())
                assert total == pytest.approx(whole[name] * whole["bytes"], rel=1e-12)
        ones = whole["groups"]["number"].values()
        assert all(figures["documents"] == 1 and f"{METRIC[task]}_se" not in figures for figures in ones)


def test_evaluate_of_scores_of_other_documents_is_an_error_that_names_the_command(trained, run_toy, tmp_path):
    more = [f"out={tmp_path}/metrics.json", f"report={tmp_path}/evaluation", "evaluate.max_documents=3"]
    with pytest.raises(
        StageError, match=r"validation\.parquet has the scores of other documents.* `dvc repro baseline@causal`"
    ):
        run_toy("evaluate", "causal", trained["causal"], *more)
    assert not (tmp_path / "metrics.json").exists()


# -- texts that are only evaluated -------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=TASKS)
def with_texts(request, trained, run_toy, tmp_path_factory):
    """The task, and the outputs of baseline and evaluate with two additional sources."""
    root, task = tmp_path_factory.mktemp("texts"), request.param
    run_toy("baseline", task, root, "evaluate.texts=[held_out,split]")
    run_toy("evaluate", task, root, "evaluate.texts=[held_out,split]", f"trained={trained[task]}/model")
    return task, root


def test_evaluate_texts_have_figures_of_their_own_and_change_no_other(with_texts, trained):
    task, root = with_texts
    metrics, plain = read_metrics(root, task), read_metrics(trained[task], task)
    assert list(metrics) == [*SPLITS, "texts"]
    assert {split: metrics[split] for split in SPLITS} == plain
    assert (root / "metrics.json").read_bytes() == (trained[task] / "metrics.json").read_bytes()
    assert list(metrics["texts"]) == ["held_out", "split"]
    for figures in metrics["texts"].values():
        assert figures["documents"] == len(EXTRA_TEXTS)
        assert figures["bytes"] == sum(len(text.encode()) for text in EXTRA_TEXTS)
        assert figures[METRIC[task]] < figures[f"base_{METRIC[task]}"]
        assert LOSS[task] not in figures
    assert list(metrics["texts"]["split"]["groups"]["kind"]) == ["train", "validation", "test"]  # by size
    assert read_json(root / "baseline.json")[task]["texts"].keys() == {"held_out", "split"}


def test_evaluate_texts_have_the_bits_of_their_tokens_too(with_texts):
    _, root = with_texts
    table = read_scores(root / "evaluation/texts-held_out.parquet")
    bits = pq.read_table(root / "evaluation/tokens/texts-held_out.parquet").column("bits")
    np.testing.assert_allclose([math.fsum(row.as_py()) for row in bits], table.column("bits_after"), rtol=1e-6)


def test_evaluate_texts_in_one_file_and_in_three_give_the_same_scores(with_texts):
    _, root = with_texts
    whole, parts = (read_scores(root / f"evaluation/texts-{name}.parquet") for name in ("held_out", "split"))
    order = [0, 3, 1, 4, 2, 5]  # of the texts in three files
    assert parts.column("bytes").to_pylist() == [whole.column("bytes").to_pylist()[number] for number in order]
    np.testing.assert_allclose(parts.column("bits_after"), np.array(whole.column("bits_after"))[order], rtol=1e-6)
    assert set(whole.column("source").to_pylist()) == {"held_out"}


def test_evaluate_texts_are_encoded_as_tokenize_does(with_texts, corpus, trained, tmp_path):
    """A split that tokenize writes from the same records has the same scores to the last digit."""
    task, root = with_texts
    vocabulary = Vocabulary.read(corpus / "tokens" / task)
    file = TextFile(corpus / "sources/held_out/all.parquet", FLATTEN)
    encode = TokenizersEngine(load_tokenizer(corpus / "tokens" / task / "tokenizer"))
    tokenize_split(file, encode, vocabulary, tmp_path / "split", decoder=None)
    model, texts = (
        load_trained_model(task, trained[task] / "model"),
        SplitTexts(Documents(tmp_path / "split"), vocabulary),
    )
    scores, _ = score_documents(model, make_objective(task, vocabulary), texts, np.arange(len(texts)), 16, 4096)
    found = get_scores(read_scores(root / "evaluation/texts-held_out.parquet"), "bits_after")
    assert all(np.array_equal(one, other) for one, other in zip(scores, found, strict=True))


def test_evaluate_texts_of_at_most_max_documents_are_evenly_spaced(run_toy, tmp_path):
    run_toy("baseline", "causal", tmp_path, "evaluate.texts=[held_out,split]", "evaluate.max_documents=3")
    for name in ("held_out", "split"):
        table = read_scores(tmp_path / f"baseline/texts-{name}.parquet")
        assert table.column("record").to_pylist() == [0, 2, 4]


def test_baseline_of_texts_that_are_not_there_names_the_sources_of_params(run_toy, tmp_path, monkeypatch):
    params = tmp_path / "params.yaml"
    params.write_text("sources:\n  held_out: {name: files, path: a}\n  other: {name: files, path: b}\n")
    monkeypatch.setattr("stages.figures.texts.PARAMS", params)
    with pytest.raises(StageError, match=r"names missing, but .*/sources/missing has no records; .* held_out, other"):
        run_toy("baseline", "causal", tmp_path, "evaluate.texts=[missing]")
    assert not (tmp_path / "baseline.json").exists()


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("[a,a]", "evaluate.texts names a more than once"),
        ("[../raw]", 'evaluate.texts.0="../raw"'),
        ("['']", 'evaluate.texts.0=""'),
        ("held_out", 'evaluate.texts="held_out"'),
    ],
)
def test_evaluate_texts_that_are_no_list_of_plain_names_are_a_config_error(
    compose_stage, overrides, tmp_path, names, said
):
    with pytest.raises(ConfigError, match=re.escape(said)):
        compose_stage("evaluate", *overrides("evaluate", "causal", tmp_path, f"evaluate.texts={names}"))


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
    report = read_metrics(trained[task], task)
    headline = {"val": {short: report["validation"][METRIC[task]]}, "test": {short: report["test"][METRIC[task]]}}
    assert read_json(trained[task] / "metrics.json") == {task: headline}


# -- samples -----------------------------------------------------------------------------------------------------------


def sample_trained(trained, corpus, task, **settings):
    """Return the samples of the trained model."""
    defaults = {
        "causal": {"seed": 0, "max_new_tokens": 10, "temperature": 1.0, "top_k": 20, "prompts": ["Rain falls"]},
        "mlm": {"seed": 0, "top_k": 5, "prompts": ["Rain falls when {mask} cools."]},
    }
    tokens = corpus / "tokens" / task
    model = load_trained_model(task, trained[task] / "model")
    config = Samples(**{**defaults[task], **settings})
    return make_samples(config, task, model, 64, tokens / "tokenizer", Vocabulary.read(tokens), FLATTEN)


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
    samples = sample_trained(trained, corpus, task, prompts=[prompt])
    page = format_page(task, samples, samples)
    assert escape_controls(page) == page
    assert f"Rain {escape_controls(hostile)} falls" in page


def test_samples_of_a_causal_model_depend_only_on_the_seed(trained, corpus):
    first = sample_trained(trained, corpus, "causal")
    torch.rand(3)
    assert sample_trained(trained, corpus, "causal") == first
    assert sample_trained(trained, corpus, "causal", seed=1) != first


def test_samples_of_only_the_likeliest_token_are_transformers_greedy_completion(trained, corpus):
    tokens = corpus / "tokens" / "causal"
    tokenizer, end = load_tokenizer(tokens / "tokenizer"), Vocabulary.read(tokens).special["eos_token"]
    model = load_trained_model("causal", trained["causal"] / "model")
    given = torch.tensor([[end, *tokenizer.encode("Rain falls").ids]])
    settings = transformers.GenerationConfig(max_new_tokens=10, do_sample=False, eos_token_id=end, pad_token_id=end)
    greedy = model.generate(given, attention_mask=torch.ones_like(given), generation_config=settings)[0, 1:].tolist()
    completed = tokenizer.decode(greedy, skip_special_tokens=True).removeprefix("Rain falls")
    assert sample_trained(trained, corpus, "causal", top_k=1) == [{"prompt": "Rain falls", "completion": completed}]


def test_samples_longer_than_the_models_positions_end_there(trained, corpus):
    # The model has 64 positions, and at this temperature all tokens are alike, so that it rarely ends by itself.
    settings = {"temperature": 1e6, "top_k": 300, "seed": 1}
    at_64, beyond = (
        sample_trained(trained, corpus, "causal", max_new_tokens=number, **settings)[0]["completion"]
        for number in (60, 500)
    )
    assert len(beyond) >= len(at_64) > 60


def test_samples_of_a_masked_model_are_its_likeliest_tokens_in_order(trained, corpus):
    (sample,) = sample_trained(trained, corpus, "mlm", top_k=4)
    shares = [share for _, share in sample["tokens"]]
    assert len(shares) == 4
    assert shares == sorted(shares, reverse=True)
    assert 0.0 < sum(shares) <= 1.0


def test_samples_of_a_masked_model_agree_with_the_fill_mask_pipeline(trained, corpus):
    fill = transformers.pipeline("fill-mask", model=str(trained["mlm"] / "model"), device="cpu")
    expected = [item["score"] for item in fill("Rain falls when <mask> cools.", top_k=5)]
    (sample,) = sample_trained(trained, corpus, "mlm", prompts=["Rain falls when {mask} cools."])
    assert [share for _, share in sample["tokens"]] == pytest.approx(expected, rel=1e-5)


def test_samples_page_shows_each_prompt_before_and_after_training():
    before, after = ([{"prompt": "Why", "completion": text}] for text in (" a\nb", " because"))
    assert format_page("causal", before, after).splitlines()[2:] == [
        *("> before training: **Why** a", "> b", "", "> after training: **Why** because"),
    ]
    before, after = ([{"prompt": "a {mask}", "tokens": [["x|", share], ["y", 0.01]]}] for share in (0.5, 0.25))
    assert format_page("mlm", before, after).splitlines()[2:] == [
        "**a \\_\\_\\_**",
        "",
        "| before training | probability | after training | probability |",
        "|---|---|---|---|",
        "| `x\\|` | 50.0% | `x\\|` | 25.0% |",
        "| `y` | 1.0% | `y` | 1.0% |",
    ]


@pytest.mark.parametrize("task", TASKS)
def test_evaluate_shows_what_the_untrained_model_sample_trained(trained, task):
    before = read_json(trained[task] / "baseline/samples.json")
    page = (trained[task] / "samples.md").read_text()
    if task == "causal":
        assert all(escape_controls(sample["completion"]).split("\n")[0] in page for sample in before)
    else:
        shares = [f"{share:.1%}" for sample in before for _, share in sample["tokens"]]
        assert [row.split("|")[2].strip() for row in page.splitlines() if row.startswith("| `")] == shares


@pytest.mark.parametrize("changed", [[], [{"prompt": "other", "completion": "x"}], {}, [1]])
def test_evaluate_of_samples_of_other_prompts_says_what_to_run(trained, run_toy, tmp_path, changed):
    baseline = tmp_path / "baseline"
    shutil.copytree(trained["causal"] / "baseline", baseline)
    (baseline / "samples.json").write_text(json.dumps(changed))
    outs = [f"{name}={tmp_path}/{name}" for name in ("out", "samples_out", "report")]
    with pytest.raises(StageError, match=r"samples\.json is damaged"):
        run_toy("evaluate", "causal", trained["causal"], f"baseline={baseline}", *outs)


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
