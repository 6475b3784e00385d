"""Models: built from a configuration or loaded from a pinned checkpoint of safetensors, never by remote code."""

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

from stages.core.artifacts import read_object
from stages.core.config import nearest
from stages.core.environment import drop_environment_variables
from stages.core.errors import StageError, printable
from stages.hub.files import (
    OFFSET_POSITIONS,
    SHARDED_WEIGHTS,
    SINGLE_WEIGHTS,
    shard_names,
    source_files,
    usable_positions,
    weights_files,
)  # fmt: skip
from stages.model.attention import use_parts_on_cpu
from stages.model.hardware import Hardware, find_device
from stages.model.memory import keep_freed_memory
from stages.model.schema import Model
from stages.tokens.vocabulary import Vocabulary

log = logging.getLogger(__name__)

# Accelerate takes precision, accumulation, compilation and more from these, where DVC cannot see them.
_SETTINGS_OF_OTHERS = ("ACCELERATE_", "FSDP_")
_LAUNCHER_VARIABLES = ("LOCAL_RANK", "MASTER_", "RANK", "WORLD_SIZE")

_CONFIG_FILES = ("config.json", "generation_config.json")
_AUTO_CLASS = {"causal": "AutoModelForCausalLM", "mlm": "AutoModelForMaskedLM"}

# Far above what is trained here: building more than that would fill the memory, or never end. (GPT-3 has 96 layers and
# 0.64 TiB.)
MOST_MODULES, MOST_BYTES = 10_000, 2**40
# Numbers of a configuration that say how many modules or labels are made, one after the other.
_COUNT = re.compile(r"(n_layer|n_head|layers|heads|blocks|experts|stages|depths|types|labels)$")
_MOST_ANY = 2**53  # of any other integer


def prepare_torch(hardware: Hardware) -> None:
    """Set threads and what saves a CPU memory and time, quiet libraries, and refuse a device that is not there.

    Raises:
        StageError: if hardware.device is not available.
    """
    others = _SETTINGS_OF_OTHERS if dist.is_initialized() else _SETTINGS_OF_OTHERS + _LAUNCHER_VARIABLES
    # Ray says which GPU is whose.
    drop_environment_variables(others, {"ACCELERATE_TORCH_DEVICE": None} if hardware.ray is not None else {})
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(hardware.num_threads)
    if hardware.device == "cpu":
        keep_freed_memory()
        use_parts_on_cpu()
    find_device(hardware)


def build_model(model: Model, vocabulary: Vocabulary, seed: int) -> Any:
    """The model before training, in fp32 on the CPU: fresh weights drawn from `seed`, or those of the checkpoint.

    Raises:
        StageError: if the checkpoint, its configuration and the vocabulary do not belong together.
    """
    with tempfile.TemporaryDirectory() as scratch:  # holds the pinned files and no others
        built = _build(model, vocabulary, seed, Path(scratch))
    check_positions(built.config, model)
    check_embeddings(built, vocabulary.size)
    log.info("%s with %.1f M parameters", type(built).__name__, sum(p.numel() for p in built.parameters()) / 1e6)
    return built


def check_embeddings(model: Any, num_tokens: int) -> None:
    """Raise StageError unless `model` has an embedding for each of a tokenizer's `num_tokens` tokens."""
    num_embeddings = model.get_input_embeddings().num_embeddings
    if num_tokens > num_embeddings:
        raise StageError(f"the tokenizer has {num_tokens} tokens, the model embeddings for {num_embeddings} alone")


def _build(model: Model, vocabulary: Vocabulary | None, seed: int, scratch: Path) -> Any:
    config = _configuration(model, scratch)
    auto = _auto_class(model.task, config)
    if unknown := [key for key in model.config if key != "model_type" and not hasattr(config, key)]:
        names = nearest(unknown[0], list(config.to_dict()))
        raise StageError(f"model.config.{printable(unknown[0])}: {config.model_type} has no such value; {names}")
    config = _overridden(config, model)
    masked = type(config) in getattr(transformers, _AUTO_CLASS["mlm"])._model_mapping
    if model.task == "causal" and masked and not getattr(config, "is_decoder", True):
        raise StageError(
            f"task=causal: {config.model_type} attends to the tokens on both sides and would read what it predicts: set"
            " model.config.is_decoder: true, or take it for task=mlm"
        )
    torch.manual_seed(seed)
    if model.from_scratch:
        assert vocabulary is not None
        config.vocab_size = vocabulary.size
        for role in ("bos", "eos", "pad", "sep", "cls"):
            setattr(config, f"{role}_token_id", vocabulary.special.get(f"{role}_token"))
        if config.model_type in OFFSET_POSITIONS and config.pad_token_id is None:
            raise StageError(
                f"{config.model_type} numbers positions from its pad token, and the tokenizer has no pad_token"
            )
        _check_shape(auto, config, "model.config")
        try:
            built = auto.from_config(config, dtype=torch.float32)
        except RuntimeError as error:  # of a distribution that torch does not draw from
            if "memory" in str(error):
                raise
            raise StageError(f"model.config makes no {config.model_type}: {_in_a_line(error)}") from None
        check_finite(built, "the weights that model.config starts with")
        return built
    _check_shape(auto, config, f"config.json of {_named(model)}, with model.config,")
    _link(weights_files("model", model), scratch)
    return _load(auto, scratch, config, _named(model))


