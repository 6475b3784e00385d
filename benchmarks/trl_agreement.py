"""Compare the loss and gradients of answers only with TRL's completion-only SFTTrainer, for one model and data.

Command python -m benchmarks.trl_agreement [--records data/sample/askscience.jsonl] [--number 8]
Needs   uv pip install trl

TRL receives the pipeline's token ids and completion masks. (TRL would tokenize a prompt and its completion as one text,
and it warns that tokens merge across their boundary.) The benchmark compares the labels of TRL's first batch, the loss
in fp32 (in TRL the model's loss in transformers, in the pipeline a sum over chunks of the output embedding), and all
gradients. The last line printed is one JSON object.
"""

import argparse
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from stages.core.artifacts import Documents
from stages.download.files import find_files
from stages.download.records import build_record, record_schema
from stages.download.schema import Columns
from stages.download.sources import read_file_rows
from stages.model.loss import TokenLoss
from stages.model.masking import IGNORED
from stages.model.objectives import make_objective
from stages.model.schema import ObjectiveConfig
from stages.tokenize.stage import tokenize_split
from stages.tokens.encoding import TokenizersEngine
from stages.tokens.schema import TrainedTokenizer
from stages.tokens.texts import Flatten, TextFile
from stages.tokens.vocabulary import build_vocabulary, load_tokenizer, train_tokenizer

FLATTEN = Flatten(prompt=["title", "selftext"], completion=["answers.text"])
PAD_ID, MAX_LENGTH = 1, 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--records", default="data/sample/askscience.jsonl")
    parser.add_argument("--number", type=int, default=8, help="number of records, all in one batch")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        pairs = write_records(arguments, root / "records.parquet")
        roles = {"eos_token": "<|endoftext|>", "pad_token": "<pad>"}
        texts = iter([[text for pair in pairs for text in pair]])
        train_tokenizer(TrainedTokenizer(vocab_size=1024, special_tokens=roles), texts, root / "tokenizer")
        torch.manual_seed(0)
        config = AutoConfig.for_model("gpt2", n_embd=64, n_layer=2, n_head=4, n_positions=1024, vocab_size=1024)
        config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
        AutoModelForCausalLM.from_config(config).save_pretrained(root / "model")
        our_ids, our_labels, our_loss, our_gradients = run_pipeline(root)
        ids, labels, loss, gradients = run_trl(root, our_ids, our_labels)
    difference = max(float((one - other).abs().max()) for one, other in zip(gradients, our_gradients, strict=True))
    result = {
        "records": len(pairs),
        "tokens": int((ids != PAD_ID).sum()),
        "counted": int((labels != IGNORED).sum()),
        "same_ids": bool((ids == our_ids).all()),
        "same_labels": bool((labels == our_labels).all()),
        "difference_of_loss": abs(loss - our_loss),
        "loss_trl": loss,
        "loss": our_loss,
        "largest_difference_of_gradients": difference,
        "largest_gradient": max(float(gradient.abs().max()) for gradient in gradients),
    }
    print(json.dumps(result))


def write_records(arguments: argparse.Namespace, file: Path) -> list[tuple[str, str]]:
    """Write the first records as download does, and return their prompts and completions."""
    rows = (row for system, name in find_files(arguments.records) for row in read_file_rows(system, name))
    records = [
        build_record(row.value, Columns(title="title", texts=["answers.text"]))[0] | {"source": "records"}
        for row in itertools.islice(rows, arguments.number)
    ]
    pq.write_table(pa.Table.from_pylist(records, schema=record_schema([])), file)
    return [
        (" ".join(filter(None, [record["title"], record["selftext"]])) + "\n\n", " ".join(record["answers"]["text"]))
        for record in records
    ]


def run_trl(
    root: Path, ids: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, float, list[torch.Tensor]]:
    """Return token ids and labels, both `[num_records, length]`, int64, loss and gradients of TRL's first batch.

    Args:
        ids: token ids of the pipeline, `[num_records, length]`, padded with PAD_ID.
        labels: labels of the pipeline, of the same shape; IGNORED outside completions.
    """
    model = AutoModelForCausalLM.from_pretrained(root / "model")
    rows = [
        {
            "input_ids": row[row != PAD_ID].tolist(),
            "completion_mask": (row_labels[row != PAD_ID] != IGNORED).long().tolist(),
        }
        for row, row_labels in zip(ids, labels, strict=True)
    ]
    settings: dict[str, Any] = {
        "output_dir": str(root / "trl"),
        "completion_only_loss": True,
        "per_device_train_batch_size": len(rows),
        "max_length": 1024,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "gradient_checkpointing": False,
        "train_sampling_strategy": "sequential",
    }
    trainer = SFTTrainer(
        model,
        SFTConfig(**settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(root / "tokenizer"),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    model.train()
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return batch["input_ids"], batch["labels"], loss.item(), gradients


def run_pipeline(root: Path) -> tuple[torch.Tensor, torch.Tensor, float, list[torch.Tensor]]:
    """Return the same as `run_trl` for the pipeline; one document per row, cut to MAX_LENGTH or padded."""
    tokenizer = load_tokenizer(root / "tokenizer")
    vocabulary = build_vocabulary(tokenizer, root / "tokenizer", "end_of_sequence", ["eos_token"])
    texts = TextFile(root / "records.parquet", FLATTEN)
    tokenize_split(texts, TokenizersEngine(tokenizer), vocabulary, root / "tokens", decoder=None)
    documents = Documents(root / "tokens")
    length = min(MAX_LENGTH, max(len(documents[number]) + 1 for number in range(len(documents))))
    # `ids` and `marks` are [num_documents, length]; a mark of 0 is a token of the prompt or padding.
    ids = np.full((len(documents), length), PAD_ID, np.uint16)
    marks = np.zeros((len(documents), length), np.uint8)
    for number in range(len(documents)):
        # A row starts with the end of the previous document; the first document already includes its lead.
        lead = vocabulary.lead if number else []
        own_marks = documents.get_marks(number)
        assert own_marks is not None
        row = np.concatenate([lead, documents[number]])[:length]
        ids[number, : len(row)] = row
        marks[number, : len(row)] = np.concatenate([[0] * len(lead), own_marks])[:length]
    model = AutoModelForCausalLM.from_pretrained(root / "model")
    model.train()
    objective = make_objective("causal", vocabulary, ObjectiveConfig(name="causal", isolate_documents=False), model)
    batch = objective.build_batch(ids, range(len(ids)), 0, 0, marks)
    token_loss, labels = TokenLoss(model), batch.pop("labels")
    targets = objective.get_targets(labels)
    with token_loss.hidden_outputs():
        loss = token_loss.sum_nats(model(**batch).logits, targets) / (targets != IGNORED).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return batch["input_ids"], labels, loss.item(), gradients


if __name__ == "__main__":
    main()
