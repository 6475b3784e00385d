"""Speed of preprocessing from a JSONL file to blocks, compared with the guide's procedure and run_clm.py's.

Command python benchmarks/preprocessing.py [--documents N ...] [--guide-documents N] [--tokenizer DIRECTORY]
                                           [--before CHECKOUT] [--files-only]

The first comparison is from the file to blocks, in processes, including imports. Ours runs download (near duplicates
are counted, as by default), tokenize and group_texts; theirs runs load_dataset("json"), train_test_split, map and
group_texts. --before also measures the download stage of another checkout of this repository. --files-only stops after
this comparison.

The documents are those of the embedded sample, repeated and perturbed as a function of their number. The guide's
procedure is datasets.map with a transformers tokenizer and a group_texts with `sum(lists, [])`, which is quadratic;
run_clm.py joins with `chain` and does not truncate. Both run with 1 and with 4 processes, and the faster run counts. In
the second comparison, their time starts with `map` and ours with the stage, so that it excludes imports and, for
theirs, the conversion of the records to a Dataset. Every run is a new process. If there are more documents than
--guide-documents, theirs runs on that many: it works in batches, at a rate that does not depend on their number.
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
from stages.core.artifacts import SPLITS, copy_files

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "data/sample/askscience.jsonl"
BLOCK_SIZE, MAX_TOKENS = 128, 1024  # the guide's block_size; the length at which its tokenizer truncates
VOCAB_SIZE = 8192  # of the tokenizer that is trained if none is given


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--documents", type=int, nargs="+", default=[5_000, 50_000, 500_000])
    parser.add_argument("--guide-documents", type=int, default=50_000)
    parser.add_argument("--tokenizer", type=Path, help="directory of a byte-level BPE with an end-of-sequence token")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of our side; theirs runs once")
    parser.add_argument(
        "--before", type=Path, help="checkout, after `make env`, of which the download stage is also measured"
    )
    parser.add_argument("--files-only", action="store_true", help="only the comparison from the file to blocks")
    arguments = parser.parse_args()
    os.environ["PYTHONPATH"] = str(ROOT)
    for num_documents in arguments.documents:
        with tempfile.TemporaryDirectory() as scratch:
            os.environ["HF_HOME"] = f"{scratch}/hf"  # neither uses existing caches nor leaves any
            directory = Path(scratch)
            tokenizer = write_tokenizer(arguments.tokenizer, directory / "tokenizer")
            print(f"-- {num_documents:,} documents", flush=True)
            result = measure_file_to_blocks(directory, tokenizer, num_documents, arguments)
            if not arguments.files_only:
                result |= measure_preprocessing(
                    directory, tokenizer, num_documents, arguments.guide_documents, arguments.rounds
                )
        print(json.dumps(result), flush=True)


def measure_preprocessing(
    directory: Path, tokenizer: Path, num_documents: int, max_guide_documents: int, rounds: int
) -> dict[str, Any]:
    """Return the figures for `num_documents` documents, starting from the records that download has written."""
    ours = [run_in_process(run_functions, directory, tokenizer) for _ in range(rounds)]
    tokens = ours[0]["tokens"]
    stages = [time_stages(directory, tokenizer) for _ in range(rounds)]
    seconds = {name: statistics.median(run[name] for run in stages) for name in ("tokenize", "group_texts")}
    ours_rate = tokens / statistics.median(run["seconds"] for run in ours)
    process_rate = tokens / (seconds["tokenize"] + seconds["group_texts"])
    engine_rate = statistics.median(run_in_process(measure_engine_rate, directory, tokenizer) for _ in range(rounds))
    print(f"ours, as functions:  {ours_rate:14,.0f} tokens/s   ({tokens:,} tokens)")
    print(f"ours, as processes:  {process_rate:14,.0f} tokens/s   (" + format_seconds(seconds) + ")")
    print(f"only the engine:     {engine_rate:14,.0f} tokens/s   (strings in memory)")
    print(
        f"only group_texts: {ours[0]['grouping']:.2f} s; copying the files that it reads: {time_copy(directory):.2f} s",
        flush=True,
    )
    raw = "raw"
    if num_documents > max_guide_documents:
        write_documents(directory / "fewer.jsonl", max_guide_documents)
        time_stage("download", *build_download_overrides(directory, "fewer", count=False))
        raw = "fewer"
    theirs: dict[str, float] = {}
    for name, truncate in (("guide", True), ("run_clm", False)):
        runs = {n: run_in_process(run_datasets, directory, tokenizer, raw, truncate, n) for n in (1, 4)}
        for processes, run in runs.items():
            print(
                f"{name}, {processes} processes: {run['rate']:14,.0f} tokens/s   ("
                + format_seconds(run["seconds"])
                + ")",
                flush=True,
            )
        theirs[name] = max(run["rate"] for run in runs.values())
    print("the same token stream:", run_in_process(compare_token_streams, directory, tokenizer, raw))
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


def measure_file_to_blocks(
    directory: Path, tokenizer: Path, num_documents: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Return the figures of the comparison from a file of `num_documents` documents to blocks."""
    file = directory / "raw.jsonl"
    write_documents(file, num_documents)
    megabytes = file.stat().st_size / 1e6
    result: dict[str, Any] = {"documents": num_documents, "megabytes": round(megabytes)}
    variants = [("download", True, ROOT), ("download_without_count", False, ROOT)]
    variants_before = (
        [(f"before_{name}", count, arguments.before) for name, count, _ in variants] if arguments.before else []
    )
    seconds: dict[str, list[float]] = {}
    for _ in range(arguments.rounds):
        for name, count, root in [*variants[::-1], *variants_before]:
            source = [] if root == arguments.before else ["source=files"]
            run, peak = measure_stage(
                "download", *build_download_overrides(directory, "raw", count), *source, root=root
            )
            seconds.setdefault(name, []).append(run)
            result[f"{name}_peak_bytes"] = max(peak, result.get(f"{name}_peak_bytes", 0))
        time_stage("download", *build_download_overrides(directory, "raw", count=True), "source=files")
        for stage, run in time_stages(directory, tokenizer).items():
            seconds.setdefault(stage, []).append(run)
    medians = {name: statistics.median(runs) for name, runs in seconds.items()}
    for name, run in medians.items():
        result[f"{name}_seconds"] = round(run, 2)
        if "download" in name:
            result[f"{name}_megabytes_per_second"] = round(megabytes / run, 1)
    ours = sum(medians[name] for name in ("download", "tokenize", "group_texts"))
    guide = measure_guide_seconds(directory, tokenizer, num_documents, arguments.guide_documents)
    result |= {"file_to_blocks_seconds": round(ours, 2), "guide_file_to_blocks_seconds": round(guide, 1)}
    result["file_to_blocks_ratio_to_guide"] = round(guide / ours, 1)
    for name, value in result.items():
        print(f"{name:45}{value:>16,}", flush=True)
    return result


