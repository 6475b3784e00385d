"""The guide's data set and models from a Hub, through the whole pipeline with the real DVC."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from data_helpers import CAUSAL_TOKENS, MLM_TOKENS, contents
from dvc_project import ALL, ROOT, TASKS, edit, run, stages_run
from hub_cases import COMMIT, parquet
from mini_hub import MiniHub

from stages.tokens.schema import TrainedTokenizer
from stages.tokens.vocabulary import train_tokenizer

VOCABULARY = 400


def questions() -> list[Any]:
    """The embedded sample with the columns of ELI5-Category."""
    file = ROOT / "data/sample/askscience.jsonl"
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [
        {
            **{key: record[key] for key in ("q_id", "title", "selftext", "subreddit")},
            "category": ("Biology", "Physics")[number % 2],
            "answers": {**record["answers"], "text_urls": [[] for _ in record["answers"]["text"]]},
            "title_urls": ["url"],
            "selftext_urls": ["url"],
        }
        for number, record in enumerate(records)
    ]


def small_model(task: str, directory: Path) -> dict[str, bytes]:
    """Files of a model of the architecture and the positions that the guide's has, but small."""
    from transformers import GPT2Config, GPT2LMHeadModel, RobertaConfig, RobertaForMaskedLM

    special = CAUSAL_TOKENS if task == "causal" else MLM_TOKENS
    texts = [text for row in questions() for text in row["answers"]["text"]]
    train_tokenizer(TrainedTokenizer(vocab_size=VOCABULARY, special_tokens=special), iter([texts]), directory)
    if task == "causal":
        model: Any = GPT2LMHeadModel(
            GPT2Config(vocab_size=VOCABULARY, n_positions=1024, n_embd=16, n_layer=1, n_head=2)
        )
    else:
        model = RobertaForMaskedLM(
            RobertaConfig(
                vocab_size=VOCABULARY,
                max_position_embeddings=514,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
            )
        )
    model.save_pretrained(directory)
    return contents(directory)


@pytest.mark.slow
def test_hub_pipeline_of_the_guides_data_and_models_runs_and_names_every_revision(clean: Path, tmp_path: Path) -> None:
    models = {"causal": "distilgpt2", "mlm": "distilroberta"}
    confs = {task: yaml.safe_load((ROOT / f"conf/model/{name}.yaml").read_text()) for task, name in models.items()}
    repositories = {
        conf["path"]: {conf["revision"]: small_model(task, tmp_path / task)} for task, conf in confs.items()
    }
    repositories["datasets/dany0407/eli5_category"] = {
        COMMIT: {"data/train-00000-of-00001.parquet": parquet(questions())}
    }
    edit(clean / "params.yaml", data__name="eli5_category", causal__model="distilgpt2", mlm__model="distilroberta")
    edit(clean / "conf/data/eli5_category.yaml", filter={"category": ["Physics"]}, max_records=80)
    with MiniHub(repositories, branches={"main": COMMIT}).serve() as url:
        hub = ("env", "HF_HUB_OFFLINE=0", f"HF_ENDPOINT={url}", f"HF_HOME={tmp_path}/hf", "NO_PROXY=127.0.0.1")
        assert stages_run(run(clean, *hub, "dvc", "repro")) == ALL
    assert stages_run(run(clean, "dvc", "repro")) == set()

    def ledger(name: str) -> Any:
        return json.loads((clean / name / "stats.json").read_text())

    data = ledger("data/raw")
    assert data["source"] == {"hub": "dany0407/eli5_category", "revision": "main", "commit": COMMIT}
    assert (sum(data["records_out"].values()), data["records_skipped"]["filtered"]) == (80, 80)
    for task, conf in confs.items():
        pin = {key: conf[key] for key in ("path", "revision")}
        assert ledger(f"data/tokens/{task}")["tokenizer"] == ledger(f"reports/train/{task}")["model"] == pin
        figures = json.loads((clean / f"metrics/{task}.json").read_text())[task]["test"]
        assert figures["documents"] > 0 and figures["loss" if task == "causal" else "masked_loss"] > 0
    assert set(TASKS) == set(confs)
