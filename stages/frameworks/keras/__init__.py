"""Training with Keras: `fit` of a model of KerasHub's layers, with JAX or TensorFlow, on the CPU."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.core.artifacts import Blocks
from stages.core.environment import drop_environment_variables
from stages.core.errors import StageError
from stages.shell.cache import get_cache_directory
from stages.shell.interruption import StopRequest
from stages.tokens.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import TrainerState

    from stages.train.stage import TrainConfig

# Prefixes of variables that configure Keras and its backends; DVC does not track them.
_LIBRARY_VARIABLES = (
    *("JAX_", "KERAS_", "NPROC", "PJRT_", "XLA_"),
    *("TF_DETERMINISTIC", "TF_ENABLE_", "TF_NUM_", "TF_XLA_"),
)


def prepare_framework(config: "TrainConfig") -> None:
    """Set the backend and its number of threads, then import Keras, which reads these settings at import.

    Raises:
        StageError: if a library is not installed.
    """
    variables = {
        "KERAS_BACKEND": str(config.framework.backend),
        "KERAS_HOME": str(get_cache_directory() / "keras"),  # where Keras reads and writes its settings
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(get_cache_directory() / "jax"),  # saves half a minute for a small model
        "NPROC": str(config.hardware.num_threads),  # number of XLA threads
        "PJRT_NPROC": str(config.hardware.num_threads),  # the same; takes precedence
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    drop_environment_variables(_LIBRARY_VARIABLES, variables)
    os.environ.update(variables)
    import transformers.trainer  # noqa: F401  triton's LLVM crashes if loaded after TensorFlow's

    try:
        with silence_stderr():
            import keras_hub  # noqa: F401
            import tensorflow  # KerasHub needs it with any backend
    except ModuleNotFoundError as error:
        raise StageError(f"framework=keras: {error.name} is not installed: run `make keras`") from None
    import stages.frameworks.keras.training  # noqa: F401  the fingerprint covers the loaded modules

    tensorflow.config.set_visible_devices([], "GPU")
    if config.framework.backend == "tensorflow":
        tensorflow.config.threading.set_intra_op_parallelism_threads(config.hardware.num_threads)
        tensorflow.config.experimental.enable_op_determinism()


@contextlib.contextmanager
def silence_stderr() -> Iterator[None]:
    """Discard writes to stderr inside the block, also from C++: TensorFlow reports GPUs that it does not find."""
    sys.stderr.flush()
    saved_stderr = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as null_device:
            os.dup2(null_device.fileno(), 2)
        yield
    finally:
        os.dup2(saved_stderr, 2)
        os.close(saved_stderr)


def list_libraries(config: "TrainConfig") -> tuple[str, ...]:
    """Return the libraries that determine the result only under this framework."""
    backend = ("jax", "jaxlib") if config.framework.backend == "jax" else ("tensorflow",)
    return ("keras", "keras-hub", *backend)


def fit(
    config: "TrainConfig",
    model: Any,
    objective: Any,
    train: Blocks,
    validation: Blocks,
    directory: str,
    request: StopRequest,
) -> tuple[Any, "TrainerState", list[str]]:
    """Train `model`, from the newest checkpoint in `directory` if there is one.

    Returns:
        `model` with the trained weights, the state and history of its training, and an empty list, since Keras does not
        compute a state chain.

    Raises:
        StageError: if KerasHub's layers do not support the model's configuration.
        Interrupted: if a stop was requested; a checkpoint has then been written.
    """
    from stages.frameworks.keras.training import KerasTraining

    pad = Vocabulary.read(Path(config.tokens)).special.get("pad_token")
    if model.config.model_type != "gpt2" and model.config.pad_token_id != pad:
        # torch does not count positions of this token and gives its embedding no gradient.
        raise StageError(
            f"framework=keras: model.config.pad_token_id={model.config.pad_token_id}, but the tokenizer's is {pad}:"
            " set the model's to the tokenizer's, or set framework: trainer"
        )
    training = KerasTraining(config, model, objective, train, validation, Path(directory), request)
    training.train_or_resume()
    return model, training.state, []
