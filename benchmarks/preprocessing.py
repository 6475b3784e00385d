"""How fast the way from a JSONL file to blocks is, against the guide's procedure and run_clm.py's, on one text.

Command python benchmarks/preprocessing.py [--documents N ...] [--guide-documents N] [--tokenizer DIRECTORY]
                                           [--before CHECKOUT] [--files-only]

From the file to blocks, both sides are processes, imports included: download (near duplicates are counted, as by
default), tokenize and group_texts here; load_dataset("json"), train_test_split, map and group_texts there. --before
measures download of another checkout of this repository as well; --files-only measures nothing else.

The documents are the embedded sample's, repeated and perturbed (a function of their number). The guide's procedure is
datasets.map with a transformers tokenizer and its group_texts, whose `sum(lists, [])` is quadratic; run_clm.py's joins
by `chain` and does not truncate. Both run with 1 and with 4 processes, and the faster counts. Beyond the comparison
from the file, their time begins with `map`, ours with the stage: neither pays for imports or, in theirs, for turning
the records into a Dataset. Every run is a process of its own. On more than --guide-documents theirs runs on that many:
it goes batch by batch, at a rate that does not depend on their number.
The last line printed is one JSON object about the last size.
"""

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from stages.core.artifacts import SPLITS, free_copy

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "data/sample/askscience.jsonl"
BLOCK_SIZE, MOST_TOKENS = 128, 1024  # the guide's block_size; where its tokenizer truncates
VOCABULARY = 8192  # of the tokenizer made here where none is given


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--documents", type=int, nargs="+", default=[5_000, 50_000, 500_000])
    parser.add_argument("--guide-documents", type=int, default=50_000)
    parser.add_argument("--tokenizer", type=Path, help="directory of a byte-level BPE with an end-of-sequence token")
    parser.add_argument("--rounds", type=int, default=3, help="of ours; theirs runs once")
    parser.add_argument("--before", type=Path, help="a checkout after `make env`, whose download is measured as well")
    parser.add_argument("--files-only", action="store_true", help="from the file to blocks, and no more")
    arguments = parser.parse_args()
    os.environ["PYTHONPATH"] = str(ROOT)
    for number in arguments.documents:
        with tempfile.TemporaryDirectory() as scratch:
            os.environ["HF_HOME"] = f"{scratch}/hf"  # nothing cached before counts, and nothing is left
            place = Path(scratch)
            tokenizer = own_tokenizer(arguments.tokenizer, place / "tokenizer")
            print(f"-- {number:,} documents", flush=True)
            result = measure_files(place, tokenizer, number, arguments)
            if not arguments.files_only:
                result |= measure(place, tokenizer, number, arguments.guide_documents, arguments.rounds)
        print(json.dumps(result), flush=True)


def measure(place: Path, tokenizer: Path, number: int, most_of_guide: int, rounds: int) -> dict[str, Any]:
    """The figures of `number` documents, of which download has written the records."""
    ours = [in_process(by_functions, place, tokenizer) for _ in range(rounds)]
    tokens = ours[0]["tokens"]
    stages = [by_processes(place, tokenizer) for _ in range(rounds)]
    seconds = {name: statistics.median(run[name] for run in stages) for name in ("tokenize", "group_texts")}
    ours_rate = tokens / statistics.median(run["seconds"] for run in ours)
    process_rate = tokens / (seconds["tokenize"] + seconds["group_texts"])
    engine_rate = statistics.median(in_process(by_engine, place, tokenizer) for _ in range(rounds))
    print(f"ours, as functions:  {ours_rate:14,.0f} tokens/s   ({tokens:,} tokens)")
    print(f"ours, as processes:  {process_rate:14,.0f} tokens/s   (" + show(seconds) + ")")
    print(f"the engine alone:    {engine_rate:14,.0f} tokens/s   (strings in memory)")
    print(
        f"group_texts alone: {ours[0]['grouping']:.2f} s; copying the files that it reads: {copying(place):.2f} s",
        flush=True,
    )
    raw = "raw"
    if number > most_of_guide:
        write_documents(place / "fewer.jsonl", most_of_guide)
        process("download", *download(place, "fewer", count=False))
        raw = "fewer"
    theirs: dict[str, float] = {}
    for name, truncate in (("guide", True), ("run_clm", False)):
        runs = {n: in_process(by_datasets, place, tokenizer, raw, truncate, n) for n in (1, 4)}
        for processes, run in runs.items():
            print(
                f"{name}, {processes} processes: {run['rate']:14,.0f} tokens/s   (" + show(run["seconds"]) + ")",
                flush=True,
            )
        theirs[name] = max(run["rate"] for run in runs.values())
    print("the same token stream:", in_process(compare, place, tokenizer, raw))
    return {
        "tokens": tokens,
        "ours_tokens_per_second": round(ours_rate),
        "guide_tokens_per_second": round(theirs["guide"]),
        "run_clm_tokens_per_second": round(theirs["run_clm"]),
        "engine_tokens_per_second": round(engine_rate),
        "ratio_to_guide": round(ours_rate / theirs["guide"], 1),
        "ratio_to_run_clm": round(ours_rate / theirs["run_clm"], 1),
        "ratio_to_engine": round(ours_rate / engine_rate, 2),
        "ratio_to_guide_as_processes": round(process_rate / theirs["guide"], 1),
        "peak_rss_bytes": max(run["peak_rss"] for run in ours),
        "peak_anonymous_bytes": max(run["peak_anonymous"] for run in ours),
    }


