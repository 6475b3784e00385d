"""Toy sources, raw splits, tokenizers and tokens for tests of the data stages."""

import contextlib
import functools
import http.server
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from stages.core.artifacts import (
    SPLITS,
    TokenIds,
    compute_sha256,
    get_shard_name,
    to_arrow,
    write_checksums,
    write_json,
    write_shard,
)
from stages.download.records import ELI5
from stages.download.schema import Columns, SourceData, Split
from stages.download.sources import read_rows
from stages.tokens.schema import TrainedTokenizer
from stages.tokens.vocabulary import train_tokenizer

no_deadline = settings(deadline=None)  # a slow machine must not fail a test

REPOSITORY = Path(__file__).resolve().parent.parent
CAUSAL_TOKENS = {"eos_token": "<|endoftext|>"}
MLM_TOKENS = {
    "cls_token": "<s>",
    "pad_token": "<pad>",
    "sep_token": "</s>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
}
TEXTS = ["Why is the sky blue?", "Because air scatters light.", "naïve café 北京 🙂", "tabs\tand\nlines  end "]


def make_split(
    by: str = "hash", seed: int = 0, train: float = 0.8, validation: float = 0.1, test: float = 0.1, key: Any = "title"
) -> Split:
    """Return the split section of conf/data."""
    return Split(by=by, key=key, seed=seed, train=train, validation=validation, test=test)  # type: ignore[arg-type]


def make_source_data(path: Path | str, title: str | None = "title", texts: str = "answers.text", **changes: Any) -> Any:
    """Return the data section of conf/data/files.yaml for the source at `path`, with `changes`."""
    section = {
        "source": "files",
        "path": str(path),
        "hub": None,
        "sources": None,
        "columns": Columns(title=title, texts=[texts]),
        "filter": None,
        "text_record": "file",
        "max_records": None,
        "on_bad_record": "error",
        "deduplicate": "none",
        "count_near_duplicates": False,
        "clean": [],
        "groups": [],
        "split": make_split(),
    }
    return SourceData(**(section | changes))


def read_values(path: Path | str, **changes: Any) -> list[Any]:
    """Read the records at `path` as download does; a bad record is a BadRecordError."""
    return [row.value for row in read_rows(make_source_data(path, **changes))]


def make_questions(number: int, first: int = 0) -> list[dict[str, Any]]:
    """Flattened records, all different."""
    return [{"title": f"Question {i}?", "answers.text": [f"Answer {i}."]} for i in range(first, first + number)]


