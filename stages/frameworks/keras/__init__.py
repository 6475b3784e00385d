"""Trains with Keras: `fit` of a model of KerasHub's layers, on JAX or TensorFlow, on the CPU."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.core.artifacts import Blocks
from stages.core.environment import drop_environment_variables
from stages.core.errors import StageError
from stages.shell.cache import cache_directory
from stages.shell.interruption import Request
from stages.tokens.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import TrainerState

    from stages.train.stage import TrainConfig

# Keras and what it computes with take settings from these, where DVC cannot see them.
_SETTINGS_OF_OTHERS = (
    *("JAX_", "KERAS_", "NPROC", "PJRT_", "XLA_"),
    *("TF_DETERMINISTIC", "TF_ENABLE_", "TF_NUM_", "TF_XLA_"),
)


def prepare(config: "TrainConfig") -> None:
    """Choose the backend and its threads, which are read when it is imported, and import it.

    Raises:
        StageError: if it is not installed.
    """
    ours = {
        "KERAS_BACKEND": str(config.framework.backend),
        "KERAS_HOME": str(cache_directory() / "keras"),  # where Keras writes its settings and reads them again
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache_directory() / "jax"),  # half a minute for a small model
        "NPROC": str(config.hardware.num_threads),  # XLA's threads
        "PJRT_NPROC": str(config.hardware.num_threads),  # the same, and read before
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    drop_environment_variables(_SETTINGS_OF_OTHERS, ours)
    os.environ.update(ours)
    import transformers.trainer  # noqa: F401  triton's LLVM, loaded behind TensorFlow's, ends the process

    try:
        with silence():
            import keras_hub  # noqa: F401
            import tensorflow  # which KerasHub needs with any backend
    except ModuleNotFoundError as error:
        raise StageError(f"framework=keras: {error.name} is not installed: run `make keras`") from None
    import stages.frameworks.keras.training  # noqa: F401  the fingerprint of a run is of what is loaded

    tensorflow.config.set_visible_devices([], "GPU")
    if config.framework.backend == "tensorflow":
        tensorflow.config.threading.set_intra_op_parallelism_threads(config.hardware.num_threads)
        tensorflow.config.experimental.enable_op_determinism()


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Within, nothing is written to stderr: TensorFlow's own code tells of the GPUs that it does not find."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def libraries(config: "TrainConfig") -> tuple[str, ...]:
    """The libraries that decide the result, beside those that decide it under every framework."""
    backend = ("jax", "jaxlib") if config.framework.backend == "jax" else ("tensorflow",)
    return ("keras", "keras-hub", *backend)


def fit(
    config: "TrainConfig",
    model: Any,
    objective: Any,
    train: Blocks,
    validation: Blocks,
    directory: str,
    request: Request,
) -> tuple[Any, "TrainerState"]:
    """The trained `model` and the record of its training, from the newest checkpoint in `directory` if there is one.

    Raises:
        StageError: if the model's configuration asks for what KerasHub's layers do not do.
        Interrupted: when `request` asked for the end; a checkpoint has then been written.
    """
    from stages.frameworks.keras.training import Training

    pad = Vocabulary.read(Path(config.tokens)).special.get("pad_token")
    if model.config.model_type != "gpt2" and model.config.pad_token_id != pad:
        # torch counts no position for it, and gives its embedding no gradient.
        raise StageError(
            f"framework=keras: model.config.pad_token_id={model.config.pad_token_id}, and the tokenizer's is {pad}:"
            " give the model that one, or take framework: trainer"
        )
    training = Training(config, model, objective, train, validation, Path(directory), request)
    training.run()
    return model, training.state
