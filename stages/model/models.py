"""Models, built from a configuration or loaded from a pinned checkpoint in safetensors format.

Code that comes with a checkpoint is never run.
"""

import copy
import itertools
import logging
import math
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from transformers import AutoConfig
from transformers.initialization import no_init_weights

from stages.core.artifacts import read_json_object
from stages.core.config import suggest_name
from stages.core.environment import drop_environment_variables
from stages.core.errors import StageError, format_cause, printable
from stages.hub.files import (
    OFFSET_POSITIONS,
    SHARDED_WEIGHTS,
    SINGLE_WEIGHTS,
    count_usable_positions,
    find_source_files,
    find_weights_files,
    read_shard_names,
)  # fmt: skip
from stages.model.attention import use_attention_in_parts
from stages.model.hardware import Hardware, check_device
from stages.model.memory import keep_freed_memory
from stages.model.schema import Model
from stages.tokens.vocabulary import Vocabulary

log = logging.getLogger(__name__)

# Prefixes of variables that set Accelerate's precision, accumulation, compilation and more; DVC does not track them.
_LIBRARY_VARIABLES = ("ACCELERATE_", "FSDP_")
_LAUNCHER_VARIABLES = ("LOCAL_RANK", "MASTER_", "RANK", "WORLD_SIZE")

_CONFIG_FILES = ("config.json", "generation_config.json")
_AUTO_CLASS = {"causal": "AutoModelForCausalLM", "mlm": "AutoModelForMaskedLM"}

# Limits of a configuration, far above the models trained here. Building a larger model would fill the memory or never
# end. (GPT-3 has 96 layers and 0.64 TiB.)
MAX_MODULES, MAX_MODEL_BYTES = 10_000, 2**40
# Keys of a configuration that set how many modules or labels are created, one by one.
_COUNT_KEY = re.compile(r"(n_layer|n_head|layers|heads|blocks|experts|stages|depths|types|labels)$")
_MAX_INTEGER = 2**53  # limit of any other number


def prepare_torch(hardware: Hardware) -> None:
    """Set the number of threads, enable the CPU optimizations and silence the libraries.

    Raises:
        StageError: if hardware.device is not available.
    """
    prefixes = _LIBRARY_VARIABLES if dist.is_initialized() else _LIBRARY_VARIABLES + _LAUNCHER_VARIABLES
    # Under Ray, this variable selects the GPU of the process.
    drop_environment_variables(prefixes, {"ACCELERATE_TORCH_DEVICE": None} if hardware.ray is not None else {})
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(hardware.num_threads)
    if hardware.device == "cpu":
        keep_freed_memory()
        use_attention_in_parts()
    check_device(hardware)


def build_model(model: Model, vocabulary: Vocabulary, seed: int) -> Any:
    """Build the model before training, in fp32 on the CPU.

    Its weights are those of the checkpoint, or drawn from `seed` if the model has none.

    Raises:
        StageError: if the configuration is invalid, or the checkpoint, its configuration and the vocabulary do not
            match.
    """
    with tempfile.TemporaryDirectory() as scratch:  # transformers only sees the pinned files
        built = _build_model(model, vocabulary, seed, Path(scratch))
    check_positions(built.config, model)
    check_embeddings(built, vocabulary.size)
    log.info("%s with %.1f M parameters", type(built).__name__, sum(p.numel() for p in built.parameters()) / 1e6)
    return built


def check_embeddings(model: Any, num_tokens: int) -> None:
    """Raise StageError if `model` has fewer embeddings than the tokenizer has tokens."""
    num_embeddings = model.get_input_embeddings().num_embeddings
    if num_tokens > num_embeddings:
        raise StageError(f"the tokenizer has {num_tokens} tokens, but the model only has {num_embeddings} embeddings")


def _build_model(model: Model, vocabulary: Vocabulary | None, seed: int, scratch: Path) -> Any:
    config = _load_base_config(model, scratch)
    auto = _get_auto_class(model.task, config)
    if unknown := [key for key in model.config if key != "model_type" and not hasattr(config, key)]:
        names = suggest_name(unknown[0], list(config.to_dict()))
        raise StageError(f"model.config.{printable(unknown[0])}: {config.model_type} has no such setting; {names}")
    config = _override_config(config, model)
    masked = type(config) in getattr(transformers, _AUTO_CLASS["mlm"])._model_mapping
    if model.task == "causal" and masked and not getattr(config, "is_decoder", True):
        raise StageError(
            f"task=causal: {config.model_type} attends to tokens on both sides and would read the tokens it predicts:"
            " set model.config.is_decoder: true, or use it for task=mlm"
        )
    torch.manual_seed(seed)
    if model.from_scratch:
        assert vocabulary is not None
        config.vocab_size = vocabulary.size
        for role in ("bos", "eos", "pad", "sep", "cls"):
            setattr(config, f"{role}_token_id", vocabulary.special.get(f"{role}_token"))
        if config.model_type in OFFSET_POSITIONS and config.pad_token_id is None:
            raise StageError(
                f"{config.model_type} numbers positions from its pad token, but the tokenizer has no pad_token"
            )
        _check_shape(auto, config, "model.config")
        try:
            built = auto.from_config(config, dtype=torch.float32)
        except RuntimeError as error:  # from a distribution that torch cannot sample
            if "memory" in str(error):
                raise
            raise StageError(f"cannot build a {config.model_type} from model.config: {format_cause(error)}") from None
        check_finite(built, "the initial weights that follow from model.config")
        return built
    _check_shape(auto, config, f"config.json of {_format_source(model)} and model.config")
    _link_files(find_weights_files("model", model), scratch)
    return _load_weights(auto, scratch, config, _format_source(model))


