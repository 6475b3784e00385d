"""Which library encodes a byte-level BPE fastest, and whether each gives the very ids of Hugging Face tokenizers.

Command python benchmarks/engines.py [--documents 5000] [--tokenizer DIRECTORY] [--rounds 3]
Needs   nothing more for tokenizers and fastokens; `uv pip install gigatoken tiktoken` for these two

The documents are those of benchmarks/preprocessing.py, as strings in memory, 1,000 at a time, on all cores. The first
call is given apart: caches of words are cold there. The last line printed is one JSON object: library to first and
median tokens per second and to the number of documents encoded differently.
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
from benchmarks.preprocessing import own_tokenizer, write_documents
from stages.tokens.encoding import Tokenizers, fastokens_engine, token_bytes
from stages.tokens.vocabulary import load_tokenizer

AT_ONCE = 1000
# GPT-2's pattern of words (Radford et al. 2019), which byte-level BPE goes by unless a tokenizer.json says otherwise.
GPT2_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

Encode = Callable[[list[str]], list[Any]]  # texts to the ids of each


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--documents", type=int, default=5000)
    parser.add_argument("--tokenizer", type=Path, help="directory of a byte-level BPE")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        directory = own_tokenizer(arguments.tokenizer, Path(scratch) / "tokenizer")
        write_documents(Path(scratch) / "documents.jsonl", arguments.documents)
        lines = (Path(scratch) / "documents.jsonl").read_text(encoding="utf-8").splitlines()
        texts = [" ".join(json.loads(line)["answers"]["text"]) for line in lines]
        batches = [texts[start : start + AT_ONCE] for start in range(0, len(texts), AT_ONCE)]
        result, expected = {}, None
        for name, encode in engines(directory):
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


def engines(directory: Path) -> Iterator[tuple[str, Encode]]:
    """The installed libraries, the reference first."""
    tokenizer = load_tokenizer(directory)
    reference, fast = Tokenizers(tokenizer), fastokens_engine(tokenizer)
    assert fast is not None

    def rows(engine: Any) -> Encode:
        return lambda texts: np.split((encoded := engine(texts)).ids, encoded.offsets[1:-1])

    yield "tokenizers", rows(reference)
    yield "fastokens", rows(fast)
    try:
        import gigatoken

        yield "gigatoken", list_rows(gigatoken.Tokenizer(str(directory / "tokenizer.json")))
    except ImportError:
        print("gigatoken is not installed")
    try:
        import tiktoken
    except ImportError:
        print("tiktoken is not installed")
        return
    special = set(tokenizer.get_added_tokens_decoder())
    ranks = {spelt: rank for rank, spelt in enumerate(token_bytes(tokenizer).to_pylist()) if rank not in special}
    encoding = tiktoken.Encoding("own", pat_str=GPT2_WORDS, mergeable_ranks=ranks, special_tokens={})
    yield "tiktoken", encoding.encode_ordinary_batch


def list_rows(tokenizer: Any) -> Encode:
    def encode(texts: list[str]) -> list[Any]:
        flat = tokenizer.encode_batch(texts)
        return np.split(np.asarray(flat.layout.content.data), np.asarray(flat.layout.offsets.data)[1:-1])

    return encode


if __name__ == "__main__":
    main()
