"""Stage `tokenize@TASK`: records -> token ids, one row per document, without truncation.

Reads   data/raw/SPLIT.parquet; data/tokens/START/tokenizer/ if the task starts from the task START
Writes  data/tokens/TASK/SPLIT/shard-*.arrow, with one ledger per split; data/tokens/TASK/tokenizer/ (verbatim copies of
        the tokenizer's files); data/tokens/TASK/stats.json (the vocabulary). Columns of a shard: input_ids
        large_list<uint16 or uint32>, num_bytes int32; also marks large_list<uint8> and num_counted_bytes int32 if not
        all text is counted; also record int64, the index of the document's record in data/raw, if the task chooses
        sources
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
    copy_files,
    get_shard_name,
    get_versions,
    write_checksums,
    write_directory,
    write_json,
)
from stages.core.config import config_view
from stages.core.errors import StageError, printable
from stages.core.pins import get_pin
from stages.hub.files import TOKENIZER_FILES, VOCABULARY_FILES, find_source_files
from stages.shell.progress import Progress
from stages.shell.tasks import connect_workers, run_jobs, uses_ray
from stages.tokenize.schema import Tokenize
from stages.tokenize.token_shards import COUNT_NAMES, TokenShard, TokenShardWriter
from stages.tokens.encoding import Decoder, Engine, choose_engine
from stages.tokens.prompts import build_prompt_template
from stages.tokens.schema import ModelTokenizer
from stages.tokens.texts import (
    Flatten,
    FlattenData,
    TextFile,
    choose_flatten,
    load_template,
    read_sources,
    sample_texts,
)
from stages.tokens.vocabulary import Vocabulary, build_vocabulary, load_tokenizer, train_tokenizer

log = logging.getLogger(__name__)


@config_view
class TokenizeConfig:
    data: FlattenData
    model: ModelTokenizer
    flatten: Flatten | None = None
    """How the task turns records into documents; null: as configured in conf/data."""
    tokenize: Tokenize

    @field_validator("tokenize")
    @classmethod
    def _check_special_tokens(cls, tokenize: Tokenize, info: ValidationInfo) -> Tokenize:
        model, data = info.data.get("model"), info.data.get("data")
        train = model.tokenizer.train if model is not None else None
        if data is not None and "flatten" in info.data and choose_flatten(info.data["flatten"], data).messages:
            if tokenize.wrap != "end_of_sequence":
                raise ValueError("flatten.messages=true: conversations are for causal tasks (tokenize.wrap)")
            if train is not None and train.chat_template is None:
                raise ValueError(
                    "flatten.messages=true: the tokenizer to train has no chat template: set"
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
    """Names of the sources to tokenize; null: all."""
    raw: str
    """Directory with the Parquet files of download."""
    start: str | None
    """Directory of the tokenizer of the task that this task starts from; null: use the model's own tokenizer."""
    out: str
    """Output directory."""


def main(config: TokenizeConfig) -> None:
    connect_workers()  # first, so that a failure costs no training of a tokenizer
    flatten, raw = choose_flatten(config.flatten, config.data), Path(config.raw)
    with write_directory(config.out, ["stats.json", "tokenizer", *SPLITS]) as directory:
        tokenizer_directory = directory / "tokenizer"
        if config.start is None:
            _write_tokenizer(config, flatten, tokenizer_directory)
        else:
            tokenizer_directory.mkdir()
            copy_files(Path(config.start), tokenizer_directory)
        try:
            tokenizer = load_tokenizer(tokenizer_directory)
            wrap = "none" if flatten.messages else config.tokenize.wrap
            vocabulary = build_vocabulary(tokenizer, tokenizer_directory, wrap, config.tokenize.requires)
            template = load_template(flatten, tokenizer_directory, tokenizer, vocabulary.special)
        except StageError as error:  # name the source instead of the copy, which is removed with the staged directory
            message = str(error).replace(str(tokenizer_directory), _format_tokenizer_source(config))
            raise StageError(message) from None
        files = {split: TextFile(raw / f"{split}.parquet", flatten, config.sources, template) for split in SPLITS}
        if config.sources is not None:
            _check_sources(config.sources, raw, files)
        engine_name, engine = choose_engine(tokenizer, sample_texts(list(files.values())))
        log.info("vocabulary of %d tokens, encoded by %s", vocabulary.size, engine_name)
        decoder = Decoder(tokenizer)
        for split, file in files.items():
            ledger = tokenize_split(file, engine, vocabulary, directory / split, decoder if split != "train" else None)
            assert ledger["documents"] == file.num_documents  # no document is lost
            write_json(directory / split / "stats.json", ledger)
            log.info(
                "%s: %d documents, %d tokens, %d bytes",
                split,
                *(ledger[key] for key in ("documents", "tokens", "bytes")),
            )
        chat_template = build_prompt_template(flatten, template)
        ledger = {
            # null: trained by this stage
            "tokenizer": {"task": Path(config.start).parent.name} if config.start else get_pin(config.model.tokenizer),
            "sources": config.sources,
            "vocabulary": asdict(vocabulary),
            "engine": engine_name,
            "versions": get_versions("fastokens", "numpy", "pyarrow", "tokenizers"),
        }
        write_json(directory / "stats.json", ledger | ({"chat_template": chat_template} if chat_template else {}))
    log.info("-> %s", config.out)


