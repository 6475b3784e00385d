"""Stage `tokenize@TASK`: records -> token ids, a row a document, nothing truncated.

Reads   data/raw/SPLIT.parquet
Writes  data/tokens/TASK/SPLIT/shard-*.arrow (input_ids: large_list<uint16 or uint32>, num_bytes: int32) with a ledger
        each, data/tokens/TASK/tokenizer/ (its files, verbatim), data/tokens/TASK/stats.json (the vocabulary)
Command python -m stages.tokenize task=causal data=sample model=tiny-gpt2 raw=data/raw out=data/tokens/causal
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationInfo, field_validator
from tokenizers import Tokenizer

from stages.app import run
from stages.artifacts import SPLITS, ShardWriter, TokenIds, staged, to_arrow, versions, write_json
from stages.config import Flatten, ModelTokenizer, Tokenize, TokenizerSource, part
from stages.errors import StageError
from stages.pretrained import TOKENIZER_FILES, VOCABULARY_FILES, pinned_files
from stages.progress import track
from stages.vocabulary import Vocabulary, encode, load_tokenizer, train_tokenizer, vocabulary_of

log = logging.getLogger(__name__)

CONTROL_ROLES = {"eos_token", "mask_token", "cls_token", "sep_token", "pad_token", "bos_token"}  # unk stands for text

DOCUMENTS_AT_ONCE = 1000  # also the rows of an Arrow batch: fixed, so that the bytes follow from the documents alone


@part
class FlattenData:
    flatten: Flatten


@part
class TokenizeConfig:
    data: FlattenData
    model: ModelTokenizer
    tokenize: Tokenize

    @field_validator("tokenize")
    @classmethod
    def _has_its_tokens(cls, tokenize: Tokenize, info: ValidationInfo) -> Tokenize:
        model = info.data.get("model")
        train = model.tokenizer.train if model is not None else None
        if train is not None:
            needed = [*tokenize.requires, *(["eos_token"] if tokenize.wrap == "end_of_sequence" else [])]
            if missing := [role for role in dict.fromkeys(needed) if role not in train.special_tokens]:
                raise ValueError(
                    f"tokenizer.train.special_tokens has no {' and no '.join(missing)}, which the task needs"
                )
        return tokenize

    raw: str
    """Directory of download's Parquet files."""
    out: str
    """Directory to write."""


def main(config: TokenizeConfig) -> None:
    raw = Path(config.raw)
    with staged(config.out) as directory:
        training_texts = documents(raw / "train.parquet", config.data.flatten)
        prepare_tokenizer(config.model.tokenizer, training_texts, directory / "tokenizer")
        tokenizer = load_tokenizer(directory / "tokenizer")
        vocabulary = vocabulary_of(tokenizer, directory / "tokenizer", config.tokenize.wrap, config.tokenize.requires)
        log.info("vocabulary of %d tokens", vocabulary.size)
        for split in SPLITS:
            with named_damage(raw / f"{split}.parquet"):
                num_documents = pq.ParquetFile(raw / f"{split}.parquet").metadata.num_rows
            texts = track(documents(raw / f"{split}.parquet", config.data.flatten), split, num_documents, "documents")
            ledger = tokenize_split(texts, tokenizer, vocabulary, directory / split, count_lossy=split != "train")
            assert ledger["documents"] == num_documents  # nothing lost on the way
            write_json(directory / split / "stats.json", ledger)
            log.info(
                "%s: %d documents, %d tokens, %d bytes",
                split,
                *(ledger[key] for key in ("documents", "tokens", "bytes")),
            )
        write_json(
            directory / "stats.json",
            {"vocabulary": asdict(vocabulary), "versions": versions("numpy", "pyarrow", "tokenizers")},
        )
    log.info("-> %s", config.out)


def prepare_tokenizer(source: TokenizerSource, training_texts: Iterator[str], directory: Path) -> None:
    """Put the tokenizer's files into `directory`: trained on `training_texts`, or copied from where they are pinned."""
    if source.train is not None:
        log.info("training a byte-level BPE of %d tokens", source.train.vocab_size)
        train_tokenizer(source.train, training_texts, directory)
        return
    assert source.path is not None  # the schema's rule
    files = pinned_files(
        "model.tokenizer", source.path, source.revision, source.files, TOKENIZER_FILES, VOCABULARY_FILES
    )
    directory.mkdir(parents=True)
    for name, file in files.items():
        (directory / name).write_bytes(file.read_bytes())


