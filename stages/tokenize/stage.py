"""Stage `tokenize@TASK`: records -> token ids, a row a document, nothing truncated.

Reads   data/raw/SPLIT.parquet, data/tokens/START/tokenizer/ where the task starts from another one
Writes  data/tokens/TASK/SPLIT/shard-*.arrow with a ledger each, data/tokens/TASK/tokenizer/ (its files, verbatim),
        data/tokens/TASK/stats.json (the vocabulary). Columns of a shard: input_ids: large_list<uint16 or uint32>,
        num_bytes: int32; where not all text counts also marks: large_list<uint8>, num_counted_bytes: int32; of a task
        with chosen sources also record: int64, the number of the document's record in data/raw
Command python -m stages.tokenize task=causal
"""

import copy
import logging
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationInfo, field_validator

from stages.core.artifacts import (
    SHARD_BYTES,
    SPLITS,
    free_copy,
    shard_name,
    staged,
    versions,
    write_checksums,
    write_json,
)
from stages.core.config import part
from stages.core.errors import StageError, printable
from stages.core.pins import pinned_origin
from stages.hub.files import TOKENIZER_FILES, VOCABULARY_FILES, source_files
from stages.shell.progress import Progress
from stages.shell.tasks import are_spread, connect_workers, run_pieces
from stages.tokenize.schema import Tokenize
from stages.tokenize.token_shards import COUNTS, Shard, TokenShards
from stages.tokens.encoding import Decoder, Engine, choose_engine
from stages.tokens.prompts import prompt_template
from stages.tokens.schema import ModelTokenizer
from stages.tokens.texts import (
    Flatten,
    FlattenData,
    TextFile,
    choose_flatten,
    open_template,
    read_sources,
    sample_texts,
)
from stages.tokens.vocabulary import Vocabulary, load_tokenizer, train_tokenizer, vocabulary_of

log = logging.getLogger(__name__)


@part
class TokenizeConfig:
    data: FlattenData
    model: ModelTokenizer
    flatten: Flatten | None = None
    """The task's own way to make documents of records; null: that of conf/data."""
    tokenize: Tokenize

    @field_validator("tokenize")
    @classmethod
    def _has_its_tokens(cls, tokenize: Tokenize, info: ValidationInfo) -> Tokenize:
        model, data = info.data.get("model"), info.data.get("data")
        train = model.tokenizer.train if model is not None else None
        if data is not None and "flatten" in info.data and choose_flatten(info.data["flatten"], data).messages:
            if tokenize.wrap != "end_of_sequence":
                raise ValueError("flatten.messages=true: conversations are for causal tasks (tokenize.wrap)")
            if train is not None and train.chat_template is None:
                raise ValueError(
                    "flatten.messages=true: the tokenizer that is trained here has no chat template: set"
                    " tokenizer.train.chat_template (conf/model), or choose a model with one"
                )
        if train is not None:
            needed = [*tokenize.requires, *(["eos_token"] if tokenize.wrap == "end_of_sequence" else [])]
            if missing := [role for role in dict.fromkeys(needed) if role not in train.special_tokens]:
                raise ValueError(
                    f"tokenizer.train.special_tokens has no {' and no '.join(missing)}, which the task needs"
                )
        return tokenize

    sources: Annotated[list[str], Field(min_length=1)] | None
    """Names of the sources whose records are tokenized; null: all."""
    raw: str
    """Directory of download's Parquet files."""
    start: str | None
    """Directory of the tokenizer of the task that this one starts from; null: the model's own tokenizer."""
    out: str
    """Directory to write."""


def main(config: TokenizeConfig) -> None:
    connect_workers()  # before a tokenizer is trained in vain
    flatten, raw = choose_flatten(config.flatten, config.data), Path(config.raw)
    with staged(config.out, ["stats.json", "tokenizer", *SPLITS]) as directory:
        copy = directory / "tokenizer"
        if config.start is None:
            _prepare_tokenizer(config, flatten, copy)
        else:
            copy.mkdir()
            free_copy(Path(config.start), copy)
        try:
            tokenizer = load_tokenizer(copy)
            wrap = "none" if flatten.messages else config.tokenize.wrap
            vocabulary = vocabulary_of(tokenizer, copy, wrap, config.tokenize.requires)
            template = open_template(flatten, copy, tokenizer, vocabulary.special)
        except StageError as error:  # in words for its source: the copy vanishes with this run
            raise StageError(str(error).replace(str(copy), _named(config))) from None
        files = {split: TextFile(raw / f"{split}.parquet", flatten, config.sources, template) for split in SPLITS}
        if config.sources is not None:
            _check_sources(config.sources, raw, files)
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
        form = prompt_template(flatten, template)
        ledger = {
            # null: trained here
            "tokenizer": {"task": Path(config.start).parent.name}
            if config.start
            else pinned_origin(config.model.tokenizer),
            "sources": config.sources,
            "vocabulary": asdict(vocabulary),
            "engine": engine_name,
            "versions": versions("fastokens", "numpy", "pyarrow", "tokenizers"),
        }
        write_json(directory / "stats.json", ledger | ({"chat_template": form} if form else {}))
    log.info("-> %s", config.out)


def _named(config: TokenizeConfig) -> str:
    """Where the tokenizer is from, for messages."""
    source = config.model.tokenizer
    return config.start or (str(source.path) if source.from_ is None else source.from_.place)


def _check_sources(sources: list[str], raw: Path, files: dict[str, TextFile]) -> None:
    """Raise StageError unless each of `sources` has records, and each split has some of theirs."""
    there = {split: read_sources(raw / f"{split}.parquet")[0] for split in files}
    known = sorted(set().union(*there.values()))
    if unknown := [name for name in sources if name not in known]:
        names = ", ".join(map(printable, unknown))
        raise StageError(
            f"sources names {names}, of which {raw} has no records: it has {', '.join(map(printable, known))}"
            " (params.yaml: tasks.TASK.sources)"
        )
    for split, file in files.items():
        if not file.num_documents:
            raise StageError(
                f"sources={printable(sources)}: the {split} split has no record of theirs, only of"
                f" {', '.join(map(printable, there[split]))}: choose further sources (params.yaml: tasks.TASK.sources),"
                " or a configuration of that source that puts records there (conf/data: split)"
            )


def _prepare_tokenizer(config: TokenizeConfig, flatten: Flatten, directory: Path) -> None:
    """Put the tokenizer's files into `directory`: trained on the training split, or copied from their pin."""
    source = config.model.tokenizer
    if source.train is not None:
        log.info("training a byte-level BPE of %d tokens", source.train.vocab_size)
        if flatten.messages:  # which are rendered with the tokenizer
            flatten = copy.copy(flatten)
            flatten.messages, flatten.columns = False, ["answers.text"]
        groups = TextFile(Path(config.raw) / "train.parquet", flatten, config.sources)
        train_tokenizer(source.train, (segments.texts.to_pylist() for segments in groups), directory)
        return
    files = source_files("model.tokenizer", source, TOKENIZER_FILES, VOCABULARY_FILES)
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
    ledger = dict.fromkeys(COUNTS, 0)
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
    expected = ledger["text_tokens"] + wrapped * (ledger["documents"] > 0)
    # A chat template adds control tokens of its own.
    assert ledger["tokens"] >= expected if texts.is_rendered else ledger["tokens"] == expected
    if decoder is None:
        del ledger["documents_lossy"]
    if texts.counts_all:
        del ledger["counted_tokens"], ledger["counted_bytes"]
    return ledger
