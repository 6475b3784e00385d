"""Stages on a Ray cluster: the bytes of one machine, the losses of one process, and recovery from lost workers."""

import contextlib
import gzip
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from conftest import MODELS
from data_helpers import read_contents, write_jsonl
from training_cases import NO_DROPOUT, RUINED, read_losses

from benchmarks.ray_cluster import Cluster, find_obstacle, start_cluster
from stages.core.artifacts import SPLITS, list_shards, read_json
from stages.core.config import flatten_values
from stages.core.errors import StageError
from stages.launch.ray import open_storage
from stages.shell.ray_cluster import connect_to_cluster

if reason := find_obstacle():
    pytest.skip(reason, allow_module_level=True)

TASKS = ("causal", "mlm")
HERE = ""
SMALL_SHARDS = """
import sys
from stages.group_texts import block_shards
from stages.tokenize import stage as tokenize
tokenize.SHARD_BYTES = block_shards.SHARD_BYTES = 500
block_shards.TOKENS_PER_BATCH = 50
from conftest import run_stage
run_stage(*sys.argv[1:])
"""


@pytest.fixture(scope="module")
def cluster(cache: Path) -> Cluster:
    with start_cluster(2, cache) as cluster:
        yield cluster


@pytest.mark.slow
def test_preprocessing_on_a_cluster_writes_the_bytes_of_one_machine(
    cluster: Cluster, corpus: Path, tmp_path: Path
) -> None:
    (tmp_path / "raw").mkdir()
    for split in SPLITS:
        table = pq.read_table(corpus / f"raw/{split}.parquet")
        pq.write_table(table, tmp_path / f"raw/{split}.parquet", row_group_size=3)
    own = ["task=mlm", "data=files", MODELS["mlm"][0], "model.tokenizer.train.vocab_size=300"]
    for place, name in ((HERE, "here"), ("ray", "there")):
        tokens, blocks = tmp_path / name / "tokens", tmp_path / name / "blocks"
        tokenize = [*own, f"raw={tmp_path}/raw", f"out={tokens}"]
        grouping = ["block_size=16", f"tokens={tokens}", f"raw={tmp_path}/raw", f"out={blocks}"]
        for command in (["tokenize", *tokenize], ["group_texts", *grouping]):
            code, printed = cluster.run("-c", SMALL_SHARDS, *command, LM_REPRO_PREPROCESSING=place)
            assert code == 0, printed
        assert len(list_shards(tokens / "train")) > 2 < len(list_shards(blocks / "train"))
    assert read_contents(tmp_path / "there") == read_contents(tmp_path / "here")


SMALL_PARTS = """
import sys
from conftest import run_stage
from stages.download import sources
sources.PART_BYTES = 2000
run_stage("download", *sys.argv[1:])
"""


def long_records(number: int) -> list[dict[str, Any]]:
    text = " ".join(f"word{place}" for place in range(60))
    return [{"title": f"Question {i}?", "answers.text": [f"{text} {i}"]} for i in range(number)]


@pytest.mark.parametrize("name", [pytest.param("a.jsonl", marks=pytest.mark.slow), "a.jsonl.gz"])
def test_download_on_a_cluster_writes_the_bytes_of_one_machine(cluster: Cluster, tmp_path: Path, name: str) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", long_records(300))
    if name.endswith("gz"):
        (tmp_path / name).write_bytes(gzip.compress(file.read_bytes()))
    for place in (HERE, "ray"):
        command = ["data=files", f"data.path={tmp_path / name}", "source=x", f"out={tmp_path}/raw-{place}"]
        code, printed = cluster.run("-c", SMALL_PARTS, *command, LM_REPRO_PREPROCESSING=place)
        assert code == 0, printed
    assert read_contents(tmp_path / "raw-ray") == read_contents(tmp_path / "raw-")