def _format_tokenizer_source(config: TokenizeConfig) -> str:
    """Return the source of the tokenizer, for messages."""
    source = config.model.tokenizer
    return config.start or (str(source.path) if source.from_ is None else source.from_.description)


def _check_sources(sources: list[str], raw: Path, files: dict[str, TextFile]) -> None:
    """Raise StageError unless each of `sources` has records, and each split has records of at least one of them.

    Args:
        sources: names of the chosen sources.
        raw: directory with the Parquet files of download.
        files: maps each split to its documents.
    """
    split_sources = {split: read_sources(raw / f"{split}.parquet")[0] for split in files}
    known = sorted(set().union(*split_sources.values()))
    if unknown := [name for name in sources if name not in known]:
        names = ", ".join(map(printable, unknown))
        raise StageError(
            f"sources names {names}, but {raw} has no such records, only of {', '.join(map(printable, known))}"
            " (params.yaml: tasks.TASK.sources)"
        )
    for split, file in files.items():
        if not file.num_documents:
            raise StageError(
                f"sources={printable(sources)}: the {split} split has no records of these sources, only of"
                f" {', '.join(map(printable, split_sources[split]))}: choose more sources (params.yaml:"
                f" tasks.TASK.sources), or configure the source to put records in {split} (conf/data: split)"
            )


def _write_tokenizer(config: TokenizeConfig, flatten: Flatten, directory: Path) -> None:
    """Write the tokenizer's files to `directory`: train them on the training split, or copy the pinned ones."""
    source = config.model.tokenizer
    if source.train is not None:
        log.info("training a byte-level BPE of %d tokens", source.train.vocab_size)
        if flatten.messages:  # rendering conversations needs the tokenizer, so train on the texts of the messages
            flatten = copy.copy(flatten)
            flatten.messages, flatten.columns = False, ["answers.text"]
        groups = TextFile(Path(config.raw) / "train.parquet", flatten, config.sources)
        train_tokenizer(source.train, (segments.texts.to_pylist() for segments in groups), directory)
        return
    files = find_source_files("model.tokenizer", source, TOKENIZER_FILES, VOCABULARY_FILES)
    directory.mkdir(parents=True)
    for name, file in files.items():
        (directory / name).write_bytes(file.read_bytes())


def tokenize_split(
    texts: TextFile, encode: Engine, vocabulary: Vocabulary, directory: Path, decoder: Decoder | None
) -> dict[str, Any]:
    """Write the shards of a split, and return its ledger.

    Args:
        texts: documents of the split.
        encode: engine that encodes them.
        directory: output directory of the split.
        decoder: counts the documents that differ from their decoded ids (their bits per byte cannot be compared with
            those of another tokenizer); None: do not count them.
    """
    ledger = dict.fromkeys(COUNT_NAMES, 0)
    shards = [
        TokenShard(directory / get_shard_name(number), documents)
        for number, documents in enumerate(texts.plan_shards(SHARD_BYTES))
    ]
    checksums = []
    with closing(Progress(directory.name, texts.num_documents, "documents")) as progress:
        write = TokenShardWriter(texts, encode, vocabulary, decoder, None if uses_ray() else progress.update)
        for checksum, counts in run_jobs(write, shards):
            checksums.append(checksum)
            ledger = {key: ledger[key] + counts[key] for key in ledger}
            progress.update(ledger["documents"])
    write_checksums(directory, checksums)
    wrapped = ledger["documents"] * len(vocabulary.prefix + vocabulary.suffix) + len(vocabulary.lead)
    expected = ledger["text_tokens"] + wrapped * (ledger["documents"] > 0)
    # A chat template adds further control tokens.
    assert ledger["tokens"] >= expected if texts.is_rendered else ledger["tokens"] == expected
    if decoder is None:
        del ledger["documents_lossy"]
    if texts.counts_all:
        del ledger["counted_tokens"], ledger["counted_bytes"]
    return ledger