@contextmanager
def named_damage(file: Path) -> Iterator[None]:
    """Errors of a damaged Parquet file inside the block, as StageErrors that name it."""
    try:
        yield
    except (pa.ArrowInvalid, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise  # the system's: no such file, no permission
        raise StageError(f"{file} is damaged ({error}): delete it and run `dvc repro`") from None


def documents(file: Path, flatten: Flatten) -> Iterator[str]:
    """The text of each record in a Parquet file: the values of flatten.columns, joined."""
    columns = list(flatten.columns)
    with named_damage(file):
        for batch in pq.ParquetFile(file).iter_batches(batch_size=DOCUMENTS_AT_ONCE, columns=columns):
            for record in batch.to_pylist():
                parts: list[str] = []
                for column in columns:
                    parts += record["answers"]["text"] if column == "answers.text" else [record[column]]
                yield flatten.joiner.join(part for part in parts if part)


def tokenize_split(
    texts: Iterator[str], tokenizer: Tokenizer, vocabulary: Vocabulary, directory: Path, count_lossy: bool
) -> dict[str, Any]:
    """Write the shards of a split and return its ledger.

    Args:
        count_lossy: count the documents that decoding does not give back, whose bits per byte compare with no other
            tokenizer's.
    """
    ids_type = pa.from_numpy_dtype(vocabulary.dtype)
    schema = pa.schema([("input_ids", pa.large_list(ids_type)), ("num_bytes", pa.int32())])
    ledger = {"documents": 0, "tokens": 0, "text_tokens": 0, "bytes": 0}
    lossy = 0
    with ShardWriter(directory, schema) as writer:
        for batch in chunks(texts, DOCUMENTS_AT_ONCE):
            encoded = encode(tokenizer, batch, vocabulary.dtype)
            refuse_control_tokens(encoded, vocabulary, f"{directory.name} document", ledger["documents"])
            if count_lossy:
                decoded = tokenizer.decode_batch([list(ids) for ids in encoded], skip_special_tokens=False)
                lossy += sum(text != back for text, back in zip(batch, decoded, strict=True))
            num_bytes = [len(text.encode()) for text in batch]
            rows = wrap(encoded, vocabulary, first=ledger["documents"] == 0)
            writer.write(record_batch(rows, num_bytes, schema))
            ledger["documents"] += len(batch)
            ledger["tokens"] += sum(len(row) for row in rows)
            ledger["text_tokens"] += sum(len(ids) for ids in encoded)
            ledger["bytes"] += sum(num_bytes)
    wrapped = ledger["documents"] * len(vocabulary.prefix + vocabulary.suffix) + len(vocabulary.lead)
    assert ledger["tokens"] == ledger["text_tokens"] + wrapped * (ledger["documents"] > 0)
    return ledger | ({"documents_lossy": lossy} if count_lossy else {})


def refuse_control_tokens(encoded: list[TokenIds], vocabulary: Vocabulary, what: str, first: int) -> None:
    """Raise StageError if a text became a token with a special role.

    Byte-level BPE spells such a text in ordinary tokens; a tokenizer whose own vocabulary holds the control tokens as
    pieces (Unigram) or as plain words cannot.
    """
    special = np.array(
        [*vocabulary.control.tolist(), *(vocabulary.special[role] for role in CONTROL_ROLES & set(vocabulary.special))]
    )
    if np.isin(np.concatenate(encoded), special).any():
        number = next(number for number, ids in enumerate(encoded) if np.isin(ids, special).any())
        raise StageError(
            f"{what} {first + number} spells a control token, which this tokenizer cannot keep as text: take it out of"
            " the text, or choose another tokenizer"
        )


def wrap(encoded: list[TokenIds], vocabulary: Vocabulary, first: bool) -> list[TokenIds]:
    """Each document with its control tokens; the split's lead before the first."""
    prefix, suffix, lead = (
        np.array(ids, vocabulary.dtype) for ids in (vocabulary.prefix, vocabulary.suffix, vocabulary.lead)
    )
    rows = [np.concatenate([prefix, ids, suffix]) for ids in encoded]
    if first and rows:
        rows[0] = np.concatenate([lead, rows[0]])
    return rows


def record_batch(rows: list[TokenIds], num_bytes: list[int], schema: pa.Schema) -> pa.RecordBatch:
    """The rows as one Arrow batch."""
    offsets = np.cumsum([0, *(len(row) for row in rows)], dtype=np.int64)
    input_ids = pa.LargeListArray.from_arrays(to_arrow(offsets), to_arrow(np.concatenate(rows)))
    return pa.record_batch([input_ids, to_arrow(np.array(num_bytes, np.int32))], schema=schema)


def chunks(texts: Iterator[str], size: int) -> Iterator[list[str]]:
    """`texts` in lists of `size`, the last one shorter."""
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


if __name__ == "__main__":
    run("tokenize", TokenizeConfig, main)
