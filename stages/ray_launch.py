"""Starts the processes of a stage on a Ray cluster, by Ray Train, which starts them anew where one is lost."""

import contextlib
import importlib
import json
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from stages.app import describe, start_logging
from stages.cache import cache_directory
from stages.errors import StageError
from stages.ray_cluster import connected

log = logging.getLogger(__name__)


def run_on_ray(stage: str, work: Callable[[Any], None], config: Any, name: str | None) -> None:
    """Do `work(config)` in the processes that config.hardware.ray describes.

    Args:
        name: of the run, by which its checkpoints are found again; None: it makes none.

    Raises:
        StageError: the error of a process, or what went wrong with the cluster.
    """
    ray = connected()
    import pyarrow.fs
    from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig, UserCallback
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

    class EndAtOnce(UserCallback):  # type: ignore[misc]
        """Tries nothing again where a process failed by what it was given."""

        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            for error in worker_exceptions.values():
                if isinstance(error, StageError):
                    raise ControllerError(error)

    hardware, settings = config.hardware, config.hardware.ray
    resources = {"CPU": hardware.num_threads} | ({"GPU": 1} if hardware.device == "cuda" else {})
    for kind, number in resources.items():
        there = ray.cluster_resources().get(kind, 0)
        if settings.workers * number > there:
            log.warning(
                "hardware.ray.workers=%d need %d of %s, and the cluster has %d: waiting for more",
                settings.workers,
                settings.workers * number,
                kind,
                there,
            )
    filesystem, root = storage(settings.storage)
    run = RunConfig(
        name=name or f"{stage}-{uuid.uuid4().hex}",
        storage_path=root,
        storage_filesystem=filesystem,
        failure_config=FailureConfig(max_failures=settings.max_failures),
        checkpoint_config=CheckpointConfig(num_to_keep=config.checkpoints.keep if name else None),
        callbacks=[EndAtOnce()],
        logging_config=LoggingConfig(log_level="CRITICAL"),  # what it would tell, this function tells
    )
    described = {
        "stage": stage,
        "work": work.__name__,
        "schema": type(config).__name__,
        "config": TypeAdapter(type(config)).dump_json(config).decode(),
        "directory": str(Path.cwd()),
    }
    trainer = TorchTrainer(
        do_on_ray,
        train_loop_config=described,
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if hardware.device == "cuda" else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=settings.workers, use_gpu=hardware.device == "cuda", resources_per_worker=resources
        ),
        run_config=run,
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        if isinstance(error, ControllerError) and isinstance(error.controller_failure, StageError):
            raise error.controller_failure from None
        causes = error.worker_failures if isinstance(error, WorkerGroupError) else {}
        said = "; ".join(f"process {rank}: {describe(cause)}" for rank, cause in sorted(causes.items())) or str(error)
        raise StageError(
            f"{said[:1000]}\n  tried {1 + settings.max_failures} times (hardware.ray.max_failures)"
        ) from None
    # Found again, it would be gone on from at its end.
    (filesystem or pyarrow.fs.LocalFileSystem()).delete_dir(f"{root}/{run.name}")


def storage(url: str | None) -> tuple[Any, str]:
    """The file system of pyarrow, None for this machine's, and the path in it where Ray keeps runs."""
    if url is None or "://" not in url:
        place = Path(url).resolve() if url else cache_directory() / "ray"
        return None, str(place)
    import fsspec
    import pyarrow.fs

    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise StageError(f"hardware.ray.storage={url}: {error}") from None
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(filesystem)), path.rstrip("/")


def do_on_ray(described: dict[str, str]) -> None:
    """What each process does."""
    from stages.processes import rank

    os.chdir(described["directory"])
    if rank():
        logging.disable(logging.INFO)
    start_logging(described["stage"])
    module = importlib.import_module(f"stages.{described['stage']}")
    schema = TypeAdapter(getattr(module, described["schema"]))
    getattr(module, described["work"])(schema.validate_json(described["config"]))


@contextlib.contextmanager
def own_checkpoints() -> Iterator[str]:
    """A directory for this process's checkpoints, with those that the run has in Ray's storage.

    Each process writes its own part of a checkpoint there; Ray puts the parts together in its storage.
    """
    from ray.train import get_all_reported_checkpoints
    from ray.train.huggingface.transformers import RayTrainReportCallback

    with tempfile.TemporaryDirectory() as directory:
        for reported in get_all_reported_checkpoints():
            with reported.checkpoint.as_directory() as whole:
                place = Path(whole) / RayTrainReportCallback.CHECKPOINT_NAME
                step = json.loads((place / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
                shutil.copytree(place, Path(directory) / f"checkpoint-{step}")
        yield directory
