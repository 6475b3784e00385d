"""Low-rank adapters (LoRA, through peft), and writing and verification of a trained model."""

import logging
import math
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from stages.core.artifacts import Blocks, write_json
from stages.core.errors import StageError, format_cause
from stages.model.schema import ADAPTER_WEIGHTS, BASE_MODEL_CONFIG, Adapter, Model
from stages.model.trained import load_trained_model

if TYPE_CHECKING:
    from stages.model.objectives import Objective

log = logging.getLogger(__name__)

_VERIFIED_BLOCKS = 4
_LOSS_TOLERANCE = 1e-3  # nats per token; fp32 on another device, or with the adapter merged, differs by about 1e-6


def add_adapter(model: Any, adapter: Adapter, source: Model, seed: int) -> Any:
    """Add a randomly initialized adapter to `model`; only its weights are trained.

    Args:
        source: settings of the base model, recorded in the adapter's configuration.
        seed: seed of the adapter's weights.

    Raises:
        StageError: if no layer matches adapter.targets, or a matching layer shares its weight with another layer.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    # A deprecation warning of transformers about the code of peft.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
    torch.manual_seed(seed)
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=adapter.targets or "all-linear",
        fan_in_fan_out=model.config.model_type == "gpt2",  # its linear layers store transposed weights
    )
    try:
        owners = _map_weights_to_layers(model)
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise StageError(f"adapter.targets={adapter.targets}: {format_cause(error)}") from None
    for problem in _find_tied_targets(adapted, owners):
        raise StageError(f"adapter.targets={adapter.targets}: {problem}")
    base = source.path if source.from_ is None else source.from_.description  # not the files from which it was loaded
    config.base_model_name_or_path, config.revision = base, source.revision
    log.info("adapter: %.2f M parameters are trained", adapted.get_nb_trainable_parameters()[0] / 1e6)
    return adapted


def check_adapter(adapter: Adapter, source: Model) -> None:
    """Raise StageError if `add_adapter` would refuse the adapter for a model of `source`.

    Builds the model without allocating its weights. Checks nothing if the configuration of the checkpoint is not on
    this machine, or only in DVC's cache.
    """
    import torch
    import transformers

    if not source.has_files:
        config = transformers.AutoConfig.for_model(**source.config)
    elif source.from_ is not None:
        return
    else:
        try:
            config = transformers.AutoConfig.from_pretrained(
                Path(str(source.path)).expanduser() if source.files is not None else source.path,
                revision=source.revision,
                local_files_only=True,
                trust_remote_code=False,
            )
        except (OSError, ValueError):
            return
    auto = transformers.AutoModelForCausalLM if source.task == "causal" else transformers.AutoModelForMaskedLM
    with torch.device("meta"):
        model = auto.from_config(config)
    add_adapter(model, adapter, source, seed=0)


def _map_weights_to_layers(model: Any) -> dict[int, list[str]]:
    """Map the id() of each weight to the names of the layers that use it."""
    owners = defaultdict(list)
    for name, weight in model.named_parameters(remove_duplicate=False):
        owners[id(weight)].append(name.rpartition(".")[0])
    return owners


def _find_tied_targets(adapted: Any, owners: dict[int, list[str]]) -> Iterator[str]:
    """Yield a message for each layer with an adapter that shares its weight with another layer.

    In training, the adapter changes only one of the layers. In the exported model, which ties the weights, it would
    change both or neither.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in adapted.modules():
        if isinstance(module, BaseTunerLayer):
            tied = owners[id(module.get_base_layer().weight)]
            if len(tied) > 1:
                names = " and ".join(tied)
                yield f"{names} share one weight, so an adapter of one of them cannot be exported: exclude them"


def compute_probe_loss(model: Any, objective: "Objective", blocks: Blocks) -> float:
    """Compute the loss over the first few blocks, in nats per predicted token, in this process only."""
    import torch.nn.functional as F

    from stages.model.isolation import isolate_segments
    from stages.model.masking import IGNORED
    from stages.model.objectives import build_evaluation_batch
    from stages.model.precision import full_precision

    nats, count = 0.0, 0
    with full_precision(model):
        for index in range(min(_VERIFIED_BLOCKS, len(blocks))):
            batch = build_evaluation_batch(objective, blocks, [index])
            targets = objective.get_targets(batch.pop("labels"))
            is_predicted = targets != IGNORED  # [1, block_size] bool
            batch = {key: value.to(model.device) for key, value in batch.items()}
            logits = model(**isolate_segments(batch, model)).logits.cpu()  # [1, block_size, vocab_size]
            nats += float(F.cross_entropy(logits[is_predicted].float(), targets[is_predicted], reduction="sum"))
            count += int(is_predicted.sum())
    return nats / max(count, 1)


def verify_saved_model(directory: Path, task: str, loss: float, objective: "Objective", blocks: Blocks) -> None:
    """Raise StageError if the model in `directory` does not have the loss that it had in memory.

    Args:
        loss: `compute_probe_loss` of the model in memory, over `blocks`.
    """
    saved = compute_probe_loss(load_trained_model(task, directory), objective, blocks)
    if not math.isclose(saved, loss, rel_tol=0.0, abs_tol=_LOSS_TOLERANCE):
        raise StageError(
            f"the exported model differs from the trained one: its loss on {_VERIFIED_BLOCKS} validation blocks is"
            f" {saved:.4f} nats per token, but {loss:.4f} in memory. Nothing was written; transformers or peft does not"
            " save this architecture correctly"
        )


def list_saved_files(adapter: Adapter | None) -> list[str]:
    """Return the names of the files that `save_model` writes for every model."""
    return [BASE_MODEL_CONFIG, ADAPTER_WEIGHTS] if adapter is not None and not adapter.merge else ["config.json"]


def save_model(model: Any, adapter: Adapter | None, source: Model, directory: Path) -> None:
    """Write a trained model into `directory`, for `load_trained_model`; `source` has the settings of its base model."""
    if adapter is None:
        model.save_pretrained(directory)
    elif adapter.merge:
        model.merge_and_unload().save_pretrained(directory)
    else:
        model.save_pretrained(directory)
        (directory / "README.md").unlink()  # peft's empty model card
        write_json(directory / BASE_MODEL_CONFIG, TypeAdapter(Model).dump_python(source, by_alias=True))
