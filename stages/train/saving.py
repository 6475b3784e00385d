"""Low-rank additions to a model (LoRA, through peft), and how a trained model is written and verified."""

import logging
import math
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from stages.core.artifacts import Blocks, write_json
from stages.core.errors import StageError
from stages.model.schema import ADDITIONS, BASE, Adapter, Model
from stages.model.trained import load_trained

if TYPE_CHECKING:
    from stages.model.objectives import Objective

log = logging.getLogger(__name__)

_VERIFIED_BLOCKS = 4
_LOSS_TOLERANCE = 1e-3  # nats per token: fp32 on another device, or with additions merged, differs by some 1e-6


def add_adapter(model: Any, adapter: Adapter, source: Model, seed: int) -> Any:
    """`model` with fresh additions, drawn from `seed`, which alone are trained.

    Raises:
        StageError: if the model has no layer of the names that adapter.targets gives, or one of them shares its weight
            with another layer.
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
        owners = _owners_of_weights(model)
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise StageError(f"adapter.targets={adapter.targets}: {' '.join(str(error).split())}") from None
    for problem in _tied_targets(adapted, owners):
        raise StageError(f"adapter.targets={adapter.targets}: {problem}")
    config.base_model_name_or_path, config.revision = source.path, source.revision  # not the files it was read from
    log.info("adapter: %.2f M parameters are trained", adapted.get_nb_trainable_parameters()[0] / 1e6)
    return adapted


def try_adapter(adapter: Adapter, source: Model) -> None:
    """Raise StageError where `add_adapter` would for a model of `source`, which is built without its weights.

    Nothing is known of a checkpoint whose config is not on this machine.
    """
    import torch
    import transformers

    if source.path is None:
        config = transformers.AutoConfig.for_model(**source.config)
    else:
        try:
            config = transformers.AutoConfig.from_pretrained(
                Path(source.path).expanduser() if source.files is not None else source.path,
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


def _owners_of_weights(model: Any) -> dict[int, list[str]]:
    """Names of the layers that hold each weight, by the weight's identity."""
    owners = defaultdict(list)
    for name, weight in model.named_parameters(remove_duplicate=False):
        owners[id(weight)].append(name.rpartition(".")[0])
    return owners


def _tied_targets(adapted: Any, owners: dict[int, list[str]]) -> Iterator[str]:
    """Layers with an addition whose weight is another layer's as well.

    While training, the addition is one layer's; in the exported model, whose weights are tied, it would be both layers'
    or neither's.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in adapted.modules():
        if isinstance(module, BaseTunerLayer):
            tied = owners[id(module.get_base_layer().weight)]
            if len(tied) > 1:
                yield f"{' and '.join(tied)} share one weight: an addition to one cannot be exported, leave it out"


def probe_loss(model: Any, objective: "Objective", blocks: Blocks) -> float:
    """The loss of `model` over the first few blocks, in nats per predicted token, in this process alone."""
    import torch.nn.functional as F

    from stages.model.masking import IGNORED
    from stages.model.objectives import evaluation_batch, move_batch
    from stages.model.precision import full_precision

    nats, count = 0.0, 0
    with full_precision(model):
        for index in range(min(_VERIFIED_BLOCKS, len(blocks))):
            batch = evaluation_batch(objective, blocks[[index]], [index])
            targets = objective.targets(batch.pop("labels"))
            predicted = targets != IGNORED
            logits = model(**move_batch(batch, model.device)).logits.cpu()
            nats += float(F.cross_entropy(logits[predicted].float(), targets[predicted], reduction="sum"))
            count += int(predicted.sum())
    return nats / max(count, 1)


def verify_saved(directory: Path, task: str, loss: float, objective: "Objective", blocks: Blocks) -> None:
    """Raise StageError unless the model in `directory` has the loss that it had in memory, as `probe_loss` gives it."""
    saved = probe_loss(load_trained(task, directory), objective, blocks)
    if not math.isclose(saved, loss, rel_tol=0.0, abs_tol=_LOSS_TOLERANCE):
        raise StageError(
            f"the exported model is not the one that was trained: its loss on {_VERIFIED_BLOCKS} validation blocks is"
            f" {saved:.4f}, in memory {loss:.4f} nats per token. Nothing was written; transformers or peft"
            " saves this architecture otherwise than it computes it"
        )


def saved_files(adapter: Adapter | None) -> list[str]:
    """Files that `save_model` writes whatever the model is."""
    return [BASE, ADDITIONS] if adapter is not None and not adapter.merge else ["config.json"]


def save_model(model: Any, adapter: Adapter | None, source: Model, directory: Path) -> None:
    """Write a trained model, of `source`, into `directory` as `load_trained` reads it."""
    if adapter is None:
        model.save_pretrained(directory)
    elif adapter.merge:
        model.merge_and_unload().save_pretrained(directory)
    else:
        model.save_pretrained(directory)
        (directory / "README.md").unlink()  # peft's empty model card
        write_json(directory / BASE, TypeAdapter(Model).dump_python(source))