def _get_auto_class(task: str, config: Any) -> Any:
    """Return transformers' auto class for `task`; raise StageError if it has no model for `config`."""
    auto = getattr(transformers, _AUTO_CLASS[task])
    if type(config) not in auto._model_mapping:
        raise StageError(f"model.config.model_type={config.model_type}: transformers has no such model for task={task}")
    return auto


def _check_values(settings: dict[str, Any], where: str) -> None:
    """Raise StageError for a number out of range, or an implementation that is code from the Hub.

    Args:
        settings: the parsed JSON or YAML of a configuration.
        where: the prefix of a key in error messages.
    """
    left: list[tuple[str, Any]] = [*settings.items()]
    while left:
        key, value = left.pop()
        if isinstance(value, dict):
            left += [(f"{key}.{name}", item) for name, item in value.items()]
        elif isinstance(value, list):
            left += [(key, item) for item in value]
        elif isinstance(value, int | float) and not math.isinf(value):
            least, most = (0, MAX_MODULES) if _COUNT_KEY.search(key) else (-_MAX_INTEGER, _MAX_INTEGER)
            if not least <= value <= most:
                shown = f"{where}{printable(key)}={printable(value, 30)}"
                raise StageError(f"{shown} is out of range: set a value from {least:,} to {most:,}")
        elif isinstance(value, str) and key.endswith("_implementation") and "/" in value:
            shown = f"{where}{printable(key)}={printable(value)}"
            raise StageError(f"{shown} refers to code in a repository, which is never run: remove it")


def _check_shape(auto: Any, config: Any, where: str) -> None:
    """Raise StageError if no model can be built from `config`, or it is too large.

    Builds the model on the meta device, which allocates no memory for weights.
    """
    try:
        # Without no_init_weights, meta weights would still be initialized, by code that imports torch's compiler.
        with torch.device("meta"), no_init_weights():
            built = auto.from_config(copy.deepcopy(config), dtype=torch.float32)
    except Exception as error:  # architectures check their values in different ways, or not at all
        raise StageError(f"cannot build a {config.model_type} from {where}: {format_cause(error)}") from None
    num_bytes = sum(tensor.nbytes for tensor in itertools.chain(built.parameters(), built.buffers()))
    if num_bytes > MAX_MODEL_BYTES:
        raise StageError(
            f"the {config.model_type} of {where} takes {num_bytes / 2**40:,.0f} TiB: the limit is"
            f" {MAX_MODEL_BYTES / 2**40:.0f} TiB; reduce its sizes"
        )


def check_finite(model: Any, weights: str) -> None:
    """Raise StageError if a weight of `model` is NaN or infinite; `weights` describes them in the message."""
    for name, tensor in model.named_parameters():
        if tensor.numel() and not all(bound.isfinite() for bound in tensor.detach().aminmax()):
            raise StageError(f"{weights} cannot be used: {printable(name)} has values that are NaN or infinite")


def _override_config(config: Any, model: Model) -> Any:
    """Return `config` with the overrides of model.config."""
    values = {key: value for key, value in model.config.items() if key != "model_type"}
    _check_values(values, "model.config.")
    if not model.has_files:  # built again, since some values follow from others (GPT-Neo's layers from their types)
        try:
            return type(config)(**values)
        except Exception as error:  # architectures check their values in different ways
            shown = ", ".join(f"model.config.{key}={value!r}" for key, value in values.items())
            raise StageError(f"{printable(shown)}: {format_cause(error)}") from None
    for key, value in values.items():
        try:
            setattr(config, key, value)
        except Exception as error:
            raise StageError(f"model.config.{key}={printable(repr(value))}: {format_cause(error)}") from None
    return config


def _link_files(files: dict[str, Path], directory: Path) -> None:
    """Link the files into `directory` under their names in `files`."""
    for name, file in files.items():
        (directory / name).symlink_to(file.resolve())