def _auto_class(task: str, config: Any) -> Any:
    """transformers' class of the models for `task`, which has one for `config`."""
    auto = getattr(transformers, _AUTO_CLASS[task])
    if type(config) not in auto._model_mapping:
        raise StageError(f"model.config.model_type={config.model_type}: transformers has no such model for task={task}")
    return auto


def _check_values(settings: dict[str, Any], where: str) -> None:
    """Raise StageError for a value of `settings`, as JSON or YAML holds them, that no model is built from."""
    left: list[tuple[str, Any]] = [*settings.items()]
    while left:
        key, value = left.pop()
        if isinstance(value, dict):
            left += [(f"{key}.{name}", item) for name, item in value.items()]
        elif isinstance(value, list):
            left += [(key, item) for item in value]
        elif isinstance(value, int | float) and not math.isinf(value):
            least, most = (0, MOST_MODULES) if _COUNT.search(key) else (-_MOST_ANY, _MOST_ANY)
            if not least <= value <= most:
                shown = f"{where}{printable(key)}={printable(value, 30)}"
                raise StageError(f"{shown} cannot be meant: give it a value from {least:,} to {most:,}")
        elif isinstance(value, str) and key.endswith("_implementation") and "/" in value:
            shown = f"{where}{printable(key)}={printable(value)}"
            raise StageError(f"{shown} names code of a repository, which is never run: take it out")


def _check_shape(auto: Any, config: Any, where: str) -> None:
    """Raise StageError unless `config` makes a model, of a size that can be meant: built without memory for weights."""
    try:
        # Fresh weights that have no values would still be drawn, by Python code that imports torch's compiler.
        with torch.device("meta"), no_init_weights():
            built = auto.from_config(copy.deepcopy(config), dtype=torch.float32)
    except Exception as error:  # each architecture checks its values in its own way, or not at all
        raise StageError(f"{where} makes no {config.model_type}: {_in_a_line(error)}") from None
    num_bytes = sum(tensor.nbytes for tensor in itertools.chain(built.parameters(), built.buffers()))
    if num_bytes > MOST_BYTES:
        raise StageError(
            f"{where} makes a {config.model_type} of {num_bytes / 2**40:,.0f} TiB, which cannot be meant: the limit is"
            f" {MOST_BYTES / 2**40:.0f} TiB; lower its sizes"
        )


def check_finite(model: Any, weights: str) -> None:
    """Raise StageError if a weight of `model` is NaN or infinite; `weights` is what errors call them all."""
    for name, tensor in model.named_parameters():
        if tensor.numel() and not all(bound.isfinite() for bound in tensor.detach().aminmax()):
            raise StageError(f"{weights} cannot be used: {printable(name)} has values that are NaN or infinite")


def _overridden(config: Any, model: Model) -> Any:
    """`config` with the values of model.config."""
    values = {key: value for key, value in model.config.items() if key != "model_type"}
    _check_values(values, "model.config.")
    if not model.has_files:  # made anew, for values that follow from others (GPT-Neo's layers from their kinds)
        try:
            return type(config)(**values)
        except Exception as error:  # each architecture checks its values in its own way
            shown = ", ".join(f"model.config.{key}={value!r}" for key, value in values.items())
            raise StageError(f"{printable(shown)}: {_in_a_line(error)}") from None
    for key, value in values.items():
        try:
            setattr(config, key, value)
        except Exception as error:
            raise StageError(f"model.config.{key}={printable(repr(value))}: {_in_a_line(error)}") from None
    return config


def _link(files: dict[str, Path], directory: Path) -> None:
    for name, file in files.items():
        (directory / name).symlink_to(file.resolve())


def load_pretrained(model: Model) -> Any:
    """The model of a pinned checkpoint, in fp32 on the CPU.

    Raises:
        StageError: as build_model.
    """
    with tempfile.TemporaryDirectory() as scratch:
        return _build(model, None, 0, Path(scratch))