def measure_guide_seconds(directory: Path, tokenizer: Path, num_documents: int, max_documents: int) -> float:
    """Return the seconds of the guide's procedure from a file of `num_documents` documents to blocks.

    For more than `max_documents`, they are extrapolated: apart from start-up, each document takes the same time.
    """
    runs = {}
    for size in [num_documents] if num_documents <= max_documents else [max_documents // 10, max_documents]:
        file = directory / f"guide-{size}.jsonl"
        write_documents(file, size)
        started = time.perf_counter()
        run_in_process(run_guide, directory, tokenizer, str(file))
        runs[size] = time.perf_counter() - started
    if num_documents <= max_documents:
        return runs[num_documents]
    return runs[max_documents] + (num_documents - max_documents) * (runs[max_documents] - runs[max_documents // 10]) / (
        max_documents - max_documents // 10
    )


def run_guide(directory: Path, tokenizer_directory: Path, file: str) -> None:
    """Run the guide's procedure from load_dataset to blocks, with its four processes."""
    from datasets import disable_caching, disable_progress_bars, load_dataset
    from transformers import AutoTokenizer

    disable_progress_bars()
    disable_caching()
    records = load_dataset("json", data_files=file, split="train", cache_dir=str(directory / "json"))
    records = records.train_test_split(test_size=0.2).flatten()
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_directory)

    def preprocess(examples: dict[str, Any]) -> Any:
        return tokenizer([" ".join(texts) for texts in examples["answers.text"]], truncation=True)

    columns = records["train"].column_names
    mapped = records.map(preprocess, batched=True, num_proc=4, remove_columns=columns)
    mapped.map(group_by_sum, batched=True, num_proc=4)


def format_seconds(seconds: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items())


def run_in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call `function` in a new process, with cold caches and separate memory, and return its result."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


# -- the documents -----------------------------------------------------------------------------------------------------


def perturb_text(text: str, rng: random.Random) -> str:
    """Return `text` with its sentences shuffled and one word in thirty replaced by a new one."""
    sentences = re.split(r"(?<=[.!?]) ", text)
    rng.shuffle(sentences)
    words = " ".join(sentences).split(" ")
    for _ in range(1 + len(words) // 30):
        index = rng.randrange(len(words))
        words[index] = words[index][::-1] if rng.random() < 0.5 else f"{words[index]}{rng.randrange(10_000)}"
    return " ".join(words)


def read_sample_records() -> list[dict[str, Any]]:
    return [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]


def write_documents(file: Path, num_documents: int) -> None:
    records = read_sample_records()
    with file.open("w", encoding="utf-8") as lines:
        for index in range(num_documents):
            record, rng = records[index % len(records)], random.Random(index)
            texts = [perturb_text(text, rng) for text in record["answers"]["text"]]
            lines.write(json.dumps({"title": f"{record['title']} {index}", "answers": {"text": texts}}) + "\n")


def write_tokenizer(existing: Path | None, directory: Path) -> Path:
    """Copy the tokenizer `existing`, or train a byte-level BPE on the sample; set its truncation to MAX_TOKENS."""
    from stages.tokens.schema import TrainedTokenizer
    from stages.tokens.vocabulary import train_tokenizer

    if existing is None:
        texts = [record["answers"]["text"] for record in read_sample_records()]
        config = TrainedTokenizer(vocab_size=VOCAB_SIZE, special_tokens={"eos_token": "<|endoftext|>"})
        train_tokenizer(config, iter(texts), directory)
    else:
        directory.mkdir()
        copy_files(existing, directory)
    settings = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": MAX_TOKENS}))
    return directory


# -- ours --------------------------------------------------------------------------------------------------------------


def build_download_overrides(directory: Path, name: str, count: bool) -> list[str]:
    """Return the overrides of the download stage for the documents in a file."""
    near_duplicates = f"data.count_near_duplicates={str(count).lower()}"
    return ["data=files", f"data.path={directory / name}.jsonl", near_duplicates, f"out={directory / name}"]


def build_stage_overrides(directory: Path, tokenizer: Path) -> dict[str, list[str]]:
    """Return the overrides of tokenize and group_texts."""
    from stages.core.artifacts import compute_sha256

    pins = ",".join(f"{file.name}:'{compute_sha256(file)}'" for file in sorted(tokenizer.iterdir()))
    source = ["model.tokenizer.train=null", f"+model.tokenizer.path={tokenizer}", f"+model.tokenizer.files={{{pins}}}"]
    common = ["task=causal", "data=files", "model=tiny-gpt2", *source]
    return {
        "tokenize": [*common, f"raw={directory / 'raw'}", f"out={directory / 'tokens'}"],
        "group_texts": [
            f"block_size={BLOCK_SIZE}",
            f"tokens={directory / 'tokens'}",
            f"raw={directory / 'raw'}",
            f"out={directory / 'blocks'}",
        ],
    }


def time_stage(stage: str, *overrides: str) -> float:
    """Run a stage as a process and return its seconds."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", f"stages.{stage}", *overrides], check=True, capture_output=True)
    return time.perf_counter() - started


def measure_stage(stage: str, *overrides: str, root: Path) -> tuple[float, int]:
    """Run a stage as a process; return its seconds and the peak memory of it and its children, in bytes."""
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


def time_stages(directory: Path, tokenizer: Path) -> dict[str, float]:
    return {
        stage: time_stage(stage, *overrides) for stage, overrides in build_stage_overrides(directory, tokenizer).items()
    }


class MemoryMonitor(threading.Thread):
    """Thread that records the peak memory of this process in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.anonymous, self.rss = 0, 0
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(0.01):
            self.update()

    def update(self) -> None:
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        self.anonymous = max(self.anonymous, 1024 * int(fields["RssAnon"].split()[0]))
        self.rss = max(self.rss, 1024 * int(fields["VmRSS"].split()[0]))

    def stop(self) -> None:
        self.update()
        self._done.set()
        self.join()


def run_functions(directory: Path, tokenizer: Path) -> dict[str, Any]:
    """Run tokenize and group_texts as functions, from files to files, and return their figures."""
    from stages.core.compose import compose_config, load_config
    from stages.group_texts import stage as group_texts
    from stages.tokenize import stage as tokenize

    schemas: list[Any] = [tokenize.TokenizeConfig, group_texts.GroupTextsConfig]
    configs = [
        load_config(schema, compose_config(stage, overrides))
        for schema, (stage, overrides) in zip(schemas, build_stage_overrides(directory, tokenizer).items(), strict=True)
    ]
    memory = MemoryMonitor()
    memory.start()
    times = [time.perf_counter()]
    for stage, config in zip((tokenize, group_texts), configs, strict=True):
        stage.main(config)
        times.append(time.perf_counter())
    memory.stop()
    ledgers = [json.loads((directory / "tokens" / split / "stats.json").read_text()) for split in SPLITS]
    tokens = sum(ledger["tokens"] for ledger in ledgers)
    return {
        "seconds": times[2] - times[0],
        "grouping": times[2] - times[1],
        "tokens": tokens,
        "peak_rss": memory.rss,
        "peak_anonymous": memory.anonymous,
    }


def time_copy(directory: Path) -> float:
    """Copy the files of tokens and return the seconds that it takes."""
    started = time.perf_counter()
    shutil.copytree(directory / "tokens", directory / "copy")
    return time.perf_counter() - started


def measure_engine_rate(directory: Path, tokenizer: Path) -> float:
    """Return the tokens per second of the engine on strings in memory."""
    from stages.tokens.encoding import choose_engine
    from stages.tokens.vocabulary import load_tokenizer

    files = [directory / f"raw/{split}.parquet" for split in SPLITS]
    groups = [segments.texts.to_pylist() for file in files for segments in open_texts(file)]
    _, engine = choose_engine(load_tokenizer(tokenizer), groups[0][:1])
    started = time.perf_counter()
    tokens = sum(len(engine(texts).ids) for texts in groups)
    return tokens / (time.perf_counter() - started)


def open_texts(file: Path) -> Any:
    from stages.tokens.texts import Flatten, TextFile

    return TextFile(file, Flatten(columns=["answers.text"], joiner=" "))


# -- theirs ------------------------------------------------------------------------------------------------------------


def group_by_sum(examples: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Group texts as the guide does, with `sum(lists, [])`."""
    return split_blocks({key: sum(lists, []) for key, lists in examples.items()})  # noqa: RUF017


def group_by_chain(examples: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Group texts as run_clm.py does."""
    return split_blocks({key: list(chain(*lists)) for key, lists in examples.items()})


def split_blocks(joined: dict[str, list[Any]]) -> dict[str, list[Any]]:
    length = len(joined["input_ids"]) // BLOCK_SIZE * BLOCK_SIZE
    blocks = {key: [ids[i : i + BLOCK_SIZE] for i in range(0, length, BLOCK_SIZE)] for key, ids in joined.items()}
    return blocks | {"labels": blocks["input_ids"].copy()}


def map_tokenizer(directory: Path, tokenizer_directory: Path, raw: str, truncate: bool, processes: int) -> Any:
    """Tokenize the documents with the guide's first `map`; return the data set and the seconds."""
    from datasets import DatasetDict, disable_caching, disable_progress_bars, load_dataset
    from transformers import AutoTokenizer

    disable_progress_bars()
    disable_caching()
    files = {split: str(directory / raw / f"{split}.parquet") for split in SPLITS}
    records = DatasetDict(load_dataset("parquet", data_files=files)).flatten()
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_directory)

    def preprocess(examples: dict[str, Any]) -> Any:
        return tokenizer([" ".join(texts) for texts in examples["answers.text"]], truncation=truncate)

    columns = records["train"].column_names
    started = time.perf_counter()
    mapped = records.map(preprocess, batched=True, num_proc=processes, remove_columns=columns)
    return mapped, time.perf_counter() - started


def run_datasets(
    directory: Path, tokenizer_directory: Path, raw: str, truncate: bool, processes: int
) -> dict[str, Any]:
    mapped, seconds = map_tokenizer(directory, tokenizer_directory, raw, truncate, processes)
    started = time.perf_counter()
    group = group_by_sum if truncate else group_by_chain
    mapped.map(group, batched=True, num_proc=processes)
    grouping = time.perf_counter() - started
    lengths = (mapped[split].with_format("arrow")["input_ids"] for split in SPLITS)
    tokens = sum(int(array.value_lengths().sum().as_py()) for lists in lengths for array in lists[:].chunks)
    return {"rate": tokens / (seconds + grouping), "seconds": {"tokenize": seconds, "group": grouping}}


def compare_token_streams(directory: Path, tokenizer_directory: Path, raw: str) -> str:
    """Check that each document's tokens equal the guide's, up to its truncation; return a summary."""
    import numpy as np

    from stages.tokens.encoding import choose_engine
    from stages.tokens.vocabulary import load_tokenizer

    mapped, _ = map_tokenizer(directory, tokenizer_directory, raw, True, 1)
    _, engine = choose_engine(load_tokenizer(tokenizer_directory), [])
    num_same = num_cut = 0
    for split in SPLITS:
        guide_rows = iter(mapped[split])
        for segments in open_texts(directory / raw / f"{split}.parquet"):  # one per document
            encoded = engine(segments.texts.to_pylist())
            for ids, row in zip(np.split(encoded.ids, encoded.offsets[1:-1]), guide_rows, strict=False):
                assert ids[:MAX_TOKENS].tolist() == row["input_ids"], "the token streams differ"
                num_same, num_cut = num_same + 1, num_cut + (len(ids) > MAX_TOKENS)
    return f"yes, of {num_same:,} documents ({num_cut:,} of which the guide cuts at {MAX_TOKENS} tokens)"


if __name__ == "__main__":
    main()