def load_pretrained(model: Model) -> Any:
    """Load the model of a pinned checkpoint, in fp32 on the CPU.

    Raises:
        StageError: as `build_model`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        return _build_model(model, None, 0, Path(scratch))


def load_directory(task: str, directory: str | Path) -> Any:
    """Load the model that save_pretrained wrote into `directory`, in fp32 on the CPU.

    Raises:
        StageError: if `directory` has no model, or it cannot be loaded.
    """
    source = Path(directory)
    index = source / SHARDED_WEIGHTS
    shards = read_shard_names(index) if index.is_file() else []
    names = [*_CONFIG_FILES, SINGLE_WEIGHTS, SHARDED_WEIGHTS, *shards]
    with tempfile.TemporaryDirectory() as scratch:  # no other file of the directory is read
        _link_files({name: source / name for name in names if (source / name).is_file()}, Path(scratch))
        config = _read_config(Path(scratch), source, str(directory))
        auto = _get_auto_class(task, config)
        _check_shape(auto, config, f"config.json of {directory}")
        return _load_weights(auto, Path(scratch), config, str(directory))


def _format_source(model: Model) -> str:
    """Return the path of the model's files, or the place they come from, for error messages."""
    return str(model.path) if model.from_ is None else model.from_.description


def _load_base_config(model: Model, scratch: Path) -> Any:
    """Return the configuration before overrides; link the configuration files of a checkpoint into `scratch`."""
    model_type = model.config.get("model_type")
    if not model.has_files:
        known = list(transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES)
        if model_type not in known:
            shown = printable(model_type)
            raise StageError(f"model.config.model_type={shown} is unknown; {suggest_name(shown, known)}")
        return AutoConfig.for_model(model_type)
    found = find_source_files("model", model, _CONFIG_FILES, _CONFIG_FILES[:1])
    _link_files(found, scratch)
    key, source = ("path", found["config.json"].parent) if model.from_ is None else ("from", scratch)
    config = _read_config(scratch, source, f"model.{key}={_format_source(model)}")
    if model_type not in (None, config.model_type):
        raise StageError(
            f"model.config.model_type={printable(model_type)}, but the checkpoint {_format_source(model)} is a"
            f" {config.model_type}"
        )
    return config


def _read_config(directory: Path, source: Path, where: str) -> Any:
    """Read the configuration in `directory`, which has links to files in `source`; `where` is the model in errors."""
    settings = read_json_object(source / _CONFIG_FILES[0])
    if (directory / _CONFIG_FILES[1]).is_file():
        read_json_object(source / _CONFIG_FILES[1])
    _check_values(settings, f"{where}: config.json: ")
    if settings.get("quantization_config") is not None:
        raise StageError(
            f"{where}: config.json has a quantization_config, but quantized weights cannot be trained: use the model"
            " from which they were made"
        )
    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # architectures check their values in different ways
        reason = format_cause(error).replace(str(directory), str(source))
        if "trust_remote_code" in reason:
            reason = "transformers has no such model_type, and code that comes with a model is never run"
        raise StageError(f"{where}: its config.json cannot be used: {reason}") from None


def _load_weights(auto: Any, directory: Path, config: Any, where: str) -> Any:
    """Load the weights in `directory` into the model of `config`, in fp32; `where` is the checkpoint in errors.

    Raises:
        StageError: if they are unreadable, incomplete, not finite, or of other shapes than the model's.
    """
    try:
        loaded, info = auto.from_pretrained(
            directory,
            config=config,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # reported below, with their names
            output_loading_info=True,
        )
    except MemoryError:
        raise
    except Exception as error:  # from safetensors, transformers, or invalid content of a file
        raise StageError(f"the weights in {where} cannot be loaded: {format_cause(error)}") from None
    if other := sorted(info["mismatched_keys"]):
        name, found, expected = other[0]
        raise StageError(
            f"the weights in {where} cannot be loaded: {len(other)} differ in shape from the model's"
            f" ({printable(name)}: {list(found)}, not {list(expected)}, ...); the sizes in config.json or model.config"
            " do not match"
        )
    names = sorted(info["missing_keys"])
    if body := [name for name in names if name.startswith(f"{loaded.base_model_prefix}.")]:
        raise StageError(
            f"the weights in {where} do not fit the model: {len(body)} are missing ({body[0]}, ...); the sizes in"
            " config.json or model.config do not match"
        )
    check_finite(loaded, f"the weights in {where}")
    if unused := sorted(info["unexpected_keys"]):
        shown = printable(", ".join(unused[:3]))
        log.warning("%d weights of the checkpoint are not used: %s ...", len(unused), shown)
    if names:
        log.warning(
            "%d weights are not in the checkpoint and are initialized: %s ...", len(names), ", ".join(names[:3])
        )
    return loaded


def check_positions(config: Any, model: Model) -> None:
    """Raise StageError if model.max_positions is above the number of positions in `config`."""
    positions = count_usable_positions(config.to_dict())
    if positions is not None and model.max_positions > positions:
        raise StageError(f"model.max_positions={model.max_positions}: the model only has {positions} positions")
