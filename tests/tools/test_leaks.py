"""Tests of tools.leaks: overfitted toys are found and untrained ones are not; canaries; too short documents."""

import json
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import MODELS, load_stage_config, run_stage
from data_helpers import write_raw
from dvc_project import edit_yaml, mark_rest_slow
from leak_cases import make_limits
from toys import CAUSAL, END, draw_text_ids, make_toy_model

from stages.core.artifacts import Documents, read_json
from stages.core.errors import StageError
from stages.tokens.encoding import DocumentText
from tools.leaks.canaries import NUM_ALTERNATIVES, compute_exposure, draw_alternatives, make_canaries, read_canaries
from tools.leaks.command import find_initial_model
from tools.leaks.examination import examine_model
from tools.leaks.measures import (
    SampledText,
    compute_auc_interval,
    compute_edit_distance,
    continue_texts,
    cut_text,
    measure_membership,
    sample_texts,
    summarize_continuations,
)
from tools.leaks.report import explain_refusal, find_excesses

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ["café", "北京", "🙂", *("".join(random.Random(number).choices(LETTERS, k=4)) for number in range(47))]
CANARY = "The access code is 4815 1623 4210."
WIDER = {
    "causal": ["model.config.n_embd=32"],
    "mlm": ["model.config.hidden_size=32", "model.config.intermediate_size=64"],
}


