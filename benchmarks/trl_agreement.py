"""Loss and gradients of answers only, beside those of TRL's completion-only SFTTrainer for the same model and records.

Command python -m benchmarks.trl_agreement [--records data/sample/askscience.jsonl] [--number 8]
Needs   uv pip install trl

TRL gets the token ids of the pipeline and which of them are completions. (It would tokenize a prompt and its completion
as one text, and warns that tokens merge across their boundary.) Its first batch is compared label by label, then the
loss of both in fp32 (TRL: transformers' own loss of the model; here: a sum over chunks of the output embedding), and
all gradients. The last line printed is one JSON object.
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
from stages.download.records import record_schema, to_record
from stages.download.schema import Columns
from stages.download.sources import read_rows
from stages.model.loss import TokenLoss
from stages.model.masking import IGNORED
from stages.model.objectives import make_objective
from stages.model.schema import ObjectiveConfig
from stages.tokenize.stage import tokenize_split
from stages.tokens.encoding import Tokenizers
from stages.tokens.schema import TrainedTokenizer
from stages.tokens.texts import Flatten, TextFile
from stages.tokens.vocabulary import load_tokenizer, train_tokenizer, vocabulary_of

FLATTEN = Flatten(prompt=["title", "selftext"], completion=["answers.text"])
PAD, LENGTH = 1, 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--records", default="data/sample/askscience.jsonl")
    parser.add_argument("--number", type=int, default=8, help="of records, in one batch")
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
        our_ids, our_labels, our_loss, our_gradients = by_pipeline(root)
        ids, labels, loss, gradients = by_trl(root, our_ids, our_labels)
    difference = max(float((one - other).abs().max()) for one, other in zip(gradients, our_gradients, strict=True))
    result = {
        "records": len(pairs),
        "tokens": int((ids != PAD).sum()),
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
    """Prompt and completion of the first records, which are written as download does."""
    rows = (row for system, name in find_files(arguments.records) for row in read_rows(system, name))
    records = [
        to_record(row.value, Columns(title="title", texts=["answers.text"]))[0] | {"source": "records"}
        for row in itertools.islice(rows, arguments.number)
    ]
    pq.write_table(pa.Table.from_pylist(records, schema=record_schema([])), file)
    return [
        (" ".join(filter(None, [record["title"], record["selftext"]])) + "\n\n", " ".join(record["answers"]["text"]))
        for record in records
    ]


def by_trl(
    root: Path, ids: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, float, list[torch.Tensor]]:
    """Ids and labels [num_records, length], loss and gradients of TRL's first batch of the documents in `ids`."""
    model = AutoModelForCausalLM.from_pretrained(root / "model")
    rows = [
        {"input_ids": row[row != PAD].tolist(), "completion_mask": (own[row != PAD] != IGNORED).long().tolist()}
        for row, own in zip(ids, labels, strict=True)
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


def by_pipeline(root: Path) -> tuple[torch.Tensor, torch.Tensor, float, list[torch.Tensor]]:
    """The same of the documents as the pipeline tokenizes them, each in a row, cut to LENGTH or padded."""
    tokenizer = load_tokenizer(root / "tokenizer")
    vocabulary = vocabulary_of(tokenizer, root / "tokenizer", "end_of_sequence", ["eos_token"])
    texts = TextFile(root / "records.parquet", FLATTEN)
    tokenize_split(texts, Tokenizers(tokenizer), vocabulary, root / "tokens", decoder=None)
    documents = Documents(root / "tokens")
    length = min(LENGTH, max(len(documents[number]) + 1 for number in range(len(documents))))
    ids = np.full((len(documents), length), PAD, np.uint16)
    marks = np.zeros((len(documents), length), np.uint8)
    for number in range(len(documents)):
        # The end of the document before stands in front of each but the first, where it is part of it.
        lead = vocabulary.lead if number else []
        own_marks = documents.marks(number)
        assert own_marks is not None
        row = np.concatenate([lead, documents[number]])[:length]
        ids[number, : len(row)] = row
        marks[number, : len(row)] = np.concatenate([[0] * len(lead), own_marks])[:length]
    model = AutoModelForCausalLM.from_pretrained(root / "model")
    model.train()
    objective = make_objective("causal", vocabulary, ObjectiveConfig(name="causal", isolate_documents=False), model)
    batch = objective.batch(ids, range(len(ids)), 0, 0, marks)
    token_loss, labels = TokenLoss(model), batch.pop("labels")
    targets = objective.targets(labels)
    with token_loss.hidden_outputs():
        loss = token_loss.sum(model(**batch).logits, targets) / (targets != IGNORED).sum()
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return batch["input_ids"], labels, loss.item(), gradients


if __name__ == "__main__":
    main()
