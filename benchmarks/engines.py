"""Encoding speed of several byte-level BPE libraries, and a check that they give the ids of Hugging Face tokenizers.

Command python benchmarks/engines.py [--documents 5000] [--tokenizer DIRECTORY] [--rounds 3]
Needs   nothing for tokenizers and fastokens; `uv pip install gigatoken tiktoken` for the other two

The documents of benchmarks/preprocessing.py are encoded from strings in memory, 1,000 per call, on all cores. The first
round is reported separately, because word caches are still cold. The last line printed is one JSON object that maps
each library to its first and median tokens per second and to the number of documents that it encodes differently.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.preprocessing import write_documents, write_tokenizer
from stages.tokens.encoding import TokenizersEngine, build_fastokens_engine, build_token_bytes
from stages.tokens.vocabulary import load_tokenizer

BATCH_DOCUMENTS = 1000
# GPT-2's word pattern (Radford et al. 2019), the default of byte-level BPE unless tokenizer.json sets another one.
GPT2_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

Encode = Callable[[list[str]], list[Any]]  # texts to one array of token ids per text


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--documents", type=int, default=5000)
    parser.add_argument("--tokenizer", type=Path, help="directory of a byte-level BPE")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        directory = write_tokenizer(arguments.tokenizer, Path(scratch) / "tokenizer")
        write_documents(Path(scratch) / "documents.jsonl", arguments.documents)
        lines = (Path(scratch) / "documents.jsonl").read_text(encoding="utf-8").splitlines()
        texts = [" ".join(json.loads(line)["answers"]["text"]) for line in lines]
        batches = [texts[start : start + BATCH_DOCUMENTS] for start in range(0, len(texts), BATCH_DOCUMENTS)]
        result, expected = {}, None
        for name, encode in load_engines(directory):
            rates = []
            for _ in range(1 + arguments.rounds):
                started = time.perf_counter()
                encoded = [row for batch in batches for row in encode(batch)]
                rates.append(sum(map(len, encoded)) / (time.perf_counter() - started))
            expected = encoded if expected is None else expected
            differing = sum(not np.array_equal(row, other) for row, other in zip(encoded, expected, strict=True))
            result[name] = {
                "first_tokens_per_second": round(rates[0]),
                "tokens_per_second": round(statistics.median(rates[1:])),
                "documents_differing": differing,
            }
            print(f"{name:12}{rates[0]:14,.0f} first, {statistics.median(rates[1:]):14,.0f} after, {differing} differ")
    print(json.dumps(result))


def load_engines(directory: Path) -> Iterator[tuple[str, Encode]]:
    """Yield the name and the encoder of each installed library, the reference (tokenizers) first."""
    tokenizer = load_tokenizer(directory)
    reference, fast = TokenizersEngine(tokenizer), build_fastokens_engine(tokenizer)
    assert fast is not None

    def split_rows(engine: Any) -> Encode:
        return lambda texts: np.split((encoded := engine(texts)).ids, encoded.offsets[1:-1])

    yield "tokenizers", split_rows(reference)
    yield "fastokens", split_rows(fast)
    try:
        import gigatoken

        yield "gigatoken", wrap_gigatoken(gigatoken.Tokenizer(str(directory / "tokenizer.json")))
    except ImportError:
        print("gigatoken is not installed")
    try:
        import tiktoken
    except ImportError:
        print("tiktoken is not installed")
        return
    special = set(tokenizer.get_added_tokens_decoder())
    ranks = {spelt: rank for rank, spelt in enumerate(build_token_bytes(tokenizer).to_pylist()) if rank not in special}
    encoding = tiktoken.Encoding("own", pat_str=GPT2_WORDS, mergeable_ranks=ranks, special_tokens={})
    yield "tiktoken", encoding.encode_ordinary_batch


def wrap_gigatoken(tokenizer: Any) -> Encode:
    def encode(texts: list[str]) -> list[Any]:
        flat = tokenizer.encode_batch(texts)
        return np.split(np.asarray(flat.layout.content.data), np.asarray(flat.layout.offsets.data)[1:-1])

    return encode


if __name__ == "__main__":
    main()
