"""Failures between a client and the Hub with the expected messages, for tests and benchmarks/hub_cases.py."""

import contextlib
import dataclasses
import gzip
import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from data_helpers import CAUSAL_TOKENS, MLM_TOKENS, REPOSITORY, make_questions, read_contents
from mini_hub import MiniHub

from stages.tokens.schema import TrainedTokenizer
from stages.tokens.vocabulary import train_tokenizer

COMMIT, OTHER = "0123456789abcdef0123456789abcdef01234567", "f" * 40
NAMES = ["tokenizer.json", "vocab.json", "tokenizer_config.json"]
REMOTE = {"tokenizer.json": b"the tokenizer", "tokenizer_config.json": b"its settings"}
GATED = {"failing": ("api", *NAMES, "README.md", "data/train.parquet"), "headers": {"X-Error-Code": "GatedRepo"}}
TOKEN = "hf_MARKEDTOKENthatNoFileOrLogMayHold"
VOCABULARY = 400  # tokens of small_model
LIMIT_SECONDS = 15.0  # maximum time for a Hub that sends nothing


def encode_parquet(rows: list[Any]) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), stream)
    return stream.getvalue()


def encode_json_lines(rows: list[Any]) -> bytes:
    return gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode(), mtime=0)


def make_records(number: int = 200) -> list[Any]:
    """Records nested as ELI5's are."""
    return [{"title": row["title"], "answers": {"text": row["answers.text"]}} for row in make_questions(number)]


REPOSITORIES: dict[str, dict[str, dict[str, bytes]]] = {
    "o/n": {COMMIT: REMOTE},
    "datasets/o/n": {COMMIT: {"data/train.parquet": encode_parquet(make_records())}},
    "datasets/o/lines": {COMMIT: {"train.json.gz": encode_json_lines(make_records())}},
    "datasets/o/script": {
        COMMIT: {"script.py": b"raise SystemExit('it ran')", "README.md": b"# Script"},
        OTHER: {"default/train/0000.parquet": encode_parquet(make_records())},
    },
}

MODEL_CLIENT = """
import json, sys
from stages.core.errors import StageError
from stages.hub.files import find_pinned_files
try:
    found = find_pinned_files("model", sys.argv[1], sys.argv[2], None, sys.argv[3].split(","), ["tokenizer.json"])
except StageError as error:
    sys.exit(f"StageError: {error}")
print(json.dumps({name: file.read_text() for name, file in found.items()}))
"""