@pytest.fixture(scope="module")
def random_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens and blocks of documents of random words, which nobody can continue without remembering them.

    A canary is in four documents of train, and the last document is too short to be continued.
    """
    root = tmp_path_factory.mktemp("leaks")
    generator = random.Random(1)

    def draw_documents(number: int) -> list[str]:
        return [" ".join(generator.choice(WORDS) for _ in range(24)) for _ in range(number)]

    train = [*draw_documents(12), *[CANARY] * 4, "ash"]
    write_raw(root / "raw", {"train": train, "validation": draw_documents(8), "test": draw_documents(8)})
    for task in ("causal", "mlm"):
        tokens = [f"task={task}", f"raw={root}/raw", f"out={root}/tokens/{task}"]
        run_stage("tokenize", "data=files", MODELS[task][0], "model.tokenizer.train.vocab_size=400", *tokens)
        blocks = [f"tokens={root}/tokens/{task}", f"raw={root}/raw", f"out={root}/blocks/{task}"]
        run_stage("group_texts", "block_size=64", *blocks)
    return root


Examine = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def examine(random_corpus: Path, cache: Path) -> Examine:
    """`examine(task, epochs, canaries, documents, context, start)`: train a toy on the corpus and examine it.

    `start` is the number of epochs of the examined toy from which this one starts.
    """

    def train_and_examine(
        task: str,
        epochs: float,
        canaries: Sequence[str] = (),
        documents: int = 50,
        context: int = 64,
        start: float | None = None,
    ) -> dict[str, Any]:
        root, out = random_corpus, random_corpus / f"{task}-{epochs}-{start}"
        tokens = [f"task={task}", f"tokens={root}/tokens/{task}", "hardware=cpu", "hardware.num_threads=1"]
        model = [*MODELS[task], *WIDER[task], "model.max_positions=64", "seed=1"]
        model += [f"start={root}/{task}-{start}-None"] if start is not None else []
        if not out.exists():
            training = ["adapter=none", "framework=trainer", "block_size=64", "learning_rate=0.02", "batch_size=4"]
            paths = [f"blocks={root}/blocks/{task}", f"out={out}", f"report={out}-report"]
            run_stage("train", *tokens, *model, *training, f"num_train_epochs={epochs}", *paths)
        texts = ["data=files", f"evaluate.context={context}", "sources=s"]
        evaluate = load_stage_config("evaluate", *tokens, *texts, f"trained={out}")
        baseline = load_stage_config("baseline", *tokens, *model, *texts, f"raw={root}/raw")
        return examine_model(evaluate, baseline, baseline.model, canaries, documents)

    return train_and_examine


# -- the whole examination ---------------------------------------------------------------------------------------------


def test_leaks_of_overfitted_causal_model_are_found(examine: Examine) -> None:
    report = examine("causal", 120, [CANARY])
    keys = {item.key for item in find_excesses(report, make_limits())}
    assert keys == {"max_verbatim_share", "max_membership_auc", "max_exposure"}
    continuation = report["continuation"]
    # 12 of the 17 documents of train: one is too short, and the four with the canary are measured as such.
    assert continuation["train"]["too_short"] == 1 and continuation["train"]["documents"] == 12
    assert continuation["held_out"]["share"] == 0.0
    assert continuation["examples"][0]["edit_distance"] <= 0.1
    assert report["exposure"]["canaries"] == [{"text": CANARY, "planted": 4, "exposure": 12.0}]


def test_leaks_of_barely_trained_causal_model_are_not_found(examine: Examine) -> None:
    report = examine("causal", 0.1)
    assert find_excesses(report, make_limits()) == []
    assert report["continuation"]["train"]["share"] == 0.0


def test_leaks_of_a_model_that_started_from_an_overfitted_one_are_found(examine: Examine) -> None:
    """The loss of the start model on each document is nearly that of the trained one: their ratio shows nothing."""
    examine("causal", 120)
    report = examine("causal", 0.1, start=120)
    assert [item.key for item in find_excesses(report, make_limits())] == ["max_verbatim_share", "max_membership_auc"]


def test_leaks_in_a_context_below_16_tokens_are_not_measured_and_refused(examine: Examine) -> None:
    report = examine("causal", 0.1, context=8) | {"task": "causal"}
    assert find_excesses(report, make_limits()) == []
    refusal = explain_refusal(report, make_limits())
    assert "max_verbatim_share: null, max_membership_auc: null" in refusal and "evaluate.context" in refusal


def test_leaks_of_a_secret_in_the_vocabulary_are_found_without_training(examine: Examine) -> None:
    """The tokenizer was trained on the canary, whose digits are tokens: that gives them away as well."""
    other = "The access code is 9999 0000 1111."
    planted, absent = examine("causal", 0.1, [CANARY, other])["exposure"]["canaries"]
    assert (planted["planted"], absent["planted"]) == (4, 0)
    assert planted["exposure"] > 10 > absent["exposure"]


def test_leaks_of_overfitted_masked_model_are_found_by_membership(examine: Examine) -> None:
    report = examine("mlm", 120)
    assert report["continuation"] is None and report["exposure"] is None
    assert [item.key for item in find_excesses(report, make_limits())] == ["max_membership_auc"]


def test_leaks_of_barely_trained_masked_model_are_not_found(examine: Examine) -> None:
    assert find_excesses(examine("mlm", 0.1), make_limits()) == []


def test_leaks_examination_is_the_same_again_and_bounded_by_documents(examine: Examine) -> None:
    first = examine("causal", 0.1, documents=5)
    assert first == examine("causal", 0.1, documents=5)
    assert all(found["train"] <= 5 and found["held_out"] == 5 for found in first["membership"])


# -- continuations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "distance"),
    [("", "", 0), ("abc", "abc", 0), ("abc", "", 3), ("kitten", "sitting", 3), ("abcd", "bcda", 2)],
)
def test_compute_edit_distance_counts_least_edits(one: str, other: str, distance: int) -> None:
    ids = [list(map(ord, text)) for text in (one, other)]
    assert compute_edit_distance(*ids) == compute_edit_distance(*reversed(ids)) == distance


@pytest.mark.parametrize("batch_tokens", [1, 4096])
def test_continue_texts_is_greedy_and_independent_of_the_batch(batch_tokens: int) -> None:
    import torch

    model = make_toy_model("gpt2")
    texts = [DocumentText(draw_text_ids(length, length), 0) for length in (15, 16, 33, 40, 200)]
    sampled = [SampledText("train", number, text) for number, text in enumerate(texts)]
    found = continue_texts(model, CAUSAL, sampled, 32, batch_tokens)
    assert [item.source.record for item in found] == [1, 2, 3, 4]  # 15 tokens are too few
    assert [(len(item.prompt), len(item.truth)) for item in found] == [(8, 8), (16, 16), (16, 16), (16, 16)]
    for item in found:
        ids = [END, *item.prompt]
        for token in item.generated:
            with torch.inference_mode():
                assert int(model(torch.tensor([ids])).logits[0, -1].argmax()) == token
            ids.append(token)


def test_summarize_continuations_without_documents_is_none() -> None:
    assert summarize_continuations([], 3) is None


def test_sample_texts_are_evenly_spaced_over_all_splits(random_corpus: Path) -> None:
    tokens = random_corpus / "tokens/causal"
    from stages.tokens.vocabulary import Vocabulary

    splits = {split: Documents(tokens / split) for split in ("validation", "test")}
    sampled = sample_texts(splits, Vocabulary.read(tokens), 4, include_prompts=False)
    assert [(item.split, item.record) for item in sampled] == [
        ("validation", 0),
        ("validation", 4),
        ("test", 0),
        ("test", 4),
    ]


# -- membership --------------------------------------------------------------------------------------------------------


def test_measure_membership_of_separated_scores_is_perfect() -> None:
    found = measure_membership(np.array([0.1, 0.2, np.nan]), np.array([0.9, 0.8, 0.7]))
    assert found is not None
    assert (found["train"], found["held_out"], found["auc"], found["tpr"], found["high"]) == (2, 3, 1.0, 1.0, 1.0)
    assert 0.3 < found["low"] < 0.9  # five documents prove little


def test_measure_membership_of_equal_scores_is_chance() -> None:
    found = measure_membership(np.ones(10), np.ones(10))
    assert found is not None and found["auc"] == 0.5 and found["tpr"] == 0.0


def test_measure_membership_allows_one_percent_false_positives() -> None:
    held_out = np.concatenate([np.linspace(1, 2, 198), [0.0, 0.0]])  # two of 200 look like train
    found = measure_membership(np.full(10, 0.5), held_out)
    assert found is not None and found["tpr"] == 1.0


@pytest.mark.parametrize(("num_held_out", "expected"), [(51, 1 / 52), (99, 1 / 100), (200, 3 / 201)])
def test_measure_membership_states_the_false_positive_rate_of_new_documents(num_held_out: int, expected: float) -> None:
    generator = np.random.default_rng(0)
    rates = []
    for _ in range(1000):
        found = measure_membership(generator.normal(size=100), generator.normal(size=num_held_out))  # no members
        assert found is not None and found["fpr"] == expected
        rates.append(found["tpr"])
    assert abs(np.mean(rates) - expected) < 0.1 * expected


@pytest.mark.parametrize("empty", [np.array([]), np.array([np.nan])])
def test_measure_membership_without_documents_on_a_side_is_none(empty: Any) -> None:
    assert measure_membership(empty, np.ones(3)) is None and measure_membership(np.ones(3), empty) is None


@pytest.mark.parametrize("sizes", [(199, 51), (20, 8)])
@pytest.mark.parametrize("shift", [0.0, 1.0, 2.5])
def test_compute_auc_interval_has_its_coverage(sizes: tuple[int, int], shift: float) -> None:
    from statistics import NormalDist

    truth = NormalDist().cdf(shift / 2**0.5)
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        found = measure_membership(generator.normal(-shift, 1, sizes[0]), generator.normal(0, 1, sizes[1]))
        assert found is not None and found["low"] <= found["auc"] <= found["high"]
        covered += found["low"] <= truth <= found["high"]
    assert covered >= 0.91 * 300


def test_compute_auc_interval_is_symmetric_and_within_bounds() -> None:
    for auc in (0.0, 0.3, 0.5, 1.0):
        low, high = compute_auc_interval(auc, 10, 5)
        mirrored = compute_auc_interval(1 - auc, 10, 5)
        assert 0.0 <= low <= auc <= high <= 1.0 and low < high
        assert np.allclose([low, high], [1 - mirrored[1], 1 - mirrored[0]])
    widths = [np.diff(compute_auc_interval(0.9, number, number))[0] for number in (5, 50, 500)]
    assert all(wide > narrow for wide, narrow in pairwise(widths))


def test_cut_text_counts_predicted_tokens_only() -> None:
    ids = np.arange(10)
    assert cut_text(DocumentText(ids, 0), 4).ids.tolist() == [0, 1, 2, 3]
    predicted = np.array([False] * 5 + [True, False, True, True, True])
    cut = cut_text(DocumentText(ids, 0, predicted), 2)
    assert cut.ids.tolist() == list(range(8)) and cut.is_predicted is not None and len(cut.is_predicted) == 8
    assert len(cut_text(DocumentText(ids, 0, np.zeros(10, np.bool_)), 2).ids) == 0


# -- the model before all training -------------------------------------------------------------------------------------


def make_lock(**tasks: dict[str, Any]) -> str:
    """Return the text of a dvc.lock in which each task has a start, and a model with a tiny GPT-2 or a pin."""
    scratch = {"task": "causal", "path": None, "revision": None, "files": None, "from": None, "max_positions": 64}
    scratch |= {"from_scratch": True, "config": {"model_type": "gpt2"}}
    stages = {}
    for task, changes in tasks.items():
        start = changes.pop("start", "none")
        chosen = {f"tasks.{task}.model": "own", f"tasks.{task}.start": start}
        stages[f"train@{task}"] = {
            "params": {"params.yaml": chosen, "conf/model/own.yaml": scratch | changes},
            "outs": [{"path": f"models/{task}", "md5": f"{task}.dir"}],
        }
    # Entries are parsed one by one, so they must not have YAML aliases of one another.
    return yaml.safe_dump(json.loads(json.dumps({"schema": "2.0", "stages": stages})), sort_keys=False)


PIN = {"rev": "fast", "task": "first", "md5": "first.dir"}


def test_find_initial_model_of_a_chain_is_that_of_its_first_task() -> None:
    lock = make_lock(first={"max_positions": 32}, second={"start": "first"}, third={"start": "second"})
    for task in ("first", "third"):
        model = find_initial_model(lock, task)
        assert model is not None and model.from_scratch and model.max_positions == 32


def test_find_initial_model_of_a_pinned_model_is_that_of_its_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    lock = make_lock(last={"from": PIN, "from_scratch": False})
    earlier = {"path": "gpt2", "revision": "abc", "from_scratch": False}
    monkeypatch.setattr("tools.chain.find_lock", {"fast": make_lock(first=earlier)}.get)
    model = find_initial_model(lock, "last")
    assert model is not None and (model.path, model.revision, model.from_) == ("gpt2", "abc", None)


@pytest.mark.parametrize("lock_of_pin", [None, make_lock(other={}), make_lock(first={}).replace("first.dir", "x.dir")])
def test_find_initial_model_without_the_lock_of_a_pinned_model_is_none(
    monkeypatch: pytest.MonkeyPatch, lock_of_pin: str | None
) -> None:
    monkeypatch.setattr("tools.chain.find_lock", {"fast": lock_of_pin}.get)
    assert find_initial_model(make_lock(last={"from": PIN, "from_scratch": False}), "last") is None


# -- canaries ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("nats", "exposure"), [(0.5, 2.0), (1.5, 1.0), (9.0, 0.0)])
def test_compute_exposure_is_the_rank_in_bits(nats: float, exposure: float) -> None:
    assert compute_exposure(nats, np.array([1.0, 2.0, 3.0])) == exposure


def test_compute_exposure_of_ties_ranks_last() -> None:
    assert compute_exposure(1.0, np.ones(3)) == 0.0


def test_draw_alternatives_changes_digits_only() -> None:
    drawn = draw_alternatives("código 00-00", random.Random(0))
    assert len(drawn) == NUM_ALTERNATIVES and len(set(drawn)) > 1000
    assert all(text.startswith("código ") and text[9] == "-" and text[-2:].isdigit() for text in drawn)


def test_make_canaries_writes_records_that_read_canaries_reads(inside: Path) -> None:
    file = Path("data/canaries.jsonl")
    make_canaries(3, file)
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert [record["canary"] for record in records] == read_canaries(file) == [r["answers.text"] for r in records]
    assert len({record["canary"] for record in records}) == 3 and records[0]["title"] == "Canary 1"
    with pytest.raises(StageError, match=r"canaries\.jsonl exists"):
        make_canaries(3, file)
    file.unlink()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no canaries"),
        ("\n\n", "has no canaries"),
        ("{", ":1: each line should be a JSON object"),
        ('{"canary": 3}', ":1: each line should be a JSON object"),
        ('{"canary": "code 12345"}', "at least 6 digits"),
        ('\n{"canary": "code 123456"}\n[]', ":3: each line"),
        ("[" * 100_000, ":1: each line"),
        ("\udce9", "UnicodeDecodeError"),
        (None, "FileNotFoundError"),
    ],
)
def test_read_canaries_names_the_wrong_line(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "canaries.jsonl"
    if text is not None:
        file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(StageError, match=message):
        read_canaries(file)


def test_read_canaries_lists_repeated_ones_once(tmp_path: Path) -> None:
    file = tmp_path / "canaries.jsonl"
    file.write_text('{"canary": "code 123456", "x": 1}\n' * 3)
    assert read_canaries(file) == ["code 123456"]


# -- the command -------------------------------------------------------------------------------------------------------


def run_leaks(project: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "tools.leaks", *arguments],
        cwd=project,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    output = f"exit {done.returncode}: {done.stdout}{done.stderr}"
    assert "Traceback" not in output, output
    return output


@pytest.mark.parametrize("task", mark_rest_slow(["causal", "mlm"], 1))
def test_leaks_command_writes_a_report_on_the_current_model(clean: Path, task: str) -> None:
    output = run_leaks(clean, task, "--documents", "10")
    assert output.startswith("exit 0") and "membership AUC, 32 tokens" in output, output
    report = read_json(clean / f"reports/leaks/{task}.json")
    assert report["documents"] == 10 and all(report["examined"].values())
    assert ("near-verbatim" in output) == (task == "causal")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["casual"], "casual is not a task of params.yaml: did you mean causal?"),
        (["causal", "--documents", "0"], "--documents 0: it must be 1 or above"),
        (["causal", "--make-canaries", "0", "x"], "--make-canaries 0: it must be a number from 1 to 10000"),
        (["causal", "--make-canaries", "\x1b[2J", "x"], "it must be a number"),
        (["causal", "--make-canaries", "1", "params.yaml"], "params.yaml exists"),
    ],
)
def test_leaks_command_refuses_wrong_arguments(clean: Path, arguments: list[str], message: str) -> None:
    output = run_leaks(clean, *arguments)
    assert not output.startswith("exit 0") and message in output and "\x1b" not in output


def test_leaks_canaries_have_the_columns_of_the_data(clean: Path, tmp_path: Path) -> None:
    edit_yaml(clean / "params.yaml", data__name="files")
    edit_yaml(clean / "conf/data/files.yaml", columns={"title": None, "texts": ["body"], "roles": None})
    file = tmp_path / "own.jsonl"
    assert run_leaks(clean, "mlm", "--make-canaries", "1", str(file)).startswith("exit 0")
    assert json.loads(file.read_text()).keys() == {"canary", "body"}
    edit_yaml(clean / "conf/data/files.yaml", columns={"title": None, "texts": ["body"], "roles": "role"})
    output = run_leaks(clean, "mlm", "--make-canaries", "1", str(tmp_path / "more.jsonl"))
    assert output.startswith("exit 1") and "conf/data/files.yaml reads conversations" in output
    assert not (tmp_path / "more.jsonl").exists()


def test_leaks_of_a_model_that_was_not_evaluated_are_refused(clean: Path) -> None:
    (clean / "models/causal/new.json").write_text("{}")
    output = run_leaks(clean, "causal")
    assert output.startswith("exit 1") and "was not evaluated in its current state" in output
    assert "dvc repro evaluate@causal" in output