def write_jsonl(file: Path, records: Sequence[Any]) -> Path:
    """Write one JSON value per line, and return the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return file


def write_raw(directory: Path, texts: Mapping[str, Sequence[str]], rows: int = 1000) -> Path:
    """Write one file of `write_records` per split, and return the directory."""
    for name in SPLITS:
        write_records(directory / f"{name}.parquet", texts[name], rows=rows)
    return directory


def write_records(
    file: Path,
    texts: Sequence[str],
    groups: Mapping[str, Sequence[str | None]] | None = None,
    sources: Sequence[str] | None = None,
    q_ids: Sequence[str] | None = None,
    rows: int = 1000,
) -> Path:
    """Write a Parquet file of download with one record per text, which is its only answer.

    Args:
        groups: name of each group to its values.
        rows: records per row group.
        sources: source of each record; None: `toy` for all.
    """
    schema = pa.schema([field for field in ELI5 if field.name not in ("source", "groups")])
    urls = {name: {"url": []} for name in ("title_urls", "selftext_urls", "answers_urls")}
    fields = dict.fromkeys(("q_id", "title", "selftext", "document", "subreddit"), "")
    records = [{**fields, **urls, "answers": {"a_id": [""], "text": [text], "score": [0]}} for text in texts]
    table = pa.Table.from_pylist(records, schema=schema)
    if q_ids is not None:
        table = table.set_column(0, "q_id", pa.array(q_ids, pa.string()))
    table = table.append_column("source", pa.array(sources or ["toy"] * len(texts), pa.string()))
    if groups is not None:
        columns = [pa.array(labels, pa.string()) for labels in groups.values()]
        table = table.append_column("groups", pa.StructArray.from_arrays(columns, list(groups)))
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file, row_group_size=rows)
    return file


def write_bpe(directory: Path, special_tokens: Mapping[str, str], vocab_size: int = 300) -> Path:
    """Write a byte-level BPE trained on TEXTS, and return the directory."""
    config = TrainedTokenizer(vocab_size=vocab_size, special_tokens=dict(special_tokens))
    train_tokenizer(config, iter([TEXTS]), directory)
    return directory


def write_word_piece(directory: Path) -> Path:
    """Write a lower-casing WordPiece tokenizer of a few words, as for BERT, and return the directory."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz.[]", "##s", "sky", "blue"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.add_special_tokens(words[:5])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    directory.mkdir(parents=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    roles = {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]", "unk_token": "[UNK]"}
    (directory / "special_tokens_map.json").write_text(json.dumps(roles), encoding="utf-8")
    return directory


def write_unigram(directory: Path) -> Path:
    """Write a Unigram tokenizer of a few letters that can encode text as control tokens."""
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -2.0) for letter in "▁abc</s>k")]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=3))
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>"])
    directory.mkdir(parents=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    roles = {"eos_token": "</s>", "pad_token": "<pad>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(roles), encoding="utf-8")
    return directory


CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML, without the blocks in which transformers' templates mark answers."""


def write_chat_bpe(directory: Path, template: str = CHAT_TEMPLATE) -> Path:
    """Write a byte-level BPE and a chat template that ends each message with the end-of-sequence token."""
    write_bpe(directory, {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>"})
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    return directory


def write_conversations(file: Path, conversations: Sequence[Sequence[tuple[str, str]]], rows: int = 1000) -> Path:
    """Write a Parquet file of download with conversations of (role, content) pairs."""
    records = [
        {"title": "", "selftext": "", "source": "toy", "answers": {"text": texts, "role": roles}}
        for roles, texts in ([list(column) for column in zip(*pairs, strict=True)] for pairs in conversations)
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(records), file, row_group_size=rows)
    return file


def write_questions(file: Path, records: Sequence[tuple[str, str, Sequence[str]]], rows: int = 1000) -> Path:
    """Write a Parquet file of download with records of (title, text, answers)."""
    table = pa.Table.from_pylist(
        [
            {"title": title, "selftext": selftext, "answers": {"text": list(texts)}, "source": "toy"}
            for title, selftext, texts in records
        ]
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file, row_group_size=rows)
    return file


def hash_files(directory: Path) -> dict[str, str]:
    """Return the pin of `directory`: file name to hash."""
    return {file.name: compute_sha256(file) for file in sorted(directory.iterdir())}


def make_record_batch(rows: Sequence[TokenIds], num_bytes: Sequence[int], schema: pa.Schema) -> pa.RecordBatch:
    """Return rows of token ids as a record batch of tokenize."""
    offsets = np.cumsum([0, *(len(row) for row in rows)], dtype=np.int64)
    input_ids = pa.LargeListArray.from_arrays(to_arrow(offsets), to_arrow(np.concatenate(rows)))
    return pa.record_batch([input_ids, to_arrow(np.array(num_bytes, np.int32))], schema=schema)


def write_shards(
    directory: Path, schema: pa.Schema, batches: Sequence[pa.RecordBatch], per_shard: int | None = None
) -> Path:
    """Write shards of `per_shard` batches (None: one shard), and return the directory."""
    size = per_shard or len(batches) or 1
    cut = [batches[start : start + size] for start in range(0, max(1, len(batches)), size)]
    shards = [write_shard(directory / get_shard_name(number), schema, some) for number, some in enumerate(cut)]
    write_checksums(directory, shards)
    return directory


def write_tokens(
    directory: Path,
    documents: Mapping[str, Sequence[Sequence[int]]],
    vocab_size: int = 300,
    rows: int = 3,
    per_shard: int | None = None,
) -> Path:
    """Write the output of tokenize, with `rows` documents per Arrow batch, and return the directory."""
    dtype = np.uint16 if vocab_size <= 2**16 else np.uint32
    schema = pa.schema([("input_ids", pa.large_list(pa.from_numpy_dtype(dtype))), ("num_bytes", pa.int32())])
    for name in SPLITS:
        arrays = [np.array(ids, dtype) for ids in documents[name]]
        cut = [arrays[start : start + rows] for start in range(0, len(arrays), rows)]
        batches = [make_record_batch(batch, [len(ids) for ids in batch], schema) for batch in cut]
        write_shards(directory / name, schema, batches, per_shard)
    vocabulary = {"size": vocab_size, "special": {"eos_token": 0}, "prefix": [], "suffix": [0], "lead": [0]}
    write_json(directory / "stats.json", {"vocabulary": vocabulary})
    return directory


def read_contents(directory: Path) -> dict[str, bytes]:
    """Return the files below `directory`, relative path to bytes."""
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    return {file.relative_to(directory).as_posix(): file.read_bytes() for file in files}


def read_stats(directory: Path) -> Any:
    """Read the ledger in `directory`."""
    return json.loads((directory / "stats.json").read_text(encoding="utf-8"))


class _QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def serve(handler: Any) -> Iterator[str]:
    """Run an HTTP server with `handler` on the loopback interface, and yield its URL."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def serve_files(directory: Path) -> Any:
    """Serve the files of `directory`; the context yields the URL."""
    return serve(functools.partial(_QuietHandler, directory=str(directory)))


def read_until(stream: IO[str], text: str) -> str:
    """Read the output of a process from `stream` up to the first line with `text`."""
    lines: list[str] = []
    for line in stream:
        lines.append(line)
        if text in line:
            return "".join(lines)
    raise AssertionError("".join(lines))
