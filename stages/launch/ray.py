"""Runs a stage in several processes on a Ray cluster, through Ray Train, which restarts them if one is lost."""

import contextlib
import copy
import json
import logging
import os
import re
import shutil
import signal
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from stages.core.environment import find_result_variables
from stages.core.errors import StageError
from stages.shell.app import format_error, start_logging
from stages.shell.cache import get_cache_directory
from stages.shell.interruption import Interrupted, end_on_signals
from stages.shell.ray_cluster import connect_to_cluster

log = logging.getLogger(__name__)

BEST_METRIC = "best_at_step"  # metric by which Ray retains the best checkpoint in addition to the newest


def run_on_ray(stage: str, work: Callable[[Any], None], config: Any, name: str | None) -> None:
    """Run `work(config)` in the processes that config.hardware.ray describes.

    Args:
        name: name for the checkpoints of the run, stable across restarts; None: the stage writes no checkpoints.

    Raises:
        StageError: the error of a process or of the cluster.
        Interrupted: if Ctrl-C stopped the processes.
    """
    ray = connect_to_cluster()
    from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig, UserCallback
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

    class FailOnStageError(UserCallback):  # type: ignore[misc]
        """Prevents restarts after a StageError, which would occur again."""

        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            for error in worker_exceptions.values():
                if isinstance(error, StageError):
                    raise ControllerError(error)

    hardware, settings = config.hardware, config.hardware.ray
    resources = {"CPU": hardware.num_threads} | ({"GPU": 1} if hardware.device == "cuda" else {})
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    num_fitting = sum(min(int(node.get(kind, 0)) // number for kind, number in resources.items()) for node in nodes)
    if settings.workers > num_fitting:
        log.warning(
            "hardware.ray.workers=%d with %s each, but the cluster only has room for %d: waiting for more machines",
            settings.workers,
            " and ".join(f"{number} {kind}" for kind, number in resources.items()),
            num_fitting,
        )
    filesystem, root = open_storage(settings.storage)
    best = {}
    if name and config.trainer.get("load_best_model_at_end"):
        best = {"checkpoint_score_attribute": BEST_METRIC, "checkpoint_score_order": "max"}
    run = RunConfig(
        name=name or f"{stage}-{uuid.uuid4().hex}",
        storage_path=root,
        storage_filesystem=filesystem,
        failure_config=FailureConfig(max_failures=settings.max_failures),
        checkpoint_config=CheckpointConfig(num_to_keep=config.checkpoints.keep if name else None, **best),
        callbacks=[FailOnStageError()],
        logging_config=LoggingConfig(log_level="CRITICAL"),  # this function reports the same errors
    )
    job = {"stage": stage, "work": work, "config": config, "directory": str(Path.cwd())}
    trainer = TorchTrainer(
        _worker_main,
        train_loop_config=job,
        torch_config=TorchConfig(backend=hardware.backend),
        scaling_config=ScalingConfig(
            num_workers=settings.workers, use_gpu=hardware.device == "cuda", resources_per_worker=resources
        ),
        run_config=run,
    )
    done = False
    try:
        trainer.fit()
        done = True
    except SystemExit:  # raised by Ray after Ctrl-C
        raise Interrupted(signal.SIGINT) from None
    except TrainingFailedError as error:
        if isinstance(error, ControllerError) and isinstance(error.controller_failure, StageError):
            raise error.controller_failure from None
        causes = error.worker_failures if isinstance(error, WorkerGroupError) else {}
        errors = [f"process {rank}: {format_error(cause)}" for rank, cause in sorted(causes.items())]
        message = "; ".join(errors) or str(error)
        raise StageError(
            f"{message[:1000]}\n  tried {1 + settings.max_failures} times (hardware.ray.max_failures)"
        ) from None
    finally:
        end_on_signals()  # Ray has replaced the signal handlers
        if done or name is None:  # a run of the same name would resume from its end
            try:
                filesystem.delete_dir(f"{root}/{run.name}")
            except Exception as error:
                log.warning("%s/%s could not be removed: %s", root, run.name, format_error(error))


def open_storage(url: str | None) -> tuple[Any, str]:
    """Return the pyarrow file system and the path in it where Ray stores runs; create that directory.

    Args:
        url: hardware.ray.storage; None: a directory in the cache directory.

    Raises:
        StageError: if `url` is invalid, or the directory is not writable.
    """
    import fsspec
    import pyarrow.fs

    if url is not None and re.match(r"\w+:", url) and "://" not in url:
        raise StageError(f"hardware.ray.storage={url} is neither a directory nor a URL such as s3://bucket/path")
    try:
        if url is None or "://" not in url:
            place = Path(url).resolve() if url else get_cache_directory() / "ray"
            filesystem, path = pyarrow.fs.LocalFileSystem(), str(place)
        else:
            found, path = fsspec.core.url_to_fs(url)
            if "memory" in found.protocol:
                raise StageError(f"hardware.ray.storage={url}: processes cannot share a file system in memory")
            filesystem, path = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(found)), path.rstrip("/")
        filesystem.create_dir(path, recursive=True)
        with filesystem.open_output_stream(f"{path}/.writable"):
            pass
        filesystem.delete_file(f"{path}/.writable")
    except StageError:
        raise
    except Exception as error:  # each file system raises different exceptions
        raise StageError(f"hardware.ray.storage={url}: it is not writable: {format_error(error)}") from None
    return filesystem, path


def _worker_main(job: dict[str, Any]) -> None:
    """Entry point of each process; `job` is the train_loop_config of `run_on_ray`."""
    from stages.model.processes import get_rank

    # A worker has the environment of `ray start` on its machine, and has already loaded torch.
    if names := find_result_variables("OMP_NUM_THREADS"):  # set by Ray, and overridden by hardware.num_threads
        raise StageError(
            f"{', '.join(names)}: set when Ray was started, and would change the result: run `ray stop`, unset it, and"
            " run `ray start` again"
        )
    os.chdir(job["directory"])
    if get_rank():
        logging.disable(logging.INFO)
    start_logging(job["stage"])
    job["work"](job["config"])


@contextlib.contextmanager
def copy_reported_checkpoints() -> Iterator[str]:
    """Yield a directory for the checkpoints of this process, with copies of those in Ray's storage.

    Each process writes its part of a checkpoint there; Ray combines the parts in its storage.
    """
    from ray.train import get_all_reported_checkpoints, get_context
    from ray.train.huggingface.transformers import RayTrainReportCallback

    from stages.model.processes import get_rank

    # Not a temporary directory, which a killed process would never remove.
    directory = get_cache_directory() / "ray-processes" / f"{get_context().get_experiment_name()}-{get_rank()}"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    try:
        for reported in get_all_reported_checkpoints():
            with reported.checkpoint.as_directory() as whole:
                checkpoint = Path(whole) / RayTrainReportCallback.CHECKPOINT_NAME
                step = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
                shutil.copytree(checkpoint, directory / f"checkpoint-{step}")
        yield str(directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def create_report_callback() -> Any:
    """Create the callback that makes Ray combine the parts of a checkpoint and store it with its rank."""
    from ray.train.huggingface.transformers import RayTrainReportCallback

    class Report(RayTrainReportCallback):  # type: ignore[misc]
        def on_save(self, args: Any, state: Any, control: Any, **named: Any) -> None:
            # The rank of a best checkpoint is its step, since the latest best one is the best of all. Any other
            # checkpoint has rank -1, so that Ray removes it first.
            reported = copy.copy(state)
            best = state.global_step if state.best_global_step == state.global_step else -1
            reported.log_history = [*state.log_history, {BEST_METRIC: best}]
            super().on_save(args, reported, control, **named)

    return Report()
