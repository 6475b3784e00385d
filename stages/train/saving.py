"""Low-rank additions to a model (LoRA, through peft), and how a trained model is written."""

import logging
import warnings
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from stages.core.artifacts import write_json
from stages.core.errors import StageError
from stages.model.schema import ADDITIONS, BASE, Adapter, Model

log = logging.getLogger(__name__)


def add_adapter(model: Any, adapter: Adapter, source: Model, seed: int) -> Any:
    """`model` with fresh additions, drawn from `seed`, which alone are trained.

    Raises:
        StageError: if the model has no layer of the names that adapter.targets gives.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    # transformers' message to peft, not to us.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
    torch.manual_seed(seed)
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=adapter.targets or "all-linear",
        fan_in_fan_out=model.config.model_type == "gpt2",  # whose linear layers hold their weights transposed
    )
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise StageError(f"adapter.targets={adapter.targets}: {' '.join(str(error).split())}") from None
    config.base_model_name_or_path, config.revision = source.path, source.revision  # not the files it was read from
    log.info("adapter: %.2f M parameters are trained", adapted.get_nb_trainable_parameters()[0] / 1e6)
    return adapted


def saved_files(adapter: Adapter | None) -> list[str]:
    """Files that `save_model` writes whatever the model is."""
    return [BASE, ADDITIONS] if adapter is not None and not adapter.merge else ["config.json"]


def save_model(model: Any, adapter: Adapter | None, source: Model, directory: Path) -> None:
    """Write a trained model, of `source`, into `directory` as evaluate's `load_trained` reads it."""
    if adapter is None:
        model.save_pretrained(directory)
    elif adapter.merge:
        model.merge_and_unload().save_pretrained(directory)
    else:
        model.save_pretrained(directory)
        (directory / "README.md").unlink()  # peft's empty model card
        write_json(directory / BASE, TypeAdapter(Model).dump_python(source))
