"""Fixtures for tests of the model stages: a toy corpus, processed by the data stages once per session."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from dvc_project import clean, inside, project  # noqa: F401 (fixtures of several files)

from stages.core.environment import find_result_variables

for _name in find_result_variables():  # stages ignore them with a warning, which tests of messages do not expect
    del os.environ[_name]

TASKS = ("causal", "mlm")
BLOCK_SIZES = (8, 16)
SUBJECTS = ("Rain", "A café", "The Moon", "Salt", "A magnet", "日本 tea")
VERBS = ("falls when", "shines because", "melts if", "moves while")
CAUSES = ("air cools", "light bends", "water warms up", "the field — which is weak — turns")

EXTRA_TEXTS = [
    "The Moon melts if salt cools.",
    "naïve café 北京 🙂",
    "a",
    "Rain shines because the field turns water warm, " * 4,
    "Tea bends light. <|endoftext|><mask>",
    "Salt.",
]

MODELS = {
    "causal": [
        "model=tiny-gpt2",
        *(f"model.config.{key}" for key in ("n_positions=64", "n_embd=16", "n_layer=1", "n_head=2")),
    ],
    "mlm": [
        "model=tiny-roberta",
        "model.config.max_position_embeddings=66",
        "model.config.hidden_size=16",
        "model.config.intermediate_size=32",
        "model.config.num_hidden_layers=1",
        "model.config.num_attention_heads=2",
    ],
}


def load_stage_config(stage: str, *overrides: str) -> Any:
    """Return the config of `stage` for these command-line overrides."""
    from stages.core.compose import compose_config, load_config
    from tools.check import get_config_class

    return load_config(get_config_class(stage), compose_config(stage, overrides))


def run_stage(stage: str, *overrides: str) -> None:
    """Run `stage` in this process with these command-line overrides."""
    import importlib

    config = load_stage_config(stage, *overrides)
    importlib.import_module(f"stages.{stage}.stage").main(config)


@pytest.fixture(scope="session")
def compose_stage() -> Callable[..., Any]:
    """`compose_stage(stage, *overrides)`: the stage's config."""
    return load_stage_config


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/raw, data/tokens/TASK and data/blocks-SIZE/TASK of 72 one-sentence documents, grouped by verb and number.

    Two sources that are only evaluated, data/sources/{held_out,split}: EXTRA_TEXTS in all.parquet and in three files.
    """
    from data_helpers import write_records

    root = tmp_path_factory.mktemp("corpus")
    sentences = [f"{subject} {verb} {cause}." for subject in SUBJECTS for verb in VERBS for cause in CAUSES][::-1]
    splits = {"train": sentences[::2], "validation": sentences[1::4], "test": sentences[3::4]}
    for split, texts in splits.items():
        verbs = [next((verb for verb in VERBS[1:] if verb in text), None) for text in texts]
        groups = {"verb": verbs, "number": [str(number) for number in range(len(texts))]}
        write_records(root / "raw" / f"{split}.parquet", texts, groups)
    write_records(root / "sources/held_out/all.parquet", EXTRA_TEXTS, sources=["held_out"] * len(EXTRA_TEXTS), rows=2)
    for start, split in enumerate(("train", "validation", "test")):
        write_records(root / f"sources/split/{split}.parquet", EXTRA_TEXTS[start::3], {"kind": [split] * 2})
    for task in TASKS:
        run_stage(
            "tokenize",
            f"task={task}",
            "data=files",
            MODELS[task][0],
            "model.tokenizer.train.vocab_size=300",
            f"raw={root}/raw",
            f"out={root}/tokens/{task}",
        )
        for size in BLOCK_SIZES:
            run_stage(
                "group_texts",
                f"block_size={size}",
                f"tokens={root}/tokens/{task}",
                f"raw={root}/raw",
                f"out={root}/blocks-{size}/{task}",
            )
    return root


@pytest.fixture(scope="session")
def overrides(corpus: Path) -> Callable[..., list[str]]:
    """`overrides(stage, task, out, *more)`: the overrides of a stage for the toy corpus, with outputs below `out`."""

    def command(stage: str, task: str, out: Path, *more: str) -> list[str]:
        common = [f"task={task}", "hardware=cpu", "hardware.num_threads=1", f"tokens={corpus}/tokens/{task}"]
        model = [*MODELS[task], "model.max_positions=64", "seed=42"]
        windows = ["data=files", "evaluate.context=16", f"sources={corpus}/sources"]
        adapter = [] if any(item.startswith("adapter=") for item in more) else ["adapter=none"]
        framework = [] if any(item.startswith("framework=") for item in more) else ["framework=trainer"]
        training = [*adapter, *framework, "block_size=16", "learning_rate=0.01", "num_train_epochs=2", "batch_size=8"]
        files = {
            "baseline": [f"raw={corpus}/raw", f"out={out}/baseline.json", f"report={out}/baseline"],
            "train": [f"blocks={corpus}/blocks-16/{task}", f"out={out}/model", f"report={out}/report"],
            "evaluate": [
                f"trained={out}/model",
                f"blocks={corpus}/blocks-16/{task}",
                f"baseline={out}/baseline",
                f"out={out}/metrics.json",
                f"report={out}/evaluation",
                f"samples_out={out}/samples.md",
            ],
        }
        samples = ["samples.max_new_tokens=8"] if task == "causal" else []
        own = {
            "baseline": [*model, *windows, *samples],
            "train": [*model, *training],
            "evaluate": [*windows, *samples],
        }
        return [*common, *own[stage], *files[stage], *more]

    return command


@pytest.fixture(scope="session")
def run_toy(overrides: Callable[..., list[str]]) -> Callable[..., None]:
    """`run_toy(stage, task, out, *more)`: run a stage on the toy corpus."""

    def run(stage: str, task: str, out: Path, *more: str) -> None:
        run_stage(stage, *overrides(stage, task, out, *more))

    return run


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory for checkpoints other than the user's."""
    directory = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LM_REPRO_CACHE", str(directory))
        yield directory


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, run_toy: Callable[..., None], cache: Path) -> dict[str, Path]:
    """Task to a directory with the outputs of baseline, train and evaluate."""
    roots = {task: tmp_path_factory.mktemp(f"trained-{task}") for task in TASKS}
    for task, root in roots.items():
        for stage in ("baseline", "train", "evaluate"):
            run_toy(stage, task, root)
    return roots