def load_directory(task: str, directory: str | Path) -> Any:
    """The model that save_pretrained wrote into `directory`, in fp32 on the CPU.

    Raises:
        StageError: if there is no such model.
    """
    place = Path(directory)
    index = place / SHARDED_WEIGHTS
    shards = shard_names(index) if index.is_file() else []
    names = [*_CONFIG_FILES, SINGLE_WEIGHTS, SHARDED_WEIGHTS, *shards]
    with tempfile.TemporaryDirectory() as scratch:  # whatever else is in the directory is not read
        _link({name: place / name for name in names if (place / name).is_file()}, Path(scratch))
        config = _read_config(Path(scratch), place, str(directory))
        auto = _auto_class(task, config)
        _check_shape(auto, config, f"config.json of {directory}")
        return _load(auto, Path(scratch), config, str(directory))


def _named(model: Model) -> str:
    """The model's files, for messages."""
    return str(model.path) if model.from_ is None else model.from_.place


def _configuration(model: Model, scratch: Path) -> Any:
    """The architecture's configuration before overrides; a checkpoint's own files of it are linked into `scratch`."""
    model_type = model.config.get("model_type")
    if not model.has_files:
        known = list(transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES)
        if model_type not in known:
            shown = printable(model_type)
            raise StageError(f"model.config.model_type={shown} is unknown; {nearest(shown, known)}")
        return AutoConfig.for_model(model_type)
    found = source_files("model", model, _CONFIG_FILES, _CONFIG_FILES[:1])
    _link(found, scratch)
    key, source = ("path", found["config.json"].parent) if model.from_ is None else ("from", scratch)
    config = _read_config(scratch, source, f"model.{key}={_named(model)}")
    if model_type not in (None, config.model_type):
        raise StageError(
            f"model.config.model_type={printable(model_type)}: the checkpoint {_named(model)} is a {config.model_type}"
        )
    return config


def _read_config(directory: Path, source: Path, where: str) -> Any:
    """The configuration in `directory`, with links to files in `source`; `where` names the model in errors."""
    settings = read_object(source / _CONFIG_FILES[0])
    if (directory / _CONFIG_FILES[1]).is_file():
        read_object(source / _CONFIG_FILES[1])
    _check_values(settings, f"{where}: config.json: ")
    if settings.get("quantization_config") is not None:
        raise StageError(
            f"{where}: config.json has a quantization_config, and quantized weights are not trained: choose the model"
            " that they were made from"
        )
    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each architecture checks its values in its own way
        reason = _in_a_line(error).replace(str(directory), str(source))
        if "trust_remote_code" in reason:
            reason = "its model_type is none of transformers' own, and code that comes with a model is never run"
        raise StageError(f"{where}: its config.json cannot be used: {reason}") from None


def _load(auto: Any, directory: Path, config: Any, where: str) -> Any:
    try:
        loaded, info = auto.from_pretrained(
            directory,
            config=config,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # an error below, which names them
            output_loading_info=True,
        )
    except MemoryError:
        raise
    except Exception as error:  # of safetensors, of transformers, or of whatever it finds in the files
        raise StageError(f"the weights in {where} cannot be loaded: {_in_a_line(error)}") from None
    if other := sorted(info["mismatched_keys"]):
        name, found, expected = other[0]
        raise StageError(
            f"the weights in {where} cannot be loaded: {len(other)} have another shape than the model's"
            f" ({printable(name)}: {list(found)}, not {list(expected)}, ...); config.json or model.config asks for"
            " another shape"
        )
    names = sorted(info["missing_keys"])
    if body := [name for name in names if name.startswith(f"{loaded.base_model_prefix}.")]:
        raise StageError(
            f"the weights in {where} do not fit the model: {len(body)} are missing ({body[0]}, ...); config.json or"
            " model.config asks for another shape"
        )
    check_finite(loaded, f"the weights in {where}")
    if unused := sorted(info["unexpected_keys"]):
        shown = printable(", ".join(unused[:3]))
        log.warning("%d weights of the checkpoint are not used: %s ...", len(unused), shown)
    if names:
        log.warning("%d weights are not in the checkpoint and start fresh: %s ...", len(names), ", ".join(names[:3]))
    return loaded


def _in_a_line(error: Exception) -> str:
    """What `error` says, without line breaks and not too long, behind its type where the text needs it."""
    text = " ".join(str(error).split())
    terse = isinstance(error, ArithmeticError | AssertionError | AttributeError | LookupError | TypeError)
    return printable(f"{type(error).__name__}: {text}" if terse else text, 500)


def check_positions(config: Any, model: Model) -> None:
    """Raise StageError if model.max_positions is above what a model with the configuration `config` has."""
    positions = usable_positions(config.to_dict())
    if positions is not None and model.max_positions > positions:
        raise StageError(
            f"model.max_positions={model.max_positions}: the model has positions for {positions} tokens alone"
        )