class Client:
    """Client of the Hub at `url` in a new process, with its cache below `place`."""

    def __init__(self, place: Path, url: str) -> None:
        inherited = {key: value for key, value in os.environ.items() if not key.upper().startswith(("HF_", "HUGGING"))}
        own = {"HF_HOME": str(place / "hf"), "HF_ENDPOINT": url, "NO_PROXY": "127.0.0.1"}
        own |= {"PYTHONPATH": str(REPOSITORY), "LM_REPRO_CACHE": str(place / "lm-repro")}
        self.environment, self.place = inherited | own, place

    def process(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *command],
            env=self.environment | environment,
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )

    def run(
        self, repository: str = "o/n", revision: str = COMMIT, names: list[str] = NAMES, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Fetch files of a model."""
        return self.process("-c", MODEL_CLIENT, repository, revision, ",".join(names), **environment)

    def fetch(self, *arguments: Any, **environment: str) -> Any:
        """Return the files of a model, name to content."""
        done = self.run(*arguments, **environment)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def error(self, *arguments: Any, **environment: str) -> str:
        """Return the message of the StageError."""
        done = self.run(*arguments, **environment)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("StageError: "), done.stderr
        return done.stderr

    def download(
        self, repository: str = "o/n", revision: str = COMMIT, max_records: int | None = 100, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run stage download on a data set, with its outputs in `place`/raw."""
        hub = [f"data.hub.id={repository}", f"data.hub.revision='{revision}'"]
        split = ["data.split.train=0.4", "data.split.validation=0.3", "data.split.test=0.3"]
        amount = [f"data.max_records={max_records or 'null'}", "data.count_near_duplicates=false"]
        out = ["data=hub", "data.path=-", f"out={self.place}/raw"]
        return self.process("-m", "stages.download", *hub, *split, *amount, *out, **environment)


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    words: tuple[str, ...] = ()
    """Words of the error message; empty: the request succeeds."""
    hub: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Attributes to set on the MiniHub."""
    warm: bool = False
    """If True, an undisturbed run fills the cache first."""
    gone: bool = False
    """If True, the server is stopped."""
    repository: str = "o/n"
    revision: str = COMMIT
    whole: bool = False
    """If True, all records of a data set are read; if False, only the first ones."""
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    """Words of log lines."""


HANGS = {"seconds": 60.0}
OFFLINE = {"HF_HUB_OFFLINE": "1"}
ACCESS = ("access is refused (HTTP 401)", "accept its terms on http://127.0.0.1", "hf auth login", "HF_TOKEN")
CUT = ("the transfer was cut short; run the same command again",)

MODELS = [
    Case("first run"),
    Case("cached run", warm=True),
    Case("server gone, warm cache", warm=True, gone=True),
    Case("server gone, cold cache", ("cannot be reached", "http://127.0.0.1", "tools.pin_model", "HF_HOME"), gone=True),
    Case("offline, warm cache", warm=True, environment=OFFLINE),
    Case("offline, cold cache", ("HF_HUB_OFFLINE is set", "tools.pin_model"), environment=OFFLINE),
    Case("gated (401)", ACCESS, {**GATED, "refusal": 401}),
    Case("gated (403)", ("access is refused (HTTP 403)", *ACCESS[1:]), {**GATED, "refusal": 403}),
    Case("no such repository (404)", ("it does not exist", "/o/absent)", "check its name"), repository="o/absent"),
    Case("no such revision", ("it has no such revision", "/o/n/commits/main"), revision=OTHER),
    Case("500, then success", hub={"failures": 1, "refusal": 500}, notes=("HTTP 500: retrying",)),
    Case("500 for ever", ("HTTP 500",), {"failures": 99, "refusal": 500}),
    Case("download cut in the middle", hub={"cut": 1}),
    Case("download cut again and again", CUT, {"cut": 999}),
    Case("download of unknown size cut", CUT, {"cut": 999, "unsized": True}),
    Case("compressed download cut", CUT, {"cut": 999, "gzipped": True}),
    Case("compressed download", hub={"gzipped": True}),
    Case("slow server (1 s an answer)", hub={"seconds": 1.0}),
    Case("server that hangs", ("no answer in time",), HANGS),
    Case("server that hangs within a file", ("no answer in time",), {"stall": 60.0}),
]  # fmt: skip
DATA = [
    Case("first run"),
    Case("first run, all records", whole=True),
    Case("first run, json.gz", repository="o/lines"),
    Case("first run, json.gz, all records", repository="o/lines", whole=True),
    Case("branch", revision="main", hub={"branches": {"main": COMMIT}}),
    Case("cached run", warm=True),
    Case("cached run, all records", warm=True, whole=True),
    Case("server gone, warm cache, all records", warm=True, gone=True, whole=True, notes=("only a cached copy",)),
    Case("server gone, first records", ("127.0.0.1", "data.name=files", "streamed and not cached"), warm=True,
         gone=True),
    Case("server gone, cold cache", ("cannot be reached", "http://127.0.0.1", "data.name=files"), gone=True,
         revision="main"),
    Case("offline, warm cache, all records", warm=True, whole=True, environment=OFFLINE),
    Case("offline, cold cache", ("HF_HUB_OFFLINE is set", "data.name=files"), revision="main", environment=OFFLINE),
    Case("gated (401)", ACCESS, {**GATED, "refusal": 401}),
    Case("gated files (403)", ("access is refused", *ACCESS[1:]),
         {**GATED, "failing": GATED["failing"][1:], "refusal": 403}),
    Case("no such data set (404)", ("it does not exist", "/datasets/o/absent)", "check its name"),
         repository="o/absent"),
    Case("no such revision", ("it has no such revision", "/datasets/o/n/commits/main"), revision=OTHER),
    Case("script", ("it is a script", "never run", "refs/convert/parquet"), repository="o/script"),
    Case("script, its copy in Parquet", repository="o/script", revision="refs/convert/parquet",
         hub={"branches": {"refs/convert/parquet": OTHER}}),
    Case("500, then success", hub={"failures": 1, "refusal": 500}, notes=("HTTP 500: retrying",)),
    Case("500 for ever", ("HTTP 500",), {"failures": 999, "refusal": 500}),
    Case("download cut in the middle", hub={"cut": 1}),
    Case("download cut in the middle, all records", hub={"cut": 1}, whole=True),
    Case("download cut again and again, all records", CUT, {"cut": 999}, whole=True),
    Case("download of unknown size cut, all records", CUT, {"cut": 999, "unsized": True}, whole=True),
    Case("compressed download cut, all records", CUT, {"cut": 999, "gzipped": True}, whole=True),
    Case("slow server (1 s an answer)", hub={"seconds": 1.0}),
    Case("server that hangs", ("no answer in time",), HANGS),
    Case("server that hangs within a file", ("no answer in time",), {"stall": 60.0}),
    Case("server that hangs within a file, all records", ("no answer in time",), {"stall": 60.0}, whole=True),
]  # fmt: skip


@dataclasses.dataclass
class Outcome:
    seconds: float
    failed: bool
    said: str
    """Text on stderr, without the ports of addresses."""


def run_case(case: Case, kind: str, place: Path) -> Outcome:
    """Run a client of `kind` (model or data) in `case`, with its cache below `place`."""
    hub = MiniHub(REPOSITORIES)

    def ask(url: str, **environment: str) -> subprocess.CompletedProcess[str]:
        client = Client(place, url)
        if kind == "model":
            return client.run(case.repository, case.revision, **environment)
        return client.download(case.repository, case.revision, None if case.whole else 100, **environment)

    with contextlib.ExitStack() as serving:
        url = serving.enter_context(hub.serve())
        if case.warm:
            assert ask(url).returncode == 0
        for name, value in case.hub.items():
            setattr(hub, name, value)
        if case.gone:
            serving.close()
        started = time.monotonic()
        done = ask(url, **case.environment)
        seconds = time.monotonic() - started
    return Outcome(seconds, done.returncode != 0, re.sub(r"(127\.0\.0\.1):\d+", r"\1", done.stderr))


def make_blimp_files(*names: str) -> dict[str, bytes]:
    """Return files of the BLiMP configurations `names`, with its columns and three pairs each."""
    own = {"field": "syntax", "linguistics_term": "island_effects", "simple_LM_method": True}
    rows = [
        {"sentence_good": f"Rain falls when air cools {row}.", "sentence_bad": f"Rain when falls air cools {row}."}
        for row in range(3)
    ]
    return {
        f"{name}/train-00000-of-00001.parquet": encode_parquet([{**row, **own, "UID": name} for row in rows])
        for name in names
    }


def make_guide_questions() -> list[Any]:
    """Return the embedded sample with the columns of ELI5-Category."""
    file = REPOSITORY / "data/sample/askscience.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [
        {
            **{key: record[key] for key in ("q_id", "title", "selftext", "subreddit")},
            "category": ("Biology", "Physics")[number % 2],
            "answers": {**record["answers"], "text_urls": [[] for _ in record["answers"]["text"]]},
            "title_urls": ["url"],
            "selftext_urls": ["url"],
        }
        for number, record in enumerate(rows)
    ]


def make_small_model(task: str, directory: Path) -> dict[str, bytes]:
    """Return the files of a small model with the architecture and positions of the guide's model."""
    from transformers import GPT2Config, GPT2LMHeadModel, RobertaConfig, RobertaForMaskedLM

    special = CAUSAL_TOKENS if task == "causal" else MLM_TOKENS
    texts = [text for row in make_guide_questions() for text in row["answers"]["text"]]
    train_tokenizer(TrainedTokenizer(vocab_size=VOCABULARY, special_tokens=special), iter([texts]), directory)
    if task == "causal":
        model: Any = GPT2LMHeadModel(
            GPT2Config(vocab_size=VOCABULARY, n_positions=1024, n_embd=16, n_layer=1, n_head=2)
        )
    else:
        model = RobertaForMaskedLM(
            RobertaConfig(
                vocab_size=VOCABULARY,
                max_position_embeddings=514,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
            )
        )
    model.save_pretrained(directory)
    return read_contents(directory)
