"""Models: built from a configuration or loaded from a pinned checkpoint of safetensors, never by remote code."""

import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig

from stages.core.config import nearest
from stages.core.errors import StageError
from stages.hub.files import OFFSET_POSITIONS, pinned_files, usable_positions, weights_files
from stages.model.environment import drop_environment_variables, keep_freed_memory
from stages.model.hardware import Hardware, find_device
from stages.model.schema import Model
from stages.tokens.vocabulary import Vocabulary

log = logging.getLogger(__name__)

# Accelerate takes precision, accumulation, compilation and more from these, where DVC cannot see them.
_SETTINGS_OF_OTHERS = ("ACCELERATE_", "FSDP_")
_LAUNCHER_VARIABLES = ("LOCAL_RANK", "MASTER_", "RANK", "WORLD_SIZE")

_AUTO_CLASS = {"causal": "AutoModelForCausalLM", "mlm": "AutoModelForMaskedLM"}


def prepare_torch(hardware: Hardware) -> None:
    """Set threads, keep a CPU's freed memory, quiet libraries, and refuse a device that is not there.

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
    find_device(hardware)


def build_model(model: Model, vocabulary: Vocabulary, seed: int) -> Any:
    """The model before training, in fp32 on the CPU: fresh weights drawn from `seed`, or those of the checkpoint.

    Raises:
        StageError: if the checkpoint, its configuration and the vocabulary do not belong together.
    """
    with tempfile.TemporaryDirectory() as scratch:  # holds the pinned files and no others
        built = _build(model, vocabulary, seed, Path(scratch))
    _check_positions(built.config, model)
    num_embeddings = built.get_input_embeddings().num_embeddings
    if vocabulary.size > num_embeddings:
        raise StageError(f"the tokenizer has {vocabulary.size} tokens, the model embeddings for {num_embeddings} alone")
    log.info("%s with %.1f M parameters", type(built).__name__, sum(p.numel() for p in built.parameters()) / 1e6)
    return built


def _build(model: Model, vocabulary: Vocabulary | None, seed: int, scratch: Path) -> Any:
    config = _configuration(model, scratch)
    auto = getattr(transformers, _AUTO_CLASS[model.task])
    if type(config) not in auto._model_mapping:
        raise StageError(
            f"model.config.model_type={config.model_type}: transformers has no such model for task={model.task}"
        )
    if unknown := [key for key in model.config if key != "model_type" and not hasattr(config, key)]:
        names = nearest(unknown[0], list(config.to_dict()))
        raise StageError(f"model.config.{unknown[0]}: {config.model_type} has no such value; {names}")
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
        try:
            return auto.from_config(config, dtype=torch.float32)
        except (ArithmeticError, TypeError, ValueError) as error:
            raise StageError(f"model.config makes no {config.model_type}: {_in_a_line(error)}") from None
    _link(weights_files("model", str(model.path), model.revision, model.files), scratch)
    return _load(auto, scratch, config, str(model.path))


def _overridden(config: Any, model: Model) -> Any:
    """`config` with the values of model.config."""
    values = {key: value for key, value in model.config.items() if key != "model_type"}
    if model.path is None:  # made anew, for values that follow from others (GPT-Neo's layers from their kinds)
        try:
            return type(config)(**values)
        except Exception as error:  # each architecture checks its values in its own way
            shown = ", ".join(f"model.config.{key}={value!r}" for key, value in values.items())
            raise StageError(f"{shown}: {_in_a_line(error)}") from None
    for key, value in values.items():
        try:
            setattr(config, key, value)
        except Exception as error:
            raise StageError(f"model.config.{key}={value!r}: {_in_a_line(error)}") from None
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
    """The model that save_pretrained wrote into `directory`, in fp32 on the CPU."""
    return _load(getattr(transformers, _AUTO_CLASS[task]), Path(directory), None, str(directory))


def _configuration(model: Model, scratch: Path) -> Any:
    """The architecture's configuration before overrides; a checkpoint's own files of it are linked into `scratch`."""
    model_type = model.config.get("model_type")
    if model.path is None:
        try:
            return AutoConfig.for_model(model_type)
        except ValueError:
            known = list(transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES)
            raise StageError(
                f"model.config.model_type={model_type} is unknown; {nearest(str(model_type), known)}"
            ) from None
    names = ["config.json", "generation_config.json"]
    _link(pinned_files("model", model.path, model.revision, model.files, names, names[:1]), scratch)
    try:
        config = AutoConfig.from_pretrained(scratch, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each architecture checks its values in its own way
        reason = _in_a_line(error).replace(str(scratch), str(model.path))
        if "trust_remote_code" in reason:
            reason = "its model_type is none of transformers' own, and code that comes with a model is never run"
        raise StageError(f"model.path={model.path}: its config.json cannot be used: {reason}") from None
    if model_type not in (None, config.model_type):
        raise StageError(f"model.config.model_type={model_type}: the checkpoint {model.path} is a {config.model_type}")
    return config


def _load(auto: Any, directory: Path, config: Any, where: str) -> Any:
    try:
        loaded, info = auto.from_pretrained(
            directory,
            config=config,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise StageError(f"the weights in {where} cannot be loaded: {_in_a_line(error)}") from None
    names = sorted(info["missing_keys"])
    if body := [name for name in names if name.startswith(f"{loaded.base_model_prefix}.")]:
        raise StageError(
            f"the weights in {where} do not fit the model: {len(body)} are missing ({body[0]}, ...); config.json or"
            " model.config asks for another shape"
        )
    if unused := sorted(info["unexpected_keys"]):
        log.warning("%d weights of the checkpoint are not used: %s ...", len(unused), ", ".join(unused[:3]))
    if names:
        log.warning("%d weights are not in the checkpoint and start fresh: %s ...", len(names), ", ".join(names[:3]))
    return loaded


def _in_a_line(error: Exception) -> str:
    """What `error` says, without its line breaks."""
    return " ".join(str(error).split())


def _check_positions(config: Any, model: Model) -> None:
    positions = usable_positions(config.to_dict())
    if positions is not None and model.max_positions > positions:
        raise StageError(
            f"model.max_positions={model.max_positions}: the model has positions for {positions} tokens alone"
        )
