"""Stage `tokenize@TASK`: records -> token ids, a row a document, nothing truncated.

Reads   data/raw/SPLIT.parquet
Writes  data/tokens/TASK/SPLIT/shard-*.arrow (input_ids: large_list<uint16 or uint32>, num_bytes: int32) with a ledger
        each, data/tokens/TASK/tokenizer/ (its files, verbatim), data/tokens/TASK/stats.json (the vocabulary)
Command python -m stages.tokenize task=causal
"""

import logging
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import ValidationInfo, field_validator

from stages.core.artifacts import (
    SHARD_BYTES,
    SPLITS,
    shard_name,
    staged,
    versions,
    write_checksums,
    write_json,
)
from stages.core.config import part
from stages.core.errors import StageError
from stages.core.pins import pinned_origin
from stages.hub.files import TOKENIZER_FILES, VOCABULARY_FILES, pinned_files
from stages.shell.progress import Progress
from stages.shell.tasks import are_spread, connect_workers, run_pieces
from stages.tokenize.schema import Tokenize
from stages.tokenize.token_shards import Shard, TokenShards
from stages.tokens.encoding import Decoder, Engine, choose_engine
from stages.tokens.schema import ModelTokenizer, TokenizerSource
from stages.tokens.texts import FlattenData, TextFile, sample_texts
from stages.tokens.vocabulary import Vocabulary, load_tokenizer, train_tokenizer, vocabulary_of

log = logging.getLogger(__name__)


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
    connect_workers()  # before a tokenizer is trained in vain
    flatten = config.data.flatten
    files = {split: TextFile(Path(config.raw) / f"{split}.parquet", flatten) for split in SPLITS}
    with staged(config.out, ["stats.json", "tokenizer", *SPLITS]) as directory:
        copy = directory / "tokenizer"
        _prepare_tokenizer(config.model.tokenizer, files["train"], copy)
        try:
            tokenizer = load_tokenizer(copy)
            vocabulary = vocabulary_of(tokenizer, copy, config.tokenize.wrap, config.tokenize.requires)
        except StageError as error:  # in words for its source: the copy vanishes with this run
            raise StageError(str(error).replace(str(copy), str(config.model.tokenizer.path))) from None
        engine_name, engine = choose_engine(tokenizer, sample_texts(list(files.values())))
        log.info("vocabulary of %d tokens, encoded by %s", vocabulary.size, engine_name)
        decoder = Decoder(tokenizer)
        for split, file in files.items():
            ledger = tokenize_split(file, engine, vocabulary, directory / split, decoder if split != "train" else None)
            assert ledger["documents"] == file.num_documents  # nothing lost on the way
            write_json(directory / split / "stats.json", ledger)
            log.info(
                "%s: %d documents, %d tokens, %d bytes",
                split,
                *(ledger[key] for key in ("documents", "tokens", "bytes")),
            )
        ledger = {
            "tokenizer": pinned_origin(config.model.tokenizer),  # null: trained here
            "vocabulary": asdict(vocabulary),
            "engine": engine_name,
            "versions": versions("fastokens", "numpy", "pyarrow", "tokenizers"),
        }
        write_json(directory / "stats.json", ledger)
    log.info("-> %s", config.out)


def _prepare_tokenizer(source: TokenizerSource, training: TextFile, directory: Path) -> None:
    """Put the tokenizer's files into `directory`: trained on `training`, or copied from where they are pinned."""
    if source.train is not None:
        log.info("training a byte-level BPE of %d tokens", source.train.vocab_size)
        train_tokenizer(source.train, (texts.to_pylist() for texts in training), directory)
        return
    assert source.path is not None  # the schema's rule
    files = pinned_files(
        "model.tokenizer", source.path, source.revision, source.files, TOKENIZER_FILES, VOCABULARY_FILES
    )
    directory.mkdir(parents=True)
    for name, file in files.items():
        (directory / name).write_bytes(file.read_bytes())


def tokenize_split(
    texts: TextFile, encode: Engine, vocabulary: Vocabulary, directory: Path, decoder: Decoder | None
) -> dict[str, Any]:
    """Write the shards of a split and return its ledger.

    Args:
        decoder: counts the documents that decoding does not give back, whose bits per byte compare with no other
            tokenizer's; None: they are not counted.
    """
    ledger = {"documents": 0, "tokens": 0, "text_tokens": 0, "bytes": 0, "documents_lossy": 0}
    shards = [
        Shard(directory / shard_name(number), documents) for number, documents in enumerate(texts.shards(SHARD_BYTES))
    ]
    checksums = []
    with closing(Progress(directory.name, texts.num_documents, "documents")) as progress:
        write = TokenShards(texts, encode, vocabulary, decoder, None if are_spread() else progress.update)
        for checksum, counts in run_pieces(write, shards):
            checksums.append(checksum)
            ledger = {key: ledger[key] + counts[key] for key in ledger}
            progress.update(ledger["documents"])
    write_checksums(directory, checksums)
    wrapped = ledger["documents"] * len(vocabulary.prefix + vocabulary.suffix) + len(vocabulary.lead)
    assert ledger["tokens"] == ledger["text_tokens"] + wrapped * (ledger["documents"] > 0)
    if decoder is None:
        del ledger["documents_lossy"]
    return ledger