@pytest.mark.slow
def test_download_on_a_cluster_that_loses_workers_writes_the_bytes_of_one_machine(
    cluster: Cluster, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "a.jsonl", long_records(9000))
    command = ["-c", SMALL_PARTS, "data=files", f"data.path={tmp_path}/a.jsonl", "source=x"]
    code, printed = cluster.run(*command, f"out={tmp_path}/raw", LM_REPRO_PREPROCESSING=HERE)
    assert code == 0, printed
    process = cluster.start(*command, f"out={tmp_path}/raw-ray", LM_REPRO_PREPROCESSING="ray")
    killed = 0
    while killed < 2 and process.poll() is None:
        for one in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if one.name().startswith("ray::_run_job"):
                    one.send_signal(signal.SIGKILL)
                    killed += 1
                    break
        time.sleep(0.5)
    printed, _ = process.communicate(timeout=400)
    assert process.returncode == 0, printed
    assert killed == 2, "it ended before two workers could be killed"
    assert read_contents(tmp_path / "raw-ray") == read_contents(tmp_path / "raw")


def test_download_on_a_cluster_of_a_malformed_record_names_it(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"title": "t", "answers.text": "x"}\n{\n')
    command = ["-m", "stages.download", "data=files", f"data.path={tmp_path}/a.jsonl", f"out={tmp_path}/raw"]
    code, printed = cluster.run(*command, LM_REPRO_PREPROCESSING="ray")
    assert code == 1
    assert f"{tmp_path}/a.jsonl:2: not JSON" in printed
    assert "Traceback" not in printed


def test_preprocessing_on_a_cluster_of_a_damaged_shard_names_it(cluster: Cluster, corpus: Path, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    for file, content in read_contents(corpus / "tokens/causal").items():
        (tokens / file).parent.mkdir(parents=True, exist_ok=True)
        (tokens / file).write_bytes(content[:-9] if file == "test/shard-00000.arrow" else content)
    paths = [f"tokens={tokens}", f"raw={corpus}/raw", f"out={tmp_path}/blocks"]
    command = ["-m", "stages.group_texts", "block_size=16", *paths]
    code, printed = cluster.run(*command, LM_REPRO_PREPROCESSING="ray")
    assert code == 1
    assert f"{tokens}/test/shard-00000.arrow is damaged" in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "blocks").exists()


ON_RAY = ["hardware.num_threads=1", "++hardware.ray={workers: 2, max_failures: 1, storage: null}"]


# Enough steps for Ray, which polls every two seconds, to register a checkpoint long before the end.
MANY_STEPS = ["batch_size=12", "num_train_epochs=40", "trainer.logging_steps=1"]


EVERY_TEN = ["++trainer.save_strategy=steps", "++trainer.save_steps=10"]


def steps(storage: Path) -> Iterator[int]:
    """Steps of the checkpoints in Ray's storage."""
    for file in storage.rglob("trainer_state.json"):
        with contextlib.suppress(OSError, StageError):  # incomplete, or already removed
            yield read_json(file)["global_step"]


def kill_a_worker_behind_a_checkpoint(storage: Path, least: int = 10) -> None:
    """Kill the second worker with SIGKILL after Ray has registered a checkpoint of step `least` or later."""
    deadline = time.monotonic() + 300
    while not list(storage.rglob("checkpoint_manager_snapshot.json")) or max(steps(storage), default=0) < least:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    workers = [one for one in psutil.process_iter() if one.name().startswith("ray::RayTrain")]
    assert len(workers) == 2, workers
    max(workers, key=lambda one: one.pid).send_signal(signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize(("task", "by_url"), [("causal", False), ("mlm", True)])
def test_training_on_a_cluster_that_loses_a_worker_has_the_losses_of_one_process(
    cluster: Cluster, cache: Path, overrides, run_toy, tmp_path: Path, task: str, by_url: bool
) -> None:
    storage = tmp_path / "storage" if by_url else cache / "ray"
    kept = [f"hardware.ray.storage=file://{storage}"] if by_url else []
    run_toy("train", task, tmp_path / "one", *NO_DROPOUT[task], *MANY_STEPS)
    command = overrides("train", task, tmp_path / "ray", *NO_DROPOUT[task], *MANY_STEPS, *EVERY_TEN, *ON_RAY, *kept)
    process = cluster.start("-m", "stages.train", *command)
    kill_a_worker_behind_a_checkpoint(storage)
    printed, _ = process.communicate(timeout=400)
    assert process.returncode == 0, printed
    assert "resuming from step" in printed, printed
    expected = read_losses(tmp_path / "one")
    assert len(expected) >= 200
    np.testing.assert_allclose(read_losses(tmp_path / "ray"), expected, atol=1e-4)
    assert not list(storage.iterdir())  # a finished run leaves nothing


@pytest.mark.slow
def test_training_on_a_cluster_that_loses_a_worker_still_has_the_best_model(
    cluster: Cluster, cache: Path, overrides, tmp_path: Path
) -> None:
    best = ["checkpoints.keep=1", "++trainer.load_best_model_at_end=true", "trainer.eval_strategy=steps"]
    # With more steps the loss would become NaN.
    many = [*MANY_STEPS, "num_train_epochs=24", *EVERY_TEN, "++trainer.eval_steps=10"]
    more = [*RUINED, *many, *best, *ON_RAY]
    process = cluster.start("-m", "stages.train", *overrides("train", "causal", tmp_path, *more))
    kill_a_worker_behind_a_checkpoint(cache / "ray", least=60)
    printed, _ = process.communicate(timeout=400)
    assert process.returncode == 0, printed
    before, resumed, after = printed.partition("resuming from step ")
    assert resumed, printed
    step = int(re.match(r"\d+", after)[0])
    seen = {int(at): float(loss) for at, loss in re.findall(r"step (\d+)/\d+: validation loss ([\d.]+)", before)}
    assert min(seen, key=seen.get) < step  # the best checkpoint is not the newest, otherwise this test proves nothing


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("/proc/nope", "it is not writable"),
        ("file:///proc/nope", "it is not writable"),
        ("http://127.0.0.1:9/x", "it is not writable"),
        ("nonsense://x", "it is not writable"),
        ("s3:/bucket/x", "neither a directory nor a URL"),
        ("memory://x", "cannot share a file system in memory"),
    ],
)
def test_ray_storage_that_cannot_be_written_is_an_error_that_names_it(url: str, reason: str) -> None:
    with pytest.raises(StageError, match=f"^hardware.ray.storage={url}.*{reason}"):
        open_storage(url)