def measure_files(place: Path, tokenizer: Path, number: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of the way from a file of `number` documents to blocks."""
    file = place / "raw.jsonl"
    write_documents(file, number)
    megabytes = file.stat().st_size / 1e6
    result: dict[str, Any] = {"documents": number, "megabytes": round(megabytes)}
    here = [("download", True, ROOT), ("download_without_count", False, ROOT)]
    before = [(f"before_{name}", count, arguments.before) for name, count, _ in here] if arguments.before else []
    seconds: dict[str, list[float]] = {}
    for _ in range(arguments.rounds):
        for name, count, root in [*here[::-1], *before]:
            source = [] if root == arguments.before else ["source=files"]
            run, peak = watched("download", *download(place, "raw", count), *source, root=root)
            seconds.setdefault(name, []).append(run)
            result[f"{name}_peak_bytes"] = max(peak, result.get(f"{name}_peak_bytes", 0))
        process("download", *download(place, "raw", count=True), "source=files")
        for stage, run in by_processes(place, tokenizer).items():
            seconds.setdefault(stage, []).append(run)
    medians = {name: statistics.median(runs) for name, runs in seconds.items()}
    for name, run in medians.items():
        result[f"{name}_seconds"] = round(run, 2)
        if "download" in name:
            result[f"{name}_megabytes_per_second"] = round(megabytes / run, 1)
    ours = sum(medians[name] for name in ("download", "tokenize", "group_texts"))
    guide = guide_seconds(place, tokenizer, number, arguments.guide_documents)
    result |= {"file_to_blocks_seconds": round(ours, 2), "guide_file_to_blocks_seconds": round(guide, 1)}
    result["file_to_blocks_ratio_to_guide"] = round(guide / ours, 1)
    for name, value in result.items():
        print(f"{name:45}{value:>16,}", flush=True)
    return result


def guide_seconds(place: Path, tokenizer: Path, number: int, most: int) -> float:
    """Seconds that the guide's way takes from a file of `number` documents to blocks.

    On more than `most` it is not run: each further document takes as long as one of these does, start-up aside.
    """
    runs = {}
    for size in [number] if number <= most else [most // 10, most]:
        file = place / f"guide-{size}.jsonl"
        write_documents(file, size)
        started = time.perf_counter()
        in_process(by_guide, place, tokenizer, str(file))
        runs[size] = time.perf_counter() - started
    if number <= most:
        return runs[number]
    return runs[most] + (number - most) * (runs[most] - runs[most // 10]) / (most - most // 10)


def by_guide(place: Path, directory: Path, file: str) -> None:
    """The guide, from load_dataset to blocks, with the four processes that it uses."""
    from datasets import disable_caching, disable_progress_bars, load_dataset
    from transformers import AutoTokenizer

    disable_progress_bars()
    disable_caching()
    records = load_dataset("json", data_files=file, split="train", cache_dir=str(place / "json"))
    records = records.train_test_split(test_size=0.2).flatten()
    tokenizer = AutoTokenizer.from_pretrained(directory)

    def preprocess(examples: dict[str, Any]) -> Any:
        return tokenizer([" ".join(texts) for texts in examples["answers.text"]], truncation=True)

    columns = records["train"].column_names
    mapped = records.map(preprocess, batched=True, num_proc=4, remove_columns=columns)
    mapped.map(group_by_sum, batched=True, num_proc=4)


def show(seconds: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items())


def in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function` gives in a fresh process, so that nothing is warm and memory is its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


# -- the documents -----------------------------------------------------------------------------------------------------


def perturbed(text: str, chance: random.Random) -> str:
    """`text` with its sentences in another order, and one word of thirty turned into one that no text held before."""
    sentences = re.split(r"(?<=[.!?]) ", text)
    chance.shuffle(sentences)
    words = " ".join(sentences).split(" ")
    for _ in range(1 + len(words) // 30):
        index = chance.randrange(len(words))
        words[index] = words[index][::-1] if chance.random() < 0.5 else f"{words[index]}{chance.randrange(10_000)}"
    return " ".join(words)


def sample_records() -> list[dict[str, Any]]:
    return [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]


def write_documents(file: Path, number: int) -> None:
    records = sample_records()
    with file.open("w", encoding="utf-8") as lines:
        for index in range(number):
            record, chance = records[index % len(records)], random.Random(index)
            texts = [perturbed(text, chance) for text in record["answers"]["text"]]
            lines.write(json.dumps({"title": f"{record['title']} {index}", "answers": {"text": texts}}) + "\n")


def own_tokenizer(given: Path | None, directory: Path) -> Path:
    """A directory with the tokenizer `given`, or with a byte-level BPE trained on the sample, that truncates."""
    from stages.tokens.schema import TrainedTokenizer
    from stages.tokens.vocabulary import train_tokenizer

    if given is None:
        texts = [record["answers"]["text"] for record in sample_records()]
        config = TrainedTokenizer(vocab_size=VOCABULARY, special_tokens={"eos_token": "<|endoftext|>"})
        train_tokenizer(config, iter(texts), directory)
    else:
        directory.mkdir()
        free_copy(given, directory)
    settings = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": MOST_TOKENS}))
    return directory


# -- ours --------------------------------------------------------------------------------------------------------------


def download(place: Path, name: str, count: bool) -> list[str]:
    """What the download stage is told for the documents in a file."""
    counting = f"data.count_near_duplicates={str(count).lower()}"
    return ["data=files", f"data.path={place / name}.jsonl", counting, f"out={place / name}"]


def choices(place: Path, tokenizer: Path) -> dict[str, list[str]]:
    """What the stages are told."""
    from stages.core.artifacts import sha256

    pins = ",".join(f"{file.name}:'{sha256(file)}'" for file in sorted(tokenizer.iterdir()))
    source = ["model.tokenizer.train=null", f"+model.tokenizer.path={tokenizer}", f"+model.tokenizer.files={{{pins}}}"]
    pinned = ["task=causal", "data=files", "model=tiny-gpt2", *source]
    return {
        "tokenize": [*pinned, f"raw={place / 'raw'}", f"out={place / 'tokens'}"],
        "group_texts": [
            f"block_size={BLOCK_SIZE}",
            f"tokens={place / 'tokens'}",
            f"raw={place / 'raw'}",
            f"out={place / 'blocks'}",
        ],
    }


def process(stage: str, *overrides: str) -> float:
    """Seconds that the stage takes as a process."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", f"stages.{stage}", *overrides], check=True, capture_output=True)
    return time.perf_counter() - started


