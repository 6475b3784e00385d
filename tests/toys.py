"""Toy vocabularies, models, documents and blocks for tests of models and training."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from data_helpers import make_record_batch, write_shards
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, TrainingArguments

from stages.core.artifacts import Blocks, Documents, to_arrow
from stages.model.objectives import Objective, make_objective
from stages.model.schema import ObjectiveConfig
from stages.tokens.encoding import DocumentText
from stages.tokens.vocabulary import Vocabulary
from stages.train.schema import CheckpointSettings
from stages.train.training import BlockTrainer

torch.set_num_threads(1)  # more threads do not help toys, and slow them down a lot next to other processes

VOCAB_SIZE = 50  # tokens of the toy vocabularies
FIRST_TEXT = 5  # ids from here on are text
END, CLS, PAD, SEP, UNK, MASK = 0, 0, 1, 2, 3, 4
CAUSAL = Vocabulary(size=VOCAB_SIZE, special={"eos_token": END}, prefix=[], suffix=[END], lead=[END])
MASKED = Vocabulary(
    size=VOCAB_SIZE,
    special={"cls_token": CLS, "pad_token": PAD, "sep_token": SEP, "unk_token": UNK, "mask_token": MASK},
    prefix=[CLS],
    suffix=[SEP],
    lead=[],
)
MODEL_TASKS = {"gpt2": "causal", "llama": "causal", "gpt_neo": "causal", "gptj": "causal"} | dict.fromkeys(
    ("roberta", "bert", "modernbert"), "mlm"
)
VOCABULARIES = {"causal": CAUSAL, "mlm": MASKED}

# Weights far larger than a library's defaults: outputs are far from uniform, so that errors show.
_COMMON = {"vocab_size": VOCAB_SIZE, "initializer_range": 0.4}
_BERT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "pad_token_id": PAD,
    "bos_token_id": CLS,
    "eos_token_id": SEP,
}
_END = {"bos_token_id": END, "eos_token_id": END}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gpt2": {
        "n_positions": 64,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        **_END,
    },
    "llama": {
        "max_position_embeddings": 64,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        **_END,
    },
    "gpt_neo": {
        "max_position_embeddings": 64,
        "hidden_size": 16,
        "num_layers": 2,
        "num_heads": 2,
        "attention_types": [[["global", "local"], 1]],
        **_END,
    },
    "gptj": {
        "n_positions": 64,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "rotary_dim": 4,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        **_END,
    },
    "roberta": {"max_position_embeddings": 64 + PAD + 1, **_BERT},
    "bert": {"max_position_embeddings": 64, **_BERT},
    "modernbert": {
        "max_position_embeddings": 64,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "local_attention": 8,
        "initializer_cutoff_factor": 2.0,
        "pad_token_id": PAD,
        "bos_token_id": CLS,
        "eos_token_id": SEP,
        "cls_token_id": CLS,
        "sep_token_id": SEP,
    },
}
# Models for which transformers only has eager attention.
EAGER = ("gpt_neo", "gptj")


def make_toy_model(model_type: str, seed: int = 0, attention: str | None = None, **overrides: Any) -> Any:
    """Return a model in evaluation mode with two or three layers of width 16 and random weights from `seed`."""
    attention = attention or ("eager" if model_type in EAGER else "sdpa")
    config = AutoConfig.for_model(model_type, **{**_COMMON, **ARCHITECTURES[model_type], **overrides})
    auto = AutoModelForCausalLM if MODEL_TASKS[model_type] == "causal" else AutoModelForMaskedLM
    torch.manual_seed(seed)
    return auto.from_config(config, attn_implementation=attention).eval()


def make_objective_config(task: str, isolate_documents: bool = False, **overrides: float) -> ObjectiveConfig:
    """Return the objective section of conf/task/`task`.yaml."""
    masking = {"mlm_probability": 0.15, "mask_replace_prob": 0.8, "random_replace_prob": 0.1, **overrides}
    return ObjectiveConfig(name=task, isolate_documents=isolate_documents, **(masking if task == "mlm" else {}))


def make_toy_objective(model: Any, isolate_documents: bool = True) -> Objective:
    """Return the objective of a toy model's task."""
    task = MODEL_TASKS[model.config.model_type]
    return make_objective(task, VOCABULARIES[task], make_objective_config(task, isolate_documents), model)


