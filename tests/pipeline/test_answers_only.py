"""Answers only, through the stages: what counts from the records to the metrics, the samples and the exported model."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import run_stage
from data_helpers import contents, read_stats, write_questions
from transformers import AutoTokenizer, TrainerCallback

from stages.core.artifacts import SPLITS
from stages.tokens.prompts import TRAINED_FORM
from stages.train.training import BlockTrainer

MODEL = ["model=tiny-gpt2", "model.config.n_layer=1", "model.config.n_embd=16", "model.config.n_head=2"]
RECORDS = [
    (f"Why is it number {number}?", "", [f"Because {number} comes after {number - 1}.", f"And before {number + 1}."])
    for number in range(40)
]
ANSWERS = [" ".join(answers) for _, _, answers in RECORDS]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/raw and the tokens, blocks and baseline of the task answers."""
    root = tmp_path_factory.mktemp("answers")
    for split in SPLITS:
        write_questions(root / f"raw/{split}.parquet", RECORDS)
    task = ["task=answers", "data=sample"]
    tokenizer = ["model=tiny-gpt2", "model.tokenizer.train.vocab_size=300"]
    run_stage("tokenize", *task, *tokenizer, "sources=null", "start=null", f"raw={root}/raw", f"out={root}/tokens")
    run_stage("group_texts", *task, "block_size=32", *paths(root, "raw", "tokens"), f"out={root}/blocks")
    run_stage(
        "baseline",
        *common(root),
        *MODEL,
        "start=null",
        "seed=1",
        *paths(root, "raw", "tokens"),
        f"out={root}/baseline.json",
        f"report={root}/baseline",
    )
    return root


def paths(root: Path, *names: str) -> list[str]:
    return [f"{name}={root}/{name}" for name in names]


def common(root: Path) -> list[str]:
    return [
        "task=answers",
        "data=sample",
        "hardware=cpu",
        "hardware.num_threads=1",
        "evaluate.context=32",
        "samples.max_new_tokens=6",
        f"sources={root}/sources",
    ]


def train(root: Path, out: Path, *more: str) -> None:
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
        *paths(root, "tokens", "blocks"),
        f"out={out}/model",
        f"report={out}/report",
        *more,
    )


def evaluate(root: Path, trained: Path, out: Path, *more: str) -> dict[str, float]:
    run_stage(
        "evaluate",
        *common(root),
        *paths(root, "tokens", "blocks", "baseline"),
        f"trained={trained}/model",
        f"out={out}/metrics.json",
        f"report={out}/evaluation",
        f"samples_out={out}/samples.md",
        *more,
    )
    return dict(json.loads((out / "evaluation/metrics.json").read_text())["answers"]["test"])


@pytest.fixture(scope="module")
def trained(prepared: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    train(prepared, out)
    return out


def test_metrics_are_over_the_answers_alone(prepared: Path, trained: Path, tmp_path: Path) -> None:
    figures = evaluate(prepared, trained, tmp_path)
    assert figures["bytes"] == sum(len(answer.encode()) for answer in ANSWERS)
    assert figures["bits_per_byte"] < figures["base_bits_per_byte"]
    scores = pq.read_table(tmp_path / "evaluation/test.parquet")
    assert scores.column("bytes").to_pylist() == [len(answer.encode()) for answer in ANSWERS]
    assert (
        sum(scores.column("tokens").to_pylist()) == figures["tokens"] < read_stats(prepared / "tokens/test")["tokens"]
    )


def test_metrics_are_over_all_text_when_asked(prepared: Path, trained: Path, tmp_path: Path) -> None:
    run_stage(
        "baseline",
        *common(prepared),
        *MODEL,
        "start=null",
        "seed=1",
        "+evaluate.include_prompts=true",
        *paths(prepared, "raw", "tokens"),
        f"out={tmp_path}/baseline.json",
        f"report={tmp_path}/baseline",
    )
    more = ["+evaluate.include_prompts=true", f"baseline={tmp_path}/baseline"]
    figures = evaluate(prepared, trained, tmp_path, *more)
    assert figures["bytes"] == read_stats(prepared / "tokens/test")["bytes"]
    assert figures["tokens"] == read_stats(prepared / "tokens/test")["text_tokens"]


def test_samples_answer_their_prompts(prepared: Path, trained: Path, tmp_path: Path) -> None:
    evaluate(prepared, trained, tmp_path)
    page = (tmp_path / "samples.md").read_text()
    assert page.count("**Why is the sky blue?**\n> \n> ") == 2  # before and after training


def test_exported_model_has_a_chat_template_that_gives_prompts_as_in_training(prepared: Path, trained: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained / "model")
    assert tokenizer.chat_template.startswith(TRAINED_FORM)
    talk = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    end = tokenizer.eos_token
    assert tokenizer.apply_chat_template(talk, tokenize=False) == f"{end}Why?\n\nSo.{end}"
    asked = tokenizer.apply_chat_template(talk[:1], tokenize=False, add_generation_prompt=True)
    assert asked == f"{end}Why?\n\n"


class Killed(BaseException):
    """What ends a run as SIGKILL would."""


@pytest.mark.parametrize("step", [1, 3, 6])
def test_training_on_answers_killed_ends_with_the_same_bytes(
    prepared: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    every = ["++trainer.save_strategy=steps", "++trainer.save_steps=1", "trainer.logging_steps=2"]
    train(prepared, tmp_path / "whole", *every)

    class Kill(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args, state, control, **_):  # type: ignore[no-untyped-def]
            if state.global_step > step:
                raise Killed

    original = BlockTrainer.train

    def train_and_die(self, *arguments, **named):  # type: ignore[no-untyped-def]
        self.add_callback(Kill())
        return original(self, *arguments, **named)

    monkeypatch.setattr(BlockTrainer, "train", train_and_die)
    with pytest.raises(Killed):
        train(prepared, tmp_path / "killed", *every)
    monkeypatch.undo()
    train(prepared, tmp_path / "killed", *every)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