def watched(stage: str, *overrides: str, root: Path) -> tuple[float, int]:
    """Seconds that the stage takes as a process, and the most memory that it and those that it starts hold, bytes."""
    peak = 0
    started = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": str(root)}
    python = sys.executable if root == ROOT else str(root.resolve() / ".venv/bin/python")
    command = [python, "-m", f"stages.{stage}", *overrides]
    process = psutil.Popen(command, cwd=root, env=environment, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        with contextlib.suppress(psutil.Error):
            peak = max(peak, sum(one.memory_info().rss for one in [process, *process.children(recursive=True)]))
        time.sleep(0.05)
    seconds = time.perf_counter() - started
    assert process.returncode == 0, command
    return seconds, peak


def by_processes(place: Path, tokenizer: Path) -> dict[str, float]:
    return {stage: process(stage, *overrides) for stage, overrides in choices(place, tokenizer).items()}


class Memory(threading.Thread):
    """The most memory that this process has held while the thread ran, bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.anonymous, self.rss = 0, 0
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(0.01):
            self.look()

    def look(self) -> None:
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        self.anonymous = max(self.anonymous, 1024 * int(fields["RssAnon"].split()[0]))
        self.rss = max(self.rss, 1024 * int(fields["VmRSS"].split()[0]))

    def stop(self) -> None:
        self.look()
        self._done.set()
        self.join()


def by_functions(place: Path, tokenizer: Path) -> dict[str, Any]:
    """tokenize and group_texts as functions: files in, files out."""
    from stages.core.compose import compose, load
    from stages.group_texts import stage as group_texts
    from stages.tokenize import stage as tokenize

    schemas: list[Any] = [tokenize.TokenizeConfig, group_texts.GroupTextsConfig]
    configs = [
        load(schema, compose(stage, overrides))
        for schema, (stage, overrides) in zip(schemas, choices(place, tokenizer).items(), strict=True)
    ]
    memory = Memory()
    memory.start()
    times = [time.perf_counter()]
    for stage, config in zip((tokenize, group_texts), configs, strict=True):
        stage.main(config)
        times.append(time.perf_counter())
    memory.stop()
    ledgers = [json.loads((place / "tokens" / split / "stats.json").read_text()) for split in SPLITS]
    tokens = sum(ledger["tokens"] for ledger in ledgers)
    return {
        "seconds": times[2] - times[0],
        "grouping": times[2] - times[1],
        "tokens": tokens,
        "peak_rss": memory.rss,
        "peak_anonymous": memory.anonymous,
    }


def copying(place: Path) -> float:
    """Seconds that a copy of the tokens' files takes."""
    started = time.perf_counter()
    shutil.copytree(place / "tokens", place / "copy")
    return time.perf_counter() - started


def by_engine(place: Path, tokenizer: Path) -> float:
    """Tokens per second of the engine on strings in memory."""
    from stages.tokens.encoding import choose_engine
    from stages.tokens.vocabulary import load_tokenizer

    groups = [texts.to_pylist() for split in SPLITS for texts in text_file(place / f"raw/{split}.parquet")]
    _, engine = choose_engine(load_tokenizer(tokenizer), groups[0][:1])
    started = time.perf_counter()
    tokens = sum(len(engine(texts).ids) for texts in groups)
    return tokens / (time.perf_counter() - started)


def text_file(file: Path) -> Any:
    from stages.tokens.texts import Flatten, TextFile

    return TextFile(file, Flatten(columns=["answers.text"], joiner=" "))


# -- theirs ------------------------------------------------------------------------------------------------------------


def group_by_sum(examples: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """The guide's group_texts, in what it computes: `sum(lists, [])`, whole blocks, labels."""
    return blocks_of({key: sum(lists, []) for key, lists in examples.items()})  # noqa: RUF017


def group_by_chain(examples: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """run_clm.py's."""
    return blocks_of({key: list(chain(*lists)) for key, lists in examples.items()})


def blocks_of(joined: dict[str, list[Any]]) -> dict[str, list[Any]]:
    length = len(joined["input_ids"]) // BLOCK_SIZE * BLOCK_SIZE
    blocks = {key: [ids[i : i + BLOCK_SIZE] for i in range(0, length, BLOCK_SIZE)] for key, ids in joined.items()}
    return blocks | {"labels": blocks["input_ids"].copy()}


def tokenized(place: Path, directory: Path, raw: str, truncate: bool, processes: int) -> Any:
    """The documents through the guide's first `map`."""
    from datasets import DatasetDict, disable_caching, disable_progress_bars, load_dataset
    from transformers import AutoTokenizer

    disable_progress_bars()
    disable_caching()
    files = {split: str(place / raw / f"{split}.parquet") for split in SPLITS}
    records = DatasetDict(load_dataset("parquet", data_files=files)).flatten()
    tokenizer = AutoTokenizer.from_pretrained(directory)

    def preprocess(examples: dict[str, Any]) -> Any:
        return tokenizer([" ".join(texts) for texts in examples["answers.text"]], truncation=truncate)

    columns = records["train"].column_names
    started = time.perf_counter()
    mapped = records.map(preprocess, batched=True, num_proc=processes, remove_columns=columns)
    return mapped, time.perf_counter() - started


def by_datasets(place: Path, directory: Path, raw: str, truncate: bool, processes: int) -> dict[str, Any]:
    mapped, seconds = tokenized(place, directory, raw, truncate, processes)
    started = time.perf_counter()
    group = group_by_sum if truncate else group_by_chain
    mapped.map(group, batched=True, num_proc=processes)
    grouping = time.perf_counter() - started
    lengths = (mapped[split].with_format("arrow")["input_ids"] for split in SPLITS)
    tokens = sum(int(array.value_lengths().sum().as_py()) for lists in lengths for array in lists[:].chunks)
    return {"rate": tokens / (seconds + grouping), "seconds": {"tokenize": seconds, "group": grouping}}


def compare(place: Path, directory: Path, raw: str) -> str:
    """Whether each document's tokens are the guide's, as far as the guide keeps them."""
    import numpy as np

    from stages.tokens.encoding import choose_engine
    from stages.tokens.vocabulary import load_tokenizer

    mapped, _ = tokenized(place, directory, raw, True, 1)
    _, engine = choose_engine(load_tokenizer(directory), [])
    same = cut = 0
    for split in SPLITS:
        theirs = iter(mapped[split])
        for texts in text_file(place / raw / f"{split}.parquet"):
            encoded = engine(texts.to_pylist())
            for ids, row in zip(np.split(encoded.ids, encoded.offsets[1:-1]), theirs, strict=False):
                assert ids[:MOST_TOKENS].tolist() == row["input_ids"], "the token streams differ"
                same, cut = same + 1, cut + (len(ids) > MOST_TOKENS)
    return f"yes, of {same:,} documents ({cut:,} of which the guide cuts at {MOST_TOKENS} tokens)"


if __name__ == "__main__":
    main()
