"""Starts the processes of a stage on a Ray cluster, by Ray Train, which starts them anew where one is lost."""

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

from stages.core.environment import variables_that_change_results
from stages.core.errors import StageError
from stages.shell.app import describe_error, start_logging
from stages.shell.cache import cache_directory
from stages.shell.interruption import Interrupted, end_on_signals
from stages.shell.ray_cluster import connected

log = logging.getLogger(__name__)

BEST = "best_at_step"  # by which Ray keeps the best checkpoint beside the newest


def run_on_ray(stage: str, work: Callable[[Any], None], config: Any, name: str | None) -> None:
    """Do `work(config)` in the processes that config.hardware.ray describes.

    Args:
        name: of the run, by which its checkpoints are found again; None: it makes none.

    Raises:
        StageError: the error of a process, or what went wrong with the cluster.
        Interrupted: if Ctrl-C ended them.
    """
    ray = connected()
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
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fitting = sum(min(int(node.get(kind, 0)) // number for kind, number in resources.items()) for node in nodes)
    if settings.workers > fitting:
        log.warning(
            "hardware.ray.workers=%d, of %s each, and %d fit the machines of the cluster: waiting for more",
            settings.workers,
            ", ".join(f"{number} {kind}" for kind, number in resources.items()),
            fitting,
        )
    filesystem, root = storage(settings.storage)
    best = {}
    if name and config.trainer.get("load_best_model_at_end"):
        best = {"checkpoint_score_attribute": BEST, "checkpoint_score_order": "max"}
    run = RunConfig(
        name=name or f"{stage}-{uuid.uuid4().hex}",
        storage_path=root,
        storage_filesystem=filesystem,
        failure_config=FailureConfig(max_failures=settings.max_failures),
        checkpoint_config=CheckpointConfig(num_to_keep=config.checkpoints.keep if name else None, **best),
        callbacks=[EndAtOnce()],
        logging_config=LoggingConfig(log_level="CRITICAL"),  # what it would tell, this function tells
    )
    described = {"stage": stage, "work": work, "config": config, "directory": str(Path.cwd())}
    trainer = TorchTrainer(
        _worker_main,
        train_loop_config=described,
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
    except SystemExit:  # how Ray ends the process of a run that Ctrl-C aborted
        raise Interrupted(signal.SIGINT) from None
    except TrainingFailedError as error:
        if isinstance(error, ControllerError) and isinstance(error.controller_failure, StageError):
            raise error.controller_failure from None
        causes = error.worker_failures if isinstance(error, WorkerGroupError) else {}
        said = "; ".join(f"process {rank}: {describe_error(cause)}" for rank, cause in sorted(causes.items())) or str(
            error
        )
        raise StageError(
            f"{said[:1000]}\n  tried {1 + settings.max_failures} times (hardware.ray.max_failures)"
        ) from None
    finally:
        end_on_signals()  # as before
        if done or name is None:  # found again, it would be gone on from at its end
            try:
                filesystem.delete_dir(f"{root}/{run.name}")
            except Exception as error:
                log.warning("%s/%s could not be removed: %s", root, run.name, describe_error(error))


def storage(url: str | None) -> tuple[Any, str]:
    """The file system of pyarrow, and the path in it where Ray keeps runs.

    Raises:
        StageError: if nothing can be written there.
    """
    import fsspec
    import pyarrow.fs

    if url is not None and re.match(r"\w+:", url) and "://" not in url:
        raise StageError(f"hardware.ray.storage={url} is neither a directory nor a URL such as s3://bucket/path")
    try:
        if url is None or "://" not in url:
            place = Path(url).resolve() if url else cache_directory() / "ray"
            filesystem, path = pyarrow.fs.LocalFileSystem(), str(place)
        else:
            found, path = fsspec.core.url_to_fs(url)
            if "memory" in found.protocol:
                raise StageError(f"hardware.ray.storage={url}: the memory of a process is shared with no other")
            filesystem, path = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(found)), path.rstrip("/")
        filesystem.create_dir(path, recursive=True)
        with filesystem.open_output_stream(f"{path}/.writable"):
            pass
        filesystem.delete_file(f"{path}/.writable")
    except StageError:
        raise
    except Exception as error:  # each file system has its own
        raise StageError(f"hardware.ray.storage={url}: nothing can be written there: {describe_error(error)}") from None
    return filesystem, path


def _worker_main(described: dict[str, Any]) -> None:
    """What each process does."""
    from stages.model.processes import rank

    # A worker has the environment of its machine's `ray start`, and torch is loaded.
    if names := variables_that_change_results("OMP_NUM_THREADS"):  # which Ray sets, and hardware.num_threads overrides
        raise StageError(
            f"{', '.join(names)}: set where Ray was started, and would change the result: run `ray stop`, unset it, and"
            " `ray start` again"
        )
    os.chdir(described["directory"])
    if rank():
        logging.disable(logging.INFO)
    start_logging(described["stage"])
    described["work"](described["config"])


@contextlib.contextmanager
def own_checkpoints() -> Iterator[str]:
    """A directory for this process's checkpoints, with those that the run has in Ray's storage.

    Each process writes its own part of a checkpoint there; Ray puts the parts together in its storage.
    """
    from ray.train import get_all_reported_checkpoints, get_context
    from ray.train.huggingface.transformers import RayTrainReportCallback

    from stages.model.processes import rank

    # Not a temporary one, that a process which is killed would leave behind for ever.
    directory = cache_directory() / "ray-processes" / f"{get_context().get_experiment_name()}-{rank()}"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    try:
        for reported in get_all_reported_checkpoints():
            with reported.checkpoint.as_directory() as whole:
                place = Path(whole) / RayTrainReportCallback.CHECKPOINT_NAME
                step = json.loads((place / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
                shutil.copytree(place, directory / f"checkpoint-{step}")
        yield str(directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def reporting() -> Any:
    """A callback that has Ray put a checkpoint's parts together and keep it, with how it ranks among the others."""
    from ray.train.huggingface.transformers import RayTrainReportCallback

    class Report(RayTrainReportCallback):  # type: ignore[misc]
        def on_save(self, args: Any, state: Any, control: Any, **named: Any) -> None:
            # The later of two best ones is the better; those that are not go before them, however new they are.
            told = copy.copy(state)
            best = state.global_step if state.best_global_step == state.global_step else -1
            told.log_history = [*state.log_history, {BEST: best}]
            super().on_save(args, told, control, **named)

    return Report()
