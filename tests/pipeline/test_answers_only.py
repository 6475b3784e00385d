"""Training on answers only, from the records to the metrics, samples and exported model."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import run_stage
from data_helpers import read_contents, read_stats, write_questions
from transformers import AutoTokenizer, TrainerCallback

from stages.core.artifacts import SPLITS
from stages.tokens.prompts import TRAINED_FORM_COMMENT
from stages.train.training import BlockTrainer

MODEL = ["model=tiny-gpt2", "model.config.n_layer=1", "model.config.n_embd=16", "model.config.n_head=2"]
RECORDS = [
    (f"Why is it number {number}?", "", [f"Because {number} comes after {number - 1}.", f"And before {number + 1}."])
    for number in range(40)
]
ANSWERS = [" ".join(answers) for _, _, answers in RECORDS]


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with the raw data, and the tokens, blocks and baseline of the task answers."""
    root = tmp_path_factory.mktemp("answers")
    for split in SPLITS:
        write_questions(root / f"raw/{split}.parquet", RECORDS)
    task = ["task=answers", "data=sample"]
    tokenizer = ["model=tiny-gpt2", "model.tokenizer.train.vocab_size=300"]
    run_stage("tokenize", *task, *tokenizer, "sources=null", "start=null", f"raw={root}/raw", f"out={root}/tokens")
    run_stage("group_texts", *task, "block_size=32", *build_path_overrides(root, "raw", "tokens"), f"out={root}/blocks")
    run_stage(
        "baseline",
        *build_common_overrides(root),
        *MODEL,
        "start=null",
        "seed=1",
        *build_path_overrides(root, "raw", "tokens"),
        f"out={root}/baseline.json",
        f"report={root}/baseline",
    )
    return root


def build_path_overrides(root: Path, *names: str) -> list[str]:
    return [f"{name}={root}/{name}" for name in names]


def build_common_overrides(root: Path) -> list[str]:
    return [
        "task=answers",
        "data=sample",
        "hardware=cpu",
        "hardware.num_threads=1",
        "evaluate.context=32",
        "samples.max_new_tokens=6",
        f"sources={root}/sources",
    ]


def run_train(root: Path, out: Path, *more: str) -> None:
    run_stage(
        "train",
        "task=answers",
        "hardware=cpu",
        "hardware.num_threads=1",
        "adapter=none",
        "framework=trainer",
        *MODEL,
        "start=null",
        "seed=1",
        "block_size=32",
        "learning_rate=0.01",
        "num_train_epochs=2",
        "batch_size=8",
        *build_path_overrides(root, "tokens", "blocks"),
        f"out={out}/model",
        f"report={out}/report",
        *more,
    )


def run_evaluate(root: Path, trained_root: Path, out: Path, *more: str) -> dict[str, float]:
    run_stage(
        "evaluate",
        *build_common_overrides(root),
        *build_path_overrides(root, "tokens", "blocks", "baseline"),
        f"trained={trained_root}/model",
        f"out={out}/metrics.json",
        f"report={out}/evaluation",
        f"samples_out={out}/samples.md",
        *more,
    )
    return dict(json.loads((out / "evaluation/metrics.json").read_text())["answers"]["test"])


@pytest.fixture(scope="module")
def trained_root(data_root: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    run_train(data_root, out)
    return out


def test_metrics_cover_only_the_answers(data_root: Path, trained_root: Path, tmp_path: Path) -> None:
    metrics = run_evaluate(data_root, trained_root, tmp_path)
    assert metrics["bytes"] == sum(len(answer.encode()) for answer in ANSWERS)
    assert metrics["bits_per_byte"] < metrics["base_bits_per_byte"]
    scores = pq.read_table(tmp_path / "evaluation/test.parquet")
    assert scores.column("bytes").to_pylist() == [len(answer.encode()) for answer in ANSWERS]
    assert (
        sum(scores.column("tokens").to_pylist()) == metrics["tokens"] < read_stats(data_root / "tokens/test")["tokens"]
    )


def test_metrics_with_include_prompts_cover_all_text(data_root: Path, trained_root: Path, tmp_path: Path) -> None:
    run_stage(
        "baseline",
        *build_common_overrides(data_root),
        *MODEL,
        "start=null",
        "seed=1",
        "+evaluate.include_prompts=true",
        *build_path_overrides(data_root, "raw", "tokens"),
        f"out={tmp_path}/baseline.json",
        f"report={tmp_path}/baseline",
    )
    more = ["+evaluate.include_prompts=true", f"baseline={tmp_path}/baseline"]
    metrics = run_evaluate(data_root, trained_root, tmp_path, *more)
    assert metrics["bytes"] == read_stats(data_root / "tokens/test")["bytes"]
    assert metrics["tokens"] == read_stats(data_root / "tokens/test")["text_tokens"]


def test_samples_answer_their_prompts(data_root: Path, trained_root: Path, tmp_path: Path) -> None:
    run_evaluate(data_root, trained_root, tmp_path)
    page = (tmp_path / "samples.md").read_text()
    assert page.count("**Why is the sky blue?**\n> \n> ") == 2  # before and after training


def test_exported_chat_template_formats_prompts_as_in_training(data_root: Path, trained_root: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained_root / "model")
    assert tokenizer.chat_template.startswith(TRAINED_FORM_COMMENT)
    talk = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    end = tokenizer.eos_token
    assert tokenizer.apply_chat_template(talk, tokenize=False) == f"{end}Why?\n\nSo.{end}"
    asked = tokenizer.apply_chat_template(talk[:1], tokenize=False, add_generation_prompt=True)
    assert asked == f"{end}Why?\n\n"


class SimulatedKill(BaseException):
    """Exception that ends a run as SIGKILL would."""


@pytest.mark.parametrize("step", [1, 3, 6])
def test_training_on_answers_after_a_kill_ends_with_the_same_bytes(
    data_root: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    every = ["++trainer.save_strategy=steps", "++trainer.save_steps=1", "trainer.logging_steps=2"]
    run_train(data_root, tmp_path / "whole", *every)

    class Kill(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args, state, control, **_):  # type: ignore[no-untyped-def]
            if state.global_step > step:
                raise SimulatedKill

    original = BlockTrainer.train

    def train_and_die(self, *arguments, **named):  # type: ignore[no-untyped-def]
        self.add_callback(Kill())
        return original(self, *arguments, **named)

    monkeypatch.setattr(BlockTrainer, "train", train_and_die)
    with pytest.raises(SimulatedKill):
        run_train(data_root, tmp_path / "killed", *every)
    monkeypatch.undo()
    run_train(data_root, tmp_path / "killed", *every)
    assert read_contents(tmp_path / "killed") == read_contents(tmp_path / "whole")