def test_ray_storage_by_url_and_by_path_is_the_same_directory(tmp_path: Path) -> None:
    for name, given in (("one", f"file://{tmp_path}/one"), ("two", f"{tmp_path}/two")):
        filesystem, path = open_storage(given)
        assert path == f"{tmp_path}/{name}"
        with filesystem.open_output_stream(f"{path}/file") as file:
            file.write(b"content")
        assert (tmp_path / name / "file").read_bytes() == b"content"


def test_ray_local_is_refused_as_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    with pytest.raises(StageError, match="RAY_ADDRESS=local would make this stage start Ray"):
        connect_to_cluster()


@pytest.mark.slow
def test_a_stages_own_error_on_a_cluster_is_shown_and_not_tried_again(
    cluster: Cluster, overrides, cache: Path, tmp_path: Path
) -> None:
    code, printed = cluster.run("-m", "stages.train", *overrides("train", "causal", tmp_path, *ON_RAY, "block_size=32"))
    assert code == 1
    assert printed.count("train: error: block_size=32: the blocks in") == 1
    assert "tried" not in printed
    assert not (tmp_path / "model").exists()


@pytest.mark.slow
def test_evaluate_on_a_cluster_writes_the_metrics_of_one_process(
    cluster: Cluster, overrides, trained, tmp_path: Path
) -> None:
    outs = [f"out={tmp_path}/metrics.json", f"samples_out={tmp_path}/samples.md", f"report={tmp_path}/evaluation"]
    code, printed = cluster.run(
        "-m", "stages.evaluate", *overrides("evaluate", "causal", trained["causal"], *ON_RAY, *outs)
    )
    assert code == 0, printed
    found, expected = (
        dict(flatten_values(read_json(root / "evaluation/metrics.json"))) for root in (tmp_path, trained["causal"])
    )
    assert found == pytest.approx(expected, rel=1e-6)


def test_ray_without_a_cluster_is_an_error_that_says_how_to_start_one(
    cluster: Cluster, corpus: Path, tmp_path: Path
) -> None:
    paths = [f"tokens={corpus}/tokens/causal", f"raw={corpus}/raw", f"out={tmp_path}/blocks"]
    command = ["-m", "stages.group_texts", "block_size=16", *paths]
    code, printed = cluster.run(*command, LM_REPRO_PREPROCESSING="ray", RAY_ADDRESS="127.0.0.1:9")
    assert code == 1
    assert "no Ray cluster at 127.0.0.1:9" in printed and "ray start --head" in printed, printed