def draw_text_ids(length: int, seed: int = 0) -> np.ndarray:
    """Return random token ids of text, [length] uint16."""
    return np.random.default_rng(seed).integers(FIRST_TEXT, VOCAB_SIZE, length).astype(np.uint16)


def add_control_tokens(task: str, *texts: Sequence[int]) -> list[int]:
    """Concatenate the texts with their control tokens."""
    vocabulary = VOCABULARIES[task]
    return [*vocabulary.lead, *(token for text in texts for token in (*vocabulary.prefix, *text, *vocabulary.suffix))]


def make_texts(documents: Iterable[Sequence[int]]) -> Iterator[DocumentText]:
    """Yield documents in which all tokens are predicted."""
    return (DocumentText(np.asarray(ids), 0) for ids in documents)


def save_documents(directory: Path, task: str, texts: Iterable[Sequence[int]], num_bytes: Sequence[int]) -> Documents:
    """Write a split of tokens as tokenize does, and return it."""
    vocabulary = VOCABULARIES[task]
    rows = [np.array([*vocabulary.prefix, *text, *vocabulary.suffix], np.uint16) for text in texts]
    rows[0] = np.array([*vocabulary.lead, *rows[0]], np.uint16)
    schema = pa.schema([("input_ids", pa.large_list(pa.uint16())), ("num_bytes", pa.int32())])
    return Documents(write_shards(directory, schema, [make_record_batch(rows, list(num_bytes), schema)]))


def save_blocks(directory: Path, ids: np.ndarray, marks: np.ndarray | None = None) -> Blocks:
    """Write a split of blocks as group_texts does, and return it; `ids` and `marks` are [num_blocks, block_size]."""
    values = {"input_ids": ids.astype(np.uint16)} | ({} if marks is None else {"marks": marks.astype(np.uint8)})
    columns = {
        name: pa.FixedSizeListArray.from_arrays(to_arrow(rows.reshape(-1)), ids.shape[1])
        for name, rows in values.items()
    }
    batch = pa.record_batch(columns)
    return Blocks(write_shards(directory, batch.schema, [batch]))


def make_toy_blocks(directory: Path, task: str, num_blocks: int, block_size: int, seed: int = 0) -> Blocks:
    """Write and return blocks that are packed from documents of 1 to 12 tokens."""
    lengths = np.random.default_rng(seed).integers(1, 13, num_blocks * block_size)
    stream = add_control_tokens(
        task, *(draw_text_ids(length, seed + 1 + index).tolist() for index, length in enumerate(lengths))
    )
    return save_blocks(directory, np.array(stream[: num_blocks * block_size]).reshape(num_blocks, block_size))


def make_toy_trainer(
    directory: Path, model: Any, objective: Any, train: Blocks, validation: Blocks | None = None, **arguments: Any
) -> BlockTrainer:
    """Return a BlockTrainer that writes only the files that `arguments` request; `callbacks` go to the Trainer."""
    callbacks = arguments.pop("callbacks", [])
    evaluate_batch_tokens = arguments.pop("evaluate_batch_tokens", 4096)
    defaults = {
        "output_dir": str(directory / "checkpoints"),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "seed": 3,
    }
    return BlockTrainer(
        model,
        TrainingArguments(**{**defaults, **arguments}),
        objective,
        train,
        validation or train,
        evaluate_batch_tokens,
        CheckpointSettings(minutes=1e6, keep=2, keep_for_branches=None),
        callbacks,
    )
